"""What a GPU, its links and its host achieve: shares of the data sheet's peaks, and times. Imports no torch.

The shares of products are calibrated on published language model runs on H100 (tests/unit/estimate/test_speed.py), the
others are arithmetic or typical values. None was measured with this code; `python benchmarks/gpu.py` does that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from nvlm.config.hardware import GPU
from nvlm.config.modules import Linear
from nvlm.config.values import Config
from nvlm.estimate.load import Load
from nvlm.estimate.model import linears, model_of

# Shares of peak FLOP/s.
PRODUCTS = 0.69  # a product that fills the GPU, at the clock that its power limit allows
FP8_PRODUCTS = 0.68  # of a peak twice as high; casts and scales are counted apart
SHORT = 250  # a product with an inner dimension of K reaches K / (K + SHORT) of that
SCORES = 0.45  # self-attention's two products in long samples
SAMPLE = 700  # samples of n tokens reach n / (n + SAMPLE) of that
LOOKS = 0.27  # gated cross-attention's two products
ENCODER = 0.54  # narrower products, and its attention
FP8_ENCODER = 0.35
_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9))  # a kernel's rows and columns, and its relative speed

# Memory.
MEMORY = 0.8  # share of the bandwidth
PASSES = 3  # times that saved activations are read or written for pointwise operations, forward and backward
CAST = 6  # bytes for each FP8 element of a linear's inputs and of its output's gradient: maximum, cast, transpose

# Messages.
LINKS = 0.73  # share of the bandwidth of links within a node
NETWORK = 0.84  # and of the network between nodes
LATENCY = 18e-6  # seconds until a message starts to flow
BUFFERED = 0.5  # parallel.userbuffers: what shown messages still cost, in pieces and with slower products

# Seconds in which the host launches the kernels of a micro-batch, forward and backward.
HOST_LAYER = 1.3e-3
HOST_TENSOR = 0.4e-3  # more in each layer with tensor parallelism
HOST_CROSS = 1.6e-3  # gated cross-attention
HOST_AGAIN = 0.5  # share for a layer that is computed again
HOST_CHUNK = 1e-3  # a pipeline stage's messages, for each virtual stage
HOST_BATCH = 12e-3  # embedding, projector, output layer, loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """FLOP/s that one GPU achieves in each part of the model."""

    linears: float  # of self-attention
    mlp: float
    cross_linears: float  # of gated cross-attention, for the queries
    keys: float  # and for the keys
    scores: float
    cross_scores: float
    projector: float
    output: float


def rates(config: Config, gpu: GPU, load: Load) -> Rates:
    """What a GPU achieves on a micro-batch of `load`, by the shapes that tensor and context parallelism leave."""
    model, p = model_of(config), config.parallel
    peak = gpu.peak(config.precision.dtype)
    tokens, keys = load.tokens / p.context, load.rows * load.keys
    fast = FP8_PRODUCTS * gpu.peak(config.precision.name) if config.precision.recipe else PRODUCTS * peak
    parts = {branch.part: linears(branch.modules) for branch in model.carrier}

    def of(found: Iterable[Linear], rows: float, full: float) -> float:
        shapes = tuple((*_own(linear, p.tensor), linear.learns) for linear in found)
        return full * shared(shapes, max(1, round(rows)), gpu.processors)

    cross = parts.get("cross", ())
    length = 2 * load.work.pairs / max(load.work.tokens, 1)
    return Rates(
        linears=of(parts["attention"], tokens, fast),
        mlp=of(parts["mlp"], tokens, fast),
        cross_linears=of([one for one in cross if not one.reads_keys], tokens, fast),
        keys=of([one for one in cross if one.reads_keys], keys, fast),
        scores=SCORES * peak * length / (length + SAMPLE),
        cross_scores=LOOKS * peak,
        projector=of(linears(model.projector), load.work.projected, PRODUCTS * peak),
        output=of(linears(model.head), load.work.outputs / p.context, PRODUCTS * peak),
    )


def _own(linear: Linear, tensor: int) -> tuple[int, int]:
    """A linear's inputs and outputs on one rank."""
    splits_inputs, splits_outputs = linear.split == "inputs", linear.split == "outputs"
    return linear.inputs // (tensor if splits_inputs else 1), linear.outputs // (tensor if splits_outputs else 1)


@functools.lru_cache(maxsize=4096)  # a planner asks for the same few shapes thousands of times
def shared(shapes: tuple[tuple[int, int, bool], ...], rows: int, processors: int) -> float:
    """The share of a full GPU's speed that linears with (inputs, outputs, whether the weight learns) reach together."""
    work = time = 0.0
    for inputs, outputs, learns in shapes:
        passes = [(rows, outputs, inputs), (rows, inputs, outputs)]
        passes += [(outputs, inputs, rows)] if learns else []
        work += len(passes) * inputs * outputs
        time += sum(inputs * outputs / product_share(*one, processors) for one in passes)
    return work / time if time else 1.0


def product_share(rows: int, columns: int, inner: int, processors: int) -> float:
    """The share of a full GPU's speed that a product of [rows, inner] and [inner, columns] reaches: the last wave of
    tiles leaves some of the `processors` idle, and each tile takes a while to begin and to end."""
    filled = 0.0
    for tall, wide, relative in _TILES:
        tiles = math.ceil(rows / tall) * math.ceil(columns / wide)
        useful = rows * columns / (tall * wide)
        filled = max(filled, relative * useful / (math.ceil(tiles / processors) * processors))
    return filled * inner / (inner + SHORT)


def message_seconds(count: float, size: float, bandwidth: float) -> float:
    """Seconds for `count` messages of `size` bytes together, over links of `bandwidth` bytes/s that they reach."""
    return count * LATENCY + size / bandwidth


def host_seconds(config: Config, layers: int, carriers: int) -> float:
    """Seconds in which the host launches a micro-batch's kernels on a pipeline rank with `layers`, `carriers` of which
    have gated cross-attention."""
    p, again = config.parallel, {"none": 0.0, "selective": 0.5, "full": 1.0}[config.train.recompute]
    a_layer = HOST_LAYER + HOST_TENSOR * (p.tensor > 1)
    chunks = HOST_CHUNK * p.virtual if p.pipeline > 1 else 0.0
    return (1 + again * HOST_AGAIN) * (layers * a_layer + carriers * HOST_CROSS) + chunks + HOST_BATCH
