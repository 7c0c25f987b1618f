"""The configuration as frozen values, and every rule that spans several fields.

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
from nvlm.tiling.tags import TAG_STYLES

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
    """Low-rank adapters on the linears of the layers of the module groups `targets`, in place of their weights."""

    name: str  # none, or lora
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def adapted(self) -> tuple[str, ...]:
        """The module groups with adapters."""
        return () if self.name == "none" else self.targets

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied with."""
        return self.alpha / self.rank


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

    @property
    def row_multiple(self) -> int:
        """What the length of a packed row must be a multiple of, tokens."""
        return 8 * self.tensor * (2 * self.context if self.context > 1 else 1)


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
    precision: str
    init: InitConfig
    arch: ArchConfig
    llm: LLMConfig
    vision: VisionConfig
    tiling: TilingConfig
    data: DataConfig
    stage: StageConfig
    peft: PeftConfig
    parallel: ParallelConfig
    optim: OptimConfig
    train: TrainConfig
    evaluate: EvaluateConfig


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


def _one_of(what: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        near = get_close_matches(got, known, n=1)
        raise problem(what, repr(got), f"one of {', '.join(known)}", f"{what}={near[0] if near else known[0]}")


def _positive(config: Config) -> None:
    counts = {
        "llm.vocab_multiple": config.llm.vocab_multiple,
        "parallel.tensor": config.parallel.tensor,
        "parallel.pipeline": config.parallel.pipeline,
        "parallel.virtual": config.parallel.virtual,
        "parallel.context": config.parallel.context,
        "parallel.context_heads": config.parallel.context_heads,
        "vision.tiles_per_call": config.vision.tiles_per_call,
        "parallel.data": config.parallel.data,
        "train.steps": config.train.steps,
        "train.global_batch": config.train.global_batch,
        "train.micro_batch": config.train.micro_batch,
        "train.log_every": config.train.log_every,
        "train.save_every": config.train.save_every,
        "train.keep": config.train.keep,
        "train.max_bad_steps": config.train.max_bad_steps,
        "tiling.max_tiles": config.tiling.max_tiles,
        "data.records": config.data.records,
        "data.window": config.data.window,
    }
    for what, got in counts.items():
        if got < 1:
            raise problem(what, got, "at least 1", f"{what}=1")


def _names(config: Config) -> None:
    _one_of("arch.name", config.arch.name, ("decoder", "xattn", "hybrid"))
    _one_of("tiling.tag", config.tiling.tag, TAG_STYLES)
    _one_of("tiling.resize", config.tiling.resize, ("fast", "exact"))
    _one_of("data.source", config.data.source, ("pages", "jsonl"))
    _one_of("data.tokenize", config.data.tokenize, ("apart", "joined"))
    _one_of("precision", config.precision, ("fp32", "bf16"))
    _one_of("resume", config.resume, ("never", "auto"))
    _one_of("vision.norm", config.vision.norm, ("rms", "layer"))
    for group in config.stage.new:
        _one_of("stage.new", group, ("projector", "xattn"))
    _one_of("vision.balance", config.vision.balance, ("replica", "global"))
    _one_of("train.recompute", config.train.recompute, ("none", "full"))
    if config.data.tokenize == "joined" and config.arch.name != "decoder":
        # Tags of the others are bound to their tiles one by one.
        raise problem("data.tokenize", "joined", f"apart for arch={config.arch.name}", "data.tokenize=apart")
    if config.data.source == "jsonl" and not config.data.path and not config.dry_run:
        raise problem("data.path", "nothing", "a .jsonl file", "data.path=records.jsonl")


def _shapes(config: Config) -> None:
    llm, vision, tensor = config.llm, config.vision, config.parallel.tensor
    if llm.heads % llm.kv_heads:
        raise problem("llm.heads", llm.heads, f"a multiple of llm.kv_heads={llm.kv_heads}", "change one of them")
    if vision.hidden % vision.heads:
        raise problem("vision.hidden", vision.hidden, f"a multiple of vision.heads={vision.heads}", "change one")
    cell = vision.patch * vision.downsample
    if vision.tile_size % cell:
        fix = f"vision.tile_size={max(1, vision.tile_size // cell) * cell}"
        raise problem("vision.tile_size", vision.tile_size, f"a multiple of patch x downsample = {cell}", fix)
    split = {"llm.heads": llm.heads, "llm.kv_heads": llm.kv_heads, "llm.ffn": llm.ffn}
    largest = math.gcd(*split.values())
    for what, size in split.items():
        if size % tensor:
            raise problem("parallel.tensor", tensor, f"a divisor of {what}={size}", f"parallel.tensor={largest}")
    if llm.padded_vocab % tensor:
        got = f"{llm.padded_vocab} rows (a multiple of llm.vocab_multiple={llm.vocab_multiple})"
        raise problem(
            "llm.vocab",
            got,
            f"a multiple of parallel.tensor={tensor}",
            f"llm.vocab_multiple={128 if 128 % tensor == 0 else tensor}",
        )
    if config.arch.name == "decoder":
        if config.arch.cross_every:
            raise problem("arch.cross_every", config.arch.cross_every, "0 for arch=decoder", "arch.cross_every=0")
    elif not 1 <= config.arch.cross_every <= llm.layers:
        fix = f"arch.cross_every={llm.cross_every}"
        raise problem("arch.cross_every", config.arch.cross_every, f"1 to llm.layers={llm.layers}", fix)


def _layout(config: Config) -> None:
    p, llm = config.parallel, config.llm
    if p.sequence and p.tensor == 1:
        raise problem("parallel.sequence", True, "parallel.tensor above 1", "parallel.sequence=false")
    if p.virtual > 1 and p.pipeline == 1:
        raise problem("parallel.virtual", p.virtual, "1 without pipeline stages", "parallel.pipeline=2")
    if llm.layers % p.stages:
        fix = f"parallel.pipeline={math.gcd(llm.layers, p.pipeline)} parallel.virtual=1"
        raise problem("parallel.pipeline x virtual", p.stages, f"a divisor of llm.layers={llm.layers}", fix)
    if p.context % p.context_heads:
        expected = f"a divisor of parallel.context={p.context}"
        raise problem("parallel.context_heads", p.context_heads, expected, "parallel.context_heads=1")
    groups = llm.kv_heads // p.tensor
    if groups % p.context_heads:
        expected = f"a divisor of llm.kv_heads / parallel.tensor = {groups}"
        fix = f"parallel.context_heads={math.gcd(groups, p.context)}"
        raise problem("parallel.context_heads", p.context_heads, expected, fix)


def _init(config: Config) -> None:
    given = [name for name in ("llm", "release", "checkpoint") if getattr(config.init, name)]
    if len(given) > 1:
        both = " and ".join(f"init.{name}" for name in given)
        raise problem(both, "several sources of the language model", "one of them", f"leave init.{given[0]} out")
    if config.init.release and config.init.vision:
        fix = "leave init.vision out, or take init.llm with it"
        raise problem("init.release and init.vision", "two encoders", "one of them", fix)


def _schedule(config: Config) -> None:
    if config.optim.warmup >= config.train.steps:
        raise problem("optim.warmup", config.optim.warmup, f"fewer than train.steps={config.train.steps}", "lower it")


def _faults(config: Config) -> None:
    factor = config.train.spike_factor
    if factor != 0 and factor <= 1:
        raise problem("train.spike_factor", factor, "above 1, or 0 for none", "train.spike_factor=3")
    for what, got in (
        ("train.stop_seconds", config.train.stop_seconds),
        ("parallel.timeout_minutes", config.parallel.timeout_minutes),
    ):
        if got <= 0:
            raise problem(what, got, "above 0", f"{what}=10")


def _stage(config: Config) -> None:
    groups = set(config.stage.trainable)
    if config.arch.name == "decoder":
        groups -= {"xattn"}
    if not groups:
        raise problem(
            "stage", "nothing to train", "at least one module group that learns", "stage.train_projector=true"
        )


def _peft(config: Config) -> None:
    peft = config.peft
    _one_of("peft", peft.name, ("none", "lora"))
    if peft.name == "none":
        return
    if peft.rank < 1:
        raise problem("peft.rank", peft.rank, "at least 1", "peft.rank=16")
    if not 0 <= peft.dropout < 1:
        raise problem("peft.dropout", peft.dropout, "at least 0 and below 1", "peft.dropout=0")
    for target in peft.targets:
        _one_of("peft.targets", target, ("llm", "xattn"))
    learns = set(config.stage.trainable) - ({"xattn"} if config.arch.name == "decoder" else set())
    if learns.isdisjoint(peft.targets):
        known = ", ".join(sorted(learns & {"llm", "xattn"})) or "but it trains neither"
        expected = f"at least one that stage={config.stage.name} trains ({known})"
        raise problem("peft.targets", list(peft.targets), expected, "stage=sft, or peft=none")


def validate(config: Config) -> Config:
    """Check every cross-field rule (token lengths: nvlm.lengths); return `config` or raise ConfigError, one message."""
    for rule in (_positive, _names, _shapes, _layout, _init, _schedule, _faults, _stage, _peft):
        rule(config)
    return config


def check_world(config: Config, world: int) -> int:
    """The data-parallel size of `world` processes under `config`; raises ConfigError where it does not divide."""
    replica = config.parallel.replica
    if world % replica:
        expected = f"a multiple of {replica} (tensor x pipeline x context)"
        raise problem("number of processes", world, expected, f"start {max(1, world // replica) * replica}")
    data = world // replica
    if config.train.global_batch % data:
        expected = f"a multiple of the {data} data-parallel replicas"
        fix = f"train.global_batch={max(1, config.train.global_batch // data) * data}"
        raise problem("train.global_batch", config.train.global_batch, expected, fix)
    return data


def cross_layers(config: Config) -> tuple[int, ...]:
    """1-based numbers of the layers that carry gated cross-attention (NVLM section 4.5: every k-th)."""
    every = config.arch.cross_every
    return tuple(range(every, config.llm.layers + 1, every)) if every else ()


def stage_layers(config: Config, stage: int) -> range:
    """0-based layers of pipeline stage `stage` (virtual ones counted: stage v * pipeline + p is on rank p)."""
    count = config.llm.layers // config.parallel.stages
    return range(stage * count, (stage + 1) * count)
