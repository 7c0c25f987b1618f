"""Greedy answers to batches of prompts."""

from __future__ import annotations

from nvlm.data.batch import Batch
from nvlm.data.text.tokenizer import ChatTokenizer
from nvlm.generate.decode import continue_rows
from nvlm.generate.generator import Generator
from nvlm.generate.sampling import Sampling
from nvlm.generate.text import words


def answer(model: Generator, batch: Batch, tokenizer: ChatTokenizer, max_new_tokens: int) -> list[str]:
    """The model's greedy answer to each row of `batch`, up to an end token or `max_new_tokens`. A collective call of
    a replica's ranks."""
    vision = model.vision.within_replica()  # replicas may have different numbers of batches
    (batch,) = vision.encode([batch.to(model.device)])
    sampling, multiple = Sampling(max_new_tokens=max_new_tokens), model.config.row_multiple
    return [words(ids, tokenizer) for ids in continue_rows(model.pipeline, batch, sampling, tokenizer.ends, multiple)]
