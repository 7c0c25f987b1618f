"""Models whose weights the plain reference has, too, each built once for a module (fixture `twins`)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from tests.models import (
    TILE,
    Story,
    Twins,
    batch_of,
    build_twins,
    loss_and_gradients,
    reference_sample,
    small_config,
)
from tests.near import assert_gradients_near, assert_near

K = (TILE // 2 // 2) ** 2  # tokens of a tile: patches of 2 px, then 2 x 2 of them
TAGS = ("none", "1d", "2d_grid", "2d_bbox")
ARCHITECTURES = ("decoder", "xattn", "hybrid")

MODELS = {
    "decoder": ("arch=decoder",),
    "xattn": ("arch=xattn",),
    "hybrid": ("arch=hybrid",),
    "hybrid-unbound": ("arch=hybrid", "arch.bind_tags=none"),
}
VARIANTS = {
    "decoder-llama": ("arch=decoder", "llm.qkv_bias=false"),
    "xattn-llama": ("arch=xattn", "llm.qkv_bias=false"),
    "hybrid-llama": ("arch=hybrid", "llm.qkv_bias=false"),
    "decoder-qwen3": ("arch=decoder", "llm.qkv_bias=false", "llm.qk_norm=true", "llm.rope_interpolation=3"),
    "hybrid-qwen3": ("arch=hybrid", "llm.qkv_bias=false", "llm.qk_norm=true", "llm.kv_heads=4"),
    "decoder-tied": ("arch=decoder", "llm.tied=true"),
    "hybrid-tied": ("arch=hybrid", "llm.tied=true"),
    "xattn-every-layer": ("arch=xattn", "arch.cross_every=1"),
    "hybrid-last-layer": ("arch=hybrid", "arch.cross_every=5"),
    "decoder-one-group": ("arch=decoder", "llm.kv_heads=1"),
    "hybrid-mean-tags": ("arch=hybrid", "arch.bind_tags=mean"),
    "xattn-latest": ("arch=xattn", "arch.sees=latest"),
    "hybrid-latest": ("arch=hybrid", "arch.sees=latest"),
    "xattn-ungrouped": ("arch=xattn", "llm.kv_heads=4"),
}


@cache
def twins_of(*overrides: str) -> Twins:
    return build_twins(small_config(*overrides))


def twins_with(overrides: tuple[str, ...], tag: str = "1d") -> Twins:
    """Tags change the records, not the model: one model serves all tags."""
    return replace(twins_of(*overrides), config=small_config(*overrides, f"tiling.tag={tag}"))


@cache
def reference_result(overrides: tuple[str, ...], tag: str, story: Story) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [S] of one story alone and the gradients of its sum, zero where nothing was reached."""
    twins = twins_with(overrides, tag)
    twins.reference.zero_grad(set_to_none=True)
    loss_S = twins.reference(reference_sample(story, twins.config))
    loss_S.sum().backward()
    learning = {name: p for name, p in twins.reference.named_parameters() if p.requires_grad}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learning.items()}
    return loss_S.detach(), gradients


def assert_equals_reference(overrides: tuple[str, ...], tag: str, rows: list[list[Story]]) -> None:
    twins = twins_with(overrides, tag)
    loss_BS, gradients = loss_and_gradients(twins, batch_of(rows, twins))
    total: dict[str, Tensor] = {}
    for row, loss_S in zip(rows, loss_BS):
        at = 0
        for story in row:
            expected, parts = reference_result(overrides, tag, story)
            assert expected.abs().max() > 1  # or the comparison would mean little
            assert_near(loss_S[at : at + len(expected)], expected, story.name)
            at += len(expected)
            total = {name: total.get(name, 0) + part for name, part in parts.items()}
        assert loss_S[at:].abs().sum() == 0  # padding
    assert_gradients_near(gradients, total)
