"""Versions: what is installed, what setup.py requires, what constraints.txt pins."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def installed(package: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(path: Path = ROOT / "setup.py") -> dict[str, str]:
    """What setup.py requires: package -> version specifier. The file is parsed, not run."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            found = (re.match(r"([\w.-]+)(.*)", line) for line in ast.literal_eval(node.value))
            return {match[1]: match[2].strip() for match in found if match}
    return {}


def pinned(path: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """What constraints.txt pins: package -> version."""
    lines = (line.strip().partition("==") for line in path.read_text().splitlines())
    return {name: version for name, found, version in lines if found}


def numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version; a pre-release sorts before its release."""
    match = re.match(r"(\d+(?:\.\d+)*)(a|b|rc|\.?dev)?", version)
    if not match:
        return ()
    release = [int(n) for n in match[1].split(".")]
    release += [0] * (4 - len(release))
    return (*release, -1 if match[2] else 0)


def satisfies(version: str, specifier: str) -> bool:
    """Whether `version` satisfies a specifier made of >=, < and ==."""
    for part in filter(None, (part.strip() for part in specifier.split(","))):
        sign, bound = re.match(r"(>=|<|==)(.+)", part).groups()
        have, want = numbers(version), numbers(bound)
        if not {">=": have >= want, "<": have < want, "==": have == want}[sign]:
            return False
    return True


def install(requirement: str) -> str:
    """The command that installs a package. In NVIDIA's images pip follows the image's own constraints by itself."""
    pins = "" if "NVIDIA_PYTORCH_VERSION" in os.environ else f" -c {ROOT / 'constraints.txt'}"
    return f"pip install{pins} '{requirement}'"
