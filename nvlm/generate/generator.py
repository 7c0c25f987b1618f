"""Text generation from Python: `with load("runs/NAME") as generator: generator.generate([conversation])`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nvlm.arch import registry
from nvlm.arch.pipeline import Pipeline, build_parts, build_pipeline, tile_use_of_rank
from nvlm.config.values import Config, problem
from nvlm.data.batch import Sample
from nvlm.data.outline import Outline, Processor, build_processor, outline
from nvlm.data.pack import collate
from nvlm.data.record import BadRecord, Record, one_record
from nvlm.data.samples import fill
from nvlm.data.video.clip import image_or_video
from nvlm.estimate.lengths import check_vocabulary
from nvlm.generate.config import read_config
from nvlm.generate.decode import continue_rows
from nvlm.generate.sampling import GREEDY, Sampling
from nvlm.generate.text import TextStream, words
from nvlm.processes import groups
from nvlm.train.begin import begin
from nvlm.vision.path import build_vision
from nvlm.vision.prepass import BalancedVision, build_team


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of {role, content} up to a user's turn, and its images: paths, encoded bytes or Pillow images; videos
    are paths with a video's suffix, or `nvlm.data.video.clip.Video`.

    `<image>` in the messages marks the images' places; without marks they go before the first user message's text. A
    backslash before it makes it a text.
    """

    messages: Sequence[dict[str, Any]]
    images: Sequence[Any] = field(default=())


Stream = Callable[[int, str], None]
"""Called with each new piece of text: (number of the conversation, piece)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it answers: the record and its outline, the encoded prompt, and the new tokens with the final
    one."""

    text: str
    record: Record
    sketch: Outline
    prompt: Sample
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Generator:
    """This rank's part of a model. Its methods are collective calls, with the same arguments on all ranks."""

    config: Config
    pipeline: Pipeline
    vision: BalancedVision
    device: torch.device
    untrained: tuple[str, ...] = ()  # module groups with random weights, which cannot interpret images

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling = GREEDY,
        stream: Stream = lambda number, piece: None,
    ) -> list[str]:
        """The assistant's next answer in each conversation.

        Raises BadRecord for a conversation that cannot be read or tokenised or is too long, and for any image if the
        modules that read images have random weights; ConfigError for max_new_tokens.
        """
        return [answer.text for answer in self.answers(conversations, sampling, stream)]

    def answers(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling = GREEDY,
        stream: Stream = lambda number, piece: None,
    ) -> list[Answer]:
        """As `generate`, with what each answer was made from."""
        if self.untrained and any(one.images for one in conversations):
            raise BadRecord(f"images cannot be used: the weights of {' and '.join(self.untrained)} are random")
        processor, config = prompt_processor(self.config, sampling), self.config
        prompts = [prompt_of(number, one, processor) for number, one in enumerate(conversations)]
        multiple = config.row_multiple
        batch = collate([[sample] for *_, sample in prompts], config.vision.tile_size, multiple).to(self.device)
        (batch,) = self.vision.encode([batch])
        texts = [TextStream(processor.tokenizer) for _ in prompts]

        def tell(row: int, token: int) -> None:
            if piece := texts[row].push(token):
                stream(row, piece)

        rows = continue_rows(self.pipeline, batch, sampling, processor.tokenizer.ends, multiple, tell)
        for number, text in enumerate(texts):
            if piece := text.flush():
                stream(number, piece)
        return [Answer(words(ids, processor.tokenizer), *one, tuple(ids)) for one, ids in zip(prompts, rows)]


def prompt_processor(config: Config, sampling: Sampling) -> Processor:
    """A processor of prompts, as in evaluation, with room for new tokens and for the keys of any number of images."""
    room = sampling.prompt_room(config.llm.positions)
    return replace(
        build_processor(config, registry.placement_rule(config.arch.name), resize="exact"),
        seq_length=room,
        cross_length=sys.maxsize,
        limit=f"what max_new_tokens={sampling.max_new_tokens} leaves of the model's {config.llm.positions} positions",
    )


def check(config: Config, conversation: Conversation, sampling: Sampling) -> Outline:
    """The conversation's outline. Raises BadRecord or ConfigError if `Generator.generate` could not answer it. Needs no
    model."""
    with one_record():
        return outline(_record(0, conversation), prompt_processor(config, sampling), generate=True)


def prompt_of(number: int, conversation: Conversation, processor: Processor) -> tuple[Record, Outline, Sample]:
    """The record of a conversation, its outline and the encoded prompt. Raises BadRecord."""
    record = _record(number, conversation)
    with one_record():
        sketch = outline(record, processor, generate=True)
        return record, sketch, fill(record, sketch, processor)


def _record(number: int, conversation: Conversation) -> Record:
    files = (Path(image) if isinstance(image, str) else image for image in conversation.images)
    images = [image_or_video(image) if isinstance(image, Path) else image for image in files]
    return Record(f"conversation {number}", list(conversation.messages), images)


def build_generator(config: Config, device: torch.device) -> Generator:
    """This rank's part of the model of `config` with the weights that config.init names. Raises ConfigError."""
    check_vocabulary(config)
    vision = build_vision(config, device)
    parts = [part.to(device) for part in build_parts(config)]
    origins = begin(parts, config)
    needed = [group for group in registry.description(config.arch.name).groups if group != "llm"]
    team = build_team(tile_use_of_rank(config, groups.pipeline_rank()), "replica")
    untrained = tuple(group for group in needed if origins[group] == "random")
    return Generator(config, build_pipeline(config, parts), BalancedVision(vision, team), device, untrained)


@contextmanager
def opened(config: Config) -> Iterator[Generator]:
    """The model of `config`, in process groups that end with the block. Raises ConfigError.

    Messages during loading go to standard error.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes != config.parallel.replica:
        expected = f"{config.parallel.replica} (tensor x pipeline)"
        raise problem("number of processes", processes, expected, f"start {config.parallel.replica}")
    with groups.distributed(config.parallel, config.seed, config.train.threads) as device:
        with contextlib.redirect_stdout(sys.stderr):
            generator = build_generator(config, device)
        yield generator


def load(checkpoint: str | Path, *overrides: str) -> AbstractContextManager[Generator]:
    """The model in a run folder or in one of its step folders: `with load("runs/NAME") as generator`.

    `overrides`: "key=value" for the run's configuration. The layout is one process unless they change it; with several
    processes, each calls `load` under torchrun. Raises ConfigError.
    """
    return opened(read_config(checkpoint, overrides))
