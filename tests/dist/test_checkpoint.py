"""Checkpoints in real process groups: from any layout to any other, snapshots, failures, damage, and refusals."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.runs.digests import MANIFEST, faults
from nvlm.train.checkpoint import restore, save, writer
from nvlm.train.checkpoint.save import Checkpoints, latest
from nvlm.train.step import Trainer
from tests.dist.checkpoints import FP32, SMALL, assert_same, begin, built, held_by, pass_on, saved, tensors_in
from tests.dist.run import joined, run_distributed

FROZEN = (*SMALL, "precision=bf16", "stage=pretrain", "arch=xattn")


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [(FP32, 1e-4), (FROZEN, 2e-2), ((*FP32, "arch=decoder"), 1e-4)],
    ids=["hybrid-fp32", "xattn-bf16-frozen", "decoder-fp32"],
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


# --- saving ---


def change_while_it_is_written(overrides: tuple[str, ...], run: Path) -> None:
    with joined(compose_config(*overrides)) as device:
        trainer, step = built(overrides, device)
        step()
        held = held_by(trainer)
        write, gate = writer._write_files, run.parent / "open"

        def late(*arguments):
            while not gate.exists():
                time.sleep(0.01)
            write(*arguments)

        writer._write_files = late
        with Checkpoints(compose_config(*overrides).train, run) as checkpoints:
            checkpoints.save(trainer, 1)
            for weight in trainer.chunks[0].module.parameters():
                weight.data.zero_()
            step()
            checkpoints.poll()
            assert latest(run) is None
            gate.touch()
        assert_same(tensors_in(latest(run)), held)


@pytest.mark.parametrize("overrides", [FP32, (*FP32, "precision=bf16")], ids=["fp32", "bf16"])
def test_a_save_is_a_snapshot(tmp_path, overrides):
    run_distributed(change_while_it_is_written, 1, overrides, tmp_path / "run")


def full_disk(*_) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def killed(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room_for_metadata(storage, *_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_and_try_again(overrides: tuple[str, ...], run: Path) -> list[str]:
    """The reasons that this rank received: rank 1 cannot write, rank 1's writer dies, rank 0 cannot finish."""
    with joined(compose_config(*overrides)) as device:
        trainer, _ = built(overrides, device)
        write, finish = writer._write_files, writer.filesystem_async.FileSystemWriterAsync.finish
        reasons = []

        def after(trouble):
            return lambda *arguments: (trouble(), write(*arguments))

        with Checkpoints(compose_config(*overrides).train, run) as checkpoints:
            checkpoints.save(trainer, 1)
            for step, trouble in ((2, full_disk), (3, killed), (4, no_room_for_metadata)):
                if trouble is no_room_for_metadata:
                    writer.filesystem_async.FileSystemWriterAsync.finish = trouble
                elif dist.get_rank() == 1:
                    writer._write_files = after(trouble)
                checkpoints.save(trainer, step)
                checkpoints.poll(wait=True)
                reasons.append(checkpoints.failure)
                dist.barrier()
                assert latest(run).name == "step_00000001"
                assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "step_00000001"}
                dist.barrier()
                writer._write_files = write
                writer.filesystem_async.FileSystemWriterAsync.finish = finish
            checkpoints.save(trainer, 5)
        assert latest(run).name == "step_00000005"
        assert faults(latest(run)) == []
        return reasons


def test_all_ranks_learn_that_one_could_not_write(tmp_path):
    overrides = (*FP32, "parallel.data=2", "parallel.distributed_optimizer=true")
    first, second = run_distributed(fail_and_try_again, 2, overrides, tmp_path / "run")
    assert first == second
    assert os.strerror(errno.EFBIG) in first[0] or "rank 1" in first[0]
    assert "ended early (rank 1)" in first[1]
    assert os.strerror(errno.ENOSPC) in first[2]


def keep_two(overrides: tuple[str, ...], run: Path) -> None:
    config = compose_config(*overrides)
    with joined(config) as device:
        trainer, _ = built(overrides, device)
        root = run / "checkpoints"
        (root / ".step_00000009.partial").mkdir(parents=True)
        with Checkpoints(replace(config.train, keep=2), run) as checkpoints:
            for step in (1, 2, 3, 8):
                checkpoints.save(trainer, step)
        names = lambda: sorted(path.name for path in root.glob("step_*"))  # noqa: E731
        assert names() == ["step_00000003", "step_00000008"]
        (root / "latest").write_text("step_00000003\n")
        with Checkpoints(replace(config.train, keep=1), run) as checkpoints:
            checkpoints.save(trainer, 4)
        assert names() == ["step_00000004", "step_00000008"]  # what lies ahead is not this run's to delete
        assert latest(run).name == "step_00000004"


def test_the_newest_stay_and_latest_is_among_them(tmp_path):
    run_distributed(keep_two, 1, FP32, tmp_path)


# --- damage ---


class Trap:
    """A pickle that reports when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def damaged(folder: Path, mark: Path) -> dict[str, Callable[[], object]]:
    """Ways to damage `folder`, by the file that should be named."""
    import pickle

    data = next(folder.glob("*.distcp"))

    def flip() -> None:
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 4
        data.write_bytes(content)

    return {
        f"{data.name} is not what was written": flip,
        f"{data.name} has 1000 bytes of": lambda: os.truncate(data, 1000),
        f"{data.name} is missing": data.unlink,
        ".metadata": lambda: (folder / ".metadata").write_bytes(pickle.dumps(Trap(mark))),
        "extra.distcp does not belong there": lambda: (folder / "extra.distcp").touch(),
        f"{MANIFEST} is missing": (folder / MANIFEST).unlink,
        f"{MANIFEST} is damaged": lambda: os.truncate(folder / MANIFEST, 50),
        "frozen is missing": lambda: shutil.rmtree(folder.parent / "frozen"),
        "frozen: metadata.json has 0 bytes": lambda: os.truncate(folder.parent / "frozen" / "metadata.json", 0),
        "frozen holds the weights of another run": lambda: swap(folder.parent / "frozen" / MANIFEST),
    }


def swap(manifest: Path) -> None:
    """The same digests in another order: an intact folder, but not the original one."""
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"files": content["files"], "frozen": None}))


def refusals(overrides: tuple[str, ...], run: Path) -> dict[str, str]:
    """The message for each kind of damage to the newer of two checkpoints."""
    with joined(compose_config(*overrides)) as device:
        trainer, _ = built(overrides, device)
        for step in (1, 2):
            saved(trainer, overrides, run, step)
        messages, copy, mark = {}, run.with_name("copy"), run.with_name("opened")
        for name in damaged(latest(run), mark):
            if dist.get_rank() == 0:
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(run, copy)
                damaged(latest(copy), mark)[name]()
            dist.barrier()
            try:
                restore.load(trainer, latest(copy))
            except ConfigError as error:
                messages[name] = str(error)
            dist.barrier()
        assert not mark.exists()
        return messages


def test_damage_is_refused_by_name_and_a_whole_one_offered(tmp_path):
    overrides = (*FROZEN, "parallel.data=2")
    first, second = run_distributed(refusals, 2, overrides, tmp_path / "run")
    assert first == second
    assert len(first) == 10
    for name, message in first.items():
        assert name in message
        if name.startswith("frozen"):
            assert "no older checkpoint is intact" in message
        else:
            assert "write step_00000001, which is intact, into" in message


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
