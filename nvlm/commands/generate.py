"""The generate command: a conversation with a model, streamed to standard output."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nvlm.commands import launch
from nvlm.commands.mistakes import answered_or_helped
from nvlm.commands.request import HELP, Request, parse
from nvlm.config.values import ConfigError

_STOP_SECONDS = 5.0  # short, since there is nothing to save
_ADD_IMAGE = "/image "


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    return answered_or_helped(arguments, HELP, _answer)


def _answer(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback on Ctrl-C
    request = parse(arguments)
    task = launch.launched()
    launch.check_processes(request.config, len(launch.gpus_here()))
    processes = request.config.parallel.replica
    if processes > 1 and task is None:
        return launch.spawn(["-m", "nvlm.commands.generate", *arguments], processes, _STOP_SECONDS)[0]
    return work(request)


def work(request: Request) -> int:
    """Hold the conversation, as one rank of the layout."""
    launch.begin_process(request.config.parallel)
    from nvlm.data.record import BadRecord
    from nvlm.generate.generator import Conversation, check, opened
    from nvlm.tiling.frames import FramePlan

    config = request.config
    try:
        if request.prompt:  # checked before the weights are read
            asked = Conversation([user_turn(request.prompt, request.images)], request.images)
            sketch = check(config, asked, request.sampling)
            if request.explain and any(isinstance(plan, FramePlan) for plan in sketch.pictures.plans):
                raise BadRecord("explain= shows where a model looked in images, not in videos")
            if request.explain and not sketch.lengths[1]:
                raise BadRecord("nothing to explain: a picture of one tile is not cross-attended in this model")
        with opened(config) as generator:
            converse(generator, request)
    except BadRecord as error:  # all ranks raise it
        raise ConfigError(str(error)) from None
    return 0


def user_turn(text: str, images: Sequence) -> dict[str, str]:
    """A user's message with a mark for each of its `images`. Raises BadRecord."""
    from nvlm.data.messages import place_images, read_turns, with_marks

    (turn,) = place_images(read_turns([{"role": "user", "content": text}]), len(images))
    return {"role": turn.role, "content": with_marks(turn.texts)}


def converse(generator, request: Request) -> None:
    """The prompt's turn and, with chat=true, turns from standard input. A turn that cannot be used is reported and
    skipped; without chat=true it raises BadRecord."""
    from nvlm.data.messages import literal
    from nvlm.data.record import BadRecord
    from nvlm.generate.generator import Conversation
    from nvlm.processes import groups

    def show(_, piece: str) -> None:
        if groups.is_first_rank():
            print(piece, end="", flush=True)

    said = Conversation([])
    added = list(request.images)
    for line in _lines(request):
        if line.startswith(_ADD_IMAGE):
            added.append(Path(line.removeprefix(_ADD_IMAGE).strip()))
            continue
        try:
            asked = Conversation([*said.messages, user_turn(line, added)], [*said.images, *added])
            (answer,) = generator.answers([asked], request.sampling, show)
        except BadRecord as error:
            if not request.chat:
                raise
            if groups.is_first_rank():
                print(f"error: {error}; this turn is skipped", file=sys.stderr, flush=True)
        else:
            show(0, "\n")
            reply = {"role": "assistant", "content": literal(answer.text)}  # a mark in an answer is not an image
            said = Conversation([*asked.messages, reply], asked.images)
            if request.explain:
                explain(generator, answer, line, request.explain)
        added = []


def explain(generator, answer, question: str, out: Path) -> None:
    """Write the page `out` and its numbers beside it. A collective call of all ranks."""
    from nvlm.explain.files import write
    from nvlm.explain.measure import explained
    from nvlm.processes import groups

    looks = explained(generator, answer)
    if groups.is_first_rank():
        for path in write(looks, generator.config, answer, question, out):
            print(path, file=sys.stderr)


def _lines(request: Request) -> Iterator[str]:
    """The prompt, then with chat=true the lines of standard input, which the first rank reads for all."""
    from nvlm.processes import groups

    if request.prompt:
        yield request.prompt
    patient = groups.patient_group() if request.chat else None
    while request.chat:
        line = groups.from_first_rank(_read() if groups.is_first_rank() else None, patient)
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _read() -> str:
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
