"""Pipeline parallelism: the parts of the model, parameters replicated on several stages, and embedded tags.

The projector and the norms of keys are replicated on every stage that uses tiles, a tied embedding on the first and the
last stage. Gradients are summed over the copies, so that they stay equal. Tags in NVLM-H's keys are words, but only the
first stage has the embedding: it sends the few rows that a step needs to the other stages, which return the gradients.

Shapes: N distinct tag tokens of a step, H model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor, nn

from nvlm.arch import registry
from nvlm.arch.base import VisionLanguageModel
from nvlm.attention.cache import Past
from nvlm.config.values import Config
from nvlm.data.batch import IMAGE, PAD, Batch
from nvlm.llm.build import llm_config
from nvlm.processes import groups
from nvlm.processes.device import to_device
from nvlm.tiling.placement import TileUse

_COPIED = ("projector.", "fusion.", "embedding.")


def build_parts(config: Config) -> list[VisionLanguageModel]:
    """The parts of the model on this process, one per virtual stage."""
    architecture, megatron = registry.build_architecture(config), llm_config(config)
    rank, p = parallel_state.get_pipeline_model_parallel_rank(), config.parallel
    parts: list[VisionLanguageModel] = []
    for virtual in range(p.virtual):
        parts.append(VisionLanguageModel(config, architecture, megatron, virtual * p.pipeline + rank, parts))
    return parts


def tile_use_of_rank(config: Config, pipeline_rank: int) -> TileUse:
    """How the process at `pipeline_rank` uses tiles, over all its parts."""
    p, use = config.parallel, TileUse(False, False)
    for virtual in range(p.virtual):
        use |= registry.tile_use(config, virtual * p.pipeline + pipeline_rank)
    return use


@dataclass(frozen=True, slots=True)
class Copied:
    """A parameter replicated on several stages, and the process group that holds it."""

    parameter: nn.Parameter
    group: dist.ProcessGroup

    @torch.no_grad()
    def equalize(self) -> None:
        """Broadcast the values of the first copy."""
        dist.broadcast(self.parameter.data, dist.get_process_group_ranks(self.group)[0], group=self.group)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """All-reduce the gradients of the copies."""
        if self.parameter.requires_grad:
            dist.all_reduce(self.parameter.main_grad, group=self.group)


def find_copied(parts: Sequence[nn.Module]) -> list[Copied]:
    """The parameters replicated on several stages; all but the first copy are marked as copies. A collective call."""
    held = {name: p for part in parts for name, p in part.named_parameters() if name.startswith(_COPIED)}
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    names: list[set[str]] = [set() for _ in range(pipeline.size())]
    dist.all_gather_object(names, set(held), group=pipeline)
    ranks, found = dist.get_process_group_ranks(pipeline), []
    for kind in _COPIED:
        holders = [rank for rank, has in zip(ranks, names) if any(name.startswith(kind) for name in has)]
        group = groups.subgroups(holders if len(holders) > 1 and dist.get_rank() in holders else [])
        for name in sorted(name for name in held if name.startswith(kind)):
            held[name].copy_number = holders.index(dist.get_rank())
            held[name].shared = held[name].copy_number > 0  # Megatron counts it once in the gradient norm
            found += [Copied(held[name], group)] if group is not None else []
    return found


@dataclass(frozen=True, slots=True)
class BorrowedWords:
    """Embedding rows [N, H], an fp32 leaf, for the sorted token ids [N], sent by the first stage."""

    ids: Tensor
    rows: Tensor
    dtype: torch.dtype

    def __call__(self, tokens: Tensor) -> Tensor:
        """[..., H] of ids [...]; ids that were not sent (padding, placeholders) read an arbitrary row."""
        return self.rows[torch.searchsorted(self.ids, tokens).clamp(max=len(self.ids) - 1)].to(self.dtype)


@dataclass(slots=True)
class Pipeline:
    """What the pipeline stages share. Call `begin` before a step's forward pass, `finalize` after its backward pass."""

    parts: list[VisionLanguageModel]
    copied: list[Copied]
    lend: bool  # stages without the embedding need tags
    borrowed: BorrowedWords | None = field(default=None)

    def shape(self, batches: Sequence[Batch]) -> tuple[int, int] | None:
        """Columns and rows of the hidden states of all `batches`, over all ranks of a stage; None if they differ."""
        attends = self.parts[0].attends()
        shapes = {attends.arranged_shape(batch) for batch in batches}
        return shapes.pop() if len(shapes) == 1 else None

    @torch.no_grad()
    def begin(self, batches: Sequence[Batch]) -> None:
        """Send the embeddings of the batches' tags to the stages without the embedding."""
        if not self.lend:
            return
        group, ids = parallel_state.get_pipeline_model_parallel_group(), _tag_ids(batches)
        config = self.parts[0].config
        if parallel_state.is_pipeline_first_stage(ignore_virtual=True):
            rows = self.parts[0].embed(ids).float()
        else:
            rows = torch.empty(len(ids), config.hidden_size, dtype=torch.float32, device=ids.device)
        dist.broadcast(rows, dist.get_process_group_ranks(group)[0], group=group)
        self.borrowed = BorrowedWords(ids, rows.requires_grad_(), config.params_dtype)
        for part in self.parts:
            part.borrowed = None if hasattr(part, "embedding") else self.borrowed

    @torch.no_grad()
    def finalize(self, chunks: list, tokens: Tensor | None = None, **kwargs) -> None:
        """Sum gradients over the copies on several stages, then reduce over replicas as Megatron does.

        `tokens`: this rank's number of trained tokens. Megatron would divide its whole gradient buffer by the global
        number; `nvlm.train.optim.update` divides this rank's shard.
        """
        if self.borrowed is not None:
            self._return_words()
        for copied in self.copied:
            copied.sum_gradients()
        finalize_model_grads(chunks, **kwargs)

    def _return_words(self) -> None:
        rows = self.borrowed.rows
        gradient = torch.zeros_like(rows) if rows.grad is None else rows.grad
        dist.all_reduce(gradient, group=parallel_state.get_pipeline_model_parallel_group())
        if parallel_state.is_pipeline_first_stage(ignore_virtual=True):
            words = self.parts[0].embedding.word_embeddings
            if words.weight.requires_grad:
                own = (self.borrowed.ids >= words.vocab_start_index) & (self.borrowed.ids < words.vocab_end_index)
                places = self.borrowed.ids[own] - words.vocab_start_index
                words.weight.main_grad.index_add_(0, places, gradient[own])
        self.borrowed = None


def _tag_ids(batches: Sequence[Batch]) -> Tensor:
    """Sorted ids [N] of all tag tokens in the keys, plus 0 for padding and placeholders."""
    hosts = [batch.on_host for batch in batches]
    found = [host.cross_tokens[host.cross_tokens != IMAGE] for host in hosts]
    found += [host.cross_tags[host.cross_tags != PAD] for host in hosts]
    return to_device(torch.cat([found[0].new_zeros(1), *found]).unique(), batches[0].tokens.device)


def build_pipeline(config: Config, parts: list[VisionLanguageModel]) -> Pipeline:
    """Find replicated parameters and make the copies equal. Call it before building the optimizer."""
    copied = find_copied(parts)
    for one in copied:
        one.equalize()
    # The first rank's later virtual stages have no embedding either.
    bare = range(1, config.parallel.pipeline_stages)
    tags_in_keys = registry.description(config.arch.name).tags_in_keys
    lend = tags_in_keys and any(registry.tile_use(config, pipeline_stage).keys for pipeline_stage in bare)
    return Pipeline(parts, copied, lend)


@torch.no_grad()
def next_logits(pipeline: Pipeline, batch: Batch, last_B: Tensor, past: Past | None = None) -> Tensor | None:
    """Logits [B, vocabulary] at column `last_B[b]` of each row on the last pipeline stage, None on the others.

    A collective call of all stages. `past`: as in `VisionLanguageModel.hidden`.
    """
    if past is None:
        pipeline.begin([batch])
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks, rank = dist.get_process_group_ranks(group), group.rank()
    logits_BV = None
    for part in pipeline.parts:
        if not part.pre_process:
            part.set_input_tensor(_receive(part, batch, ranks[rank - 1]))
        hidden_SBH = part.hidden(batch, past)
        if part.post_process:
            logits_BV = part.last_logits(hidden_SBH, last_B)
        else:
            dist.send(hidden_SBH.contiguous(), ranks[(rank + 1) % len(ranks)])
    pipeline.borrowed = None
    return logits_BV


def share_from_last(values: Tensor) -> Tensor:
    """Broadcast `values` from the last pipeline stage to all stages."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(values, dist.get_process_group_ranks(group)[-1], group=group)
    return values


def _receive(part: VisionLanguageModel, batch: Batch, source: int) -> Tensor:
    rows, length = batch.tokens.shape
    columns = length // parallel_state.get_context_parallel_world_size()
    if part.config.sequence_parallel:
        columns //= parallel_state.get_tensor_model_parallel_world_size()
    shape = (columns, rows, part.config.hidden_size)
    hidden = torch.empty(shape, dtype=part.config.params_dtype, device=batch.tokens.device)
    dist.recv(hidden, source)
    return hidden
