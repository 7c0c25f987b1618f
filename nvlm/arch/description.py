"""What the rest of the package needs to know about an architecture, as a value. Imports no torch.

arch/NAME/description.py describes one; nvlm.arch.registry.description finds it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from nvlm.config.modules import Activation, Branch, Linear, Module, Norm, Parameter
from nvlm.config.values import LLMConfig, ProjectorConfig, VisionConfig

KeyKind = Literal["tile", "tag"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One architecture, without its code."""

    title: str  # its name in the paper
    tiles_in_stream: bool  # projected tiles occupy positions of the text stream
    keys: tuple[KeyKind, ...]  # what is cross-attended, each kind with its own norm; (): nothing
    projector: Literal["mlp", "affine"]  # in NVLM, in Megatron's terms: two linears, or one
    carried: Callable[[LLMConfig], tuple[Branch, ...]]  # between self-attention and MLP in layers k, 2k, ...
    joins_text: bool  # tags may be tokenised with the surrounding text; else each tag is bound to its tile
    release_code: Mapping[str, str] | None  # auto_map of the published model's code; None: not published

    @property
    def groups(self) -> tuple[str, ...]:
        """Its module groups, without the encoder."""
        return ("llm", "projector", "xattn") if self.keys else ("llm", "projector")

    @property
    def tiles_in_keys(self) -> bool:
        """Whether tiles are cross-attended."""
        return "tile" in self.keys

    @property
    def tags_in_keys(self) -> bool:
        """Whether keys contain words, so that pipeline stages without the embedding need embedded tags."""
        return "tag" in self.keys

    def projector_kind(self, projector: ProjectorConfig) -> str:
        """The kind of a run's projector: affine, mlp or deep."""
        return projector.kind or self.projector

    def projector_modules(
        self, projector: ProjectorConfig, llm: LLMConfig, vision: VisionConfig, row_end: bool = False
    ) -> tuple[Module, ...]:
        """The modules that project tile tokens to the language model's width (NVLM section 4.5). `row_end`: with a
        learned vector that ends the rows of feature maps."""
        width, kind, h = vision.feature_width, self.projector_kind(projector), llm.hidden
        own, bias = dict(group="projector"), dict(group="projector", bias=projector.bias)
        found: list[Module] = []
        if projector.norm:
            found.append(Norm(name="projector.norm", width=width, bias=True, **own))
        if kind == "deep":
            inner = width // 3
            first = Linear(name="projector.first", inputs=width, outputs=inner, split="outputs", **bias)
            found += [first, Activation(width=inner), Norm(name="projector.first_norm", width=inner, bias=True, **own)]
            width = inner
        place = "projector.layers.encoder"
        if kind == "affine":
            found.append(Linear(name=place, inputs=width, outputs=h, split="outputs", **bias))
        else:
            inner = llm.ffn if projector.inner == "ffn" else h
            found += [
                Linear(name=f"{place}.linear_fc1", inputs=width, outputs=inner, split="outputs", **bias),
                Activation(width=inner),
                Linear(name=f"{place}.linear_fc2", inputs=inner, outputs=h, split="inputs", **bias),
            ]
        return (*found, Parameter(name="projector.row_end", size=h, **own)) if row_end else tuple(found)

    def key_norms(self, llm: LLMConfig) -> tuple[Norm, ...]:
        """The norm of each of `keys`."""
        return tuple(Norm(name=f"fusion.{kind}_norm", group="xattn", width=llm.hidden) for kind in self.keys)
