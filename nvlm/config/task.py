"""A task: how records become questions, and how answers are scored. Mirrors conf/task/*.yaml. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from nvlm.config.fields import Count, FileName, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """`layout`: the form in which the files are published (nvlm.tasks.registry), or "records": those of `data=`, whose
    prompt is their own; `split`: the part that is asked; `prompt`: the user's turn, with {question} and {options};
    `open_prompt`: instead of it, for questions without options; `examples`: the part that few-shot examples come from
    (None: the questions themselves), `same_category`: only of the question's category; `metric`: a name in
    nvlm.metrics.registry; `max_new_tokens`: the longest answer."""

    name: Annotated[str, FileName()]
    layout: str
    split: Annotated[str, FileName()]
    prompt: Annotated[str, Prompt()] | None
    metric: str
    max_new_tokens: Count
    open_prompt: Annotated[str, Prompt()] | None = None
    examples: Annotated[str, FileName()] | None = None
    same_category: bool = False
