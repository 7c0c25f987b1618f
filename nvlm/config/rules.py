"""All rules that involve several fields of a configuration, with one message each. Imports no torch."""

from __future__ import annotations

import math

from nvlm.config.compute import FP8_RECIPES
from nvlm.config.data import Blend, Pages, Source
from nvlm.config.fields import FileName, FilePath
from nvlm.config.learning_rules import LEARNING
from nvlm.config.mapping import kinds_of
from nvlm.config.tiles import grid_of
from nvlm.config.values import Config, VisionConfig, problem
from nvlm.config.video_rules import check_video

_BUFFERED = ("bf16", "fp8_current", "fp8_delayed")  # precisions whose operands fit Transformer Engine's userbuffers


def _data(config: Config) -> None:
    data = config.data
    if data.tokenize == "vllm" and (config.tiling.tag != "1d" or config.tiling.max_tiles > 9):
        got = f"vllm with tiling.tag={config.tiling.tag} tiling.max_tiles={config.tiling.max_tiles}"
        raise problem("data.tokenize", got, "tiling.tag=1d and at most 9 tiles, as vLLM has", "data.tokenize=apart")
    if data.tokenize != "apart" and config.llm.chat != "chatml":
        got = f"{data.tokenize} with llm.chat={config.llm.chat}"
        raise problem("data.tokenize", got, "apart: the others are ways to tokenize ChatML", "data.tokenize=apart")
    if config.llm.chat == "plain" and isinstance(data.source, Pages) and data.source.questions > 1:
        raise problem(
            "data.questions", data.source.questions, "1 with llm.chat=plain, which has no turns", "data.questions=1"
        )
    _pages(data.source)
    if data.tokenize != "apart" and data.index is not None:
        got = f"one with data.tokenize={data.tokenize}, whose number of text tokens depends on the tiles"
        raise problem("data.index", got, "data.tokenize=apart", "data.index=null")
    if isinstance(data.source, Blend):
        _blend(data.source, config.dry_run)
    elif not config.dry_run:
        _needed(data.source, "data.")
    llm = config.llm
    if data.seq_length > llm.positions:
        needed = math.ceil(data.seq_length / llm.rope_interpolation)
        stretched = f" x llm.rope_interpolation={llm.rope_interpolation:g}" if llm.rope_interpolation > 1 else ""
        expected = f"at most the positions that the model knows, llm.max_positions={llm.max_positions}{stretched}"
        fix = f"data.seq_length={llm.positions}, or llm.max_positions={needed} where the model learns that many"
        raise problem("data.seq_length", data.seq_length, expected, fix)


def _pages(source: Source) -> None:
    parts = source.sources or {} if isinstance(source, Blend) else {}
    for prefix, one in (("data.", source), *((f"data.sources.{name}.", part.source) for name, part in parts.items())):
        if isinstance(one, Pages) and one.about == "positions" and one.questions > 5:
            expected = f"at most 5 with {prefix}about=positions: no more are distinct about a page of one tile"
            raise problem(f"{prefix}questions", one.questions, expected, f"{prefix}questions=5")


def _blend(blend: Blend, dry_run: bool) -> None:
    key, parts = "data.sources", blend.sources or {}
    if not parts:
        raise problem(key, "nothing", "sources by name", f"{key}='{{a: {{source: jsonl, path: FILE, weight: 1}}}}'")
    for name, part in parts.items():
        if not FileName.plain(name):
            raise problem(key, repr(name), "names that can be file names, without dots", f"another name for {name!r}")
        if (part.weight is None) == (part.epochs is None):
            got = "both weight and epochs" if part.weight else "neither weight nor epochs"
            raise problem(f"{key}.{name}", got, "one of them", f"{key}.{name}.weight=1")
    if not dry_run and (lacking := without_path(blend)):
        expected = f"a path for each of the {len(parts)} sources"
        fix = f"{key}.{lacking[0]}.path=FILE, or {key}.{lacking[0]}=null, which leaves it out"
        raise problem(key, f"no path for {', '.join(lacking)}", expected, fix)
    if len({part.weight is None for part in parts.values()}) > 1:
        counted = ", ".join(name for name, part in parts.items() if part.weight is None)
        raise problem(key, f"epochs for {counted}, a weight for others", "the same for all", "weights, or epochs")
    texts = [part.text_only for part in parts.values()]
    if blend.text_share and len(set(texts)) < 2:
        got = (
            "no source with text_only=true" if not any(part.text_only for part in parts.values()) else "no other source"
        )
        raise problem("data.text_share", got, "sources of both kinds", "data.text_share=null")


def without_path(blend: Blend) -> list[str]:
    """The names of the sources whose files are not named yet."""
    return [name for name, part in (blend.sources or {}).items() if not getattr(part.source, "path", "-")]


def _needed(source: Source, path: str) -> None:
    """Raise ConfigError if the source of records at `path` lacks a file that it requires."""
    for name, kind in kinds_of(type(source)).items():
        for limit in kind.limits:
            if isinstance(limit, FilePath) and limit.needed and not getattr(source, name):
                raise problem(f"{path}{name}", "nothing", limit.needed, f"{path}{name}={limit.example}")


def _shapes(config: Config) -> None:
    llm, vision, tensor = config.llm, config.vision, config.parallel.tensor
    if llm.heads % llm.kv_heads:
        raise problem("llm.heads", llm.heads, f"a multiple of llm.kv_heads={llm.kv_heads}", "change one of them")
    if llm.rope_interpolation > 1 and llm.rope_scaling is not None:
        got = f"{llm.rope_interpolation:g} with llm.rope_scaling"
        raise problem("llm.rope_interpolation", got, "one way to scale positions", "llm.rope_interpolation=1")
    if llm.head_dim % 2:
        fix = f"llm.head_dim={llm.head_dim + 1}"
        raise problem("llm.head_dim", llm.head_dim, "an even number: rotary angles turn pairs", fix)
    if vision.hidden % vision.heads:
        raise problem("vision.hidden", vision.hidden, f"a multiple of vision.heads={vision.heads}", "change one")
    _pooling(vision, config.tiling.kind != "dhr")
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


def _tiling(config: Config) -> None:
    tiling = config.tiling
    if tiling.kind == "dhr":
        of_maps = {"pinpoints": (), "newline": False, "cap": None, "base": "stretch"}
        for name, value in of_maps.items():
            if (got := getattr(tiling, name)) != value:
                told = list(got) if isinstance(got, tuple) else got
                raise problem(f"tiling.{name}", told, "nothing with tiling.kind=dhr", "tiling=anyres, or leave it out")
    if config.data.tokenize != "apart" and not config.data.image_marks:
        got = f"{config.data.tokenize} with data.image_marks=false"
        raise problem("data.tokenize", got, "apart: the others are for NVLM's marks", "data.tokenize=apart")
    if tiling.kind != "dhr" and config.data.tokenize != "apart":
        got = f"{config.data.tokenize} with tiling.kind={tiling.kind}"
        raise problem("data.tokenize", got, "apart: the others are for NVLM's tiles", "data.tokenize=apart")
    if tiling.kind == "crops" and tiling.pinpoints:
        expected = "nothing with tiling.kind=crops, which takes the image's own size"
        raise problem("tiling.pinpoints", list(tiling.pinpoints), expected, "tiling.pinpoints=[]")
    for pinpoint in tiling.pinpoints:
        cols, rows = grid_of(pinpoint)
        if cols * rows > tiling.max_tiles:
            expected = f"grids of at most tiling.max_tiles={tiling.max_tiles} tiles"
            raise problem("tiling.pinpoints", pinpoint, expected, f"tiling.max_tiles={cols * rows}, or leave it out")


def _pooling(vision: VisionConfig, maps: bool) -> None:
    if vision.order == "columns" and maps:
        raise problem("vision.order", "columns", "rows with tilings that join tiles to one map", "vision.order=rows")
    side, factor = vision.tile_size // vision.patch, vision.downsample
    if factor > side:
        got = f"{factor} for tiles of {side} x {side} patches"
        raise problem("vision.downsample", got, f"at most {side}", f"vision.downsample={max(side, 1)}")
    if vision.pads and vision.pool != "concat":
        raise problem("vision.pads", True, f"false with vision.pool={vision.pool}", "vision.pads=false")
    if vision.pool == "concat" and side % factor and not vision.pads:
        expected = f"a multiple of vision.downsample={factor}, or zeros that fill up the last blocks"
        raise problem("patches per side of a tile", side, expected, "vision.pads=true")


def _layout(config: Config) -> None:
    p, llm = config.parallel, config.llm
    if p.sequence and p.tensor == 1:
        raise problem("parallel.sequence", True, "parallel.tensor above 1", "parallel.sequence=false")
    if p.virtual > 1 and p.pipeline == 1:
        raise problem("parallel.virtual", p.virtual, "1 without pipeline stages", "parallel.pipeline=2")
    if llm.layers % p.pipeline_stages:
        fix = f"parallel.pipeline={math.gcd(llm.layers, p.pipeline)} parallel.virtual=1"
        raise problem("parallel.pipeline x virtual", p.pipeline_stages, f"a divisor of llm.layers={llm.layers}", fix)
    if p.context % p.context_heads:
        expected = f"a divisor of parallel.context={p.context}"
        raise problem("parallel.context_heads", p.context_heads, expected, "parallel.context_heads=1")
    groups = llm.kv_heads // p.tensor
    if groups % p.context_heads:
        expected = f"a divisor of llm.kv_heads / parallel.tensor = {groups}"
        fix = f"parallel.context_heads={math.gcd(groups, p.context)}"
        raise problem("parallel.context_heads", p.context_heads, expected, fix)


def _userbuffers(config: Config) -> None:
    p, precision = config.parallel, config.precision.name
    if not p.userbuffers:
        return
    what, off = "parallel.userbuffers", "parallel.userbuffers=false"
    if not p.sequence:
        expected = "parallel.sequence=true, whose gathers and scatters it hides"
        raise problem(f"{what}=true", "parallel.sequence=false", expected, f"parallel.sequence=true, or {off}")
    if precision not in _BUFFERED:
        raise problem(f"{what}=true", f"precision={precision}", f"one of {', '.join(_BUFFERED)}", off)
    if config.train.micro_batch > 1:
        expected = "1, as a step's last micro-batch may have fewer rows; longer rows take as many samples"
        length = max(config.train.micro_batch * config.data.row_length, config.data.seq_length)
        fix = f"train.micro_batch=1 data.row_length={length}, or {off}"
        raise problem(f"train.micro_batch with {what}=true", config.train.micro_batch, expected, fix)
    if config.data.row_length < config.data.seq_length:
        expected = f"at least data.seq_length={config.data.seq_length}: all rows have the same length"
        fix = f"data.row_length={config.data.seq_length}, or {off}"
        raise problem(f"data.row_length with {what}=true", config.data.row_length, expected, fix)


def _init(config: Config) -> None:
    given = [name for name in ("llm", "release", "checkpoint") if getattr(config.init, name)]
    if len(given) > 1:
        both = " and ".join(f"init.{name}" for name in given)
        raise problem(both, "several sources of the language model", "one of them", f"leave init.{given[0]} out")
    if config.init.release and config.init.vision:
        fix = "init.vision=null, which takes the release's own, or init.release=null"
        raise problem("init.release and init.vision", "two encoders", "one of them", fix)


def _precision(config: Config) -> None:
    precision, llm, tensor = config.precision, config.llm, config.parallel.tensor
    if precision.recipe is None:
        for what in ("edges", "encoder", "param_gather"):
            got = getattr(precision, what)
            if got:
                known = ", ".join(FP8_RECIPES)
                raise problem(f"precision.{what}", got, f"nothing without FP8 (precision={known})", "leave it out")
        return
    if 2 * precision.edges >= llm.layers:
        expected = f"fewer than half of llm.layers={llm.layers}"
        raise problem("precision.edges", precision.edges, expected, "precision.edges=1")
    if precision.edges and precision.name == "fp8_delayed":
        # Its scales are updated for all layers at once, at the end of a pass.
        expected = "0 with fp8_delayed, which has all layers or none in FP8"
        raise problem("precision.edges", precision.edges, expected, "precision=fp8_current")
    if precision.param_gather and not config.parallel.distributed_optimizer:
        expected = "parallel.distributed_optimizer=true, which keeps the weights in fp32"
        raise problem("precision.param_gather", True, expected, "add it, or precision.param_gather=false")
    if precision.param_gather and precision.name == "mxfp8":
        # Megatron gathers mxfp8 weights through the gradient buffer, in bf16.
        expected = "a recipe whose weights can be gathered in FP8: fp8_delayed, fp8_current or fp8_blockwise"
        raise problem("precision.param_gather", True, expected, "precision.param_gather=false")
    widths = {
        "llm.hidden": llm.hidden,
        "llm.ffn / parallel.tensor": llm.ffn // tensor,
        "llm.heads x llm.head_dim / parallel.tensor": llm.heads * llm.head_dim // tensor,
        "llm.kv_heads x llm.head_dim / parallel.tensor": llm.kv_heads * llm.head_dim // tensor,
    }
    for what, width in widths.items():
        if width % precision.width_multiple:
            expected = f"a multiple of {precision.width_multiple} for precision={precision.name}"
            raise problem(what, width, expected, "precision=bf16, or another parallel.tensor")


def _evaluate(config: Config) -> None:
    asked = config.evaluate
    if len(set(asked.tasks)) < len(asked.tasks):
        raise problem("evaluate.tasks", ", ".join(asked.tasks), "each task once", "leave one out")
    if asked.best is not None and (asked.best not in asked.tasks or asked.questions == 0):
        expected = f"one of evaluate.tasks ({', '.join(asked.tasks)}), with evaluate.questions above 0"
        raise problem("evaluate.best", asked.best, expected, f"evaluate.best={(*asked.tasks, 'null')[0]}")
    if asked.best == "heldout" and not config.data.source.has_heldout:
        expected = "held-out records, whose score chooses the checkpoint"
        raise problem("evaluate.best", "heldout without held-out records", expected, "data.heldout_path=FILE")


def _memory(config: Config) -> None:
    train, p = config.train, config.parallel
    if train.offload and train.recompute != "none":
        raise problem(
            "train.offload", True, "train.recompute=none: what is not kept cannot be moved", "train.offload=false"
        )
    if train.offload and p.pipeline > 1:
        raise problem("train.offload", True, "parallel.pipeline=1", "train.recompute=full train.offload=false")


def validate(config: Config) -> Config:
    """Return `config`, or raise ConfigError for the first rule that it breaks (lengths: nvlm.estimate.lengths)."""
    for rule in (
        _data,
        _shapes,
        _tiling,
        check_video,
        _layout,
        _userbuffers,
        _init,
        *LEARNING,
        _precision,
        _memory,
        _evaluate,
    ):
        rule(config)
    return config


def check_world(config: Config, world: int) -> int:
    """The data-parallel size of `world` processes under `config`; raises ConfigError if it is not an integer."""
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
