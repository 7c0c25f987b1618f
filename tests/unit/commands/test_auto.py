"""parallel=auto: the planner's best layout for the GPUs that are there; what it refuses; what a resume keeps."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import pytest

from nvlm.commands import launch
from nvlm.commands import train as command
from nvlm.commands.auto import with_layout
from nvlm.commands.compose import compose_config
from nvlm.config.hardware import GPUS, GiB
from nvlm.config.values import ConfigError
from nvlm.estimate.best import best_layout
from nvlm.estimate.layouts import plan
from nvlm.runs.ownership import begin

H100 = GPUS["h100"]
TINY = ("arch=decoder", "llm.layers=4", "gpu=h100", "parallel=auto")
TASK = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_gpus_here(monkeypatch):
    monkeypatch.setattr(launch, "gpus_here", lambda: ())


def nowhere(words):
    raise AssertionError("no folder is needed")


def layout(words) -> tuple[int, ...]:
    p = compose_config(*words).parallel
    return (p.tensor, p.pipeline, p.virtual, p.context, p.data)


def test_it_is_the_planner_s_best_and_is_said_with_the_reason(capsys):
    words = with_layout([*TINY, "gpus=8", "dry_run=true"], nowhere)
    base = compose_config("arch=decoder", "llm.layers=4", "gpu=h100", "dry_run=true", "parallel.gradients=bf16")
    best, *others = plan(base, 8, H100).fitting
    chosen = compose_config(*words)
    assert chosen.parallel == dataclasses.replace(best.config.parallel, data=best.replicas)
    assert chosen.train == best.config.train and "parallel=auto" not in words and "gpus=8" not in words
    said = capsys.readouterr().out
    assert (
        said.count("\n") == 3 and "GPUs wait 9" in said and f"the fastest of {1 + len(others)} layouts that fit" in said
    )
    assert f"{best.samples_per_second:.1f} samples/s predicted" in said and "on 8 h100:" in said
    assert set(words) > set(said.partition("in words: ")[2].splitlines()[0].split())


def test_a_recipe_s_own_layout_gives_way_and_what_is_typed_does_not():
    given = ["+experiment=nvlm_d_34b_sft", "dry_run=true", "gpu=h100", "parallel=auto", "gpus=32"]
    fixed = ["parallel.tensor=8", "parallel.pipeline=2", "train.recompute=full", "parallel.virtual=1"]
    words = with_layout([*given, *fixed], nowhere)
    config = compose_config(*words)
    p = config.parallel
    assert (p.tensor, p.pipeline, p.virtual, p.context * p.data) == (8, 2, 1, 2) and config.train.recompute == "full"
    assert all(words.count(word) == 1 for word in words)


def test_a_launcher_s_processes_are_the_gpus_and_one_of_them_speaks(monkeypatch, capsys):
    for key, value in (TASK | {"RANK": "3"}).items():
        monkeypatch.setenv(key, value)
    words = with_layout(TINY, nowhere)
    config = compose_config(*words)
    assert config.parallel.replica * config.parallel.data == 4 and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert set(with_layout([*TINY, "gpus=4"], nowhere)) == set(words) and "on 4 h100:" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="gpus: got 8, expected the 4 processes of"):
        with_layout([*TINY, "gpus=8"], nowhere)


def test_this_machine_s_gpus_are_taken(monkeypatch, capsys):
    monkeypatch.setattr(launch, "gpus_here", lambda: (("NVIDIA H200", 0), ("NVIDIA H100 80GB HBM3", 0)))
    words = with_layout(["arch=decoder", "llm.layers=4", "parallel=auto"], nowhere)
    p = compose_config(*words).parallel
    assert p.replica * p.data == 2 and "of 79.1 GiB" in capsys.readouterr().out
    monkeypatch.setattr(launch, "gpus_here", lambda: (("NVIDIA H100 NVL", 0),))
    with pytest.raises(ConfigError, match="parallel=auto: got NVIDIA H100 NVL, expected one of h100.* Fix: gpu=h100"):
        with_layout(["arch=decoder", "parallel=auto"], nowhere)


def test_a_resumed_run_keeps_its_layout_on_as_many_gpus(tmp_path, capsys):
    laid = ("parallel.tensor=2", "parallel.sequence=true", "parallel.data=4", "parallel.distributed_optimizer=true")
    begin(compose_config("arch=decoder", "llm.layers=4", *laid, "train.recompute=full"), tmp_path, fresh=True)
    given = [*TINY, "resume=auto"]
    words = with_layout([*given, "gpus=8"], lambda _: tmp_path)
    assert layout(words) == (2, 1, 1, 1, 4) and compose_config(*words).train.recompute == "full"
    assert f"the layout with which {tmp_path} began" in capsys.readouterr().out
    assert layout(with_layout([*given, "gpus=4"], lambda _: tmp_path)) != (2, 1, 1, 1, 2)
    assert layout(with_layout([*given, "gpus=8", "parallel.tensor=1"], lambda _: tmp_path))[0] == 1
    assert "began" not in capsys.readouterr().out


def test_where_none_fits_the_gpus_that_are_enough_are_named(configured):
    config, small = configured("llm=qwen2-7b", "dry_run=true"), dataclasses.replace(H100, memory=36 * GiB)
    with pytest.raises(ConfigError) as refused:
        best_layout(config, 2, small, ())
    said = str(refused.value)
    assert said.startswith("parallel=auto: got 2 GPUs of 36.0 GiB, expected ") and "\n" not in said
    enough = int(said.rpartition("gpus=")[2].rstrip(")"))
    assert plan(config, enough, small).fitting and not plan(config, enough // 2, small).fitting


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "parallel=auto: got a machine without GPUs"),
        (["gpus=8"], "parallel=auto: got a machine without GPUs, expected one of h100"),
        (["gpus=two", "gpu=h100"], "gpus: got 'two'"),
        (["gpus=0", "gpu=h100"], "gpus: got '0'"),
        (["gpus=8", "gpu=h100", "parallel.data=2"], "parallel.data: got parallel=auto"),
        (["gpus=8", "gpu=h100", "parallel.tensor=3"], "parallel.tensor: got 3"),
        (["gpus=9", "gpu=h100", "parallel.tensor=2"], "number of processes: got 9, expected a multiple of 2"),
        (["gpus=8", "gpu=a100-80gb", "precision=fp8_current"], "expected a GPU with FP8"),
        (["gpus=8", "gpu=h100", "llm.layres=3"], "llm.layres: got a key that does not exist"),
        (["-m", "gpus=8", "gpu=h100", "seed=1,2"], "parallel=auto: got a sweep"),
    ],
)
def test_a_mistake_is_answered_in_one_line(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "parallel=auto", "arch=decoder", "llm.layers=4", *words])
    assert command.main(time.time()) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and said in told and told.count("\n") == 1


def test_the_number_of_gpus_belongs_to_it_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "gpus=8", "dry_run=true"])
    assert command.main(time.time()) == 2
    assert "gpus: got a key that does not exist" in capsys.readouterr().err


def test_stages_have_layouts_of_their_own_and_no_torch_is_needed(tmp_path):
    arguments = ["+experiment=nvlm_x_34b", "parallel=auto", "gpus=32", "gpu=h100", "dry_run=true", "parallel.tensor=8",
                 "parallel.context=1", "train.recompute=none"]  # fmt: skip
    code = (
        "import sys, time; from nvlm.commands.train import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "status = main(time.time())\n"
        "assert not any(m == 'torch' or m.startswith('megatron') for m in sys.modules)\n"
        "sys.exit(status)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    first, second = (line for line in run.stdout.splitlines() if line.startswith("parallel=auto: "))
    assert first != second and run.stdout.count("layout: tensor ") == 2
