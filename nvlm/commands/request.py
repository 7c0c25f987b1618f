"""Parses the generate command's arguments: its own keys, and the configuration of the model with its weights.

Imports no torch, so that mistakes are reported at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvlm.commands.compose import check_overrides
from nvlm.commands.words import own_words
from nvlm.config.data import DataConfig
from nvlm.config.fields import named
from nvlm.config.mapping import from_mapping, to_mapping
from nvlm.config.values import Config, problem
from nvlm.explain.check import check_explains
from nvlm.generate.config import for_generation, read_config
from nvlm.generate.sampling import Sampling

HELP = """python launch/generate.py checkpoint=DIR [image=PATH] prompt="..." [key=value ...]

checkpoint=DIR      a run folder (its newest checkpoint), or one of its checkpoints/step_N
image=PATH          an image, or a video (.mp4, ...), or several: image=[a.png,b.mp4]; placed at <image> marks in the
                    prompt, else before it
prompt=TEXT         the user's first message; system=TEXT replaces the run's system message, system= removes it
max_new_tokens=256  temperature=0  top_p=1  seed=0      temperature 0 takes the likeliest token
chat=true           reads further turns from standard input, one per line; /image PATH adds an image to the next turn
explain=PAGE.html   writes a page that shows where NVLM-X or NVLM-H looked for its answer, and its numbers beside it
parallel.tensor=2 and other keys change the run's configuration; without a checkpoint it is composed from conf/"""

OPTIONS = (
    "checkpoint",
    "image",
    "prompt",
    "system",
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
    "chat",
    "explain",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One conversation to hold, with the model of `config` and the weights that config.init names."""

    config: Config
    images: tuple[Path, ...]
    prompt: str | None
    sampling: Sampling
    chat: bool
    explain: Path | None = None  # a page to write


def parse(arguments: Sequence[str]) -> Request:
    """The request of a command line. Raises ConfigError."""
    own, others = own_words(arguments, OPTIONS)
    chat = _number(own, "chat", {"true": True, "false": False}.__getitem__, False)
    sampling = Sampling(
        max_new_tokens=_number(own, "max_new_tokens", int, Sampling().max_new_tokens),
        temperature=_number(own, "temperature", float, Sampling().temperature),
        top_p=_number(own, "top_p", float, Sampling().top_p),
        seed=_number(own, "seed", int, Sampling().seed),
    )
    config = read_config(own["checkpoint"], others, OPTIONS) if own.get("checkpoint") else _composed(others)
    if "system" in own:
        values = to_mapping(config.data) | {"system": own["system"] or None}
        config = dataclasses.replace(config, data=from_mapping(DataConfig, values, "data."))
    if not chat and not own.get("prompt"):
        raise problem("prompt", "nothing", "a message, or chat=true to read messages", 'prompt="What is this?"')
    sampling.prompt_room(config.llm.positions)
    images = _images(own.get("image", ""))
    page = _page(own["explain"], config, bool(images), chat) if own.get("explain") else None
    return Request(config=config, images=images, prompt=own.get("prompt"), sampling=sampling, chat=chat, explain=page)


def _page(name: str, config: Config, images: bool, chat: bool) -> Path:
    """The page to write. Raises ConfigError if it cannot be made."""
    check_explains(config)
    if chat:
        raise problem("explain", "chat=true", "one prompt, whose answer is explained", "leave chat=true out")
    if not images:
        raise problem("explain", "a prompt without an image", "an image to look at", "image=PATH")
    page = Path(name).expanduser()
    if page.suffix != ".html" or page.is_dir():
        raise problem("explain", named(page), "the name of a page", "explain=out.html")
    if not page.parent.is_dir() or not os.access(page.parent, os.W_OK | os.X_OK):
        raise problem("explain", named(page), "a page in a folder that exists and can be written", "explain=out.html")
    return page


def _number(own: dict[str, str], key: str, kind, default):
    if key not in own:
        return default
    try:
        return kind(own[key])
    except (ValueError, KeyError):
        expected = {int: "a whole number", float: "a number"}.get(kind, "true or false")
        raise problem(key, repr(own[key]), expected, f"{key}={str(default).lower()}") from None


def _images(text: str) -> tuple[Path, ...]:
    listed = text[1:-1].split(",") if text.startswith("[") and text.endswith("]") else [text]
    paths = tuple(Path(name.strip()) for name in listed if name.strip())
    for path in paths:
        if not path.is_file():
            raise problem("image", named(path), "an image file", "image=PATH")
    return paths


def _composed(overrides: Sequence[str]) -> Config:
    configs = check_overrides(list(overrides), OPTIONS)
    if len(configs) != 1:
        raise problem("command line", f"{len(configs)} configurations", "one", "give each key one value")
    (config,) = configs
    if not (config.init.llm or config.init.release or config.init.checkpoint):
        fix = "checkpoint=runs/NAME, init.release=DIR or init.llm=DIR"
        raise problem("checkpoint", "nothing", "a run folder, or weights that config.init names", fix)
    return for_generation(config)
