"""Exports a checkpoint to a folder in one of the published layouts: safetensors, config.json, tokenizer and so on.

Works tensor by tensor, on CPU, for any parallel layout. The folder gets its final name when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nvlm.arch.registry import description
from nvlm.config.rules import validate
from nvlm.config.values import Config, ConfigError, InitConfig, problem
from nvlm.export.layouts.form import Files, Form, Written
from nvlm.export.layouts.nvlm import CODE
from nvlm.export.layouts.registry import FORMS
from nvlm.export.layouts.tower import layers_in
from nvlm.export.options import ExportOptions
from nvlm.export.plan import Entry, of_encoder, of_trained
from nvlm.export.readback import check_readable
from nvlm.export.shards import DTYPES, ShardWriter
from nvlm.export.trained import TrainedWeights
from nvlm.inputs.identity import check_model
from nvlm.inputs.sources import whole_groups
from nvlm.runs.digests import checkpoint_faults, frozen_digest, own_faults
from nvlm.runs.folder import FROZEN, find_checkpoint, read_run_config
from nvlm.vision.source import began_as, vision_source
from nvlm.vision.trained import published_again
from nvlm.weights.layouts import NVLM, Layout, opened
from nvlm.weights.parts import Part
from nvlm.weights.published import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """An export that nothing speaks against."""

    step: Path
    form: Form
    plan: Sequence[Entry]
    written: Written


def export(options: ExportOptions, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Write the folder `options.out` and return it. Raises ConfigError, and then leaves no folder.

    `tell` is called with a line about who can load the folder.
    """
    out = Path(options.out)
    if os.path.lexists(out):
        raise problem("out", f"{out}, which exists", "a new folder", "out=OTHER, or delete it")
    partial = out.with_name(f".{out.name}.partial")
    try:
        with contextlib.ExitStack() as held:
            job = _prepared(options, held)
            shutil.rmtree(partial, ignore_errors=True)
            held.callback(shutil.rmtree, partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _fill(partial, job, int(options.shard_gb * 1e9))
            check_readable(partial, job.written.config, out)
            partial.rename(out)
    except OSError as error:
        raise _refused(out, error) from None
    if line := job.form.note(job.written):
        tell(line)
    return out


def _prepared(options: ExportOptions, held: contextlib.ExitStack) -> _Job:
    """What is to be written. A trained encoder is a file until `held` is closed."""
    form = FORMS[options.layout]
    step, layout = find_checkpoint(Path(options.checkpoint), "checkpoint"), form.layout
    before = read_run_config(step)
    config = _at_hand(before, step, options)
    form.check(config)
    _refuse(step, checkpoint_faults(step, functools.partial(own_faults, tensors=False)))
    folders = [step] if frozen_digest(step) is None else [step, step.parent / FROZEN]
    text = form.text(config)
    check_model(config, step, "vision")
    at_hand = held.enter_context(published_again(config, Path(options.out).parent))
    weights, vision = TrainedWeights(folders, config.peft.scale), vision_source(at_hand, "vision")
    encoder = form.encoder(config, vision, began_as(config.vision, step) or vision)
    rows = form.rows(config, text)
    trained = [part for parts in whole_groups(config, (), layout).values() for part in parts]
    _check(weights, trained, step)
    like = _like(options, layout, trained)
    plan = of_encoder(encoder, layout, like) + of_trained(config, weights, layout, rows, like)
    written = Written(
        config=replace(config, llm=replace(config.llm, vocab=rows)),
        text=text,
        encoder=vision,
        layers=layers_in(encoder),
        code=_release_code(before) if layout is NVLM else {},
    )
    return _Job(step=step, form=form, plan=plan, written=written)


def _fill(folder: Path, job: _Job, limit: int) -> None:
    """Write all files. The checkpoint is verified meanwhile; both read the files in the same order, so the disk is read
    once. If a file is damaged, the export never gets its final name."""
    with ThreadPoolExecutor(1) as beside:
        wrong = beside.submit(checkpoint_faults, job.step, own_faults)
        try:
            _write(folder, job.plan, limit)
            _describe(folder, job.form.files(job.written))
        finally:  # also if writing failed because a file is damaged
            _refuse(job.step, wrong.result())


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
    if lost := [name for name in dict.fromkeys(part.ours for part in parts) if name not in weights]:
        what = f"no {', '.join(lost[:4])}" + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        raise problem(f"checkpoint {step}", what, "the model that its config.yaml describes", "take another one")


def _like(options: ExportOptions, layout: Layout, parts: Sequence[Part]) -> Mapping[str, Stored]:
    if not options.like:
        return {}
    found, like = opened(options.like, "like")
    if found is not layout:
        got, fix = f"a folder in layout {found.name}", f"layout={found.name}, or leave like out"
        raise problem(f"like={options.like}", got, f"one in layout {layout.name}", fix)
    if not any(part.name in like for part in parts):
        got, expected = f"no {parts[0].name}", "a folder in the exported layout"
        raise problem(f"like={options.like}", got, expected, "leave like out")
    return like


def _write(folder: Path, plan: Sequence[Entry], limit: int) -> None:
    columns = (BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("export"))
    with Progress(*columns) as progress:
        task = progress.add_task("export", total=sum(one.planned.bytes for one in plan))
        for place in dict.fromkeys(one.folder for one in plan):
            (folder / place).mkdir(exist_ok=True)
            own = [one for one in plan if one.folder == place]
            with ShardWriter(folder / place, [one.planned for one in own], limit) as writer:
                for one in own:
                    writer.write(one.planned.name, one.read().to(DTYPES[one.planned.dtype]))
                    progress.advance(task, one.planned.bytes)


def _describe(folder: Path, files: Files) -> None:
    """Write everything but the tensors; config.json last, without which the folder is not taken for a model."""
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content.read_bytes())
    for file in filter(Path.is_file, folder.rglob("*")):
        with open(file, "rb") as written:
            os.fsync(written.fileno())


def _release_code(config: Config) -> dict[str, Path]:
    """The release's own modelling code if the run started from a release: files by name."""
    if not config.init.release or not description(config.arch.name).release_code:
        return {}
    return {file.name: file for file in sorted(Path(config.init.release).glob("*.py")) if file.name != CODE.name}
