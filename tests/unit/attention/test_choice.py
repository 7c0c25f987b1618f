"""The choice of kernels as one table, and models built accordingly."""

from __future__ import annotations

import pytest
import torch

from nvlm.arch.pipeline import build_parts
from nvlm.attention.choice import BEFORE_HOPPER, CPU, GPU, GPU_WITH_TE, Kernels, Mode, Rows, choose, kernels_of
from nvlm.attention.kernel import CoreAttention
from nvlm.attention.kernels import build
from nvlm.attention.kernels.context import Context, ContextAttention
from nvlm.attention.kernels.dense import DENSE, Dense
from nvlm.attention.kernels.flex import Flex
from nvlm.attention.kernels.per_sample import PerSample
from nvlm.attention.model import build_attention
from nvlm.data.pack import collate
from tests.dist.ranks import as_rank
from tests.models import TILE, sample_of, small_config
from tests.stories import ONE, TEXT

D, X, H = ("arch=decoder",), ("arch=xattn",), ("arch=hybrid",)
BF16, LORA, CONTEXT = ("precision=bf16",), ("peft=lora",), ("parallel.context=2", "parallel.context_heads=1")
TRAINING, EVALUATION, CACHED = Mode.TRAINING, Mode.EVALUATION, Mode.CACHED
KEPT, LINE, TOKENS = Rows.KEPT, Rows.LINE, Rows.TOKENS

TABLE = [
    # On CPU samples are computed one by one; padding is left out where no mask of keys needs rows.
    (D, CPU, TRAINING, "per_sample", None, TOKENS),
    (X, CPU, TRAINING, "per_sample", "dense", KEPT),
    (H + BF16, CPU, TRAINING, "per_sample", "dense", KEPT),
    (H + LORA, CPU, TRAINING, "per_sample", "dense", KEPT),
    (D, CPU, EVALUATION, "dense", None, KEPT),
    (H, CPU, EVALUATION, "dense", "dense", KEPT),
    (X, CPU, CACHED, "dense", "dense", KEPT),
    # On a GPU Transformer Engine gets one line, in evaluation too.
    (D + BF16, GPU_WITH_TE, TRAINING, "te", None, LINE),
    (X + BF16, GPU_WITH_TE, TRAINING, "te", "flex", LINE),
    (H + BF16, GPU_WITH_TE, EVALUATION, "dense", "dense", LINE),
    (H + BF16, GPU_WITH_TE, CACHED, "dense", "dense", LINE),
    (H + BF16 + LORA, GPU_WITH_TE, TRAINING, "te", "flex", LINE),
    # fp32 does not use it, nor a machine where it does not load.
    (D, GPU_WITH_TE, TRAINING, "flex", None, KEPT),
    (H, GPU_WITH_TE, TRAINING, "flex", "flex", KEPT),
    (H + BF16, BEFORE_HOPPER, TRAINING, "flex", "flex", KEPT),  # its attention does not take packed rows
    (H + BF16, GPU, TRAINING, "flex", "flex", KEPT),
    (H + BF16, GPU, EVALUATION, "dense", "dense", KEPT),
    (D + BF16, GPU, CACHED, "dense", None, KEPT),
    # Context parallelism moves keys or heads around the kernel that each rank computes with.
    (D + CONTEXT, CPU, TRAINING, "context dense", None, KEPT),
    (H + CONTEXT, CPU, TRAINING, "context dense", "dense", KEPT),
    (D + BF16 + CONTEXT, GPU_WITH_TE, TRAINING, "context flex", None, KEPT),
    (H + BF16 + CONTEXT, GPU_WITH_TE, TRAINING, "context flex", "flex", KEPT),
    (X + CONTEXT, GPU, TRAINING, "context flex", "flex", KEPT),
    (H + BF16 + CONTEXT, GPU_WITH_TE, EVALUATION, "context dense", "dense", KEPT),
]


def named(kernel) -> str | None:
    if kernel is None:
        return None
    return kernel.name if kernel.inner is None else f"{kernel.name} {kernel.inner.name}"


@pytest.mark.parametrize(("options", "machine", "mode", "columns", "keys", "rows"), TABLE)
def test_the_table_of_kernels(options, machine, mode, columns, keys, rows):
    chosen = choose(small_config(*options), machine, mode)
    assert (named(chosen.columns), named(chosen.keys), chosen.rows) == (columns, keys, rows)


@pytest.mark.parametrize(
    ("options", "machine", "columns", "keys", "core"),
    [
        (D, CPU, PerSample, None, CoreAttention),
        (H, CPU, PerSample, Dense, CoreAttention),
        (H, GPU, Flex, Flex, CoreAttention),
        (H + CONTEXT, CPU, Context, Dense, ContextAttention),
        (D + CONTEXT, GPU, Context, None, ContextAttention),
    ],
)
def test_a_model_is_built_of_the_kernels_that_are_chosen(options, machine, columns, keys, core, monkeypatch):
    """`tests/engine` tests those of Transformer Engine."""
    config = small_config(*options)
    monkeypatch.setattr("nvlm.llm.backend.this_machine", lambda: machine)
    with as_rank(config, 0), torch.device("meta"):
        (model,) = build_parts(config)
    kernels = model.train().attends()
    assert type(kernels.columns) is columns and (kernels.keys is None if keys is None else type(kernels.keys) is keys)
    assert {type(layer.self_attention.core_attention) for layer in model.decoder.layers} == {core} == {kernels.core}
    if core is ContextAttention:
        assert type(kernels.columns.kernel) is type(build(choose(config, machine, TRAINING).columns.inner, config))
    with torch.no_grad():
        evaluated = model.eval().attends().columns
    assert type(evaluated.kernel if core is ContextAttention else evaluated) is Dense


@pytest.mark.parametrize("worth", [0, 2**30])
def test_samples_that_are_not_worth_a_call_share_a_mask(worth, monkeypatch):
    monkeypatch.setattr("nvlm.attention.kernels.per_sample.WORTH_A_CALL", worth)
    config = small_config(*D)
    kernels = build_attention(config, CPU, TRAINING)
    batch = kernels.arranged(collate([[sample_of(story, config) for story in (ONE, TEXT)]], TILE)).batch
    view = kernels.masks(batch, torch.arange(batch.tokens.shape[1]), keys=False).columns
    assert (view.kernel is DENSE) == (worth > 0)


def test_what_kernels_keep_is_the_choice_s():
    engine, torch_s = (
        Kernels(joint=False, rotary=False, copied=True, fused_norm=True),
        Kernels(joint=True, rotary=True, fused_norm=False),
    )
    for options in (D, X, H):
        for other in (BF16, BF16 + LORA):
            assert kernels_of(small_config(*options, *other)) == engine
        assert kernels_of(small_config(*options)) == torch_s  # fp32
        assert kernels_of(small_config(*options, *BF16), GPU) == torch_s
    spread = kernels_of(small_config(*D, *CONTEXT))
    assert spread.apart and not spread.joint and not spread.dense
    on_cpu = kernels_of(small_config(*X, *CONTEXT), CPU)
    assert on_cpu.dense and on_cpu.dense_keys
