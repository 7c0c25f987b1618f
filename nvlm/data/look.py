"""The first records of a run's files, looked at before anything is loaded or written. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from nvlm.config.values import Config, problem
from nvlm.data.images import open_regular
from nvlm.data.messages import first_question
from nvlm.data.outline import Processor, build_processor, outline
from nvlm.data.record import BadRecord, Record, one_record
from nvlm.data.sources import check_file, read_line
from nvlm.tiling.placement import PlacementRule

_MOST = 20  # records of a file
_SHOWN = 3  # reasons in a message
_LONGEST = 1 << 26  # bytes of a line


def check_data(config: Config, placement: PlacementRule) -> None:
    """Raise ConfigError where a file of records is not there, or none of its first records can be used.

    Held-out records must have an answer too. Reads image headers, but no pixels. A run that only wants to be counted
    has no data.
    """
    if config.data.source != "jsonl" or config.dry_run:
        return
    processor = build_processor(config, placement)
    _check("data.path", config.data.path, _MOST, lambda record: outline(record, processor))
    if config.data.heldout_path and config.evaluate.questions:
        asked = min(_MOST, config.evaluate.questions)
        _check("data.heldout_path", config.data.heldout_path, asked, lambda record: _question(record, processor))


def _question(record: Record, processor: Processor) -> None:
    asked, _ = first_question(record)
    outline(asked, processor, generate=True)


def _check(key: str, path: str | None, most: int, use: Callable[[Record], object]) -> None:
    """Raise ConfigError where `use` finds none of the first `most` records of a file usable."""
    check_file(path or "", key)
    reasons: dict[str, str] = {}  # to the first record that has it
    count = 0
    for name, line in islice(_lines(Path(path or "")), most):
        try:
            with one_record():
                use(read_line(line, name, Path(path or "").resolve().parent))
            return
        except BadRecord as reason:
            reasons.setdefault(str(reason), name)
            count += 1
    if not reasons:
        raise problem(key, f"{path}, which holds blank lines alone", "one JSON object a line", f"{key}=FILE")
    shown = "; ".join(f"{name}: {reason}" for reason, name in islice(reasons.items(), _SHOWN))
    which = f"its first {count} records are all" if count > 1 else "its first record is"
    raise problem(key, f"{path}: {which} unusable ({shown})", "usable records", f"mend them, or {key}=FILE")


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, text) of the lines that are not blank."""
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
            if line.strip():
                yield f"{path.name}:{number}", line
