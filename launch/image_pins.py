"""Pins for a container image that brings its own torch: `python launch/image_pins.py write FILE`, then `check FILE`.

write: every installed package at its version, and what setup.py asks for beyond them at constraints.txt's. check: exit
status 1 where a package that was there before is another now. Needs nothing but Python.
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
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Canonical name -> version of all that is installed, but for this project itself."""
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions(path=[place for place in sys.path if place != ROOT]):
        if one.name and one.version:
            found.setdefault(canonical(one.name), one.version)  # further down the path it is not what is imported
    return found


def pins() -> tuple[dict[str, str], dict[str, str]]:
    """What is there, and what is to come."""
    there = installed()
    known = {canonical(name): version for name, version in pinned().items()}
    wanted = [canonical(name) for name in requirements()]
    return there, {name: known[name] for name in wanted if name in known and name not in there}


def main(arguments: list[str]) -> int:
    """The exit status."""
    command, path = arguments[0], Path(arguments[1])
    if command == "write":
        there, to_come = pins()
        lines = [f"{name}=={version}" for name, version in sorted((there | to_come).items())]
        path.write_text("\n".join(lines) + "\n")
        print(f"{len(there)} packages of the image, {len(to_come)} to come: {', '.join(to_come)}")
        return 0
    now, changed = installed(), []
    for line in path.read_text().split():
        name, _, version = line.partition("==")
        if now.get(name) != version:
            changed.append(f"{name} {version} -> {now.get(name, 'gone')}")
    print("\n".join(changed) or "the image's packages are as they were")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
