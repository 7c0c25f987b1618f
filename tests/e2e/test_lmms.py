"""lmms-eval on a checkpoint and on its export, by its own evaluator, with tasks in a folder and no network.

Skipped where lmms-eval is not installed: it needs an environment of its own (docs/evaluation.md).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed: pip install -e '.[lmms]'")

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager

from nvlm.config.values import ConfigError
from nvlm.data.sources.pages import build_pages
from nvlm.lmms.manifest import manifest
from nvlm.lmms.model import NVLM, sampling_of, until
from tests.e2e.runs import train

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("decoder", "xattn", "hybrid")
HELPERS = """
def show(doc):
    return [image.convert("RGB") for image in doc["images"]]

def ask(doc, **_):
    return doc["messages"][0]["content"].replace("<image>\\n", "")

def expect(doc):
    return doc["messages"][1]["content"]
"""
COMMON = """
dataset_path: {folder}/pages
dataset_kwargs: {{load_from_disk: true}}
test_split: test
doc_to_visual: !function helpers.show
doc_to_text: !function helpers.ask
doc_to_target: !function helpers.expect
"""
GENERATED = """
task: pages_generated
output_type: generate_until
generation_kwargs: {max_new_tokens: 12, until: ["\\n\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
task: pages_chosen
output_type: multiple_choice
doc_to_choice: ["0", "1", "2", "34"]
doc_to_target: 1
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of two steps, an export, and two tasks with six questions."""
    from datasets import DatasetDict

    where = tmp_path_factory.mktemp("lmms")
    for arch in ARCHITECTURES:
        train(where, f"name={arch}", f"arch={arch}", "train.steps=2", "optim.warmup=1", "train.save_every=2")
    words = [f"checkpoint={where}/runs/xattn", f"out={where}/export"]
    subprocess.run([sys.executable, str(ROOT / "launch" / "export_hf.py"), *words], check=True, capture_output=True)
    tasks = where / "tasks"
    tasks.mkdir()
    DatasetDict(test=build_pages("heldout", 6, 0, 1)).save_to_disk(tasks / "pages")
    (tasks / "helpers.py").write_text(HELPERS)
    for name, text in (("generated", GENERATED), ("chosen", CHOSEN)):
        # What the task says comes last: a key that is there twice has its last value.
        (tasks / f"{name}.yaml").write_text(COMMON.format(folder=tasks) + text)
    return where


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)


def evaluated(folder: Path, checkpoint: Path, batch: int) -> tuple[list, list]:
    """Raw answers and log-probabilities, as lmms-eval logged them."""
    done = simple_evaluate(
        model="nvlm",
        model_args=f"checkpoint={checkpoint}",
        tasks=["pages_generated", "pages_chosen"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        batch_size=batch,
        bootstrap_iters=0,
    )
    assert "exact_match,none" in done["results"]["pages_generated"] and "acc,none" in done["results"]["pages_chosen"]
    samples = done["samples"]
    by_id = [sorted(samples[name], key=lambda one: one["doc_id"]) for name in ("pages_generated", "pages_chosen")]
    return [one["resps"] for one in by_id[0]], [one["filtered_resps"] for one in by_id[1]]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lmms_eval_runs_on_a_checkpoint(folder, arch):
    answers, scores = evaluated(folder, folder / "runs" / arch, batch=4)
    alone = evaluated(folder, folder / "runs" / arch, batch=1)
    assert len(answers) == len(scores) == 6 and answers == alone[0]
    assert all(len(one) == 4 and all(loss > 0 for loss, _ in one) for one in scores)
    if arch == "xattn":
        exported = evaluated(folder, folder / "export", batch=1)
        assert exported[0] == answers
        for one, other in zip(scores, exported[1]):
            assert [loss for loss, _ in one] == pytest.approx([loss for loss, _ in other], rel=0.02)


@pytest.fixture(scope="module")
def model(folder):
    from datasets import load_from_disk

    found = NVLM(checkpoint=str(folder / "runs" / "hybrid"), batch_size=3)
    found.task_dict["pages"] = load_from_disk(folder / "tasks" / "pages")
    yield found
    found.clean()


def request(kind: str, *arguments) -> Instance:
    return Instance(kind, arguments, 0, {"task": "pages", "doc_id": 0, "repeats": 1})


def show(doc) -> list:
    return [image.convert("RGB") for image in doc["images"]]


class Echo:
    """Answers with the question."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def answers(self, prompts, sampling) -> list[str]:
        self.batches.append([len(prompt.text) for prompt in prompts])
        return [f"{prompt.text}; {sampling.max_new_tokens}" for prompt in prompts]


def test_answers_come_in_the_order_of_the_requests(model, monkeypatch):
    monkeypatch.setattr(model, "backend", Echo())
    several = [
        request("generate_until", "x" * (7 * n % 10), {"max_new_tokens": 1 + n % 2}, show, 0, "pages", "test")
        for n in range(10)
    ]
    assert model.generate_until(several) == [f"{'x' * (7 * n % 10)}; {1 + n % 2}" for n in range(10)]
    assert model.backend.batches == [[0, 2, 4], [6, 8], [1, 3, 5], [7, 9]]  # alike, sorted, at most three


def test_a_prompt_that_is_too_long_gets_an_empty_answer(model):
    options = {"max_new_tokens": 8}
    prompts = ["What?", "Too long " * 5000, "And?"]
    answers = model.generate_until([request("generate_until", p, options, show, 0, "pages", "test") for p in prompts])
    assert answers[1] == "" and answers[0] and answers[2]


def test_a_continuation_that_the_model_would_say_is_greedy(model):
    asked = ("What is it?", {"max_new_tokens": 1}, show, 0, "pages", "test")
    (said,) = model.generate_until([request("generate_until", *asked)])
    where = (show, 0, "pages", "test")
    chosen = [request("loglikelihood", asked[0], text, *where) for text in (f" {said}", "?!?!", lambda doc: said)]
    (own, greedy), (other, never), (again, _) = (one.text for one in model.loglikelihood(chosen))
    assert greedy and not never and 0 < own < other and again == own


def test_rounds_go_on_until_the_task_ends_them(model):
    asked = []

    def ask(doc, previous_output, round_idx, previous_round_info):
        asked.append((list(previous_output), round_idx, previous_round_info))
        return show(doc), f"And {round_idx}?", round_idx == 3, previous_output, round_idx

    start = request("generate_until_multi_round", "First?", {"max_new_tokens": 4}, show, ask, 0, "pages", "test")
    (answers,) = model.generate_until_multi_round([start])
    assert [(len(outputs), number, told) for outputs, number, told in asked] == [(1, 1, None), (2, 2, 1), (3, 3, 2)]
    assert answers == asked[-1][0] and len(answers) == 3


def test_options_of_a_task():
    assert sampling_of({"temperature": 0.7, "top_p": 0.5}).temperature == 0  # lmms-eval's tasks give do_sample, too
    sampled = sampling_of({"do_sample": True, "temperature": 0.7, "top_p": 0.5, "max_new_tokens": 3})
    assert (sampled.temperature, sampled.top_p, sampled.max_new_tokens) == (0.7, 0.5, 3)
    assert until("one\n\ntwo; three", (";", "\n\n")) == "one" and until("one", ()) == "one"


def test_the_entry_point_is_the_manifest():
    assert f'"nvlm = {manifest.__module__}:manifest"' in (ROOT / "setup.py").read_text()
    assert MODEL_REGISTRY_V2.get_model_class("nvlm") is NVLM


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "--model_args checkpoint=runs/NAME"),
        ({"checkpoint": "runs/hybrid", "parallel.tensor": 2}, "leave parallel.* out"),
        ({"checkpoint": "export", "precision": "fp32"}, "leave them out"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(folder, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=re.escape(said)):
        NVLM(**arguments)


def test_videos_are_refused(model):
    video = request("generate_until", "?", {}, lambda doc: ["film.mp4"], 0, "pages", "test")
    with pytest.raises(ConfigError, match="NVLM reads no video or sound"):
        model.generate_until([video])
