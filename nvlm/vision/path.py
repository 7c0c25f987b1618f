"""The encoder: uint8 tiles in, features out, without kept activations.

Every rank holds it whole; which tiles a rank encodes is nvlm.vision.prepass's business. A frozen encoder has no
gradients and no optimizer state. One that learns encodes its tiles again for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from nvlm.config.values import Config, VisionConfig
from nvlm.data.batch import Batch
from nvlm.processes import device
from nvlm.tiling import normalize
from nvlm.vision.encoders.registry import description_of
from nvlm.vision.pooling import by_columns, pooled, pooled_to
from nvlm.vision.quantize import FP8Linear, quantize
from nvlm.vision.source import published_encoder, trained_before, vision_source
from nvlm.vision.trained import trained_tensors
from nvlm.weights.load import read


def solo_groups() -> ProcessGroupCollection:
    """Single-rank process groups: a module built with them is not sharded."""
    alone, _ = dist.new_subgroups(group_size=1)
    return ProcessGroupCollection(tp=alone, pp=alone, cp=alone, embd=alone, pos_embd=alone)


class VisionPath:
    """Tiles to features, `vision.tiles_per_call` at a time; full calls as a CUDA graph with `vision.graph`."""

    def __init__(self, encoder: nn.Module, vision: VisionConfig, learns: bool = False, frames: str = "none") -> None:
        """`frames`: how the tokens of a tile are pooled of which fewer than vision.tile_tokens are expected."""
        self.encoder, self.vision, self.frames = encoder.requires_grad_(learns).eval(), vision, frames
        self.full = device.graphed(self.encoder) if vision.graph and not learns else self.encoder

    def encode(self, batch: Batch) -> Batch:
        """`batch` with features [N, C] of all its tiles, encoded by this process alone."""
        return batch.with_features(self.features(batch.pixels, batch.tile_tokens))

    @torch.no_grad()
    def features(self, pixels_T3: Tensor, tokens_T: Tensor | None = None) -> Tensor:
        """uint8 [T, 3, px, px] to [N, C], the tokens of all tiles concatenated; no tiles give [0, C].

        `tokens_T`: the tokens that are expected of each tile, on the CPU; None: vision.tile_tokens. Raises ValueError
        if a tile cannot have so many.
        """
        vision = self.vision
        if len(pixels_T3) == 0:  # attention kernels reject an empty batch
            return next(self.encoder.parameters()).new_zeros(0, vision.feature_width)
        expected_T = self._expected(pixels_T3, tokens_T).split(vision.tiles_per_call)
        calls = zip(pixels_T3.split(vision.tiles_per_call), expected_T)
        return torch.cat([part for some, e in calls for part in self._parts(self._call(self._normalized(some)), e)])

    def backward(self, pixels_T3: Tensor, gradients_NC: Tensor, tokens_T: Tensor | None = None) -> None:
        """Add the gradients of the encoder's weights, given those of `features(pixels_T3, tokens_T)`. Encodes again,
        `vision.tiles_per_backward` tiles at a time."""
        if len(pixels_T3) == 0:
            return
        each = self.vision.tiles_per_backward
        expected = self._expected(pixels_T3, tokens_T).split(each)
        gradients = gradients_NC.split([int(some.sum()) for some in expected])
        self.encoder.train()  # Megatron recomputes only in this mode; there is no dropout
        for some, tokens, gradient in zip(pixels_T3.split(each), expected, gradients, strict=True):
            features_NC = self.differentiable(some, tokens)
            torch.autograd.backward(features_NC, gradient.to(features_NC.dtype))
        self.encoder.eval()

    def differentiable(self, pixels_T3: Tensor, tokens_T: Tensor) -> Tensor:
        """As `features`, of at least one tile and in one call, with the graph that leads to the encoder's weights."""
        return torch.cat(list(self._parts(self.encoder(self._normalized(pixels_T3)), tokens_T)))

    def _expected(self, pixels_T3: Tensor, tokens_T: Tensor | None) -> Tensor:
        every = torch.full((len(pixels_T3),), self.vision.tile_tokens, device="cpu")
        return every if tokens_T is None else tokens_T

    def _normalized(self, pixels_T3: Tensor) -> Tensor:
        known = description_of(self.vision)
        return normalize(pixels_T3, known.mean, known.std)

    def _parts(self, features_TPD: Tensor, tokens_T: Tensor) -> Iterator[Tensor]:
        """The tokens [n, C] of each run of tiles with equally many."""
        vision = self.vision
        tiles_TKC = pooled(features_TPD, vision.downsample, vision.pool, vision.pads)
        runs = [(count, len(list(run))) for count, run in groupby(tokens_T.tolist())]
        for tiles, (count, _) in zip(tiles_TKC.split([length for _, length in runs]), runs, strict=True):
            found_TKC = pooled_to(tiles, count, self.frames)
            yield (by_columns(found_TKC) if vision.order == "columns" else found_TKC).flatten(0, 1)

    def _call(self, pixels_T3: Tensor) -> Tensor:
        return (self.full if len(pixels_T3) == self.vision.tiles_per_call else self.encoder)(pixels_T3)


def new_encoder(config: Config, place: torch.device) -> nn.Module:
    """The encoder of `config`, whose weights are still to be read."""
    return description_of(config.vision).build(config, solo_groups()).to(place)


def load_encoder(config: Config, place: torch.device, trained: Path | None = None) -> nn.Module:
    """The encoder of `config` with its weights, under the names of its description. A collective call.

    `trained`: the step folder or the file with the weights of one that learned; by default, what init.checkpoint has.
    """
    encoder = new_encoder(config, place)
    ours = {name: parameter.data for name, parameter in encoder.named_parameters()}
    trained = trained or trained_before(config)
    if trained is not None and trained.is_dir():
        tensors = trained_tensors(trained)
        for name, tensor in ours.items():
            tensor.copy_(tensors[name])
    elif trained is not None:
        read(published_encoder(config.vision, str(trained), "encoder"), ["vision"], ours)
    else:
        read(vision_source(config), ["vision"], ours)
    return encoder


def build_vision(config: Config, place: torch.device, trained: Path | None = None) -> VisionPath:
    """The frozen encoder of `config` with its weights, on device `place`. A collective call. `trained`: as in
    `load_encoder`."""
    return frozen(load_encoder(config, place, trained), config)


def frozen(encoder: nn.Module, config: Config) -> VisionPath:
    """`encoder`, which its description built, for inference alone; its tensors are taken over."""
    vision, precision = config.vision, config.precision
    encoder = description_of(vision).frozen(encoder, vision, precision.multiple if precision.encoder else 1)
    if precision.encoder:
        path = VisionPath(encoder, replace(vision, graph=False), frames=config.video.pool)
        quantize(path, lambda linear: FP8Linear(linear, precision), vision.tile_size)
    return VisionPath(encoder, vision, frames=config.video.pool)
