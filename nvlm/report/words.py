"""Numbers and findings in words, for the page and the Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nvlm.metrics.intervals import Interval
from nvlm.report.compare import Gap
from nvlm.report.content import Place, Report, Task

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
DASH = "–"


def score(value: float, percent: bool, sign: bool = False) -> str:
    """A score or a difference: percentage points with one decimal, or the metric's own unit with three."""
    text = f"{100 * value:+.1f}" if percent else f"{value:+.3f}"
    if float(text) == 0:
        return text.lstrip("+-")
    return text.replace("-", "−") if sign or value < 0 else text.lstrip("+")


def bounds(low: float, high: float, percent: bool, sign: bool = False) -> str:
    """An interval."""
    return f"[{score(low, percent, sign)}, {score(high, percent, sign)}]"


def told(one: Interval, percent: bool, unit: str = "") -> str:
    """A mean with its interval."""
    return f"{score(one.mean, percent)}{unit} {bounds(one.low, one.high, percent)}"


def p_value(p: float) -> str:
    """A p with two digits."""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def si(value: float, unit: str) -> str:
    """A number with three digits and a prefix, such as 1.24 PFLOP; a dash if it is not known."""
    if not math.isfinite(value):
        return DASH
    power = min(max(0, math.floor(math.log10(value) / 3)), len(_PREFIXES) - 1) if value > 0 else 0
    return f"{three(value / 1000**power)} {_PREFIXES[power]}{unit}".rstrip()


def three(value: float) -> str:
    """A number with three digits; a dash if it is not known."""
    if not math.isfinite(value):
        return DASH
    if value == 0 or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if not math.isfinite(seconds):
        return DASH
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{three(seconds / size)} {unit}"
    return f"{three(seconds)} s"


def named(place: Place) -> str:
    """A cell's name."""
    return ", ".join(part for part in place if part)


def listed(values: Sequence[object]) -> str:
    """1, 2 and 3."""
    texts = list(map(str, values))
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}" if texts else ""


def findings(report: Report, task: Task) -> list[str]:
    """What the tables of `task` say, in a few sentences."""
    if task.best is None:
        return []
    best, grid = task.overall[task.best], report.grid
    unit = "%" if task.percent else ""
    equals = [place for place, one in task.overall.items() if one.mean == best.mean]
    if len(task.overall) == 1:
        found = []
    elif len(equals) == len(task.overall):
        cells = "Both cells" if len(equals) == 2 else f"All {len(equals)} cells"
        found = [f"{cells} score {score(best.mean, task.percent)}{unit}."]
    else:
        found = [f"The highest score is that of {listed(list(map(named, equals)))}: {told(best, task.percent, unit)}."]
    if task.column_gaps:
        found.append(f"Against {grid.base_column}{_unit(task)}: {_effects(task.column_gaps, task, 1)}.")
    if task.row_gaps:
        found.append(f"Between rows{_unit(task)}: {_effects(task.row_gaps, task, 0)}.")
    return found


def _unit(task: Task) -> str:
    return ", in points" if task.percent else ""


def _effects(gaps: Sequence[Gap], task: Task, part: int) -> str:
    """How each column compares with the base, over all rows, or each row with another, over all columns."""
    names = dict.fromkeys(_pair(gap, part) for gap in gaps)
    return "; ".join(
        f"{name} {_span([gap for gap in gaps if _pair(gap, part) == name], task.percent)}" for name in names
    )


def _pair(gap: Gap, part: int) -> str:
    return gap.this[1] if part else f"{gap.this[0]} over {gap.base[0]}"


def _span(gaps: Sequence[Gap], percent: bool) -> str:
    means, certain = [gap.mean for gap in gaps], sum(gap.certain for gap in gaps)
    if len(gaps) == 1:
        return f"{score(means[0], percent, True)} ({'certain' if certain else 'not certain'})"
    low, high = score(min(means), percent, True), score(max(means), percent, True)
    span = low if low == high else f"{low} to {high}"
    return f"{span} ({certain} of {len(gaps)} certain)"
