"""What a forward pass gives to the gated cross-attention layers, kept for one pass.

Shapes: S columns, X keys, B rows, H model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from nvlm.arch.base import VisionLanguageModel
from nvlm.arch.xattn.attention import GatedCrossAttention


@dataclass(slots=True)
class Gated:
    """A gated layer, numbered from 1 over the whole model, and its input of the last pass."""

    number: int
    attention: GatedCrossAttention
    residual_SBH: Tensor | None = None  # the text stream, to which the layer adds
    query_SBH: Tensor | None = None  # the same, normalized


@dataclass(slots=True)
class Watched:
    """The gated layers of a model, and the keys that they share."""

    layers: list[Gated] = field(default_factory=list)
    keys_XBH: Tensor | None = None


@contextmanager
def watched(model: VisionLanguageModel) -> Iterator[Watched]:
    """Keep what the layers of `model` get in each forward pass within the block. The pass itself does not change."""
    seen = Watched()

    def keep_keys(module, inputs, keys_XBH: Tensor) -> None:
        seen.keys_XBH = keys_XBH

    with ExitStack() as hooks:
        hooks.enter_context(model.shared["fusion"].register_forward_hook(keep_keys))
        for index, layer in enumerate(model.decoder.layers):
            if isinstance(layer.cross_attention, GatedCrossAttention):
                gated = Gated(model.first_layer + index + 1, layer.cross_attention)
                seen.layers.append(gated)
                hooks.enter_context(layer.pre_cross_attn_layernorm.register_forward_hook(_keeper(gated)))
        yield seen


def _keeper(gated: Gated) -> Callable[..., None]:
    def keep(module, inputs: tuple[Tensor, ...], normalized_SBH: Tensor) -> None:
        (gated.residual_SBH,), gated.query_SBH = inputs, normalized_SBH

    return keep
