"""Joins what the tasks of a walk wrote into the files of an index, in memory that does not grow with them. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nvlm.data.index.files import BAD, BADS, IS_BAD, IS_DOCUMENT, PICTURES, PLACES, REASONS, RECORD, RECORDS


def join(folder: Path, places: Path, chunks: Sequence[Path]) -> dict[str, int]:
    """Write all files of an index but its meta.bin into the new `folder`; `places`: the file of its places. Returns the
    counts of its Meta."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copyfile(places, folder / PLACES)
    counts = dict.fromkeys(("records", "pictures", "bad", "tokens"), 0)
    with ExitStack() as opened:
        names = (RECORDS, PICTURES, BADS, REASONS)
        files = {name: opened.enter_context(open(folder / name, "wb")) for name in names}
        for path in chunks:
            with np.load(path, allow_pickle=False) as chunk:
                counts = _append(files, chunk, counts)
        files[RECORDS].write(np.array([(0, counts["pictures"])], dtype=RECORD).tobytes())
    return counts


def _append(
    files: Mapping[str, BinaryIO], chunk: Mapping[str, np.ndarray], before: Mapping[str, int]
) -> dict[str, int]:
    """Append a chunk; returns the counts with it."""
    text, pictures = chunk["text"], chunk["counts"].astype(np.uint64)
    records = np.empty(len(text), dtype=RECORD)
    records["text"] = text
    records["pictures"] = before["pictures"] + np.cumsum(pictures) - pictures
    found = np.flatnonzero(text == IS_BAD)
    bad = np.empty(len(found), dtype=BAD)
    bad["record"], bad["end"] = before["records"] + found, files[REASONS].tell() + chunk["ends"]
    for name, rows in ((RECORDS, records), (PICTURES, chunk["pictures"]), (BADS, bad), (REASONS, chunk["reasons"])):
        files[name].write(rows.tobytes())
    return {
        "records": before["records"] + len(text),
        "pictures": before["pictures"] + len(chunk["pictures"]),
        "bad": before["bad"] + len(bad),
        "tokens": before["tokens"] + int((text[text != IS_BAD] & ~np.uint32(IS_DOCUMENT)).sum(dtype=np.uint64)),
    }
