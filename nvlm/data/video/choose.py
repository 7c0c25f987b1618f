"""Which frames of a video are used, by their numbers and by their times. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def frame_numbers(frames: int, rate: Fraction, most: int, wanted: float | None = None) -> tuple[int, ...]:
    """The numbers of the used frames of a video with `frames` frames, `rate` per second, as in LLaVA-NeXT's training
    (llava/utils.py, process_video_with_pyav and its force_sample).

    With `wanted` frames per second, every k-th frame, where k is rate / wanted, rounded. Without it, or if these are
    more than `most`, exactly `most` frames at equal distances, the first and the last among them; a video with fewer
    frames repeats some.
    """
    if wanted is not None:
        step = max(1, round(rate / Fraction(wanted)))
        found = range(0, frames, step)
        if len(found) <= most:
            return tuple(found)
    return tuple(np.linspace(0, frames - 1, most, dtype=int).tolist())


def nearest(numbers: Sequence[int], frames: int, times: Sequence[int]) -> list[int]:
    """For each of `numbers`, out of `frames` at a constant rate, the one of `times` (ascending) that is nearest.

    At a constant rate it is the frame of that number. If the rate varies, frames are at equal distances in time, not in
    number; if the header's count is only an estimate, they are spread over the frames that there are.
    """
    first, last = times[0], times[-1]
    return [_nearest(times, first + Fraction(number * (last - first), max(1, frames - 1))) for number in numbers]


def _nearest(times: Sequence[int], time: Fraction) -> int:
    place = min(bisect_left(times, time), len(times) - 1)
    return min(times[max(0, place - 1) : place + 1], key=lambda each: abs(each - time))
