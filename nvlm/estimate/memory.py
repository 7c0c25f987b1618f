"""Memory of one GPU by part, at its highest in a step, for the rank that needs most.

Peaks that are compared: the encoder's pass over its share of the tiles, before anything is kept; and the moment in
the pipeline's schedule at which most is kept, with what a backward pass works in.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from nvlm.attention.choice import Kernels, kernels_of
from nvlm.config.hardware import GPUS, GiB
from nvlm.config.modules import Activation
from nvlm.config.values import Config
from nvlm.estimate.activations import Kept, kept
from nvlm.estimate.load import Load, step_load
from nvlm.estimate.model import model_of
from nvlm.estimate.parameters import element_bytes, encoder_parameters, held, pipeline_stages_of, uses_tiles

OUTSIDE = 2.5 * GiB  # CUDA's context, NCCL's buffers, workspaces of cuBLAS and cuDNN
FRAGMENTED = 0.05  # of what comes and goes within a step: lost between its blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank. All but `reserve` is what torch allocates at its peak."""

    weights: float  # of the language model, cross-attention, projector
    encoder: float  # frozen, whole on each rank
    gradients: float  # fp32
    optimizer: float  # fp32 weights, where these are bf16, and Adam's two states
    activations: float  # kept for the backward pass, all micro-batches in flight
    features: float  # of the step's tiles, and their pixels
    workspace: float  # what comes and goes around the highest point
    reserve: float  # what torch's allocator does not count

    @property
    def allocated(self) -> float:
        """What torch allocates."""
        return self.total - self.reserve

    @property
    def largest(self) -> str:
        """Name of the part that takes most."""
        return max((part.name for part in fields(self)), key=lambda name: getattr(self, name))

    @property
    def parts(self) -> str:
        """Those that are not nothing, GiB."""
        sizes = {part.name: getattr(self, part.name) / GiB for part in fields(self)}
        return ", ".join(f"{name} {size:.1f}" for name, size in sizes.items() if size)

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / GiB:.1f} GiB"


def memory(config: Config, replicas: int, load: Load | None = None, kernels: Kernels | None = None) -> Memory:
    """Of the rank that needs most, in a run of `replicas` with steps like `load` (by default `step_load`'s)."""
    load = load or step_load(config, replicas)
    ranks = range(config.parallel.pipeline)
    return max((rank_memory(config, replicas, rank, load, kernels) for rank in ranks), key=lambda m: m.total)


def least_memory(config: Config, replicas: int) -> Memory:
    """What a run cannot do without: full rows of text, no image, nothing lost to fragmentation."""
    load = step_load(config, replicas, tiles=0)
    found = memory(config, replicas, load)
    return Memory(**{f.name: 0.0 if f.name == "reserve" else getattr(found, f.name) for f in fields(Memory)})


def gpus_needed(config: Config) -> int | None:
    """Fewest GPUs of 80 GB, in whole replicas, that hold a run. None where no number of replicas helps: too few
    shards."""
    batch = config.train.global_batch  # which replicas share evenly
    numbers = (n for n in range(1, batch + 1) if batch % n == 0)
    found = next((n for n in numbers if memory(config, n).total <= GPUS["h100"].memory), None)
    return None if found is None else found * config.parallel.replica


def fewest_gpus(config: Config) -> tuple[int, int] | None:
    """The fewest GPUs over some numbers of pipeline stages, and that number; None where none of them is enough."""
    stages = [p for p in (1, 2, 4, 8) if config.llm.layers % (p * config.parallel.virtual) == 0]
    needed = {p: gpus_needed(replace(config, parallel=replace(config.parallel, pipeline=p))) for p in stages}
    return min(((gpus, p) for p, gpus in needed.items() if gpus is not None), default=None)


def rank_memory(
    config: Config, replicas: int, pipeline_rank: int, load: Load, kernels: Kernels | None = None
) -> Memory:
    """Of the processes on one pipeline rank."""
    parameters, element = held(config, pipeline_rank), element_bytes(config)
    stages = pipeline_stages_of(config, pipeline_rank)
    chunks = [kept(config, pipeline_stage, load, kernels or kernels_of(config)) for pipeline_stage in stages]
    activations = most_in_flight([chunk.total for chunk in chunks], config, pipeline_rank, load.micro_batches)
    working = activations + _backward_workspace(config, load, chunks) + element * parameters.largest
    encoding = _encoder_workspace(config, load)
    highest = max(working, encoding)
    return Memory(
        # In FP8 rows and columns: copies, or all there is.
        weights=element * (parameters.all - parameters.kept_in_fp8) + 2 * parameters.quantized,
        encoder=(1 if config.precision.encoder else element) * encoder_parameters(config),
        gradients=4 * parameters.learning,
        optimizer=_optimizer(config, parameters.learning, replicas),
        activations=activations,
        features=_features(config, load, stages),
        workspace=highest - activations,
        reserve=OUTSIDE + FRAGMENTED * highest,
    )


def _optimizer(config: Config, learning: int, replicas: int) -> float:
    """AdamW in fp32, over the ranks that hold the same weights with the distributed optimizer."""
    each = 8 if config.precision.dtype == "fp32" else 12
    return each * learning / (replicas * config.parallel.context if config.parallel.distributed_optimizer else 1)


def most_in_flight(chunks: list[float], config: Config, rank: int, micro_batches: int) -> float:
    """The most that the schedule keeps at a time, of `chunks`: what each virtual stage keeps of a micro-batch."""
    p = config.parallel
    if p.pipeline == 1:
        return chunks[0]
    group, virtual = p.pipeline, p.virtual
    passes = min(micro_batches, 3 * group) * virtual  # by then the schedule repeats itself
    ahead = group - rank - 1 if virtual == 1 else 2 * (group - rank - 1) + (virtual - 1) * group
    ahead = min(ahead, passes)
    now = highest = 0.0
    for forward in range(passes + ahead):
        if forward < passes:
            now += chunks[forward // group % virtual]
            highest = max(highest, now)
        if forward >= ahead:
            now -= chunks[virtual - 1 - (forward - ahead) // group % virtual]
    return highest


def _features(config: Config, load: Load, stages: list[int]) -> float:
    """Of all tiles of a step that the rank's stages use; and of all its replica's tiles the pixels."""
    uses = [uses_tiles(config, pipeline_stage) for pipeline_stage in stages]
    stream, keys = any(use.stream for use in uses), any(use.keys for use in uses)
    tokens = load.stream_from_tiles * stream + load.keys_from_tiles * keys
    pixels = load.tiles * 3 * config.vision.tile_size**2
    return tokens * load.micro_batches * token_bytes(config) + pixels


def token_bytes(config: Config) -> int:
    """Features of one token."""
    return config.vision.feature_width * element_bytes(config)


def _encoder_workspace(config: Config, load: Load) -> float:
    """A call of the encoder, and its share's features three times: as the calls gave them, joined, and dealt."""
    encoder, share = model_of(config).encoder, -(-load.tiles // config.parallel.replica)
    inner = max((module.width for module in encoder.layer if isinstance(module, Activation)), default=0)
    # In an MLP: the residual, the norm's output, and the inner width before and behind GELU.
    tile = encoder.tokens * (2 * encoder.width + 2 * inner) * element_bytes(config)
    call = min(share, config.vision.tiles_per_call) * tile
    return call + 3 * share * config.vision.tile_tokens * token_bytes(config)


def _backward_workspace(config: Config, load: Load, chunks: list[Kept]) -> float:
    """Beside what is kept: the logits' gradient, or a layer's gradients and what it computes again."""
    p, element, branches = config.parallel, element_bytes(config), model_of(config).carrier
    inner = max(m.width for branch in branches for m in branch.modules if isinstance(m, Activation))
    tokens = load.tokens / p.context
    gathered = (
        2 * tokens * config.llm.hidden * element
    )  # under sequence parallelism: a linear's input, and its gradient
    logits = chunks[-1].logits
    head = logits * element / 4 + gathered if logits else 0
    again = {"none": 0, "selective": 0.7, "full": 1}[config.train.recompute]  # an MLP keeps two thirds of a layer
    layer = max(chunk.whole for chunk in chunks) * again + 3 * tokens * inner / p.tensor * element + gathered
    return max(head, layer - logits)
