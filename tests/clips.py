"""Short videos that tests encode themselves. Frame k is of one grey, by which `number_of` knows it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import numpy as np

STEP = 8  # grey levels from one frame to the next


def clip(
    frames: int = 20,
    *,
    kind: str = "mp4",
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    rate: int = 10,
    key_every: int = 12,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    header_first: bool = False,
    draw: Callable[[int, tuple[int, int]], np.ndarray] | None = None,
) -> bytes:
    """A video's file. `times`: when each frame is shown, ms; by default `rate` per second. The left eighth is red.
    `header_first`: an MP4 file's index is at its start, not at its end. `draw`: another `picture`."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        (stream.width, stream.height), stream.pix_fmt, stream.gop_size = size, "yuv420p", key_every
        stream.bit_rate = 4_000_000
        unit = Fraction(1, 1000) if times else Fraction(1, rate)
        stream.time_base = stream.codec_context.time_base = unit
        if rotation:
            stream.set_display_rotation(rotation)
        container.start_encoding()
        for number, time in zip(range(frames), times or range(frames)):
            frame = av.VideoFrame.from_ndarray((draw or picture)(number, size), "rgb24")
            frame.pts, frame.time_base = time, unit
            container.mux(stream.encode(frame))
        if frames:
            container.mux(stream.encode(None))
    return _header_first(file.getvalue()) if header_first else file.getvalue()


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3]"""
    pixels = np.full((size[1], size[0], 3), STEP * (number + 1), np.uint8)
    pixels[:, : size[0] // 8] = (255, 0, 0)
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number of the frame with these pixels, from its right half."""
    return round(float(pixels[:, pixels.shape[1] // 2 :].mean()) / STEP) - 1


def without_key_frames(data: bytes) -> bytes:
    """The same video without its key frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as target, av.open(io.BytesIO(data)) as source:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size and not packet.is_keyframe:
                packet.stream = stream
                target.mux(packet)
    return file.getvalue()


def _header_first(data: bytes) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:  # FFmpeg reads it back
        with av.open(file.name, "w", options={"movflags": "faststart"}) as target, av.open(io.BytesIO(data)) as source:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
        return file.read()


def sound() -> bytes:
    """Half a second of silence, without pictures."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("flac", rate=8000)
        stream.layout, stream.format = "mono", "s16"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
        for one in (frame, None):
            container.mux(stream.encode(one))
    return file.getvalue()
