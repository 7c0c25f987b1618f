"""Checkpoints in real process groups: from any layout to any other, into the next stage, and what does not fit."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.train.checkpoint import restore, save
from nvlm.train.checkpoint.save import latest
from nvlm.train.step import Trainer
from tests.dist.checkpoints import FP32, FROZEN, assert_same, begin, built, pass_on, saved, tensors_in
from tests.dist.run import joined, run_distributed

# --- layouts ---

LAYOUTS = (
    (2, ("parallel.data=2", "parallel.distributed_optimizer=true")),
    (2, ("parallel.pipeline=2", "train.micro_batch=1")),
    (2, ("parallel.pipeline=2", "parallel.virtual=2", "train.micro_batch=1")),
    (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.distributed_optimizer=true", "train.micro_batch=1")),
    (4, ("parallel.tensor=2", "parallel.data=2", "parallel.distributed_optimizer=true")),
    (2, ("parallel.context=2", "parallel.distributed_optimizer=true")),
    (2, ("parallel.tensor=2", "parallel.sequence=true")),
    (1, ("parallel.distributed_optimizer=true",)),
    (2, ("parallel.data=2",)),
    (1, ()),
)


def compare(runs: list[Path]) -> None:
    """All have the same contents; runs in one process."""
    with joined(compose_config(*FP32)):
        first = tensors_in(latest(runs[0]))
        assert any(name.startswith("optimizer.state.exp_avg_sq.") and t.any() for name, t in first.items())
        for run in runs[1:]:
            assert_same(tensors_in(latest(run)), first)


TRAINED = (*FP32, "stage.train_vision=true", "train.micro_batch=1")


@pytest.mark.slow
def test_another_layout_goes_on_with_a_trained_encoder(tmp_path):
    [expected] = run_distributed(begin, 1, TRAINED, tmp_path / "0")
    layout = ("parallel.pipeline=2", "parallel.distributed_optimizer=true")
    went = run_distributed(pass_on, 2, (*TRAINED, *layout), tmp_path / "0", tmp_path / "1")
    for loss_and_norm in zip(went[0], expected):
        assert loss_and_norm[0] == pytest.approx(loss_and_norm[1], rel=1e-4)
    run_distributed(compare, 1, [tmp_path / "0", tmp_path / "1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [(FP32, 1e-4), (FROZEN, 2e-2), ((*FP32, "arch=decoder"), 1e-4), (TRAINED, 1e-4)],
    ids=["hybrid-fp32", "xattn-bf16-frozen", "decoder-fp32", "trained encoder"],
)
def test_every_layout_reads_what_another_wrote(tmp_path, overrides, tolerance):
    [expected] = run_distributed(begin, 1, overrides, tmp_path / "0")
    for number, (world, layout) in enumerate(LAYOUTS):
        went = run_distributed(
            pass_on, world, (*overrides, *layout), tmp_path / f"{number}", tmp_path / f"{number + 1}"
        )
        for loss_and_norm in zip(went[0], expected):
            assert loss_and_norm[0] == pytest.approx(loss_and_norm[1], rel=tolerance), layout
    run_distributed(compare, 1, [tmp_path / f"{number}" for number in range(len(LAYOUTS) + 1)])
    frozen = (tmp_path / "0" / "checkpoints" / "frozen").is_dir()
    assert frozen == (overrides is FROZEN)


# --- what does not fit ---


def write_one(overrides: tuple[str, ...], run: Path, left_out: str | None) -> None:
    complete = save.optimizer_state

    def incomplete(*arguments):
        state = complete(*arguments)
        del state["optimizer0"][left_out]["exp_avg"]
        return state

    with joined(compose_config(*overrides)) as device:
        trainer, _ = built(overrides, device)
        if left_out:
            save.optimizer_state = incomplete
        saved(trainer, overrides, run, 1)


def refused(overrides: tuple[str, ...], run: Path) -> str:
    with joined(compose_config(*overrides)) as device:
        trainer, _ = built(overrides, device)
        with pytest.raises(ConfigError) as caught:
            restore.load(trainer, latest(run))
        return str(caught.value)


@pytest.mark.parametrize(
    ("written", "left_out", "read", "named"),
    [
        (FP32, None, ("llm.layers=6",), "no decoder.layers.4."),
        ((*FP32, "llm.layers=6"), None, ("llm.layers=4",), "which this run does not have"),
        (FP32, None, ("llm.ffn=256",), "linear_fc1.weight of shape (768, 128) instead of (512, 128)"),
        (FP32, None, ("llm.vocab=514",), "embedding.word_embeddings.weight of shape (512, 128) instead of (514, 128)"),
        (FP32, "projector.norm.weight", (), "no optimizer.state.exp_avg.projector.norm.weight"),
        (FP32, None, ("precision=bf16",), "no optimizer.state.param.decoder.final_layernorm.weight"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(tmp_path, written, left_out, read, named):
    run_distributed(write_one, 1, written, tmp_path, left_out)
    [message] = run_distributed(refused, 1, (*FP32, *read), tmp_path)
    assert named in message
    assert "config.yaml" in message


MAPS = (*FP32, "arch=decoder", "llm.layers=1", "tiling=anyres", "data.seq_length=512")

# --- weights alone, for the next stage or for generation ---


def next_stage(overrides: tuple[str, ...], run: Path, onward: Path, new: tuple[str, ...]) -> list[str]:
    """Another stage's trainer with the weights of `run`, in its own layout; its checkpoint goes to `onward`."""
    with joined(compose_config(*overrides)) as device:
        trainer, _ = built(overrides, device)
        absent = restore.load_weights(trainer.pipeline.parts, latest(run), new)
        saved(trainer, overrides, onward, 1)
        return absent


def test_the_next_stage_begins_with_the_weights_of_the_last(tmp_path):
    """From a checkpoint with frozen weights beside it, into other layouts and a stage in which they learn."""
    run_distributed(begin, 1, FROZEN, tmp_path / "0")
    for number, layout in enumerate((("parallel.tensor=2", "parallel.sequence=true"), ("parallel.pipeline=2",))):
        options = (*FROZEN, "stage=sft", "train.micro_batch=1", *layout)
        assert run_distributed(next_stage, 2, options, tmp_path / "0", tmp_path / f"{number + 1}", ()) == [[], []]

    run_distributed(same_weights, 1, [tmp_path / name for name in "012"])


def with_maps(run: Path) -> tuple[bool, bool]:
    """Whether a stage with feature maps has kept its own vector at the ends of rows, and the projector of `run`."""
    with joined(compose_config(*MAPS)) as device:
        trainer, _ = built(MAPS, device)
        (model,) = trainer.pipeline.parts
        before = model.projector.row_end.detach().clone()
        absent = restore.load_weights(trainer.pipeline.parts, latest(run))
        kept = tensors_in(latest(run))["projector.norm.weight"]
        return not absent and torch.equal(model.projector.row_end, before), torch.equal(
            model.projector.norm.weight, kept
        )


def test_a_stage_with_feature_maps_may_follow_one_without(tmp_path):
    run_distributed(write_one, 1, (*MAPS, "tiling=single", "optim.lr=0.1"), tmp_path, None)
    assert run_distributed(with_maps, 1, tmp_path) == [(True, True)]


def same_weights(runs: list[Path]) -> None:
    with joined(compose_config(*FROZEN)):
        first, *others = (tensors_in(latest(run)) for run in runs)
        weights = {name: tensor for name, tensor in first.items() if not name.startswith("optimizer.")}
        for other in others:
            assert_same({name: t for name, t in other.items() if not name.startswith("optimizer.")}, weights)


def test_a_module_group_may_be_new_only_where_it_is_said_to_be(tmp_path):
    run_distributed(begin, 1, (*FP32, "arch=decoder"), tmp_path / "0")
    hybrid = (*FP32, "arch=hybrid")
    assert run_distributed(next_stage, 1, hybrid, tmp_path / "0", tmp_path / "1", ("xattn",)) == [["xattn"]]
    for options, new, reason in (
        (hybrid, (), r"no decoder.layers.1.cross_attention.gate"),
        (
            (*FP32, "arch=decoder", "llm.ffn=256"),
            (),
            r"linear_fc1.weight of shape \(768, 128\) instead of \(512, 128\)",
        ),
        ((*FP32, "arch=xattn"), ("xattn",), r"projector.layers.encoder.linear_fc1.weight, which this run does not"),
    ):
        with pytest.raises(AssertionError, match=reason):
            run_distributed(next_stage, 1, options, tmp_path / "0", tmp_path / "2", new)


class Scales(torch.nn.Module):
    """Has state that is not a tensor, like the FP8 scales of Transformer Engine's modules."""

    def __init__(self, memory: bytes) -> None:
        super().__init__()
        self.memory = memory

    def get_extra_state(self) -> io.BytesIO:
        return io.BytesIO(self.memory)

    def set_extra_state(self, state: io.BytesIO) -> None:
        self.memory = state.read()


def scaled(device, memory: bytes, delayed: bool = True) -> tuple[Trainer, Scales]:
    """A trainer with FP8 scales in its first layer; `delayed`: with a scaling history to store."""
    trainer, _ = built(FP32, device)
    model, scales = trainer.chunks[0].module, Scales(memory)
    model.decoder.layers[0].mlp.linear_fc1.scales = scales
    if delayed:
        trainer.chunks[0].config.fp8, trainer.chunks[0].config.fp8_recipe = "hybrid", "delayed"
    return trainer, scales


def scales_come_back(run: Path) -> list[bytes]:
    """The scales after loading a checkpoint with scales, one without, and in a run without scales."""
    with joined(compose_config(*FP32)) as device:
        trainer, _ = scaled(device, b"learned")
        with_scales = saved(trainer, FP32, run / "with", 1)
        plain, _ = scaled(device, b"none", delayed=False)
        without = saved(plain, FP32, run / "without", 1)
        found = []
        for folder, delayed in ((with_scales, True), (without, True), (with_scales, False)):
            other, scales = scaled(device, b"fresh", delayed)
            restore.load(other, folder)
            found.append(scales.memory)
        return found


def only_weights_come_back(run: Path) -> list[bool]:
    """Whether a model with scales starts from the weights of checkpoints with and without scales."""
    with joined(compose_config(*FP32)) as device:
        found = []
        for name, delayed in (("with", True), ("without", False)):
            trainer, _ = scaled(device, b"learned", delayed)
            with torch.no_grad():
                next(trainer.pipeline.parts[0].parameters()).fill_(0.5)
            folder = saved(trainer, FP32, run / name, 1)
            other, _ = scaled(device, b"fresh", delayed)
            restore.load_weights(other.pipeline.parts, folder)
            found.append(bool((next(other.pipeline.parts[0].parameters()) == 0.5).all()))
        return found


def test_the_next_stage_needs_no_scales(tmp_path):
    assert run_distributed(only_weights_come_back, 1, tmp_path) == [[True, True]]


def test_scales_of_delayed_fp8_travel_with_the_checkpoint(tmp_path):
    assert run_distributed(scales_come_back, 1, tmp_path) == [[b"learned", b"fresh", b"fresh"]]
