"""Two-dimensional context parallelism: self-attention over a mesh equals attention in one process."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from nvlm.attention.context import all_columns, own_columns, zigzag
from nvlm.attention.kernels.context import Context, ContextAttention
from nvlm.attention.kernels.dense import DENSE
from nvlm.attention.visibility import causal_mask
from nvlm.config.rules import validate
from nvlm.config.values import ConfigError
from nvlm.processes.groups import distributed
from tests.dist.run import joined, run_distributed
from tests.models import small_config

ROWS, LENGTH, HEADS, GROUPS, WIDTH = 2, 48, 8, 4, 6
MESHES = {2: [(1, 2), (2, 1)], 4: [(2, 2), (4, 1), (1, 4)]}  # (heads traded, keys gathered) by processes
SAMPLES = torch.tensor([[0] * 20 + [1] * 28, [0] * 9 + [1] * 30 + [-1] * 9])


def inputs() -> tuple[torch.Tensor, ...]:
    """Query, key, value [L, B, heads, D] and the output's gradient [L, B, N * D], fp64, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(LENGTH, ROWS, n, WIDTH) for n in (HEADS, GROUPS, GROUPS)] + [(LENGTH, ROWS, HEADS * WIDTH)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def whole(perturb: bool = False) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value in one process. Attention computes in fp32 on the CPU."""
    query, key, value, upstream = inputs()
    if perturb:
        value[0] += 1
    leaves = [x.requires_grad_() for x in (query, key, value)]
    columns = torch.arange(LENGTH)
    out = DENSE.attend(*leaves, causal_mask(SAMPLES, columns, columns))
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def config_of(inner: int, outer: int, sizes: list[int] | None) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        context_parallel_size=inner * outer,
        cp_comm_type="a2a+p2p",
        hierarchical_context_parallel_sizes=sizes,
    )


def on_mesh(meshes: list[tuple[int, int]], perturb: bool) -> list:
    """This rank's columns, and its part of the result of `whole`, for each mesh."""
    found = []
    base = small_config()
    for inner, outer in meshes:
        parallel = replace(base.parallel, context=inner * outer, context_heads=inner)
        with joined(replace(base, parallel=parallel)):
            with pytest.raises(ValueError, match="hierarchical_context_parallel_sizes"):
                ContextAttention(config_of(inner, outer, None))
            with pytest.raises(ValueError, match="hierarchical_context_parallel_sizes"):
                ContextAttention(config_of(inner, outer, [1, 1]))
            query, key, value, upstream = inputs()
            if perturb:
                value[0] += 1
            mine = own_columns(LENGTH)
            leaves = [x[mine].requires_grad_() for x in (query, key, value)]
            view = Context(DENSE, inner).columns(SimpleNamespace(tokens=SAMPLES, sample=SAMPLES))
            out = ContextAttention(config_of(inner, outer, [inner, outer]))(*leaves, view)
            out.backward(upstream[mine])
            found.append((mine, [out.detach(), *(leaf.grad for leaf in leaves)]))
    return found


@pytest.mark.parametrize("world", MESHES)
def test_forward_and_backward_equal_one_process(world):
    expected = whole()
    for rank in run_distributed(on_mesh, world, MESHES[world], False):
        for columns, parts in rank:
            assert len(columns) == LENGTH // world
            for part, full in zip(parts, expected):
                torch.testing.assert_close(part, full[columns], rtol=1e-5, atol=1e-6)


def test_the_first_token_reaches_the_columns_of_every_rank():
    """Guards against a missing setting, which would silently restrict attention to the rank's own columns."""
    before, after = (run_distributed(on_mesh, 2, MESHES[2], perturb) for perturb in (False, True))
    for rank in range(2):
        for (columns, old), (_, new) in zip(before[rank], after[rank]):
            changed = (old[0] != new[0]).any(-1)  # [S, B]
            reached = columns[:, None] < torch.tensor([20, 9])  # sample 0 of each row
            assert torch.equal(changed, reached)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_zigzag_deals_out_all_columns_and_even_work(size):
    parts = [zigzag(48, rank, size) for rank in range(size)]
    assert torch.cat(parts).sort().values.tolist() == list(range(48))
    assert len({int(part.sum()) for part in parts}) == 1  # work under a causal mask: the sum of the column numbers


def test_zigzag_refuses_rows_that_do_not_divide():
    with pytest.raises(ValueError, match="multiple of 2 x 4"):
        zigzag(44, 0, 4)


def test_one_process_holds_all_columns_in_order():
    with distributed(small_config().parallel, seed=0, threads=1):
        assert torch.equal(own_columns(6), torch.arange(6)) and torch.equal(all_columns(6), torch.arange(6))


@pytest.mark.parametrize("sizes", [dict(context=2, context_heads=4), dict(context=4, context_heads=4)])
def test_a_mesh_that_cannot_be_is_refused(sizes):
    """4 does not divide 2 ranks; 4 does not divide the two groups of heads."""
    config = small_config()
    with pytest.raises(ConfigError, match="context_heads"):
        validate(replace(config, parallel=replace(config.parallel, **sizes)))
