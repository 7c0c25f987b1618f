"""Counts the records that could not be used, and ends a run that has too many of them. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nvlm.config.values import ConfigError

_LEAST = 1000  # a smaller number of records counts as this many, so that the first bad record does not end the run
_HALF = 0.5  # a larger share ends any run, however few records were drawn
_IN_A_ROW = 4  # consecutive unusable records, in whole steps: fewer can occur by chance
_SHOWN = 3  # reasons quoted in the message


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of records since this process started.

    `in_a_row`: records of the latest steps, as long as none of these steps had a usable record. `fewer_tiles`: records
    whose images got fewer tiles so that they fit.
    """

    drawn: int = 0
    skipped: int = 0
    in_a_row: int = 0
    fewer_tiles: int = 0

    def after(self, drawn: int, skipped: int, fewer_tiles: int) -> Tally:
        """The tally after one more step, in which so many records were drawn."""
        in_a_row = self.in_a_row + drawn if skipped == drawn else 0
        return Tally(self.drawn + drawn, self.skipped + skipped, in_a_row, self.fewer_tiles + fewer_tiles)

    def __str__(self) -> str:
        named = ", named in skipped.jsonl" if self.skipped else ""
        tiles = f"; {self.fewer_tiles} with fewer tiles than tiling.max_tiles allows, to fit"
        return f"records: {self.drawn} drawn, {self.skipped} skipped{named}{tiles if self.fewer_tiles else ''}"


def too_many(tally: Tally, limit: float, size: int, last: bool) -> str | None:
    """Why the run must stop, or None. `size`: records in an epoch; `limit`: data.max_skipped; `last`: the last step.

    A bad record returns in each epoch, so shares are taken over one epoch.
    """
    epochs = max(1.0, tally.drawn / size)
    skipped, drawn = tally.skipped / epochs, tally.drawn / epochs
    if tally.in_a_row >= _IN_A_ROW or (last and tally.in_a_row == tally.drawn):
        return f"none of the last {tally.in_a_row} records can be used, so that nothing is learned"
    if skipped > limit * max(drawn, _LEAST):
        return f"more than data.max_skipped={limit:g} of the records (of at least {_LEAST}) cannot be used"
    if tally.skipped >= _IN_A_ROW and skipped > max(limit, _HALF) * drawn:
        return "more than half of the records cannot be used"
    return None


def stopped(tally: Tally, why: str, skipped: Path) -> ConfigError:
    """The error that ends a run for the reason `why`, with the first reasons from `skipped`, its skipped.jsonl."""
    reasons = "; ".join(f"{row['record']}: {row['reason']}" for row in _first(skipped))
    examples = f" First: {reasons}." if reasons else ""
    return ConfigError(
        f"bad records: got {tally.skipped} of {tally.drawn}; {why}.{examples} Fix: repair the records listed in "
        f"{skipped}, or raise data.max_skipped, the share that may be skipped"
    )


def _first(path: Path) -> list[dict[str, str]]:
    try:
        with open(path) as file:
            return [json.loads(line) for line, _ in zip(file, range(_SHOWN))]
    except (OSError, ValueError):  # an unreadable log must not hide why the run ends
        return []
