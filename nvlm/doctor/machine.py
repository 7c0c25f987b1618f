"""Rows about the machine: GPUs and their libraries, tokenizer files, memory, disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from nvlm.doctor.probe import Probe
from nvlm.doctor.rows import COSTS, OK, Row
from nvlm.doctor.versions import ROOT, install

GB = 1e9


def gpu_row(torch: Probe, has_torch: bool) -> Row:
    """GPUs, their driver, and whether torch can use them."""
    answer = _nvidia_smi("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    if not answer:
        costs = "tiny models train on the CPU; full-size ones only build (dry_run=true)"
        return Row("GPU and driver", COSTS, "none seen by nvidia-smi", costs, "run on a machine with an NVIDIA driver")
    first, count = answer.splitlines()[0], len(answer.splitlines())
    found = f"{count} x {first}"
    match = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", _nvidia_smi())
    driver = (int(match[1]), int(match[2])) if match else None
    built = str(torch.values.get("built_for") or "")
    if not has_torch or torch.reason:
        return Row("GPU and driver", OK, found)
    if not built:
        fix = f"pip uninstall -y torch torchvision; {install('torch')} torchvision, from an index with CUDA builds"
        return Row("GPU and driver", COSTS, f"{found}; torch is a CPU build", "the GPU is not used", fix)
    if torch.values.get("usable"):
        return Row("GPU and driver", OK, f"{found}, CUDA {built}")
    if driver and driver[0] < int(built.split(".")[0]):
        costs = f"the driver supports CUDA up to {driver[0]}.{driver[1]}, torch needs {built}: the GPU is not used"
        fix = f"update the driver to one for CUDA {built}, or install a torch built for CUDA {driver[0]}.x"
        return Row("GPU and driver", COSTS, found, costs, fix)
    fix = 'echo "$CUDA_VISIBLE_DEVICES"; python -c "import torch; torch.zeros(1).cuda()"  # shows why'
    return Row("GPU and driver", COSTS, f"{found}; torch sees none", "the GPU is not used", fix)


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def library_row(name: str, torch: Probe, key: str, without: str) -> Row:
    """NCCL or cuDNN, which come with torch's CUDA build."""
    version = torch.values.get(key)
    if version and torch.values.get("built_for"):
        return Row(name, OK, str(version))
    return Row(name, COSTS, "not in this torch", without, install("torch") + ", a CUDA build")


def tokenizer_row(folder: str | None) -> Row:
    """tokenizer.json of the built-in models and, if given, of `folder`."""
    built_in = (ROOT / "nvlm/data/text/tiny_tokenizer/tokenizer.json", ROOT / "nvlm/vision/tiny_encoder.safetensors")
    if lost := [str(path) for path in built_in if not path.is_file()]:
        found, costs = f"missing: {', '.join(lost)}", "the built-in models do not run"
        return Row("tokenizer files", COSTS, found, costs, f"git -C {ROOT} checkout .")
    if folder is None:
        return Row("tokenizer files", OK, "built-in ones; --tokenizer DIR checks another")
    path = Path(folder)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        vocabulary = json.loads(path.read_text())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        costs = "llm.tokenizer cannot be read"
        fix = f"copy tokenizer.json of the language model into {path.parent}"
        return Row("tokenizer files", COSTS, f"{path}: {type(error).__name__}", costs, fix)
    return Row("tokenizer files", OK, f"{path}, {len(vocabulary)} tokens")


def memory_row(folder: str = "/dev/shm") -> Row:
    """Shared memory, through which loader workers pass their batches."""
    try:
        size = shutil.disk_usage(folder).total
    except OSError:
        return Row(folder, COSTS, "missing", "data.workers > 0 may fail", "data.workers=0")
    if size >= 1 * GB:
        return Row(folder, OK, f"{size / GB:.1f} GB")
    fix = "docker run --ipc=host ..., or --shm-size=16g; else data.workers=0"
    return Row(folder, COSTS, f"{size / GB:.2f} GB", "loader workers die of bus errors with data.workers > 0", fix)


def disk_row(folder: Path) -> Row:
    """Free space where runs are written."""
    free = shutil.disk_usage(folder).free
    found = f"{free / GB:.0f} GB free in {folder}"
    if free >= 10 * GB:
        return Row("disk", OK, found)
    costs = "a checkpoint takes 14 bytes a parameter: the tiny models' 20 MB, a 72B's 1 TB"
    return Row("disk", COSTS, found, costs, "ln -s /A/LARGER/DISK runs")


def nvcc_row() -> Row:
    """The CUDA compiler."""
    path = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    if os.path.isfile(path):
        return Row("nvcc", OK, path)
    costs = "Transformer Engine and flash-attn cannot be built from source; nothing else needs it"
    return Row("nvcc", COSTS, "missing", costs, "use the Dockerfile's image, or install the CUDA toolkit")
