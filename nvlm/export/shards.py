"""Writes safetensors files one tensor at a time, with at most one tensor in memory.

The safetensors library needs all tensors of a file in memory. The format is simple: the length of the header in 8
bytes, the header as JSON, the concatenated tensors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nvlm.weights.published import INDEX

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: str  # in safetensors' notation
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


class ShardWriter:
    """A context manager that writes `tensors`, in this order, to files of at most `limit` bytes each.

    A larger tensor gets a file of its own. The index is written last, and only if all tensors were written.
    """

    def __init__(self, folder: Path, tensors: Sequence[Planned], limit: int) -> None:
        self.folder, self.files = folder, _deal(tensors, limit)
        self.places = [(number, one) for number, file in enumerate(self.files) for one in file]
        self.next, self.open = 0, None
        self.beside, self.synced = ThreadPoolExecutor(1), []

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, which must match the plan."""
        number, planned = self.places[self.next]
        assert (name, tuple(tensor.shape), tensor.dtype) == (planned.name, planned.shape, DTYPES[planned.dtype]), name
        if planned is self.files[number][0]:
            self._close()
            self.open = open(self.folder / self._name(number), "wb", buffering=0)
            self._write(_header(self.files[number]))
        self._write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        self.next += 1

    def __exit__(self, kind, error, trace) -> None:
        self._close()
        self.beside.shutdown()
        if kind is None:
            assert self.next == len(self.places), f"{len(self.places) - self.next} tensors were not written"
            total = sum(one.bytes for _, one in self.places)
            index = {
                "metadata": {"total_size": total},
                "weight_map": {one.name: self._name(number) for number, one in self.places},
            }
            for one in self.synced:
                one.result()
            (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")

    def _name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{len(self.files):05d}.safetensors"

    def _write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while len(left):  # the kernel writes at most 2 GiB at once
            left = left[self.open.write(left) :]

    def _close(self) -> None:
        if self.open is not None:
            self.synced.append(self.beside.submit(_sync_and_close, self.open))
            self.open = None


def _sync_and_close(file: BinaryIO) -> None:
    with file:
        os.fsync(file.fileno())


def _deal(tensors: Sequence[Planned], limit: int) -> list[list[Planned]]:
    files: list[list[Planned]] = []
    room = 0
    for one in tensors:
        if not files or one.bytes > room:
            files.append([])
            room = limit
        files[-1].append(one)
        room -= one.bytes
    return files


def _header(tensors: Sequence[Planned]) -> bytes:
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for one in tensors:
        entries[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [end, end + one.bytes]}
        end += one.bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
