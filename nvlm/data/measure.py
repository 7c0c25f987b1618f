"""What planning needs of a record, and its lengths from that alone. Imports no torch.

Neither depends on the architecture, the tiling or the budgets of rows: they come in when lengths are computed, by the
same functions as with the record itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvlm.data.messages import DOCUMENT, check_learns
from nvlm.data.outline import Processor, beginning, text_and_sizes, text_tokens, turns_of
from nvlm.data.plans import Pictures, Sizes, image_lengths, plan_pictures
from nvlm.data.record import Record
from nvlm.data.text.assemble import Run


@dataclass(frozen=True, slots=True)
class Measure:
    """Text tokens of a record, the marks of images included, and the sizes of its images.

    `before`: of a document, the text tokens before each image and its marks: if it is too long, it is cut.
    """

    words: int
    sizes: Sizes
    before: tuple[int, ...] | None = None


def measure(record: Record, processor: Processor) -> Measure:
    """The measure of a record to train on, whose text must not depend on its tiles. Raises BadRecord."""
    assert not processor.joined
    turns = turns_of(record, processor)
    check_learns(turns)
    runs, sizes = text_and_sizes(record, turns, processor)
    before = _before_images(runs) if turns[0].role == DOCUMENT else None
    return Measure(text_tokens(runs), sizes, before)


def lengths(of: Measure, processor: Processor) -> tuple[tuple[int, int], Pictures]:
    """The lengths and pictures of the outline of a record with this measure. Raises BadRecord."""
    if of.before is not None:
        sketch = beginning(_runs_of(of, of.before, processor), of.sizes, processor)
        return sketch.lengths, sketch.pictures
    pictures = plan_pictures(of.sizes, of.words, processor)
    images = [image_lengths(processor, plan) for plan in pictures.plans]
    return (of.words + sum(stream for stream, _ in images), sum(cross for _, cross in images)), pictures


def _before_images(runs: Sequence[Run]) -> tuple[int, ...]:
    """The number of tokens before each image and its first mark."""
    places = [at for at, run in enumerate(runs) if run.image is not None]
    return tuple(text_tokens(runs[: at - 1]) for at in places)


def _runs_of(of: Measure, before: Sequence[int], processor: Processor) -> list[Run]:
    """Runs of the same lengths as the document's."""
    tokenizer = processor.tokenizer
    opening, closing = (Run(_ids(len(tokenizer.encode(mark)))) for mark in tokenizer.marks)
    runs = [] if tokenizer.bos is None else [Run(_ids(1))]
    at = len(runs)
    for number, start in enumerate(before):
        runs += [*_text(start - at), opening, Run(image=number), closing]
        at = start + len(opening.ids) + len(closing.ids)
    return [*runs, *_text(of.words - at - 1), Run(_ids(1), trained=True)]  # the token that ends a text


def _text(length: int) -> list[Run]:
    return [Run(_ids(length), trained=True)] if length else []


def _ids(length: int) -> tuple[int, ...]:
    return (0,) * length
