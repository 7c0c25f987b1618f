"""LLaVA's form: {"id", "image", "conversations": [{"from", "value"}]}. Imports no torch.

Turns are as in https://github.com/haotian-liu/LLaVA (docs/Finetune_Custom_Data.md), but `<image>` stays where it is in
a turn: LLaVA's own loader moves it to the turn's beginning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvlm.data.images import image_path
from nvlm.data.messages import check_keys, says
from nvlm.data.record import BadRecord, Record, identity_of

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_READ = ("image", "conversations")  # beside `id`


def read(row: Any, name: str, root: Path) -> Record:
    """The record of one entry; `image` is a path or a list of paths, missing in text-only entries. Raises BadRecord."""
    check_keys(row, _READ)
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise BadRecord("no list of conversations")
    images = row.get("image") if says(row.get("image")) else []
    images = images if isinstance(images, list) else [images]
    return Record(identity_of(row, name), [_message(turn) for turn in turns], [image_path(root, one) for one in images])


def _message(turn: Any) -> dict[str, Any]:
    """A turn as a message. Keys that have no meaning here are left in, so that they are refused by name."""
    if not isinstance(turn, dict) or turn.get("from") not in _ROLES:
        said = turn.get("from") if isinstance(turn, dict) else turn
        raise BadRecord(f"a turn from {said!r}, expected one of {', '.join(_ROLES)}")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": _ROLES[turn["from"]], "content": turn.get("value"), **others}
