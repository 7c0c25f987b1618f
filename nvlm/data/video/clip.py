"""A video's file and its header: size, number of frames, rate and length, read without decoding. Imports no torch.

Input is untrusted. FFmpeg sees an open file, never a path, may open no other file (playlists name some), and only
reads containers of one file; sizes and lengths are checked before anything is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm.data.images import open_regular
from nvlm.data.record import BadRecord, ImageChanged
from nvlm.data.remote import Remote

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

SUFFIXES = frozenset("mp4 m4v mov mkv webm avi mpeg mpg".split())  # of videos' files
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"
_BUFFER = 1 << 18  # bytes read at once


@dataclass(frozen=True, slots=True)
class Video:
    """A video of a record, not yet decoded: its file, or the file's bytes."""

    source: bytes | Path | Remote

    @property
    def name(self) -> str:
        """Its name in messages."""
        return "embedded video" if isinstance(self.source, bytes) else self.source.name


def image_or_video(path: Path) -> Path | Video:
    """A file that a user names, as a record holds it: by its suffix, an image or a video."""
    return Video(path) if path.suffix.lower().lstrip(".") in SUFFIXES else path


@dataclass(frozen=True, slots=True)
class Header:
    """What a video's container says: width and height as stored, px; frames (an estimate from its length if it does not
    say how many), their mean rate per second, and its length in seconds."""

    width: int
    height: int
    frames: int
    rate: Fraction
    seconds: float


def read_header(video: Video, max_pixels: int, max_seconds: float) -> Header:
    """The header of `video`. Raises BadRecord if it has no frames, or is larger or longer than the limits."""
    with opened(video, max_pixels, max_seconds) as (_, _, header):
        return header


@contextmanager
def opened(video: Video, max_pixels: int, max_seconds: float) -> Iterator[tuple[InputContainer, VideoStream, Header]]:
    """The open container, its first stream of pictures, and its header. Anything that FFmpeg raises, even within the
    block, becomes BadRecord with the video's name."""
    import av  # only records with videos need it

    try:
        with _file(video) as file, _container(av, file, max_pixels) as container:
            stream = _pictures(container)
            header = _header(container, stream)
            _check(header, max_pixels, max_seconds)
            yield container, stream, header
    except (MemoryError, ImageChanged):
        raise
    except FileNotFoundError:
        raise BadRecord(f"{video.name}: no such video") from None
    except (av.error.InvalidDataError, av.error.ArgumentError, av.error.EOFError):
        raise BadRecord(f"{video.name}: not a video of a known format, or empty, cut short or damaged") from None
    except Exception as error:  # FFmpeg's errors, and OSError for the file
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise BadRecord(f"{video.name}: {reason}") from error


def _file(video: Video) -> io.BufferedIOBase:
    return io.BytesIO(video.source) if isinstance(video.source, bytes) else open_regular(video.source)


def _container(av: Any, file: io.BufferedIOBase, max_pixels: int) -> InputContainer:
    return av.open(
        file,
        container_options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"},
        options={"max_pixels": str(max_pixels)},
        buffer_size=_BUFFER,
        io_open=_refuse,
    )


def _pictures(container: InputContainer) -> VideoStream:
    """The first stream of pictures; the cover of a piece of music is none."""
    for stream in container.streams.video:
        if not stream.disposition & type(stream.disposition).attached_pic:
            return stream
    raise BadRecord("sound without pictures" if container.streams.audio else "no pictures in it, or cut short")


def _refuse(url: str, *_: Any) -> None:
    raise BadRecord("it refers to another file, which is not opened")


def _header(container: InputContainer, stream: VideoStream) -> Header:
    rate = Fraction(stream.average_rate or stream.guessed_rate or 0)
    seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    frames = stream.frames or round(seconds * rate)
    return Header(stream.codec_context.width, stream.codec_context.height, frames, rate, seconds)


def _check(header: Header, max_pixels: int, max_seconds: float) -> None:
    if header.width * header.height > max_pixels:
        raise BadRecord(f"{header.width} x {header.height} px, more than data.max_pixels={max_pixels}")
    if header.seconds > max_seconds:
        raise BadRecord(f"{header.seconds:,.0f} seconds long, more than video.max_seconds={max_seconds:g}")
    if header.frames < 1 or header.width < 1 or header.height < 1 or header.rate <= 0:
        raise BadRecord("a video of 0 frames")
