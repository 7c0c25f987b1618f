"""The record of what a run read, inputs.json: where each input was and what it held. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nvlm.config.values import problem
from nvlm.runs.files import write_whole
from nvlm.runs.folder import INPUTS


@dataclass(frozen=True, slots=True)
class Identity:
    """What one input was: where it lay, how large it was, and a digest of its content."""

    path: str
    bytes: int
    digest: str
    records: int | None = None

    def same(self, other: Identity) -> bool:
        """Whether the two have the same content, wherever they lie."""
        return (self.bytes, self.digest, self.records) == (other.bytes, other.digest, other.records)


def write(run_dir: Path, inputs: Mapping[str, Identity | None]) -> None:
    """Record what a run begins with."""
    found = {name: asdict(one) for name, one in inputs.items() if one is not None}
    write_whole(run_dir / INPUTS, json.dumps(found, indent=1) + "\n")


def read(run_dir: Path) -> dict[str, Identity]:
    """What the run in `run_dir` began with; empty where it recorded nothing."""
    path = run_dir / INPUTS
    if not path.is_file():
        return {}
    try:
        return {name: Identity(**values) for name, values in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        raise problem(str(path), "a damaged file", "what the run wrote", "restore it, or delete it") from None
