"""What the rest of the package needs to know about an architecture, as a value. Imports no torch.

arch/NAME/description.py describes one; nvlm.arch.registry.description finds it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from nvlm.config.modules import Activation, Branch, Linear, Module, Norm
from nvlm.config.values import LLMConfig, VisionConfig

KeyKind = Literal["tile", "tag"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One architecture, without its code."""

    title: str  # its name in the paper
    tiles_in_stream: bool  # projected tiles occupy positions of the text stream
    keys: tuple[KeyKind, ...]  # what is cross-attended, each kind with its own norm; (): nothing
    projector: Literal["mlp", "affine"]  # in Megatron's terms: two linears, or one
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

    def projector_modules(self, llm: LLMConfig, vision: VisionConfig) -> tuple[Module, ...]:
        """The modules that project tile tokens to the language model's width (NVLM section 4.5)."""
        width = vision.feature_width
        norm = Norm(name="projector.norm", group="projector", width=width, bias=True)
        place, own = "projector.layers.encoder", dict(group="projector")
        if self.projector == "affine":
            return norm, Linear(name=place, inputs=width, outputs=llm.hidden, split="outputs", **own)
        return (
            norm,
            Linear(name=f"{place}.linear_fc1", inputs=width, outputs=llm.ffn, split="outputs", **own),
            Activation(width=llm.ffn),
            Linear(name=f"{place}.linear_fc2", inputs=llm.ffn, outputs=llm.hidden, split="inputs", **own),
        )

    def key_norms(self, llm: LLMConfig) -> tuple[Norm, ...]:
        """The norm of each of `keys`."""
        return tuple(Norm(name=f"fusion.{kind}_norm", group="xattn", width=llm.hidden) for kind in self.keys)
