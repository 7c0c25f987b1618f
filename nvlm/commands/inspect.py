"""The inspect command: what the records of a configuration become, as a table, a page and a report."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nvlm.arch.registry import description, placement_rule
from nvlm.commands.compose import check_overrides
from nvlm.commands.mistakes import answered_or_helped
from nvlm.config.values import Config, problem
from nvlm.runs.files import write_whole

if TYPE_CHECKING:
    from nvlm.inspect.page import Found
    from nvlm.inspect.survey import Survey

HELP = """python launch/inspect_data.py data=jsonl data.path=records.jsonl [key=value ...]

out=DIR         the folder of data.html and report.json; default: inspected/NAME, NAME the run's name
records=N       inspect only N records of each source, those that the run draws first; default: all
pixels=true     also decode every image, which finds damaged ones; default: read only headers
show=12         records on the page, at most 100
max_bad=0.01    exit status 1 if a larger share of a source's records is bad; default: data.max_skipped
arch=hybrid llm=qwen2-72b llm.tokenizer=DIR +experiment=nvlm_h_72b_sft ...   as for launch/train.py;
                data.workers=N processes read; parallel.data=N is the number of replicas that share a step"""

PAGE, REPORT = "data.html", "report.json"
_OPTIONS = ("out", "records", "pixels", "show", "max_bad")
_MOST_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asks for, besides the configuration. `records`: of each source; None: all."""

    out: Path
    records: int | None
    pixels: bool
    show: int
    max_bad: float


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 if a source has too many bad records."""
    return answered_or_helped(arguments, HELP, _answer)


def _answer(arguments: Sequence[str]) -> int:
    own = {key: value for key, _, value in (word.partition("=") for word in arguments) if key in _OPTIONS}
    others = [word for word in arguments if word.partition("=")[0] not in _OPTIONS]
    configs = check_overrides(others, _OPTIONS)
    if len(configs) != 1:
        raise problem("command line", f"{len(configs)} configurations", "one", "give each key one value")
    (config,) = configs
    request = _request(own, config)
    _make(request.out)
    found = inspect(config, request)
    _write(config, request, found)
    _print(found, request)
    return 1 if found.refused else 0


def _request(own: dict[str, str], config: Config) -> Request:
    """The options, checked. Raises ConfigError."""
    pixels = own.get("pixels", "false")
    if pixels not in ("true", "false"):
        raise problem("pixels", repr(pixels), "true or false", "pixels=true")
    return Request(
        out=Path(own.get("out") or f"inspected/{config.name}").expanduser(),
        records=_whole(own, "records", 1, None),
        pixels=pixels == "true",
        show=_whole(own, "show", 0, _MOST_SHOWN) if "show" in own else 12,
        max_bad=_share(own["max_bad"]) if "max_bad" in own else config.data.max_skipped,
    )


def _make(out: Path) -> None:
    """Make the folder. Raises ConfigError if it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise problem("out", f"{out}: {error.strerror}", "a folder that can be written", "out=DIR") from None


def _whole(own: dict[str, str], key: str, least: int, most: int | None) -> int | None:
    """The option's value, or None."""
    if key not in own:
        return None
    text = own[key]
    if not (text.isascii() and text.isdecimal()) or int(text) < least or (most is not None and int(text) > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise problem(key, repr(text), f"a whole number, {limits}", f"{key}={12 if most else 1000}")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:  # also refuses NaN
        raise problem("max_bad", repr(text), "a share from 0 to 1", "max_bad=0.01")
    return share


def inspect(config: Config, request: Request) -> Found:
    """Read the records and measure them."""
    # These import torch; a mistyped key need not wait for it.
    from nvlm.data.loader import steps_of
    from nvlm.estimate.lengths import check_vocabulary
    from nvlm.inspect.page import Found
    from nvlm.inspect.rows import packed
    from nvlm.inspect.samples import chosen
    from nvlm.inspect.survey import Survey, tallied

    check_vocabulary(config)
    steps = replace(steps_of(config, placement_rule(config.arch.name)), data_size=config.parallel.data)
    records, order, processor = steps.records, steps.order, steps.processor
    survey = Survey(records, processor, order, request.records, request.pixels)
    with _progress(survey) as progress:
        tallies = tallied(survey, config.data.workers, progress)
    step = packed(steps)
    return Found(
        tallies=tallies,
        shown=tuple(chosen(records, order, processor, request.show)) if request.show else (),
        packed=step,
        names={sample.index: records.name(sample.index) for row in step.rows for sample in row.samples},
        sampled=any(survey.draws(source) < source.used for source in order.sources),
        decoded=request.pixels,
        max_bad=request.max_bad,
    )


@contextmanager
def _progress(survey: Survey) -> Iterator:
    """A bar for each source; yields the function that moves them."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = [bars.add_task(one.name or "records", total=survey.draws(one)) for one in survey.order.sources]
        yield lambda number, count: bars.advance(tasks[number], count)


def _write(config: Config, request: Request, found: Found) -> None:
    from nvlm.inspect.page import page
    from nvlm.inspect.report import report

    write_whole(request.out / REPORT, json.dumps(report(config, found), indent=1) + "\n")
    write_whole(request.out / PAGE, page(config, description(config.arch.name), found))


def _print(found: Found, request: Request) -> None:
    table = Table(box=None)
    headings = ("source", "records", "bad", "fewer tiles", "pictures", "tiles", "text tokens", "learned", "tile tokens")
    for heading in (*headings, "keys"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, tally in found.tallies.items():
        numbers = (tally.records, tally.bad, tally.fewer_tiles, tally.images, tally.tiles)
        tokens = (tally.text, tally.learned, tally.stream, tally.keys)
        table.add_row(name or "records", *(f"{number:,}" for number in (*numbers, *tokens)))
    console = Console(width=110)
    console.print(table)
    for tally in found.tallies.values():
        for record, reason in tally.faults[:3]:
            console.print(f"{record}: {reason}", markup=False, highlight=False, soft_wrap=True)
    for name in found.refused:
        tally = found.tallies[name]
        what = f"{name}: " if name else ""
        line = f"{what}{tally.bad} of {tally.records} records are bad, more than max_bad={found.max_bad:g}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{request.out / PAGE} and {REPORT} beside it", markup=False, highlight=False, soft_wrap=True)
