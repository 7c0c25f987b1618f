"""Input files that are replaced after a run: what a resume, the next stage, an export and generation do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from nvlm.commands.request import parse as parse_request
from nvlm.config.values import ConfigError
from nvlm.export.export import export
from nvlm.export.options import parse as parse_export
from nvlm.vision.encoders.internvit.description import TINY
from tests.e2e.preloaded import run

SMALL = (
    "name=run", "arch=decoder", "llm.layers=1", "data=jsonl", "data.path=records.jsonl", "data.workers=0",
    "data.window=1", "init.vision=encoder.safetensors", "train.global_batch=4", "train.micro_batch=4", "train.steps=4",
    "train.save_every=2", "train.threads=1", "optim.warmup=1", "evaluate=none",
)  # fmt: skip


def record(number: int) -> str:
    messages = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": str(number)}]
    return json.dumps({"messages": messages}) + "\n"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a run of four steps that stopped after its second."""
    where = tmp_path_factory.mktemp("begun")
    (where / "records.jsonl").write_text("".join(map(record, range(8))))
    (where / "encoder.safetensors").write_bytes(TINY.read_bytes())
    status, output = run(where, *SMALL)
    assert status == 0, output
    (where / "runs" / "run" / "checkpoints" / "latest").write_text("step_00000002\n")
    return where


@pytest.fixture
def place(begun, tmp_path, monkeypatch):
    """A copy of it, as the working directory."""
    where = tmp_path / "copy"
    shutil.copytree(begun, where)
    monkeypatch.chdir(where)
    return where


def replace_encoder(where: Path) -> None:
    weights = load_file(TINY)
    largest = max(weights, key=lambda name: weights[name].size)
    weights[largest].flat[-1] += 1
    save_file(weights, where / "encoder.safetensors")


def test_a_resume_refuses_other_records_and_takes_the_same_ones_elsewhere(place):
    rows = (place / "runs" / "run" / "metrics.jsonl").read_text()
    with open(place / "records.jsonl", "a") as file:
        file.write(record(8))
    status, output = run(place, *SMALL, "resume=auto")
    assert status == 2 and "9 records" in output and "8 records" in output and "Traceback" not in output
    assert (place / "runs" / "run" / "metrics.jsonl").read_text() == rows
    (place / "records.jsonl").unlink()
    (place / "moved.jsonl").write_text("".join(map(record, range(8))))
    status, output = run(place, *SMALL, "resume=auto", "data.path=moved.jsonl")
    assert status == 0, output
    losses = [json.loads(line)["loss"] for line in (place / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses == [json.loads(line)["loss"] for line in rows.splitlines()]


def test_another_encoder_is_refused_by_all_that_go_on_from_the_run(place):
    replace_encoder(place)
    record_file = place / "runs" / "run" / "inputs.json"  # export and generation go by it
    recorded = json.loads(record_file.read_text())
    recorded["encoder"]["path"] = str(place / "encoder.safetensors")
    record_file.write_text(json.dumps(recorded))
    for words in (("resume=auto",), ("name=next", "init.checkpoint=runs/run")):
        status, output = run(place, *SMALL, *words)
        assert status == 2 and "init.vision: got" in output and "the encoder that" in output, output
    assert not (place / "runs" / "next").exists()
    with pytest.raises(ConfigError, match="init.vision: got .*the encoder that"):
        parse_request(["checkpoint=runs/run", "prompt=What?"])
    with pytest.raises(ConfigError, match="vision: got .*the encoder that"):
        export(parse_export(["checkpoint=runs/run", "out=out"]))
    assert not (place / "out").exists()
