"""An encoder that learned: read from a checkpoint, and written as a published file."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nvlm.config.values import Config, VisionConfig, problem
from nvlm.runs.digests import checkpoint_faults, own_faults
from nvlm.runs.folder import ENCODER, find_checkpoint
from nvlm.vision.encoders.registry import description_of
from nvlm.vision.source import ENCODER_WEIGHTS, trained_encoder
from nvlm.weights.parts import published


def trained_tensors(step: Path) -> dict[str, Tensor]:
    """The encoder's tensors in a step folder, whole, on the CPU, by the names of its description. Each process reads
    them by itself. Raises ConfigError if files other than those of tensors are not as they were written."""
    if wrong := checkpoint_faults(step, functools.partial(own_faults, tensors=False)):  # one of them is a pickle
        raise problem(f"checkpoint {step}", "; ".join(wrong), "the files as they were written", "take another one")
    reader = FileSystemReader(step)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(ENCODER_WEIGHTS) and isinstance(entry, TensorStorageMetadata)
    }
    load(found, storage_reader=reader, no_dist=True)
    return {name.removeprefix(ENCODER_WEIGHTS): tensor for name, tensor in found.items()}


def write_trained(trained: Path, vision: VisionConfig, file: Path) -> None:
    """Write the encoder in `trained`, a step folder or a published file, as the published file `file`. Raises
    OSError."""
    partial = file.with_name(f".{file.name}.partial")
    if trained.is_dir():
        parts = description_of(vision).parts(vision, {})
        save_file(published(parts, trained_tensors(trained)), partial)
    else:
        shutil.copyfile(trained, partial)
    partial.rename(file)


@contextmanager
def published_again(config: Config, folder: Path) -> Iterator[Config]:
    """`config` with init.vision set to its encoder as a published file, if the encoder of init.checkpoint learned: a
    file in `folder`, for as long as the block lasts, or that of the run. Raises OSError."""
    trained = trained_encoder(find_checkpoint(Path(config.init.checkpoint or ""), "init.checkpoint"))
    if trained is None:
        yield config
    elif not trained.is_dir():
        yield replace(config, init=replace(config.init, vision=str(trained)))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".encoder.") as place:
            file = Path(place) / ENCODER
            write_trained(trained, config.vision, file)
            yield replace(config, init=replace(config.init, vision=str(file)))
