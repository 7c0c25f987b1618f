"""From the command line to workers: compose, validate, then train here, under torchrun or srun, or in own workers.

Imports no torch before the configuration is known to be right, so that a mistake is answered at once.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from difflib import get_close_matches
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvlm.config import Config, ConfigError, from_mapping, problem, validate

CONF = Path(__file__).resolve().parent.parent / "conf"
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


def main(started: float) -> int:
    """The command line; returns the exit status."""
    os.environ.setdefault("NVLM_STARTED", repr(started))
    try:
        configs = check_overrides(sys.argv[1:])
        for config in configs:
            if not config.dry_run:
                _check_devices(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if configs and all(config.dry_run for config in configs):
        _quiet()
        from nvlm.dryrun import dry_run

        for config in configs:
            dry_run(config)
        return 0
    _hydra_main()
    return 0


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def _hydra_main(composed: DictConfig) -> None:
    try:
        started = float(os.environ.pop("NVLM_STARTED", time.time()))
        start(to_config(composed), Path(HydraConfig.get().runtime.output_dir), started)
    except ConfigError as error:  # Hydra would print a traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def to_config(composed: DictConfig) -> Config:
    """Hydra's composed configuration as a validated value."""
    values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    return validate(from_mapping(Config, values))


def compose_config(*overrides: str) -> Config:
    """The configuration of conf/ under `overrides`, validated."""
    return to_config(_compose(overrides))


def check_overrides(arguments: list[str]) -> list[Config]:
    """Compose and validate every run that `arguments` ask for, before the first one starts.

    Raises ConfigError. Empty where `arguments` hold a flag that Hydra answers itself, such as --help.
    """
    words = [a for a in arguments if not a.startswith("-")]
    if len(words) < len([a for a in arguments if a not in ("-m", "--multirun")]):
        return []
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ConfigError(f"command line: {_first_line(error)}. Fix: write key=value") from None
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in overrides
    ]
    configs = []
    for combination in itertools.product(*choices):
        try:
            configs.append(compose_config(*combination))
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(error) from None
    return configs


def _compose(overrides=()) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _explain(error: Exception) -> ConfigError:
    """Hydra's and OmegaConf's complaints in this project's form."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1])
    if match := re.search(r"(?:In '[^']*': )?Could not find '([^'/]+)/([^']+)'", text):
        group, got = match[1], match[2]
        known = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        near = get_close_matches(got, known, n=1)
        return problem(group, repr(got), f"one of {', '.join(known)}", f"{group}={near[0] if near else known[0]}")
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return problem(match[1], "nothing", "a value", f"{match[1]}=...")
    return ConfigError(f"configuration: {_first_line(error)}")


def _unknown_key(key: str) -> ConfigError:
    known = _keys(OmegaConf.to_container(_compose(), resolve=False))
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    near = get_close_matches(key, [*known, *groups], n=3, cutoff=0.5)
    if not near:
        section = key.split(".")[0]
        near = [name for name in known if name.startswith(f"{section}.")][:20] or sorted(groups)
    return problem(key, "a key that does not exist", f"one of {', '.join(near)}", f"{near[0]}=...")


def _keys(values: dict, path: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(f"{path}{key}")
        if isinstance(value, dict):
            keys += _keys(value, f"{path}{key}.")
    return keys


def start(config: Config, run_dir: Path, started: float) -> None:
    """Train: in this process under torchrun or srun, else in workers of our own."""
    if _launched():
        _prepare_folder(config, run_dir, writes=os.environ["RANK"] == "0")
        work(config, run_dir, started)
        return
    _prepare_folder(config, run_dir, writes=True)
    processes = config.parallel.replica * config.parallel.data
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "nvlm.launch", str(run_dir / "config.yaml"), repr(started)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(CONF.parent), os.environ.get("PYTHONPATH")))),
    }
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    status = subprocess.run(command, env=environment).returncode
    if status:
        sys.exit(status)


def work(config: Config, run_dir: Path, started: float) -> None:
    """Train in this process."""
    _quiet()
    from nvlm.train.loop import run

    run(config, run_dir, started)


def _quiet() -> None:
    """Megatron tells at every import what is not installed; environment.json holds it once."""
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="megatron")


def _launched() -> bool:
    """True under torchrun, or srun with several tasks, whose variables are translated to torch's."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
        if "MASTER_ADDR" not in os.environ:
            hosts = subprocess.run(
                ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            os.environ["MASTER_ADDR"] = hosts[0]
        # Every task derives the same port from the job's number.
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
        return True
    return False


def _gpus() -> int:
    """GPUs that this machine shows, asked without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return len(listing.stdout.splitlines()) if listing.returncode == 0 else 0


def _check_devices(config: Config) -> None:
    """A full-size model does not train on CPU: say what it needs instead."""
    from nvlm.counts import gpus_needed, parameters

    gpus = _gpus()
    total = sum(parameters(config).values())
    if gpus == 0 and total > 2e9:
        needed = gpus_needed(config)
        raise ConfigError(
            f"devices: got a machine without GPUs, expected {needed} GPUs of 80 GB or more for "
            f"{total / 1e9:.1f}B parameters ({config.parallel.tensor} tensor x {config.parallel.pipeline} pipeline x "
            f"{config.parallel.context} context = {config.parallel.replica} a replica; weights, gradients and "
            f"optimizer state alone). Fix: start it there under torchrun or srun; here, dry_run=true builds and "
            f"counts it"
        )
    processes = config.parallel.replica * config.parallel.data
    if gpus and not _launched() and processes > gpus:
        raise problem("parallel", f"{processes} processes", f"at most the {gpus} GPUs here", "use torchrun or srun")


def _prepare_folder(config: Config, run_dir: Path, writes: bool) -> None:
    """Write what the run is made of beside it: config.yaml and environment.json."""
    if not writes:
        return
    if config.resume == "never" and (run_dir / "checkpoints" / "latest").is_file():
        fix = "resume=auto goes on with it, name=OTHER starts another, deleting the folder starts anew"
        raise problem(f"run folder {run_dir}", "one that holds a run", "a new one with resume=never", fix)
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / "checkpoints" / "latest").is_file():
        for stale in ("metrics.jsonl", "skipped.jsonl"):
            (run_dir / stale).unlink(missing_ok=True)
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))
    (run_dir / "environment.json").write_text(json.dumps(_environment(), indent=1) + "\n")


def _environment() -> dict:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", str(CONF.parent)]
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
    path = Path(sys.argv[1])
    try:
        config = validate(from_mapping(Config, OmegaConf.to_container(OmegaConf.load(path))))
        work(config, path.parent, float(sys.argv[2]))
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_worker())
