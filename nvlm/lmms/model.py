"""The model class of lmms-eval 0.7: its requests become prompts, and answers go back in their order.

`python -m lmms_eval --model nvlm --model_args checkpoint=runs/NAME --tasks mme --batch_size 8`
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms

from nvlm.config.values import problem
from nvlm.data.record import BadRecord
from nvlm.generate.sampling import Sampling
from nvlm.lmms.backend import Prompt, opened

_LONGEST = 256  # tokens of an answer, if the task does not say


class NVLM(lmms):
    """A checkpoint of any architecture, or an exported folder. One process.

    `checkpoint`: a run folder, one of its checkpoints, or an export; other arguments change the run's configuration.
    Raises ConfigError.
    """

    is_simple = True

    def __init__(
        self, checkpoint: str = "", batch_size: int | str = 1, device: str | None = None, max_batch_size=None, **changes
    ) -> None:
        super().__init__()
        if not checkpoint or not Path(checkpoint).is_dir():
            expected = "a run folder, or a folder written by launch/export_hf.py"
            raise problem("model_args checkpoint", repr(checkpoint), expected, "--model_args checkpoint=runs/NAME")
        self.batch = int(batch_size) if str(batch_size).isdecimal() else 1
        words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()]
        self.held = ExitStack()
        self.backend = self.held.enter_context(opened(Path(checkpoint).resolve(), words, device))

    def clean(self) -> None:
        """Release the model. Called at the end of an evaluation."""
        self.held.close()
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, those of similar length computed together."""
        answers: dict[int, str] = {}
        for (sampling, ends), numbers in self._alike(requests).items():
            prompts = {number: self._prompt(requests[number]) for number in numbers}
            ordered = sorted(numbers, key=lambda number: (len(prompts[number].images), len(prompts[number].text)))
            for start in range(0, len(ordered), self.batch):
                chosen = ordered[start : start + self.batch]
                for number, text in zip(chosen, self._answered([prompts[one] for one in chosen], sampling)):
                    answers[number] = until(text, ends)
                    request = requests[number].args
                    self.cache_hook.add_partial("generate_until", (request[0], request[1]), answers[number])
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(minus the log-probability, whether greedy) of each continuation, without the token that would end it.

        With the sign of a loss, since lmms-eval 0.7 takes the least, and in a GenerationResult, since it makes a text
        of any other pair.
        """
        found = []
        for request in requests:
            context, continuation, *where = request.args
            if callable(continuation):
                continuation = continuation(self._document(where))
            # The chat format separates question and answer, so no space is needed between them.
            total, greedy = self.backend.score(Prompt(context, self._images(where)), continuation.lstrip())
            found.append(GenerationResult((-total, greedy)))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds to each request; the task makes a round's prompt from the answers before it."""
        return [self._rounds(request) for request in requests]

    def _rounds(self, request: Instance) -> list[str]:
        text, options, show, ask, *where = request.args
        images, outputs, told, done = self._images([show, *where]), [], None, False
        sampling, ends = sampling_of(options), ends_of(options)
        while not done:
            outputs = [*outputs, until(*self._answered([Prompt(text, images)], sampling), ends)]
            shown, text, done, outputs, told = ask(
                self._document([show, *where]),
                previous_output=outputs,
                round_idx=len(outputs),
                previous_round_info=told,
            )
            images = pictures(shown or ())
        return list(outputs)

    def _alike(self, requests: Sequence[Instance]) -> dict[tuple[Sampling, tuple[str, ...]], list[int]]:
        """The numbers of requests that can be answered together."""
        groups = defaultdict(list)
        for number, request in enumerate(requests):
            groups[sampling_of(request.args[1]), ends_of(request.args[1])].append(number)
        return groups

    def _answered(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """Answers; an unusable prompt gets an empty one, so that it counts as wrong."""
        try:
            return self.backend.answers(prompts, sampling)
        except BadRecord as reason:
            if len(prompts) > 1:
                return [text for prompt in prompts for text in self._answered([prompt], sampling)]
            logging.getLogger(__name__).warning("not answered: %s", reason)
            return [""]

    def _prompt(self, request: Instance) -> Prompt:
        context, _, *where = request.args
        return Prompt(context, self._images(where))

    def _images(self, where: Sequence[Any]) -> tuple[Any, ...]:
        show = where[0] if where else None
        return pictures(show(self._document(where)) or ()) if callable(show) else ()

    def _document(self, where: Sequence[Any]) -> Mapping:
        _, number, task, split = where
        return self.task_dict[task][split][number]


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """How a task wants its answers chosen; greedy unless it asks for sampling."""
    sampled = options.get("do_sample") and options.get("temperature")
    return Sampling(
        max_new_tokens=int(options.get("max_new_tokens") or _LONGEST),
        temperature=float(options["temperature"]) if sampled else 0.0,
        top_p=float(options.get("top_p") or 1.0) if sampled else 1.0,
    )


def ends_of(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts that end an answer."""
    ends = options.get("until") or ()
    return (ends,) if isinstance(ends, str) else tuple(end for end in ends if end)


def until(text: str, ends: Iterable[str]) -> str:
    """`text` up to the first of `ends`."""
    return text[: min((at for end in ends if (at := text.find(end)) >= 0), default=len(text))]


def pictures(shown: Iterable[Any]) -> tuple[Any, ...]:
    """The images of a document. Raises ConfigError for a video or a sound."""
    from PIL import Image

    found = tuple(shown)
    for one in found:
        if not isinstance(one, Image.Image):
            raise problem(
                "a task's document", f"a {type(one).__name__}", "images: NVLM reads no video or sound", "another task"
            )
    return found
