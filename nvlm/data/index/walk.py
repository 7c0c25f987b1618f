"""Walks the records of a source once and keeps what planning needs of them. Imports no torch.

The work is divided into tasks, each of which writes a file whose name says what it depends on: first one per JSON file,
which finds its rows, then one per chunk of records. A task whose file is there is done, so a walk that was killed goes
on where it was. The files do not depend on the number of processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from nvlm.config.data import Source
from nvlm.data.index.files import IS_BAD, IS_DOCUMENT, PICTURE
from nvlm.data.index.state import digest_of, settings_of, states_of
from nvlm.data.measure import Measure, measure
from nvlm.data.outline import Processor
from nvlm.data.record import BadRecord, one_record
from nvlm.data.remote import Remote
from nvlm.data.sources.json_file import find_places
from nvlm.data.sources.json_places import PLACE
from nvlm.data.sources.registry import Records, build_source, prefix_of, searched_files
from nvlm.data.table import Table

_CHUNK = 8192  # records, at most
_CHUNKS = 512  # at least, unless that makes them smaller than _LEAST records
_LEAST = 64


@dataclass(frozen=True, slots=True)
class Walk:
    """The walk of a source, whose name is `name`. `folder`: where its tasks write."""

    source: Source
    name: str
    seed: int
    processor: Processor
    folder: Path

    def places_files(self) -> dict[Path | Remote, Path]:
        """For each JSON file, the file with the places of its rows."""
        files = searched_files(self.source, self.name)
        return {
            file: self.folder / f"places-{number}-{digest_of(states_of([file]))}" for number, file in enumerate(files)
        }

    def find(self, file: Path | Remote, target: Path) -> None:
        """Write the places of the rows of the JSON file `file` to `target`."""
        with _whole(target) as aside, open(aside, "wb") as target:
            for found in find_places(str(file), f"{prefix_of(self.name)}path"):
                target.write(found.tobytes())

    @property
    def joined_places(self) -> Path:
        """One file with the places of all JSON files: there may be more of these than a process can keep open."""
        return self.folder / f"places-{digest_of([file.name for file in self.places_files().values()])}"

    def join_places(self) -> None:
        """Write that file, once the places of each JSON file are found."""
        with _whole(self.joined_places) as aside, open(aside, "wb") as target:
            for path in self.places_files().values():
                with open(path, "rb") as file:
                    shutil.copyfileobj(file, target, 1 << 20)

    def chunks(self) -> dict[range, Path]:
        """Consecutive records, and the file with what is known of them."""
        records = opened(self)
        settings = settings_of(self.source, self.name, self.seed, self.processor)
        size = min(_CHUNK, max(_LEAST, len(records) // _CHUNKS))
        key = digest_of([settings, states_of(records.files), len(records)])
        starts = range(0, len(records), size)
        return {range(at, min(at + size, len(records))): self.folder / f"chunk-{key}-{at}.npz" for at in starts}

    def measure(self, numbers: range, target: Path) -> None:
        """Write what is known of the records `numbers` to `target`."""
        with _whole(target) as aside, open(aside, "wb") as file:
            np.savez(file, **measured(opened(self), self.processor, numbers))


@lru_cache(maxsize=1)
def opened(walk: Walk) -> Records:
    """The records, opened with the places that were found."""
    files = list(walk.places_files().values())
    places = Table(walk.joined_places, PLACE).split([file.stat().st_size // PLACE.itemsize for file in files])
    return build_source(walk.source, walk.name, walk.seed, places=places)


def measured(records: Records, processor: Processor, numbers: Sequence[int]) -> dict[str, np.ndarray]:
    """What is known of the records `numbers`: for each its text tokens (or IS_BAD) and its number of pictures; the
    row of each picture; the reason of each bad record, and where it ends."""
    text, counts, pictures, reasons = [], [], [], []
    for number in numbers:
        try:
            with one_record():
                found = measure(records[number], processor)
        except BadRecord as reason:
            found = Measure(IS_BAD, ())
            reasons.append(str(reason).encode())
        text.append(found.words if found.before is None else found.words | IS_DOCUMENT)
        counts.append(len(found.sizes))
        before = found.before or (0,) * len(found.sizes)
        pictures += [(*size, *((0,) if len(size) == 2 else ()), tokens) for size, tokens in zip(found.sizes, before)]
    return {
        "text": np.array(text, dtype=np.uint32),
        "counts": np.array(counts, dtype=np.uint32),
        "pictures": np.array(pictures, dtype=PICTURE),
        "ends": np.cumsum([len(reason) for reason in reasons], dtype=np.uint64),
        "reasons": np.frombuffer(b"".join(reasons), dtype=np.uint8),
    }


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path beside `path`, which is renamed to it at the end of the block."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
