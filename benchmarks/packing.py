"""Fill of packed rows, for text and cross-attended keys: windows of steps compared with first fit and no packing.

    python benchmarks/packing.py [--window 8] [--global-batch 256] [--micro-batch 8] [--multiple 2]

Fill: real tokens / positions computed. A row is padded to the longest of its micro-batch, rounded up to a multiple of
8, as in `collate`. Rows hold up to `multiple` times the longest sample (data.seq_length) and `multiple` times
data.cross_length keys. Two mixes: the embedded pages with the tiny presets, measured by the loader; and records of
log-normal text with 0 to 6 image tiles in the sizes of the 72B presets (256 tokens per tile).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nvlm.arch.registry import placement_rule
from nvlm.commands.compose import compose_config
from nvlm.data.loader import Steps
from nvlm.data.order import Drawn, Order
from nvlm.data.outline import build_processor, outline
from nvlm.data.pack import deal, pack
from nvlm.data.sources.registry import build_records
from nvlm.estimate.lengths import image_tokens
from nvlm.tiling.grid import TilePlan

ARCHITECTURES = ("decoder", "xattn", "hybrid")
ROUND = 8  # tokens
TILES = (0.3, 0.1, 0.15, 0.1, 0.1, 0.1, 0.15)  # shares of records with 0, 1, 2, ... 6 tiles

Length = tuple[int, int]  # text tokens, cross-attended tokens
MicroBatch = Sequence[Length]  # of each row


@dataclass(frozen=True, slots=True)
class Mix:
    """Samples in order, and the budgets of a row."""

    name: str
    lengths: list[Length]
    row_length: int
    cross_length: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Settings shared by all rows of the table."""

    window: int
    global_batch: int
    micro_batch: int
    multiple: int

    @property
    def samples(self) -> int:
        """Of a window."""
        return self.window * self.global_batch


def pages(arch: str, shape: Shape) -> tuple[Mix, float]:
    """Three windows of embedded pages, and the CPU seconds that measuring one record took."""
    config = compose_config(f"arch={arch}")
    processor, records = build_processor(config, placement_rule(arch)), build_records(config.data, config.seed)
    count = min(3 * shape.samples, len(records) // shape.samples * shape.samples)
    start = time.process_time()
    lengths = [outline(records[i], processor).lengths for i in range(count)]
    seconds = (time.process_time() - start) / count
    rows = shape.multiple * config.data.seq_length, shape.multiple * config.data.cross_length
    return Mix(f"pages, {arch}", lengths, *rows), seconds


def synthetic(arch: str, shape: Shape) -> Mix:
    """Three windows of records with a long tail, cut to data.seq_length."""
    config = compose_config(f"arch={arch}", "llm=qwen2-72b", "dry_run=true")
    rng = np.random.default_rng(0)
    count = 3 * shape.samples
    texts = rng.lognormal(5, 1, count).astype(int) + 20
    images = [(0, 0), *(image_tokens(config, TilePlan(n, 1)) for n in range(1, 7))]
    drawn = [images[n] for n in rng.choice(7, count, p=TILES)]
    lengths = [
        (min(int(t) + stream, config.data.seq_length), keys) for t, (stream, keys) in zip(texts, drawn, strict=True)
    ]
    rows = shape.multiple * config.data.seq_length, shape.multiple * config.data.cross_length
    return Mix(f"long tail, {arch}", lengths, *rows)


def total(lengths: Sequence[Length], row: Sequence[int]) -> Length:
    """Tokens of a row."""
    return sum(lengths[i][0] for i in row), sum(lengths[i][1] for i in row)


def chunks(rows: Sequence[Length], size: int) -> list[MicroBatch]:
    """Micro-batches of rows, in order."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def windows(mix: Mix, samples: int) -> Iterator[list[Length]]:
    """The samples of the mix, in groups of a window."""
    return (mix.lengths[i : i + samples] for i in range(0, len(mix.lengths), samples))


def unpacked(mix: Mix, shape: Shape) -> list[MicroBatch]:
    """One sample per row."""
    return chunks(mix.lengths, shape.micro_batch)


def first_fit(mix: Mix, shape: Shape) -> list[MicroBatch]:
    """Put each sample, in order, into the first row with room; all rows of a window stay open."""
    batches = []
    for lengths in windows(mix, shape.samples):
        rows: list[list[int]] = []
        for text, keys in lengths:
            for row in rows:
                if row[0] + text <= mix.row_length and row[1] + keys <= mix.cross_length:
                    break
            else:
                rows.append(row := [0, 0])
            row[0], row[1] = row[0] + text, row[1] + keys
        batches += chunks([(text, keys) for text, keys in rows], shape.micro_batch)
    return batches


def ours(mix: Mix, shape: Shape, window: int) -> list[MicroBatch]:
    """Packed and dealt as `nvlm.data.loader` does."""
    batches = []
    for number, lengths in enumerate(windows(mix, window * shape.global_batch)):
        rows = [total(lengths, row) for row in pack(lengths, mix.row_length, mix.cross_length, at_least=window)]
        for hand in deal(rows, window, (0, number, window)):
            batches += chunks(hand, shape.micro_batch)
    return batches


def computed(batches: Sequence[MicroBatch], which: int) -> int:
    """Positions of the text stream (0) or of the keys (1), including padding."""
    longest = [max(row[which] for row in batch) for batch in batches]
    return sum(len(batch) * max(-(-most // ROUND), 1) * ROUND for batch, most in zip(batches, longest, strict=True))


def fills(batches: Sequence[MicroBatch]) -> str:
    """Text fill, key fill (if there are keys) and number of rows."""
    real = [sum(row[which] for batch in batches for row in batch) for which in (0, 1)]
    keys = f"{real[1] / computed(batches, 1):7.1%}" if real[1] else "      -"
    return f"{real[0] / computed(batches, 0):8.1%}{keys}{sum(map(len, batches)):6}"


def line(mix: Mix, shape: Shape) -> str:
    """One line of the table."""
    text, keys = (sum(length[which] for length in mix.lengths) for which in (0, 1))
    by_text, by_keys = text / mix.row_length, keys / max(mix.cross_length, 1)
    binds = "keys" if by_keys > by_text else "text"
    start = time.process_time()
    batches = ours(mix, shape, shape.window)
    rate = len(mix.lengths) / (time.process_time() - start)
    cells = [unpacked(mix, shape), first_fit(mix, shape), ours(mix, shape, 1), batches]
    budgets = f"{mix.row_length:6}/{mix.cross_length:<5}"
    most = f"{max(by_text, by_keys):7.0f}"
    return f"{mix.name:19}{budgets}{binds:>6}" + "".join(map(fills, cells)) + f"{most}{rate:10,.0f}"


def check() -> None:
    """Fail unless the loader's batches have the number of positions that this file computes."""
    config, shape = compose_config("arch=hybrid"), Shape(window=2, global_batch=32, micro_batch=3, multiple=1)
    processor, records = build_processor(config, placement_rule("hybrid")), build_records(config.data, config.seed)
    order = Order(0, 32, (Drawn("", len(records)),))
    steps = Steps(records, processor, order, 2, 3, 500, 0, 1, multiple=ROUND, window=2)
    drawn = [i for step in range(2) for i in order.step(step)]
    lengths = [outline(records[i], processor).lengths for i in drawn]
    want = ours(Mix("", lengths, 500, config.data.cross_length), shape, 2)
    got = [batch for step in range(2) for batch in steps[step].micro_batches]
    assert sum(batch.tokens.numel() for batch in got) == computed(want, 0)
    assert sum(batch.cross_tokens.numel() for batch in got) == computed(want, 1)


def main() -> None:
    """Check, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("window", 8), ("global-batch", 256), ("micro-batch", 8), ("multiple", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    shape = Shape(**vars(parser.parse_args()))
    check()
    strategies = ("one sample a row", "first fit", "a step by itself", f"window of {shape.window}")
    head = f"{'fill of text, of keys; rows':19}{'row':>5}{'binds':>6}" + "".join(f"{s:>21}" for s in strategies)
    sys.stdout.write(head + "  least samples/s\n")
    seconds = []
    for arch in ARCHITECTURES:
        mix, cost = pages(arch, shape)
        seconds.append(cost)
        sys.stdout.write(line(mix, shape) + "\n")
    for arch in ARCHITECTURES:
        sys.stdout.write(line(synthetic(arch, shape), shape) + "\n")
    sys.stdout.write(
        f"Windows of {shape.window} steps of {shape.global_batch} samples, micro-batches of {shape.micro_batch} rows, "
        f"rows of {shape.multiple} x seq_length/cross_length.\nrow: its budgets in text tokens/keys; binds: the one "
        f"that fills first; least: rows that its total needs; first fit: as samples come.\nLengths of a page, "
        f"without pixels: {1e3 * sum(seconds) / len(seconds):.2f} ms; times are of one CPU.\n"
    )


if __name__ == "__main__":
    main()
