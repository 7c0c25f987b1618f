"""A task's questions as prompts: read, tokenized, measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nvlm.config.task import TaskConfig
from nvlm.config.values import Config
from nvlm.data.batch import Sample
from nvlm.data.messages import NoAnswer, read_turns
from nvlm.data.outline import Outline, Processor, outline
from nvlm.data.record import BadRecord, one_record
from nvlm.data.samples import fill
from nvlm.data.text.chat import answer_ids
from nvlm.evaluate.order import Prompt
from nvlm.evaluate.score import UNREADABLE, Row
from nvlm.generate.generator import prompt_processor
from nvlm.generate.sampling import Sampling
from nvlm.generate.text import words
from nvlm.tasks.question import Question, Questions


@dataclass(frozen=True, slots=True)
class Task:
    """The first `count` of `questions`, which the task `config` asks."""

    config: TaskConfig
    questions: Questions
    count: int

    def processor(self, config: Config) -> Processor:
        """What makes prompts of the questions, with exact tiles and room for the longest answer."""
        return prompt_processor(config, Sampling(max_new_tokens=self.longest(config)))

    def longest(self, config: Config) -> int:
        """The number of tokens of the longest answer."""
        return config.evaluate.max_new_tokens or self.config.max_new_tokens


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

    @property
    def text(self) -> str:
        """What the user asks, without the images."""
        return "".join(read_turns(self.question.record.messages)[-1].texts)

    def row(self, answer: str) -> Row:
        """Its line of answers.jsonl, without a score."""
        question, plans = self.question, self.sketch.pictures.plans
        line = {
            "id": question.record.id,
            "question": self.text,
            "answer": answer,
            "references": list(question.references),
            "category": question.category,
            "options": list(question.options),
            "type": question.type,
            "tiles": sum(plan.num_regular for plan in plans) if plans else None,
        }
        return {name: value for name, value in line.items() if name not in _OPTIONAL or value not in ([], "", None)}


_OPTIONAL = ("options", "type", "tiles")


def measured(task: Task, index: int, processor: Processor) -> Prompt | Unasked:
    """The lengths of question `index`, or why it cannot be asked. Reads only the headers of its images."""
    try:
        with one_record():
            question, sketch = _outlined(task, index, processor)
    except BadRecord as reason:
        return Unasked(index, task.questions.name(index), str(reason), scored=not isinstance(reason, NoAnswer))
    columns, keys = sketch.lengths
    return Prompt(index, columns, keys, sum(plan.num_tiles for plan in sketch.pictures.plans))


def asked(task: Task, index: int, processor: Processor) -> Asked | Unasked:
    """Question `index` as a prompt, or why it cannot be asked."""
    try:
        with one_record():
            question, sketch = _outlined(task, index, processor)
            return Asked(question, sketch, fill(question.record, sketch, processor))
    except BadRecord as reason:
        return Unasked(index, task.questions.name(index), str(reason))


def _outlined(task: Task, index: int, processor: Processor) -> tuple[Question, Outline]:
    question = task.questions[index]
    if task.config.layout == "records":  # what a model can produce: an answer after a round trip through the tokenizer
        tokenizer = processor.tokenizer
        possible = tuple(words(answer_ids(text, tokenizer), tokenizer) for text in question.references)
        question = replace(question, references=possible)
    return question, outline(question.record, processor, generate=True)
