"""Greedy answers to encoded prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nvlm.arch.pipeline import Pipeline
from nvlm.data.batch import Sample
from nvlm.data.pack import collate
from nvlm.data.text.tokenizer import ChatTokenizer
from nvlm.generate.decode import continue_rows
from nvlm.generate.sampling import Sampling
from nvlm.generate.text import words
from nvlm.vision.prepass import BalancedVision


def answer(
    pipeline: Pipeline,
    vision: BalancedVision,
    prompts: Sequence[Sample],
    tokenizer: ChatTokenizer,
    max_new_tokens: int,
    device: torch.device,
    tile_size: int,
    multiple: int,
) -> list[str]:
    """The model's greedy answer to each prompt, up to an end token or `max_new_tokens`."""
    (batch,) = vision.encode([collate([[prompt] for prompt in prompts], tile_size, multiple).to(device)])
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return [words(ids, tokenizer) for ids in continue_rows(pipeline, batch, sampling, tokenizer.ends, multiple)]
