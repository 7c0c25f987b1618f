"""What learns in a stage and how fast: module groups, adapters, the optimizer. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from nvlm.config.fields import Choice, FileName, Natural, NotNegative, Positive, Range


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """Which module groups are trained. `recipe`: the stage of a system that a run is, such as llava_ov_1.5; `parent`:
    the recipes that it may continue, by init.checkpoint; (): any run, or none."""

    name: str
    recipe: Annotated[str, FileName()] | None = None
    parent: tuple[Annotated[str, FileName()], ...] = ()
    train_vision: bool = False
    train_projector: bool
    train_xattn: bool
    train_llm: bool
    # Module groups that may start with random weights while others are loaded:
    new: tuple[Annotated[str, Choice("projector", "xattn")], ...]

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the trained module groups."""
        flags = {
            "vision": self.train_vision,
            "projector": self.train_projector,
            "xattn": self.train_xattn,
            "llm": self.train_llm,
        }
        return tuple(group for group, learns in flags.items() if learns)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """Low-rank adapters on the linears in the layers of the module groups `targets`, trained instead of their weights.

    A target that the stage declares new has no pretrained weights: it is trained in full, without adapters.
    """

    name: Annotated[str, Choice("none", "lora")]
    rank: Annotated[int, Range(1, example=16)]
    alpha: Positive
    dropout: Annotated[float, Range(0, below=1)]
    targets: tuple[Annotated[str, Choice("llm", "xattn")], ...]

    @property
    def scale(self) -> float:
        """The factor on an adapter's output."""
        return self.alpha / self.rank


Rate = Annotated[float, Range(above=0, example=1e-5)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatesConfig:
    """Peak learning rates of single module groups; None: that of all."""

    vision: Rate | None = None
    projector: Rate | None = None
    xattn: Rate | None = None
    llm: Rate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up (in steps) and cosine decay (NVLM Tables 10 and 11).

    A group in `lr_of` follows the same curve, scaled: its lowest rate has the same share of its peak.
    """

    lr: Rate
    lr_of: RatesConfig
    min_lr: NotNegative
    warmup: Natural
    beta1: Annotated[float, Range(0, below=1, example=0.9)]
    beta2: Annotated[float, Range(0, below=1, example=0.95)]
    eps: Annotated[float, Range(above=0, example=1e-8)]
    weight_decay: NotNegative
    clip: NotNegative

    def rates(self, group: str) -> tuple[float, float]:
        """The highest and the lowest learning rate of a module group."""
        own = getattr(self.lr_of, group)
        return (self.lr, self.min_lr) if own is None else (own, own * self.min_lr / self.lr)
