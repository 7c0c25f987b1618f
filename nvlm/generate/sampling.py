"""Sampling parameters. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nvlm.config.values import problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Up to `max_new_tokens` tokens; temperature 0 takes the likeliest token.

    Otherwise tokens are drawn from the nucleus, the smallest set of top tokens whose probabilities reach `top_p`.
    Row r of a batch draws with the seed `seed` + r, whatever the other rows are. Raises ConfigError.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise problem("max_new_tokens", self.max_new_tokens, "at least 1", "max_new_tokens=256")
        if not 0 <= self.temperature < math.inf:
            raise problem("temperature", self.temperature, "0 (the likeliest token) or above", "temperature=0.7")
        if not 0 < self.top_p <= 1:
            raise problem("top_p", self.top_p, "above 0 and at most 1", "top_p=0.9")
        if not 0 <= self.seed < 2**62:
            raise problem("seed", self.seed, "0 or above", "seed=0")

    def prompt_room(self, positions: int) -> int:
        """Tokens left for a prompt in a model of `positions` positions. Raises ConfigError if there are none."""
        if self.max_new_tokens >= positions:
            fix = f"max_new_tokens={max(1, positions // 2)}"
            raise problem("max_new_tokens", self.max_new_tokens, f"fewer than the model's {positions} positions", fix)
        return positions - self.max_new_tokens


GREEDY = Sampling()
