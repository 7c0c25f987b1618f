"""Tokens per second with a key-value cache compared with recomputing the row for each token, on the tiny models.

    python benchmarks/generation.py [--tokens 256] [--rows 1 8] [--repeats 3] [--threads 1] [--precision fp32]

Each prompt is a question about one of the embedded pages. Weights are random and no token ends a row, so that every row
gets all its tokens. Both variants use `continue_rows`, alternate in one process, and must choose the same tokens. The
encoder's time is not counted. Figures are medians over the repeats; "speed-up" is the median over pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time

from nvlm.arch import registry
from nvlm.arch.pipeline import build_parts, build_pipeline
from nvlm.commands import launch
from nvlm.commands.compose import compose_config
from nvlm.config.values import Config
from nvlm.data.batch import Batch
from nvlm.data.messages import first_question
from nvlm.data.outline import build_processor
from nvlm.data.pack import collate
from nvlm.data.samples import encode
from nvlm.data.sources.registry import build_records
from nvlm.generate.decode import continue_rows
from nvlm.generate.sampling import Sampling
from nvlm.processes import groups
from nvlm.vision.path import build_vision

ARCHITECTURES = ("decoder", "xattn", "hybrid")


def prompts(config: Config, rows: int, device) -> Batch:
    """Questions about `rows` pages, with encoded tiles."""
    processor = build_processor(config, registry.placement_rule(config.arch.name), resize="exact")
    records = build_records(config.data, config.seed, heldout=True)
    samples = [encode(first_question(records[row])[0], processor, generate=True) for row in range(rows)]
    batch = collate([[sample] for sample in samples], config.vision.tile_size).to(device)
    with contextlib.redirect_stdout(sys.stderr):  # its progress
        return build_vision(config, device).encode(batch)


def timed(stages, batch: Batch, tokens: int, recompute: bool) -> tuple[float, list[list[int]]]:
    """Seconds, and each row's new tokens."""
    began = time.perf_counter()
    texts = continue_rows(stages, batch, Sampling(max_new_tokens=tokens), (), recompute=recompute)
    return time.perf_counter() - began, texts


def measure(arch: str, rows: int, options: argparse.Namespace) -> tuple[float, float, float, int, int, bool]:
    """Tokens per second recomputed and cached, speed-up, columns and keys of the prompt, and whether both agree."""
    overrides = (f"arch={arch}", f"precision={options.precision}", f"data.heldout_records={rows}")
    config = compose_config(*overrides)
    with groups.distributed(config.parallel, config.seed, options.threads) as device:
        stages = build_pipeline(config, [part.to(device) for part in build_parts(config)])
        batch = prompts(config, rows, device)
        for recompute in (False, True):  # warm up
            timed(stages, batch, 4, recompute)
        pairs, same = [], True
        for _ in range(options.repeats):
            slow, expected = timed(stages, batch, options.tokens, recompute=True)
            fast, got = timed(stages, batch, options.tokens, recompute=False)
            pairs.append((slow, fast))
            same = same and got == expected
    count = rows * options.tokens
    slow, fast = (statistics.median(count / seconds for seconds in column) for column in zip(*pairs, strict=True))
    speed_up = statistics.median(slow / fast for slow, fast in pairs)
    return slow, fast, speed_up, batch.tokens.shape[1], batch.cross_tokens.shape[1], same


def main() -> int:
    """Print the table; returns 1 if the two variants choose different tokens in fp32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    launch.quiet()
    print(f"{options.tokens} new tokens, {options.precision}, {options.threads} threads, medians of {options.repeats}")
    print("| arch | rows | prompt | keys | recomputed tokens/s | cached tokens/s | speed-up | same tokens |")
    print("|---|---|---|---|---|---|---|---|")
    good = True
    for arch in ARCHITECTURES:
        for rows in options.rows:
            slow, fast, speed_up, columns, keys, same = measure(arch, rows, options)
            good &= same or options.precision != "fp32"
            numbers = f"{slow:.1f} | {fast:.1f} | {speed_up:.1f}x"
            print(f"| {arch} | {rows} | {columns} | {keys} | {numbers} | {'yes' if same else 'no'} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
