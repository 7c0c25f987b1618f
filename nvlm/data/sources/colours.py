"""A built-in task of learning in context: coloured pictures, and words that each record gives to colours anew.

A record shows pictures one after the other, and after each the word of its colour. A word means something only within
its record, so the word of a picture can be known only from an earlier picture of the same colour (as in VILA's 4-shot
questions, section 3.2).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nvlm.config.data import Colours
from nvlm.data.record import Record

SIDE = 28  # px
HUES = ((200, 40, 40), (40, 150, 60), (50, 70, 200), (220, 190, 40), (150, 60, 180), (60, 190, 200), (235, 130, 40))
WORDS = tuple("ABCDEFGH")
_SPLITS = {"train": 0, "heldout": 1}


def draw(hue: int, rng: np.random.Generator) -> Image.Image:
    """A picture of one colour, of random brightness and grain."""
    colour = np.array(HUES[hue]) * rng.uniform(0.85, 1.1)
    pixels = colour + rng.normal(0, 8, (SIDE, SIDE, 3)) + rng.normal(0, 6, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make(split: str, seed: int, index: int, pictures: int, colours: int, shots: int | None = None) -> Record:
    """Record number `index`: a conversation of `pictures` turns about `colours` colours, each followed by its word.

    `shots`: a question with so many turns before it, whose colour is among theirs, if there are any.
    """
    rng = np.random.default_rng([_SPLITS[split], seed, index])
    count = pictures if shots is None else shots + 1
    hues, words = rng.permutation(len(HUES))[:colours], rng.permutation(len(WORDS))[:colours]
    drawn = rng.integers(colours, size=count)
    if shots:
        drawn[:-1] = rng.permutation(np.arange(shots) % colours)
        drawn[-1] = rng.choice(drawn[:-1])
    messages, images = [], []
    for number, which in enumerate(drawn):
        data = io.BytesIO()
        draw(int(hues[which]), rng).save(data, "PNG")
        images.append(data.getvalue())
        learned = shots is None or number == count - 1
        answer = {"role": "assistant", "content": WORDS[words[which]], "loss": learned}
        messages += [{"role": "user", "content": "<image>"}, answer]
    return Record(f"{split}-colours-{seed}-{index}", messages, images)


@dataclass(frozen=True, slots=True)
class ColourRecords:
    """Records that are made when they are read."""

    source: Colours
    seed: int
    heldout: bool
    files = ()

    def __len__(self) -> int:
        return self.source.heldout_records if self.heldout else self.source.records

    def __getitem__(self, index: int) -> Record:
        split, shots = ("heldout", self.source.shots) if self.heldout else ("train", None)
        return make(split, self.seed, range(len(self))[index], self.source.pictures, self.source.colours, shots)

    def name(self, index: int) -> str:
        """The name of record `index`."""
        return f"{'heldout' if self.heldout else 'train'}-colours-{self.seed}-{index}"

    def kind(self, index: int) -> str:
        """The kind of its question: by the number of shots."""
        return f"{self.source.shots}-shot"


def build(source: Colours, seed: int, heldout: bool) -> ColourRecords:
    """The records of a run."""
    return ColourRecords(source, seed, heldout)
