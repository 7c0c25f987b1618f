"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace

from rich.console import Console
from rich.table import Table

from nvlm.attention.choice import kernels_of
from nvlm.config.values import Config
from nvlm.estimate import memory as need
from nvlm.estimate import pace
from nvlm.estimate.best import waiting
from nvlm.estimate.layouts import Option, Plan, best_by_cut, name, overrides
from nvlm.estimate.memory import GiB, Memory, gib, rank_memory
from nvlm.estimate.speed import PARTS

_RECOMPUTES = ("none", "selective", "full")


def print_plan(found: Plan, config: Config, top: int) -> None:
    """Print the fastest `top` layouts with memory and time, and why the others are refused."""
    console = Console(width=132)
    shown = best_by_cut(found.fitting)[:top]
    console.print(_sample(found, config), highlight=False)
    if shown:
        console.print(_table("layouts, by predicted samples a second", shown, _ranking(found)))
        console.print(_table("memory of the GPU that needs most, GiB (without recompute, MLPs alone, whole layers)",
                             shown, _memory(found)))  # fmt: skip
        console.print(_table("seconds of a step (GB that a GPU sends)", shown, _times()))
        first = shown[0]
        console.print(f"1 in words: {overrides(first.config, first.replicas)}", highlight=False)
        if waits := waiting(first):
            console.print(waits, highlight=False)
    elif found.nearest:
        near, over = found.nearest, found.nearest.memory.total - found.gpu.memory
        console.print(
            f"Nothing fits {found.gpus} GPUs. Nearest: {name(near.config)}, recompute {near.config.train.recompute}, "
            f"{gib(near.memory.total)}, {gib(over)} too much ({near.memory.parts}).",
            highlight=False,
        )
    else:
        console.print("No layout is allowed.", highlight=False)
    for refusal in found.refused:
        count = len(refusal.layouts)
        which = refusal.layouts[0] if count == 1 else f"{count} layouts like {refusal.layouts[0]}"
        console.print(f"refused: {refusal.reason} ({which})", highlight=False, soft_wrap=True)
    console.print(_assumptions(config), highlight=False)


def as_json(found: Plan) -> dict:
    """The whole plan as plain values."""
    return {
        "gpus": found.gpus,
        "gpu": asdict(found.gpu),
        "layouts": [_plain(option, found) for option in found.fitting],
        "refused": [asdict(refusal) for refusal in found.refused],
    }


def _plain(option: Option, found: Plan) -> dict:
    return {
        "overrides": overrides(option.config, option.replicas),
        "micro_batches": option.load.micro_batches,
        "memory": asdict(option.memory) | {"total": option.memory.total},
        "bubble": option.bubble,
        "seconds": asdict(option.speed) | {"step": option.speed.step},
        "samples_per_second": option.samples_per_second,
        "mfu": option.mfu(found.gpu),
    }


def _table(title: str, options: Sequence[Option], columns: dict[str, Callable[[Option], str]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", justify="right")
    for heading in columns:
        table.add_column(heading, justify="left" if heading in ("layout", "recompute") else "right")
    for number, option in enumerate(options, 1):
        table.add_row(str(number), *(show(option) for show in columns.values()))
    return table


def _ranking(found: Plan) -> dict[str, Callable[[Option], str]]:
    return {
        "layout": lambda o: name(o.config),
        "replicas": lambda o: str(o.replicas),
        "micro-batches": lambda o: str(o.load.micro_batches),
        "recompute": lambda o: o.config.train.recompute,
        "memory": lambda o: gib(o.memory.total),
        "bubble": lambda o: f"{o.bubble:.1%}",
        "PFLOP a step": lambda o: f"{o.speed.flops / 1e15:,.0f}",
        "step, s": lambda o: f"{o.speed.step:.2f}",
        "samples/s": lambda o: f"{o.samples_per_second:.1f}",
        "MFU": lambda o: f"{o.mfu(found.gpu):.0%}",
    }


def _memory(found: Plan) -> dict[str, Callable[[Option], str]]:
    def part(key: str) -> Callable[[Option], str]:
        return lambda o: f"{getattr(o.memory, key) / GiB:.1f}"

    columns = {field.name: part(field.name) for field in fields(Memory)}
    columns["activations"] = lambda o: " / ".join(f"{kept / GiB:.1f}" for kept in _by_recompute(o))
    return columns | {"total": lambda o: f"{o.memory.total / GiB:.1f}"}


def _by_recompute(option: Option) -> list[float]:
    """Saved activations of the option for each kind of recomputation, on the GPU that saves most."""
    config, found = option.config, []
    for recompute in _RECOMPUTES:
        other = replace(config, train=replace(config.train, recompute=recompute, offload=False))
        ranks = range(config.parallel.pipeline)
        found.append(max(rank_memory(other, option.replicas, rank, option.load).activations for rank in ranks))
    return found


def _times() -> dict[str, Callable[[Option], str]]:
    def part(key: str) -> Callable[[Option], str]:
        def show(option: Option) -> str:
            sent = getattr(option.speed.traffic, key, None)
            return f"{getattr(option.speed, key):.2f}" + (f" ({sent / 1e9:,.1f})" if sent else "")

        return show

    return {name: part(name) for name in PARTS}


def _sample(found: Plan, config: Config) -> str:
    options = found.fitting or ((found.nearest,) if found.nearest else ())
    if not options:
        return f"{config.name}: {found.gpus} GPUs"
    load = options[0].load
    work, each = load.work, load.rows
    return (
        f"{config.name}: {found.gpus} GPUs of {gib(found.gpu.memory)}, precision {config.precision.name}, "
        f"{config.train.global_batch} samples a step. A row: {work.tokens // each:,} tokens "
        f"({work.outputs // each:,} with a label), {work.tiles // each} tiles, {work.keys // each:,} keys"
    )


def _assumptions(config: Config) -> str:
    engine = "Transformer Engine's kernels" if kernels_of(config).fused_norm else "Megatron's and torch's kernels"
    return (
        f"Assumed: all samples are like this one; {engine}; {gib(need.OUTSIDE)} per GPU outside torch's allocator, and "
        f"{need.FRAGMENTED:.0%} of temporary memory lost to fragmentation. Share of peak: matrix products up to "
        f"{pace.PRODUCTS:.0%} (FP8 {pace.FP8_PRODUCTS:.0%}), less for few tokens and narrow slices; attention up to "
        f"{pace.SCORES:.0%}, encoder {pace.ENCODER:.0%} (FP8 {pace.FP8_ENCODER:.0%}), links {pace.LINKS:.0%}, network "
        f"{pace.NETWORK:.0%}, {1e6 * pace.LATENCY:.0f} us a message. The host launches a layer's kernels in "
        f"{1e3 * pace.HOST_LAYER:.1f} to {1e3 * (pace.HOST_LAYER + pace.HOST_TENSOR):.1f} ms and those of gated "
        f"cross-attention in {1e3 * pace.HOST_CROSS:.1f} ms. MFU does not count recomputation. These are predictions, "
        f"not measurements."
    )
