"""What an index depends on, and whether it is still the index of a run's records. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from nvlm.config.data import Generated, Source
from nvlm.config.mapping import to_mapping
from nvlm.data.content import content_digest
from nvlm.data.forms.auto import draws
from nvlm.data.index.files import FileState, Meta
from nvlm.data.outline import Processor
from nvlm.data.remote import Remote
from nvlm.data.sources.registry import prefix_of
from nvlm.data.text.tokenizer import tokenizer_file

# Fields of a processor that do not change the text tokens of a record or the sizes of its images. Every other field is
# part of an index's settings. `tokenizer_path` stands for a file, which is compared by its content, and
# `video` for what chooses its frames.
_UNUSED = (
    "placement", "tiling", "frames", "video", "several", "tokenizer_path", "tile_size", "tile_tokens", "max_tiles",
    "tag", "thumbnail_tag", "resize", "seq_length", "cross_length", "limit", "seed", "sees",
)  # fmt: skip
_KEYS = {"bos": "llm.bos", "chat": "llm.chat"}  # those that are not data.NAME
_ELSEWHERE = ("path", "heldout_path", "heldout_records", "take")  # of a source: files are compared by content


def settings_of(source: Source, name: str, seed: int, processor: Processor) -> dict[str, object]:
    """All that the index of the source `name` depends on beside its files, by the keys that users set."""
    names = [field.name for field in fields(processor) if field.name not in _UNUSED]
    found = {_KEYS.get(name, f"data.{name}"): getattr(processor, name) for name in names}
    found["llm.tokenizer"] = _tokenizer(processor)
    found |= {f"video.{key}": getattr(processor.video, key) for key in ("frames", "rate", "max_seconds")}
    own = {f"{prefix_of(name)}{key}": value for key, value in to_mapping(source).items() if key not in _ELSEWHERE}
    drawn = isinstance(source, Generated) or draws(source) or processor.images_first
    return json.loads(json.dumps(found | own | ({"seed": seed} if drawn else {})))  # as they are read back


def _tokenizer(processor: Processor) -> str:
    tokenizer = processor.tokenizer
    parts = [content_digest(tokenizer_file(processor.tokenizer_path)), tokenizer.bos]
    if processor.chat == "template":
        parts += [tokenizer.form.source, dict(tokenizer.form.values)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def states_of(files: Sequence[Path | Remote]) -> tuple[FileState, ...]:
    """The files as they are, without their digests. Raises OSError."""
    found = [(file.name, file.stat()) for file in files]
    return tuple(FileState(name, status.st_size, status.st_mtime_ns) for name, status in found)


def with_digests(states: Sequence[FileState], files: Sequence[Path | Remote]) -> tuple[FileState, ...]:
    """`states` with the digests of their `files`."""
    count = len(files)
    return tuple(replace(state, digest=content_digest(file, count)) for state, file in zip(states, files, strict=True))


def changed_setting(meta: Meta, settings: dict[str, object]) -> str | None:
    """What differs between the settings of an index and those of a run; None if nothing does."""
    for key in dict.fromkeys((*settings, *meta.settings)):
        before, now = meta.settings.get(key), settings.get(key)
        if before != now:
            differs = "another llm.tokenizer" if key == "llm.tokenizer" else f"{key}={before}, not {now}"
            return f"prepared with {differs}"
    return None


def changed_file(before: Sequence[FileState], files: Sequence[Path | Remote]) -> str | None:
    """How `files` differ from those that were indexed; None if they do not.

    Size and time are compared first. Only a file of another time is read, and if its content is the same it passes: it
    was copied.
    """
    if why := changed_names([state.name for state in before], files):
        return why
    for old, now, path in zip(before, states_of(files), files, strict=True):
        if old.bytes != now.bytes:
            return f"of {old.name} when it had {old.bytes:,} bytes, now it has {now.bytes:,}"
        if old.modified != now.modified and content_digest(path, len(files)) != old.digest:
            return f"of {old.name}, which was changed since"
    return None


def changed_names(before: Sequence[str], files: Sequence[Path | Remote]) -> str | None:
    """How the names of `files` differ from those that were indexed; None if they do not."""
    if len(before) != len(files):
        return f"of {len(before)} files, now there are {len(files)}"
    others = ((old, now.name) for old, now in zip(before, files) if old != now.name)
    return next((f"of {old}, in whose place there is {now} now" for old, now in others), None)


def digest_of(values: object) -> str:
    """A digest of plain values, for the name of a file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=asdict).encode()).hexdigest()[:24]
