"""The projector's tensors in each layout of whole models, and the norms of keys, for our Megatron modules.

Both are made from the modules that the run's configuration and architecture describe.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nvlm.config.modules import Linear, Module, Norm, Parameter
from nvlm.config.values import problem
from nvlm.weights.layouts import NVLM, Layout
from nvlm.weights.parts import Part


def parts(modules: Sequence[Module], layout: Layout = NVLM) -> list[Part]:
    """The published tensors of the projector. Raises ConfigError if the layout has no names for some of them."""
    chain = [module for module in modules if not isinstance(module, Parameter)]
    found = [part for place, one in enumerate(chain) for part in _of_module(layout.projector(chain, place), one)]
    return found + [_row_end(one, layout) for one in modules if isinstance(one, Parameter)]


def _row_end(vector: Parameter, layout: Layout) -> Part:
    if layout.row_end is None:
        got = f"{vector.name}, for which layout {layout.name} has no name"
        raise problem("tiling.newline", got, "false", "tiling.newline=false")
    return Part(name=layout.row_end, shape=(vector.size,), ours=vector.name)


def _of_module(published: str, module: Module) -> list[Part]:
    match module:
        case Norm(name=ours, width=width):
            return [Part(name=f"{published}.{k}", shape=(width,), ours=f"{ours}.{k}") for k in ("weight", "bias")]
        case Linear(name=ours):
            split = {"outputs": 0, "inputs": 1, None: None}[module.split]
            shape = (module.outputs, module.inputs)
            found = [Part(name=f"{published}.weight", shape=shape, ours=f"{ours}.weight", split=split)]
            bias = Part(name=f"{published}.bias", shape=shape[:1], ours=f"{ours}.bias", split=0 if split == 0 else None)
            return [*found, bias] if module.bias else found
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
