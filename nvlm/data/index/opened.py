"""A run's records opened through its index, after checking that they are the indexed ones. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

from nvlm.config.data import DataConfig, Source
from nvlm.config.fields import named
from nvlm.config.values import ConfigError, problem
from nvlm.data.blend import Blended, check_text_only
from nvlm.data.index.files import META, SourceIndex, read_meta
from nvlm.data.index.state import changed_file, changed_names, changed_setting, settings_of, states_of
from nvlm.data.measure import Measure
from nvlm.data.outline import Processor
from nvlm.data.remote import Remote
from nvlm.data.sources.registry import Records, build_records, named_sources, searched_files

PREPARE = "python launch/prepare.py with the same keys"


class Index:
    """What the indices of all sources say about the records of a run, which are numbered through."""

    def __init__(self, parts: Mapping[str, SourceIndex], texts: frozenset[str] = frozenset()) -> None:
        self.parts, self.texts = tuple(parts.items()), texts
        self.ends = tuple(accumulate(map(len, parts.values())))

    def measure(self, record: int) -> Measure:
        """The measure of a record. Raises BadRecord."""
        number = bisect_right(self.ends, record)
        name, part = self.parts[number]
        found = part.measure(record - (self.ends[number - 1] if number else 0))
        if name in self.texts:
            check_text_only(name, len(found.sizes))
        return found


def open_records(data: DataConfig, seed: int, processor: Processor, fix: str = PREPARE) -> tuple[Records, Index | None]:
    """The training records of `data` and, if it has one, their index.

    Raises ConfigError if the index is not that of these records; `fix`: the command that prepares it.
    """
    if data.index is None:
        return build_records(data, seed), None
    parts = {
        name: open_index(Path(data.index) / folder_name(name), source, name, seed, processor, fix)
        for name, source in named_sources(data.source).items()
    }
    records = build_records(data, seed, places={name: part.places for name, part in parts.items()})
    blended = isinstance(records, Blended)
    for name, part in (records.parts if blended else {"": records}).items():
        check_files(parts[name], part, fix)
    return records, Index(parts, records.texts if blended else frozenset())


def open_index(
    folder: Path, source: Source, name: str, seed: int, processor: Processor, fix: str = PREPARE
) -> SourceIndex:
    """The index of `source`, whose name is `name`. Raises ConfigError if it was prepared with other settings."""
    if not (folder / META).exists():
        raise problem("data.index", f"{named(folder)}, where no index is", "an index", fix)
    try:
        index = SourceIndex(folder, read_meta(folder))
    except (OSError, ValueError) as error:
        raise _stale(folder, f"that cannot be read ({error})", fix) from None
    why = changed_setting(index.meta, settings_of(source, name, seed, processor))
    before = [file.name for file in index.meta.files if file.rows is not None]
    if why or (why := changed_names(before, searched_files(source, name))):
        raise _stale(folder, why, fix)
    return index


def check_files(index: SourceIndex, records: Records, fix: str = PREPARE) -> None:
    """Raise ConfigError if `records` are not those of `index`."""
    why = changed_file(index.meta.files, records.files)
    if why or len(records) != len(index):
        raise _stale(index.folder, why or f"of {len(index):,} records, now there are {len(records):,}", fix)


def known_digests(data: DataConfig, records: Records) -> dict[Path | Remote, str]:
    """The digests of those files of `records` whose size and time are as the index of `data` has them."""
    if data.index is None:
        return {}
    known = {}
    for name, part in (records.parts if isinstance(records, Blended) else {"": records}).items():
        before = read_meta(Path(data.index) / folder_name(name)).files
        pairs = zip(before, states_of(part.files), part.files, strict=True)
        known |= {
            file: old.digest for old, new, file in pairs if (old.bytes, old.modified) == (new.bytes, new.modified)
        }
    return known


def folder_name(name: str) -> str:
    """The name of the folder with the index of the source `name`."""
    return name or "records"


def _stale(folder: Path, why: str, fix: str) -> ConfigError:
    return problem("data.index", f"{folder}, an index {why}", "the index of these records", fix)
