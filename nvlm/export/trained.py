"""Reads a checkpoint's weights unsplit and one at a time, for any parallel layout. Needs no process group.

torch's own reader holds three copies of a tensor while reading it. Here files are memory-mapped: a tensor stored in one
piece takes no memory but the page cache.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from nvlm.runs.folder import weight_keys
from nvlm.weights.merge import adapter_names, merge

_PAGE = mmap.ALLOCATIONGRANULARITY


class TrainedWeights:
    """The model's tensors in several checkpoint folders, by their names in the unsplit model, with adapters merged.

    `scale`: of the adapters, if there are any.
    """

    def __init__(self, folders: Sequence[Path], scale: float = 1.0) -> None:
        self.scale = scale
        self.folders = [_Folder(folder) for folder in folders]
        self.places = {name: folder for folder in self.folders for name in folder.tensors}
        self.last: tuple[str, Tensor] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the tensor in the model."""
        return self.places[name].dtype(name)

    def place(self, name: str) -> tuple:
        """A sort key for names: their order in the files."""
        folder = self.places[name]
        item = folder.items[MetadataIndex(folder.keys[name], folder.tensors[name].chunks[0].offsets)]
        return self.folders.index(folder), item.relative_path, item.offset

    def read(self, name: str) -> Tensor:
        """The unsplit tensor. The latest one is cached, because several published tensors may be parts of it."""
        if self.last is None or self.last[0] != name:
            self.last = None
            tensor, (down, up) = self.places[name].read(name), adapter_names(name)
            if down in self:
                tensor = merge(tensor, *(self.places[part].read(part) for part in (down, up)), self.scale)
            self.last = (name, tensor)
        return self.last[1]


class _Folder:
    """One folder of torch.distributed.checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reader = folder, FileSystemReader(folder)
        metadata = self.reader.read_metadata()
        self.items = metadata.storage_data
        entries = metadata.state_dict_metadata.items()
        tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self.keys = weight_keys(tensors)
        self.tensors = {name: tensors[key] for name, key in self.keys.items()}

    def dtype(self, name: str) -> torch.dtype:
        # For a weight kept in FP8, only the fp32 copy is stored; its dtype in the model is bf16.
        return torch.bfloat16 if self.keys[name] != name else self.tensors[name].properties.dtype

    def read(self, name: str) -> Tensor:
        entry, dtype = self.tensors[name], self.dtype(name)
        pieces = ((chunk, self._map(MetadataIndex(self.keys[name], chunk.offsets))) for chunk in entry.chunks)
        if len(entry.chunks) == 1:
            return next(pieces)[1].to(dtype)
        whole = torch.empty(entry.size, dtype=dtype)
        for chunk, piece in pieces:
            region = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes))
            whole[region] = piece
        return whole

    def _map(self, index: MetadataIndex) -> Tensor:
        """A tensor in a file, as a view of the mapped file."""
        item = self.items[index]
        with open(self.folder / item.relative_path, "rb") as file:
            with FakeTensorMode():  # gives shape and data offset without reading the data
                fake = torch.load(self.reader._slice_file(file, item), weights_only=True)
            storage = fake.untyped_storage()
            start = item.offset + storage._checkpoint_offset
            begin = start // _PAGE * _PAGE
            length = start - begin + storage.nbytes()
            # Private and writable: torch requires a writable buffer.
            pages = mmap.mmap(file.fileno(), length, mmap.MAP_PRIVATE, offset=begin)
        count = storage.nbytes() // fake.element_size()
        flat = torch.frombuffer(pages, dtype=fake.dtype, count=count, offset=start - begin)
        return flat.as_strided(fake.size(), fake.stride(), fake.storage_offset())
