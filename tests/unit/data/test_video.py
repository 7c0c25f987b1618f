"""Videos: which frames are used, decoding them from the key frame before each, and files that cannot be used."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from nvlm.config.video import VideoConfig
from nvlm.data.record import BadRecord, ImageChanged
from nvlm.data.video.choose import frame_numbers, nearest
from nvlm.data.video.clip import Video, read_header
from nvlm.data.video.decode import decode
from tests.clips import clip, number_of, sound, without_key_frames


def decoded(data: bytes, most: int, rate: float | None = None, planned: int | None = None) -> list[np.ndarray]:
    header = read_header(Video(data), 10**6, 60)
    planned = planned or len(frame_numbers(header.frames, header.rate, most, rate))
    return decode(Video(data), 10**6, VideoConfig(frames=most, rate=rate, max_seconds=60), planned)


def numbers(data: bytes, most: int, rate: float | None = None) -> list[int]:
    return [number_of(frame) for frame in decoded(data, most, rate)]


# By hand from LLaVA-NeXT's llava/utils.py: range(0, frames, round(rate / fps)); above the cap, or forced, the integer
# parts of linspace(0, frames - 1, cap).
@pytest.mark.parametrize(
    ("frames", "rate", "most", "wanted", "expected"),
    [
        (250, 25, 4, None, (0, 83, 166, 249)),
        (132, 25, 8, 1, (0, 25, 50, 75, 100, 125)),
        (132, 25, 5, 1, (0, 32, 65, 98, 131)),
        (120, Fraction(30000, 1001), 8, 1, (0, 30, 60, 90)),  # 29.97
        (100, 25, 99, 10, tuple(range(0, 100, 2))),  # round(2.5) is 2, in Python
        (10, 10, 20, 30, tuple(range(10))),  # more than there are: all; the original would step by 0
        (3, 10, 5, None, (0, 0, 1, 1, 2)),  # fewer frames than asked for
        (1, 10, 4, None, (0, 0, 0, 0)),
        (9, 10, 1, None, (0,)),
    ],
)
def test_frame_numbers_are_llava_nexts(frames, rate, most, wanted, expected):
    assert frame_numbers(frames, Fraction(rate), most, wanted) == expected


def test_nearest_frames_of_a_constant_rate_are_those_of_the_numbers_and_of_a_variable_one_at_equal_times():
    assert nearest([0, 3, 9], 10, [33 * k for k in range(10)]) == [0, 99, 297]
    assert nearest([0, 3, 9], 10, [0, 34, 67, 100, 134, 167, 200, 234, 267, 300]) == [0, 100, 300]  # rounded to ms
    assert nearest([0, 1, 2], 3, [0, 1, 2, 3, 50, 100]) == [0, 50, 100]
    assert nearest([0, 49, 99], 100, [0, 40, 80]) == [0, 40, 80]  # an estimated count


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")]
)
def test_the_chosen_frames_are_decoded_whatever_the_container(kind, codec):
    data = clip(kind=kind, codec=codec)
    header = read_header(Video(data), 10**6, 60)
    assert (header.width, header.height, header.frames, header.rate) == (64, 48, 20, 10)
    assert numbers(data, 5) == [0, 4, 9, 14, 19] and numbers(data, 20) == list(range(20))


@pytest.mark.parametrize("key_every", [1, 4, 30])
def test_frames_are_those_of_a_plain_decoder_pixel_by_pixel(key_every):
    data = clip(30, key_every=key_every)
    with av.open(io.BytesIO(data)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for most in (1, 3, 7, 30):
        chosen = frame_numbers(30, Fraction(10), most)
        assert all(np.array_equal(a, plain[k]) for a, k in zip(decoded(data, most), chosen, strict=True))


def test_a_variable_rate_is_sampled_at_equal_distances_in_time():
    times = [*range(0, 100, 10), *range(1000, 2000, 100)]  # ten frames in 0.1 s, then ten in 1 s
    data = clip(20, times=times)
    assert numbers(data, 4) == [0, 10, 12, 19]  # what is nearest to 0, 600, 1200 and 1900 ms


@pytest.mark.parametrize(("rotation", "red"), [(90, "below"), (-90, "above"), (180, "right")])
def test_a_rotated_video_is_turned_upright(rotation, red):
    (frame,) = decoded(clip(3, rotation=rotation), 1)
    assert frame.shape == ((48, 64, 3) if rotation == 180 else (64, 48, 3))
    edge = {"below": frame[-4:], "above": frame[:4], "right": frame[:, -4:]}[red]
    assert edge[..., 0].mean() > 200 and edge[..., 1:].mean() < 60


def test_one_key_frame_is_enough():
    assert numbers(clip(20, key_every=1000), 3) == [0, 9, 19]


WHOLE = clip(20, header_first=True)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (WHOLE[:-200], "cut short"),  # the header is at the start
        (clip(20)[:-300], "cut short"),  # it was at the end
        (clip(20, kind="matroska")[:-500], "cut short"),
        (without_key_frames(clip(20)), "no key frame"),
        (sound(), "sound without pictures"),
        (clip(0, kind="matroska"), "empty"),
        (clip(2, times=[0, 36_000_000]), "36,000 seconds long, more than video.max_seconds=60"),
        (clip(2, size=(2000, 1000)), "2000 x 1000 px, more than data.max_pixels"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not a video of a known format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video of a known format"),
        (b"", "not a video of a known format"),
        (bytes(5000), "not a video of a known format"),
    ],
    ids=[
        "cut",
        "no-index",
        "cut-mkv",
        "no-key",
        "sound",
        "empty",
        "10-hours",
        "large",
        "playlist",
        "list",
        "0",
        "zeros",
    ],
)
def test_a_video_that_cannot_be_used_is_refused_with_one_message(data, reason):
    with pytest.raises(BadRecord, match=reason) as error:
        decoded(data, 4, planned=4)
    assert str(error.value).startswith("embedded video: ") and "\n" not in str(error.value)


def test_a_video_that_changed_since_it_was_planned_is_noticed():
    with pytest.raises(ImageChanged, match="a video of 9 frames when it was planned, 20 now"):
        decoded(clip(20), 50, 10, planned=9)
