"""Decodes the chosen frames of a video: from the last key frame before each, and no others. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from nvlm.config.video import VideoConfig
from nvlm.data.record import BadRecord, ImageChanged
from nvlm.data.video.choose import frame_numbers, nearest
from nvlm.data.video.clip import Header, Video, opened

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_TO_THE_END = 0.9  # the share of its length that a whole video's frames reach at least
_WORTH_A_SEEK = 8  # frames that need not be decoded


@dataclass(frozen=True, slots=True)
class Times:
    """When the frames of a video are shown, and those of them that are key frames, in units of the stream; ascending.

    `numbered`: the container has no times, so these are the frames' numbers.
    """

    frames: list[int]
    keys: list[int]
    numbered: bool = False


def decode(video: Video, max_pixels: int, settings: VideoConfig, planned: int) -> list[np.ndarray]:
    """The frames that `frame_numbers` chooses, in order, upright: uint8 [h, w, 3] each.

    Raises BadRecord if they cannot be decoded, and ImageChanged if they are not as many as were `planned`.
    """
    with opened(video, max_pixels, settings.max_seconds) as (container, stream, header):
        numbers = frame_numbers(header.frames, header.rate, settings.frames, settings.rate)
        if len(numbers) != planned:
            raise ImageChanged(f"a video of {planned} frames when it was planned, {len(numbers)} now")
        times = _times(container, stream, header)
        wanted = nearest(numbers, header.frames, times.frames)
        found = dict(_at(container, stream, times, sorted(set(wanted))))
        return [found[time] for time in wanted]


def first_frame(video: Video, max_pixels: int, max_seconds: float) -> np.ndarray:
    """The first frame, upright: uint8 [h, w, 3]. Raises BadRecord."""
    with opened(video, max_pixels, max_seconds) as (container, stream, _):
        for frame in container.decode(stream):
            return _upright(frame)
        raise BadRecord("no frame can be decoded")


def _times(container: InputContainer, stream: VideoStream, header: Header) -> Times:
    """The times of all frames, from the packets, which are read but not decoded. Raises BadRecord for a video that is
    cut short."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    counted = stream.frames or 0
    shown = [packet for packet in packets if not packet.is_discard]
    if shown and not any(packet.is_keyframe for packet in shown):
        raise BadRecord("no key frame, without which nothing can be decoded")
    if not shown or len(packets) < counted:
        raise BadRecord(f"cut short: {len(packets)} of {header.frames} frames")
    if any(packet.pts is None for packet in shown):
        return Times(list(range(len(shown))), [0], numbered=True)
    times = sorted(packet.pts for packet in shown)
    reached = float((times[-1] - times[0]) * stream.time_base) + 1 / float(header.rate)
    if not counted and reached < _TO_THE_END * header.seconds:
        raise BadRecord(f"cut short: its frames end after {reached:.1f} of {header.seconds:.1f} seconds")
    return Times(times, sorted(packet.pts for packet in shown if packet.is_keyframe))


def _at(
    container: InputContainer, stream: VideoStream, times: Times, wanted: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Each of the `wanted` times (ascending) with the frame that is shown then."""
    stream.codec_context.thread_count = 1  # loaders are processes
    left, seeks = list(reversed(wanted)), True
    while left:
        before = len(left)
        frames, seeks = _from(container, stream, times, left[-1], seeks)
        for time, frame in frames:
            # A frame that the decoder leaves out is replaced by the next one.
            while left and time >= left[-1]:
                yield left.pop(), _upright(frame)
            if not left or seeks and _can_skip(times, time, left[-1]):
                break
        if len(left) == before:
            raise BadRecord(f"only {len(wanted) - len(left)} of {len(wanted)} frames can be decoded")


def _from(
    container: InputContainer, stream: VideoStream, times: Times, wanted: int, seeks: bool
) -> tuple[Iterator[tuple[int, VideoFrame]], bool]:
    """The frames up to the `wanted` time and beyond, from the last key frame before it, and whether that was found.

    In containers without an index, such as transport streams, seeking may end behind it; then they begin at the start,
    as without `seeks`.
    """
    if seeks:
        container.seek(_key_before(times, wanted), stream=stream)
        frames = _decoded(container, stream, times)
        first = next(frames, None)
        if first is not None and first[0] <= wanted:
            return chain([first], frames), True
    container.seek(0)
    return _decoded(container, stream, times), False


def _decoded(container: InputContainer, stream: VideoStream, times: Times) -> Iterator[tuple[int, VideoFrame]]:
    for number, frame in enumerate(container.decode(stream)):
        yield (number if times.numbered or frame.pts is None else frame.pts), frame


def _can_skip(times: Times, now: int, wanted: int) -> bool:
    """Whether a key frame between the frame that is shown `now` and the `wanted` one saves decoding many others."""
    frames = times.frames
    return bisect_left(frames, _key_before(times, wanted)) - bisect_left(frames, now) > _WORTH_A_SEEK


def _key_before(times: Times, time: int) -> int:
    """The last key frame up to `time`; the first one if there is none."""
    return times.keys[max(0, bisect_right(times.keys, time) - 1)]


def _upright(frame: VideoFrame) -> np.ndarray:
    """uint8 [h, w, 3], turned as the container asks."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))) if frame.rotation else pixels
