"""From a validated configuration to workers: in place under torchrun or srun, else in processes of our own."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from nvlm.config import TE_INSTALL, Config, ConfigError, from_mapping, problem
from nvlm.counts import parameters
from nvlm.files import write_whole
from nvlm.hardware import GPUS, known_gpu
from nvlm.launchers import Task, check_allocation, find_task
from nvlm.plan.memory import fewest_gpus, gpus_needed
from nvlm.plan.refuse import check_memory
from nvlm.rules import check_world, validate
from nvlm.runs import check_same_model, find_checkpoint, latest
from nvlm.train.guard import BrokenRun
from nvlm.weights.sources import model_source, vision_source
from nvlm.workers import EXPLAINED, report, run_workers, take_forks_along

ROOT = Path(__file__).resolve().parent.parent
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


def start(config: Config, run_dir: Path, started: float) -> None:
    """Train: in this process under torchrun or srun, else in workers of our own."""
    if task := launched():
        check_weights(config, run_dir)
        _prepare_folder(config, run_dir, writes=task.rank == 0)
        work(config, run_dir, started)
        return
    check_weights(config, run_dir)
    _prepare_folder(config, run_dir, writes=True)
    processes = config.parallel.replica * config.parallel.data
    arguments = ["-m", "nvlm.launch", str(run_dir / "config.yaml"), repr(started)]
    status, stopped = spawn(arguments, processes, config.train.stop_seconds)
    if status or stopped:  # a signal ends a sweep, too
        sys.exit(status)


def spawn(arguments: Sequence[str], processes: int, stop_seconds: float) -> tuple[int, bool]:
    """Run `python ARGUMENTS` as workers on this machine; returns as `run_workers` does."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    return run_workers([sys.executable, *arguments], processes, environment, stop_seconds)


def work(config: Config, run_dir: Path, started: float) -> None:
    """Train in this process."""
    quiet()
    take_forks_along()
    from nvlm.train.loop import run

    run(config, run_dir, started)


def quiet() -> None:
    """Megatron tells at every import what is not installed; environment.json holds it once."""
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="megatron")
    # Megatron's distributed optimizer keeps fp32 weights as views, and looks at their gradients.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # Megatron reads a checkpoint by its ranks
    # Megatron calls collectives by their older names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def launched() -> Task | None:
    """The task that torchrun, srun or mpirun started this process as, in torch's variables too; None: started alone."""
    task = find_task(os.environ)
    if task is not None:
        os.environ.update(task.variables())
    return task


@functools.cache
def gpus_here() -> tuple[tuple[str, int], ...]:
    """Name and memory in bytes of each GPU that this process may use, asked without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    listing = subprocess.run(query, capture_output=True, text=True)
    lines = listing.stdout.splitlines() if listing.returncode == 0 else []
    rows = [[word.strip() for word in line.split(",")] for line in lines if line.count(",") == 2]
    if visible is not None:
        rows = _visible(rows, visible.split(","))
    # A GPU that shares the machine's memory tells none.
    return tuple((name, int(size) * 2**20 if size.isdecimal() else 0) for _, name, size in rows)


def _visible(rows: list[list[str]], wanted: list[str]) -> list[list[str]]:
    """Those of `rows` that CUDA_VISIBLE_DEVICES names by number or by the beginning of their UUID, up to one that it
    names wrongly, as CUDA has it. A part of a GPU (MIG) is looked up by nobody here: it stands for a whole one."""
    found = []
    for name in map(str.strip, wanted):
        named = [row for number, row in enumerate(rows) if name == str(number) or (name and row[0].startswith(name))]
        if not named and not name.startswith("MIG-"):
            break
        found += named[:1] or rows[:1]
    return found


def check_machine(config: Config) -> None:
    """Raise ConfigError where this machine cannot run `config`; of a dry run, where the GPU that it names cannot."""
    if not config.dry_run:
        check_launcher(config)
        check_devices(config)
        check_engine(config)
    check_fits(config)


def check_launcher(config: Config) -> None:
    """What started this process, if it was not a shell, started as many as `config` can use."""
    task = launched()
    if task is not None:
        check_world(config, task.world)
    check_allocation(os.environ, shlex.join(["python", *sys.argv]))


def check_devices(config: Config) -> None:
    """A full-size model does not train on CPU: say what it needs instead."""
    gpus = len(gpus_here())
    total = sum(parameters(config).values())
    if gpus == 0 and total > 2e9:
        needed, fewest = gpus_needed(config), fewest_gpus(config)
        wanted = f"{needed} GPUs" if needed else "more shards of the model than this layout has, on GPUs"
        better = f", with parallel.pipeline={fewest[1]} {fewest[0]} GPUs" if fewest and fewest[0] != needed else ""
        raise ConfigError(
            f"devices: got a machine without GPUs, expected {wanted} of 80 GB or more for "
            f"{total / 1e9:.1f}B parameters ({config.parallel.tensor} tensor x {config.parallel.pipeline} pipeline x "
            f"{config.parallel.context} context = {config.parallel.replica} a replica){better}. Fix: start it there "
            f"under torchrun or srun; here, dry_run=true builds and counts it, and launch/plan.py lists what fits"
        )
    check_processes(config, gpus)


def check_fits(config: Config) -> None:
    """Raise ConfigError where the run cannot fit the GPU that config.gpu names, or else this machine's largest."""
    if config.gpu:
        name, capacity = config.gpu, GPUS[config.gpu].memory
    else:
        if config.dry_run or not gpus_here():
            return
        name, capacity = max(gpus_here(), key=lambda gpu: gpu[1])
        known = known_gpu(name)
        capacity = known.memory if known else capacity
    task = None if config.dry_run else launched()
    processes = task.world if task else config.parallel.replica * config.parallel.data
    if capacity:
        check_memory(config, processes, name, capacity)


def check_engine(config: Config) -> None:
    """FP8 and offload need Transformer Engine, which can be seen to be missing without loading anything."""
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    if config.precision.recipe:
        what, fix = f"precision={config.precision.name}", f"{TE_INSTALL}, or precision=bf16"
        raise problem(what, "no Transformer Engine", "one: FP8 products are its own", fix)
    if config.train.offload:
        fix = f"{TE_INSTALL}, or train.offload=false"
        raise problem("train.offload=true", "no Transformer Engine", "one: it does the moving", fix)


def check_processes(config: Config, gpus: int) -> None:
    """Processes of our own on this machine are no more than its `gpus`, where it has any."""
    processes = config.parallel.replica * config.parallel.data
    if gpus and not launched() and processes > gpus:
        raise problem("parallel", f"{processes} processes", f"at most the {gpus} GPUs here", "use torchrun or srun")


def check_weights(config: Config, run_dir: Path | None = None) -> None:
    """Raise ConfigError where config.init names something that is not what it should be. It reads headers alone.

    A run that goes on from a checkpoint in `run_dir` needs the encoder alone.
    """
    if not config.dry_run or config.init.vision or config.init.release:
        vision_source(config)
    if config.resume == "auto" and run_dir is not None and latest(run_dir) is not None:
        return
    model_source(config)
    if config.init.checkpoint:
        check_same_model(config, find_checkpoint(Path(config.init.checkpoint), "init.checkpoint"))


# What a resumed run may change; the rest decides what its steps compute.
_FREE = ("name", "resume", "dry_run", "profile", "gpu", "init.llm", "init.checkpoint", "parallel.",
         "evaluate.", "data.workers", "data.max_skipped", "train.log_every",
         "train.save_every", "train.keep", "train.async_save", "train.save_frozen", "train.threads", "train.recompute",
         "train.stop_seconds", "train.spike_factor", "train.max_bad_steps", "vision.balance",
         "vision.tiles_per_call", "vision.graph", "train.offload")  # fmt: skip


def _prepare_folder(config: Config, run_dir: Path, writes: bool) -> None:
    """Write what the run is made of beside it: config.yaml and environment.json.

    Raises ConfigError where the folder holds a run that this one would overwrite or cannot go on with.
    """
    if not writes:
        return
    if (run_dir / "checkpoints" / "latest").is_file():
        _check_resume(config, run_dir)
    else:
        for stale in ("metrics.jsonl", "skipped.jsonl"):
            (run_dir / stale).unlink(missing_ok=True)
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))
    write_whole(run_dir / "environment.json", json.dumps(_environment(), indent=1) + "\n")


def _check_resume(config: Config, run_dir: Path) -> None:
    if config.resume == "never":
        fix = "resume=auto goes on with it, name=OTHER starts another, deleting the folder starts anew"
        raise problem(f"run folder {run_dir}", "one that holds a run", "a new one with resume=never", fix)
    before = flat(OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml")))
    for key, value in flat(dataclasses.asdict(config)).items():
        if before.get(key) != value and not key.startswith(_FREE):
            fix = f"{key}={before.get(key)}, or name=OTHER for another run"
            raise problem(f"resume of {run_dir}: {key}", value, f"{before.get(key)}, as the run began", fix)


def flat(values: dict, path: str = "") -> dict[str, object]:
    """Nested `values` with dotted keys."""
    leaves: dict[str, object] = {}
    for key, value in values.items():
        plain = list(value) if isinstance(value, tuple) else value  # as YAML reads it back
        leaves |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": plain}
    return leaves


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


def _worker() -> int:
    """`python -m nvlm.launch CONFIG STARTED`: one of our own workers."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before there is anything to save it needs no traceback
    path = Path(sys.argv[1])
    try:
        config = validate(from_mapping(Config, OmegaConf.to_container(OmegaConf.load(path))))
        work(config, path.parent, float(sys.argv[2]))
    except ConfigError as error:
        report(f"error: {error}")
        return 2
    except BrokenRun as error:
        report(f"error: {error}")
        return EXPLAINED
    return 0


if __name__ == "__main__":
    sys.exit(_worker())
