"""Counts what one layer computes: launches of kernels, and passes over memory outside products and attention.

    python benchmarks/launches.py [--out launches.json]

No GPU is needed and nothing is timed. A layer's count is the difference between a model with two such layers and one
with one, forward and, where the layer learns, backward. The layers are those of a GPU: Transformer Engine's Python code
runs on the stand-ins of tests/engine, where each function of its extension is one launch. A function that is compiled
on a GPU, and a norm, is one launch too: it reads its inputs and writes its results once. A pass is as many bytes as the
layer's input has, read or written. Views and allocations are no launches.

Language model: Yi-34B's proportions at a sixteenth of its width, one micro-batch, bf16. Encoder: InternViT-6B's widths,
on the meta device.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks and tests

import torch

from benchmarks.kernel_counts import Count, Counting, bytes_of, kernels_of_a_gpu, once, tensors_in

YI = """llm=yi-34b llm.hidden=448 llm.heads=56 llm.kv_heads=8 llm.head_dim=8 llm.ffn=1280 llm.vocab=344
llm.tokenizer=tiny llm.bos=null vision=tiny parallel=one data=pages data.workers=0 data.records=64 data.seq_length=256
data.row_length=256 train.global_batch=1 train.micro_batch=1 init.llm=null stage=sft evaluate=none precision=bf16
tiling.tag=1d""".split()

ENCODER = "llm=yi-34b arch=decoder parallel=one precision=bf16 init.vision=null dry_run=true".split()


def count_engine() -> None:
    """Each function of the stand-in for Transformer Engine's extension becomes one kernel. Before it is imported."""
    from tests.engine import kernels

    kinds = {"generic_gemm": "products", "fused_attn_fwd": "attention", "fused_attn_bwd": "attention"}
    others = ("install", "get_fused_attn_backend", "create_empty_quantized_tensor")
    for name, value in list(vars(kernels).items()):
        if inspect.isfunction(value) and value.__module__ == kernels.__name__ and name[0] != "_" and name not in others:
            setattr(kernels, name, once(value, kinds.get(name, "other")))


@dataclass(frozen=True, slots=True)
class Row:
    """One layer: what a model with it launches more, and the bytes of its input."""

    layer: str
    count: Count
    input: int

    def line(self) -> dict:
        """For the table."""
        kinds = self.count.launches
        return {
            "layer": self.layer,
            "launches": sum(kinds.values()),
            "products": kinds["products"],
            "attention": kinds["attention"],
            "compiled": kinds["compiled"],
            "other": kinds["other"],
            "passes": round(self.count.bytes / self.input, 1),
        }


def encoder_layer(tiles: int = 4, overrides: tuple[str, ...] = ()) -> Row:
    """A layer of the frozen encoder, forward. Call it inside `nvlm.processes.groups.distributed`."""
    from nvlm.commands.compose import compose_config
    from nvlm.vision.encoders.registry import description_of
    from nvlm.vision.path import solo_groups

    counts = []
    for layers in (1, 2):
        config = compose_config(*ENCODER, *overrides, f"vision.layers={layers}")
        side = config.vision.tile_size
        known = description_of(config.vision)
        with torch.device("meta"), torch.no_grad():
            encoder = known.build(config, solo_groups()).to("meta")
            encoder = known.frozen(encoder, config.vision, 1).eval()
            pixels = torch.empty(tiles, 3, side, side, device="meta")
            with kernels_of_a_gpu(), Counting() as mode:
                encoder(pixels)
        counts.append(mode.count)
    tokens = tiles * ((side // config.vision.patch) ** 2 + 1)
    return Row("encoder, forward", counts[1].minus(counts[0]), 2 * tokens * config.vision.hidden)


def decoder_layers() -> list[Row]:
    """A decoder layer without and with gated cross-attention, forward and backward."""
    plain, bytes_in = _steps("arch=decoder", ("llm.layers=1", "llm.layers=2"))
    cross, _ = _steps("arch=xattn", ("llm.layers=2 arch.cross_every=2", "llm.layers=2 arch.cross_every=1"))
    rows = []
    for number, way in enumerate(("forward", "backward")):
        rows.append(Row(f"decoder, {way}", plain[1][number].minus(plain[0][number]), bytes_in))
        rows.append(Row(f"gated cross-attention, {way}", cross[1][number].minus(cross[0][number]), bytes_in))
    return rows


def _steps(arch: str, cases: tuple[str, ...]) -> tuple[list[tuple[Count, Count]], int]:
    """(forward, backward) of a model in each case, and the bytes of a layer's input."""
    from nvlm.arch.pipeline import build_parts
    from nvlm.commands.compose import compose_config
    from nvlm.data.loader import load_steps
    from nvlm.processes.groups import distributed
    from nvlm.train.loop import build_steps
    from nvlm.train.optim import freeze

    found, seen = [], []
    for case in cases:
        config = compose_config(*YI, arch, *case.split())
        with distributed(config.parallel, config.seed, threads=1):
            (model,) = build_parts(config)
            freeze(model, config)
            first = model.decoder.layers[0]
            first.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
            batch = next(iter(load_steps(build_steps(config), 0, 0))).micro_batches[0]
            batch = batch.with_features(torch.randn(int(batch.tile_tokens.sum()), config.vision.feature_width))
            with kernels_of_a_gpu(), Counting() as forward:
                loss = model.train()(batch).sum()
            with kernels_of_a_gpu(), Counting() as backward:
                loss.backward()
        found.append((forward.count, backward.count))
    return found, next(bytes_of(x) for x in tensors_in(seen))


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Megatron's settings are those of a GPU, wherever they differ."""
    from nvlm.llm import build

    with mock.patch.object(build, "device", SimpleNamespace(has_cuda=lambda: True)):
        yield


def main() -> int:
    """Count, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--names", action="store_true", help="print which operations the last two kinds are")
    options = parser.parse_args()
    from tests.engine import choose

    count_engine()
    choose.prepare(fused_gradients=False)
    from rich.console import Console
    from rich.table import Table

    from nvlm.commands.compose import compose_config
    from nvlm.processes.groups import distributed

    config = compose_config("evaluate=none")
    with distributed(config.parallel, config.seed, threads=1):
        rows = [encoder_layer()]
    with as_on_a_gpu():
        rows += decoder_layers()
    table = Table(*rows[0].line())
    for row in rows:
        table.add_row(*(str(value) for value in row.line().values()))
    console = Console(width=120)
    console.print(table)
    if options.names:
        for row in rows:
            console.print(row.layer, {name: n for name, n in row.count.names.items() if n}, highlight=False)
    if options.out:
        options.out.write_text(json.dumps([row.line() for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
