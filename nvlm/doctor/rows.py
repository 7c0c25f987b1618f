"""One row of the table."""

from __future__ import annotations

from dataclasses import dataclass

OK, COSTS, STOPS = "ok", "costs", "STOPS"


@dataclass(frozen=True, slots=True)
class Row:
    """One item. `state`: OK, COSTS if something is lost without it, STOPS if training is impossible without it."""

    name: str
    state: str
    found: str
    costs: str = ""
    fix: str = ""
