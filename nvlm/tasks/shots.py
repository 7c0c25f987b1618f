"""Few-shot examples: questions of a task with their answers, which go before a question. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from nvlm.config.task import TaskConfig
from nvlm.data.draw import drawn
from nvlm.data.messages import literal, place_images, read_turns, with_marks
from nvlm.data.record import BadRecord, Record, one_record
from nvlm.tasks.question import Question, Questions
from nvlm.tasks.registry import LAYOUTS, build_questions
from nvlm.tasks.release import is_there

_TRIES = 20  # unreadable examples that are passed over for each that is needed


def with_examples(question: Question, examples: Sequence[Question]) -> Question:
    """`question` after `examples`, each a user's turn with its images and an assistant's turn with its answer."""
    if not examples:
        return question
    shown = [as_example(example) for example in examples]
    asked = _placed(question.record)
    messages = list(chain.from_iterable(one.messages for one in (*shown, asked)))
    images = list(chain.from_iterable(one.images for one in (*shown, asked)))
    return replace(question, record=replace(question.record, messages=messages, images=images))


def as_example(question: Question, reference: str | None = None) -> Record:
    """The question and an answer of it, its most usual one unless `reference` is given, with a mark for each image."""
    record = _placed(question.record)
    answer = {"role": "assistant", "content": literal(usual_answer(question) if reference is None else reference)}
    return replace(record, messages=[*record.messages, answer])


def usual_answer(question: Question) -> str:
    """What an example shows as its answer: its most frequent reference, the first of several."""
    return question.shown or Counter(question.references).most_common(1)[0][0]


def _placed(record: Record) -> Record:
    """The record with a mark for each image, without which all images would go before the first question."""
    turns = place_images(read_turns(record.messages), len(record.images))
    return replace(record, messages=[{"role": turn.role, "content": with_marks(turn.texts)} for turn in turns])


@dataclass(frozen=True, slots=True)
class Examples:
    """Where the examples come from: `pool`, the questions of `split`, by category if `by_category` has any. `own`: they
    are the questions that are asked, so that an example is never the question itself."""

    pool: Questions
    split: str
    own: bool
    seed: int
    by_category: dict[str, tuple[int, ...]]

    def before(self, index: int, name: str, category: str, count: int) -> list[Question]:
        """`count` examples for the question `index` with this name and category, in an order that depends on the seed
        and the name alone. Fewer if there are no more that can be read."""
        kept = self.by_category.get(category, ()) if self.by_category else range(len(self.pool))
        order = (place for place in _shuffled(kept, self.seed, name) if not (self.own and place == index))
        return list(islice(self._readable(islice(order, (1 + _TRIES) * count)), count))

    def _readable(self, places: Iterator[int]) -> Iterator[Question]:
        for place in places:
            try:
                with one_record():
                    yield self.pool[place]
            except BadRecord:
                continue


def _shuffled(places: Sequence[int], seed: int, name: str) -> Iterator[int]:
    """All `places`, each once, in a random order, of which no more is computed than is used."""
    moved: dict[int, int] = {}
    for end in range(len(places), 0, -1):
        at = drawn(seed, name, f"example {end}", end)
        yield places[moved.get(at, at)]
        moved[at] = moved.get(end - 1, end - 1)


def examples_of(task: TaskConfig, folder: Path, asked: Questions, seed: int) -> Examples:
    """The examples for the questions `asked` of `task`: those of its split for examples if its files are in `folder`,
    else `asked` themselves. Raises ConfigError if the files are damaged."""
    given = task.examples
    other = given is not None and is_there(LAYOUTS[task.layout], folder, given)
    pool = build_questions(replace(task, split=given), folder) if other else asked
    split = given if other else task.split
    return Examples(pool, split, not other, seed, _by_category(pool) if task.same_category else {})


def _by_category(pool: Questions) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for place in range(len(pool)):
        try:
            with one_record():
                found.setdefault(pool[place].category, []).append(place)
        except BadRecord:
            continue
    return {category: tuple(places) for category, places in found.items()}
