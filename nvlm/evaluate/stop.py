"""An evaluation that is interrupted because its run has to stop."""

from __future__ import annotations

from collections.abc import Callable

Stop = Callable[[], bool]
"""Whether this rank was told to stop. Ranks agree on it before each batch."""


class Stopped(Exception):
    """The evaluation ended early; all ranks raise it."""


def never() -> bool:
    """Nothing stops the evaluation but the end of its process."""
    return False
