"""Imported by the fork server of these tests' processes; see tests.engine.choose."""

from tests.engine import choose

choose.prepare()
