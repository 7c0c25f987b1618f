"""The attention kernels, one file each, imported only when chosen."""

from __future__ import annotations

from importlib import import_module

from nvlm.attention import choice
from nvlm.attention.kernel import Kernel
from nvlm.config.values import Config


def build(chosen: choice.KernelChoice, config: Config) -> Kernel:
    """The kernel `chosen` for a model of `config`."""
    inner = () if chosen.inner is None else (build(chosen.inner, config),)
    return import_module(f"{__name__}.{chosen.name}").build(config, *inner)
