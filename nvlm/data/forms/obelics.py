"""OBELICS' form of a document: {"images": [...], "texts": [...]}, of equal length, with an image or a text at each
place (arXiv 2306.16527). Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvlm.data.documents import interleaved
from nvlm.data.forms.pictures import found, picture
from nvlm.data.messages import check_keys
from nvlm.data.parts import kind_of, says
from nvlm.data.record import BadRecord, Record, identity_of


def read(row: Any, name: str, root: Path, most_images: int) -> Record:
    """The document of `row` with its first `most_images` images; `name` is its id unless it has one.

    OBELICS itself has URLs in place of images, which are refused. Raises BadRecord.
    """
    check_keys(row)
    images, texts = row.get("images"), row.get("texts")
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise BadRecord("`images` and `texts` are not two lists of the same length")
    parts = [_part(image, text, place, root) for place, (image, text) in enumerate(zip(images, texts), start=1)]
    return Record(identity_of(row, name), *interleaved(parts, most_images))


def _part(image: Any, text: Any, place: int, root: Path) -> Any:
    if says(image) == (text is not None):
        raise BadRecord(f"place {place} has {'both' if says(image) else 'neither'} an image and a text, expected one")
    if text is None:
        return found([picture(image, f"image at place {place}")], root)[0]
    if not isinstance(text, str):
        raise BadRecord(f"the text at place {place} is {kind_of(text)}")
    return text
