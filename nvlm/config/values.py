"""The configuration as frozen values. For rules that involve several fields, see nvlm.config.rules.

The dataclasses mirror conf/; nvlm.config.mapping builds them from Hydra's composed dictionary. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from nvlm.config.compute import ParallelConfig, PrecisionConfig
from nvlm.config.data import DataConfig
from nvlm.config.fields import Choice, Count, FileName, Grid, Location, Natural, NotNegative, Positive, Range, Text
from nvlm.config.hardware import GPUS
from nvlm.config.learning import OptimConfig, PeftConfig, StageConfig
from nvlm.config.video import VideoConfig
from nvlm.tiling.grid import POOLS, tokens_per_tile
from nvlm.tiling.tags import TAG_STYLES

GROUPS = ("vision", "projector", "xattn", "llm")
TE_INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"


class ConfigError(ValueError):
    """A configuration that cannot run. The message says what is wrong, what was expected, and how to fix it."""


def problem(what: str, got: object, expected: str, fix: str) -> ConfigError:
    """A configuration error in the standard form."""
    return ConfigError(f"{what}: got {got}, expected {expected}. Fix: {fix}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchConfig:
    """Where projected tiles go. `cross_every`: gated cross-attention in layers k, 2k, ... (0: none)."""

    name: str  # one that nvlm.arch.registry knows
    cross_every: Natural
    cross_std: NotNegative  # initial standard deviation of the new layers' weights
    # hybrid: what of its tag's words is added to a tile's keys and values:
    bind_tags: Annotated[str, Choice("none", "mean", "ordered")]
    sees: Annotated[str, Choice("before", "latest")]  # the images that text cross-attends: all before it, or the latest


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMConfig:
    """A Llama-, Mistral-, Qwen2- or Qwen3-shaped language model (RMSNorm, RoPE, grouped queries, SwiGLU)."""

    name: str
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    ffn: Count
    vocab: Count
    vocab_multiple: Count  # embedding and output layer are padded to a multiple of this, for sharding
    rope_theta: Positive
    # Llama 3.1's scaling, with the names in its config.json; None: no scaling:
    rope_scaling: dict[str, Positive] | None = field(hash=False)
    rope_interpolation: Annotated[float, Range(1)] = 1.0  # positions are divided by it (linear scaling)
    norm_eps: Positive
    qkv_bias: bool
    qk_norm: bool = False  # an RMSNorm of each head's queries and keys, before their rotary embedding (Qwen3)
    tied: bool
    max_positions: Count
    init_std: NotNegative
    embedding_std: NotNegative
    cross_std: NotNegative  # defaults, with this model, of arch.cross_std and (below) arch.cross_every
    cross_every: Count
    tokenizer: Location | None  # a folder or file with tokenizer.json; "tiny" ships with the package
    bos: Annotated[str, Text()] | None  # the token at the start of every conversation
    chat: Annotated[
        str, Choice("chatml", "llama3", "vicuna", "mistral", "mistral_v1", "plain", "template")
    ]  # nvlm.data.text.formats
    tag_tokens: Natural  # tokens per 1-D tile tag, used if no tokenizer is available
    thumbnail_tag: Annotated[str, Text()]

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the embedding and the output layer."""
        return math.ceil(self.vocab / self.vocab_multiple) * self.vocab_multiple

    @property
    def positions(self) -> int:
        """The longest sequence in tokens: interpolation stretches the positions that the model knows."""
        return int(self.max_positions * self.rope_interpolation)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """A vision encoder, of the family `encoder`. Sizes in px."""

    name: str
    encoder: str  # a name in nvlm/vision/encoders/registry.py
    hidden: Count
    layers: Count
    heads: Count
    ffn: Count
    patch: Count
    tile_size: Annotated[int, Range(1, example=448)]
    # Blocks of downsample x downsample patches become one token before the projector; with `pads`, zeros fill up
    # incomplete blocks of concat (nvlm.tiling.grid.pooled_side).
    downsample: Count
    pool: Annotated[str, Choice(*POOLS)]
    pads: bool
    order: Annotated[str, Choice("rows", "columns")] = "rows"  # of a tile's tokens; columns: VILA-1.5's mlp_downsample
    norm: Annotated[str, Choice("rms", "layer")]
    norm_eps: Positive
    qkv_bias: bool
    qk_norm: bool
    balance: Annotated[str, Choice("replica", "global")]  # distribute tiles over a replica, or over all ranks
    tiles_per_call: Count  # batch size of the encoder
    tiles_per_backward: Count = 4  # the same in the backward pass of one that learns, which keeps activations
    graph: bool  # run full encoder batches as a CUDA graph

    @property
    def patches(self) -> int:
        """Number of patches per tile (1024 at full size)."""
        return (self.tile_size // self.patch) ** 2

    @property
    def tile_tokens(self) -> int:
        """Number of tokens per tile after pooling (256 at full size)."""
        return tokens_per_tile(self.tile_size, self.patch, self.downsample, self.pool, self.pads)

    @property
    def feature_width(self) -> int:
        """Width of a tile's token, before the projector: concat puts the patches of a block side by side (12800 at full
        size)."""
        return self.hidden * (self.downsample**2 if self.pool == "concat" else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorConfig:
    """What maps a tile's tokens to the language model's width.

    `kind`: one linear (affine), two with GELU between them (mlp), or three (deep: VILA's mlp_downsample_3x3, in which
    the first makes a third of the width); None: what the architecture has in NVLM. `norm`: a LayerNorm comes first.
    `inner`: the mlp's inner width, the language model's own or that of its MLPs.
    """

    name: str
    kind: Annotated[str, Choice("affine", "mlp", "deep")] | None
    norm: bool
    bias: bool
    inner: Annotated[str, Choice("hidden", "ffn")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TilingConfig:
    """How an image becomes tiles (`kind`), of which at most `max_tiles` are cut from it, tagged in style `tag`.

    dhr: NVLM's dynamic high resolution; anyres: LLaVA-NeXT's, from the grids `pinpoints`; crops: the image's own
    resolution (LLaVA-NeXT-Ablations). The latter two make one feature map of the tiles, without their padding: with
    `newline`, a learned vector ends its rows, and `cap` limits it to so many times the tokens of a tile.

    `base`: how the whole picture becomes one tile, stretched or padded with the RGB `fill`. `several`: images of a
    record with several of them get the tiles that each would get alone (same), or one each (base). `unpad`: whether a
    map's size is rounded down, as LLaVA's code does, or first to 7 digits, as transformers does.
    """

    max_tiles: Annotated[int, Range(1, 256)]
    tag: Annotated[str, Choice(*TAG_STYLES)]
    resize: Annotated[str, Choice("fast", "exact", "draft")]
    kind: Annotated[str, Choice("dhr", "anyres", "crops")] = "dhr"
    pinpoints: tuple[Annotated[str, Grid()], ...] = ()
    newline: bool = False
    cap: Annotated[float, Range(above=0, example=9)] | None = None
    base: Annotated[str, Choice("stretch", "pad")] = "stretch"
    fill: tuple[Annotated[int, Range(0, 255)], ...] = (122, 116, 104)
    several: Annotated[str, Choice("same", "base")] = "same"
    unpad: Annotated[str, Choice("down", "digits")] = "down"


@dataclass(frozen=True, slots=True, kw_only=True)
class InitConfig:
    """Where weights come from at the start of a stage; None: random ones. `vision`: "tiny" ships with the package."""

    llm: Location | None  # a published language model: a folder with safetensors
    vision: Location | None  # a published encoder: a folder with safetensors, or a file
    release: Location | None  # a whole model in the layout of NVLM-D-72B, as written by an export
    checkpoint: Location | None  # the run folder of the previous stage, or one of its checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Length of the run in steps, samples per step, packed rows per micro-batch."""

    steps: Count
    global_batch: Count
    micro_batch: Count
    recompute: Annotated[str, Choice("none", "selective", "full")]
    offload: bool  # saved activations are offloaded to host memory
    log_every: Count
    save_every: Count
    keep: Count
    async_save: bool  # a forked process writes while training continues
    save_frozen: bool  # in every checkpoint, instead of once next to them
    threads: Count | None
    stop_seconds: Annotated[float, Range(above=0, example=600)]  # from SIGTERM to SIGKILL
    # Steps whose loss exceeds its running mean by this factor are skipped; 0: only non-finite ones are.
    spike_factor: Annotated[float, Range(above=1, also=0, example=3)]
    max_bad_steps: Count  # in a row before the run stops


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Answers to the questions of `tasks` in and after training, and the mean loss on held-out records of each source
    before it, too; 0: none. A batch has at most `batch` rows and `tokens` positions, padding included."""

    every: Natural = 0  # steps between evaluations; 0: only after the last one
    best: str | None = None  # the task whose best checkpoint is kept
    tasks: tuple[str, ...] = ("heldout",)  # in conf/task
    path: Location | None = None  # the folder of the benchmarks' files
    shots: Natural = 0  # examples with their answers before each question
    metric: str | None = None  # of the questions that are records of `data=`; None: the task's
    losses: Natural = 0  # records of each source
    questions: Natural | None  # of each task, at most; None: all
    batch: Count
    tokens: Count = 32768
    max_new_tokens: Count | None  # None: the task's
    gallery: Natural


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """Where steps are logged, in addition to the run folder."""

    name: Annotated[str, Choice("none", "wandb")]
    project: str | None
    entity: str | None
    mode: Annotated[str, Choice("online", "offline")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run."""

    name: Annotated[str, FileName()]
    seed: Natural
    resume: Annotated[str, Choice("never", "auto")]
    dry_run: bool
    profile: bool  # trace a few early steps of the first process
    gpu: Annotated[str, Choice(*GPUS)] | None  # the GPU whose memory the run must fit; None: this machine's
    init: InitConfig
    arch: ArchConfig
    llm: LLMConfig
    vision: VisionConfig
    projector: ProjectorConfig
    tiling: TilingConfig
    video: VideoConfig = VideoConfig()
    data: DataConfig
    stage: StageConfig
    peft: PeftConfig
    precision: PrecisionConfig
    parallel: ParallelConfig
    optim: OptimConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    logging: LoggingConfig

    @property
    def adapted(self) -> tuple[str, ...]:
        """The module groups with adapters, whose own weights are frozen."""
        return () if self.peft.name == "none" else tuple(t for t in self.peft.targets if t not in self.stage.new)

    @property
    def row_ends(self) -> bool:
        """Whether a learned vector ends the rows of feature maps, or separates the frames of videos."""
        return self.tiling.newline or self.video.separator != "none"

    @property
    def gradients_in_bf16(self) -> bool:
        """Whether replicas send each other gradients in bf16: never those of a run in fp32."""
        p = self.parallel
        return p.distributed_optimizer and p.gradients == "bf16" and self.precision.dtype == "bf16"

    @property
    def row_multiple(self) -> int:
        """Packed row lengths must be a multiple of this many tokens."""
        context = self.parallel.context
        return self.precision.multiple * self.parallel.tensor * (2 * context if context > 1 else 1)

    @property
    def padded_length(self) -> int | None:
        """The number of tokens that all rows of training are padded to; None: the longest of their micro-batch."""
        return -(-self.data.row_length // self.row_multiple) * self.row_multiple if self.parallel.userbuffers else None


def cross_layers(config: Config) -> tuple[int, ...]:
    """1-based numbers of the layers that carry gated cross-attention (NVLM section 4.5: every k-th)."""
    every = config.arch.cross_every
    return tuple(range(every, config.llm.layers + 1, every)) if every else ()


def pipeline_layers(config: Config, pipeline_stage: int) -> range:
    """0-based layers of `pipeline_stage`. Virtual stages are counted: stage v * pipeline + p is on rank p."""
    count = config.llm.layers // config.parallel.pipeline_stages
    return range(pipeline_stage * count, (pipeline_stage + 1) * count)
