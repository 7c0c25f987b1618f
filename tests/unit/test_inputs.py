"""Inputs by their content: what is noticed, what is not, and that only samples of large files are read."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nvlm import inputs
from nvlm.config import ConfigError
from nvlm.weights.published import read_headers


def tensors(scale: float = 1.0) -> dict[str, np.ndarray]:
    """Some larger than three samples of them."""
    return {f"layer.{n}.weight": scale * np.arange(n * 2000, dtype=np.float32).reshape(n, 2000) for n in (1, 2, 3)}


def identity(folder: Path, prefix: str = "") -> inputs.Identity:
    return inputs.of_tensors(str(folder), read_headers(str(folder), "init.vision"), prefix)


def test_tensors_are_the_same_wherever_they_lie_and_however_files_are_cut(tmp_path):
    whole, parted, prefixed = (tmp_path / name for name in ("whole.safetensors", "parted", "prefixed.safetensors"))
    save_file(tensors(), whole)
    parted.mkdir()
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate(tensors())}
    for name, file in weight_map.items():
        save_file({name: tensors()[name]}, parted / file)
    (parted / "model.safetensors.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))
    save_file({f"vision_model.{name}": tensor for name, tensor in tensors().items()}, prefixed)
    first = identity(whole)
    assert first.bytes == 4 * 12000
    assert first.same(identity(parted)) and first.same(identity(prefixed, "vision_model."))


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
    assert not identity(one).same(identity(other))


def test_a_file_is_sampled_in_a_moment_however_large_it_is(tmp_path):
    path = tmp_path / "records.jsonl"
    with open(path, "wb") as file:
        file.truncate(200 << 30)  # sparse
    started = time.monotonic()
    whole = inputs.of_file(path)
    assert whole.bytes == 200 << 30 and time.monotonic() - started < 5
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\n")
    assert not inputs.of_file(path).same(whole)


def test_a_small_file_is_read_whole(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(bytes(3 << 20))
    before = inputs.of_file(path, records=5)
    moved = path.rename(tmp_path / "moved.jsonl")
    assert before.same(inputs.of_file(moved, records=5)) and not before.same(inputs.of_file(moved, records=6))
    with open(moved, "r+b") as file:
        file.seek(1234567)
        file.write(b"x")
    assert not before.same(inputs.of_file(moved, records=5))


def test_what_was_recorded_is_compared_by_name(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("{}\n")
    first = inputs.of_file(path, records=1)
    inputs.write(tmp_path, {"data": first, "weights": None})
    assert inputs.read(tmp_path) == {"data": first}
    inputs.compare(tmp_path, {"data": first}, {"data": "data.path"})
    path.write_text("{}\n{}\n")
    with pytest.raises(ConfigError, match=r"data.path: got .*2 records, 6 bytes.*1 records, 3 bytes.*name=OTHER"):
        inputs.compare(tmp_path, {"data": inputs.of_file(path, records=2)}, {"data": "data.path"})
    assert inputs.read(tmp_path / "elsewhere") == {}
