"""The rows of folders that `save_to_disk` of the library datasets wrote, mapped into memory. Imports no torch, and
datasets only where it is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm.config.data import Datasets
from nvlm.config.fields import named
from nvlm.config.values import problem
from nvlm.data.record import BadRecord, First, printable
from nvlm.data.remote import is_remote, place
from nvlm.data.sources.files import image_root, is_glob, matching
from nvlm.data.sources.parquet import plain_row
from nvlm.data.sources.rows import Form, Joined, Row, RowRecords, find, first_records, leading

if TYPE_CHECKING:
    from datasets import Dataset

_STATE, _SPLITS = "state.json", "dataset_dict.json"  # in the folder of a dataset, and in that of several splits


class SavedDataset:
    """The rows of a folder as plain Python values; images are not decoded. Raises ConfigError. `key`: the setting that
    named it."""

    def __init__(self, path: str | Path, key: str) -> None:
        _check_folder(Path(path), key)
        self.path, self.key = Path(path), key
        dataset = _loaded(self.path, key)
        self.files: Sequence[Path] = [Path(file["filename"]) for file in dataset.cache_files]
        if outside := [file for file in self.files if file.parent != self.path]:
            got = f"{path}, whose {_STATE} names {outside[0]}"
            raise problem(key, got, "files in the folder itself", "save it again with save_to_disk")
        self.batches = dataset.data.to_batches()
        self.ends = tuple(accumulate(batch.num_rows for batch in self.batches))
        self.whole: set[int] = set()  # the batches that are known to be undamaged

    def __reduce__(self) -> tuple:
        return SavedDataset, (self.path, self.key)  # pickled batches would be copies of the data

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Row:
        number, place = find(self.ends, index)
        if number not in self.whole:
            self._check(number)
        return plain_row(self.batches[number], place)

    def _check(self, number: int) -> None:
        """Raise BadRecord if a batch is damaged: reading it could end the process. Does not read images."""
        import pyarrow as pa

        try:
            self.batches[number].validate(full=True)
        except pa.ArrowException as error:
            raise BadRecord(f"batch {number} of the rows is damaged: {printable(str(error))}") from None
        self.whole.add(number)

    def name(self, index: int) -> str:
        """FOLDER[ROW], counted from 0."""
        return f"{self.path.resolve().name}[{index}]"


def build(source: Datasets, path: str, key: str, form: Form) -> RowRecords:
    """The records of the folders that `path` names. Raises ConfigError."""
    return RowRecords(rows_of(path, key), form, image_root(path, source.root, key))


def first(source: Datasets, path: str, key: str, form: Form) -> First:
    """The first records; all folders are opened."""
    return first_records(key, path, leading(rows_of(path, key)), form, image_root(path, source.root, key))


def rows_of(path: str, key: str) -> Joined:
    """The rows of the folders that `path`, a folder or a glob, names. Raises ConfigError."""
    if is_remote(path):
        got = f"{place(path, key)}, a folder that is mapped into memory"
        raise problem(key, got, "a folder on a disk", f"copy it, or use its Parquet files: data=parquet {key}={path}")
    folders = matching(path, key) if is_glob(path) else [Path(path)]
    found = Joined([SavedDataset(folder, key) for folder in folders])
    if not len(found):
        raise problem(key, f"{path}, which has no rows", "a row per record", f"{key}=FOLDER")
    return found


def _check_folder(path: Path, key: str) -> None:
    expected, fix = "a folder that save_to_disk of the library datasets wrote", f"{key}=FOLDER"
    if not path.is_dir():
        raise problem(key, named(path) + (", a file" if path.exists() else ""), expected, fix)
    if (path / _STATE).is_file():
        return
    splits = _splits(path)
    if splits:
        raise problem(
            key, f"{path}, which has the splits {', '.join(splits)}", "one split", f"{key}={path / splits[0]}"
        )
    raise problem(key, f"{path}, which has no {_STATE}", expected, fix)


def _splits(path: Path) -> list[str]:
    """The names of the splits in the folder of a DatasetDict; none if it is not one."""
    try:
        names = json.loads((path / _SPLITS).read_text("utf-8"))["splits"]
        return [name for name in names if (path / name / _STATE).is_file()]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _loaded(path: Path, key: str) -> Dataset:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # of many types, for files that are missing, damaged or of another version
        got = f"{path}, which cannot be opened ({type(error).__name__}: {printable(str(error))})"
        raise problem(key, got, "a folder that save_to_disk wrote, complete", "copy or save it again") from None
