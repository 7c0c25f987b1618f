"""Userbuffers: tensor-parallel messages of the decoder's linears behind their products (Transformer Engine).

A linear's gathered input, or its scattered output, goes through a buffer piece by piece: while one piece is multiplied,
the next one travels. In the backward pass whole messages hide behind products that do not need them. Buffers have one
size, so all rows of training have the same length (`Config.padded_length`); evaluation and generation do without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nvlm.config.values import TE_INSTALL, Config, problem
from nvlm.llm.build import DTYPES, frozen


@contextmanager
def userbuffers(config: Config) -> Iterator[None]:
    """The buffers, for models built within. Nothing without parallel.userbuffers. A collective call of all ranks."""
    if not config.parallel.userbuffers:
        yield
        return
    _check_machine(config)
    from transformer_engine.pytorch import UserBufferQuantizationMode, destroy_ub, initialize_ub

    precision = config.precision
    modes = [UserBufferQuantizationMode.FP8] if precision.recipe else []
    modes += [UserBufferQuantizationMode.NONE] if precision.recipe is None or precision.edges else []
    # Where `llm_config` wants it scattered behind its own product. These become the defaults of the second mode.
    methods = dict.fromkeys(("qkv_dgrad", "fc1_dgrad"), {"method": "pipeline"}) if frozen(config) else {}
    initialize_ub(
        [config.padded_length // config.parallel.context, config.llm.hidden],
        config.parallel.tensor,
        quantization_modes=modes,
        dtype=DTYPES[precision.dtype],
        ub_cfgs=[methods, *({} for _ in modes[1:])],
        bootstrap_backend="gloo",  # by default MPI where torch has it, though it may not have started the processes
    )
    try:
        yield
    finally:
        destroy_ub()


def _check_machine(config: Config) -> None:
    import transformer_engine.pytorch as te

    what, off = "parallel.userbuffers=true", "parallel.userbuffers=false"
    if not hasattr(te, "UserBufferQuantizationMode"):
        raise problem(what, "an older Transformer Engine", "2.7 or later", f"{TE_INSTALL}, or {off}")
    from transformer_engine_torch import device_supports_multicast

    here, tensor = int(os.environ.get("LOCAL_WORLD_SIZE", 0)), config.parallel.tensor
    if here % tensor:
        expected = f"a divisor of the {here} processes of each machine, which share memory over NVLink"
        raise problem(f"parallel.tensor with {what}", tensor, expected, off)
    if not device_supports_multicast() and os.environ.get("UB_SKIPMC", "0") == "0":
        fix = f"export UB_SKIPMC=1, which copies instead, or {off}"
        raise problem(what, "a GPU or driver without multicast", "NVSwitch and its driver", fix)
