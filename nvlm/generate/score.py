"""The probability of a given answer: the model reads prompt and answer in one forward pass.

Shapes: N tokens of the answer, V vocabulary; batches have one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nvlm.arch.base import VisionLanguageModel
from nvlm.attention.cache import generating
from nvlm.data.batch import IGNORE, Batch, Sample
from nvlm.data.pack import collate
from nvlm.generate.generator import Generator
from nvlm.processes import device


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer's log-probability (nats), and whether each of its tokens is the likeliest."""

    log_probability: float
    greedy: bool


def score(generator: Generator, prompt: Sample, answer: Sequence[int]) -> Scored:
    """The score of the tokens `answer` in reply to `prompt`. A collective call, for one pipeline stage."""
    (model,) = generator.pipeline.parts
    row = collate([[followed(prompt, answer)]], generator.config.vision.tile_size, generator.config.row_multiple)
    (batch,) = generator.vision.encode([row.to(generator.device)])
    with generating([model]), device.untranslated():
        logs_NV = log_probabilities(model, batch, columns_of(prompt, answer))
    ids_N = torch.tensor(answer, device=logs_NV.device)
    total = float(logs_NV.gather(1, ids_N[:, None]).sum())
    return Scored(total, bool((logs_NV.argmax(-1) == ids_N).all()))


def followed(prompt: Sample, answer: Sequence[int]) -> Sample:
    """`prompt` followed by the answer, without its last token, which predicts nothing. No labels."""
    more = torch.tensor(answer[:-1], dtype=torch.long)

    def longer(values: Tensor) -> Tensor:
        return torch.cat((values, values[-1:].expand(len(more))))

    tokens = torch.cat((prompt.tokens, more))
    return replace(
        prompt,
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE),
        image=longer(prompt.image),
        tile=longer(prompt.tile),
    )


def columns_of(prompt: Sample, answer: Sequence[int]) -> range:
    """The columns of `followed(prompt, answer)` that predict the answer's tokens."""
    return range(len(prompt.tokens) - 1, len(prompt.tokens) - 1 + len(answer))


def log_probabilities(model: VisionLanguageModel, batch: Batch, columns: range) -> Tensor:
    """[N, V] at the `columns` of a row, in fp32. Within `generating`."""
    hidden_SBH = model.hidden(batch)
    last_N1 = torch.tensor([[column] for column in columns], device=hidden_SBH.device)
    return torch.cat([model.last_logits(hidden_SBH, last_1) for last_1 in last_N1]).float().log_softmax(-1)
