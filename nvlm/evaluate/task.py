"""The evaluation of a task: greedy answers to its questions, spread over all replicas, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvlm.config.values import problem
from nvlm.data.outline import Processor
from nvlm.evaluate.answer import answer
from nvlm.evaluate.asking import Unasked, longest, measured, processor_of
from nvlm.evaluate.kept import Kept
from nvlm.evaluate.order import Prompt, batches, share
from nvlm.evaluate.reading import Read, Reader, read_ahead
from nvlm.evaluate.score import Row, scored
from nvlm.evaluate.stop import Stop, Stopped
from nvlm.evaluate.tasks import Task
from nvlm.generate.generator import Generator
from nvlm.processes import groups

Progress = Callable[[int, int], None]
"""Called before each batch: (questions that this replica has answered, all that it answers)."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The scored rows of a task by the numbers of their questions, in order; on the first rank alone. `unanswered`:
    the names of questions without a reference."""

    rows: dict[int, Row]
    unanswered: tuple[str, ...]


def evaluate(
    model: Generator,
    task: Task,
    kept: Kept | None = None,
    progress: Progress = lambda done, total: None,
    stop: Stop | None = None,
) -> Answered:
    """Answer the questions of `task` with exact tiles. A collective call. `kept`: where answers are kept as they come,
    and where an earlier evaluation may have left some.

    A question that cannot be read counts as wrong, so that it cannot raise the score. One without a reference is named
    but not scored. Raises ConfigError, and Stopped if `stop` was true on some rank.
    """
    limits, processor = model.config.evaluate, processor_of(task, model.config)
    prompts, unasked = plan(task, processor)
    check_images(model, prompts)
    rows = _begun(kept, prompts)
    missing = set(groups.from_first_rank([prompt.index for prompt in prompts if prompt.index not in rows]))
    mine = share([prompt for prompt in prompts if prompt.index in missing], *groups.data_rank())
    found: list[tuple[int, Row]] = []
    stopped = False
    waiting = batches(mine, limits.batch, limits.tokens, longest(task, model.config))
    for read in read_ahead(Reader(task, processor, waiting, model.config.row_multiple), model.config):
        progress(len(found), len(mine))
        if stopped := stop is not None and groups.any_rank(stop(), model.vision.team.replica, model.device):
            break
        new = answer_batch(model, task, read, processor)
        if kept is not None and groups.is_replica_writer():
            kept.append(groups.data_rank()[0], [row for _, row in new])
        found += new
    if any(groups.gather_over_ranks([stopped])):
        raise Stopped
    rows |= dict(groups.gather_over_data(found)) | {one.index: one.row() for one in unasked if one.scored}
    numbers = sorted(rows) if groups.is_first_rank() else []
    marked = scored([rows[number] for number in numbers], task.config.metric)
    return Answered(dict(zip(numbers, marked)), tuple(one.name for one in unasked if not one.scored))


def plan(task: Task, processor: Processor) -> tuple[list[Prompt], list[Unasked]]:
    """The lengths of all questions, and those that are not asked. A collective call: each rank reads its share."""
    rank, size = groups.rank(), groups.world_size()
    found = groups.gather_over_ranks([measured(task, index, processor) for index in range(task.count)[rank::size]])
    found.sort(key=lambda one: one.index)
    return [o for o in found if isinstance(o, Prompt)], [o for o in found if isinstance(o, Unasked)]


def check_images(model: Generator, prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError if there are images and the modules that read them have random weights."""
    if model.untrained and any(prompt.tiles for prompt in prompts):
        got = f"questions about images, but random weights of {' and '.join(model.untrained)}"
        raise problem("checkpoint", got, "one that has learned to read images", "checkpoint=RUN")


def _begun(kept: Kept | None, prompts: Sequence[Prompt]) -> dict[int, Row]:
    """The answers that there are already, on the first rank; empty on the others."""
    found: dict[int, Row] = {}
    if kept is not None:
        groups.raised_together(lambda: found.update(kept.begin(prompts)))
    return found


def answer_batch(model: Generator, task: Task, read: Read, processor: Processor) -> list[tuple[int, Row]]:
    """(number of the question, its row) for each that was `read`. A collective call of the ranks of a replica."""
    if read.batch is None:
        return list(read.unasked)
    texts = answer(model, read.batch, processor.tokenizer, longest(task, model.config))
    return [*read.unasked, *((index, row | {"answer": text}) for (index, row), text in zip(read.rows, texts))]
