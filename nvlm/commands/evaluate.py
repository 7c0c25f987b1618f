"""The evaluate command. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nvlm.commands.mistakes import answered_or_helped
from nvlm.commands.score import score, scores_files
from nvlm.config.values import problem
from nvlm.processes.workers import report

if TYPE_CHECKING:
    from nvlm.commands.checkpoint import Request

_STOP_SECONDS = 5.0  # short: answers are kept as they come

HELP = """python launch/evaluate.py checkpoint=DIR [task=docvqa,chartqa data.path=DIR] [key=value ...]
python launch/evaluate.py answers=FILE.jsonl[,FILE.jsonl] metric=NAME

checkpoint=DIR  a run folder (its newest checkpoint), its checkpoints/best, or one of its checkpoints/step_N
task=NAME,...   what is asked: heldout, the run's held-out records (the default), or benchmarks: conf/task/*.yaml
data.path=DIR   the folder of the benchmarks' files
data=jsonl data.heldout_path=FILE   other records than the run's, for task=heldout; metric=NAME scores their answers
shots=N         N examples, questions with their answers, before each question
limit=N         only the first N questions of each task
out=DIR         the folder of the results; default: the run's folder evaluation/
parallel.data=2 evaluate.batch=16 and other keys change the run's configuration

answers=FILE    score the answers of a file; of two files, also the difference on the questions that both have
metric=NAME     vqa_accuracy, textvqa_accuracy, anls, relaxed_accuracy, exact_match, ocrbench, choice, mmmu, mathvista,
                cider or gsm8k"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return answered_or_helped(arguments, HELP, _answer)


def _answer(arguments: Sequence[str]) -> int:
    if scores_files(arguments):
        return score(arguments)
    from nvlm.commands import launch  # here, because files of answers are scored without
    from nvlm.commands.checkpoint import check, parse

    request = parse(arguments)
    check(request)
    parallel, task = request.config.parallel, launch.launched()
    if task is not None and task.world % parallel.replica:
        expected = f"a multiple of {parallel.replica} (tensor x pipeline x context)"
        raise problem("number of processes", task.world, expected, f"start {parallel.replica}")
    launch.check_processes(request.config, len(launch.gpus_here()))
    processes = parallel.replica * parallel.data
    if processes > 1 and task is None:
        return launch.spawn(["-m", "nvlm.commands.evaluate", *arguments], processes, _STOP_SECONDS)[0]
    return work(request)


def work(request: Request) -> int:
    """Evaluate as one rank of the layout."""
    from nvlm.commands import launch

    launch.begin_process(request.config.parallel)
    from nvlm.evaluate.checkpoint import evaluate_checkpoint

    try:
        evaluate_checkpoint(request.config, request.root, request.checkpoint, request.step)
    except KeyboardInterrupt:
        report("stopped: the same command goes on where it was")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
