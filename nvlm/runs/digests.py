"""Writes a manifest with the SHA-256 of every file in a checkpoint folder, and verifies folders against it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from nvlm.runs.files import write_whole
from nvlm.runs.folder import FROZEN

MANIFEST = "digests.json"
_TENSORS = ".distcp"  # files of tensors, from which nothing executable is unpickled


@dataclass(frozen=True, slots=True)
class Digest:
    """Digest and size of a file when it was written."""

    sha256: str
    size: int  # bytes


def digest(path: Path) -> Digest:
    """Digest of the file `path`, which is read once. Raises OSError."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return Digest(hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)


def write_manifest(folder: Path, known: dict[str, Digest], frozen: str | None) -> None:
    """Write the manifest of `folder`, with digests from `known` where given; other files are read.

    `frozen`: SHA-256 of the manifest of the frozen weights that belong to this folder; None if there are none.
    """
    others = {path.name: digest(path) for path in folder.iterdir() if path.name not in known}
    files = {name: asdict(entry) for name, entry in sorted((known | others).items())}
    write_whole(folder / MANIFEST, json.dumps({"frozen": frozen, "files": files}, indent=1) + "\n")


def frozen_digest(folder: Path) -> str | None:
    """SHA-256 of the manifest of the frozen weights that belong to `folder`, which must have passed `faults`."""
    return _read_manifest(folder)[0]


def faults(folder: Path) -> list[str]:
    """What is wrong with the files of `folder`, by name; empty if it is intact. A collective call.

    Rank r of n reads files r, r + n, ... Nothing is unpickled.
    """
    mine = own_faults(folder, dist.get_rank(), dist.get_world_size())
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return sorted({fault for part in parts for fault in part})


def checkpoint_faults(step: Path, check: Callable[[Path], list[str]]) -> list[str]:
    """What `check` (`faults` or `own_faults`) finds in a step folder and in the frozen weights that belong to it."""
    if wrong := check(step):
        return wrong
    if (bound := frozen_digest(step)) is None:
        return []
    frozen = step.parent / FROZEN
    if wrong := check(frozen):
        return [f"{FROZEN}: {fault}" for fault in wrong]
    return [] if digest(frozen / MANIFEST).sha256 == bound else [f"{FROZEN} holds the weights of another run"]


def own_faults(folder: Path, rank: int = 0, size: int = 1, tensors: bool = True) -> list[str]:
    """`faults` of the files rank, rank + size, ... only. Without `tensors`, files of tensors are not read."""
    try:
        folder.stat()
        recorded = _read_manifest(folder)[1]
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
        names = sorted(recorded.keys() | present)[rank::size]
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            found = [
                pool.submit(_fault, folder / name, recorded.get(name), tensors or not name.endswith(_TENSORS))
                for name in names
            ]
            return [fault for one in found if (fault := one.result())]
    except OSError as error:
        return [_unread(error)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is damaged"]


def _fault(path: Path, recorded: Digest | None, reads: bool) -> str | None:
    if recorded is None:
        return f"{path.name} does not belong there"
    try:
        if (size := path.stat().st_size) != recorded.size:
            return f"{path.name} has {size} bytes of {recorded.size}"
        return None if not reads or digest(path).sha256 == recorded.sha256 else f"{path.name} is not what was written"
    except OSError as error:
        return _unread(error)


def _unread(error: OSError) -> str:
    name = Path(error.filename).name
    return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name} cannot be read ({error.strerror})"


def _read_manifest(folder: Path) -> tuple[str | None, dict[str, Digest]]:
    manifest = json.loads((folder / MANIFEST).read_text())
    return manifest["frozen"], {name: Digest(**entry) for name, entry in manifest["files"].items()}
