"""A run's folder: one owner, no loss of foreign files, and what a resume may change."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvlm.config.values import ConfigError
from nvlm.runs.folder import has_run, weight_keys
from nvlm.runs.ownership import begin, check_folder, outlook, owned

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import subprocess, sys, time
from pathlib import Path
from nvlm.runs.ownership import owned
with owned(Path(sys.argv[1])) as lock:
    if len(sys.argv) > 2:  # a worker, that outlives its launcher for so many seconds
        subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({sys.argv[2]})"], pass_fds=[lock])
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def another(run_dir: Path, *lingers: str):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(run_dir), *lingers]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_owner_is_refused_and_told_who_holds_the_folder(tmp_path):
    with another(tmp_path / "run") as holder:
        began = time.monotonic()
        with pytest.raises(ConfigError) as caught, owned(tmp_path / "run"):
            pass
        assert time.monotonic() - began < 5
        assert f"in use by process {holder.pid} on " in str(caught.value)
        assert f"(kill {holder.pid})" in str(caught.value)
    with owned(tmp_path / "run"):  # a killed one holds nothing
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()


def test_the_workers_of_a_killed_launcher_hold_the_folder_until_they_have_ended(tmp_path):
    with another(tmp_path / "run", "1") as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        began = time.monotonic()
        with owned(tmp_path / "run"):
            assert time.monotonic() - began > 0.3


@pytest.fixture
def config(configured):
    return configured("name=run")


THEIRS = {"metrics.jsonl": "theirs", "config.yaml": "model: x\n", "checkpoints/latest": "step_1", "tensorboard/e": "x"}


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_that_is_no_run_s_is_left_as_it_is(tmp_path, config, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(THEIRS[name])
    for claim in (lambda: owned(tmp_path).__enter__(), lambda: check_folder(config, tmp_path)):
        with pytest.raises(ConfigError, match=f"got {name.split('/')[0]}, which would be overwritten"):
            claim()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path] and path.read_text() == THEIRS[name]


def test_other_files_in_the_folder_stay_and_do_not_matter(tmp_path, config):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    with owned(tmp_path):
        begin(config, tmp_path, fresh=True)
    assert (tmp_path / "notes.txt").read_text() == "mine" and has_run(tmp_path)


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "arch: hybrid\n", "\0", "x: ${"])
def test_any_text_may_be_a_config_yaml(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    assert not has_run(tmp_path)


def test_only_a_run_that_begins_anew_drops_what_was_told(tmp_path, config):
    begin(config, tmp_path, fresh=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    begin(config, tmp_path, fresh=False)
    assert (tmp_path / "metrics.jsonl").exists()
    begin(config, tmp_path, fresh=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="a folder that can be written"), owned(path):
            pass


def with_checkpoint(run_dir: Path, config) -> None:
    begin(config, run_dir, fresh=True)
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "latest").write_text("step_00000003\n")


def test_a_resume_may_change_what_no_step_depends_on(tmp_path, config):
    with_checkpoint(tmp_path, config)
    again = dataclasses.replace(config, resume="auto")
    check_folder(again, tmp_path)
    check_folder(dataclasses.replace(again, evaluate=dataclasses.replace(config.evaluate, questions=1)), tmp_path)
    with pytest.raises(ConfigError, match="seed: got 7, expected 1234, as at the start of the run"):
        check_folder(dataclasses.replace(again, seed=7), tmp_path)
    with pytest.raises(ConfigError, match="resume=auto continues it"):
        check_folder(config, tmp_path)


def test_a_resume_with_other_data_names_the_group_and_the_value_as_it_is_typed(tmp_path, configured):
    run = configured("data=jsonl", "data.path=a.jsonl", "resume=auto")
    with_checkpoint(tmp_path, run)
    with pytest.raises(ConfigError, match="data.source: got pages, expected jsonl, .*Fix: data=jsonl, or name=OTHER"):
        check_folder(configured("data=pages", "resume=auto"), tmp_path)
    with pytest.raises(ConfigError, match="arch.name: got xattn, expected hybrid, .*Fix: arch=hybrid, or name=OTHER"):
        check_folder(configured("arch=xattn", "data=jsonl", "data.path=a.jsonl", "resume=auto"), tmp_path)
    with pytest.raises(ConfigError, match="data.task: got vqa, expected null, .*Fix: data.task=null, or name=OTHER"):
        check_folder(configured("data=jsonl", "data.path=a.jsonl", "data.task=vqa", "resume=auto"), tmp_path)


def test_a_resume_keeps_its_blend(tmp_path, configured):
    def blended(**sources):
        parts = (f"{name}: {{source: jsonl, {keys}}}" for name, keys in sources.items())
        return configured("data=blend", f"data.sources={{{', '.join(parts)}}}", "resume=auto")

    run = blended(a="path: a.jsonl, weight: 1", b="path: b.jsonl, weight: 1")
    with_checkpoint(tmp_path, run)
    (tmp_path / "inputs.json").write_text("{}")  # records are compared by content, so their paths may change
    check_folder(
        blended(a="path: x.jsonl, weight: 1, heldout_path: h", b="path: b.jsonl, root: r, weight: 1"), tmp_path
    )
    with pytest.raises(ConfigError, match="data.sources.a.weight: got 2.0, expected 1.0, as at the start"):
        check_folder(blended(a="path: a.jsonl, weight: 2", b="path: b.jsonl, weight: 1"), tmp_path)
    with pytest.raises(ConfigError, match="data.sources: got a, expected a, b, as at the start"):
        check_folder(blended(a="path: a.jsonl, weight: 1"), tmp_path)
    with pytest.raises(ConfigError, match="data.sources: got a, b, c, expected a, b"):
        check_folder(blended(**dict.fromkeys("abc", "path: a.jsonl, weight: 1")), tmp_path)


def with_steps(config, steps: int):
    """The same run with another number of steps, to be resumed."""
    return dataclasses.replace(config, resume="auto", train=dataclasses.replace(config.train, steps=steps))


def test_a_run_may_be_made_longer_and_not_shorter(tmp_path, config):
    with_checkpoint(tmp_path, config)
    steps = config.train.steps
    check_folder(with_steps(config, steps + 1), tmp_path)
    expected = f"got {steps - 1}, expected {steps}, as at the start of the run, or more. Fix: train.steps={steps}, or "
    with pytest.raises(ConfigError, match=expected):
        check_folder(with_steps(config, steps - 1), tmp_path)


def test_a_resume_says_what_it_does(tmp_path, config):
    assert outlook(config, tmp_path) == f"no checkpoint in {tmp_path}: starting at step 0"
    with_checkpoint(tmp_path, config)
    (tmp_path / "checkpoints" / "step_00000003").mkdir()
    assert outlook(with_steps(config, 3), tmp_path) == f"{tmp_path} is done: 3 of 3 steps"
    expected = f"resuming from step 3 of 5: {tmp_path}/checkpoints/step_00000003"
    assert outlook(with_steps(config, 5), tmp_path) == expected


def test_a_data_file_that_is_not_there_is_said_before_anything_is_written(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "data=jsonl", "data.path=gone.jsonl", "name=run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and f"got 'gone.jsonl' in {tmp_path}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_files_are_utf_8_whatever_the_locale_is(tmp_path):
    code = "import sys, pathlib, nvlm.runs.files as files; files.write_whole(pathlib.Path(sys.argv[1]), '\\xe9\\u4e2d')"
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], env=ascii_only, cwd=ROOT, check=True)
    assert (tmp_path / "a").read_bytes() == "\xe9\u4e2d".encode()


def test_no_run_of_a_sweep_begins_where_another_s_folder_is_refused(tmp_path, configured):
    with_checkpoint(tmp_path / "sweep" / "seed=2", configured("seed=2"))
    told = tmp_path / "sweep" / "seed=1" / "metrics.jsonl"  # of a run that never reached a checkpoint
    begin(configured("seed=1"), told.parent, fresh=True)
    told.write_text("precious")
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "-m", "seed=1,2"]
    command += ["hydra.sweep.dir=sweep", "resume=never"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "sweep/seed=2: got a folder that holds a run" in done.stderr, done.stderr
    assert told.read_text() == "precious"


def test_a_weight_without_a_copy_of_its_own_stands_under_its_fp32_one():
    moments = ["optimizer.state.exp_avg.a", "optimizer.state.exp_avg_sq.b"]
    keys = weight_keys(["a", "frozen", "optimizer.state.param.a", "optimizer.state.param.b", *moments])
    assert keys == {"a": "a", "frozen": "frozen", "b": "optimizer.state.param.b"}
