"""The videos of a conversation, and their places among its images. Imports no torch.

`<video>` marks a video's place in a text, and a part of type video is one. LLaVA's files mark videos by `<image>`,
which is understood where a record has no images. In the record that is read, all places are image marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvlm.config.data import IMAGE_MARK
from nvlm.config.video import VIDEO_MARK
from nvlm.data.images import image_path
from nvlm.data.parts import image_value, is_image, refuse_others, says
from nvlm.data.record import BadRecord
from nvlm.data.video.clip import Video

VIDEO_KEYS = ("videos", "video")  # the keys of a row that may hold its videos: one, or a list
_PLACES = ("video", "path", "video_url")  # the keys of a part that may hold its video
_MARK = re.compile(rf"(?<!\\)(\\*+)({IMAGE_MARK}|{VIDEO_MARK})")
_VIDEO = re.compile(rf"(?<!\\)(\\*+){VIDEO_MARK}")


def row_videos(row: Mapping[str, Any], messages: Sequence[Any], root: Path) -> list[Video]:
    """The videos of a row, below `root`: its `videos`, its `video`, or those that the parts of `messages` name. Raises
    BadRecord."""
    places = {f"`{key}`": _listed(row.get(key), key) for key in VIDEO_KEYS}
    parts = [_of_part(part) for part in _parts(messages) if _is_video(part)]
    named = [one for one in parts if one is not None]
    given = [found for found in (named, *places.values()) if found]
    if len(given) > 1:
        raise BadRecord("videos in several places, expected them in one of `videos`, `video` and parts of messages")
    if named and len(named) < len(parts):
        raise BadRecord(f"{len(parts)} parts of type video, {len(named)} with a path: expected one in each, or in none")
    return [Video(image_path(root, one, "video") if isinstance(one, str) else one) for one in next(iter(given), [])]


def with_videos(messages: Sequence[Any], images: Sequence[Any], videos: Sequence[Video]) -> tuple[list[Any], list[Any]]:
    """The messages with image marks for videos too, and images and videos in the order of their marks.

    Without marks, images come first. Raises BadRecord if marks and pictures do not match.
    """
    if not videos:
        return list(messages), list(images)
    kinds = list(_kinds(messages))
    if not kinds or kinds == [IMAGE_MARK] * len(videos) and not images:
        return list(messages), [*images, *videos]
    found = {IMAGE_MARK: list(images), VIDEO_MARK: list(videos)}
    counts = {kind: kinds.count(kind) for kind in found}
    if any(counts[kind] != len(pictures) for kind, pictures in found.items()):
        raise BadRecord(
            f"{counts[IMAGE_MARK]} {IMAGE_MARK} and {counts[VIDEO_MARK]} {VIDEO_MARK} marks, but {len(images)} images "
            f"and {len(videos)} videos: expected a mark for each, or none"
        )
    left = {kind: iter(pictures) for kind, pictures in found.items()}
    return [_rewritten(message) for message in messages], [next(left[kind]) for kind in kinds]


def _parts(messages: Sequence[Any]) -> Iterator[Any]:
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        yield from content if isinstance(content, list) else ()


def _is_video(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("video", "video_url")


def _of_part(part: Mapping[str, Any]) -> str | bytes | None:
    """The path or the bytes that a video's part gives; None if it gives neither."""
    refuse_others(part, ("type", *_PLACES), f"part of type {part['type']}")
    given = [part[key] for key in _PLACES if says(part.get(key))]
    if len(given) > 1:
        raise BadRecord(f"a part of type video with several paths, expected one of {', '.join(_PLACES)}")
    return image_value(given[0], "the video of a part", "video") if given else None


def _listed(value: Any, key: str) -> list[str | bytes]:
    values = value if isinstance(value, list | tuple) else [value] if says(value) else []
    return [
        image_value(one, f"video {place} of {len(values)} in `{key}`", "video")
        for place, one in enumerate(values, start=1)
    ]


def _kinds(messages: Sequence[Any]) -> Iterator[str]:
    """The mark of each picture of the messages, in order."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else [content]:
            if _is_video(part):
                yield VIDEO_MARK
            elif is_image(part):
                yield IMAGE_MARK
            else:
                text = part.get("text") if isinstance(part, Mapping) else part
                marks = _MARK.findall(text) if isinstance(text, str) else ()
                yield from (mark for backslashes, mark in marks if len(backslashes) % 2 == 0)


def _rewritten(message: Any) -> Any:
    """`message` with image marks in place of video marks."""
    if not isinstance(message, Mapping):
        return message
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [_rewritten_part(part) for part in content]}
    return {**message, "content": _marked(content)} if isinstance(content, str) else message


def _rewritten_part(part: Any) -> Any:
    if _is_video(part):
        return {"type": "image"}
    text = part.get("text") if isinstance(part, Mapping) else None
    return {**part, "text": _marked(text)} if isinstance(text, str) else part


def _marked(text: str) -> str:
    """An escaped video mark becomes text: of the backslashes before it, each two stand for one."""
    return _VIDEO.sub(
        lambda found: "\\" * (len(found[1]) // 2) + VIDEO_MARK if len(found[1]) % 2 else f"{found[1]}{IMAGE_MARK}", text
    )
