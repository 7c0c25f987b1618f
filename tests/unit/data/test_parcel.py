"""How a step travels from a loader worker: what is copied, what is shared, what is page-locked."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm.arch import registry
from nvlm.commands.compose import compose_config
from nvlm.data.amounts import Work
from nvlm.data.loader import Failed, StepData
from nvlm.data.outline import build_processor
from nvlm.data.pack import collate
from nvlm.data.parcel import close
from nvlm.data.record import Record
from nvlm.data.samples import encode


@pytest.fixture(scope="module")
def step():
    processor = build_processor(compose_config("arch=hybrid"), registry.placement_rule("hybrid"))
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    samples = [encode(Record(str(n), talk, [Image.new("RGB", (300, 100), (n, n, n))]), processor) for n in range(2)]
    batches = tuple(collate([[sample]], processor.tile_size) for sample in samples)
    return StepData(batches, 2, (("x", "bad"),), Work(), 1, (Failed(0, "0", "broken"),))


def tensors(batch):
    return {f.name: getattr(batch, f.name) for f in fields(batch) if torch.is_tensor(getattr(batch, f.name))}


def test_a_parcel_shares_pixels_alone_and_opens_to_the_same_step(step):
    parcel = close(step)
    assert all(tensors(batch).keys() == {"pixels"} for batch in parcel.closed.micro_batches)
    assert any(isinstance(getattr(parcel.closed.micro_batches[0], f), np.ndarray) for f in ("tokens", "holder"))
    opened = parcel.opened()
    assert (opened.records, opened.skipped, opened.failed) == (step.records, step.skipped, step.failed)
    for one, other in zip(opened.micro_batches, step.micro_batches, strict=True):
        assert one.ids == other.ids and tensors(one).keys() == tensors(other).keys()
        assert all(torch.equal(value, tensors(other)[name]) for name, value in tensors(one).items())


def test_what_moves_to_the_gpu_is_page_locked(step, monkeypatch):
    """A stand-in for page-locking, which needs a GPU."""
    locked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: locked.append(tensor.clone()) or locked[-1])
    (first, _) = close(step).pin_memory().opened().micro_batches
    names = {name for name, value in tensors(first).items() if any(value is other for other in locked)}
    moved = {name for name, value in tensors(step.micro_batches[0].to(torch.device("meta"))).items() if value.is_meta}
    assert names == moved and {"tokens", "pixels", "cross_tokens"} <= names
    assert "stream_rows" not in names
