"""How many records could not be used, and when that are too many to go on. Plain numbers, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nvlm.config.values import ConfigError

_LEAST = 1000  # records against which the share is judged at least, so that the first bad one ends no run
_HALF = 0.5  # no run goes on with more than this share, however few records were drawn
_IN_A_ROW = 4  # records: of steps without a usable one. Smaller steps can be without one by chance
_SHOWN = 3  # reasons in a message


@dataclass(frozen=True, slots=True)
class Tally:
    """Records drawn since this start of the run; how many of them were skipped, how many of these in the last steps
    that had no usable record, and how many lost tiles to fit."""

    drawn: int = 0
    skipped: int = 0
    in_a_row: int = 0
    fewer_tiles: int = 0

    def after(self, drawn: int, skipped: int, fewer_tiles: int) -> Tally:
        """The tally behind a step of so many records."""
        in_a_row = self.in_a_row + drawn if skipped == drawn else 0
        return Tally(self.drawn + drawn, self.skipped + skipped, in_a_row, self.fewer_tiles + fewer_tiles)

    def __str__(self) -> str:
        named = ", named in skipped.jsonl" if self.skipped else ""
        tiles = f"; {self.fewer_tiles} with fewer tiles than tiling.max_tiles, for want of room"
        return f"records: {self.drawn} drawn, {self.skipped} skipped{named}{tiles if self.fewer_tiles else ''}"


def too_many(tally: Tally, limit: float, size: int, last: bool) -> str | None:
    """Why a run of `size` records must stop, None where it may go on. `limit`: data.max_skipped; `last`: its last step.

    A bad record comes again in each epoch, so shares are of one epoch.
    """
    epochs = max(1.0, tally.drawn / size)
    skipped, drawn = tally.skipped / epochs, tally.drawn / epochs
    if tally.in_a_row >= _IN_A_ROW or (last and tally.in_a_row == tally.drawn):
        return f"none of the last {tally.in_a_row} records can be used, so that nothing is learned"
    if skipped > limit * max(drawn, _LEAST):
        return f"more than data.max_skipped={limit:g} of the records (of {_LEAST} where they are fewer) cannot be used"
    if tally.skipped >= _IN_A_ROW and skipped > max(limit, _HALF) * drawn:
        return "more than half of the records cannot be used"
    return None


def stopped(tally: Tally, why: str, skipped: Path) -> ConfigError:
    """The end of a run for the reason `why`; `skipped`: its skipped.jsonl, of which the first reasons are told."""
    reasons = "; ".join(f"{row['record']}: {row['reason']}" for row in _first(skipped))
    told = f" First: {reasons}." if reasons else ""
    return ConfigError(
        f"bad records: got {tally.skipped} of {tally.drawn}; {why}.{told} Fix: mend the records that {skipped} names; "
        f"data.max_skipped raises the share that is let pass"
    )


def _first(path: Path) -> list[dict[str, str]]:
    try:
        with open(path) as file:
            return [json.loads(line) for line, _ in zip(file, range(_SHOWN))]
    except (OSError, ValueError):  # what cannot be read here is not the reason of the end
        return []
