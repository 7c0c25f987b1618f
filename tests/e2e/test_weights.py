"""The whole workflow in real processes: published folders, two stages in two layouts, export, answers from both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from nvlm.commands import export as export_cli
from nvlm.commands.compose import compose_config
from nvlm.data.text.tokenizer import load_tokenizer
from nvlm.vision.encoders.internvit.description import TINY
from tests.e2e import preloaded
from tests.published import language_model

# The tiny model's own sizes, so that its tokenizer and encoder fit.
FAST = "data.records=16 data.workers=0 train.global_batch=4 train.micro_batch=2 optim.warmup=0 evaluate=none".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A published language model and encoder, side by side."""
    root = tmp_path_factory.mktemp("published")
    model = language_model(compose_config())
    with torch.no_grad():  # so that it does not end at once: of random logits, zero is never the largest
        model.lm_head.weight[load_tokenizer("tiny").end] = 0
    model.save_pretrained(root / "llm", max_shard_size="1MB")
    (root / "vision").mkdir()
    (root / "vision" / "model.safetensors").write_bytes(TINY.read_bytes())
    Image.effect_noise((200, 120), 90).convert("RGB").save(root / "page.png")
    return root


@pytest.mark.parametrize("arch", ["hybrid", *(pytest.param(a, marks=pytest.mark.slow) for a in ("decoder", "xattn"))])
def test_from_published_folders_to_an_answer(tmp_path, folders, arch):
    init = f"init.vision={folders / 'vision'}"
    first = (f"arch={arch}", "stage=pretrain", "name=one", f"init.llm={folders / 'llm'}", init, "train.steps=2")
    status, output = preloaded.run(tmp_path, *FAST, *first, "parallel.tensor=2", "parallel.sequence=true")
    assert status == 0, output
    for group, origin in (("projector", "random"), ("llm", "llm"), ("vision", "vision")):
        [line] = [line for line in output.splitlines() if f"│ {group} " in line]
        assert origin in output and ("frozen" in line) == (group != "projector"), output

    second = (f"arch={arch}", "stage=sft", "name=two", "init.checkpoint=runs/one", init, "train.steps=2")
    status, output = preloaded.run(tmp_path, *FAST, *second, "parallel.pipeline=2")
    assert status == 0, output

    assert export_cli.main([f"checkpoint={tmp_path / 'runs/two'}", f"out={tmp_path / 'out'}"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["nvlm"]["arch"] == arch and (tmp_path / "out" / "tokenizer.json").is_file()

    question = "What stands there?"
    command = [f"checkpoint={tmp_path / 'runs/two'}", f"image={folders / 'page.png'}", f"prompt={question}"]
    asked = subprocess.run(
        [sys.executable, "launch/generate.py", *command, "max_new_tokens=12", "precision=fp32"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    code = (
        "import sys; sys.path.insert(0, '.'); import torch; from modeling_nvlm import NVLM\n"
        "model = NVLM.from_folder('.', dtype=torch.float32)\n"
        f"messages = [{{'role': 'user', 'content': {question!r}}}]\n"
        f"print(model.answer(messages, [{str(folders / 'page.png')!r}], max_new_tokens=12))\n"
        "assert not any(name.startswith(('megatron', 'nvlm')) for name in sys.modules)"
    )
    alone = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    )
    assert asked.stdout == alone.stdout and asked.stdout.strip()


def test_a_run_goes_on_without_the_folder_that_it_began_with(tmp_path, folders):
    (tmp_path / "llm").symlink_to(folders / "llm")
    words = (*FAST, "name=run", "arch=hybrid", f"init.llm={tmp_path / 'llm'}", "train.steps=4", "train.save_every=2")
    status, output = preloaded.run(tmp_path, *words)
    assert status == 0, output
    whole = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    (tmp_path / "llm").unlink()
    (tmp_path / "runs/run/checkpoints/latest").write_text("step_00000002\n")
    status, output = preloaded.run(tmp_path, *words, "resume=auto")
    assert status == 0, output
    again = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in again] == [json.loads(line)["loss"] for line in whole]
    status, output = preloaded.run(tmp_path, *words, "name=other")
    assert status == 2 and "error: init.llm: got" in output and not (tmp_path / "runs/other").exists()
