"""launch/train.py and launch/stages.py: check all runs that the command line asks for, then start them. Runs of a sweep
start side by side, stages one after the other.

Imports no torch, so that mistakes are reported immediately.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from nvlm.commands.auto import check_not_swept, with_layout
from nvlm.commands.compose import CONF, check_overrides, effective, explain, runs, to_config
from nvlm.commands.mistakes import answered, answered_or_helped
from nvlm.commands.stages import Stage, check_sequence, progress, stages_of
from nvlm.commands.swept import Swept, swept
from nvlm.commands.words import plain_words
from nvlm.config.values import Config, problem
from nvlm.processes.requeue import in_job, requeued
from nvlm.runs.folder import has_run, latest, steps_done
from nvlm.runs.ownership import check_folder
from nvlm.runs.place import check_place
from nvlm.sweep.plan import check_names

CHAIN_HELP = """python launch/stages.py +pipeline=NAME [KEY=VALUE ...]: train the stages of a pipeline in turn
+pipeline=llava_ov_7b        a file of conf/pipeline; dry_run=true shows its stages, and what is done
stages.STAGE.KEY=VALUE       a key of one stage; other keys are as for launch/train.py, and apply to all stages
resume=auto (the default)    goes on where the command ended; resume=never wants new folders"""
_STOPPED = -1  # in place of an exit status: a signal ended the run as it should
_LATE = 30.0  # seconds until a shared file system shows on all machines what one of them wrote


def main(started: float) -> int:
    """Run the command line and return the exit status. `started`: time.time() at the start of the command."""
    return answered(lambda: _answer(started))


def chain(started: float) -> int:
    """Run the stages of the command line's pipeline, going on where they ended, and return the exit status."""
    return answered_or_helped(sys.argv[1:], CHAIN_HELP, lambda words: _chain(plain_words(words), started))


def _answer(started: float) -> int:
    words = plain_words(sys.argv[1:])
    if stages := stages_of(words):
        return _through_stages(stages, started)
    if sweep := swept(words):
        return _sweep(sweep, started)
    sys.argv[1:] = with_layout(effective(words), _folder)  # Hydra parses them again
    configs = check_overrides(sys.argv[1:])
    if len(configs) > 1:
        raise problem("command line", f"{len(configs)} runs", "one, or -m for a sweep", "add -m")
    for config in configs:
        _check(config)
        if config.dry_run:
            return _dry_run(configs)
        _check_place(sys.argv[1:])
        _check_run(config, _folder(sys.argv[1:]))
    _through_hydra(started)
    return 0


def _chain(words: list[str], started: float) -> int:
    if not any(word.startswith("resume=") for word in words):
        words.append("resume=auto")
    if not (stages := stages_of(words)):
        known = sorted(path.stem for path in (CONF / "pipeline").glob("*.yaml"))
        raise problem("command line", "no pipeline", f"one of {', '.join(known)}", f"+pipeline={known[0]}")
    return _through_stages(stages, started)


def _sweep(sweep: Swept, started: float) -> int:
    """Run a sweep on this machine or, through Hydra, as jobs on other machines or under a launcher."""
    from nvlm.commands import launch

    command = shlex.join(["python", "launch/train.py", *sys.argv[1:]])
    words = effective(sweep.words)
    check_not_swept(words)
    check_names([sweep.name(one) for one in runs(words)])
    configs = check_overrides(words)
    elsewhere = any(word.startswith("hydra/launcher=") for word in words)
    for config in configs:
        _check(config, elsewhere)
    if all(config.dry_run for config in configs):
        return _dry_run(configs)
    if not elsewhere and launch.launched() is None:
        from nvlm.commands.sweep import run_sweep

        return run_sweep(sweep, words, configs, command)
    sys.argv[1:] = effective(sweep.for_hydra())
    _through_hydra(started)
    return 0


# These import what reads weights, text and images; a mistyped key need not wait for it.


def _check(config: Config, elsewhere: bool = False) -> None:
    from nvlm.commands import launch
    from nvlm.inputs.check import check_weights

    if not elsewhere:
        launch.check_machine(config)
    if config.resume == "never":  # otherwise the run folder decides what is needed
        check_weights(config)


def _check_run(config: Config, folder: Path) -> None:
    from nvlm.inputs.check import check_weights

    check_folder(config, folder)
    if config.resume == "auto":
        check_weights(config, folder)


def _dry_run(configs: Sequence[Config]) -> int:
    from nvlm.commands import launch
    from nvlm.commands.dryrun import dry_run

    launch.quiet()
    for config in configs:
        dry_run(config)
    return 0


def _through_stages(stages: Sequence[Stage], started: float) -> int:
    """Check all stages, then run them one after the other; one that ends early is the last.

    With resume=auto, stages that are done are passed over.
    """
    from nvlm.commands import launch

    given = [with_layout(effective(stage.words), _folder) for stage in stages]
    configs = _check_stages(stages, given)
    first = (task := launch.launched()) is None or task.rank == 0
    if first:
        Console(width=110).print(progress(stages, configs))
    if configs[0].dry_run:
        return _dry_run(configs)
    for number, (stage, config) in enumerate(zip(stages, configs)):
        if number + 1 < len(stages) and has_run(stages[number + 1].folder):
            continue
        if first:
            print(f"stage {number + 1} of {len(stages)}: {stage.name}, in {stage.folder}", flush=True)
        sys.argv[1:] = given[number]
        _through_hydra(started if number == 0 else time.time())
        if not _done(config, stage.folder):
            return 0  # a signal ended it
    return 0


def _check_stages(stages: Sequence[Stage], given: Sequence[list[str]]) -> list[Config]:
    """The configuration of each stage, whose words are `given`. Raises ConfigError if one cannot run."""
    configs = [config for words in given for config in check_overrides(words)]
    if len(configs) > len(stages):
        expected = f"one for each of the {len(stages)} stages"
        raise problem("command line", f"{len(configs)} runs", expected, "one value for each key")
    check_sequence(stages, configs)
    for number, (stage, config) in enumerate(zip(stages, configs)):
        if number and not latest(stages[number - 1].folder):  # what it will start from does not exist yet
            orphan = replace(config.stage, parent=())
            config = replace(config, init=replace(config.init, checkpoint=None), stage=orphan)
        _check(config)
        if not config.dry_run:
            _check_place(given[number])
            _check_run(config, stage.folder)
    return configs


def _done(config: Config, folder: Path) -> bool:
    """Whether the run that just ended in `folder` has done all its steps, which another machine may have written."""
    from nvlm.commands.launch import launched

    over = time.monotonic() + (_LATE if launched() else 0)
    while steps_done(folder) < config.train.steps:
        if time.monotonic() > over:
            return False
        time.sleep(0.5)
    return True


def _check_place(arguments: Sequence[str]) -> None:
    """Raise ConfigError if the folder of the run cannot be created."""
    check_place(_folder(arguments), "hydra.run.dir")


def _folder(arguments: Sequence[str]) -> Path:
    """The folder of the run, as Hydra will name it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=[*arguments], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)  # its name may refer to it
    return Path(composed.hydra.run.dir)


def _through_hydra(started: float) -> None:
    """Start each run through Hydra, in the folder that Hydra names. Also handles --help and similar flags."""
    begins = iter([started])  # only the first run of a sweep starts with the command
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its own traceback and exits

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def job(composed: DictConfig) -> None:
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        status = answered(lambda: _start(composed, run_dir, next(begins, time.time())))
        if status:  # a signal also ends a sweep, and a sequence of stages
            sys.exit(0 if status == _STOPPED else status)

    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from None


def _start(composed: DictConfig, run_dir: Path, started: float) -> int:
    """Run a configuration and return 0, or _STOPPED if a signal ended it."""
    from nvlm.commands import launch

    config = to_config(composed)
    if in_job():
        launch.check_machine(config)
    with requeued(lambda: steps_done(run_dir) < config.train.steps):
        return _STOPPED if launch.start(config, run_dir, started) else 0
