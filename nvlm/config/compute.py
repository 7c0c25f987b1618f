"""Precision, and the sizes of the parallel dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from nvlm.config.fields import Choice, Count, Natural, Range

FP8_RECIPES = {"fp8_delayed": "delayed", "fp8_current": "tensorwise", "fp8_blockwise": "blockwise", "mxfp8": "mxfp8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """The precision of matrix products: fp32, bf16, or FP8 with one of Transformer Engine's recipes.

    Norms, gates, the projector, the embedding and the output layer never use FP8.
    """

    name: Annotated[str, Choice("bf16", "fp32", *FP8_RECIPES)]
    edges: Natural  # FP8: number of decoder layers at each end that stay in bf16
    encoder: bool  # FP8: also for the frozen encoder's weights and matrix products
    param_gather: bool  # FP8: keep the decoder linears' trained weights, and gather them over replicas, in FP8

    @property
    def dtype(self) -> str:
        """The dtype of weights and activations: fp32 or bf16."""
        return "fp32" if self.name == "fp32" else "bf16"

    @property
    def recipe(self) -> str | None:
        """Megatron's name for the FP8 recipe; None: no FP8."""
        return FP8_RECIPES.get(self.name)

    @property
    def multiple(self) -> int:
        """The number of tokens in a linear's input on each rank must be a multiple of this."""
        return {"fp8_delayed": 16, "fp8_current": 16, "mxfp8": 32, "fp8_blockwise": 128}.get(self.name, 8)

    @property
    def width_multiple(self) -> int:
        """The input and output widths of a linear on each rank must be multiples of this."""
        return max(16, self.multiple) if self.recipe else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel dimensions of one model replica; data parallelism takes the rest."""

    tensor: Count
    pipeline: Count
    virtual: Count
    context: Count
    context_heads: Count  # context-parallel ranks that trade columns for heads; the others gather keys
    sequence: bool
    userbuffers: bool  # Transformer Engine sends a linear's input or output in pieces, behind products of others
    data: Count  # number of replicas that launch/train.py starts itself
    distributed_optimizer: bool
    gradients: Annotated[str, Choice("bf16", "fp32")]  # how the distributed optimizer's travel; the sums are fp32
    timeout_minutes: Annotated[float, Range(above=0, most=525_600, example=10)]  # without progress until abort

    @property
    def overlap(self) -> bool:
        """Whether the distributed optimizer's communication overlaps with the forward and backward passes.

        Not with pipeline stages: gradients of parameters replicated on several stages must be summed first, after the
        whole backward pass.
        """
        return self.distributed_optimizer and self.pipeline == 1

    @property
    def replica(self) -> int:
        """Number of processes in one model replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def pipeline_stages(self) -> int:
        """Number of pipeline stages, including virtual ones."""
        return self.pipeline * self.virtual

    @property
    def context_mesh(self) -> tuple[int, int]:
        """Number of context-parallel ranks in the all-to-all over heads, and in the gather of keys."""
        return self.context_heads, self.context // self.context_heads
