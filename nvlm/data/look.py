"""Checks the first records of a run's files before anything is loaded or written. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from nvlm.config.values import Config, problem
from nvlm.data.index.opened import PREPARE, open_records
from nvlm.data.messages import first_question
from nvlm.data.outline import Processor, build_processor, outline
from nvlm.data.record import BadRecord, First, Record, one_record
from nvlm.data.sources.registry import first_records
from nvlm.tiling.placement import PlacementRule

_MOST = 20  # records checked per source
_SHOWN = 3  # reasons in the message


def check_data(config: Config, placement: PlacementRule, prepare: str = PREPARE) -> None:
    """Raise ConfigError if a file of records is missing or none of its first records can be used, or if data.index is
    not the index of these records. `prepare`: the command that makes one.

    Held-out records must also have an answer. Reads image headers, but no pixels. A dry run reads no data.
    """
    if config.dry_run:
        return
    processor = build_processor(config, placement)
    if config.data.index is not None:
        open_records(config.data, config.seed, processor, prepare)
    for training in first_records(config.data.source):
        _check(training, _MOST, lambda record: outline(record, processor))
    asked, measured = (min(_MOST, count) for count in (config.evaluate.questions, config.evaluate.losses))
    for heldout in first_records(config.data.source, heldout=True) if asked or measured else ():
        _check(heldout, asked or measured, lambda record: (_question if asked else outline)(record, processor))


def _question(record: Record, processor: Processor) -> None:
    asked, _ = first_question(record)
    outline(asked, processor, generate=True)


def _check(first: First, most: int, use: Callable[[Record], object]) -> None:
    """Raise ConfigError if `use` accepts none of the first `most` records."""
    reasons: dict[str, str] = {}  # to the first record that has it
    count = 0
    for name, read in islice(first.records, most):
        try:
            with one_record():
                use(read())
            return
        except BadRecord as reason:
            reasons.setdefault(str(reason), name)
            count += 1
    shown = "; ".join(f"{name}: {reason}" for reason, name in islice(reasons.items(), _SHOWN))
    which = f"its first {count} records are all" if count > 1 else "its first record is"
    got = f"{first.place}: {which} unusable ({shown})"
    raise problem(first.key, got, "usable records", first.fix)
