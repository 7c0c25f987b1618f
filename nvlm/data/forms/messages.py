"""The trainer's own form: {"messages": [{"role", "content"}], "images": [...]}. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvlm.data.images import image_path
from nvlm.data.messages import check_row
from nvlm.data.parts import images_in_parts
from nvlm.data.record import BadRecord, Record, identity_of


def read(row: Any, name: str, root: Path) -> Record:
    """The record of `row`; `name` is its id unless it has one. Raises BadRecord."""
    check_row(row)
    images = row_images(row)
    found = [image if isinstance(image, bytes) else image_path(root, image) for image in images]
    return Record(identity_of(row, name), row["messages"], found)


def row_images(row: Mapping[str, Any]) -> list:
    """The images of a row: those that the parts of its messages name, or its list. Raises BadRecord."""
    listed, named = row.get("images") or [], images_in_parts(row["messages"])
    if not isinstance(listed, list):
        raise BadRecord("images is not a list")
    if listed and named:
        raise BadRecord(f"{len(named)} images in parts of messages and {len(listed)} in `images`: expected one of both")
    return named or listed
