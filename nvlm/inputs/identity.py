"""Identities, by content, of what a run reads: data, encoder, tokenizer and initial weights. Imports no torch.

They are saved in `inputs.json` in the run folder. A resumed run, the next stage, export and generation compare theirs
with it, so that a file replaced under the same name is detected, and a moved file is accepted. Large files are sampled,
which takes seconds at 100 GB: a change that keeps the size and lies between two samples goes undetected.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nvlm.config.values import Config, problem
from nvlm.data.blend import Blended
from nvlm.data.content import content_digest
from nvlm.data.index.opened import known_digests
from nvlm.data.order import Order
from nvlm.data.remote import Remote
from nvlm.data.sources.registry import Records
from nvlm.data.text.tokenizer import tokenizer_file, tokenizer_of
from nvlm.inputs import mix
from nvlm.inputs.sources import model_source
from nvlm.runs.folder import ENCODER, find_checkpoint
from nvlm.runs.record import Identity, read, write
from nvlm.vision.source import trained_before, trained_encoder, vision_source
from nvlm.weights.published import Source, Stored

_BLENDED = "records."  # before the name of a source of a blend
_PIECE = 1 << 12  # bytes of a tensor, at its start, middle and end


def of_file(path: Path | Remote, records: int | None = None, known: str | None = None, files: int = 1) -> Identity:
    """A file by its size and content (`content_digest`); `records`: how many it has; `known`: the digest of its
    content, if known; `files`: how many files its source has."""
    return Identity(str(path.resolve()), path.stat().st_size, known or content_digest(path, files), records)


def of_tensors(folder: str, stored: Mapping[str, Stored], prefix: str = "") -> Identity:
    """Tensors by name (without `prefix`), dtype, shape and a sample of bytes, however they are split into files."""
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


def of_files(files: Sequence[Path], records: int, known: Mapping[Path, str] | None = None) -> Identity:
    """Several files by names and contents, independent of their folder's path; `known`: digests of their contents."""
    found = [of_file(path, known=(known or {}).get(path), files=len(files)) for path in files]
    names = "".join(f"{path.name} {one.bytes} {one.digest}\n" for path, one in zip(files, found, strict=True))
    folder = str(files[0].resolve().parent)
    return Identity(folder, sum(one.bytes for one in found), hashlib.sha256(names.encode()).hexdigest(), records)


def of_records(config: Config, records: Records) -> dict[str, Identity]:
    """The training records of each source: by their files, or by the first and the last if they are generated.

    A file that an index has seen at the same size and time is not read again.
    """
    known = known_digests(config.data, records)
    if not isinstance(records, Blended):
        return {"records": _of_source_records(records, config.data.source.source, known)}
    parts = config.data.source.sources
    return {
        f"{_BLENDED}{name}": _of_source_records(part, parts[name].source.source, known)
        for name, part in records.parts.items()
    }


def _of_source_records(records: Records, source: str, known: Mapping[Path, str]) -> Identity:
    if len(records.files) == 1:
        return of_file(records.files[0], len(records), known.get(records.files[0]))
    if records.files:
        return of_files(records.files, len(records), known)
    found = hashlib.sha256()
    for record in (records[0], records[len(records) - 1]):
        found.update(json.dumps(record.messages).encode())
        for image in record.images:
            found.update(image)
    return Identity(source, 0, found.hexdigest(), len(records))


def of_encoder(config: Config) -> Identity | None:
    """The published weights of the encoder; if it learned in an earlier stage, those that it began with."""
    if trained_before(config) is None:
        return _of_source(vision_source(config), ["vision"])
    step = find_checkpoint(Path(config.init.checkpoint or ""), "init.checkpoint")
    return read(step.parent.parent).get("encoder")


def of_own_encoder(run_dir: Path) -> Identity | None:
    """The run's file of an encoder that learned in an earlier stage; None if there is none."""
    file = run_dir / ENCODER
    return of_file(file) if file.is_file() else None


def of_tokenizer(config: Config) -> Identity:
    """The run's tokenizer file."""
    return of_file(tokenizer_file(config.llm.tokenizer))


def of_template(config: Config) -> Identity | None:
    """The tokenizer's chat template, and the texts of the tokens that it names; None if the run does not use it."""
    if config.llm.chat != "template":
        return None
    template = tokenizer_of(config.llm).form
    content = json.dumps([template.source, dict(template.values)]).encode()
    return Identity(str(tokenizer_file(config.llm.tokenizer)), len(content), hashlib.sha256(content).hexdigest())


def of_first_weights(config: Config) -> Identity | None:
    """The initial weights of the language model and the new modules; None if they are random."""
    if config.init.checkpoint:
        folder = find_checkpoint(Path(config.init.checkpoint), "init.checkpoint")
        return replace(of_file(folder / "digests.json"), path=str(folder.resolve()))
    source = model_source(config)
    return None if source is None else _of_source(source, [group for group in source.parts if group != "vision"])


def check_model(config: Config, step: Path, key: str = "init.vision", resumed: bool = False) -> None:
    """Raise ConfigError if `config` reads another encoder or tokenizer than the run of the step folder `step`.

    `key`: the setting that names the encoder's folder. `resumed`: this run continues that one, so the message also
    suggests another name for a new run.
    """
    run_dir = step.parent.parent
    before, own = read(run_dir), of_own_encoder(run_dir)
    if own is not None and "own encoder" in before and not before["own encoder"].same(own):
        fix = "the file as the run wrote it, or another checkpoint"
        raise problem(str(run_dir / ENCODER), _told(own), f"what the run wrote ({_told(before['own encoder'])})", fix)
    # What a trained encoder began as is not needed, but may be named.
    if "encoder" in before and (config.init.vision or config.init.release or trained_encoder(step) is None):
        now = _of_source(vision_source(config, key), ["vision"])
        _compare("encoder", before, now, run_dir, "init.release" if config.init.release else key, resumed)
    if "tokenizer" in before and config.llm.tokenizer:
        _compare("tokenizer", before, of_tokenizer(config), run_dir, "llm.tokenizer", resumed)
        if "template" in before and (now := of_template(config)) is not None:
            _compare("template", before, now, run_dir, "llm.tokenizer", resumed)


def check_records(config: Config, run_dir: Path, records: Records, order: Order) -> None:
    """Raise ConfigError if the run in `run_dir` was trained with other records, or drew them in another order."""
    before = read(run_dir)
    if not before:
        return
    found = of_records(config, records)
    for name, now in found.items():
        if name in before:
            key = f"data.sources.{name.removeprefix(_BLENDED)}.path" if name != "records" else "data.path"
            _compare(name, before, now, run_dir, key, resumed=True)
    if "order" not in before or not before["order"].same(of_order(order)):
        got = "a run whose records were drawn in another order, by another version of this trainer"
        fix = f"name=OTHER init.checkpoint={run_dir}, a new run from its weights"
        raise problem(f"resume of {run_dir}", got, "a run of this version", fix)


def of_order(order: Order) -> Identity:
    """The order of the records: what it is computed from, and the first records of the first epochs."""
    found = hashlib.sha256(json.dumps(mix.described(order)).encode()).hexdigest()
    return Identity(mix.FILE, 0, found, sum(source.records for source in order.sources))


def record(config: Config, run_dir: Path, records: Records, order: Order) -> None:
    """Save the identities of a new run's inputs, and its mix of records."""
    found = of_records(config, records)
    mix.write(run_dir, order, records, found)
    inputs = {
        **found,
        "order": of_order(order),
        "encoder": of_encoder(config),
        "own encoder": of_own_encoder(run_dir),
        "tokenizer": of_tokenizer(config),
        "template": of_template(config),
        "weights": of_first_weights(config),
    }
    write(run_dir, inputs)


def _compare(name: str, before: Mapping[str, Identity], now: Identity, run_dir: Path, key: str, resumed: bool) -> None:
    old = before[name]
    if not old.same(now):
        raise problem(
            key,
            f"{now.path} ({_told(now)})",
            f"the {name} that {run_dir} was trained with: {old.path} as it was then ({_told(old)})",
            f"{key}=PATH of that one" + (", or name=OTHER for a new run" if resumed else ""),
        )


def _told(one: Identity) -> str:
    counts = {"records": one.records, "bytes": one.bytes or None}
    told = [f"{count:,} {name}" for name, count in counts.items() if count is not None]
    return ", ".join([*told, f"digest {one.digest[:12]}"])


def _of_source(source: Source, groups: Iterable[str]) -> Identity:
    names = {part.name for group in groups for part in source.parts[group]}
    return of_tensors(source.folder, {name: one for name, one in source.stored.items() if name in names}, source.vision)


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Start and end of each tensor of a safetensors file, in bytes from the start of the file."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    starts = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + length + start, 8 + length + end) for name, (start, end) in starts.items()}
