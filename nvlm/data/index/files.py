"""The files of one source's index, and what it says about a record. Imports no torch.

    meta.bin      what was indexed, as JSON: settings, files, and numbers of records, images and bad records
    records.bin   for each record, its text tokens, and how many images there are before it; one more row at the end
    pictures.bin  width and height of each picture, px, the used frames if it is a video, else 0, and the text tokens
                  before it if it is in a document
    places.bin    where each row of the JSON files is
    bad.bin       for each bad record, its number and where its reason ends in reasons.bin, bytes

Numbers are little-endian, reasons UTF-8. A record takes 12 bytes, a picture 16, and a row of JSON 16.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nvlm.data.measure import Measure
from nvlm.data.record import BadRecord
from nvlm.data.sources.json_places import PLACE, Places
from nvlm.data.table import Table
from nvlm.runs.files import write_whole

VERSION = 2  # raise it when the files, or what a record's text and images are, change
RECORD = np.dtype([("text", "<u4"), ("pictures", "<u8")])
PICTURE = np.dtype([("width", "<u4"), ("height", "<u4"), ("frames", "<u4"), ("before", "<u4")])
BAD = np.dtype([("record", "<u8"), ("end", "<u8")])
IS_BAD = 2**32 - 1  # in place of text tokens
IS_DOCUMENT = 2**31  # added to text tokens
# No suffix is one of a source's files: an index may lie in the folder of the records.
META, RECORDS, PICTURES, PLACES, BADS = "meta.bin", "records.bin", "pictures.bin", "places.bin", "bad.bin"
REASONS = "reasons.bin"


@dataclass(frozen=True, slots=True)
class FileState:
    """A file as it was indexed. `rows`: of a JSON file, the number of its places."""

    name: str
    bytes: int
    modified: int  # ns
    digest: str = ""
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Meta:
    """What was indexed. `settings`: all that the counts depend on, by key (nvlm.data.index.state)."""

    settings: dict
    files: tuple[FileState, ...]
    records: int
    pictures: int
    bad: int
    tokens: int  # of text, of all records that are not bad
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Write meta.bin, which makes the index complete."""
        write_whole(folder / META, json.dumps(asdict(self), indent=1) + "\n")


def read_meta(folder: Path) -> Meta:
    """The meta.bin of an index. Raises OSError, and ValueError for a file that is damaged or of another version."""
    try:
        values = json.loads((folder / META).read_text("utf-8"))
        if values["version"] != VERSION:
            raise ValueError("of another version of this trainer")
        return Meta(**{**values, "files": tuple(FileState(**file) for file in values["files"])})
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError("damaged") from None


class SourceIndex:
    """What the index in `folder` says about the records of a source. Raises OSError and ValueError."""

    def __init__(self, folder: Path, meta: Meta) -> None:
        self.folder, self.meta = folder, meta
        self.records = Table(folder / RECORDS, RECORD)
        self.pictures = Table(folder / PICTURES, PICTURE)
        self.bad = Table(folder / BADS, BAD)
        rows = [file.rows for file in meta.files if file.rows is not None]
        self.places: list[Places] = Table(folder / PLACES, PLACE).split(rows)  # of the rows of each JSON file
        counts = (len(self.records) - 1, len(self.pictures), len(self.bad))
        if counts != (meta.records, meta.pictures, meta.bad):
            raise ValueError("cut short")

    def __len__(self) -> int:
        return self.meta.records

    def measure(self, index: int) -> Measure:
        """The measure of a record. Raises BadRecord."""
        (text, first), (_, end) = self.records.rows(index, 2).tolist()
        if text == IS_BAD:
            raise BadRecord(self.reason(index))
        pictures = self.pictures.rows(first, end - first).tolist() if end > first else ()
        before = tuple(picture[3] for picture in pictures) if text & IS_DOCUMENT else None
        sizes = tuple(picture[:3] if picture[2] else picture[:2] for picture in pictures)
        return Measure(text & ~IS_DOCUMENT, sizes, before)

    def reason(self, index: int) -> str:
        """Why the record `index` is bad."""
        place = bisect_left(self.bad, index, key=lambda row: row[0])
        start = self.bad[place - 1][1] if place else 0
        with open(self.folder / REASONS, "rb") as file:
            file.seek(start)
            return file.read(self.bad[place][1] - start).decode()
