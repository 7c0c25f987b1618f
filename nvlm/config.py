"""The configuration as frozen values (the rules that span several fields: nvlm.rules).

The dataclasses mirror conf/; `from_mapping` builds them from Hydra's composed dictionary. Imports no torch, so
that a mistake is answered in seconds.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from difflib import get_close_matches

from nvlm.tiling.budget import tokens_per_tile

GROUPS = ("vision", "projector", "xattn", "llm")


class ConfigError(ValueError):
    """A configuration that cannot run; the message says what, got, expected, and what to change."""


def problem(what: str, got: object, expected: str, fix: str) -> ConfigError:
    """The one form of every configuration message."""
    return ConfigError(f"{what}: got {got}, expected {expected}. Fix: {fix}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchConfig:
    """Where projected tiles go. `cross_every`: gated cross-attention in layers k, 2k, ... (0: none)."""

    name: str
    cross_every: int
    cross_std: float  # of the new layers' weights at the start
    bind_tags: bool  # hybrid: add each tile's tag embedding to its keys and values


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMConfig:
    """A Qwen2- or Llama-shaped language model (RMSNorm, RoPE, grouped queries, SwiGLU)."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    vocab_multiple: int  # embedding and output layer are padded to a multiple of it, so that ranks can share them
    rope_theta: float
    rope_scaling: dict[str, float] | None  # Llama 3.1's, by the names of its config.json; None: none
    norm_eps: float
    qkv_bias: bool
    tied: bool
    max_positions: int
    init_std: float
    embedding_std: float
    cross_std: float
    cross_every: int
    tokenizer: str | None  # a folder or file with tokenizer.json; "tiny" ships with the package
    bos: str | None  # the token that begins every conversation
    tag_tokens: int  # tokens of one 1-D tile tag, used where the tokenizer is not at hand
    thumbnail_tag: str
    seq_length: dict[str, int]  # text stream by architecture
    cross_length: dict[str, int]  # cross-attended tokens by architecture
    steps: dict[str, int]  # of a training run by architecture

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and of the output layer."""
        return math.ceil(self.vocab / self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """An InternViT. Sizes in px."""

    name: str
    hidden: int
    layers: int
    heads: int
    ffn: int
    patch: int
    tile_size: int
    downsample: int
    norm: str  # rms, or layer (InternViT-300M)
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    balance: str  # replica: tiles are spread over the ranks of a replica; global: over all ranks
    tiles_per_call: int  # the encoder's batch
    graph: bool  # full batches of the encoder as a CUDA graph

    @property
    def tile_tokens(self) -> int:
        """Tokens of one tile after pixel shuffle (256 at full size)."""
        return tokens_per_tile(self.tile_size, self.patch, self.downsample)


@dataclass(frozen=True, slots=True, kw_only=True)
class TilingConfig:
    """Dynamic high resolution: at most `max_tiles` regular tiles, tagged in style `tag`."""

    max_tiles: int
    tag: str
    resize: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where records come from and how long a packed row may be (tokens)."""

    source: str
    path: str | None
    heldout_path: str | None
    records: int
    heldout_records: int
    questions: int
    seq_length: int  # tokens: the longest sample
    cross_length: int  # cross-attended tokens of a row
    row_length: int  # tokens: rows are filled up to here; a longer sample has a row of its own
    system: str | None
    tokenize: str  # apart: text and tags as in training; joined: as NVLM-D's Hugging Face release does
    workers: int
    max_skipped: float
    max_pixels: int
    window: int  # steps whose records are packed together


@dataclass(frozen=True, slots=True, kw_only=True)
class InitConfig:
    """Where weights come from at the start of a stage; None: random ones. `vision`: "tiny" ships with the package."""

    llm: str | None  # a published language model: a folder with safetensors
    vision: str | None  # a published InternViT: a folder with safetensors, or a file
    release: str | None  # a whole model in the layout of NVLM-D-72B: what an export writes
    checkpoint: str | None  # a run folder of the stage before, or one of its checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """Which module groups learn."""

    name: str
    train_projector: bool
    train_xattn: bool
    train_llm: bool
    new: tuple[str, ...]  # module groups that may begin with random weights where others are read

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the module groups that learn; the encoder never does."""
        flags = {"projector": self.train_projector, "xattn": self.train_xattn, "llm": self.train_llm}
        return tuple(group for group, learns in flags.items() if learns)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """Low-rank adapters on the linears of the layers of the module groups `targets`, in place of their weights.

    A target that the stage declares new has no weights worth keeping: it learns in full, without adapters.
    """

    name: str  # none, or lora
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """What products are computed in: fp32, bf16, or FP8 after one of Transformer Engine's recipes.

    Norms, gates, the projector, the embedding and the output layer never are in FP8.
    """

    name: str
    edges: int  # FP8: decoder layers at either end that compute in bf16
    encoder: bool  # FP8: the frozen encoder's weights and products too
    param_gather: bool  # FP8: weights of the decoder's linears that learn are kept, and gathered over replicas, in FP8

    @property
    def dtype(self) -> str:
        """Of weights and activations: fp32 or bf16."""
        return "fp32" if self.name == "fp32" else "bf16"

    @property
    def recipe(self) -> str | None:
        """Megatron's name of the FP8 recipe; None: no FP8."""
        return FP8_RECIPES.get(self.name)

    @property
    def multiple(self) -> int:
        """What the number of tokens of a linear's input must be a multiple of on each rank."""
        return {"fp8_delayed": 16, "fp8_current": 16, "mxfp8": 32, "fp8_blockwise": 128}.get(self.name, 8)

    @property
    def width_multiple(self) -> int:
        """What a linear's inputs and outputs must be a multiple of on each rank."""
        return max(16, self.multiple) if self.recipe else 1


TE_INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"
FP8_RECIPES = {"fp8_delayed": "delayed", "fp8_current": "tensorwise", "fp8_blockwise": "blockwise", "mxfp8": "mxfp8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel dimensions of one model replica; data parallelism takes the rest."""

    tensor: int
    pipeline: int
    virtual: int
    context: int
    context_heads: int  # context-parallel ranks that trade columns for heads; the others gather keys
    sequence: bool
    data: int  # replicas that launch/train.py starts by itself
    distributed_optimizer: bool
    timeout_minutes: float  # without progress, then the run ends

    @property
    def overlap(self) -> bool:
        """Whether the distributed optimizer's communication is hidden behind forward and backward.

        Not with pipeline stages: gradients of what several of them hold are summed first, behind the whole backward.
        """
        return self.distributed_optimizer and self.pipeline == 1

    @property
    def replica(self) -> int:
        """Processes of one model replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def stages(self) -> int:
        """Parts that the layers are cut into, virtual ones counted."""
        return self.pipeline * self.virtual

    @property
    def context_mesh(self) -> tuple[int, int]:
        """Context-parallel ranks of the all-to-all over heads, and of the gather of keys."""
        return self.context_heads, self.context // self.context_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up (in steps) and cosine decay (NVLM Tables 10 and 11)."""

    lr: float
    min_lr: float
    warmup: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Length of the run in steps, samples per step, packed rows per micro-batch."""

    steps: int
    global_batch: int
    micro_batch: int
    recompute: str
    offload: bool  # kept activations wait in the host's memory
    log_every: int
    save_every: int
    keep: int
    async_save: bool  # a forked process writes while training goes on
    save_frozen: bool  # into every checkpoint, instead of once beside them
    threads: int | None
    stop_seconds: float  # from SIGTERM to SIGKILL
    spike_factor: float  # a loss this many times its running mean is not learned from; 0: any finite one is
    max_bad_steps: int  # in a row, then the run stops


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Exact match on held-out questions after training; 0 questions: none."""

    questions: int
    batch: int
    max_new_tokens: int
    gallery: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run."""

    name: str
    seed: int
    resume: str
    dry_run: bool
    profile: bool  # a few early steps of the first process
    gpu: str | None  # whose memory a run is to fit, by the names of nvlm.hardware; None: the machine's own
    init: InitConfig
    arch: ArchConfig
    llm: LLMConfig
    vision: VisionConfig
    tiling: TilingConfig
    data: DataConfig
    stage: StageConfig
    peft: PeftConfig
    precision: PrecisionConfig
    parallel: ParallelConfig
    optim: OptimConfig
    train: TrainConfig
    evaluate: EvaluateConfig

    @property
    def adapted(self) -> tuple[str, ...]:
        """The module groups with adapters, whose own weights do not learn."""
        return () if self.peft.name == "none" else tuple(t for t in self.peft.targets if t not in self.stage.new)

    @property
    def row_multiple(self) -> int:
        """What the length of a packed row must be a multiple of, tokens."""
        context = self.parallel.context
        return self.precision.multiple * self.parallel.tensor * (2 * context if context > 1 else 1)


def from_mapping(cls: type, values: dict, path: str = ""):
    """Build the dataclass `cls` from plain `values`; unknown, missing and mistyped keys raise ConfigError."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        near = get_close_matches(unknown[0], hints, n=3, cutoff=0.5) or sorted(hints)
        raise problem(f"{path}{unknown[0]}", "a key that does not exist", f"one of {', '.join(near)}", "rename it")
    missing = sorted(set(hints) - set(values))
    if missing:
        raise problem(f"{path}{missing[0]}", "nothing", f"a value of type {hints[missing[0]]}", "set it")
    return cls(**{key: _coerce(hints[key], values[key], f"{path}{key}") for key in hints})


def _coerce(kind, value, path: str):
    if dataclasses.is_dataclass(kind):
        return from_mapping(kind, value, f"{path}.")
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    plain = next(o for o in options if o is not type(None))
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is float and isinstance(value, str):  # YAML reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if typing.get_origin(plain) is dict and isinstance(value, dict):
        return dict(value)
    if typing.get_origin(plain) is tuple and isinstance(value, list):
        return tuple(value)
    if not isinstance(plain, type) or not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        name = getattr(plain, "__name__", str(plain))
        raise problem(path, repr(value), f"a value of type {name}", f"write {path}=<{name}>")
    return value


def cross_layers(config: Config) -> tuple[int, ...]:
    """1-based numbers of the layers that carry gated cross-attention (NVLM section 4.5: every k-th)."""
    every = config.arch.cross_every
    return tuple(range(every, config.llm.layers + 1, every)) if every else ()


def stage_layers(config: Config, stage: int) -> range:
    """0-based layers of pipeline stage `stage` (virtual ones counted: stage v * pipeline + p is on rank p)."""
    count = config.llm.layers // config.parallel.stages
    return range(stage * count, (stage + 1) * count)
