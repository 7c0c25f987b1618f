"""What a run draws: samples, tokens at most, and the part of each source. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from nvlm.config.data import Blend, Generated
from nvlm.config.values import Config
from nvlm.data.blend import Blended, shares_of
from nvlm.data.index.files import read_meta
from nvlm.data.index.opened import folder_name
from nvlm.data.order import taken
from nvlm.data.record import Record
from nvlm.data.sources.registry import named_sources


@dataclass(frozen=True, slots=True)
class Part:
    """A source's part of a run: its share of the samples, how many these are, and how often that is each of its
    records. None: not known without its number of records."""

    name: str
    share: float | None
    samples: float | None
    epochs: float | None


def counts_of(records: Sequence[Record], config: Config) -> dict[str, int]:
    """The number of records of each source of `config`, whose training records are `records`."""
    if isinstance(records, Blended):
        return {name: len(part) for name, part in records.parts.items()}
    return {config.data.source.source: len(records)}


def known_counts(config: Config) -> dict[str, int]:
    """The numbers of records that are known without reading any: of the built-in pages, and from data.index."""
    known = {name: one.records for name, one in _sources(config).items() if isinstance(one, Generated)}
    if config.data.index:
        folder = Path(config.data.index)
        for name in named_sources(config.data.source):
            with contextlib.suppress(OSError, ValueError):  # there is none yet, or a run will refuse it
                known[name or config.data.source.source] = read_meta(folder / folder_name(name)).records
    return known


def parts_of(config: Config, counts: Mapping[str, int]) -> list[Part]:
    """The part of each source. `counts`: the numbers of records, as far as they are known."""
    samples = config.train.steps * config.train.global_batch
    shares = _shares(config, counts)
    return [
        _part(name, shares.get(name), samples, _used(one, counts.get(name))) for name, one in _sources(config).items()
    ]


def told(config: Config, counts: Mapping[str, int]) -> Iterator[str | Table]:
    """What to print about the samples of a run, as text and tables of rich."""
    steps, batch, length = config.train.steps, config.train.global_batch, config.data.seq_length
    samples, parts = steps * batch, parts_of(config, counts)
    line = (
        f"{steps:,} steps x {batch:,} = {samples:,} samples of at most {length:,} tokens: {samples * length:,} tokens"
    )
    if len(parts) > 1:
        yield line
        yield _table(parts) if parts[0].share is not None else _UNCOUNTED
    else:
        yield line + "".join(f"; {part.epochs:.2f} epochs of {part.name}" for part in parts if part.epochs is not None)


_UNCOUNTED = "shares of the sources: by their numbers of records and epochs, which are counted when the run starts"


def _table(parts: Sequence[Part]) -> Table:
    table = Table(title="samples by source", title_justify="left")
    for heading, justify in (("source", "left"), ("share", "right"), ("samples", "right"), ("epochs", "right")):
        table.add_column(heading, justify=justify)
    for part in parts:
        values = ((part.share, "{:.2%}"), (part.samples, "{:,.0f}"), (part.epochs, "{:.2f}"))
        table.add_row(part.name, *("-" if value is None else form.format(value) for value, form in values))
    return table


def _sources(config: Config) -> dict[str, object]:
    source = config.data.source
    if isinstance(source, Blend):
        return {name: part.source for name, part in (source.sources or {}).items()}
    return {source.source: source}


def _shares(config: Config, counts: Mapping[str, int]) -> dict[str, float]:
    """The share of each source; empty if they depend on counts that are not known."""
    blend = config.data.source
    if not isinstance(blend, Blend):
        return {blend.source: 1.0}
    by_size = any(part.epochs for part in blend.sources.values())
    return {} if by_size and counts.keys() < blend.sources.keys() else shares_of(blend, counts)


def _used(source: object, count: int | None) -> int | None:
    return None if count is None else taken(getattr(source, "take", "all"), count)


def _part(name: str, share: float | None, samples: int, used: int | None) -> Part:
    drawn = None if share is None else share * samples
    return Part(name, share, drawn, drawn / used if used and drawn is not None else None)
