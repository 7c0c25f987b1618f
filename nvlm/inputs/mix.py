"""mix.json: which records a run draws from which source, for people, and for comparing two runs. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nvlm.data.order import Drawn, Order
from nvlm.runs.files import write_whole
from nvlm.runs.record import Identity

FILE = "mix.json"
_EPOCHS = 3  # whose first records are listed
_VERSION = 1  # of nvlm.data.order: raise it when the same configuration draws other records


def described(order: Order) -> dict:
    """What the order is computed from, as plain values, and the first record of each source's first epochs."""
    return {
        "version": _VERSION,
        "seed": order.seed,
        "global_batch": order.global_batch,
        "mixing": "steps" if order.by_step else "records",
        "sources": {source.name: _source(source, order.seed) for source in order.sources},
    }


def write(run_dir: Path, order: Order, records, found: Mapping[str, Identity]) -> None:
    """Write mix.json: the order, and each source's path, digest and names of the first records of its first epochs."""
    mix = described(order)
    first = 0
    for drawn, one in zip(order.sources, found.values(), strict=True):
        entry = mix["sources"][drawn.name]
        entry |= {"path": one.path, "bytes": one.bytes, "digest": one.digest}
        entry["first"] = [records.name(first + index) for index in entry["first"]]
        first += drawn.records
    write_whole(run_dir / FILE, json.dumps(mix, indent=1) + "\n")


def _source(source: Drawn, seed: int) -> dict:
    first: Sequence[int] = source.index(np.arange(_EPOCHS) * source.used, seed).tolist()
    return {
        "records": source.records,
        "used": source.used,
        "take": source.take,
        "share": source.share,
        "first": first,
    }
