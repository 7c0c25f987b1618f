"""The configuration as frozen values (the rules that span several fields: nvlm.config.rules).

The dataclasses mirror conf/; `from_mapping` builds them from Hydra's composed dictionary. Imports no torch, so
that a mistake is answered in seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated

from nvlm.config.fields import Choice, FileName, FilePath, Range, Text
from nvlm.config.hardware import GPUS
from nvlm.tiling.grid import tokens_per_tile
from nvlm.tiling.tags import TAG_STYLES

GROUPS = ("vision", "projector", "xattn", "llm")
IMAGE_MARK = "<image>"  # where an image stands in a message
TE_INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"
FP8_RECIPES = {"fp8_delayed": "delayed", "fp8_current": "tensorwise", "fp8_blockwise": "blockwise", "mxfp8": "mxfp8"}

Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(above=0, example=1)]
NotNegative = Annotated[float, Range(0)]
Location = Annotated[str, FilePath()]


class ConfigError(ValueError):
    """A configuration that cannot run; the message says what, got, expected, and what to change."""


def problem(what: str, got: object, expected: str, fix: str) -> ConfigError:
    """The one form of every configuration message."""
    return ConfigError(f"{what}: got {got}, expected {expected}. Fix: {fix}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchConfig:
    """Where projected tiles go. `cross_every`: gated cross-attention in layers k, 2k, ... (0: none)."""

    name: Annotated[str, Choice("decoder", "xattn", "hybrid")]
    cross_every: Natural
    cross_std: NotNegative  # of the new layers' weights at the start
    bind_tags: bool  # hybrid: add each tile's tag embedding to its keys and values


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMConfig:
    """A Qwen2- or Llama-shaped language model (RMSNorm, RoPE, grouped queries, SwiGLU)."""

    name: str
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    ffn: Count
    vocab: Count
    vocab_multiple: Count  # embedding and output layer are padded to a multiple of it, so that ranks can share them
    rope_theta: Positive
    rope_scaling: dict[str, Positive] | None  # Llama 3.1's, by the names of its config.json; None: none
    norm_eps: Positive
    qkv_bias: bool
    tied: bool
    max_positions: Count
    init_std: NotNegative
    embedding_std: NotNegative
    cross_std: NotNegative
    cross_every: Count
    tokenizer: Location | None  # a folder or file with tokenizer.json; "tiny" ships with the package
    bos: Annotated[str, Text()] | None  # the token that begins every conversation
    tag_tokens: Natural  # tokens of one 1-D tile tag, used where the tokenizer is not at hand
    thumbnail_tag: Annotated[str, Text()]
    seq_length: dict[str, Count]  # text stream by architecture
    cross_length: dict[str, Natural]  # cross-attended tokens by architecture
    steps: dict[str, Count]  # of a training run by architecture

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and of the output layer."""
        return math.ceil(self.vocab / self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """An InternViT. Sizes in px."""

    name: str
    hidden: Count
    layers: Count
    heads: Count
    ffn: Count
    patch: Count
    tile_size: Annotated[int, Range(1, example=448)]
    downsample: Count
    norm: Annotated[str, Choice("rms", "layer")]  # layer: InternViT-300M
    norm_eps: Positive
    qkv_bias: bool
    qk_norm: bool
    balance: Annotated[str, Choice("replica", "global")]  # whose ranks the tiles are spread over: a replica's, or all
    tiles_per_call: Count  # the encoder's batch
    graph: bool  # full batches of the encoder as a CUDA graph

    @property
    def tile_tokens(self) -> int:
        """Tokens of one tile after pixel shuffle (256 at full size)."""
        return tokens_per_tile(self.tile_size, self.patch, self.downsample)


@dataclass(frozen=True, slots=True, kw_only=True)
class TilingConfig:
    """Dynamic high resolution: at most `max_tiles` regular tiles, tagged in style `tag`."""

    max_tiles: Annotated[int, Range(1, 256)]
    tag: Annotated[str, Choice(*TAG_STYLES)]
    resize: Annotated[str, Choice("fast", "exact")]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where records come from and how long a packed row may be (tokens)."""

    source: Annotated[str, Choice("pages", "jsonl")]
    path: Location | None
    heldout_path: Location | None
    records: Count
    heldout_records: Count
    questions: Annotated[int, Range(1, 12)]
    seq_length: Count  # tokens: the longest sample
    cross_length: Natural  # cross-attended tokens of a row
    row_length: Count  # tokens: rows are filled up to here; a longer sample has a row of its own
    system: Annotated[str, Text(without=IMAGE_MARK)] | None
    tokenize: Annotated[str, Choice("apart", "joined", "vllm")]  # how text and tags become tokens: nvlm.data.chat
    workers: Natural
    max_skipped: Annotated[float, Range(0, 1)]
    max_pixels: Annotated[int, Range(1, example=50_000_000)]
    window: Count  # steps whose records are packed together


@dataclass(frozen=True, slots=True, kw_only=True)
class InitConfig:
    """Where weights come from at the start of a stage; None: random ones. `vision`: "tiny" ships with the package."""

    llm: Location | None  # a published language model: a folder with safetensors
    vision: Location | None  # a published InternViT: a folder with safetensors, or a file
    release: Location | None  # a whole model in the layout of NVLM-D-72B: what an export writes
    checkpoint: Location | None  # a run folder of the stage before, or one of its checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """Which module groups learn."""

    name: str
    train_projector: bool
    train_xattn: bool
    train_llm: bool
    # Module groups that may begin with random weights where others are read:
    new: tuple[Annotated[str, Choice("projector", "xattn")], ...]

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

    name: Annotated[str, Choice("none", "lora")]
    rank: Annotated[int, Range(1, example=16)]
    alpha: Positive
    dropout: Annotated[float, Range(0, below=1)]
    targets: tuple[Annotated[str, Choice("llm", "xattn")], ...]

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """What products are computed in: fp32, bf16, or FP8 after one of Transformer Engine's recipes.

    Norms, gates, the projector, the embedding and the output layer never are in FP8.
    """

    name: Annotated[str, Choice("bf16", "fp32", *FP8_RECIPES)]
    edges: Natural  # FP8: decoder layers at either end that compute in bf16
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel dimensions of one model replica; data parallelism takes the rest."""

    tensor: Count
    pipeline: Count
    virtual: Count
    context: Count
    context_heads: Count  # context-parallel ranks that trade columns for heads; the others gather keys
    sequence: bool
    data: Count  # replicas that launch/train.py starts by itself
    distributed_optimizer: bool
    timeout_minutes: Annotated[float, Range(above=0, most=525_600, example=10)]  # without progress, then the run ends

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
    def pipeline_stages(self) -> int:
        """Parts that the layers are cut into, virtual ones counted."""
        return self.pipeline * self.virtual

    @property
    def context_mesh(self) -> tuple[int, int]:
        """Context-parallel ranks of the all-to-all over heads, and of the gather of keys."""
        return self.context_heads, self.context // self.context_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up (in steps) and cosine decay (NVLM Tables 10 and 11)."""

    lr: Annotated[float, Range(above=0, example=1e-5)]
    min_lr: NotNegative
    warmup: Natural
    beta1: Annotated[float, Range(0, below=1, example=0.9)]
    beta2: Annotated[float, Range(0, below=1, example=0.95)]
    eps: Annotated[float, Range(above=0, example=1e-8)]
    weight_decay: NotNegative
    clip: NotNegative


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Length of the run in steps, samples per step, packed rows per micro-batch."""

    steps: Count
    global_batch: Count
    micro_batch: Count
    recompute: Annotated[str, Choice("none", "selective", "full")]
    offload: bool  # kept activations wait in the host's memory
    log_every: Count
    save_every: Count
    keep: Count
    async_save: bool  # a forked process writes while training goes on
    save_frozen: bool  # into every checkpoint, instead of once beside them
    threads: Count | None
    stop_seconds: Annotated[float, Range(above=0, example=600)]  # from SIGTERM to SIGKILL
    # A loss this many times its running mean is not learned from; 0: any finite one is.
    spike_factor: Annotated[float, Range(above=1, also=0, example=3)]
    max_bad_steps: Count  # in a row, then the run stops


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Exact match on held-out questions after training; 0 questions: none."""

    questions: Natural
    batch: Count
    max_new_tokens: Count
    gallery: Natural


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """Where else than into the run folder the steps are told."""

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
    profile: bool  # a few early steps of the first process
    gpu: Annotated[str, Choice(*GPUS)] | None  # whose memory a run is to fit; None: the machine's own
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
    logging: LoggingConfig

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
    """Build the dataclass `cls` from plain `values`. Raises ConfigError for a key that is unknown or missing, and for a
    value that is not of its field's type or beyond the field's limits."""
    kinds = kinds_of(cls)
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        near = get_close_matches(unknown[0], kinds, n=3, cutoff=0.7)
        fix = f"{path}{near[0]}=..." if near else "leave it out"
        expected = f"one of {', '.join(near or sorted(kinds))}"
        raise problem(f"{path}{unknown[0]}", "a key that does not exist", expected, fix)
    missing = sorted(set(kinds) - set(values))
    if missing:
        raise problem(f"{path}{missing[0]}", "nothing", str(kinds[missing[0]]), f"{path}{missing[0]}=...")
    return cls(**{key: _checked(kind, values[key], f"{path}{key}") for key, kind in kinds.items()})


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field may hold: a `type`, for containers the kinds `inside`, the `limits` of its annotation, or None."""

    type: type
    inside: tuple[Kind, ...]
    limits: tuple
    optional: bool

    def __str__(self) -> str:
        limits = ", ".join(map(str, self.limits))
        if self.type is str and limits:
            return limits
        return ", ".join(filter(None, (_KINDS.get(self.type, "a group of keys"), limits)))


@functools.cache
def kinds_of(cls: type) -> dict[str, Kind]:
    """The fields of a dataclass."""
    return {name: _kind(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}


def _kind(hint) -> Kind:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    some = next(option for option in options if option is not types.NoneType)
    limits = some.__metadata__ if typing.get_origin(some) is Annotated else ()
    bare = typing.get_args(some)[0] if limits else some
    inside = tuple(_kind(part) for part in typing.get_args(bare) if part is not ...)
    return Kind(typing.get_origin(bare) or bare, inside, limits, len(options) > 1)


_LARGEST = 2**62  # in 64 bits, with room to count on
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    tuple: "a list",
}
_EXAMPLES = {int: "1", float: "1", bool: "true", str: "'\"text\"'", dict: "{name:1}", tuple: "[a,b]"}


def _checked(kind: Kind, value, path: str, fix: str = "{}={}"):
    if value is None and kind.optional:
        return None
    if dataclasses.is_dataclass(kind.type):
        if not isinstance(value, dict):
            raise problem(path, repr(value), str(kind), f"{path}.KEY=...")
        return from_mapping(kind.type, value, f"{path}.")
    value = _as_type(kind.type, value, path)
    if kind.type is dict:
        return {key: _checked(kind.inside[1], item, f"{path}.{key}") for key, item in value.items()}
    if kind.type is tuple:
        return tuple(_checked(kind.inside[0], item, path, "{}=[{}]") for item in value)
    for limit in kind.limits:
        if value not in limit:
            got = repr(value) if kind.type is str else value
            raise problem(path, got, str(limit), fix.format(path, limit.instead(value)))
        if isinstance(limit, FilePath):  # a shell leaves the ~ of key=~/file alone
            value = os.path.expanduser(value)
    return value


def _as_type(wanted: type, value, path: str):
    """`value` as a `wanted`, where it can be read as nothing else."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if wanted is str and whole:  # name: 20241127
        return str(value)
    if wanted is float and (whole or isinstance(value, str)):  # YAML reads 1e-4 as text
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if wanted is tuple and isinstance(value, list):
        return tuple(value)
    if wanted is int and whole and abs(value) > _LARGEST:
        raise problem(path, value, f"a number of at most {len(str(_LARGEST)) - 1} digits", f"{path}=1")
    if not isinstance(value, wanted) or (wanted is int and not whole):
        example = f"[{value.strip('[]')}]" if wanted is tuple and isinstance(value, str) else _EXAMPLES[wanted]
        raise problem(path, repr(value), _KINDS[wanted], f"{path}={example}")
    return value


def cross_layers(config: Config) -> tuple[int, ...]:
    """1-based numbers of the layers that carry gated cross-attention (NVLM section 4.5: every k-th)."""
    every = config.arch.cross_every
    return tuple(range(every, config.llm.layers + 1, every)) if every else ()


def pipeline_layers(config: Config, pipeline_stage: int) -> range:
    """0-based layers of pipeline stage `pipeline_stage`; virtual stages count: v * pipeline + p is on rank p."""
    count = config.llm.layers // config.parallel.pipeline_stages
    return range(pipeline_stage * count, (pipeline_stage + 1) * count)


def near_keys(key: str, known: Sequence[str]) -> list[str]:
    """Those of `known` that `key` may have meant: of its own section, or of the same name in another one."""
    section, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    if section and siblings:
        close = get_close_matches(leaf, siblings, n=3, cutoff=0.6) or list(siblings)[:20]
        return [siblings[name] for name in close]
    namesakes = [name for name in known if name.rpartition(".")[2] == leaf]
    return namesakes or get_close_matches(key, known, n=3, cutoff=0.75)
