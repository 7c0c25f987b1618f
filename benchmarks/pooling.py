"""What pooling costs before the projector, as a share of the encoder's pass over the same tiles.

One layer of SigLIP so400m is timed and counted 26 times. Run: python benchmarks/pooling.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from nvlm.commands.compose import compose_config
from nvlm.processes import groups
from nvlm.vision.encoders.registry import description_of
from nvlm.vision.path import solo_groups
from nvlm.vision.pooling import pooled

TILES, LAYERS, RUNS = 2, 26, 5
SETTINGS = ("arch=decoder", "vision=siglip-so400m", "vision.layers=1", "precision=fp32", "tiling=single")
POOLINGS = {
    "pixel shuffle, padded (concat_2x2)": (2, "concat", True),
    "concat_3x3": (3, "concat", True),
    "average": (2, "average"),
    "max": (2, "max"),
    "bilinear": (2, "bilinear"),
}


def timed(call: Callable[[], object]) -> float:
    """Median seconds of a call, after one that does not count."""
    call()
    found = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


@torch.no_grad()
def main() -> None:
    """Print the shares."""
    config = compose_config(*SETTINGS, "data.seq_length=1024", "llm.max_positions=4096", "dry_run=true")
    vision = config.vision
    with groups.distributed(config.parallel, config.seed):
        known = description_of(vision)
        encoder = known.frozen(known.build(config, solo_groups()), vision, 1)
        pixels_T3 = torch.randn(TILES, 3, vision.tile_size, vision.tile_size)
        features_TPD = encoder(pixels_T3)
        whole = LAYERS * timed(lambda: encoder(pixels_T3))
        for name, kind in POOLINGS.items():
            part = timed(lambda kind=kind: pooled(features_TPD, *kind))
            print(f"{name}: {part * 1e3:.1f} ms of {whole * 1e3:,.0f} ms: {part / whole:.2%}")


if __name__ == "__main__":
    main()
