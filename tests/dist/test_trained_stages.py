"""Stages with an encoder that learns, one after another: which encoder each begins with, keeps and hands on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvlm.commands.compose import compose_config
from nvlm.export.export import export
from nvlm.export.options import parse
from nvlm.generate.config import read_config
from nvlm.generate.generator import opened
from nvlm.inputs.check import check_weights
from nvlm.runs.folder import ENCODER, latest
from nvlm.train.loop import run
from nvlm.vision.encoders.internvit import description as internvit
from nvlm.vision.encoders.internvit.model import InternViT
from nvlm.vision.path import solo_groups
from nvlm.vision.trained import trained_tensors
from nvlm.weights.parts import joined as from_published
from nvlm.weights.published import VISION
from tests.dist.run import run_distributed

SMALL = (
    "arch=decoder", "llm.layers=1", "data.records=8", "data.workers=0", "train.global_batch=2", "train.steps=2",
    "train.save_every=2", "optim.warmup=0", "optim.lr=1e-2", "precision=fp32", "evaluate=none",
)  # fmt: skip
pytestmark = pytest.mark.slow
PIXELS = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))


def trained(run_dir: Path, *words: str) -> dict[str, torch.Tensor]:
    """Run a stage; its encoder afterwards, by our names, from the file or the checkpoint of the run."""
    config = compose_config(*SMALL, *words)
    check_weights(config, run_dir)
    run(config, run_dir)
    if (file := run_dir / ENCODER).is_file():
        return from_published(internvit.parts(config.vision), load_file(file))
    return trained_tensors(latest(run_dir))


def features(run_dir: Path) -> torch.Tensor:
    """What the model that generates from a run makes of some pixels."""
    with opened(read_config(run_dir)) as generator:
        return generator.vision.path.encoder(PIXELS).clone()


def expected(encoder: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same by the tensors of an encoder."""
    from nvlm.processes.groups import distributed

    config = compose_config(*SMALL)
    with distributed(config.parallel, 0):
        module = InternViT(config, solo_groups())
        module.load_state_dict(encoder)
        return internvit.INTERNVIT.frozen(module, config.vision, 1)(PIXELS).clone()


def _without_dummies(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By our names; an export may have empty heads after the real ones."""
    config = compose_config(*SMALL)
    extra = stored["encoder.layers.0.attn.proj.weight"].shape[1] // (config.vision.hidden // config.vision.heads)
    return from_published(internvit.parts(config.vision, extra - config.vision.heads), stored)


def stages(root: Path) -> dict[str, object]:
    """Trained, resumed, frozen, resumed, and trained again."""
    os.environ.pop("MASTER_PORT", None)  # of process groups that another test had when this process was forked
    found: dict[str, object] = {}
    learns = "stage.train_vision=true"
    found["first"] = trained(root / "first", learns)
    found["longer"] = trained(root / "first", learns, "train.steps=3", "resume=auto", "init.vision=null")
    after = f"init.checkpoint={root / 'first'}"
    found["frozen"] = trained(root / "frozen", after)
    (root / "first").rename(root / "moved")  # the frozen stage has its own copy
    found["still"] = trained(root / "frozen", after, "train.steps=3", "resume=auto")
    found["again"] = trained(
        root / "again", learns, f"init.checkpoint={root / 'frozen'}", "optim.lr=1e-9", "optim.min_lr=0"
    )
    for name in ("moved", "frozen", "again"):
        found[f"features of {name}"] = features(root / name)
    for name in ("moved", "frozen"):
        out = export(parse([f"checkpoint={root / name}", f"out={root / 'out' / name}"]))
        [file] = out.glob("*.safetensors")
        stored = load_file(file)
        own = {n.removeprefix(VISION): tensor for n, tensor in stored.items() if n.startswith(VISION)}
        found[f"export of {name}"] = _without_dummies(own)
    assert sorted(path.name for path in (root / "out").iterdir()) == ["frozen", "moved"]
    for name in ("longer", "frozen"):
        found[f"by {name}"] = expected(found[name])
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    [found] = run_distributed(stages, 1, tmp_path_factory.mktemp("stages"))
    return found


def apart(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_trained_encoder_goes_on(done):
    assert apart(done["first"], done["longer"]) > 1e-4  # it learns, and a resumed run went on from it
    assert apart(done["frozen"], done["longer"]) == 0 == apart(done["still"], done["frozen"])
    assert apart(done["again"], done["still"]) < 1e-7


def test_generation_has_the_encoder_of_the_checkpoint(done):
    for name, by in (("moved", "longer"), ("frozen", "frozen"), ("again", "frozen")):
        torch.testing.assert_close(done[f"features of {name}"], done[f"by {by}"], rtol=1e-4, atol=1e-5)


def test_an_export_has_the_trained_encoder(done):
    for name, by in (("moved", "longer"), ("frozen", "frozen")):
        assert apart(done[f"export of {name}"], done[by]) == 0
