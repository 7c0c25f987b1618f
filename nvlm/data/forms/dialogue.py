"""A conversation: a row with a list of turns, `messages` or `conversations`, with `images` or `image`, and with
`videos` or `video`. Imports no torch.

A turn is {"role", "content"} or LLaVA's {"from", "value"}, in either list. LLaVA's turns are as in
https://github.com/haotian-liu/LLaVA (docs/Finetune_Custom_Data.md), but `<image>` stays where it is in a turn: LLaVA's
own loader moves it to the turn's beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvlm.data.forms.clips import VIDEO_KEYS, row_videos, with_videos
from nvlm.data.forms.pictures import IMAGE_KEYS, found, row_images
from nvlm.data.messages import check_keys
from nvlm.data.parts import says, shown
from nvlm.data.record import BadRecord, Record, identity_of

TURNS = ("messages", "conversations")  # the keys of a row that may hold its turns
_PLAIN = ("question", "answer", "caption")  # columns of nvlm.data.forms.tasks
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read(row: Any, name: str, root: Path) -> Record:
    """The record of `row`; `name` is its id unless it has one. Raises BadRecord."""
    check_keys(row, (*TURNS, *IMAGE_KEYS, *VIDEO_KEYS))
    messages = [_message(turn) for turn in _turns(row)]
    images, videos = found(row_images(row, messages), root), row_videos(row, messages, root)
    return Record(identity_of(row, name), *with_videos(messages, images, videos))


def _turns(row: Mapping[str, Any]) -> list:
    given = [key for key in TURNS if says(row.get(key))]
    if len(given) > 1:
        raise BadRecord("both `messages` and `conversations`, expected one of them")
    turns = row[given[0]] if given else None
    if not isinstance(turns, list):
        raise BadRecord(f"no list of {given[0] if given else 'messages or conversations'}{_hint(row)}")
    return turns


def _hint(row: Mapping[str, Any]) -> str:
    plain = [key for key in _PLAIN if says(row.get(key))]
    return f", but {' and '.join(plain)}: data.task=vqa and others make conversations of such columns" if plain else ""


def _message(turn: Any) -> Any:
    """A turn as a message. Keys that have no meaning here are left in, so that they are refused by name."""
    if not isinstance(turn, Mapping) or not says(turn.get("from")) or says(turn.get("role")):
        return turn
    sender = turn["from"]
    if not isinstance(sender, str) or sender not in _ROLES:
        raise BadRecord(f"a turn from {shown(sender)}, expected one of {', '.join(_ROLES)}")
    others = {key: value for key, value in turn.items() if key not in ("from", "value", "role")}
    return others | {"role": _ROLES[sender], "content": turn.get("value", turn.get("content"))}
