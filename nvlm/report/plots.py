"""Line charts as small inline SVG, one panel each. Colours are the page's, so that they follow its theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SERIES = 8  # colours
_SIZE = (4.6, 2.9)  # inches, of 72 units each
_POINTS = 140  # of a curve
_TEXT = 10
# matplotlib is given colours that stand for the page's.
_INK, _FAINT, _LINE, _SERIES = "#010100", "#010101", "#010102", "#0102{:02x}"
_VARIABLES = {_INK: "--ink", _FAINT: "--faint", _LINE: "--line"} | {
    _SERIES.format(number): f"--c{number}" for number in range(SERIES)
}
_GAP = 0.085  # between labels, as a share of the panel's height
_LETTER = 0.6 * _TEXT / (72 * _SIZE[0])  # the width of a letter, at most, as a share of the figure's
_LONGEST = 26  # letters of a label
_NUMBER = re.compile(r"-?\d+\.\d{2,}")  # with more digits than an attribute needs


@dataclass(frozen=True, slots=True)
class Line:
    """What a panel shows of one cell. `curves`: (x, y) of each seed; `mean`: of all seeds, drawn over them."""

    label: str
    colour: int
    curves: tuple[tuple[np.ndarray, np.ndarray], ...]
    mean: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart. `limits`: of the y axis, for panels that are compared; `percent`: y is a share; `dots`: mark points."""

    title: str
    lines: tuple[Line, ...]
    x_title: str
    limits: tuple[float, float]
    percent: bool = False
    log: bool = False
    dots: bool = False
    whole_x: bool = False


def thinned(x: np.ndarray, y: np.ndarray, most: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` of the points, evenly spread, with the first and the last; points that are not finite are left
    out."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= most:
        return x, y
    chosen = np.unique(np.linspace(0, len(x) - 1, most).round().astype(int))
    return x[chosen], y[chosen]


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of curves: point by point if all have as many, else where all have values, at the first's places."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return np.array([]), np.array([])
    if len({len(x) for x, _ in curves}) == 1:
        return np.mean([x for x, _ in curves], axis=0), np.mean([y for _, y in curves], axis=0)
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    places = curves[0][0]
    places = places[(places >= low) & (places <= high)]
    return places, np.mean([np.interp(places, x, y) for x, y in curves], axis=0)


def bounds(lines: Sequence[Line], log: bool = False) -> tuple[float, float]:
    """Limits of a y axis that all `lines` fit, with a little room."""
    every = np.concatenate([y for line in lines for _, y in (*line.curves, line.mean)] or [np.array([0.0, 1.0])])
    every = every[np.isfinite(every) & ((every > 0) | (not log))]
    low, high = (float(every.min()), float(every.max())) if len(every) else (0.1, 1.0)
    if log:
        return low / 1.1, high * 1.1
    room = (high - low) * 0.06 or 0.05
    return low - room, high + room


def draw(panel: Panel, number: int) -> str:
    """The panel as an <svg> element. `number`: distinguishes its names from those of other panels of the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "path.simplify": False}):
        figure = Figure(figsize=_SIZE)
        FigureCanvasSVG(figure)
        room = _LETTER * max([len(_shortened(line.label)) for line in panel.lines] or [0]) + 0.03  # for the labels
        axes = figure.add_axes((0.105, 0.16, min(0.71, 0.895 - room), 0.8))
        _lines(axes, panel)
        _frame(axes, panel)
        _labels(axes, panel)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _cleaned(file.getvalue(), panel.title, number)


def _lines(axes, panel: Panel) -> None:
    for line in panel.lines:
        colour = _SERIES.format(line.colour)
        for x, y in line.curves if len(line.curves) > 1 else ():
            axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.38)
        axes.plot(*line.mean, color=colour, linewidth=1.5, marker="o" if panel.dots else None, markersize=3)


def _frame(axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(*panel.limits)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%" if panel.percent else f"{y:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=panel.whole_x))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_FAINT)
        spine.set_linewidth(0.7)
    axes.tick_params(colors=_FAINT, labelsize=_TEXT, length=3, width=0.6)
    axes.tick_params(axis="y", length=0)
    axes.yaxis.grid(True, color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(panel.x_title, fontsize=_TEXT, color=_FAINT, labelpad=2)


def _labels(axes, panel: Panel) -> None:
    """Names at the ends of the lines, moved apart where they would overlap."""
    ends = [(line, *axes.transAxes.inverted().transform(axes.transData.transform((line.mean[0][-1], line.mean[1][-1]))))
            for line in panel.lines if len(line.mean[0])]  # fmt: skip
    places = spread([y for _, _, y in ends])
    for (line, x, _), y in zip(ends, places):
        axes.text(
            max(x, 0.0) + 0.02, y, _shortened(line.label), transform=axes.transAxes, color=_SERIES.format(line.colour),
            fontsize=_TEXT, va="center", parse_math=False,
        )  # fmt: skip


def _shortened(label: str) -> str:
    """`label`, or its beginning and end if it is long: labels often differ in their ends."""
    return label if len(label) <= _LONGEST else f"{label[: _LONGEST // 2 - 1]}...{label[2 - _LONGEST // 2 :]}"


def spread(places: Sequence[float], gap: float = _GAP) -> list[float]:
    """`places` (shares of a height) moved apart to at least `gap`, as little as possible."""
    order = sorted(range(len(places)), key=places.__getitem__)
    groups: list[list[int]] = []  # labels that touch, which share the mean of their moves
    for one in order:
        groups.append([one])
        while len(groups) > 1 and _start(groups[-1], places, gap) < _start(groups[-2], places, gap) + gap * len(
            groups[-2]
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    found = {one: _start(group, places, gap) + gap * place for group in groups for place, one in enumerate(group)}
    return [found[number] for number in range(len(places))]


def _start(group: Sequence[int], places: Sequence[float], gap: float) -> float:
    """Where the first of a group's labels stands."""
    return sum(places[one] for one in group) / len(group) - gap * (len(group) - 1) / 2


def _cleaned(svg: str, title: str, number: int) -> str:
    """The element alone, with the page's colours and font, short numbers, and names that no other panel has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: f' id="p{number}{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\1p{number}", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font-family: [^;\"]*;? ?| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub(r" ?\n(?=[A-Za-z\"])", "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: _NUMBER.sub(_short, tag[0]), svg)  # not in labels
    svg = re.sub(r">\s+<", "><", svg)
    width, height = (round(72 * side) for side in _SIZE)
    name = re.sub(r"[<>&\"]", "", title)
    return re.sub(
        r"<svg[^>]*>", f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}">', svg, count=1
    ).strip()


def _short(number: re.Match) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def pretty_unit(largest: float) -> tuple[float, str]:
    """A power of 1,000 for an axis that reaches `largest`, and its name in words."""
    for power, name in ((12, "trillion"), (9, "billion"), (6, "million"), (3, "thousand")):
        if largest >= 2 * 10**power:
            return 10.0**power, name
    return 1.0, ""


def exponent(largest: float) -> int:
    """The power of ten, a multiple of 3, by which values up to `largest` are written."""
    return 3 * math.floor(math.log10(largest) / 3) if largest > 0 else 0
