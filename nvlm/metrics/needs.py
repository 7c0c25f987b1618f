"""What a metric needs of a line before it means anything. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm.metrics.line import Line
from nvlm.metrics.registry import METRICS
from nvlm.metrics.vqa import ENOUGH

ANNOTATED = ("vqa_accuracy", "textvqa_accuracy")
TYPES = ("integer", "float", "list")  # of MathVista's answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """`key`: of the line; the rest is for nvlm.config.values.problem."""

    key: str
    got: str
    expected: str
    fix: str


def lacking(metric: str, line: Line) -> Lack | None:
    """What keeps `line` from being scored by `metric`, or None."""
    assert metric in METRICS
    count = len(line.references)
    if not count:
        fix = 'add the accepted answers, such as "references": ["two", "2"]'
        return Lack(key="references", got="none", expected="at least one", fix=fix)
    if metric in ANNOTATED and count <= ENOUGH:
        expected = f"at least {ENOUGH + 1}, one per annotator (the benchmark has 10)"
        return Lack(
            key="references", got=str(count), expected=expected, fix="metric=exact_match, or all annotators' answers"
        )
    if metric == "mmmu":
        return _of_mmmu(line)
    return _of_mathvista(line) if metric == "mathvista" else None


def _of_mmmu(line: Line) -> Lack | None:
    if not line.options and line.type != "open":
        expected = 'the options\' texts in order, or "type": "open"'
        return Lack(
            key="options", got="none", expected=expected, fix='add "options": ["a cat", "a dog"] or "type": "open"'
        )
    if line.options and not set(line.references) <= set(line.letters):
        return Lack(
            key="references", got=repr(line.references[0]), expected=_one_of(line.letters), fix='"references": ["A"]'
        )
    return None


def _of_mathvista(line: Line) -> Lack | None:
    if line.options and not set(line.references) <= set(line.options):
        expected, fix = f"the right option's text: {_one_of(line.options)}", f'"references": ["{line.options[0]}"]'
        return Lack(key="references", got=repr(line.references[0]), expected=expected, fix=fix)
    kind, _, decimals = line.type.partition(":")
    if not line.options and (kind not in TYPES or decimals and not (kind == "float" and decimals.isdecimal())):
        expected = "integer, float:1 (one decimal) or list, or options"
        return Lack(
            key="type", got=repr(line.type), expected=expected, fix='add "type": "integer" or "options": ["3", "4"]'
        )
    return None


def _one_of(values: tuple[str, ...]) -> str:
    return "one of " + ", ".join(values[:5]) + (", ..." if len(values) > 5 else "")
