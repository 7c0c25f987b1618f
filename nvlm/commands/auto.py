"""`parallel=auto`: the planner's best layout for the GPUs that are there, as the words that select it.

It is resolved before anything else reads the command line, so a run's config.yaml has the layout that it became.
Imports no torch.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nvlm.commands.compose import unlaid_config
from nvlm.config.hardware import GPU, GPUS, known_gpu
from nvlm.config.values import Config, problem

_AUTO, _COUNT = "parallel=auto", "gpus"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A run whose layout is open. `fixed`: keys with a dot that the command line sets."""

    config: Config
    words: tuple[str, ...]  # without parallel=auto and gpus=
    fixed: tuple[str, ...]
    count: str | None  # the value of gpus=


def is_auto(words: Sequence[str]) -> bool:
    """Whether `words` ask for the planner's layout."""
    return [word for word in words if _key(word) == "parallel"][-1:] == [_AUTO]


def check_not_swept(words: Sequence[str]) -> None:
    """Raise ConfigError if a sweep asks for the planner's layout."""
    if is_auto(words):
        fix = "the words of launch/plan.py gpus=N gpu=NAME, or parallel=one"
        raise problem(_AUTO, "a sweep, whose runs share the GPUs", "a single run or stages", fix)


def with_layout(words: Sequence[str], folder: Callable[[Sequence[str]], Path]) -> list[str]:
    """`words` with parallel=auto replaced by the layout, which is printed with the reason. Other words are returned as
    they are.

    `folder`: the folder of the run with given words. A run that is resumed on as many GPUs keeps its layout. Raises
    ConfigError if no layout fits, or if the GPUs are unknown.
    """
    if not is_auto(words) or any(word.startswith("-") for word in words):
        return list(words)
    asked = _asked(words)
    gpus = _number(asked)
    laid = _kept(asked, gpus, folder) or _best(asked, gpus)
    chosen = {_key(word) for word in laid}
    return [*(word for word in asked.words if _key(word) not in chosen), "parallel=tp8", *laid]


def _asked(words: Sequence[str]) -> _Asked:
    own = [word for word in words if _key(word) not in ("parallel", _COUNT)]
    given = dict(word.split("=", 1) for word in words if _key(word) == _COUNT)
    fixed = tuple(key for key in map(_key, own) if "." in key)
    if "parallel.data" in fixed:
        raise problem("parallel.data", _AUTO, "no number of replicas beside it", "leave parallel.data out")
    config = unlaid_config(*own, "parallel=tp8", *("parallel.virtual=1",) * ("parallel.virtual" not in fixed))
    return _Asked(config=config, words=tuple(own), fixed=fixed, count=given.get(_COUNT))


def _number(asked: _Asked) -> int:
    """The number of the run's GPUs: the launcher's processes, else gpus=, else those of this machine."""
    from nvlm.commands import launch

    task, here, count = launch.launched(), len(launch.gpus_here()), asked.count
    if count is not None and (not count.isdecimal() or int(count) < 1):
        raise problem(_COUNT, repr(count), "a whole number of at least 1", f"{_COUNT}=8")
    if task and count not in (None, str(task.world)):
        raise problem(_COUNT, count, f"the {task.world} processes of {task.launcher}", f"leave {_COUNT} out")
    if not task:
        launch.check_allocation(os.environ, shlex.join(["python", *sys.argv]))
    number = task.world if task else int(count or here)
    if not number:
        fix = f"{_COUNT}=64 gpu=h100 dry_run=true, or a layout: parallel=one"
        raise problem(_AUTO, "a machine without GPUs", "GPUs, or what to plan for", fix)
    return number


def _kept(asked: _Asked, gpus: int, folder: Callable[[Sequence[str]], Path]) -> list[str] | None:
    """The layout of the run that is resumed, if it is one for `gpus` GPUs and has the fixed values."""
    from nvlm.estimate.layouts import overrides
    from nvlm.runs.folder import has_run, read_run_config

    if asked.config.resume != "auto" or not has_run(where := folder(asked.words)):
        return None
    begun = read_run_config(where / "checkpoints" / "latest")
    laid = overrides(begun, begun.parallel.data).split()
    same = {word for word in asked.words if _key(word) in map(_key, laid)} <= set(laid)
    if begun.parallel.replica * begun.parallel.data != gpus or not same:
        return None
    _say(f"{_AUTO}: the layout with which {where} began: {' '.join(laid)}")
    return laid


def _best(asked: _Asked, gpus: int) -> list[str]:
    from nvlm.estimate.best import best_layout, waiting, why
    from nvlm.estimate.layouts import overrides

    gpu, kind = _gpu(asked.config, gpus)
    found = best_layout(asked.config, gpus, gpu, asked.fixed)
    best = found.fitting[0]
    _say("\n  ".join(filter(None, (f"{_AUTO}: {why(found, kind)}", waiting(best)))))
    return overrides(best.config, best.replicas).split()


def _gpu(config: Config, gpus: int) -> tuple[GPU, str]:
    """The kind of GPU and its name: config.gpu, else the smallest of this machine, with as many in a node as it has."""
    from nvlm.commands import launch

    if config.gpu:
        return GPUS[config.gpu], config.gpu
    here = launch.gpus_here()
    known = {name: known_gpu(name) for name, _ in here}
    if not known or None in known.values():
        got = next((name for name, gpu in known.items() if gpu is None), "a machine without GPUs")
        raise problem(_AUTO, got, f"one of {', '.join(GPUS)}", "gpu=h100, or the one that is most like it")
    name, gpu = min(known.items(), key=lambda one: one[1].memory)
    return (replace(gpu, node=len(here)) if 1 < len(here) < min(gpu.node, gpus) else gpu), name


def _say(line: str) -> None:
    from nvlm.commands import launch

    task = launch.launched()
    if task is None or task.rank == 0:
        print(line, flush=True)


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")
