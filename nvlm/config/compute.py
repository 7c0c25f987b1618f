"""What a step is computed in, and on which ranks: precision and the parallel dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from nvlm.config.fields import Choice, Count, Natural, Range

FP8_RECIPES = {"fp8_delayed": "delayed", "fp8_current": "tensorwise", "fp8_blockwise": "blockwise", "mxfp8": "mxfp8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """What products are computed in: fp32, bf16, or FP8 after one of Transformer Engine's recipes.

    Norms, gates, the projector, the embedding and the output layer never are in FP8.
    """

    name: Annotated[str, Choice("bf16", "fp32", *FP8_RECIPES)]
    edges: Natural  # FP8: decoder layers at either end that compute in bf16
    encoder: bool  # FP8: the frozen encoder's weights and products too
    param_gather: bool  # FP8: weights of the decoder's linears that learn are kept, and gathered over replicas, in FP8

    @property
    def dtype(self) -> str:
        """Of weights and activations: fp32 or bf16."""
        return "fp32" if self.name == "fp32" else "bf16"

    @property
    def recipe(self) -> str | None:
        """Megatron's name of the FP8 recipe; None: no FP8."""
        return FP8_RECIPES.get(self.name)

    @property
    def multiple(self) -> int:
        """What the number of tokens of a linear's input must be a multiple of on each rank."""
        return {"fp8_delayed": 16, "fp8_current": 16, "mxfp8": 32, "fp8_blockwise": 128}.get(self.name, 8)

    @property
    def width_multiple(self) -> int:
        """What a linear's inputs and outputs must be a multiple of on each rank."""
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
    data: Count  # replicas that launch/train.py starts by itself
    distributed_optimizer: bool
    timeout_minutes: Annotated[float, Range(above=0, most=525_600, example=10)]  # without progress, then the run ends

    @property
    def overlap(self) -> bool:
        """Whether the distributed optimizer's communication is hidden behind forward and backward.

        Not with pipeline stages: gradients of what several of them hold are summed first, behind the whole backward.
        """
        return self.distributed_optimizer and self.pipeline == 1

    @property
    def replica(self) -> int:
        """Processes of one model replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def pipeline_stages(self) -> int:
        """Parts that the layers are cut into, virtual ones counted."""
        return self.pipeline * self.virtual

    @property
    def context_mesh(self) -> tuple[int, int]:
        """Context-parallel ranks of the all-to-all over heads, and of the gather of keys."""
        return self.context_heads, self.context // self.context_heads
