"""Prints what a configuration consists of, without memory, data or weights: nothing is built."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from nvlm.config.data import Blend
from nvlm.config.hardware import GPUS
from nvlm.config.rules import without_path
from nvlm.config.tiles import tiling_of
from nvlm.config.values import Config, cross_layers
from nvlm.estimate.lengths import image_tokens, plan_of
from nvlm.estimate.memory import gib, memory
from nvlm.estimate.parameters import parameters
from nvlm.inputs.drawn import known_counts, told
from nvlm.inputs.sources import model_source
from nvlm.vision.encoders.registry import description_of
from nvlm.vision.source import vision_source
from nvlm.weights.published import Source


def dry_run(config: Config) -> None:
    """Print parameters by module group, tokens per image, layers with cross-attention, the layout, and samples."""
    console = Console(width=100)
    console.print(f"[bold]{config.name}[/]  {config.arch.name}, {config.llm.name}, {config.vision.name}")
    console.print(_parameters(config))
    console.print(_tokens(config))
    layers = cross_layers(config)
    console.print(
        f"gated cross-attention: {f'{len(layers)} layers: ' + ', '.join(map(str, layers)) if layers else 'none'}"
    )
    for source in _sources(config):
        names = {part.name for parts in source.parts.values() for part in parts}
        size = sum(source.stored[name].bytes for name in names)
        console.print(
            f"{source.key}={source.folder}: {len(names):,} tensors of {', '.join(source.parts)}, {size / 1e9:.2f} GB, "
            f"with the expected names, shapes and dtypes"
        )
    p = config.parallel
    console.print(
        f"layout: tensor {p.tensor} x pipeline {p.pipeline} x context {p.context} = {p.replica} processes a replica; "
        f"text stream {config.data.seq_length} tokens, cross-attended {config.data.cross_length}"
    )
    if config.gpu:
        console.print(_memory(config))
    for one in told(config, known_counts(config)):
        console.print(one)
    if isinstance(config.data.source, Blend) and (lacking := without_path(config.data.source)):
        console.print(f"sources without a path, which a run needs: {', '.join(lacking)}")


def _memory(config: Config) -> str:
    replicas = config.parallel.data
    needed = memory(config, replicas)
    return (
        f"memory: {gib(needed.total)} of {gib(GPUS[config.gpu].memory)} on the fullest of "
        f"{replicas * config.parallel.replica} {config.gpu}, every row full, every sample with an image of "
        f"{config.tiling.max_tiles} tiles ({needed.parts})"
    )


def _sources(config: Config) -> list[Source]:
    """The folders that config.init names, already checked, without the encoder that ships with the package."""
    named = config.init.vision is not None and config.init.vision not in description_of(config.vision).shipped
    found = [vision_source(config)] if named else []
    return found + list(filter(None, [model_source(config)]))


def _parameters(config: Config) -> Table:
    table = Table(title=f"parameters, stage {config.stage.name}", title_justify="left")
    table.add_column("module group")
    table.add_column("parameters", justify="right")
    table.add_column("in training")
    counts = parameters(config)
    for name, count in counts.items():
        known = {0: "frozen", count.all: "trainable"}
        learns = known.get(count.learning, f"{count.learning:,} in adapters") if count.all else "-"
        table.add_row(name, f"{count.all:,}", learns)
    table.add_section()
    learning = sum(count.learning for count in counts.values())
    table.add_row("total", f"{sum(count.all for count in counts.values()):,}", f"{learning:,} trainable")
    return table


def _tokens(config: Config) -> Table:
    tag_style, per_tile = config.tiling.tag, config.vision.tile_tokens
    patches = description_of(config.vision).modules(config.vision).patches
    table = Table(title=f"tokens per image, {per_tile} a tile, tags: {tag_style}", title_justify="left")
    whole = "thumbnail" if config.tiling.kind == "dhr" else "whole"
    for heading in ("tiles", "text stream", "cross-attended", "encoder"):
        table.add_column(heading, justify="right")
    tiling = tiling_of(config.tiling, config.vision)
    for plan in dict.fromkeys(tiling.of(tiles) for tiles in tiling.counts(config.tiling.max_tiles)):
        stream, cross = image_tokens(config, plan)
        name = f"{plan.num_regular} + {whole}" if plan.num_regular else "1"
        table.add_row(name, f"{stream:,}", f"{cross:,}", f"{plan.num_tiles} x {patches}")
    film = plan_of(config, 0, config.video.frames)
    stream, cross = image_tokens(config, film)
    table.add_row(f"video, {film.frames} frames", f"{stream:,}", f"{cross:,}", f"{film.num_tiles} x {patches}")
    if tag_style != "none" and config.llm.tokenizer is None:
        table.caption = f"each tag counted as {config.llm.tag_tokens} tokens; llm.tokenizer=DIR counts exactly"
    return table
