"""Models in LLaVA's, llava-hf's and VILA's layouts: read by a run, and exported bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nvlm.commands.compose import compose_config
from nvlm.export.export import export
from nvlm.export.options import parse
from nvlm.generate.parity import Parity, parity
from nvlm.runs.ownership import begin
from nvlm.train.checkpoint.save import Checkpoints
from nvlm.train.loop import build_trainer
from tests import hub
from tests.dist.run import joined, run_distributed


def train_nothing(overrides: tuple[str, ...], run: Path) -> None:
    """A run that starts from what `overrides` name and saves before its first step."""
    config = compose_config(*overrides, *hub.SETTINGS, "train.steps=2", "optim.warmup=0")
    with joined(config) as device:
        trainer = build_trainer(config, device)
        begin(config, run, fresh=True)
        with Checkpoints(config.train, run) as checkpoints:
            checkpoints.save(trainer, 1)


def there_and_back(run: Path, release: Path, layout: str, *own: str) -> Path:
    """A run that begins with `release`, and its export."""
    out = run.with_name("out")
    run_distributed(train_nothing, 1, (*own, f"init.release={release}"), run)
    return export(parse([f"checkpoint={run}", f"out={out}", f"layout={layout}", "shard_gb=0.0001"]))


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors below a folder, by name and subfolder."""
    found = {}
    for file in folder.rglob("*.safetensors"):
        place = file.parent.relative_to(folder)
        with safe_open(file, framework="pt") as opened:
            found |= {str(place / name): opened.get_tensor(name) for name in opened.keys()}
    return found


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def compared(run: Path, out: Path) -> Parity:
    return parity(str(run), out)


HUB = {
    "next, encoder learns": ("next", ("stage.train_vision=true",), "LlavaNext"),
    "next for videos": ("next", ("video.pool=average", "video.before_projector=true"), "LlavaNextVideo"),
    "onevision": ("onevision", (), "LlavaOnevision"),
    "onevision, tied": ("onevision", ("llm.tied=true",), "LlavaOnevision"),  # as the published 0.5B
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HUB)
def test_llava_hf_comes_back_and_transformers_loads_it(tmp_path, case):
    kind, words, name = HUB[case]
    release, run = tmp_path / "release", tmp_path / "run"
    hub.write(release, kind, hub=True, tied="llm.tied=true" in words)
    out = there_and_back(run, release, "llava-hf", *hub.OWN[kind], *words)
    assert_same(tensors_in(out), load_file(release / "model.safetensors"))
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (release, out))
    assert ours["architectures"] == [f"{name}ForConditionalGeneration"]
    same = {"image_grid_pinpoints", "image_token_index", "vision_feature_layer", "tie_word_embeddings"}
    for key in (same | {"vision_feature_select_strategy", "vision_aspect_ratio"}) & theirs.keys():
        assert ours[key] == theirs[key], key
    [found] = run_distributed(compared, 1, run, out)
    assert found.same_ids and found.largest < 1e-4 and found.tokens > 60


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param("llava", "onevision", marks=pytest.mark.slow),
        pytest.param("vila", "onevision", marks=pytest.mark.slow),
        pytest.param("llava", "next", marks=pytest.mark.slow),
        ("vila", "next"),
    ],
)
def test_llava_and_vila_come_back(tmp_path, layout, kind):
    release, run = tmp_path / "release", tmp_path / "run"
    expected = {"llava": hub.write_llava, "vila": hub.write_vila}[layout](release, kind)
    own = hub.OWN[kind]
    if layout == "vila":
        own = (*(word for word in own if not word.startswith("tiling")), "tiling=padded")
    out = there_and_back(run, release, layout, *own)
    assert_same(tensors_in(out), expected)
