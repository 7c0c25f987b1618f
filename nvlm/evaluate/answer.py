"""Greedy answers. Each new token recomputes the whole prompt: right for a few short answers, slow for long ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nvlm.arch.stages import Stages, next_tokens
from nvlm.batch import IGNORE, Sample
from nvlm.data.pack import collate
from nvlm.data.tokenizer import ChatTokenizer
from nvlm.vision.balance import BalancedVision


def answer(
    stages: Stages,
    vision: BalancedVision,
    prompts: Sequence[Sample],
    tokenizer: ChatTokenizer,
    max_new_tokens: int,
    device: torch.device,
    tile_size: int,
    multiple: int,
) -> list[str]:
    """The model's greedy continuation of each prompt, up to its `<|im_end|>` or `max_new_tokens`."""
    for part in stages.parts:
        part.eval()
    samples, generated = list(prompts), [[] for _ in prompts]
    encoded = None
    for _ in range(max_new_tokens):
        batch = collate([[sample] for sample in samples], tile_size, multiple).to(device)
        encoded = encoded or vision.encode([batch])[0]
        batch = batch.with_some_features(encoded.features, encoded.feature_rows)
        last = torch.tensor([sample.tokens.numel() - 1 for sample in samples], device=device)
        for row, token in enumerate(next_tokens(stages, batch, last).tolist()):
            if not generated[row] or generated[row][-1] != tokenizer.im_end:
                generated[row].append(token)
            samples[row] = _append(samples[row], token)
        if all(ids[-1] == tokenizer.im_end for ids in generated):
            break
    for part in stages.parts:
        part.train()
    return [tokenizer.decode(ids) for ids in generated]


def _append(sample: Sample, token: int) -> Sample:
    def more(values: Tensor, value: int) -> Tensor:
        return torch.cat((values, values.new_tensor([value])))

    return replace(
        sample,
        tokens=more(sample.tokens, token),
        labels=more(sample.labels, IGNORE),
        image=more(sample.image, int(sample.image[-1])),
        tile=more(sample.tile, int(sample.tile[-1])),
    )
