"""report.json: the numbers of an inspection, for programs."""

from __future__ import annotations

from nvlm.config.values import Config
from nvlm.inspect.charts import quantiles
from nvlm.inspect.count import SPREADS, Tally
from nvlm.inspect.page import Found

VERSION = 1
_SUMS = (
    *("records", "bad", "too_long", "fewer_tiles", "cut", "without_images", "images", "tiles", "tiles_lost"),
    *("text", "learned", "stream", "keys"),
)


def report(config: Config, found: Found) -> dict:
    """The report. Numbers are those of nvlm.inspect.count.Tally; docs/data.md explains them."""
    return {
        "version": VERSION,
        "name": config.name,
        "arch": config.arch.name,
        "tokenizer": config.llm.tokenizer,
        "seq_length": config.data.seq_length,
        "cross_length": config.data.cross_length,
        "max_tiles": config.tiling.max_tiles,
        "tag": config.tiling.tag,
        "sampled": found.sampled,
        "decoded": found.decoded,
        "max_bad": found.max_bad,
        "passed": not found.refused,
        "refused": list(found.refused),
        "sources": {name: _source(tally) for name, tally in found.tallies.items()},
        "step": {
            "replicas": len(found.packed.replicas),
            "rows": len(found.packed.rows),
            "skipped": found.packed.skipped,
            "padding": dict(zip(("text", "keys"), found.packed.padding)),
        },
    }


def _source(tally: Tally) -> dict:
    return {
        **{name: getattr(tally, name) for name in _SUMS},
        "spread": {name: quantiles(tally.spread(name)) for name in SPREADS},
        "grids": {f"{columns}x{rows}": count for (columns, rows), count in sorted(tally.by_grid.items())},
        "reasons": dict(tally.reasons.most_common()),
        "faults": [{"record": name, "reason": reason} for name, reason in tally.faults],
    }
