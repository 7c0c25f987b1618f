"""Pins a container image's own packages: `python launch/image_pins.py write FILE`, then `check FILE`.

write: pins every installed package at its version, and what setup.py needs besides at constraints.txt's versions.
check: exit status 1 if a pinned package has changed. Needs only Python.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, ROOT)

from nvlm.doctor.versions import pinned, requirements  # noqa: E402


def canonical(name: str) -> str:
    """A package's name, normalized like pip's."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Canonical name -> version of all installed packages, without this project."""
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions(path=[place for place in sys.path if place != ROOT]):
        if one.name and one.version:
            found.setdefault(canonical(one.name), one.version)  # the first one on the path is imported
    return found


def pins() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the packages that are installed, and of those that will be installed."""
    present = installed()
    known = {canonical(name): version for name, version in pinned().items()}
    wanted = [canonical(name) for name in requirements()]
    return present, {name: known[name] for name in wanted if name in known and name not in present}


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    command, path = arguments[0], Path(arguments[1])
    if command == "write":
        present, to_install = pins()
        lines = [f"{name}=={version}" for name, version in sorted((present | to_install).items())]
        path.write_text("\n".join(lines) + "\n")
        print(f"{len(present)} packages of the image, {len(to_install)} to install: {', '.join(to_install)}")
        return 0
    now, changed = installed(), []
    for line in path.read_text().split():
        name, _, version = line.partition("==")
        if now.get(name) != version:
            changed.append(f"{name} {version} -> {now.get(name, 'gone')}")
    print("\n".join(changed) or "the image's packages are unchanged")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
