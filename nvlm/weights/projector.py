"""The projector's tensors (`mlp1.*`, as NVLM-D-72B names them) and the norms of keys, for our Megatron modules.

Both are made from the modules that the architecture's description lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nvlm.config.modules import Linear, Module, Norm, Parameter
from nvlm.weights.parts import Part


def parts(projector: Sequence[Module]) -> list[Part]:
    """The published name of a module is its place: the release has them, GELU included, in one nn.Sequential."""
    return [part for place, module in enumerate(projector) for part in _of_module(f"mlp1.{place}", module)]


def _of_module(published: str, module: Module) -> list[Part]:
    match module:
        case Norm(name=ours, width=width):
            return [Part(name=f"{published}.{k}", shape=(width,), ours=f"{ours}.{k}") for k in ("weight", "bias")]
        case Linear(name=ours):
            split = 0 if module.split == "outputs" else 1
            shape = (module.outputs, module.inputs)
            weight = Part(name=f"{published}.weight", shape=shape, ours=f"{ours}.weight", split=split)
            bias = dict(shape=shape[:1], ours=f"{ours}.bias", split=None if split else 0)
            return [weight, Part(name=f"{published}.bias", **bias)] if module.bias else [weight]
        case Parameter(name=ours, size=size):
            return [Part(name="image_newline", shape=(size,), ours=ours)]
    return []


def key_norms(norms: Iterable[Norm]) -> list[Part]:
    """No published model has these: the names are ours."""
    return [
        Part(
            name=f"cross_keys.{norm.name.removeprefix('fusion.')}.weight",
            shape=(norm.width,),
            ours=f"{norm.name}.weight",
        )
        for norm in norms
    ]
