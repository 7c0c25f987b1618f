"""The command: a conversation with a model, its words on standard output as they come."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence

from nvlm import launch
from nvlm.config import ConfigError
from nvlm.generate.request import HELP, Request, parse
from nvlm.workers import report

_STOP_SECONDS = 5.0  # there is nothing to save
_ADD_IMAGE = "/image "


def main(arguments: Sequence[str]) -> int:
    """Answer the command line; returns the exit status."""
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP)
        return 0
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever interrupts wants no traceback
    try:
        request = parse(arguments)
        launch.check_processes(request.config, launch.count_gpus())
    except ConfigError as error:
        report(f"error: {error}")
        return 2
    processes = request.config.parallel.replica
    if processes > 1 and not launch.launched():
        return launch.spawn(["-m", "nvlm.generate.cli", *arguments], processes, _STOP_SECONDS)[0]
    return work(request)


def work(request: Request) -> int:
    """Hold the conversation in this process, which is one of the layout's."""
    launch.quiet()
    from nvlm import parallel
    from nvlm.batch import BadRecord
    from nvlm.generate.generator import build_generator

    config = request.config
    try:
        with parallel.distributed(config.parallel, config.seed, config.train.threads) as device:
            converse(build_generator(config, device), request)
    except (ConfigError, BadRecord) as error:  # raised by all processes alike
        report(f"error: {error}")
        return 2
    return 0


def converse(generator, request: Request) -> None:
    """The prompt's turn and, with chat=true, those of standard input. A turn that cannot be read is told and left out;
    without chat=true it raises BadRecord."""
    from nvlm import parallel
    from nvlm.batch import BadRecord
    from nvlm.data.chat import IMAGE_MARK, place_images
    from nvlm.generate.generator import Conversation

    def show(_, piece: str) -> None:
        if parallel.is_first_rank():
            print(piece, end="", flush=True)

    messages: list[dict] = []
    images: list = []
    added = list(request.images)
    for line in _lines(request):
        if line.startswith(_ADD_IMAGE):
            added.append(line.removeprefix(_ADD_IMAGE).strip())
            continue
        try:
            ((_, text),) = place_images([("user", line)], len(added))
            asked = Conversation([*messages, {"role": "user", "content": text}], [*images, *added])
            (answer,) = generator.generate([asked], request.sampling, show)
        except BadRecord as error:
            if not request.chat:
                raise
            report(f"error: {error}; this turn is left out")
            added = []
            continue
        show(0, "\n")
        # What the model says is no image, whatever it says.
        messages = [*asked.messages, {"role": "assistant", "content": answer.replace(IMAGE_MARK, "")}]
        images, added = asked.images, []


def _lines(request: Request) -> Iterator[str]:
    """The prompt, then with chat=true the lines of standard input, which the first process reads for all."""
    from nvlm import parallel

    if request.prompt:
        yield request.prompt
    while request.chat:
        line = parallel.from_first_rank(_read() if parallel.is_first_rank() else None)
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
