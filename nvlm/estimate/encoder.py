"""What an encoder that learns takes: memory of each rank and bytes that it sends. FLOPs: nvlm.estimate.flops.

Every rank holds it whole, with fp32 gradients. The distributed optimizer divides its state over all ranks of a run.
"""

from __future__ import annotations

from collections.abc import Iterable

from nvlm.attention.choice import Kernels
from nvlm.config.modules import Activation, Attention, Linear, Module, Norm, Parameter
from nvlm.config.values import Config
from nvlm.estimate.load import Load
from nvlm.estimate.model import model_of
from nvlm.estimate.parameters import element_bytes, encoder_parameters


def learning_parameters(config: Config) -> int:
    """Parameters of the encoder that learn: all or none."""
    return encoder_parameters(config) if config.stage.train_vision else 0


def optimizer_shards(config: Config, replicas: int) -> int:
    """The number of ranks that divide the optimizer's state of the encoder."""
    return replicas * config.parallel.replica if config.parallel.distributed_optimizer else 1


def sent_bytes(config: Config, replicas: int) -> float:
    """Bytes that a rank sends for the encoder: reduced gradients and gathered weights, or all-reduced gradients."""
    learning, ranks = learning_parameters(config), replicas * config.parallel.replica
    over, gradient = (ranks - 1) / ranks, 2 if config.gradients_in_bf16 else 4
    if not config.parallel.distributed_optimizer:
        return 2 * gradient * learning * over
    return (gradient + element_bytes(config)) * learning * over


def backward_workspace(config: Config, load: Load, kernels: Kernels) -> float:
    """The encoder's backward pass: what it keeps for its tiles, a layer's gradients, and the features' gradients: as
    they return, summed in fp32, and exchanged."""
    encoder, element = model_of(config).encoder, element_bytes(config)
    share = -(-load.tiles // config.parallel.replica)
    at_once = min(share, config.vision.tiles_per_backward)
    inner = max((module.width for module in encoder.layer if isinstance(module, Activation)), default=0)
    layer = encoder.tokens * 2 * (encoder.width + inner) * element
    features = share * config.vision.tile_tokens * config.vision.feature_width
    return at_once * (kept_by_tile(config, kernels) + layer) + features * (2 * element + 4)


def kept_by_tile(config: Config, kernels: Kernels) -> float:
    """Bytes that the encoder's forward pass keeps for the backward pass of one tile."""
    encoder, element = model_of(config).encoder, element_bytes(config)
    hidden = encoder.tokens * encoder.width * element
    layer = encoder.tokens * _kept_by_token(encoder.layer, element, kernels)
    layers = encoder.layers * hidden + layer if config.train.recompute == "full" else encoder.layers * layer
    return layers + 3 * config.vision.tile_size**2 * element  # and the pixels


def _kept_by_token(layer: Iterable[Module], element: int, kernels: Kernels) -> float:
    """What a layer keeps for each token, if everything in it learns. A linear keeps attention's output no second
    time."""
    kept = attended = 0.0
    before: Module | None = None
    for module in layer:
        match module:
            case Norm(width=width, bias=True):
                kept += width * element + 8
            case Norm(width=width):
                kept += width * ((kernels.norm or element) + kernels.normalized) + 4
            case Linear(inputs=inputs):
                kept += max(inputs * element - attended, 0)
                attended = 0.0
            case Attention(heads=heads, head_dim=width):
                attended = heads * width * (kernels.attention or element)
                # Values are a view of the fused tensor, and so are queries and keys if they have no norms.
                kept += attended + 3 * heads * width * element + 4 * heads
                kept += 2 * attended if isinstance(before, Norm) else 0
            case Activation(width=width):
                kept += width * element
            case Parameter(size=size, factor=True):
                kept += size * element
        before = module
    return kept
