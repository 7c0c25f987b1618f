"""MMC4's form of a document: sentences, and images that each belong to one of them (arXiv 2304.06939). Imports no
torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvlm.data.documents import by_sentence, interleaved
from nvlm.data.forms.pictures import found, picture
from nvlm.data.messages import check_keys
from nvlm.data.parts import kind_of, says
from nvlm.data.record import BadRecord, Record, identity_of


def read(row: Any, name: str, root: Path, most_images: int) -> Record:
    """The document of {"text_list": [...], "image_info": [{"image_name", "matched_text_index"}, ...]}, with its first
    `most_images` images, each before its sentence; `name` is its id unless it has one. Raises BadRecord."""
    check_keys(row)
    sentences, images = row.get("text_list"), row.get("image_info") or []
    if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences):
        raise BadRecord("`text_list` is not a list of texts")
    if not isinstance(images, list):
        raise BadRecord(f"`image_info` is {kind_of(images)}, expected a list")
    placed = [_image(info, f"image {place} of {len(images)}", sentences, root) for place, info in enumerate(images, 1)]
    return Record(identity_of(row, name), *interleaved(by_sentence(sentences, placed), most_images))


def _image(info: Any, what: str, sentences: list[str], root: Path) -> tuple[Any, int]:
    """An image, whose file is `image_name` or, as base64, in the row itself; and the number of its sentence."""
    if not isinstance(info, Mapping):
        raise BadRecord(f"{what} in `image_info` is {kind_of(info)}, expected an object")
    number = info.get("matched_text_index")
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(sentences):
        raise BadRecord(f"`matched_text_index` of {what} is no number of a sentence, 0 to {len(sentences) - 1}")
    stored = info.get("image_base64")
    value = {"bytes": stored} if says(stored) else info.get("image_name")
    return found([picture(value, f"`image_name` of {what}")], root)[0], number
