"""Packed rows as on a GPU, computed on CPU: block masks and concatenated samples give the same as dense masks.

FlexAttention has no backward on CPU, so its gradients are not compared here (benchmarks/gpu.py does that).
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from nvlm.attention.choice import GPU, Mode
from nvlm.attention.kernel import View
from nvlm.attention.kernels import flex
from nvlm.attention.kernels.dense import DENSE
from nvlm.attention.kernels.flex import Flex
from nvlm.attention.model import build_attention
from nvlm.attention.rows import samples_in_line
from nvlm.data.batch import PAD, Batch, in_line
from nvlm.data.pack import collate
from tests.models import TILE, Twins, build_twins, sample_of, small_config
from tests.stories import ONE, ONE_TILE, TEXT, TWO

ROWS = [[TWO, TEXT], [ONE], [ONE_TILE, ONE, TEXT]]  # of different lengths, so that there is padding
ARCHITECTURES = ("decoder", "xattn", "hybrid")


@pytest.fixture(scope="module")
def twins(megatron):
    return {arch: build_twins(small_config(f"arch={arch}", "tiling.tag=1d")) for arch in ARCHITECTURES}


def batch_for(twins: Twins) -> Batch:
    rows = [[sample_of(story, twins.config) for story in row] for row in ROWS]
    return twins.vision.encode(collate(rows, TILE))


def views(batch: Batch, kind: str) -> list[View]:
    """The dense and the block mask for one kind of attention."""
    if kind == "self":
        return [kernel.columns(batch) for kernel in (DENSE, Flex())]
    columns = torch.arange(batch.tokens.shape[1])
    return [kernel.keys(batch, columns) for kernel in (DENSE, Flex())]


@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize("arch", ["xattn", "hybrid"])
def test_block_masks_are_the_dense_ones(arch, kind, twins):
    dense, blocks = (view.mask for view in views(batch_for(twins[arch]), kind))
    rows, _, queries, keys = dense.shape
    assert torch.equal(create_mask(blocks.mask_mod, rows, None, queries, keys, device="cpu"), ~dense)
    # The blocks that are not empty are the ones with something in them.
    block = blocks.BLOCK_SIZE[0]
    padded = torch.nn.functional.pad(~dense, (0, -keys % block, 0, -queries % block))
    some = padded.unflatten(3, (-1, block)).unflatten(2, (-1, block)).any(-1).any(3)
    assert torch.equal(blocks.to_dense().bool(), some)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attention_through_blocks_is_the_dense_one(kind, twins):
    torch.manual_seed(0)
    dense, blocks = views(batch_for(twins["xattn"]), kind)
    rows, _, queries, keys = dense.mask.shape
    q, k, v = torch.randn(queries, rows, 4, 8), torch.randn(keys, rows, 2, 8), torch.randn(keys, rows, 2, 8)
    got, expected = blocks.attend(q, k, v), dense.attend(q, k, v)
    assert (got - expected).abs().max() < 2e-6
    blind = dense.mask.all(-1)[:, 0].t()
    assert blind.any() and not got[blind].any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_in_a_line_lose_and_learn_the_same(arch, twins):
    model, batch = twins[arch].model, batch_for(twins[arch])
    gradients = []
    for some in (batch, in_line(batch)):
        model.zero_grad()
        loss = model(some)
        loss.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert loss.shape == some.labels.shape
    plain, line = gradients
    assert torch.allclose(model(batch).flatten(), model(in_line(batch)).flatten(), atol=1e-5)
    assert plain.keys() == line.keys()
    for name, gradient in plain.items():
        assert (line[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_of_a_given_length_lose_the_same(arch, twins):
    rows = [[sample_of(story, twins[arch].config) for story in row] for row in ROWS]
    tight, wide = (twins[arch].vision.encode(collate(rows, TILE, length=length)) for length in (None, 1024))
    length = tight.tokens.shape[1]
    assert wide.tokens.shape == (len(ROWS), 1024) and length < 1000
    assert wide.cross_tokens.shape == tight.cross_tokens.shape
    losses = twins[arch].model(wide)
    assert torch.allclose(losses[:, :length], twins[arch].model(tight), atol=1e-5) and not losses[:, length:].any()
    with pytest.raises(AssertionError, match="expected at most 8"):
        collate(rows, TILE, length=8)


@pytest.mark.parametrize("lined", [False, True], ids=["rows", "a line"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_whole_model_with_block_masks(arch, lined, twins, monkeypatch):
    """Masks reach every layer outside the arguments that Megatron keeps for recomputation."""
    model, batch = twins[arch].model, batch_for(twins[arch])
    if lined:
        batch = in_line(batch)
    expected = model(batch)
    monkeypatch.setitem(model.attention, Mode.TRAINING, build_attention(twins[arch].config, GPU, Mode.TRAINING))
    seen, attend = [], flex.attend_blocks
    monkeypatch.setattr(flex, "attend_blocks", lambda *arguments: seen.append(0) or attend(*arguments))
    model.requires_grad_(False)
    try:
        got = model(batch)
    finally:
        model.requires_grad_(True)
    layers = len(model.decoder.layers)
    crossing = sum(hasattr(layer.cross_attention, "gate") for layer in model.decoder.layers)
    assert len(seen) == layers + crossing
    assert torch.allclose(got, expected, atol=1e-5)


def test_where_the_samples_of_a_line_begin():
    line = torch.tensor([0, 0, 0, PAD, PAD, 1, 1, PAD, PAD, PAD, PAD, PAD, PAD, PAD, PAD, 2])
    ends = samples_in_line(line, 5, line.device).cu_seqlens_q.tolist()
    assert ends == [0, 3, 5, 7, 10, 15, 16]  # padding is cut so that none is longer than five
    assert samples_in_line(torch.tensor([0, 0, 0, 0, 0, 0]), 5, torch.device("cpu")).cu_seqlens_q.tolist() == [0, 6]
