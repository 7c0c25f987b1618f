"""Exports a checkpoint to a folder in NVLM-D-72B's layout: safetensors, config.json, tokenizer, modelling code.

Works tensor by tensor, on CPU, for any parallel layout. The folder gets its final name when it is complete.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import safe_open
from torch import Tensor

from nvlm.arch.registry import description
from nvlm.config.rules import validate
from nvlm.config.values import Config, ConfigError, InitConfig, problem
from nvlm.export.describe import describe, exported_encoder, preprocessor
from nvlm.export.options import ExportOptions
from nvlm.export.readback import check_readable
from nvlm.export.readme import note, readme
from nvlm.export.shards import DTYPES, Planned, ShardWriter
from nvlm.export.text import exported_text
from nvlm.export.trained import TrainedWeights
from nvlm.inputs.identity import check_model
from nvlm.inputs.sources import whole_model
from nvlm.runs.digests import checkpoint_faults, frozen_digest, own_faults
from nvlm.runs.folder import FROZEN, find_checkpoint, read_run_config
from nvlm.vision.encoders.interface import ExportedEncoder
from nvlm.vision.source import vision_source
from nvlm.weights.parts import Part, shapes
from nvlm.weights.published import VISION, Source, Stored, read_headers

CODE = Path(__file__).with_name("modeling_nvlm.py")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def export(options: ExportOptions, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Write the folder `options.out` and return it. Raises ConfigError, and then leaves no folder.

    `tell` is called with a line about who can load the folder.
    """
    out = Path(options.out)
    if os.path.lexists(out):
        raise problem("out", f"{out}, which exists", "a new folder", "out=OTHER, or delete it")
    step = find_checkpoint(Path(options.checkpoint), "checkpoint")
    before = read_run_config(step)
    config, code = _at_hand(before, step, options), _release_code(before)
    _refuse(step, checkpoint_faults(step, functools.partial(own_faults, tensors=False)))
    folders = [step] if frozen_digest(step) is None else [step, step.parent / FROZEN]
    exported_text(config)  # raises before anything is written
    check_model(config, step, "vision")
    weights, vision = TrainedWeights(folders, config.peft.scale), vision_source(config, "vision")
    encoder = exported_encoder(config, vision)
    parts = whole_model(config, encoder.parts)
    _check(weights, parts, step)
    like = read_headers(options.like, "like") if options.like else {}
    if like and not any(part.name in like for part in parts):
        raise problem(
            f"like={options.like}", f"no {parts[0].name}", "a folder in the exported layout", "leave like out"
        )
    parts.sort(key=lambda part: () if part.name.startswith(VISION) else weights.place(part.ours))
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        # The checkpoint is verified while the export is written; both read the files in the same order, so the disk is
        # read once. If a file is damaged, the export never gets its final name.
        with ThreadPoolExecutor(1) as beside:
            wrong = beside.submit(checkpoint_faults, step, own_faults)
            try:
                _write(partial, config, weights, vision, parts, options, like)
                _describe(partial, config, encoder, code)
            finally:  # also if writing failed because a file is damaged
                _refuse(step, wrong.result())
        check_readable(partial, config, out)
        partial.rename(out)
    except OSError as error:
        raise _refused(out, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if line := note(config, encoder):
        tell(line)
    return out


def _refused(out: Path, error: OSError) -> ConfigError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return problem(f"out={out}", str(error), "a place to write to, and files to read", "out=OTHER")
    free = shutil.disk_usage(out.parent if out.parent.exists() else Path.cwd()).free
    return problem(f"out={out}", f"{error.strerror}; {free / 1e9:.1f} GB free", "room for it", "make room")


def _at_hand(config: Config, step: Path, options: ExportOptions) -> Config:
    """The run's configuration, with the encoder at the recorded path or the one in `options`."""
    config = replace(config, init=InitConfig(llm=None, vision=options.vision, release=None, checkpoint=str(step)))
    if options.tokenizer:
        config = replace(config, llm=replace(config.llm, tokenizer=options.tokenizer))
    return validate(config)


def _refuse(step: Path, wrong: Sequence[str]) -> None:
    if wrong:
        raise problem(f"checkpoint {step}", "; ".join(wrong), "the files as they were written", "take another one")


def _check(weights: TrainedWeights, parts: Sequence[Part], step: Path) -> None:
    wanted = [part.ours for part in parts if not part.name.startswith(VISION)]
    if lost := [name for name in dict.fromkeys(wanted) if name not in weights]:
        what = f"no {', '.join(lost[:4])}" + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        raise problem(f"checkpoint {step}", what, "the model that its config.yaml describes", "take another one")


def _write(
    folder: Path,
    config: Config,
    weights: TrainedWeights,
    vision: Source,
    parts: Sequence[Part],
    options: ExportOptions,
    like: Mapping[str, Stored],
) -> None:
    dtypes = {part.name: _NAMES[weights.dtype(part.ours)] for part in parts if not part.name.startswith(VISION)}
    dtypes |= {part.name: vision.stored[own.name].dtype for part, own in _vision_pairs(parts, vision)}
    dtypes |= {name: one.dtype for name, one in like.items() if name in dtypes and one.dtype in DTYPES}
    planned = [Planned(name, dtypes[name], shape) for name, shape in shapes(parts).items()]
    columns = (BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("export"))
    with Progress(*columns) as progress, ShardWriter(folder, planned, int(options.shard_gb * 1e9)) as writer:
        task = progress.add_task("export", total=sum(one.bytes for one in planned))
        for name, tensor in _tensors(parts, weights, vision):
            writer.write(name, tensor.to(DTYPES[dtypes[name]]))
            progress.advance(task, tensor.nbytes)


def _tensors(parts: Sequence[Part], weights: TrainedWeights, vision: Source) -> Iterator[tuple[str, Tensor]]:
    """Every published tensor, unsplit, in the order of `parts`."""
    by_name: dict[str, list[Part]] = {}
    for part in parts:
        by_name.setdefault(part.name, []).append(part)
    pairs: dict[str, list[tuple[Part, Part]]] = {}
    for part, own in _vision_pairs(parts, vision):
        pairs.setdefault(part.name, []).append((part, own))
    for name, some in by_name.items():
        if name in pairs:
            yield name, _of_encoder(pairs[name], vision)
        else:
            [part] = some
            yield name, part.target(weights.read(part.ours)).reshape(part.shape)


def _vision_pairs(parts: Sequence[Part], vision: Source) -> Iterator[tuple[Part, Part]]:
    """Pairs of the encoder's parts: as written, and as read."""
    written = (part for part in parts if part.name.startswith(VISION))
    return zip(written, vision.parts["vision"], strict=True)


def _of_encoder(pairs: Sequence[tuple[Part, Part]], vision: Source) -> Tensor:
    """A tensor of the frozen encoder, from its original file and in its original precision."""
    part, own = pairs[0]
    with safe_open(vision.stored[own.name].file, framework="pt") as opened:
        if part.shape == own.shape:
            return opened.get_tensor(own.name)
        whole = opened.get_tensor(own.name)
    out = whole.new_zeros(part.shape)
    for part, own in pairs:
        out[part.extent] = whole[own.extent]
    return out


def _describe(folder: Path, config: Config, encoder: ExportedEncoder, code: Mapping[str, Path]) -> None:
    """Write everything but the tensors."""
    text = exported_text(config)
    files = {
        "preprocessor_config.json": _dump(preprocessor(config)),
        "README.md": readme(config, encoder, list(code)),
        CODE.name: CODE,
        **code,
        **(text.files if text else {}),
        "config.json": _dump(describe(config, encoder, text)),  # last: without it, the folder is not taken for a model
    }
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content.read_bytes())
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def _dump(values: Mapping) -> str:
    return json.dumps(values, indent=2) + "\n"


def _release_code(config: Config) -> dict[str, Path]:
    """The release's own modelling code if the run started from a release: files by name."""
    if not config.init.release or not description(config.arch.name).release_code:
        return {}
    return {file.name: file for file in sorted(Path(config.init.release).glob("*.py")) if file.name != CODE.name}
