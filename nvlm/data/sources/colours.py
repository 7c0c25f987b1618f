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

from nvlm.config.data import IMAGE_MARK, Colours
from nvlm.data.messages import DOCUMENT
from nvlm.data.record import Record

SIDE = 28  # px
HUES = ((200, 40, 40), (40, 150, 60), (50, 70, 200), (220, 190, 40), (150, 60, 180), (60, 190, 200), (235, 130, 40))
WORDS = tuple("ABCDEFGH")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")  # stand in for pictures in the form "text"
_SPLITS = {"train": 0, "heldout": 1}


def draw(hue: int, rng: np.random.Generator) -> Image.Image:
    """A picture of one colour, of random brightness and grain."""
    colour = np.array(HUES[hue]) * rng.uniform(0.85, 1.1)
    pixels = colour + rng.normal(0, 8, (SIDE, SIDE, 3)) + rng.normal(0, 6, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make(
    split: str, seed: int, index: int, pictures: int, colours: int, shots: int | None = None, form: str = "picture"
) -> Record:
    """Record number `index`: a document of `pictures` pictures in `colours` colours, each followed by its word.

    `shots`: a question, which ends with a picture, after so many pictures with words, of which one has its colour.
    """
    textual = form == "text"
    rng = np.random.default_rng([_SPLITS[split], seed, index, *[1] * textual])
    count = pictures if shots is None else shots + 1
    kinds = len(LETTERS) if textual else len(HUES)
    hues, words = rng.permutation(kinds)[:colours], rng.permutation(len(WORDS))[:colours]
    drawn = rng.integers(colours, size=count)
    if shots:
        drawn[:-1] = rng.permutation(np.arange(shots) % colours)
        drawn[-1] = rng.choice(drawn[:-1])
    said, images = [WORDS[words[which]] for which in drawn], []
    marks = [LETTERS[hues[which]] if textual else IMAGE_MARK for which in drawn]
    for which in [] if textual else drawn:
        data = io.BytesIO()
        draw(int(hues[which]), rng).save(data, "PNG")
        images.append(data.getvalue())
    shown = said if shots is None else [*said[:-1], ""]
    messages = [{"role": DOCUMENT, "content": "".join(map("".join, zip(marks, shown)))}]
    answers = () if shots is None else (said[-1],)
    return Record(f"{split}-colours-{seed}-{index}{'-text' * textual}", messages, images, answers)


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
        source, number = self.source, range(len(self))[index]
        return make(split, self.seed, number, source.pictures, source.colours, shots, source.form)

    def name(self, index: int) -> str:
        """The name of record `index`."""
        split, textual = "heldout" if self.heldout else "train", self.source.form == "text"
        return f"{split}-colours-{self.seed}-{index}{'-text' * textual}"

    def kind(self, index: int) -> str:
        """The kind of its question: by the number of shots."""
        return f"{self.source.shots}-shot"


def build(source: Colours, seed: int, heldout: bool) -> ColourRecords:
    """The records of a run."""
    return ColourRecords(source, seed, heldout)
