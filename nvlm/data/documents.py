"""Interleaved documents: texts and images in order, without roles, as in VILA's pre-training. Imports no torch.

The rules follow VILA's reader of MMC4 (arXiv 2312.07533): images come in the order of their sentences, each directly
before the sentence that it belongs to; a document keeps its first images up to a limit, and all of its text; an image
that no text follows is left out, because nothing could be learned from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvlm.data.messages import DOCUMENT, literal

Image = Path | bytes
"""An image of a record: the path of its file, or its bytes."""


def interleaved(parts: Sequence[str | Image], most_images: int) -> tuple[list[dict], list[Image]]:
    """The messages and the images of a document of texts and images in order.

    Blank texts are left out, and texts that follow each other are joined by an empty line. `<image>` in a text is text.
    At most `most_images` images are kept, the first ones, and of these only those that text follows.
    """
    said = [part for part in parts if not isinstance(part, str) or part.strip()]
    last_text = max((at for at, part in enumerate(said) if isinstance(part, str)), default=-1)
    content, images, after_text = [], [], False
    for part in said[: last_text + 1]:
        if isinstance(part, str):
            content.append({"type": "text", "text": ("\n\n" if after_text else "") + literal(part)})
            after_text = True
        elif len(images) < most_images:
            content.append({"type": "image"})
            images.append(part)
            after_text = False
    return [{"role": DOCUMENT, "content": content}], images


def by_sentence(sentences: Sequence[str], images: Sequence[tuple[Image, int]]) -> list[str | Image]:
    """The parts of a document whose images each belong to one of its sentences, given by its number.

    Images come in the order of their sentences, each directly before its own; images of one sentence keep their order.
    Sentences are joined by a space. An image whose number is no sentence's is left out.
    """
    parts: list[str | Image] = []
    begin = 0
    for number in sorted({place for _, place in images if 0 <= place < len(sentences)} | {len(sentences)}):
        parts += [" ".join(sentences[begin:number])] if number > begin else []
        parts += [image for image, place in images if place == number < len(sentences)]
        begin = number
    return parts
