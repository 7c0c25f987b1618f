"""Whole runs on videos: training, evaluation and generation, in all architectures and with pipeline stages."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

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
        write_clip(tmp_path / f"{number}.mp4", colour == "red", shift=number)
        question, answer = {"role": "user", "content": "<video>\nColour?"}, {"role": "assistant", "content": colour}
        rows.append(json.dumps({"messages": [question, answer], "videos": [f"{number}.mp4"]}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:16]))
    (tmp_path / "held.jsonl").write_text("\n".join(rows[16:]))
    return tmp_path


def write_clip(file: Path, red: bool, shift: int) -> None:
    """25 frames of one colour, with a white bar that moves."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(25):
            picture = np.zeros((96, 128, 3), np.uint8)
            picture[..., 0 if red else 2] = 200
            left = (4 * number + shift) % 108
            picture[:, left : left + 20] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


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
