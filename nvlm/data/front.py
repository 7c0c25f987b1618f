"""All images of a record in front, with words standing in at their places. Imports no torch.

A model that is trained on a mixture of both placements handles either (LLaVA-NeXT-Interleave, arXiv 2407.07895).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from nvlm.data.messages import DOCUMENT, Turn


def images_in_front(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with all images before the text of the first user turn, or of the document, each on a line of its own.

    Where image k was stands "image k", counted over the whole record. One image alone, or images that already stand in
    front, stay where they are.
    """
    images = sum(turn.images for turn in turns)
    first = next(number for number, turn in enumerate(turns) if turn.role in ("user", DOCUMENT))
    if images < 2 or _are_in_front(turns[first], images):
        return list(turns)
    numbers = count(1)
    said = [replace(turn, texts=(_with_words(turn.texts, numbers),)) for turn in turns]
    said[first] = replace(said[first], texts=("", *["\n"] * (images - 1), f"\n{said[first].texts[0]}"))
    return said


def _are_in_front(turn: Turn, images: int) -> bool:
    return turn.images == images and not any(text.strip() for text in turn.texts[:-1])


def _with_words(texts: Sequence[str], numbers: count) -> str:
    """The texts with words for the images between them, apart from other words by spaces."""
    said, *others = texts
    for text in others:
        before = "" if not said or said[-1].isspace() else " "
        behind = " " if text[:1].isalnum() else ""
        said += f"{before}image {next(numbers)}{behind}{text}"
    return said
