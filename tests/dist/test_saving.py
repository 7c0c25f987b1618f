"""Saving in real process groups: snapshots, failures, what is kept, and damage that a load refuses."""

from __future__ import annotations

import errno
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
import torch.distributed as dist

from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.runs.digests import MANIFEST, faults
from nvlm.train.checkpoint import restore, writer
from nvlm.train.checkpoint.save import Checkpoints, latest
from tests.dist.checkpoints import FP32, FROZEN, assert_same, built, held_by, saved, tensors_in
from tests.dist.run import joined, run_distributed


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
