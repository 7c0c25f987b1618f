"""inputs.json, the record of a run's inputs: their paths and their identities. Imports no torch."""

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
    """Identity of an input: its path, its size and a digest of its content."""

    path: str
    bytes: int
    digest: str
    records: int | None = None

    def same(self, other: Identity) -> bool:
        """Whether the two have the same content, whatever their paths."""
        return (self.bytes, self.digest, self.records) == (other.bytes, other.digest, other.records)


def write(run_dir: Path, inputs: Mapping[str, Identity | None]) -> None:
    """Record the run's inputs."""
    found = {name: asdict(one) for name, one in inputs.items() if one is not None}
    write_whole(run_dir / INPUTS, json.dumps(found, indent=1) + "\n")


def read(run_dir: Path) -> dict[str, Identity]:
    """The inputs that the run in `run_dir` recorded; empty without a record."""
    path = run_dir / INPUTS
    if not path.is_file():
        return {}
    try:
        return {name: Identity(**values) for name, values in json.loads(path.read_text("utf-8")).items()}
    except (ValueError, TypeError, AttributeError):
        raise problem(str(path), "a damaged file", "the file as the run wrote it", "restore it, or delete it") from None
