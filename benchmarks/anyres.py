"""What AnyRes costs: cutting off padding, mixing tokens for the cap and ending rows, as a share of a training step.

The step is that of a language model of Qwen2-0.5B's width with two of its 24 layers, without its output layer and
without the encoder, so the share of a whole model's step is smaller. Run: python benchmarks/anyres.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from nvlm.arch.pictures import picture_tokens
from nvlm.arch.pipeline import build_parts
from nvlm.arch.registry import placement_rule
from nvlm.commands.compose import compose_config
from nvlm.data.batch import IMAGE
from nvlm.data.outline import build_processor
from nvlm.data.pack import collate
from nvlm.data.record import Record
from nvlm.data.samples import encode
from nvlm.processes import groups

SIZES = {"384 x 384": (384, 384), "800 x 600": (800, 600), "1920 x 1080, reduced": (1920, 1080)}
SETTINGS = (
    "arch=decoder", "vision=siglip-so400m", "projector=mlp2x_gelu", "tiling=anyres_max_9", "llm.layers=2",
    "llm.hidden=896", "llm.heads=14", "llm.kv_heads=2", "llm.head_dim=64", "llm.ffn=4864", "data.seq_length=9216",
    "llm.max_positions=9216", "precision=fp32", "data.image_marks=false", "dry_run=true", "init.vision=null",
)  # fmt: skip
RUNS = 3


def timed(call: Callable[[], None]) -> float:
    """Median seconds of a call, after one that does not count."""
    call()
    found = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Print the shares."""
    config = compose_config(*SETTINGS)
    processor = build_processor(config, placement_rule("decoder"))
    with groups.distributed(config.parallel, config.seed):
        (model,) = build_parts(config)
        for name, size in SIZES.items():
            picture = Image.fromarray(np.zeros((*size[::-1], 3), dtype=np.uint8))
            turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "yes"}]
            batch = collate([[encode(Record("one", turns, [picture]), processor)]], config.vision.tile_size)
            batch = batch.with_features(torch.randn(int(batch.tile_tokens.sum()), config.vision.feature_width))
            tokens = torch.randn(len(batch.features), config.llm.hidden, requires_grad=True)
            placed = batch.with_features(tokens)
            row_end = torch.randn(config.llm.hidden, requires_grad=True)

            def step(batch=batch) -> None:
                model.zero_grad(set_to_none=True)
                model.hidden(batch).sum().backward()

            def place(placed=placed, row_end=row_end) -> None:
                picture_tokens(placed, placed.stream_rows, lambda x: x, row_end).sum().backward()

            whole, part = timed(step), timed(place)
            count = int((batch.tokens == IMAGE).sum())
            print(f"{name}: {count:,} tokens, {part * 1e3:.0f} ms of {whole * 1e3:,.0f} ms: {part / whole:.1%}")


if __name__ == "__main__":
    main()
