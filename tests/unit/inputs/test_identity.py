"""Inputs identified by content: which changes are noticed, which are not, and that large files are only sampled."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nvlm.config.values import Config, ConfigError
from nvlm.data import content
from nvlm.data.blend import build_order
from nvlm.data.order import Order
from nvlm.data.sources.registry import build_records
from nvlm.data.text.tokenizer import load_tokenizer, tokenizer_file
from nvlm.inputs import identity
from nvlm.vision.encoders.internvit.description import TINY
from nvlm.weights.published import read_headers


def tensors(scale: float = 1.0) -> dict[str, np.ndarray]:
    """Tensors of which some are larger than three samples."""
    return {f"layer.{n}.weight": scale * np.arange(n * 2000, dtype=np.float32).reshape(n, 2000) for n in (1, 2, 3)}


def identified(folder: Path, prefix: str = "") -> identity.Identity:
    return identity.of_tensors(str(folder), read_headers(str(folder), "init.vision"), prefix)


def test_tensors_are_the_same_wherever_they_lie_and_however_files_are_cut(tmp_path):
    whole, parted, prefixed = (tmp_path / name for name in ("whole.safetensors", "parted", "prefixed.safetensors"))
    save_file(tensors(), whole)
    parted.mkdir()
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate(tensors())}
    for name, file in weight_map.items():
        save_file({name: tensors()[name]}, parted / file)
    (parted / "model.safetensors.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))
    save_file({f"vision_model.{name}": tensor for name, tensor in tensors().items()}, prefixed)
    first = identified(whole)
    assert first.bytes == 4 * 12000
    assert first.same(identified(parted)) and first.same(identified(prefixed, "vision_model."))


@pytest.mark.parametrize("what", ["first", "middle", "last", "shape", "type", "name"])
def test_other_tensors_are_noticed(tmp_path, what):
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save_file(tensors(), one)
    changed = tensors()
    weight = changed.pop("layer.3.weight")
    if what in ("first", "middle", "last"):
        weight.flat[{"first": 0, "middle": weight.size // 2, "last": -1}[what]] += 1
    weight = {"shape": weight.reshape(2, -1), "type": weight.view(np.int32)}.get(what, weight)
    save_file(changed | {"layer.4.weight" if what == "name" else "layer.3.weight": weight}, other)
    assert not identified(one).same(identified(other))


def test_a_file_is_sampled_in_a_moment_however_large_it_is(tmp_path):
    path = tmp_path / "records.jsonl"
    with open(path, "wb") as file:
        file.truncate(200 << 30)  # sparse
    started = time.monotonic()
    whole = identity.of_file(path)
    assert whole.bytes == 200 << 30 and time.monotonic() - started < 5
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\n")
    assert not identity.of_file(path).same(whole)


def test_of_many_files_little_is_read_of_each(tmp_path, monkeypatch):
    """Ten thousand shards of 60 MB would be 600 GB."""
    path = tmp_path / "shard.tar"
    with open(path, "wb") as file:
        file.truncate(60_000_000)
    read = []
    blocks = content._sampled
    monkeypatch.setattr(content, "_sampled", lambda *arguments: read.append(arguments[2]) or blocks(*arguments))
    whole, few = content.content_digest(path), content.content_digest(path, 10_000)
    assert read == [6] and few != whole and few == content.content_digest(path, 10_000)
    assert content.content_digest(path, 60) == whole  # 60 x 60 MB are within the budget
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert content.content_digest(path, 10_000) != few


def test_a_small_file_is_read_whole(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(bytes(3 << 20))
    before = identity.of_file(path, records=5)
    moved = path.rename(tmp_path / "moved.jsonl")
    assert before.same(identity.of_file(moved, records=5)) and not before.same(identity.of_file(moved, records=6))
    with open(moved, "r+b") as file:
        file.seek(1234567)
        file.write(b"x")
    assert not before.same(identity.of_file(moved, records=5))


def records(config: Config):
    return build_records(config.data, config.seed)


def test_several_files_are_the_same_in_another_folder_and_not_with_another_content(tmp_path):
    found = {}
    for folder, last in (("one", "b"), ("two", "b"), ("three", "c")):
        (tmp_path / folder).mkdir()
        files = [tmp_path / folder / name for name in ("first", "second")]
        for file, text in zip(files, ("a", last), strict=True):
            file.write_text(text)
        found[folder] = identity.of_files(files, 2)
    assert found["one"].same(found["two"]) and not found["one"].same(found["three"])
    assert found["one"].bytes == found["three"].bytes == 2


def order(config: Config) -> Order:
    return build_order(config.data.source, records(config), config.seed, config.train.global_batch)


@pytest.fixture
def begun(tmp_path, configured):
    """A run folder with recorded inputs, and a function that returns a run's configuration with other files."""
    files = {"records.jsonl": '{"messages": []}\n', "tokenizer.json": "{}"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "encoder.safetensors").write_bytes(TINY.read_bytes())

    def config(**paths) -> Config:
        names = dict(data="records.jsonl", tokenizer="tokenizer.json", encoder="encoder.safetensors")
        found = {key: tmp_path / name for key, name in names.items()} | paths
        base = configured("data=jsonl", f"data.path={found['data']}", f"init.vision={found['encoder']}")
        return replace(base, llm=replace(base.llm, tokenizer=str(found["tokenizer"])))

    (tmp_path / "run").mkdir()
    identity.record(config(), tmp_path / "run", records(config()), order(config()))
    return tmp_path / "run", config


def test_what_a_run_began_with_is_recorded(begun):
    run, _ = begun
    found = identity.read(run)
    assert found.keys() == {"records", "order", "encoder", "tokenizer"}  # the first weights are random
    assert found["records"].records == 1 and found["records"].bytes == 17 and found["encoder"].bytes > 900_000
    assert identity.read(run / "elsewhere") == {}


def blend(folder, **weights) -> str:
    """The override for a blend of FILE.jsonl in `folder`, by name."""
    parts = ", ".join(
        f"{name}: {{source: jsonl, path: {folder}/{name}.jsonl, weight: {w}}}" for name, w in weights.items()
    )
    return f"data.sources={{{parts}}}"


def test_the_mix_is_recorded_and_a_source_that_changes_is_named(tmp_path, configured):
    run = tmp_path / "run"
    run.mkdir()
    for name, count in (("a", 3), ("b", 5)):
        (tmp_path / f"{name}.jsonl").write_text('{"messages": []}\n' * count)
    config = configured("data=blend", blend(tmp_path, a=1, b=3))
    identity.record(config, run, records(config), order(config))
    a, b = json.loads((run / "mix.json").read_text())["sources"].values()
    assert (a["records"], a["share"], b["records"], b["share"]) == (3, 0.25, 5, 0.75)
    assert len(b["first"]) == 3 and all(name.startswith("b/b.jsonl:") for name in b["first"])
    identity.check_records(config, run, records(config), order(config))
    other = replace(config, seed=config.seed + 1)
    with pytest.raises(ConfigError, match="drawn in another order.*init.checkpoint="):
        identity.check_records(other, run, records(other), order(other))
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write('{"messages": []}\n')
    with pytest.raises(ConfigError, match=r"data.sources.b.path: got .*b.jsonl .6 records"):
        identity.check_records(config, run, records(config), order(config))


def test_files_that_were_moved_are_taken(begun, tmp_path):
    run, config = begun
    moved = {}
    for key, name in (("data", "records.jsonl"), ("tokenizer", "tokenizer.json"), ("encoder", "encoder.safetensors")):
        moved[key] = (tmp_path / name).rename(tmp_path / f"moved-{name}")
    identity.check_model(config(**moved), run / "checkpoints/step_00000002")
    identity.check_records(config(**moved), run, records(config(**moved)), order(config(**moved)))


def test_files_that_were_replaced_are_refused_by_name(begun, tmp_path):
    run, config = begun
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write('{"messages": []}\n')
    with pytest.raises(ConfigError, match=r"data.path: got .*2 records, 34 bytes.*1 records, 17 bytes.*name=OTHER"):
        identity.check_records(config(), run, records(config()), order(config()))
    identity.check_model(config(), run / "checkpoints/step_00000002")
    (tmp_path / "tokenizer.json").write_text("[]")
    for resumed in (True, False):
        with pytest.raises(ConfigError, match=r"llm.tokenizer: got .*tokenizer.json") as refused:
            identity.check_model(config(), run / "checkpoints/step_00000002", resumed=resumed)
        assert ("name=OTHER" in str(refused.value)) == resumed  # an export has no run to name
    weights = load_file(TINY)
    name = max(weights, key=lambda name: weights[name].size)
    weights[name].flat[-1] += 1
    save_file(weights, tmp_path / "encoder.safetensors")
    with pytest.raises(ConfigError, match=r"init.vision: got .*encoder.safetensors"):
        identity.check_model(config(), run / "checkpoints/step_00000002")


TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def test_another_chat_template_is_noticed(configured, tmp_path):
    """If the run uses it: a resumed run would otherwise learn from other prompts."""
    shutil.copy(tokenizer_file("tiny"), tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE + PROMPT)
    config = configured("arch=decoder", f"llm.tokenizer={tmp_path}", "llm.chat=template")
    before = identity.of_template(config)
    load_tokenizer.cache_clear()
    assert identity.of_template(config).same(before)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("<|im_end|>", "<|im_end|>\n") + PROMPT)
    load_tokenizer.cache_clear()
    assert not identity.of_template(config).same(before)
    assert identity.of_template(configured("arch=decoder")) is None
