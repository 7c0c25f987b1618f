"""The evaluation of a task: greedy answers to its questions, spread over all replicas, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvlm.data.outline import Processor
from nvlm.evaluate.answer import answer
from nvlm.evaluate.asking import Asked, Task, Unasked, asked, measured
from nvlm.evaluate.order import Prompt, batches, share
from nvlm.evaluate.score import Row, scored
from nvlm.generate.generator import Generator
from nvlm.processes import groups


@dataclass(frozen=True, slots=True)
class Answered:
    """The scored rows of a task by the numbers of their questions, in order, on all ranks; `unanswered`: the names of
    questions without a reference."""

    rows: dict[int, Row]
    unanswered: tuple[str, ...]


def evaluate(model: Generator, task: Task, alive: Callable[[], None] = lambda: None) -> Answered:
    """Answer the questions of `task` with exact tiles. A collective call. `alive` is called before each batch.

    A question that cannot be read counts as wrong, so that it cannot raise the score. One without a reference is named
    but not scored.
    """
    limits, processor = model.config.evaluate, task.processor(model.config)
    prompts, unasked = plan(task, processor)
    rows = {one.index: one.row() for one in unasked if one.scored}
    mine = batches(share(prompts, *groups.data_rank()), limits.batch, limits.tokens, task.longest(model.config))
    found = []
    for batch in mine:
        alive()
        found += answer_batch(model, task, batch, processor)
    rows |= dict(groups.gather_over_data(found))
    numbers = sorted(rows)
    marked = scored([rows[number] for number in numbers], task.config.metric)
    return Answered(dict(zip(numbers, marked)), tuple(one.name for one in unasked if not one.scored))


def plan(task: Task, processor: Processor) -> tuple[list[Prompt], list[Unasked]]:
    """The lengths of all questions, and those that are not asked. A collective call: each rank reads its share."""
    rank, size = groups.rank(), groups.world_size()
    found = groups.gather_over_ranks([measured(task, index, processor) for index in range(task.count)[rank::size]])
    found.sort(key=lambda one: one.index)
    return [o for o in found if isinstance(o, Prompt)], [o for o in found if isinstance(o, Unasked)]


def answer_batch(model: Generator, task: Task, batch: Sequence[Prompt], processor: Processor) -> list[tuple[int, Row]]:
    """(number of the question, its row) for each of `batch`. A collective call of the ranks of a replica."""
    read = [(prompt.index, asked(task, prompt.index, processor)) for prompt in batch]
    rows = [(index, one.row()) for index, one in read if isinstance(one, Unasked)]
    fit = [(index, one) for index, one in read if isinstance(one, Asked)]
    if fit:
        config = model.config
        texts = answer(
            model.pipeline,
            model.vision.within_replica(),  # replicas may have different numbers of batches
            [one.sample for _, one in fit],
            processor.tokenizer,
            task.longest(config),
            model.device,
            config.vision.tile_size,
            config.row_multiple,
        )
        rows += [(index, one.row(text)) for (index, one), text in zip(fit, texts)]
    return rows
