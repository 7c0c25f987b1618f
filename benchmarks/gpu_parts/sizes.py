"""What the GPU benchmarks run: sizes, configurations and samples, at full size or, without a GPU, at toy size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from PIL import Image

from nvlm.arch import registry
from nvlm.commands.compose import compose_config
from nvlm.config.compute import FP8_RECIPES
from nvlm.config.values import Config, ConfigError
from nvlm.data.batch import Sample
from nvlm.data.outline import Processor, build_processor, outline
from nvlm.data.record import Record
from nvlm.data.samples import encode
from nvlm.llm import backend

ARCHITECTURES = ("decoder", "xattn", "hybrid")
TEXT = 1024  # tokens a sample (NVLM Table 3)
TILES = (6, 3, 1)  # the first is the paper's
# Tokens a row, as in the recipes: two samples of 6 tiles for NVLM-D, four for NVLM-X and -H.
ROWS = {"decoder": 6400, "xattn": 4352, "hybrid": 5376}
# Wide enough for every FP8 recipe; the encoder is the one that ships with the package.
LEARNER = """llm.hidden=512 llm.heads=8 llm.kv_heads=4 llm.head_dim=64 llm.ffn=1536 optim.lr=5e-4 optim.warmup=5
train.global_batch=16 train.micro_batch=4 data.workers=0 data.records=400 evaluate=none""".split()
# Full widths and a fifth of the layers: 12 of 60, 9 of the encoder's 45, 2 of 10 with cross-attention.
FULL = """llm=yi-34b llm.layers=12 llm.tokenizer=tiny llm.bos=null vision.layers=9 parallel=one stage=sft data=pages
evaluate=none tiling.tag=1d data.seq_length=4096""".split()
TOY = """llm=tiny llm.layers=5 llm.cross_every=2 stage=sft tiling.tag=1d data.seq_length=512 evaluate=none
data.workers=0""".split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Sizes of the benchmarks.

    `overrides`: the configuration that is timed; `learner`: the one whose losses are compared, over `steps` steps.
    `text`: tokens per sample; `rows`: tokens per packed row by architecture; `row`: the same beside peers and dense
    masks, which take more memory; `micro_batches`: rows per timed step.
    `repeats`: timed calls, of which the median counts; `tiles`: tiles per image, in the order of measurement.
    """

    overrides: tuple[str, ...]
    learner: tuple[str, ...]
    steps: int
    text: int
    rows: Mapping[str, int]
    row: int
    micro_batches: int
    repeats: int
    tiles: tuple[int, ...]


def size_of(toy: bool) -> Size:
    """The full size or the toy size."""
    if toy:
        learner = (*TOY, "train.global_batch=4", "train.micro_batch=2", "data.records=16", "optim.warmup=2")
        return Size(
            overrides=tuple(TOY),
            learner=learner,
            steps=4,
            text=64,
            rows=dict.fromkeys(ROWS, 256),
            row=256,
            micro_batches=2,
            repeats=2,
            tiles=TILES,
        )
    roomy = torch.cuda.get_device_properties(0).total_memory > 100e9
    return Size(
        overrides=tuple(FULL),
        learner=tuple(LEARNER),
        steps=50,
        text=TEXT,
        rows=ROWS,
        row=8192 if roomy else 4096,
        micro_batches=4,
        repeats=3,
        tiles=TILES,
    )


def precisions(size: Size) -> tuple[list[str], dict[str, str]]:
    """The precisions that this machine supports besides fp32, and why it lacks the others."""
    able, refused = [], {}
    for name in ("bf16", *FP8_RECIPES):
        try:
            backend.check_precision(compose_config(*size.learner, f"precision={name}"))
            able.append(name)
        except ConfigError as error:
            refused[name] = str(error)
    return able, refused


def a_sample(config: Config, tiles: int, text: int) -> Sample:
    """An image of `tiles` tiles with at least `text` tokens of text, half of them an answer."""
    processor = replace(build_processor(config, registry.placement_rule(config.arch.name)), cross_length=10**6)
    processor = replace(processor, seq_length=10**6)
    image = Image.new("RGB", (config.vision.tile_size * tiles, config.vision.tile_size), "gray")
    letters = text // 2
    while (short := text - _text_tokens(record := _record(letters, tiles, image), processor)) > 0:
        letters += max(1, short // 2)
    return encode(record, processor)


def _record(letters: int, tiles: int, image: Image.Image) -> Record:
    words = "".join(chr(97 + n * 7 % 26) for n in range(letters))
    messages = [dict(role="user", content="<image>\n" + words), dict(role="assistant", content=words)]
    return Record(f"{tiles} tiles", messages, [image])


def _text_tokens(record: Record, processor: Processor) -> int:
    return sum(len(run.ids) for run in outline(record, processor).runs)


def a_row(config: Config, tiles: int, text: int, length: int) -> list[Sample]:
    """Equal samples that fill a row of `length` tokens."""
    sample = a_sample(config, tiles, text)
    count = max(1, length // len(sample.tokens))
    return [replace(sample, id=f"{sample.id} {number}") for number in range(count)]


def a_mixed_row(config: Config, size: Size) -> list[Sample]:
    """Samples with different numbers of tiles that fit into a row, with half the text."""
    chosen, room = [], size.row
    for number, tiles in enumerate((6, 1, 3, 1, 2)):
        sample = a_sample(config, tiles, size.text // 2)
        if len(sample.tokens) <= room:
            chosen.append(replace(sample, id=f"{sample.id} {number}"))
            room -= len(sample.tokens)
    return chosen
