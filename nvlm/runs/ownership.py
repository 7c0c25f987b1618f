"""A run folder in use: which run owns it, what a resumed run may change, and the files written at the start.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from nvlm.config.mapping import to_mapping
from nvlm.config.values import Config, ConfigError, problem
from nvlm.runs.files import write_whole
from nvlm.runs.folder import INPUTS, has_run, latest, read_run_config, steps_done

ROOT = Path(__file__).resolve().parents[2]
LOCK = ".lock"
PACKAGES = (
    "torch",
    "torchvision",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "apex",
    "hydra-core",
    "datasets",
    "tokenizers",
    "pillow",
    "numpy",
)
# Files and folders that a run writes into its folder.
_OURS = (
    "config.yaml", "environment.json", "inputs.json", "mix.json", "metrics.jsonl", "skipped.jsonl", "tensorboard",
    "checkpoints", "profile", "losses.json", "evaluation", "wandb_id", "report.html", "curves.png",
    "gallery", "encoder.safetensors",
)  # fmt: skip
_NAMED = 5  # keys that differ in a message
_ENDING = 10.0  # seconds to wait for the workers of a killed launcher to end


@contextlib.contextmanager
def owned(run_dir: Path) -> Iterator[int]:
    """Lock `run_dir` for this run; yields the file descriptor of the lock.

    The kernel releases the lock when the last process with the descriptor ends, in whatever way. Raises ConfigError if
    another run holds the folder, or if it contains foreign files under names that a run would write.
    """
    _check_ours(run_dir)
    with locked(run_dir, "run") as descriptor:
        yield descriptor


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[int]:
    """Lock `folder` of a run or a sweep, which `what` says; yields the file descriptor of the lock.

    Raises ConfigError if another process holds it, or if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        _lock(descriptor, folder, what)
        _sign(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def check_folder(config: Config, run_dir: Path) -> None:
    """Raise ConfigError if `run_dir` holds a run that `config` would overwrite or cannot resume. Only reads."""
    _check_ours(run_dir)
    if (run_dir / "checkpoints" / "latest").is_file():
        _check_resume(config, run_dir)


def outlook(config: Config, run_dir: Path) -> str:
    """One line that says what a run with resume=auto will do in `run_dir`."""
    folder, done = latest(run_dir), steps_done(run_dir)
    if folder is None:
        return f"no checkpoint in {run_dir}: starting at step 0"
    if done >= config.train.steps:
        return f"{run_dir} is done: {done} of {config.train.steps} steps"
    return f"resuming from step {done} of {config.train.steps}: {folder}"


def begin(config: Config, run_dir: Path, fresh: bool) -> None:
    """Write config.yaml and environment.json. If the run is `fresh`, that is, not resumed, delete the logs that an
    earlier run left in the folder without reaching a checkpoint.

    Raises ConfigError if the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(to_mapping(config))))
        write_whole(run_dir / "environment.json", json.dumps(_environment(), indent=1) + "\n")
        if fresh:
            for stale in ("metrics.jsonl", "skipped.jsonl", "losses.json"):
                (run_dir / stale).unlink(missing_ok=True)
            shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    except OSError as error:
        raise unwritable(run_dir, error) from None


def unwritable(run_dir: Path, error: OSError) -> ConfigError:
    """The error for a run folder that cannot be written."""
    other = "another folder: hydra.run.dir=DIR, or hydra.sweep.dir=DIR for a sweep"
    fix = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else other
    return problem(f"run folder {run_dir}", error.strerror or error, "a folder that can be written", fix)


# Fields that a resumed run may change; all others affect what its steps compute.
_FREE = ("name", "resume", "dry_run", "profile", "gpu", "init.llm", "init.checkpoint",
         "stage.recipe", "stage.parent", "parallel.",
         "evaluate.", "logging.", "data.heldout_", "data.workers", "data.max_skipped", "data.index",
         "train.log_every", "train.save_every", "train.keep", "train.async_save", "train.save_frozen",
         "train.threads", "train.recompute", "train.stop_seconds", "train.spike_factor", "train.max_bad_steps",
         "vision.balance", "vision.tiles_per_call", "vision.tiles_per_backward", "vision.graph",
         "train.offload")  # fmt: skip

# Inputs that are compared with the run's record by content, so their paths may change.
_IDENTIFIED = ("data.path", "data.root", "init.vision", "llm.tokenizer")
# Keys that a group's file sets, and with it other keys: they are compared first, and the group is what is typed.
_OF_GROUP = {
    "arch.name": "arch",
    "llm.name": "llm",
    "vision.name": "vision",
    "stage.name": "stage",
    "data.source": "data",
}
_OF_BLEND = re.compile(r"data\.sources\.[^.]+\.")  # a source's keys are treated like those of a single source


def _check_ours(run_dir: Path) -> None:
    if has_run(run_dir):
        return
    foreign = [name for name in _OURS if os.path.lexists(run_dir / name)]
    ours = ("latest", "frozen", "step_*")
    if foreign == ["checkpoints"] and not any(file for name in ours for file in run_dir.glob(f"checkpoints/{name}")):
        return  # checkpoints/ may be the mount point of a separate disk
    if foreign:
        got = f"{', '.join(foreign)}, which would be overwritten, and no config.yaml of a run of this trainer"
        raise problem(f"run folder {run_dir}", got, "a run's folder or one without such files", "name=OTHER")


def _check_resume(config: Config, run_dir: Path) -> None:
    if config.resume == "never":
        fix = "resume=auto continues it, name=OTHER starts another run, deleting the folder starts over"
        raise problem(f"run folder {run_dir}", "a folder that holds a run", "a new folder with resume=never", fix)
    begun = to_mapping(read_run_config(run_dir / "checkpoints" / "latest"))
    first, names = (sorted(one["data"].get("sources") or ()) for one in (begun, to_mapping(config)))
    if first and names and first != names:
        expected = f"{', '.join(first)}, as at the start of the run"
        raise problem(f"resume of {run_dir}: data.sources", ", ".join(names), expected, "these, or name=OTHER")
    free = (*_FREE, *_IDENTIFIED) if (run_dir / INPUTS).is_file() else _FREE
    if changed := _changed(flat(begun), flat(to_mapping(config)), free):
        keys, old, now = (list(map(str, column)) for column in zip(*changed[:_NAMED]))
        more = f" and {len(changed) - _NAMED} more keys" if len(changed) > _NAMED else ""
        expected = f"{', '.join(old)}, as at the start of the run" + (", or more" if keys == ["train.steps"] else "")
        words = " ".join(f"{_OF_GROUP.get(key, key)}={value}" for key, value in zip(keys, old))
        fix = f"{words}{more}, or name=OTHER for another run"
        raise problem(f"resume of {run_dir}: {', '.join(keys)}{more}", ", ".join(now), expected, fix)


def _changed(before: dict, now: dict, free: tuple[str, ...]) -> list[tuple[str, object, object]]:
    """Keys that a resume may not change, with their old and new values as they are typed. Where another file of a group
    was chosen, only the groups: they set other keys."""
    changed: list[tuple[str, object, object]] = []
    for key in dict.fromkeys((*_OF_GROUP, *now, *before)):
        value, old = now.get(key), before.get(key)
        if key == "train.steps" and isinstance(old, int) and value >= old:  # a run may be extended
            continue
        if old != value and not _OF_BLEND.sub("data.", key).startswith(free):
            changed.append((key, typed(old), typed(value)))
    return [one for one in changed if one[0] in _OF_GROUP] or changed


def typed(value: object) -> object:
    """`value` as it is typed on the command line."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else value


def flat(values: dict, path: str = "") -> dict[str, object]:
    """Nested `values` with dotted keys; groups of keys in a list have their numbers: blend.0.weight."""
    leaves: dict[str, object] = {}
    for key, value in values.items():
        plain = list(value) if isinstance(value, tuple) else value  # as YAML reads it back
        if isinstance(plain, list) and plain and all(isinstance(item, dict) for item in plain):
            plain = dict(enumerate(plain))
        leaves |= flat(plain, f"{path}{key}.") if isinstance(plain, dict) else {f"{path}{key}": plain}
    return leaves


def _lock(descriptor: int, folder: Path, what: str) -> None:
    deadline = time.monotonic() + _ENDING
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = _holder(descriptor)
            if not _was_killed(holder) or time.monotonic() > deadline:
                raise _taken(folder, what, holder) from None
        except OSError as error:
            effect = f"a second start of this {what} would go unnoticed"
            print(f"{what} folder {folder} cannot be locked ({error.strerror}): {effect}", file=sys.stderr)
            return
        time.sleep(0.05)


def _sign(descriptor: int) -> None:
    """Write into the lock file who holds it."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
    }
    with contextlib.suppress(OSError):  # on a full disk the lock still holds
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)


def _holder(descriptor: int) -> dict:
    """Who holds the lock; empty if that cannot be read (yet)."""
    try:
        signed = json.loads(os.pread(descriptor, 2**20, 0))
    except ValueError:
        return {}
    return signed if isinstance(signed, dict) else {}


def _was_killed(holder: dict) -> bool:
    """Whether the launcher is gone: its workers share the lock and are about to end."""
    return holder.get("host") == socket.gethostname() and not os.path.exists(f"/proc/{holder.get('pid')}")


def _taken(folder: Path, what: str, holder: dict) -> ConfigError:
    who = "another process"
    if holder:
        who = f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}"
        who += f" ({holder.get('command')})"
    fix = f"name=OTHER, or end that {what} first" + (f" (kill {holder.get('pid')})" if holder else "")
    return problem(f"{what} folder {folder}", f"one in use by {who}", f"a folder that no other {what} uses", fix)


def _environment() -> dict:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = bool(subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip())
    return {
        "python": sys.version.split()[0],
        "packages": versions,
        "git_commit": commit,
        "git_changed": changed,
    }
