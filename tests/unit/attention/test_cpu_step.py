"""CPU-specific computation compared with the plain one: attention by sample, no padding, SwiGLU in few passes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nvlm.attention.kernel import View
from nvlm.attention.kernels import per_sample
from nvlm.attention.kernels.dense import DENSE
from nvlm.attention.kernels.per_sample import PerSample, lengths_apart
from nvlm.attention.visibility import causal_mask
from nvlm.data.batch import IGNORE, IMAGE, PAD, without_padding
from nvlm.data.pack import collate
from nvlm.llm.swiglu import SwiGLU
from tests.models import TILE, Story, sample_of, small_config

SAMPLES = torch.tensor([[0, 0, 0, 1, 1, PAD, PAD, PAD], [0, 1, 1, 1, 1, 1, 1, 2], [0] * 8, [PAD] * 8])
ONE = Story("one", (("user", "<image>"), ("assistant", "yes")), ((1, 1),))
TWO = Story("two", (("user", "<image> then <image>"), ("assistant", "no, no")), ((2, 1), (1, 1)))
WORDS = Story("words", (("user", "a"), ("assistant", "b")))


@pytest.fixture
def always_apart(monkeypatch):
    monkeypatch.setattr(per_sample, "WORTH_A_CALL", 0)


def test_short_samples_stay_behind_a_mask():
    pairs = torch.arange(2).repeat_interleave(64)[None]  # 2 x 64 x 64 pairs are hidden, which a second call spares
    assert lengths_apart(pairs) == (64, 64)
    assert lengths_apart(pairs[:, 1:]) is None
    assert lengths_apart(pairs[:, :64].expand(3, -1)) == (64, 64, 64)  # one call for all rows, and no mask


@pytest.mark.usefixtures("always_apart")
def test_runs_are_samples_row_by_row():
    assert lengths_apart(SAMPLES) == (3, 5, 1, 6, 1, 8, 8)  # a row's padding counts with the sample before it
    assert lengths_apart(torch.tensor([[0, 0], [0, 0]])) == (2, 2)  # the same number in the next row is another sample


@pytest.mark.usefixtures("always_apart")
@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES[2:], SAMPLES[:1]], ids=["rows", "one a row", "one row"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_samples_apart_attend_as_under_the_mask(groups, samples):
    generator = torch.Generator().manual_seed(0)
    rows = len(samples)
    shapes = ((8, rows, 4, 6), (8, rows, groups, 6), (8, rows, groups, 6))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    columns, real = torch.arange(8), (samples != PAD).t()[..., None]
    weights = torch.randn(8, rows, 24, generator=generator, dtype=torch.float64) * real
    found = []
    views = View(DENSE, causal_mask(samples, columns, columns)), View(PerSample(), lengths_apart(samples))
    for view in views:
        out = view.attend(*inputs)
        found.append((out * real, *torch.autograd.grad((out * weights).sum(), inputs)))
    for plain, ours in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)  # the kernel works in fp32
    assert found[0][1].abs().max() > 0.1


def batch(*rows):
    config = small_config("arch=decoder")
    return collate([[sample_of(story, config) for story in row] for row in rows], TILE)


@pytest.mark.parametrize("multiple", [1, 8, 24])
def test_a_line_holds_each_real_token_once(multiple):
    rows = batch([TWO, WORDS], [ONE], [WORDS])
    line, columns = without_padding(rows, multiple)
    real = rows.sample != PAD
    assert line.tokens.shape[0] == 1 and line.tokens.shape[1] % multiple == 0
    assert line.tokens.shape[1] - int(real.sum()) < multiple
    assert line.num_tokens == rows.num_tokens and line.num_trained == rows.num_trained
    for name in ("tokens", "labels", "positions", "image", "tile"):
        assert torch.equal(getattr(line, name)[0], getattr(rows, name).flatten()[columns]), name
    first = int(real.sum())
    assert torch.equal(columns[:first], real.flatten().nonzero()[:, 0])  # in their order: features follow placeholders
    assert not real.flatten()[columns[first:]].any() and len(set(columns.tolist())) == len(columns)
    assert [len(names) for names in line.ids] == [4]
    assert line.sample[0, :first].unique().tolist() == [0, 1, 2, 3]
    assert int((line.tokens == IMAGE).sum()) == int((rows.tokens == IMAGE).sum()) > 0


def test_nothing_is_a_line_of_padding():
    line, columns = without_padding(batch(), 8)
    assert line.tokens.shape == (1, 8) and bool((line.sample == PAD).all()) and bool((line.labels == IGNORE).all())
    assert columns.tolist() == list(range(8))


@pytest.mark.parametrize("shape", [(5, 3, 12), (1, 2), (0, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_autograd_s_to_the_last_bit(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn((*shape[:-1], shape[-1] // 2), generator=generator).to(dtype)
    gate, up = inputs.chunk(2, dim=-1)
    plain = F.silu(gate) * up
    ours = SwiGLU(None)(inputs)
    assert torch.equal(ours, plain)
    (expected,) = torch.autograd.grad(plain, inputs, gradient)
    (got,) = torch.autograd.grad(ours, inputs, gradient)
    assert torch.equal(got, expected)
