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


def told(one: Interval, percent: bool) -> str:
    """A mean with its interval."""
    return f"{score(one.mean, percent)} {bounds(one.low, one.high, percent)}"


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
    found = [
        f"The highest score is that of {named(task.best)}: {score(best.mean, task.percent)}{unit} "
        f"{bounds(best.low, best.high, task.percent)}."
    ]
    if task.column_gaps:
        found += _effects(task.column_gaps, task, grid.columns, 1, f"Against {grid.base_column}")
    if task.row_gaps:
        certain = [gap for gap in task.row_gaps if gap.certain]
        found.append(f"Between the rows, {len(certain)} of {len(task.row_gaps)} differences are certain.")
    return found


def _effects(gaps: Sequence[Gap], task: Task, names: Sequence[str], part: int, intro: str) -> list[str]:
    """How each name compares with the base, over all rows."""
    told = []
    for name in names:
        own = [gap for gap in gaps if gap.this[part] == name]
        if own:
            up, down = (sum(gap.certain and (gap.mean > 0) == above for gap in own) for above in (True, False))
            low, high = min(gap.mean for gap in own), max(gap.mean for gap in own)
            span = score(low, task.percent, True)
            span += f" to {score(high, task.percent, True)}" if len(own) > 1 else ""
            sure = f"{up + down} of {len(own)} certain" if len(own) > 1 else "certain" if up + down else "not certain"
            told.append(f"{name} {span} ({sure})")
    return [f"{intro}{', in points' if task.percent else ''}: {'; '.join(told)}."]
