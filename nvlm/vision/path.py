"""The frozen vision path: uint8 tiles in, features out, no gradient, no optimizer state, no kept activations.

Every rank holds the whole encoder and encodes its own micro-batch's tiles before the language model runs.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file
from torch import Tensor

from nvlm.batch import Batch
from nvlm.config import Config, problem
from nvlm.tiling import normalize
from nvlm.vision.encoder import InternViT
from nvlm.vision.reduce import pixel_shuffle
from nvlm.weights.internvit import from_huggingface

TINY = Path(__file__).parent / "tiny_encoder.safetensors"


def solo_groups() -> ProcessGroupCollection:
    """Process groups of one: a module built with them is whole on every rank."""
    alone, _ = dist.new_subgroups(group_size=1)
    return ProcessGroupCollection(tp=alone, pp=alone, cp=alone, embd=alone, pos_embd=alone)


class VisionPath:
    """`encode(batch)`: the same batch with features [T, K, C]."""

    def __init__(self, encoder: InternViT, downsample: int) -> None:
        self.encoder = encoder.requires_grad_(False).eval()
        self.downsample = downsample

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        """Tiles of `batch`, normalised, encoded, pixel-shuffled."""
        return batch.with_features(self.features(batch.pixels))

    @torch.no_grad()
    def features(self, pixels_T3: Tensor) -> Tensor:
        """uint8 [T, 3, px, px] to [T, K, C]; no tile gives [0, K, C]."""
        if len(pixels_T3) == 0:  # attention kernels do not take an empty batch
            one = self.features(torch.zeros_like(pixels_T3, dtype=torch.uint8).new_zeros(1, *pixels_T3.shape[1:]))
            return one[:0]
        return pixel_shuffle(self.encoder(normalize(pixels_T3)), self.downsample)


def build_vision(config: Config, device: torch.device) -> VisionPath:
    """The encoder of `config` with its weights, on `device`."""
    vision = config.vision
    if vision.weights is None:
        fix = "vision.weights=FILE.safetensors, or vision=tiny"
        raise problem("vision.weights", "nothing", "the frozen encoder's weights", fix)
    path = TINY if vision.weights == "tiny" else Path(vision.weights)
    if path.suffix != ".safetensors" or not path.is_file():
        raise problem("vision.weights", repr(str(path)), "a .safetensors file", "vision.weights=FILE.safetensors")
    encoder = InternViT(config, solo_groups())
    state = from_huggingface(load_file(path), vision.layers, vision.heads)
    expected = dict(encoder.named_parameters())
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shape = tuple(expected[name].shape)
            raise problem(
                f"vision.weights: {name}",
                tuple(tensor.shape),
                f"shape {shape}",
                "choose the matching vision=",
            )
        expected[name].data.copy_(tensor)
    return VisionPath(encoder.to(device), vision.downsample)
