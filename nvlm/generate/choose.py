"""Chooses tokens from logits. Shapes: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvlm.generate.sampling import Sampling


def nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """`probabilities_BV` with zeros outside the nucleus, the smallest set of top tokens that reaches `top_p`."""
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    kept_BV = torch.zeros_like(order_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV < top_p)
    return probabilities_BV * kept_BV


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Ids [B], drawn by inverting the cumulative probabilities at `uniform_B` [B], in [0, 1)."""
    scores_BV = logits_BV.double()
    scores_BV = scores_BV - scores_BV.amax(-1, keepdim=True)  # so that no temperature, however small, overflows
    chances_BV = torch.softmax(scores_BV / temperature, dim=-1)
    if top_p < 1:
        chances_BV = nucleus(chances_BV, top_p)
    ends_BV = chances_BV.cumsum(-1)
    return torch.searchsorted(ends_BV, uniform_B[:, None] * ends_BV[:, -1:], right=True)[:, 0]


class Chooser:
    """Chooses tokens for the rows of a batch, each with its own random generator."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self.sampling = sampling
        # On the CPU, so that a seed gives the same numbers on any device and rank.
        self.generators = [torch.Generator().manual_seed(sampling.seed + row) for row in range(rows)]

    def __call__(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """Ids [B] for the rows numbered `rows`."""
        if self.sampling.temperature == 0:
            return logits_BV.argmax(-1)
        # Drawn in single precision, so that its product with a sum of probabilities stays below that sum.
        uniform_B = torch.cat([torch.rand(1, generator=self.generators[row]) for row in rows])
        uniform_B = uniform_B.double().to(logits_BV.device)
        return draw(logits_BV, uniform_B, self.sampling.temperature, self.sampling.top_p)
