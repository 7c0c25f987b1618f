"""A checkpoint's weights, whole and one at a time, whatever layout wrote them. Needs no process group."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nvlm.llm.adapters import adapter_names, merge


class TrainedWeights:
    """The model's tensors in several checkpoint folders, by their names in the whole model, adapters merged.

    `scale`: of the adapters, where there are any.
    """

    def __init__(self, folders: Sequence[Path], scale: float = 1.0) -> None:
        self.scale = scale
        self.readers = [_Reader(folder) for folder in folders]
        self.places = {
            name: (reader, entry)
            for reader in self.readers
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        self.last: tuple[str, Tensor] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def dtype(self, name: str) -> torch.dtype:
        """What it is stored as."""
        return self.places[name][1].properties.dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor. The last one is kept: several published tensors may be parts of it."""
        if self.last is None or self.last[0] != name:
            self.last = None
            tensor, (down, up) = self._stored(name), adapter_names(name)
            if down in self:
                tensor = merge(tensor, self._stored(down), self._stored(up), self.scale)
            self.last = (name, tensor)
        return self.last[1]

    def _stored(self, name: str) -> Tensor:
        reader, entry = self.places[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is no process group
            checkpoint.load({name: tensor}, storage_reader=reader, no_dist=True)
        return tensor


class _Reader(FileSystemReader):
    """torch's, which would unpickle the metadata again for every tensor."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata: Metadata | None = None

    def read_metadata(self, *args, **kwargs) -> Metadata:
        if self.metadata is None:
            self.metadata = super().read_metadata(*args, **kwargs)
        return self.metadata
