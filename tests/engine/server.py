"""Imported by the server that processes are forked from: see tests.engine.choose."""

from tests.engine import choose

choose.prepare()
