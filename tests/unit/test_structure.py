"""The house's rules, kept: which way imports run, and what only one place may know."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def imports(folder: str) -> dict[str, set[str]]:
    """Modules imported anywhere in each file under nvlm/`folder`."""
    found = {}
    for path in [*(ROOT / "nvlm" / folder).rglob("*.py"), *(ROOT / "nvlm").glob(f"{folder}.py")]:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[str(path.relative_to(ROOT))] = names
    assert found
    return found


@pytest.mark.parametrize(
    ("folder", "never"),
    [
        ("tiling", ("megatron", "torch.distributed", "nvlm.data", "nvlm.arch", "nvlm.config")),
        ("data", ("megatron", "torch.distributed", "nvlm.arch", "nvlm.parallel", "nvlm.train", "nvlm.llm")),
        ("vision", ("nvlm.arch", "nvlm.train", "nvlm.data")),
        ("llm", ("nvlm.arch", "nvlm.train", "nvlm.data", "nvlm.vision")),
        ("arch", ("nvlm.train", "nvlm.data", "nvlm.vision", "nvlm.evaluate")),
        ("arch/decoder", ("nvlm.arch.xattn", "nvlm.arch.hybrid")),
        ("arch/xattn", ("nvlm.arch.decoder", "nvlm.arch.hybrid")),
        ("train", ("nvlm.arch.decoder", "nvlm.arch.xattn", "nvlm.arch.hybrid")),
        ("evaluate", ("nvlm.arch.decoder", "nvlm.arch.xattn", "nvlm.arch.hybrid", "nvlm.train")),
        ("generate", ("nvlm.arch.decoder", "nvlm.arch.xattn", "nvlm.arch.hybrid", "nvlm.evaluate")),
        ("weights", ("megatron", "nvlm.arch", "nvlm.train", "nvlm.llm", "nvlm.vision", "nvlm.data", "nvlm.export")),
        ("export", ("megatron", "nvlm.arch", "nvlm.llm", "nvlm.vision", "nvlm.train.loop", "nvlm.parallel")),
        ("export/modeling_nvlm", ("nvlm", "megatron", "transformers")),
        ("config", ("torch", "megatron", "hydra")),
        ("runs", ("torch", "megatron", "hydra")),
        ("folder", ("torch", "megatron", "hydra")),
        ("sinks", ("torch", "megatron", "hydra", "nvlm")),
        ("launchers", ("torch", "megatron", "hydra", "omegaconf")),
        ("requeue", ("torch", "megatron", "hydra", "submitit")),
        ("doctor", ("torch", "megatron", "hydra", "omegaconf", "numpy")),
        ("rules", ("torch", "megatron", "hydra")),
        ("counts", ("torch", "megatron", "hydra")),
        ("hardware", ("torch", "megatron", "hydra", "nvlm")),
        ("plan", ("torch", "megatron", "nvlm.arch", "nvlm.llm", "nvlm.vision", "nvlm.train", "nvlm.parallel")),
        ("flops", ("torch", "megatron", "hydra", "nvlm.lengths", "nvlm.data")),
    ],
)
def test_imports_run_one_way(folder, never):
    for path, names in imports(folder).items():
        for name in names:
            assert not any(name == other or name.startswith(f"{other}.") for other in never), f"{path} imports {name}"


def test_only_device_speaks_of_cuda():
    for path in (ROOT / "nvlm").rglob("*.py"):
        code = [line.split("#")[0] for line in path.read_text().splitlines()]
        words = [line for line in code if "torch.cuda" in line or '"cuda"' in line]
        assert not words or path.name == "device.py", f"{path}: {words}"


def test_the_cpu_answers_for_cuda_only_where_there_is_none():
    code = (
        "import torch; from nvlm import device\n"
        "asked = torch.cuda.current_device\n"
        "device.has_cuda = lambda: True\n"
        "torch.cuda.set_device = lambda rank: None\n"
        "device.device = lambda: 'a gpu'\n"
        "assert device.prepare() == 'a gpu' and not device._CpuAnswersForCuda.active\n"
        "assert torch.cuda.current_device is asked\n"
        "device.has_cuda = lambda: False\n"
        "device.device = lambda: 'the cpu'\n"
        "assert device.prepare() == 'the cpu' and device._CpuAnswersForCuda.active\n"
        "assert torch.zeros(2, device='cuda').device.type == 'cpu'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layout_rules_come_without_megatron():
    """A loader worker that unpickles a layout rule must not pull in Megatron."""
    code = (
        "import sys; from nvlm import registry\n"
        "for name in ('decoder', 'xattn', 'hybrid'): registry.layout_rule(name)\n"
        "assert not any(m.startswith('megatron') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pytest_looks_into_every_folder_of_tests():
    """Left to itself it passes over any folder called dist, without a word."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert {"tests", "unit", "parity", "dist", "e2e"} <= folders
    assert not [name for name in folders for pattern in settings["norecursedirs"] if fnmatch(name, pattern)]
