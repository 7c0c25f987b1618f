"""What a run reads, identified by content: its data, encoder, tokenizer and first weights. Imports no torch.

`inputs.json` in the run folder has the identities. A resume, the next stage, export and generation compare theirs with
it, so that a file that was replaced under the same name is noticed, and one that was only moved is not. Large files are
sampled, which takes seconds at 100 GB: a change that keeps a large file's size may escape where it is smaller than the
distance of two samples.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nvlm.config import Config, problem
from nvlm.data.tokenizer import tokenizer_file
from nvlm.files import write_whole
from nvlm.weights.published import Stored
from nvlm.weights.sources import VISION, Source, model_source, vision_source

INPUTS = "inputs.json"
_WHOLE = 1 << 26  # bytes: smaller files are read whole
_BLOCK = 1 << 16  # bytes
_BLOCKS = 64  # of a larger file, evenly spaced, first and last included
_PIECE = 1 << 12  # bytes of a tensor, at its start, middle and end


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


def of_file(path: Path, records: int | None = None) -> Identity:
    """A file by its size and its bytes, sampled where it is larger than 64 MiB; `records`: how many it holds."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256") if size <= _WHOLE else _sampled(file, size)
    return Identity(str(path.resolve()), size, found.hexdigest(), records)


def of_tensors(folder: str, stored: Mapping[str, Stored], prefix: str = "") -> Identity:
    """Tensors by name (without `prefix`), type, shape and a sample of their bytes, however they are cut into files."""
    found, total = hashlib.sha256(), 0
    places = {file: _places(file) for file in {one.file for one in stored.values()}}
    for name, one in sorted(stored.items()):
        start, end = places[one.file][name]
        found.update(f"{name.removeprefix(prefix)} {one.dtype} {one.shape}\n".encode())
        with open(one.file, "rb") as file:
            for at in (start, (start + end - _PIECE) // 2, end - _PIECE):
                file.seek(max(start, at))
                found.update(file.read(min(_PIECE, end - start)))
        total += end - start
    return Identity(str(Path(folder).resolve()), total, found.hexdigest())


def of_encoder(config: Config) -> Identity:
    """The frozen encoder's published weights."""
    return _of_source(vision_source(config), ["vision"])


def of_tokenizer(config: Config) -> Identity:
    """The run's tokenizer file."""
    return of_file(tokenizer_file(config.llm.tokenizer))


def of_first_weights(config: Config) -> Identity | None:
    """What the language model and the new modules begin with; None: random numbers, or a checkpoint."""
    source = model_source(config)
    return None if source is None else _of_source(source, [group for group in source.parts if group != "vision"])


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


def compare(run_dir: Path, now: Mapping[str, Identity], settings: Mapping[str, str]) -> None:
    """Raise ConfigError where an input is `now` another than the run in `run_dir` recorded; `settings` names the key
    that each comes from."""
    before = read(run_dir)
    for name, one in now.items():
        if name in before and not before[name].same(one):
            old = before[name]
            raise problem(
                settings[name],
                f"{one.path} ({_told(one)})",
                f"the {name} that {run_dir} was trained with: {old.path} as it was then ({_told(old)})",
                f"put it back, {settings[name]}=PATH where it lies elsewhere, or begin another run with name=OTHER",
            )


def _told(one: Identity) -> str:
    records = "" if one.records is None else f"{one.records:,} records, "
    return f"{records}{one.bytes:,} bytes, digest {one.digest[:12]}"


def _of_source(source: Source, groups: Iterable[str]) -> Identity:
    names = {part.name for group in groups for part in source.parts[group]}
    return of_tensors(source.folder, {name: one for name, one in source.stored.items() if name in names}, VISION)


def _sampled(file, size: int):
    found = hashlib.sha256()
    for number in range(_BLOCKS):
        file.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
        found.update(file.read(_BLOCK))
    return found


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file begins and ends, bytes from the file's start."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    starts = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + length + start, 8 + length + end) for name, (start, end) in starts.items()}
