"""The Dockerfile's steps, as far as they work without a daemon, a GPU and a network; an interpreter acts as image."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from nvlm.doctor.versions import pinned, requirements, satisfies

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "Dockerfile").read_text().splitlines()
RUNS = [shlex.split(line.removeprefix("RUN ")) for line in LINES if line.startswith("RUN ")]
IMAGE = {"torch": "2.12.0a0+5aff3928d8.nv26.5", "torchvision": "0.27.0a0", "transformer_engine": "2.14.0",
         "flash_attn": "2.7.4.post1", "apex": "0.1", "numpy": "2.1.0", "pip": "25.0"}  # fmt: skip


@pytest.fixture
def image(tmp_path) -> Path:
    """The interpreter of a fake image: metadata of its packages, and a copy of the inputs for the pins."""
    venv.create(tmp_path / "image", symlinks=True)
    packages = next((tmp_path / "image" / "lib").glob("python*/site-packages"))
    for name, version in IMAGE.items():
        install(packages, name, version)
    return tmp_path / "image" / "bin" / "python"


def install(packages: Path, name: str, version: str) -> None:
    """A package that consists only of metadata, to replace another version."""
    for old in packages.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    info = packages / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def pins(python: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [str(python), str(ROOT / "launch" / "image_pins.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, timeout=60)


def test_what_the_image_has_is_pinned_and_what_it_lacks_comes_from_our_constraints(image, tmp_path):
    file = tmp_path / "pins.txt"
    done = pins(image, "write", str(file))
    assert done.returncode == 0, done.stderr
    written = dict(line.split("==") for line in file.read_text().split())
    for name, version in IMAGE.items():
        assert written[name.replace("_", "-")] == version
    missing = [name for name in requirements() if name not in IMAGE]
    assert {name: written[name.lower()] for name in missing} == {name: pinned()[name] for name in missing}
    assert len(written) == len(IMAGE) + len(missing)


@pytest.mark.parametrize("changed", [("torch", "2.13.0"), ("transformer_engine", "2.15.0"), ("apex", "0.9.10.dev0")])
def test_a_replaced_package_fails_the_build(image, tmp_path, changed):
    file = tmp_path / "pins.txt"
    pins(image, "write", str(file))
    packages = next((tmp_path / "image" / "lib").glob("python*/site-packages"))
    for name in requirements():  # as pip would have left them
        if name not in IMAGE:
            install(packages, name.replace("-", "_"), pinned()[name])
    assert pins(image, "check", str(file)).returncode == 0
    install(packages, *changed)
    done = pins(image, "check", str(file))
    assert done.returncode == 1
    assert done.stdout.strip() == f"{changed[0].replace('_', '-')} {IMAGE[changed[0]]} -> {changed[1]}"


def test_the_image_s_torch_is_one_that_setup_py_takes():
    told = next(re.search(r"torch (\S+) and CUDA", line)[1] for line in LINES if "torch 2." in line and "CUDA" in line)
    assert satisfies(told, requirements()["torch"])
    assert not satisfies("2.11.0a0", requirements()["torch"])


def test_the_install_line_is_in_step_with_setup_py():
    (line,) = [words for words in RUNS if "install" in words]
    assert line[:4] == ["python", "-m", "pip", "install"] and line[line.index("-c") + 1] == "/opt/pins.txt"
    folder, extras = re.match(r"(\.)\[(.+)\]$", line[line.index("-e") + 1]).groups()
    tree = ast.parse((ROOT / "setup.py").read_text())
    keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    (known,) = [ast.literal_eval(node.value) for node in keywords if node.arg == "extras_require"]
    assert folder == "." and set(extras.split(",")) <= known.keys()
    assert "gpu" not in extras.split(",")  # what it names is the image's own
    # Nothing else is installed, and what is, is checked.
    assert [words[1:] for words in RUNS if words is not line] == [
        ["launch/image_pins.py", "write", "/opt/pins.txt"],
        ["launch/image_pins.py", "check", "/opt/pins.txt"],
        ["-m", "nvlm.doctor"],
    ]
    assert RUNS.index(line) == 1


def test_what_the_steps_need_is_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    for needed in ("nvlm", "conf", "launch", "setup.py", "constraints.txt", ".git"):
        assert needed not in ignored and (ROOT / needed).exists()
