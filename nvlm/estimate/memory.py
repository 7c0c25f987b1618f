"""Peak memory of one GPU in a step, by part, for the rank that needs most.

Peaks are compared: the encoder's pass over its share of the tiles, before any activations are saved; the moment in the
pipeline schedule with the most saved activations, plus the workspace of a backward pass; and, after the schedule, the
backward pass of an encoder that learns.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from nvlm.arch.registry import tile_use
from nvlm.attention.choice import Kernels, kernels_of
from nvlm.config.hardware import GPUS, GiB
from nvlm.config.modules import Activation
from nvlm.config.values import Config
from nvlm.estimate.activations import Kept, kept
from nvlm.estimate.encoder import backward_workspace, learning_parameters, optimizer_shards
from nvlm.estimate.load import Load, step_load
from nvlm.estimate.model import model_of
from nvlm.estimate.parameters import element_bytes, encoder_parameters, held, pipeline_stages_of

OUTSIDE = 2.5 * GiB  # CUDA context, NCCL buffers, cuBLAS and cuDNN workspaces
FRAGMENTED = 0.05  # share of a step's temporary memory that is lost to fragmentation


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one rank. Everything but `reserve` is allocated by torch at the peak."""

    weights: float  # language model, cross-attention, projector
    encoder: float  # replicated on each rank
    gradients: float  # fp32
    optimizer: float  # fp32 master weights if weights are bf16, and Adam's two states
    activations: float  # saved for the backward pass, for all micro-batches in flight
    features: float  # features and pixels of the step's tiles
    workspace: float  # temporary memory at the peak
    reserve: float  # not counted by torch's allocator

    @property
    def allocated(self) -> float:
        """The memory that torch allocates."""
        return self.total - self.reserve

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        return max((part.name for part in fields(self)), key=lambda name: getattr(self, name))

    @property
    def parts(self) -> str:
        """The non-zero parts as text, GiB."""
        sizes = {part.name: getattr(self, part.name) / GiB for part in fields(self)}
        return ", ".join(f"{name} {size:.1f}" for name, size in sizes.items() if size)

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / GiB:.1f} GiB"


def memory(config: Config, replicas: int, load: Load | None = None, kernels: Kernels | None = None) -> Memory:
    """Memory of the rank that needs most, in a run of `replicas` with steps of `load` (by default `step_load`'s)."""
    load = load or step_load(config, replicas)
    ranks = range(config.parallel.pipeline)
    return max((rank_memory(config, replicas, rank, load, kernels) for rank in ranks), key=lambda m: m.total)


def least_memory(config: Config, replicas: int) -> Memory:
    """The least that a run needs: full rows of text, no image, no fragmentation."""
    load = step_load(config, replicas, tiles=0)
    found = memory(config, replicas, load)
    return Memory(**{f.name: 0.0 if f.name == "reserve" else getattr(found, f.name) for f in fields(Memory)})


def gpus_needed(config: Config) -> int | None:
    """The fewest GPUs of 80 GB, in whole replicas, that fit a run. None if only more shards help."""
    batch = config.train.global_batch  # the number of replicas must divide it
    numbers = (n for n in range(1, batch + 1) if batch % n == 0)
    found = next((n for n in numbers if memory(config, n).total <= GPUS["h100"].memory), None)
    return None if found is None else found * config.parallel.replica


def fewest_gpus(config: Config) -> tuple[int, int] | None:
    """The fewest GPUs over several pipeline sizes, and that pipeline size; None if none of them is enough."""
    stages = [p for p in (1, 2, 4, 8) if config.llm.layers % (p * config.parallel.virtual) == 0]
    needed = {p: gpus_needed(replace(config, parallel=replace(config.parallel, pipeline=p))) for p in stages}
    return min(((gpus, p) for p, gpus in needed.items() if gpus is not None), default=None)


def rank_memory(
    config: Config, replicas: int, pipeline_rank: int, load: Load, kernels: Kernels | None = None
) -> Memory:
    """The memory of a process on one pipeline rank."""
    parameters, element = held(config, pipeline_rank), element_bytes(config)
    in_fp8_alone = parameters.kept_in_fp8 + parameters.adapted_in_fp8
    stages = pipeline_stages_of(config, pipeline_rank)
    kernels, trained = kernels or kernels_of(config), learning_parameters(config)
    chunks = [kept(config, pipeline_stage, load, kernels) for pipeline_stage in stages]
    activations = most_in_flight([chunk.total for chunk in chunks], config, pipeline_rank, load.micro_batches)
    working = activations + _backward_workspace(config, load, chunks) + element * parameters.largest
    highest = max(working, _encoder_workspace(config, load))
    if trained:
        highest = max(highest, backward_workspace(config, load, kernels))
    return Memory(
        # FP8 weights are stored row-wise and column-wise, in addition to bf16 or instead of it.
        weights=element * (parameters.all - in_fp8_alone) + 2 * parameters.quantized,
        encoder=(1 if config.precision.encoder else element) * encoder_parameters(config),
        gradients=4 * (parameters.learning + trained),
        optimizer=_optimizer(config, parameters.learning, trained, replicas),
        activations=activations,
        features=_features(config, load, stages),
        workspace=highest - activations + userbuffers(config),
        reserve=OUTSIDE + FRAGMENTED * highest,
    )


def userbuffers(config: Config) -> float:
    """Transformer Engine's twelve communication buffers of a row's tokens: eight for gathers, which FP8 halves, and
    four for scatters. With layers in FP8 and in bf16 there are those of both."""
    if not config.parallel.userbuffers:
        return 0.0
    fp8, both = config.precision.recipe is not None, config.precision.edges > 0
    bytes_each = (8 + 4 * 2) * fp8 + (12 * 2) * (both or not fp8)
    return bytes_each * config.padded_length / config.parallel.context * config.llm.hidden


def _optimizer(config: Config, learning: int, trained: int, replicas: int) -> float:
    """AdamW in fp32; the distributed optimizer shards it over the ranks with the same weights. `trained`: parameters of
    the encoder."""
    each = 8 if config.precision.dtype == "fp32" else 12
    shards = replicas * config.parallel.context if config.parallel.distributed_optimizer else 1
    return each * (learning / shards + trained / optimizer_shards(config, replicas))


def most_in_flight(chunks: list[float], config: Config, rank: int, micro_batches: int) -> float:
    """The peak of saved activations in the schedule. `chunks`: what each virtual stage saves per micro-batch."""
    p = config.parallel
    if p.pipeline == 1:
        return chunks[0]
    group, virtual = p.pipeline, p.virtual
    passes = min(micro_batches, 3 * group) * virtual  # after that, the schedule repeats
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
    """Features of all tiles in a step that the rank's stages use (and their gradients, if the encoder learns), and
    pixels of what it decodes."""
    uses = [tile_use(config, pipeline_stage) for pipeline_stage in stages]
    stream, keys = any(use.stream for use in uses), any(use.keys for use in uses)
    tokens = load.stream_from_tiles * stream + load.keys_from_tiles * keys
    pixels = -(-load.tiles // config.parallel.replica) * 3 * config.vision.tile_size**2
    return tokens * load.micro_batches * token_bytes(config) * (1 + config.stage.train_vision) + pixels


def token_bytes(config: Config) -> int:
    """Bytes of the features of one tile token."""
    return config.vision.feature_width * element_bytes(config)


def _encoder_workspace(config: Config, load: Load) -> float:
    """One encoder call, and three copies of the share's features: per call, concatenated, and exchanged."""
    encoder, share = model_of(config).encoder, -(-load.tiles // config.parallel.replica)
    inner = max((module.width for module in encoder.layer if isinstance(module, Activation)), default=0)
    # In an MLP: the residual, the norm's output, and the inner activations before and after GELU.
    tile = encoder.tokens * (2 * encoder.width + 2 * inner) * element_bytes(config)
    call = min(share, config.vision.tiles_per_call) * tile
    return call + 3 * share * config.vision.tile_tokens * token_bytes(config)


def _backward_workspace(config: Config, load: Load, chunks: list[Kept]) -> float:
    """Besides saved activations: the gradient of the logits, or a layer's gradients and recomputed activations."""
    p, element, branches = config.parallel, element_bytes(config), model_of(config).carrier
    inner = max(m.width for branch in branches for m in branch.modules if isinstance(m, Activation))
    tokens = load.tokens / p.context
    gathered = (
        2 * tokens * config.llm.hidden * element
    )  # under sequence parallelism: a linear's gathered input, and its gradient
    logits = chunks[-1].logits
    head = logits * element / 4 + gathered if logits else 0
    again = {"none": 0, "selective": 0.7, "full": 1}[config.train.recompute]  # an MLP has two thirds of a layer
    layer = max(chunk.whole for chunk in chunks) * again + 3 * tokens * inner / p.tensor * element + gathered
    return max(head, layer - logits)
