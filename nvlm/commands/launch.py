"""Runs a validated configuration: in this process under torchrun or srun, else in our own worker processes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
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

from nvlm.arch.registry import placement_rule
from nvlm.commands.mistakes import answered
from nvlm.config.compute import ParallelConfig
from nvlm.config.hardware import GPUS, known_gpu
from nvlm.config.mapping import from_mapping, to_mapping
from nvlm.config.rules import check_world, validate
from nvlm.config.values import TE_INSTALL, Config, ConfigError, problem
from nvlm.data.look import check_data
from nvlm.estimate.memory import fewest_gpus, gpus_needed
from nvlm.estimate.parameters import parameters
from nvlm.estimate.refuse import check_memory
from nvlm.evaluate.tasks import check_names, check_tasks
from nvlm.inputs.check import check_weights
from nvlm.processes.environment import set_defaults
from nvlm.processes.launchers import Task, check_allocation, find_task
from nvlm.processes.workers import EXPLAINED, run_workers, take_forks_along
from nvlm.runs.folder import steps_done
from nvlm.runs.ownership import ROOT, check_folder, outlook, owned
from nvlm.runs.sinks import steady_streams


def start(config: Config, run_dir: Path, started: float) -> bool:
    """Train: in this process under torchrun or srun, else in our own workers. Returns whether a signal ended it."""
    steady_streams()
    check_weights(config, run_dir)
    task = launched()
    if task is None:
        with owned(run_dir) as lock:
            _look(config, run_dir)
            return _has_work(config, run_dir) and _in_workers(config, run_dir, started, lock)
    with contextlib.ExitStack() as held:
        refusal = _claim(config, run_dir, held) if task.rank == 0 else None
        return work(config, run_dir, started, refusal)


def _look(config: Config, run_dir: Path) -> None:
    check_folder(config, run_dir)
    if config.resume == "auto":
        print(outlook(config, run_dir), flush=True)


def _has_work(config: Config, run_dir: Path) -> bool:
    """Whether a step or an evaluation remains to be done."""
    asked, heldout = config.evaluate, config.data.source.has_heldout
    evaluates = asked.questions != 0 and (heldout or asked.tasks != ("heldout",)) or bool(asked.losses and heldout)
    return steps_done(run_dir) < config.train.steps or evaluates


def _claim(config: Config, run_dir: Path, held: contextlib.ExitStack) -> str | None:
    """Own the folder while `held` is open. Returns the reason if that is refused, to be passed to the other ranks."""
    try:
        held.enter_context(owned(run_dir))
        _look(config, run_dir)
    except ConfigError as error:
        return str(error)
    return None


def _in_workers(config: Config, run_dir: Path, started: float, lock: int) -> bool:
    """Train in workers; returns whether a signal ended them.

    They get the configuration in memory: a file in the folder could be from another start.
    """
    with open(os.memfd_create("config"), "w", encoding="utf-8") as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(to_mapping(config))))
        file.flush()
        arguments = ["-m", "nvlm.commands.launch", str(file.fileno()), str(run_dir), repr(started)]
        processes = config.parallel.replica * config.parallel.data
        status, stopped = spawn(arguments, processes, config.train.stop_seconds, (file.fileno(), lock))
    if status:
        sys.exit(status)
    return stopped


def spawn(
    arguments: Sequence[str], processes: int, stop_seconds: float, inherit: Sequence[int] = ()
) -> tuple[int, bool]:
    """Run `python ARGUMENTS` as workers on this machine; returns the same as `run_workers`."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    return run_workers([sys.executable, *arguments], processes, environment, stop_seconds, inherit)


def work(config: Config, run_dir: Path, started: float, refusal: str | None = None) -> bool:
    """Train in this process; returns whether a signal ended it. `refusal`: the first rank's reason not to start, which
    it passes to the others."""
    begin_process(config.parallel)
    steady_streams()
    take_forks_along()
    from nvlm.evaluate.during import evaluation_of
    from nvlm.train.loop import run

    return run(config, run_dir, refusal, evaluation_of(config, run_dir, started))


def begin_process(parallel: ParallelConfig) -> None:
    """Prepare this process, one rank of the layout, for the imports of torch and Megatron."""
    set_defaults(os.environ, parallel, int(os.environ.get("WORLD_SIZE", 1)))
    quiet()


def quiet() -> None:
    """Silence Megatron's messages about missing packages at every import: environment.json records them."""
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="megatron")
    # Megatron's distributed optimizer keeps fp32 weights as views and reads their gradients.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # Megatron reads a checkpoint by its ranks
    # Megatron calls collectives by deprecated names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def launched() -> Task | None:
    """The task that a launcher started this process as, or None. Also sets torch's environment variables for it."""
    task = find_task(os.environ)
    if task is not None:
        os.environ.update(task.variables())
    return task


@functools.cache
def gpus_here() -> tuple[tuple[str, int], ...]:
    """Name and memory in bytes of each GPU that this process may use, determined without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    listing = subprocess.run(query, capture_output=True, text=True)
    lines = listing.stdout.splitlines() if listing.returncode == 0 else []
    rows = [[word.strip() for word in line.split(",")] for line in lines if line.count(",") == 2]
    if visible is not None:
        rows = _visible(rows, visible.split(","))
    # A GPU that shares the machine's memory reports no size.
    return tuple((name, int(size) * 2**20 if size.isdecimal() else 0) for _, name, size in rows)


def _visible(rows: list[list[str]], wanted: list[str]) -> list[list[str]]:
    """The `rows` that CUDA_VISIBLE_DEVICES names by number or by a prefix of their UUID; like CUDA, it stops at the
    first wrong name. A MIG slice is not looked up and counts as a whole GPU."""
    found = []
    for name in map(str.strip, wanted):
        named = [row for number, row in enumerate(rows) if name == str(number) or (name and row[0].startswith(name))]
        if not named and not name.startswith("MIG-"):
            break
        found += named[:1] or rows[:1]
    return found


def check_machine(config: Config) -> None:
    """Raise ConfigError if this machine cannot run `config` or, for a dry run, if the GPU in config.gpu cannot."""
    if not config.dry_run:
        words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
        check_data(config, placement_rule(config.arch.name), f"python launch/prepare.py {shlex.join(words)}")
        check_launcher(config)
        check_logging(config)
        check_devices(config)
        check_engine(config)
    check_evaluation(config)
    check_fits(config)


def check_evaluation(config: Config) -> None:
    """Raise ConfigError if a task that the run is to be evaluated on is unknown, or its files or references are
    missing. A dry run checks only the names."""
    if config.evaluate.questions != 0:
        try:
            check_names(config)
            if not config.dry_run:
                check_tasks(config)
        except ConfigError as error:  # which names the key of launch/evaluate.py
            raise ConfigError(str(error).replace("data.path", "evaluate.path")) from None


def check_logging(config: Config) -> None:
    """Raise ConfigError if the package for logging is missing."""
    if config.logging.name == "wandb" and importlib.util.find_spec("wandb") is None:
        fix = f"pip install -e '{ROOT}[wandb]', or logging=none"
        raise problem("logging=wandb", "no wandb", "the package wandb", fix)


def check_launcher(config: Config) -> None:
    """Raise ConfigError if a launcher started a number of processes that `config` cannot use."""
    task = launched()
    if task is not None:
        check_world(config, task.world)
    check_allocation(os.environ, shlex.join(["python", *sys.argv]))


def check_devices(config: Config) -> None:
    """Raise ConfigError for a full-size model on a CPU, with what it needs, and for too few GPUs."""
    gpus = len(gpus_here())
    total = sum(count.all for count in parameters(config).values())
    if gpus == 0 and total > 2e9:
        needed, fewest = gpus_needed(config), fewest_gpus(config)
        wanted = f"{needed} GPUs" if needed else "a layout with more shards of the model, on GPUs"
        better = f", with parallel.pipeline={fewest[1]} {fewest[0]} GPUs" if fewest and fewest[0] != needed else ""
        raise ConfigError(
            f"devices: got a machine without GPUs, expected {wanted} of 80 GB or more for "
            f"{total / 1e9:.1f}B parameters ({config.parallel.tensor} tensor x {config.parallel.pipeline} pipeline x "
            f"{config.parallel.context} context = {config.parallel.replica} per replica){better}. Fix: start it on "
            f"such machines with torchrun or srun; here, dry_run=true builds and counts it, and launch/plan.py lists "
            f"what fits"
        )
    check_processes(config, gpus)


def check_fits(config: Config) -> None:
    """Raise ConfigError if the run cannot fit the GPU named by config.gpu or, by default, this machine's largest."""
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
    """Raise ConfigError if something needs Transformer Engine and it is not installed. Loads nothing."""
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    if config.precision.recipe:
        what, fix = f"precision={config.precision.name}", f"{TE_INSTALL}, or precision=bf16"
        raise problem(what, "no Transformer Engine", "Transformer Engine, whose kernels compute in FP8", fix)
    asked = {"train.offload": config.train.offload, "parallel.userbuffers": config.parallel.userbuffers}
    for key in (key for key, value in asked.items() if value):
        fix = f"{TE_INSTALL}, or {key}=false"
        raise problem(f"{key}=true", "no Transformer Engine", "Transformer Engine, whose feature this is", fix)


def check_processes(config: Config, gpus: int) -> None:
    """Raise ConfigError if this machine has GPUs, but fewer than the run's processes."""
    processes = config.parallel.replica * config.parallel.data
    if gpus and not launched() and processes > gpus:
        raise problem("parallel", f"{processes} processes", f"at most the {gpus} GPUs here", "use torchrun or srun")


def _worker() -> int:
    """`python -m nvlm.commands.launch DESCRIPTOR FOLDER STARTED`: one of our own workers."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while there is nothing to save
    return answered(_worker_s_part, failed=EXPLAINED)


def _worker_s_part() -> int:
    descriptor, run_dir, started = sys.argv[1:]
    values = os.pread(int(descriptor), os.fstat(int(descriptor)).st_size, 0)  # workers share the file position
    config = validate(from_mapping(Config, OmegaConf.to_container(OmegaConf.create(values.decode()))))
    work(config, Path(run_dir), float(started))
    return 0


if __name__ == "__main__":
    sys.exit(_worker())
