"""A task's questions as prompts: read, tokenized, measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nvlm.config.values import Config
from nvlm.data.batch import Sample
from nvlm.data.messages import NoAnswer, read_turns
from nvlm.data.outline import Outline, Processor, outline
from nvlm.data.record import BadRecord, one_record
from nvlm.data.samples import fill
from nvlm.data.text.chat import answer_ids
from nvlm.evaluate.order import Prompt
from nvlm.evaluate.score import UNREADABLE, Row, digest
from nvlm.evaluate.tasks import Task
from nvlm.generate.generator import prompt_processor
from nvlm.generate.sampling import Sampling
from nvlm.generate.text import words
from nvlm.tasks.question import Question


def longest(task: Task, config: Config) -> int:
    """The number of tokens of the longest answer."""
    return config.evaluate.max_new_tokens or task.config.max_new_tokens


def processor_of(task: Task, config: Config) -> Processor:
    """What makes prompts of the questions, with exact tiles and room for the longest answer."""
    return prompt_processor(config, Sampling(max_new_tokens=longest(task, config)))


@dataclass(frozen=True, slots=True)
class Unasked:
    """A question that is not asked, and why. `scored`: it counts as wrong; otherwise it has no reference."""

    index: int
    name: str
    reason: str
    scored: bool = True

    def row(self) -> Row:
        """Its line of answers.jsonl."""
        told = {"question": "", "answer": "", "references": [], "score": 0.0}
        return {"id": self.name} | told | {"category": UNREADABLE, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its outline and its sample."""

    question: Question
    sketch: Outline
    sample: Sample

    def row(self, answer: str) -> Row:
        """Its line of answers.jsonl, without a score."""
        return row_of(self.question, self.sketch, answer)


def row_of(question: Question, sketch: Outline, answer: str = "") -> Row:
    """The line of answers.jsonl of `question`, without a score."""
    plans = sketch.pictures.plans
    optional = {
        "options": list(question.options),
        "type": question.type,
        "tiles": sum(plan.num_regular for plan in plans) if plans else None,
    }
    return {
        "id": question.record.id,
        "question": "".join(read_turns(question.record.messages)[-1].texts),
        "answer": answer,
        "references": list(question.references),
        "category": question.category,
    } | {name: value for name, value in optional.items() if value not in ([], "", None)}


def measured(task: Task, index: int, processor: Processor) -> Prompt | Unasked:
    """The lengths of question `index`, or why it cannot be asked. Reads only the headers of its images."""
    try:
        with one_record():
            question, sketch = _outlined(task, index, processor)
            found = digest(row_of(question, sketch))
    except BadRecord as reason:
        return Unasked(index, task.questions.name(index), str(reason), scored=not isinstance(reason, NoAnswer))
    columns, keys = sketch.lengths
    return Prompt(index, columns, keys, sum(plan.num_tiles for plan in sketch.pictures.plans), found)


def asked(task: Task, index: int, processor: Processor) -> Asked | Unasked:
    """Question `index` as a prompt, or why it cannot be asked."""
    try:
        with one_record():
            question, sketch = _outlined(task, index, processor)
            return Asked(question, sketch, fill(question.record, sketch, processor))
    except BadRecord as reason:
        return Unasked(index, task.questions.name(index), str(reason))


def _outlined(task: Task, index: int, processor: Processor) -> tuple[Question, Outline]:
    question = task.question(index)
    if task.of_records:  # what a model can produce: an answer after a round trip through the tokenizer
        tokenizer = processor.tokenizer
        possible = tuple(words(answer_ids(text, tokenizer), tokenizer) for text in question.references)
        question = replace(question, references=possible)
    return question, outline(question.record, processor, generate=True)
