"""One row of the table."""

from __future__ import annotations

from dataclasses import dataclass

OK, COSTS, STOPS = "ok", "costs", "STOPS"


@dataclass(frozen=True, slots=True)
class Row:
    """One thing. `state`: OK, COSTS where something is lost without it, STOPS where nothing trains without it."""

    name: str
    state: str
    found: str
    costs: str = ""
    fix: str = ""
