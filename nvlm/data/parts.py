"""The parts of a message whose content is a list: texts, and images with or without a path. Imports no torch."""

from __future__ import annotations

import base64
import binascii
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from nvlm.data.record import BadRecord

_PLACES = ("image", "path", "image_url")  # the keys of a part that may hold its image
_KINDS = ("image", "image_url")  # the types of an image's part


def images_in_parts(messages: Sequence[Any]) -> list[str | bytes]:
    """The images that the parts of the messages name, in order: paths, or bytes that are stored in the record.

    Empty if no part names an image: then they are in the record's own list. Raises BadRecord for a URL, and if only
    some of the images' parts name theirs.
    """
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content if is_image(part)]
    found = [image_of(part) for part in parts]
    named = [image for image in found if image is not None]
    if named and len(named) < len(found):
        raise BadRecord(f"{len(found)} parts of type image, {len(named)} with a path: expected a path in each, or none")
    return named


def is_image(part: Any) -> bool:
    """Whether a part of a content list is an image."""
    return isinstance(part, Mapping) and part.get("type") in _KINDS


def image_of(part: Mapping[str, Any]) -> str | bytes | None:
    """The path or the bytes that an image's part gives; None if it gives neither. Raises BadRecord."""
    refuse_others(part, ("type", *_PLACES), f"part of type {part['type']}")
    given = [part[key] for key in _PLACES if says(part.get(key))]
    if len(given) > 1:
        raise BadRecord(f"a part of type {part['type']} with several paths, expected one of {', '.join(_PLACES)}")
    return image_value(given[0], "the image of a part") if given else None


def image_value(value: Any, what: str, kind: str = "image") -> str | bytes:
    """A path, or the bytes of a value such as {"bytes": ..., "path": ...} or "data:image/png;base64,...".

    `what` it is, and the `kind` of its file, for messages. JSON has no bytes, so text under `bytes` is base64. Raises
    BadRecord.
    """
    if isinstance(value, Mapping):
        refuse_others(value, ("url", "path", "bytes", "detail"), "struct of an image")
        if isinstance(value.get("bytes"), str) and value["bytes"]:
            return _from_base64(value["bytes"])
        value = next((value[key] for key in ("bytes", "path", "url") if says(value.get(key))), None)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadRecord(f"{what} is {kind_of(value) if value != '' else 'empty'}, expected a path")
    if value.startswith("data:"):
        return _decoded(value)
    if "://" in value:
        raise BadRecord(f"{kind} {value} is a URL, expected a path: download it first")
    return value


def _decoded(url: str) -> bytes:
    head, _, data = url.partition(",")
    if not head.endswith(";base64"):
        raise BadRecord(f"an image as {head[:40]!r}, expected data:TYPE;base64,... or a path")
    return _from_base64(data)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord(f"an image whose base64 text is damaged: {error}") from None


def text_of(part: Any) -> str:
    """The text of a part that is no image. Raises BadRecord."""
    if not isinstance(part, Mapping):
        raise BadRecord(f"a part of a content list is {kind_of(part)}, expected an object")
    if part.get("type") != "text":
        raise BadRecord(f"a part of type {shown(part.get('type'))}, expected text or image")
    refuse_others(part, ("type", "text"), "part of type text")
    if not isinstance(part.get("text"), str):
        raise BadRecord(f"the text of a part is {kind_of(part.get('text'))}, expected text")
    return part["text"]


def refuse_others(values: Mapping[Any, Any], known: Sequence[str], what: str) -> None:
    """Raise BadRecord for a key outside `known` that has a value."""
    for key, value in values.items():
        if key not in known and says(value):
            raise BadRecord(f"key {shown(key)} of a {what} is not supported, expected only {', '.join(known)}")


def says(value: Any) -> bool:
    """False for null and anything empty, with which table formats fill unused columns."""
    return value is not None and value != "" and value != [] and value != {}


def shown(value: Any) -> str:
    """A value for a message, shortened; it may be nested too deeply for `repr`."""
    return reprlib.repr(value)


def kind_of(value: Any) -> str:
    """The kind of a JSON value, in words."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)
