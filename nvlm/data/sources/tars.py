"""The samples of tar files in WebDataset's layout as rows. Nothing is unpacked to disk, and no name in a tar is used as
a path. Imports no torch."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from nvlm.config.data import Webdataset
from nvlm.config.values import problem
from nvlm.data.forms.dialogue import TURNS
from nvlm.data.images import open_regular
from nvlm.data.record import BadRecord, First, Record
from nvlm.data.remote import Remote, spans
from nvlm.data.sources.energon import shards_of
from nvlm.data.sources.files import image_root
from nvlm.data.sources.json_file import parsed
from nvlm.data.sources.recent import Recent
from nvlm.data.sources.rows import Form, Joined, Row, RowRecords, first_records, leading
from nvlm.data.sources.tar_index import index_path, members, offsets_of, opened_tar, split_name
from nvlm.data.video.clip import SUFFIXES as VIDEOS
from nvlm.data.video.clip import Video

SUFFIXES = (".tar",)
_LARGEST = 256 << 20  # bytes of a sample
_OPEN = 64  # files
IMAGES = frozenset("jpg jpeg png webp gif bmp tif tiff ppm pgm".split())
_OTHERS = frozenset("mp3 wav flac ogg m4a".split())  # what a record may not lose silently


class TarFile:
    """The samples of a tar file as rows. `key`: the setting that named it. Raises ConfigError."""

    def __init__(self, path: Path | Remote, key: str, opened: Recent) -> None:
        self.offsets = offsets_of(path, key)
        self.path, self.opened = path, opened

    @property
    def files(self) -> Sequence[Path | Remote]:
        """The tar."""
        return (self.path,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = (int(self.offsets[index + step]) for step in (0, 1))
        if end - start > _LARGEST:
            raise BadRecord(f"a sample of {end - start >> 20} MiB, more than {_LARGEST >> 20}")
        data = self.opened.get(self.path, lambda: spans(self.path, open_regular))(start, end - start)
        if len(data) < end - start:
            raise BadRecord("the tar is cut short within this sample")
        return row_of(*parts_of(data))

    def name(self, index: int) -> str:
        """FILE[SAMPLE], counted from 0."""
        return f"{self.path.name}[{index}]"


def parts_of(data: bytes) -> tuple[str, dict[str, bytes]]:
    """The key of the sample that is stored in `data`, and its parts by name. Raises BadRecord."""
    key, parts = None, {}
    try:
        for one in members(opened_tar(io.BytesIO(data))):
            if not one.isreg() or one.issparse():
                raise BadRecord(f"member {one.name!r} is a link, a device or a sparse file: only files are read")
            if (name := split_name(one.name)) is None:
                continue
            if key not in (None, name[0]):
                raise BadRecord(f"members {key!r} and {name[0]!r} in one sample: the index does not fit the tar")
            key = name[0]
            if name[1] in parts:
                raise BadRecord(f"two members {name[1]!r} of {key!r}")
            parts[name[1]] = data[one.offset_data : one.offset_data + one.size]
    except tarfile.TarError as error:
        raise BadRecord(
            f"no tar member where the index has one ({error}): damaged, or the index of another tar"
        ) from None
    if key is None:
        raise BadRecord("no member with a name where the index has a sample")
    return key, parts


def row_of(key: str, parts: Mapping[str, bytes]) -> dict[str, Any]:
    """A sample as a row: the keys of its `json`, its `txt` as `caption` and `text`, its images and videos.

    Raises BadRecord.
    """
    if other := [name for name in parts if _suffix(name) in _OTHERS]:
        raise BadRecord(f"member {other[0]!r} of {key!r}: sound is not supported")
    row = parsed(parts["json"]) if "json" in parts else {}
    if not isinstance(row, dict):
        raise BadRecord(f"the json of {key!r} is no object")
    text = {} if "txt" not in parts else dict.fromkeys(("caption", "text"), _decoded(key, parts["txt"]))
    found = {"id": key, **text, **row}
    for kind, suffixes in (("image", IMAGES), ("video", VIDEOS)):
        files = {name: parts[name] for name in sorted(parts, key=_order) if _suffix(name) in suffixes}
        found |= _placed(row, key, kind, files) if files else {}
    return found


def _placed(row: Mapping[str, Any], key: str, kind: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The files of a `kind` in the order of their names, or where the json names them, in its order."""
    named = {place: row[place] for place in (f"{kind}s", kind) if row.get(place)}
    if not named:
        return {f"{kind}s": list(files.values())}
    given = list(chain.from_iterable([one] if isinstance(one, str) else one for one in named.values()))
    base = key.rpartition("/")[2].lower()
    known = {f"{base}.{name}": data for name, data in files.items()} | files
    found = [known.get(str(one).rpartition("/")[2].lower()) for one in given]
    if None in found:
        raise BadRecord(f"{kind} {given[found.index(None)]!r} is not in the sample, which has {', '.join(files)}")
    return {f"{kind}s": found, kind: None}


def _order(name: str) -> list[tuple[int, str]]:
    """By names, numbers in them by size: 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def _decoded(key: str, text: bytes) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord(f"the txt of {key!r} is not UTF-8 at byte {error.start}") from None


def build(source: Webdataset, path: str, key: str, form: Form) -> RowRecords:
    """The records of the files that `path` names. Raises ConfigError."""
    return RowRecords(rows_of(path, key), _form(source, form), image_root(path, source.root, key))


def first(source: Webdataset, path: str, key: str, form: Form) -> First:
    """The first records; all tars get an index."""
    return first_records(
        key, path, leading(rows_of(path, key)), _form(source, form), image_root(path, source.root, key)
    )


def rows_of(path: str, key: str) -> Joined:
    """The rows of the files that `path` names. Raises ConfigError."""
    opened = Recent(_OPEN)
    files = shards_of(path, SUFFIXES, key)
    if new := sum(not index_path(file).is_file() for file in files) if len(files) > 1 else 0:
        print(f"{key}: reading the headers of up to {new} tar files, once, to index them", file=sys.stderr)
    found = Joined([TarFile(file, key, opened) for file in files])
    if not len(found):
        raise problem(key, f"{path}, which has no samples", "a sample per record", f"{key}=FILE.tar")
    return found


def _form(source: Webdataset, form: Form) -> Form:
    """`form`, with all images and videos from the tar unless a folder of them is named."""

    def read(row: Any, name: str, root: Path | Remote) -> Record:
        if "caption" in row and not source.task and not any(row.get(key) for key in TURNS):
            raise BadRecord("a txt without messages in a json: data.task=caption makes a conversation of it")
        record = form(row, name, root)
        files = [one.source if isinstance(one, Video) else one for one in record.images]
        outside = [file for file in files if isinstance(file, Path | Remote)]
        if outside and not source.root:
            raise BadRecord(f"{outside[0].name} is not in the sample: data.root=DIR names the folder of such files")
        return record

    return read
