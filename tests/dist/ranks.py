"""Simulates any rank of any layout in one process, for what depends only on shapes: collectives are skipped, so their
results are whatever the memory contains."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from nvlm.arch.base import VisionLanguageModel
from nvlm.arch.pipeline import BorrowedWords, build_parts
from nvlm.config.values import Config
from nvlm.data.batch import Batch
from nvlm.processes import device, groups
from nvlm.train.optim import freeze
from tests.stories import ONE, ONE_TILE, SIDE_BY_SIDE, TEXT, TWO

WIDE = """llm.hidden=64 llm.heads=8 llm.kv_heads=4 llm.head_dim=8 llm.ffn=160 llm.layers=8
vision.hidden=24 vision.heads=3""".split()
ROWS = ((TWO, TEXT, ONE_TILE), (SIDE_BY_SIDE, ONE))
SETTINGS = {
    "plain": (),
    "whole layers recomputed": ("train.recompute=full",),
    "MLPs recomputed": ("train.recompute=selective",),
    "language model frozen": ("stage=pretrain",),
    "frozen and recomputed": ("stage=pretrain", "train.recompute=full"),
    "frozen, two stages": ("stage=pretrain", "parallel.pipeline=2"),
    "bf16": ("precision=bf16",),
    "adapters": ("peft=lora", "peft.rank=4", "stage.new=[]"),
    "adapters with dropout": ("peft=lora", "peft.rank=4", "stage.new=[]", "peft.dropout=0.1"),
    "adapters beside new modules": ("peft=lora", "peft.rank=4"),
    "tensor": ("parallel.tensor=2",),
    "sequence": ("parallel.tensor=2", "parallel.sequence=true"),
    "keys gathered": ("parallel.context=2",),
    "heads traded": ("parallel.context=2", "parallel.context_heads=2"),
    "interleaved": ("parallel.pipeline=2", "parallel.virtual=2"),
    "several at once": ("parallel.tensor=4", "parallel.sequence=true", "parallel.pipeline=2", "train.recompute=full"),
    "norms of heads": ("llm.qk_norm=true",),
    "norms of heads, bf16": ("llm.qk_norm=true", "parallel.tensor=2", "precision=bf16"),
    "tied, bf16": ("llm.tied=true", "parallel.tensor=2", "parallel.sequence=true", "precision=bf16"),
}


@contextmanager
def as_rank(config: Config, pipeline_rank: int):
    """Process groups as seen by the first rank of a pipeline stage."""
    device.prepare(0, 1)
    p = config.parallel
    rank = pipeline_rank * p.tensor * p.context
    dist.init_process_group("fake", rank=rank, world_size=p.replica, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=p.tensor,
            pipeline_model_parallel_size=p.pipeline,
            virtual_pipeline_model_parallel_size=p.virtual if p.virtual > 1 else None,
            context_parallel_size=p.context,
            hierarchical_context_parallel_sizes=list(p.context_mesh) if p.context > 1 else None,
            create_gloo_process_groups=False,
        )
        groups._seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def frozen_parts(config: Config) -> list[VisionLanguageModel]:
    """The parts of this rank, frozen as in the stage."""
    parts = build_parts(config)
    for part in parts:
        freeze(part, config)
    return parts


def computed(part: VisionLanguageModel, batch: Batch) -> Batch:
    """The batch as `part` computes it."""
    return part.train().attends().arranged(batch).batch


def kept_bytes(part: VisionLanguageModel, batch: Batch, config: Config) -> int:
    """Bytes that a forward pass of `part` keeps for its backward pass, without parameters and the batch itself."""
    if not part.pre_process:
        p, (rows, length) = config.parallel, computed(part, batch).tokens.shape
        columns = length // p.context // (p.tensor if p.sequence else 1)
        received = torch.randn(columns, rows, config.llm.hidden, dtype=part.config.params_dtype)
        part.set_input_tensor(received.requires_grad_())
        if part.architecture.description.tags_in_keys:
            words = torch.randn(1, config.llm.hidden, requires_grad=True)
            part.borrowed = BorrowedWords(torch.zeros(1).long(), words, part.config.params_dtype)
    there = {t.untyped_storage().data_ptr() for t in [*part.parameters(), *part.buffers()]}
    there |= {t.untyped_storage().data_ptr() for t in vars_of(batch)}
    sizes: dict[int, int] = {}
    alive = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in there:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x)  # no other tensor gets its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        part.train()(batch)
    return sum(sizes.values())


def vars_of(batch: Batch) -> list[torch.Tensor]:
    """Its tensors."""
    values = (getattr(batch, name) for name in batch.__dataclass_fields__)
    return [value for value in values if torch.is_tensor(value)]
