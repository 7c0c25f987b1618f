"""The frozen encoder: uint8 tiles in, features out, no gradient, no optimizer state, no kept activations.

Every rank holds it whole; which tiles a rank encodes is nvlm.vision.prepass's business.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from nvlm.config.values import Config, VisionConfig
from nvlm.data.batch import Batch
from nvlm.processes import device
from nvlm.tiling import normalize
from nvlm.vision.encoders.registry import description_of
from nvlm.vision.pooling import pixel_shuffle
from nvlm.vision.quantize import FP8Linear, quantize
from nvlm.vision.source import vision_source
from nvlm.weights.load import read


def solo_groups() -> ProcessGroupCollection:
    """Single-rank process groups: a module built with them is not sharded."""
    alone, _ = dist.new_subgroups(group_size=1)
    return ProcessGroupCollection(tp=alone, pp=alone, cp=alone, embd=alone, pos_embd=alone)


class VisionPath:
    """Tiles to features, `vision.tiles_per_call` at a time; full calls as a CUDA graph with `vision.graph`."""

    def __init__(self, encoder: nn.Module, vision: VisionConfig) -> None:
        self.encoder, self.vision = encoder.requires_grad_(False).eval(), vision
        self.full = device.graphed(self.encoder) if vision.graph else self.encoder

    def encode(self, batch: Batch) -> Batch:
        """`batch` with features [N, C] of all its tiles, encoded by this process alone."""
        return batch.with_features(self.features(batch.pixels))

    @torch.no_grad()
    def features(self, pixels_T3: Tensor) -> Tensor:
        """uint8 [T, 3, px, px] to [N, C], the tokens of all tiles concatenated; no tiles give [0, C]."""
        vision = self.vision
        if len(pixels_T3) == 0:  # attention kernels reject an empty batch
            width = vision.hidden * vision.downsample**2
            return next(self.encoder.parameters()).new_zeros(0, width)
        known = description_of(vision)
        calls = [self._call(normalize(some, known.mean, known.std)) for some in pixels_T3.split(vision.tiles_per_call)]
        return pixel_shuffle(torch.cat(calls), vision.downsample).flatten(0, 1)

    def _call(self, pixels_T3: Tensor) -> Tensor:
        return (self.full if len(pixels_T3) == self.vision.tiles_per_call else self.encoder)(pixels_T3)


def load_encoder(config: Config, place: torch.device) -> nn.Module:
    """The encoder of `config` with its weights, under the names of its description. A collective call."""
    encoder = description_of(config.vision).build(config, solo_groups()).to(place)
    read(vision_source(config), ["vision"], {name: parameter.data for name, parameter in encoder.named_parameters()})
    return encoder


def build_vision(config: Config, place: torch.device) -> VisionPath:
    """The frozen encoder of `config` with its weights, on device `place`. A collective call."""
    return frozen(load_encoder(config, place), config)


def frozen(encoder: nn.Module, config: Config) -> VisionPath:
    """`encoder`, which its description built, for inference alone; its tensors are taken over."""
    vision, precision = config.vision, config.precision
    encoder = description_of(vision).frozen(encoder, vision, precision.multiple if precision.encoder else 1)
    if precision.encoder:
        path = VisionPath(encoder, replace(vision, graph=False))
        quantize(path, lambda linear: FP8Linear(linear, precision), vision.tile_size)
    return VisionPath(encoder, vision)
