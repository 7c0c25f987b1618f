"""NVLM-D's step beside a peer's (benchmarks/peers.py): the same samples without tags, one micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu_parts.sizes import Size, a_row
from benchmarks.gpu_parts.steps import learner, one_batch
from benchmarks.gpu_parts.timing import forget, timed
from nvlm.commands.compose import compose_config
from nvlm.config.values import Config
from nvlm.data.batch import Sample
from nvlm.llm.backend import describe
from nvlm.processes import groups
from nvlm.train.step import forward_backward


def beside(peer: str, precision: str, size: Size) -> Iterator[dict]:
    """One row: our seconds and the peer's (llava or transformers), at the largest number of tiles."""
    config = compose_config(*size.overrides, "arch=decoder", f"precision={precision}", "tiling.tag=none")
    samples = a_row(config, max(size.tiles), size.text, size.row)
    ours, our_peak = _own(config, samples, size.repeats), _peak()
    forget()
    name, its, its_peak = _of_peer(peer, config, samples, size.repeats)
    forget()
    yield {
        "peer": name, "ours": describe(config), "precision": precision, "row": size.row, "samples": len(samples),
        "ours ms": 1e3 * ours, "its ms": 1e3 * its, "ours over it": its / ours, "ours GB": our_peak, "its GB": its_peak,
    }  # fmt: skip


def _own(config: Config, samples: Sequence[Sample], repeats: int) -> float:
    """Seconds of our step. The model is gone when it returns."""
    _begin_peak()
    batch = one_batch(config, samples)
    with learner(config) as trainer:
        return timed(lambda: forward_backward(trainer, [batch]), repeats)


def _of_peer(peer: str, config: Config, samples: Sequence[Sample], repeats: int) -> tuple[str, float, float | None]:
    """Name, seconds and peak memory of the peer. Its model is gone when it returns."""
    from benchmarks.peers import llava_model, transformers_model

    _begin_peak()
    build = {"llava": llava_model, "transformers": transformers_model}[peer]
    with groups.distributed(config.parallel, config.seed) as device:
        model = build(config, device)
        return model.name, timed(lambda: model.step(samples), repeats), _peak()


def _begin_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> float | None:
    """Gigabytes."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
