"""How fast the used frames of videos are decoded, against PyAV decoding from the start up to the last of them.

Both use one thread and give the same pixels, which is checked. The files are those given, or videos encoded here with
a key frame every second. Run: python benchmarks/video.py [FILE ...]
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from nvlm.config.video import VideoConfig
from nvlm.data.video.choose import frame_numbers
from nvlm.data.video.clip import Header, Video, read_header
from nvlm.data.video.decode import decode

MAX_PIXELS, RUNS = 50_000_000, 5
SETTINGS = {"8 frames": VideoConfig(frames=8), "32 frames": VideoConfig(frames=32), "1 per s": VideoConfig(rate=1.0)}


def plain(video: Video, numbers: tuple[int, ...]) -> list[np.ndarray]:
    """The frames `numbers`, by decoding all up to the last of them."""
    wanted, found = set(numbers), {}
    source = io.BytesIO(video.source) if isinstance(video.source, bytes) else str(video.source)
    with av.open(source) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
            if len(found) == len(wanted):
                break
    return [found[number] for number in numbers]


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of `ours`, and the median of how many times longer `theirs` takes, of alternating runs."""
    seconds, times = [], []
    for _ in range(RUNS):
        before = time.perf_counter()
        theirs()
        between = time.perf_counter()
        ours()
        seconds.append(time.perf_counter() - between)
        times.append((between - before) / seconds[-1])
    return statistics.median(seconds), statistics.median(times)


def compare(name: str, video: Video) -> None:
    """Print a line for each of SETTINGS."""
    header: Header = read_header(video, MAX_PIXELS, 7200)
    about = f"{header.width} x {header.height}, {header.frames} frames, {float(header.rate):.2f} per second"
    print(f"{name}: {about}")
    for label, settings in SETTINGS.items():
        numbers = frame_numbers(header.frames, header.rate, settings.frames, settings.rate)
        ours = decode(video, MAX_PIXELS, settings, len(numbers))
        assert all(np.array_equal(a, b) for a, b in zip(ours, plain(video, numbers), strict=True)), "other pixels"
        seconds, faster = ratio(
            lambda n=numbers, s=settings: decode(video, MAX_PIXELS, s, len(n)), lambda n=numbers: plain(video, n)
        )
        print(f"  {label:>10}: {len(numbers):3} frames in {seconds:.3f} s, {faster:.2f} x as fast as plain PyAV")


def encoded(seconds: int, rate: int = 25, size: tuple[int, int] = (640, 360)) -> bytes:
    """A video of moving noise with a key frame every second."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], 2 * size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast"})
        (stream.width, stream.height), stream.pix_fmt, stream.gop_size = size, "yuv420p", rate
        for number in range(seconds * rate):
            start = 2 * number % size[0]
            picture = np.ascontiguousarray(noise[:, start : start + size[0]])
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        for path in sys.argv[1:]:
            compare(path, Video(Path(path)))
    else:
        compare("encoded here", Video(encoded(10)))
