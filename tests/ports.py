"""Finds a TCP port for a test that must name one before anything listens on it."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port that is currently free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
