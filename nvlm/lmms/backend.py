"""What answers lmms-eval's requests: a run's checkpoint, or an exported folder. Does not import lmms-eval."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from nvlm.config.values import problem
from nvlm.data.messages import literal, place_images, read_turns, with_marks
from nvlm.generate.config import read_config
from nvlm.generate.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's message, and its images, which are Pillow images. `<image>` in the text marks their places, if there is
    one mark for each; otherwise all of them go first, and the marks stay text."""

    text: str
    images: tuple[Any, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation, with a mark for each image."""
        turns = read_turns([{"role": "user", "content": self.text}])
        if turns[0].images != len(self.images):
            turns = read_turns([{"role": "user", "content": literal(self.text)}])
        (turn,) = place_images(turns, len(self.images))
        return [{"role": turn.role, "content": with_marks(turn.texts)}]


class Backend(Protocol):
    """A model that is ready to answer."""

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """An answer to each of `prompts`, computed together. Raises BadRecord or ValueError if one is unusable."""

    def score(self, prompt: Prompt, answer: str) -> tuple[float, bool]:
        """The log-probability of `answer` (nats), and whether each of its tokens is the likeliest."""


@contextmanager
def opened(folder: Path, overrides: Sequence[str], device: str | None) -> Iterator[Backend]:
    """The model in `folder`: a run, one of its checkpoints, or an export, which `overrides` do not change. `device`: of
    an export; by default a GPU if there is one. Raises ConfigError."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes != 1:
        raise problem("number of processes", processes, "1", "python -m lmms_eval, without torchrun or accelerate")
    if (folder / "modeling_nvlm.py").is_file():
        if overrides:
            raise problem("model_args", ", ".join(overrides), "only checkpoint=DIR for an export", "leave them out")
        yield Exported(folder, device)
        return
    config = read_config(folder, overrides)
    if config.parallel.replica != 1:
        raise problem("layout", f"{config.parallel.replica} processes", "one", "leave parallel.* out")
    from nvlm.generate.generator import opened as opened_run

    with opened_run(config) as generator:
        yield Trained(generator)


class Trained:
    """A run's checkpoint."""

    def __init__(self, generator) -> None:
        self.generator = generator

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """As `Backend.answers`."""
        positions = self.generator.config.llm.positions
        limited = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, positions // 2))  # room for the prompt
        return self.generator.generate([self._conversation(prompt) for prompt in prompts], limited)

    def score(self, prompt: Prompt, answer: str) -> tuple[float, bool]:
        """As `Backend.score`."""
        from nvlm.data.text.chat import answer_ids
        from nvlm.generate.generator import prompt_of, prompt_processor
        from nvlm.generate.score import score

        room = self.generator.config.llm.positions // 2
        processor = prompt_processor(self.generator.config, Sampling(max_new_tokens=room))
        *_, sample = prompt_of(0, self._conversation(prompt), processor)
        ids = answer_ids(answer, processor.tokenizer)
        if not ids:
            return 0.0, True
        found = score(self.generator, sample, ids)
        return found.log_probability, found.greedy

    @staticmethod
    def _conversation(prompt: Prompt):
        from nvlm.generate.generator import Conversation

        return Conversation(prompt.messages, prompt.images)


class Exported:
    """A folder written by launch/export_hf.py, read by the code that it brings (nvlm/export/modeling_nvlm.py)."""

    def __init__(self, folder: Path, device: str | None) -> None:
        from nvlm.export.modeling_nvlm import NVLM
        from nvlm.processes.device import device as own_device

        self.model = NVLM.from_folder(folder, device=device or str(own_device()))

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """As `Backend.answers`, one after another and greedy."""
        if sampling.temperature:
            raise problem(
                "temperature", sampling.temperature, "0 for an export, which answers greedily", "temperature=0"
            )
        return [self.model.answer(one.messages, one.images, sampling.max_new_tokens) for one in prompts]

    def score(self, prompt: Prompt, answer: str) -> tuple[float, bool]:
        """As `Backend.score`."""
        import torch

        from nvlm.export.modeling_nvlm import Piece

        asked, ids = self.model.inputs(prompt.messages, prompt.images, reply=True), self.model.encode(answer)
        if not ids:
            return 0.0, True
        followed = replace(asked, stream=[*asked.stream, Piece(ids[:-1], len(prompt.images) - 1)])
        logs_NV = self.model.logits(followed)[-len(ids) :].log_softmax(-1)
        ids_N = torch.tensor(ids, device=logs_NV.device)
        greedy = bool((logs_NV.argmax(-1) == ids_N).all())
        return float(logs_NV.gather(1, ids_N[:, None]).sum()), greedy
