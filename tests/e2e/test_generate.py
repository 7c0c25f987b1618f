"""The generate command on a trained checkpoint: what it writes and when, several turns, two processes, errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvlm.commands.compose import compose_config
from nvlm.commands.generate import main
from nvlm.config.values import ConfigError
from nvlm.generate.config import read_config
from nvlm.generate.generator import Conversation, load
from nvlm.generate.sampling import Sampling
from nvlm.runs.folder import read_run_config
from tests.e2e.runs import train
from tests.published import SMALL, language_model

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "How many, in (row 1), are 7's?"  # signs that a configuration's grammar would stumble over
MORE = "And <image> here?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of two steps and two images."""
    where = tmp_path_factory.mktemp("generate")
    train(where, "name=run", "arch=hybrid", "train.steps=2", "optim.warmup=1", "train.save_every=1", "train.keep=2")
    rng = np.random.default_rng(0)
    for name, (height, width) in (("a.png", (120, 330)), ("b.png", (100, 100))):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(where / name)
    return where


def command(*words):
    return [sys.executable, str(ROOT / "launch" / "generate.py"), *words]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def generate(folder, *words, lines=None, check=True):
    done = subprocess.run(
        command(*words), cwd=folder, env=environment(), input=lines, capture_output=True, text=True, timeout=240
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def spoken(folder):
    """The output of the Python call: streamed pieces, a whole batch, and a second turn after the first."""
    sampling = Sampling(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=5)
    first = Conversation([{"role": "user", "content": QUESTION}], [str(folder / "a.png")])
    pieces: list[tuple[int, str]] = []
    with load(folder / "runs" / "run") as generator:
        (answer,) = generator.generate([first], sampling, lambda *piece: pieces.append(piece))
        marked = {"role": "user", "content": f"<image>\n{QUESTION}"}
        said = [marked, {"role": "assistant", "content": answer}, {"role": "user", "content": MORE}]
        second = Conversation(said, [folder / "a.png", Image.open(folder / "b.png")])
        (next_answer,) = generator.generate([second], sampling)
        text = Conversation([{"role": "user", "content": "Hello"}])
        batch = generator.generate([first, text, second], Sampling(max_new_tokens=24))
        alone = [generator.generate([one], Sampling(max_new_tokens=24))[0] for one in (first, text, second)]
    assert "".join(piece for _, piece in pieces) == answer
    assert batch == alone
    return answer, next_answer


SAMPLED = ("max_new_tokens=24", "temperature=1", "top_p=0.9", "seed=5")


@pytest.mark.parametrize("layout", [(), ("parallel.tensor=2", "parallel.sequence=true")], ids=["one", "tensor 2"])
def test_the_command_says_what_the_call_says(folder, spoken, layout):
    """A prompt, then a turn with another image from standard input."""
    lines = f"/image b.png\n{MORE}\n\n"
    words = ("checkpoint=runs/run", "image=a.png", f"prompt={QUESTION}", "chat=true", *SAMPLED, *layout)
    done = generate(folder, *words, lines=lines)
    assert done.stdout == f"{spoken[0]}\n{spoken[1]}\n"


@pytest.mark.slow
def test_a_step_folder_answers_for_itself(folder, spoken):
    steps = sorted((folder / "runs" / "run" / "checkpoints").glob("step_*"))
    assert [step.name for step in steps] == ["step_00000001", "step_00000002"]
    answers = [
        generate(folder, f"checkpoint={step}", "image=[a.png]", f"prompt={QUESTION}", *SAMPLED).stdout for step in steps
    ]
    assert answers[1] == f"{spoken[0]}\n"
    assert answers[0] != answers[1]


def test_words_come_while_others_are_still_to_be_computed(folder):
    words = ("checkpoint=runs/run", "prompt=Go on", "max_new_tokens=3000", "temperature=3")
    process = subprocess.Popen(
        command(*words), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout.read(1)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_turn_that_cannot_be_read_is_left_out(folder):
    lines = "/image gone.png\nWhat?\n<image>\nHi\n"
    done = generate(folder, "checkpoint=runs/run", "chat=true", "max_new_tokens=4", lines=lines)
    assert done.stderr.count("this turn is skipped") == 2
    assert "gone.png: no such image" in done.stderr
    assert "1 <image> marks, but 0 images" in done.stderr
    assert done.stdout == generate(folder, "checkpoint=runs/run", "prompt=Hi", "max_new_tokens=4").stdout


def test_an_explained_answer_is_the_same_answer(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    words = ["checkpoint=runs/run", "image=a.png", f"prompt={QUESTION}", *SAMPLED]
    assert main(words) == 0
    plain = capfd.readouterr().out
    assert main([*words, f"explain={tmp_path / 'page.html'}"]) == 0
    assert capfd.readouterr().out == plain
    values = json.loads((tmp_path / "page.looks.json").read_text())
    assert values["question"] == QUESTION and values["answer"] == plain.removesuffix("\n")
    assert len(values["tokens"]) == 24 and len(values["tiles"]) == values["grids"][0][0] * values["grids"][0][1] == 3
    assert "row 1" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_cannot_be_explained_is_said_before_anything_is_read(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    asked = ["checkpoint=runs/run", "prompt=Hi", f"explain={tmp_path / 'page.html'}"]
    for words, said in (
        (asked, "a prompt without an image"),
        ([*asked, "image=a.png", "chat=true"], "leave chat=true out"),
        ([*asked[:2], "image=a.png", "explain=gone/page.html"], "a folder that exists"),
        ([*asked[:2], "image=a.png", "explain=a.png"], "explain=out.html"),
        ([*asked, "image=b.png"], "a picture of one tile is not cross-attended"),
    ):
        assert main(words) == 2
        assert said in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_images_are_refused_where_nothing_has_learned_to_read_them(tmp_path, folder, monkeypatch, capfd):
    """A language model alone answers text; its projector is random."""
    monkeypatch.chdir(folder)
    language_model(compose_config(*SMALL)).save_pretrained(tmp_path / "llm")
    small = [word for word in SMALL if not word.startswith("vision.")]
    words = [*small, f"init.llm={tmp_path / 'llm'}", "prompt=Hi", "max_new_tokens=2"]
    assert main(words) == 0
    assert main([*words, "image=a.png"]) == 2
    assert "error: images cannot be used: the weights of projector are random" in capfd.readouterr().err


def test_what_training_kept_or_moved_is_nothing_to_generation(tmp_path, folder):
    shutil.copytree(folder / "runs" / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("offload: false", "offload: true"))
    assert read_run_config(tmp_path / "run" / "checkpoints" / "step_00000002").train.offload
    assert not read_config(tmp_path / "run").train.offload


def test_a_run_with_adapters_beside_new_modules_answers(tmp_path, monkeypatch, capfd):
    words = ("name=run", "arch=xattn", "peft=lora", "train.steps=2", "optim.warmup=1", "train.save_every=2")
    train(tmp_path, *words)
    monkeypatch.chdir(tmp_path)
    assert read_config("runs/run").adapted == ("llm",)
    assert main(["checkpoint=runs/run", "prompt=Hi", "max_new_tokens=2"]) == 0, capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_wait_for_a_person_longer_than_for_each_other(folder):
    """Their groups time out after 4 x 0.1 minutes."""
    words = ("checkpoint=runs/run", "chat=true", "max_new_tokens=4")
    layout = ("parallel.tensor=2", "parallel.timeout_minutes=0.1")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command(*words, *layout), cwd=folder, env=environment(), **pipes)
    time.sleep(75)
    said, told = process.communicate("Hi\n", timeout=120)
    assert process.returncode == 0, told
    assert said == generate(folder, "checkpoint=runs/run", "prompt=Hi", "max_new_tokens=4").stdout


WRONG = {
    ("checkpoint=runs/none", "prompt=Hi"): "checkpoint: got '.*runs/none', expected a run folder with a checkpoint",
    ("checkpoint=runs/run", "prompt=Hi", "image=gone.png"): "image: got 'gone.png' in .*, expected an image file",
    ("checkpoint=runs/run", "prompt=Hi", "image=[a.png,gone.png]"): "image: got 'gone.png' in .*, expected an image",
    ("checkpoint=runs/run", "prompt=Hi", "image=text.png"): "text.png: not an image of a known format",
    ("checkpoint=runs/run", "prompt=<image> <image>", "image=a.png"): "2 <image> marks, but 1 images",
    ("checkpoint=runs/run", "prompt=" + "long " * 2000): "what max_new_tokens=256 leaves of the model's",
    (
        "checkpoint=runs/run",
        "prompt=Hi",
        "max_new_tokens=4096",
    ): "got 4096, expected fewer than the model's 4096 positions",
    ("checkpoint=runs/run", "promt=Hi"): "promt: got a key that does not exist, expected one of prompt",
    ("checkpoint=runs/run", "prompt=Hi", "parallel.tenser=2"): "parallel.tenser: got a key that does not exist",
    ("checkpoint=runs/run", "prompt=Hi", "parallel.tensor=two"): "parallel.tensor: got 'two', expected a whole number",
    ("checkpoint=runs/run", "prompt=Hi", "parallel.tensor=3"): "parallel.tensor: got 3, expected a divisor",
    ("checkpoint=runs/run", "prompt=Hi", "parallel.context=2"): "parallel.context: got 2, expected 1 to generate text",
    ("checkpoint=runs/run", "prompt=Hi", "llm.heads=2"): "llm.heads: got 4, expected 2",
    ("checkpoint=runs/run", "prompt=Hi", "llm.ffn=256"): "llm.ffn: got 384, expected 256",
    ("checkpoint=runs/run", "prompt=Hi", "top_p=0"): "top_p: got 0.0, expected above 0",
    ("checkpoint=runs/run", "prompt=Hi", "top_p=[0.5"): "top_p: got '\\[0.5', expected a number",
    ("checkpoint=runs/run", "prompt=Hi", "seed=1.5"): "seed: got '1.5', expected a whole number",
    ("checkpoint=runs/run", "chat=yes"): "chat: got 'yes', expected true or false",
    ("checkpoint=runs/run",): "prompt: got nothing",
    ("checkpoint=runs/run", "Hi"): "command line: got 'Hi', expected key=value",
    ("prompt=Hi",): "checkpoint: got nothing, expected a run folder, or weights that config.init names",
    ("prompt=Hi", "arch=hybrit"): "arch: got 'hybrit', expected one of decoder, hybrid, xattn",
    ("prompt=Hi", "promt=Hi"): "promt: got a key that does not exist, expected one of prompt",
    ("prompt=Hi", "init.checkpoint=runs/run", "arch=hybrid,decoder"): "2 configurations, expected one",
}


@pytest.mark.parametrize("words", WRONG, ids=[" ".join(words)[:60] for words in WRONG])
def test_wrong_input_gets_one_line(folder, words, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    (folder / "text.png").write_text("not an image")
    assert main(list(words)) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert re.search(WRONG[words], said[0]), said[0]


def test_another_number_of_processes_than_the_layout_has_is_refused(folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"number of processes: got 1, expected 2 \(tensor x pipeline\)"):
        with load(folder / "runs" / "run", "parallel.tensor=2"):
            pass
