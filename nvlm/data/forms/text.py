"""A text without roles: {"text": ...}, of which everything is learned. Imports no torch.

It is a text from elsewhere, so `<image>` in it is no mark.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvlm.data.forms.pictures import IMAGE_KEYS
from nvlm.data.messages import DOCUMENT, check_keys, literal
from nvlm.data.parts import kind_of, says
from nvlm.data.record import BadRecord, Record, identity_of


def read(row: Any, name: str, root: Path) -> Record:
    """The document of `row`; `name` is its id unless it has one. Raises BadRecord."""
    check_keys(row)
    for key in IMAGE_KEYS:
        if says(row.get(key)):
            raise BadRecord(f"`{key}` beside `text`: data.task=caption and others make questions of images and columns")
    text = row.get("text")
    if not isinstance(text, str):
        raise BadRecord(f"`text` is {kind_of(text)}, expected text" if "text" in row else "no `text`")
    return Record(identity_of(row, name), [{"role": DOCUMENT, "content": literal(text)}], [])
