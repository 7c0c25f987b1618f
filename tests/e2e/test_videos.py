"""Whole runs on videos: training, evaluation and generation, in all architectures and with pipeline stages."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.clips import clip
from tests.e2e.preloaded import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = (
    "name=run data=jsonl data.path=train.jsonl data.heldout_path=held.jsonl video=llava_ov video.frames=4 "
    "data.cross_length=256 train.steps=60 train.global_batch=8 train.threads=1 evaluate.questions=8"
).split()


@pytest.fixture
def where(tmp_path):
    """A folder with clips in one of two colours, which is the answer: 16 to learn from, and 8 others."""
    rows = []
    for number in range(24):
        colour = ("red", "blue")[number % 2]
        (tmp_path / f"{number}.mp4").write_bytes(of_colour(colour == "red", shift=number))
        question, answer = {"role": "user", "content": "<video>\nColour?"}, {"role": "assistant", "content": colour}
        rows.append(json.dumps({"messages": [question, answer], "videos": [f"{number}.mp4"]}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:16]))
    (tmp_path / "held.jsonl").write_text("\n".join(rows[16:]))
    return tmp_path


def of_colour(red: bool, shift: int) -> bytes:
    """A clip of one colour, with a white bar that moves."""

    def draw(number: int, size: tuple[int, int]) -> np.ndarray:
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        pixels[..., 0 if red else 2] = 200
        left = (4 * number + shift) % (size[0] - 20)
        pixels[:, left : left + 20] = 255
        return pixels

    return clip(25, size=(128, 96), draw=draw)


@pytest.mark.parametrize(
    "words",
    [
        ("arch=decoder", "parallel.pipeline=2", "stage.train_vision=true"),
        ("arch=xattn",),
        ("arch=hybrid", "video=slow_fast"),
    ],
    ids=["decoder, pipeline 2, encoder learns", "xattn", "hybrid, slow and fast"],
)
def test_colours_of_videos_are_learned(where, words):
    status, output = run(where, *SETTINGS, *words, timeout=500)
    assert status == 0, output
    (score,) = (where / "runs/run/evaluation/heldout").glob("*/score.json")
    assert json.loads(score.read_text())["mean"] > 0.8, output  # by chance a half
