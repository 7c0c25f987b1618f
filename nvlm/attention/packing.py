"""How packed rows reach attention kernels on a GPU, without a dense mask.

Self-attention sees the rows of a micro-batch as one line of samples, each attending to itself alone (Transformer
Engine's kernels for sequences of many lengths), or through a block mask (FlexAttention), which is also how a token
sees the keys that cross-attention lets it see: blocks of 128 x 128 that nobody looks through cost nothing.

Shapes: S queries, X keys, B rows, L columns of a row, T tokens of a line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nvlm.attention.visibility import follows, sees
from nvlm.data.batch import PAD, Batch

Runs = tuple[int, ...]
"""Lengths of the samples of whole rows, row behind row, each with the padding behind it, which nobody looks at."""

WORTH_A_CALL = 2**13
"""Pairs of tokens that a call of a kernel must spare on CPU to be quicker than the mask that hides them. Sparing 7200
(rows of two samples of 60 tokens, 4 heads of 32) took 1.08 times as long, sparing 16200 (of 90) 0.86 times."""


@dataclass
class Packing(PackedSeqParams):
    """What Megatron hands through to every layer of a micro-batch, recomputed ones too, where it keeps tensors alone.

    Its own fields are left empty, so that Megatron lays nothing out anew: rotary angles come token by token.
    """

    samples: PackedSeqParams | None = None  # for Transformer Engine: where the samples of a line begin and end
    columns: BlockMask | Runs | None = None  # for FlexAttention, or on CPU: what self-attention sees
    keys: BlockMask | Tensor | None = None  # for FlexAttention, or on CPU: what cross-attention sees


def samples_in_line(sample_T: Tensor, longest: int, device: torch.device) -> PackedSeqParams:
    """Where the samples of a line begin and end, of at most `longest` tokens each, for kernels on `device`.

    Padding counts as samples too: nothing looks at it, and that costs less than to take it out.
    """
    numbers_T = torch.arange(len(sample_T), device=sample_T.device)
    begins_T = (sample_T == PAD) & (numbers_T % longest == 0)
    begins_T[1:] |= sample_T[1:] != sample_T[:-1]
    begins_T[0] = True
    ends = torch.cat((begins_T.nonzero()[:, 0], numbers_T[-1:] + 1)).int().to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def seen_columns(sample_BL: Tensor, queries_S: Tensor, keys_X: Tensor) -> BlockMask:
    """What `causal_mask` hides, as blocks that are looked through."""
    sample_q, sample_k = sample_BL[:, queries_S], sample_BL[:, keys_X]

    def rule(row, head, query, key):
        return follows(sample_q[row, query], queries_S[query], sample_k[row, key], keys_X[key])

    return _blocks(rule, sample_q, len(keys_X))


def seen_keys(batch: Batch, columns_S: Tensor) -> BlockMask:
    """What `unseen_keys` hides, as blocks that are looked through."""
    sample_q, image_q, tile_q = (numbers[:, columns_S] for numbers in (batch.sample, batch.image, batch.tile))
    sample_k, image_k, tile_k = batch.cross_sample, batch.cross_image, batch.cross_tile

    def rule(row, head, query, key):
        queries = (numbers[row, query] for numbers in (sample_q, image_q, tile_q))
        return sees(*queries, *(numbers[row, key] for numbers in (sample_k, image_k, tile_k)))

    return _blocks(rule, sample_q, sample_k.shape[1])


def attend_blocks(query_BNSD: Tensor, key_BGXD: Tensor, value_BGXD: Tensor, seen: BlockMask, scale: float | None):
    """softmax(scale q k^T) v over what `seen` lets through, [B, N, S, D]; a query that sees no key gets zero."""
    grouped = query_BNSD.shape[1] != key_BGXD.shape[1]
    attend = _compiled(flex_attention) if query_BNSD.is_cuda else flex_attention
    return attend(query_BNSD, key_BGXD, value_BGXD, block_mask=seen, scale=scale, enable_gqa=grouped)


def runs(sample_BL: Tensor) -> Runs | None:
    """The runs of rows whose samples are numbered by `sample_BL`; None where samples are too short to go apart."""
    rows, columns = sample_BL.shape
    begins_BL = torch.ones_like(sample_BL, dtype=torch.bool)
    begins_BL[:, 1:] = (sample_BL[:, 1:] != sample_BL[:, :-1]) & (sample_BL[:, 1:] != PAD)
    begins = begins_BL.flatten().nonzero()[:, 0].tolist()
    lengths = tuple(end - begin for begin, end in zip(begins, [*begins[1:], sample_BL.numel()]))
    spared = rows * columns**2 - sum(length**2 for length in lengths)
    return None if spared < WORTH_A_CALL * (len(lengths) - rows) else lengths


def attend_runs(query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, runs: Runs, scale: float | None) -> Tensor:
    """softmax(scale q k^T) v of each token over itself and those before it in its own sample, [B, N, S, D].

    A sample at a time: a mask over whole rows costs the square of their length, most of it for nothing.
    """
    rows, _, columns, _ = query_BNSD.shape
    grouped = query_BNSD.shape[1] != key_BGSD.shape[1]
    causal = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=grouped
    )
    if len(runs) == rows:
        return causal(query_BNSD, key_BGSD, value_BGSD)
    # In one line, then apart: of a slice the gradient would be as large as the whole.
    lines = (x.transpose(1, 2).flatten(0, 1).split(runs) for x in (query_BNSD, key_BGSD, value_BGSD))
    attended = [causal(*(x.transpose(0, 1)[None] for x in sample))[0].transpose(0, 1) for sample in zip(*lines)]
    return torch.cat(attended).unflatten(0, (rows, columns)).transpose(1, 2)


def _blocks(rule: Callable, like_BS: Tensor, keys: int) -> BlockMask:
    make = _compiled(create_block_mask) if like_BS.is_cuda else create_block_mask
    rows, queries = like_BS.shape
    return make(rule, rows, None, queries, keys, device=like_BS.device)


@functools.cache
def _compiled(function: Callable) -> Callable:
    # Uncompiled both write the whole mask out. Rows have any length, which must not mean a kernel each. But self- and
    # cross-attention, with and without gradients, one row and many are kernels of their own, and behind the limit
    # (8 by default) torch goes on uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, dynamic=True)
