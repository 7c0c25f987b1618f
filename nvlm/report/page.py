"""The page: one HTML file without external references. Jinja escapes everything that comes from runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import jinja2
from markupsafe import Markup

from nvlm.inspect.document import environment
from nvlm.report import words
from nvlm.report.content import Place, Report, Task


def page(report: Report) -> str:
    """The whole page as HTML."""
    scales = {task.name: (_scale(task), _gap_scale(task)) for task in report.tasks}
    return _templates().get_template("page.html.jinja").render(report=report, grid=report.grid, scales=scales)


@cache
def _templates() -> jinja2.Environment:
    templates = environment("nvlm.report")
    templates.filters |= {"score": words.score, "si": words.si, "three": words.three, "duration": words.duration}
    templates.filters |= {"p": words.p_value, "named": words.named, "listed": words.listed}
    templates.filters |= {"svg": lambda chart: Markup(chart.svg)}  # ours; its texts are escaped by matplotlib
    templates.globals |= {"bounds": words.bounds, "findings": words.findings, "place": _place, "nice": _ticks}
    templates.globals |= {"best": _best, "finite": math.isfinite, "bar": _bar}
    return templates


Scale = tuple[float, float]
STRIP = 150  # units of a strip's width


def _scale(task: Task) -> Scale:
    """The limits of the strips of scores."""
    ends = [end for one in task.overall.values() for end in (one.low, one.high)]
    ends += [mean for one in task.by_seed.values() for mean in one.values()]
    return _padded(ends)


def _gap_scale(task: Task) -> Scale:
    """The limits of the strips of differences, which contain 0."""
    gaps = (*task.column_gaps, *task.row_gaps)
    return _padded([0.0, *(end for gap in gaps for end in (gap.low, gap.high))])


def _padded(ends: Sequence[float]) -> Scale:
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = 0.04 * (high - low) or 0.01
    return low - room, high + room


def _place(value: float, scale: Scale) -> str:
    """Where `value` is on a strip, in its units."""
    return f"{STRIP * (value - scale[0]) / (scale[1] - scale[0]):.1f}"


def _ticks(scale: Scale) -> list[float]:
    """Round values within `scale`, three to six of them."""
    width = scale[1] - scale[0]
    power = 10 ** math.floor(math.log10(width))
    step = next(s * power for s in (0.2, 0.5, 1, 2) if width / (s * power) <= 6)
    first = math.ceil(scale[0] / step)
    return [round(number * step, 10) for number in range(first, math.floor(scale[1] / step) + 1)]


def _best(values: Mapping[Place, float], highest: bool = True) -> float:
    """The best of `values` that are known."""
    known = [one for one in values.values() if math.isfinite(one)]
    return (max if highest else min)(known, default=math.nan)


def _bar(value: float, values: Sequence[float]) -> str:
    """`value` relative to the greatest of `values`, as a width in percent."""
    most = max((one for one in values if math.isfinite(one)), default=0.0)
    return f"{100 * value / most:.1f}%" if math.isfinite(value) and most else "0"
