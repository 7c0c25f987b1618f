"""Batches whose placeholders, tiles or features do not match are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nvlm.data.batch import IMAGE
from tests.models import (
    batch_of,
)
from tests.parity.twins import (
    ARCHITECTURES,
    K,
    twins_with,
)
from tests.stories import ONE, ONE_TILE, TEXT

pytestmark = pytest.mark.usefixtures("twins")


def one_less(tokens: Tensor) -> Tensor:
    """`tokens` with a word instead of the last placeholder."""
    tokens = tokens.clone()
    tokens[tuple((tokens == IMAGE).nonzero()[-1])] = 5
    return tokens


def one_more(tokens: Tensor) -> Tensor:
    """`tokens` with a placeholder instead of the first word."""
    tokens = tokens.clone()
    tokens[tuple((tokens != IMAGE).nonzero()[0])] = IMAGE
    return tokens


def moved(tokens: Tensor) -> Tensor:
    """The same number of placeholders, but one of the last sample's is in the first."""
    return one_more(one_less(tokens))


# Sample `one` has an image of 2 x 2 tiles and the thumbnail, sample `one-tile` one of one tile.
CORRUPTIONS = [
    ("decoder", "tokens", one_less, "text stream of sample one-tile", K - 1, K),
    ("decoder", "tokens", one_more, "text stream of sample one", 5 * K + 1, 5 * K),
    ("decoder", "tokens", moved, "text stream of sample one", 5 * K + 1, 5 * K),
    ("xattn", "tokens", one_more, "text stream of sample one", 1, 0),
    ("xattn", "cross_tokens", one_less, "cross-attended keys of sample one-tile", K - 1, K),
    ("hybrid", "tokens", one_less, "text stream of sample one-tile", K - 1, K),
    ("hybrid", "cross_tokens", one_more, "cross-attended keys of sample one", 4 * K + 1, 4 * K),
]


def refusal(arch, field, corrupt) -> str:
    twins = twins_with((f"arch={arch}",))
    batch = batch_of([[ONE, TEXT], [ONE_TILE]], twins)
    twins.model(batch)
    with pytest.raises(ValueError) as error:
        twins.model(replace(batch, **{field: corrupt(getattr(batch, field))}))
    return str(error.value)


@pytest.mark.parametrize(("arch", "field", "corrupt", "where", "got", "expected"), CORRUPTIONS)
def test_placeholders_that_do_not_match_are_refused_by_sample(arch, field, corrupt, where, got, expected):
    message = refusal(arch, field, corrupt)
    assert message.startswith(f"{where}: got {got} image placeholders, expected {expected} "), message


@pytest.mark.parametrize(
    ("arch", "field", "corrupt", "says"),
    [
        (
            "decoder",
            "stream_rows",
            lambda rows: rows[1:],
            f"text stream: got {6 * K - 1} tile tokens, expected {6 * K}",
        ),
        (
            "xattn",
            "cross_rows",
            lambda rows: rows[1:],
            f"cross-attended keys: got {6 * K - 1} tile tokens, expected {6 * K}",
        ),
        (
            "hybrid",
            "stream_rows",
            lambda rows: rows.repeat(2),
            f"text stream: got {4 * K} tile tokens, expected {2 * K}",
        ),
    ],
)
def test_lost_or_doubled_tiles_are_refused(arch, field, corrupt, says):
    assert refusal(arch, field, corrupt).startswith(says)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [K - 1, K + 1])
def test_features_of_another_size_are_refused(arch, tokens):
    """Otherwise too many tokens per tile would silently fill the placeholders with the wrong ones."""
    twins = twins_with((f"arch={arch}",))
    batch = batch_of([[ONE]], twins)
    count, channels = len(batch.pixels), batch.features.shape[1]
    says = rf"features of samples \[one\]: got {count * tokens} tokens, expected {count * K} for {count} tiles"
    with pytest.raises(ValueError, match=says):
        twins.model(batch.with_features(torch.randn(count * tokens, channels)))
