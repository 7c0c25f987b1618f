"""`python -m nvlm.doctor` run by a bare interpreter whose packages are fakes made for the test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from nvlm.config.values import TE_INSTALL
from nvlm.doctor.versions import pinned, requirements, satisfies

ROOT = Path(__file__).resolve().parents[2]
TORCH = """
import types
__version__ = "2.13.0"
version = types.SimpleNamespace(cuda={cuda!r})
cuda = types.SimpleNamespace(
    is_available=lambda: {usable}, device_count=lambda: 1, get_device_name=lambda i: "NVIDIA H200",
    get_device_capability=lambda: (9, 0), nccl=types.SimpleNamespace(version=lambda: (2, 29, 7)))
backends = types.SimpleNamespace(cudnn=types.SimpleNamespace(version=lambda: 92000))
"""
SMI = """#!/bin/sh
case "$1" in
--query*) echo "NVIDIA H200, {driver}, 143771 MiB" ;;
*) echo "| NVIDIA-SMI {driver}  Driver Version: {driver}  CUDA Version: {cuda} |" ;;
esac
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """An interpreter without packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


class Machine:
    """Fake packages and commands, and the doctor's report on them."""

    def __init__(self, python: Path, where: Path) -> None:
        self.python, self.packages, self.commands = python, where / "packages", where / "commands"
        self.packages.mkdir()
        self.commands.mkdir()

    def package(self, name: str, version: str, module: str, code: str = "") -> None:
        """A module, dotted or not, in the distribution `name`."""
        *parents, last = module.split(".")
        for depth in range(len(parents)):
            folder = self.packages.joinpath(*parents[: depth + 1])
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        folder = self.packages.joinpath(*parents, last)
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text(code)
        info = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def everything(self, cuda: str | None = "13.0", usable: bool = True) -> None:
        """All packages that setup.py requires, at constraints.txt's versions."""
        modules = {
            "hydra-core": "hydra",
            "pillow": "PIL",
            "megatron-core": "megatron.core",
            "Jinja2": "jinja2",
            "PyYAML": "yaml",
        }
        for name in requirements():
            self.package(name, pinned()[name], modules.get(name, name))
        self.package("torch", "2.13.0", "torch", TORCH.format(cuda=cuda, usable=usable))

    def gpu(self, cuda: str = "13.1", driver: str = "590.44") -> None:
        """nvidia-smi."""
        path = self.commands / "nvidia-smi"
        path.write_text(SMI.format(cuda=cuda, driver=driver))
        path.chmod(0o755)

    def diagnose(self, *arguments: str) -> tuple[int, dict[str, tuple[str, str]], str]:
        """Exit status; (state, all lines) by row; stdout."""
        paths = os.pathsep.join((str(ROOT), str(self.packages)))
        environment = {"PATH": f"{self.commands}:/usr/bin:/bin", "PYTHONPATH": paths}
        command = [str(self.python), "-m", "nvlm.doctor", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=self.packages)
        assert not done.stderr, done.stderr
        rows, name = {}, ""
        for line in done.stdout.splitlines()[:-1]:
            if match := re.match(r"(ok|costs|STOPS) +(.+?)  +(.*)", line):
                name = match[2]
                rows[name] = (match[1], match[3])
            else:
                rows[name] = (rows[name][0], rows[name][1] + "\n" + line.strip())
        return done.returncode, rows, done.stdout


@pytest.fixture
def machine(bare, tmp_path) -> Machine:
    return Machine(bare, tmp_path)


def test_without_anything_every_line_is_there_and_the_status_is_1(machine):
    status, rows, output = machine.diagnose()
    assert status == 1 and "training is impossible: torch, " in output
    for name, specifier in requirements().items():
        assert rows[name][0] == "STOPS", name
        assert f"fix: pip install -c {ROOT / 'constraints.txt'} '{name}{specifier}'" in rows[name][1]
    assert "checkpoints hang" in rows["psutil"][1]
    assert {"Python", "GPU and driver", "NCCL", "cuDNN", "transformer-engine", "flash-attn", "apex", "transformers",
            "hydra-submitit-launcher", "tokenizer files", "/dev/shm", "nvcc", "disk"} <= rows.keys()  # fmt: skip
    assert "install apex" not in output


def test_a_whole_machine_trains(machine):
    machine.everything()
    machine.gpu()
    machine.package("transformer-engine", "2.12.0", "transformer_engine.pytorch")
    status, rows, output = machine.diagnose()
    assert status == 0 and output.endswith("training is possible\n")
    assert rows["GPU and driver"] == ("ok", "1 x NVIDIA H200, 590.44, 143771 MiB, CUDA 13.0")
    assert rows["NCCL"] == ("ok", "2.29.7") and rows["cuDNN"] == ("ok", "92000")
    assert rows["transformer-engine"] == ("ok", "2.12.0")
    assert rows["flash-attn"][0] == "ok"  # not needed if Transformer Engine is installed
    assert all(rows[name][0] == "ok" for name in requirements())


def test_without_a_gpu_it_costs_but_trains(machine):
    machine.everything(usable=False)
    status, rows, _ = machine.diagnose()
    assert status == 0
    assert rows["GPU and driver"][0] == rows["transformer-engine"][0] == "costs"
    assert "no FP8" in rows["transformer-engine"][1] and TE_INSTALL in rows["transformer-engine"][1]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def f():\n    raise ImportError('first\\n\\nlibcudnn.so.9: cannot open shared object file\\n')\nf()",
         "libcudnn.so.9: cannot open shared object file"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its import is killed by signal 11"),
        ("import time; time.sleep(30)", "its import takes more than 2 s"),
        ("import os; os._exit(0)", "its import ends the process"),
    ],
)  # fmt: skip
def test_a_broken_engine_is_a_case_of_its_own(machine, code, reason):
    machine.everything()
    machine.gpu()
    machine.package("transformer-engine", "2.12.0", "transformer_engine.pytorch", code)
    status, rows, _ = machine.diagnose("--timeout", "2")
    state, told = rows["transformer-engine"]
    assert status == 0 and state == "costs"
    assert told.startswith(f"2.12.0, does not load: {reason}\n")
    assert "fix: pip uninstall -y transformer-engine " in told


def test_an_engine_whose_libraries_torch_loads_is_whole(machine):
    """libnccl.so.2 and others are among torch's packages, where the linker finds them once torch is imported."""
    machine.everything()
    machine.gpu()
    code = "import sys\nif 'torch' not in sys.modules: raise OSError('libnccl.so.2: cannot open shared object file')"
    machine.package("transformer-engine", "2.12.0", "transformer_engine.pytorch", code)
    machine.package("flash-attn", "2.8.0", "flash_attn", code)
    _, rows, _ = machine.diagnose()
    assert rows["transformer-engine"] == ("ok", "2.12.0")
    assert rows["flash-attn"] == ("ok", "2.8.0")


@pytest.mark.parametrize("version", ["0.16.1", "0.18.2", "0.20.0"])
def test_another_megatron_than_the_code_is_written_for_stops(machine, version):
    machine.everything()
    for old in machine.packages.glob("megatron_core-*"):
        (old / "METADATA").write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n")
    status, rows, _ = machine.diagnose()
    assert (status, rows["megatron-core"][0]) == (1, "STOPS")
    assert rows["megatron-core"][1].startswith(f"{version}, >=0.19,<0.20 is required")


def test_one_version_of_python_is_asked_for_everywhere():
    asked = {
        "setup.py": r'python_requires=">=(3\.\d+)"',
        "README.md": r"Python (3\.\d+) or later",
        "Makefile": r"Python (3\.\d+) or later",
        "nvlm/doctor/packages.py": r'satisfies\(found, ">=(3\.\d+)"\)',
    }
    found = {name: re.findall(pattern, (ROOT / name).read_text()) for name, pattern in asked.items()}
    assert found == dict.fromkeys(asked, ["3.12"])


def test_a_torch_that_does_not_load_stops_all(machine):
    machine.everything()
    machine.package("torch", "2.13.0", "torch", "raise OSError('libtorch_cpu.so: undefined symbol')")
    status, rows, _ = machine.diagnose()
    assert status == 1
    assert "undefined symbol" in rows["torch"][1] and "--force-reinstall" in rows["torch"][1]


def test_versions_are_held_to_setup_py(machine):
    machine.everything()
    for version in ("2.10.1", "2.11.0a0+nv26.01", "2.16.0"):
        for old in machine.packages.glob("torch-*"):
            (old / "METADATA").unlink()
            old.rmdir()
        machine.package("torch", version, "torch", TORCH.format(cuda="13.0", usable=True))
        status, rows, _ = machine.diagnose()
        assert (status, rows["torch"][0]) == (1, "STOPS"), version
        assert rows["torch"][1].startswith(f"{version}, >=2.11,<2.16 is required")


def test_another_pillow_costs_its_tilings(machine):
    machine.everything()
    for old in machine.packages.glob("pillow-*"):
        (old / "METADATA").write_text("Metadata-Version: 2.1\nName: pillow\nVersion: 11.0.0\n")
    status, rows, _ = machine.diagnose()
    assert status == 0 and rows["pillow"][0] == "costs"
    assert f"'pillow=={pinned()['pillow']}'" in rows["pillow"][1]


def test_the_other_apex_is_told_from_nvidia_s(machine):
    machine.everything()
    machine.package("apex", "0.9.10.dev0", "apex", "raise ImportError('no module named pyramid')")
    _, rows, output = machine.diagnose()
    assert rows["apex"][0] == "costs" and "another project" in rows["apex"][1]
    assert "fix: pip uninstall -y apex" in rows["apex"][1] and "install apex" not in output.replace("uninstall", "")
    machine.package("apex", "0.1", "apex", "")
    machine.package("apex", "0.1", "apex.multi_tensor_apply")
    (machine.packages / "amp_C.py").write_text("multi_tensor_adam = len")
    _, rows, _ = machine.diagnose()
    assert rows["apex"][0] == "ok" and rows["apex"][1].startswith("NVIDIA's")


@pytest.mark.parametrize(
    ("torch_cuda", "driver_cuda", "told"),
    [
        (None, "13.1", "torch is a CPU build"),
        ("13.0", "12.8", "the driver supports CUDA up to 12.8, torch needs 13.0"),
    ],
)
def test_a_gpu_that_torch_cannot_use(machine, torch_cuda, driver_cuda, told):
    machine.everything(cuda=torch_cuda, usable=False)
    machine.gpu(cuda=driver_cuda)
    status, rows, _ = machine.diagnose()
    assert status == 0 and rows["GPU and driver"][0] == "costs"
    assert told in rows["GPU and driver"][1] and "fix: " in rows["GPU and driver"][1]


def test_a_tokenizer_of_one_s_own(machine, tmp_path):
    machine.everything()
    assert "FileNotFoundError" in machine.diagnose("--tokenizer", str(tmp_path))[1]["tokenizer files"][1]
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    assert machine.diagnose("--tokenizer", str(tmp_path))[1]["tokenizer files"][1].endswith("tokenizer.json, 2 tokens")


def test_this_environment_trains():
    done = subprocess.run([sys.executable, "-m", "nvlm.doctor"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("version", "specifier", "fits"),
    [
        ("2.13.0", ">=2.11,<2.16", True),
        ("2.12.0a0+5aff3928d8.nv26.05", ">=2.11,<2.16", True),
        ("2.11.0a0+eb65b36", ">=2.11", False),
        ("2.11.0rc1", ">=2.11", False),
        ("2.16", "<2.16", False),
        ("2.9.1", ">=2.11", False),
        ("13.0.0", "==13.0", True),
        ("1", "", True),
    ],
)
def test_versions_compare_as_numbers(version, specifier, fits):
    assert satisfies(version, specifier) is fits
