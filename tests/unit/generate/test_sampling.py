"""Choosing a token from logits, on literal numbers, and text that arrives in pieces."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nvlm.config.values import ConfigError
from nvlm.data.text.tokenizer import ChatTokenizer, load_tokenizer
from nvlm.generate.choose import Chooser, draw, nucleus
from nvlm.generate.sampling import Sampling
from nvlm.generate.text import TextStream, words

CHANCES = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.71, {1, 2, 3}),
        (0.95, {0, 1, 2, 3}),
        (1e-9, {1}),
    ],
)
def test_the_nucleus_is_the_fewest_likeliest_tokens_that_reach_top_p(top_p, kept):
    left = nucleus(CHANCES, top_p)[0]
    assert set(left.nonzero()[:, 0].tolist()) == kept
    assert all(left[i] == CHANCES[0, i] for i in kept)


def test_of_equal_chances_no_more_are_kept_than_needed():
    assert int((nucleus(torch.full((1, 8), 0.125), 0.5) > 0).sum()) == 4


def drawn(temperature: float, top_p: float, count: int = 20_000) -> torch.Tensor:
    """Share of each token among `count` evenly spaced draws."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids = draw(CHANCES.log().expand(count, -1), uniform, temperature, top_p)
    return torch.bincount(ids, minlength=4).double() / count


def test_draws_follow_the_distribution():
    torch.testing.assert_close(drawn(1.0, 1.0), CHANCES[0], atol=1e-3, rtol=0)
    within = torch.tensor([0, 4, 2, 3], dtype=torch.float64) / 9
    torch.testing.assert_close(drawn(1.0, 0.85), within, atol=1e-3, rtol=0)


def test_temperature_sharpens_and_flattens():
    for temperature in (0.5, 2.0):
        expected = CHANCES[0] ** (1 / temperature)
        torch.testing.assert_close(drawn(temperature, 1.0), expected / expected.sum(), atol=1e-3, rtol=0)
    assert drawn(1e-300, 1.0)[1] == 1
    assert draw(CHANCES.log(), torch.tensor([1 - 2**-24], dtype=torch.float64), 1.0, 0.35) == 1


def test_a_row_draws_what_it_would_draw_alone_and_the_seed_decides():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))

    def sequence(seed: int, rows: list[int], count: int = 3) -> list[list[int]]:
        choose = Chooser(Sampling(temperature=1.0, seed=seed), count)
        return [choose(logits[rows], rows).tolist() for _ in range(6)]

    together = sequence(5, [0, 1, 2])
    assert together == sequence(5, [0, 1, 2])
    assert together != sequence(6, [0, 1, 2])
    assert [step[1] for step in together] == [step[0] for step in sequence(5, [1])]
    alone = Chooser(Sampling(temperature=1.0, seed=6), 1)
    assert [step[1] for step in together] == [int(alone(logits[1:2], [0])) for _ in range(6)]


def test_temperature_zero_takes_the_likeliest():
    assert Chooser(Sampling(), 1)(CHANCES.log(), [0]).tolist() == [1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.01}, "top_p: got 1.01"),
        ({"top_p": float("nan")}, "top_p: got nan"),
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**wrong)


def pieces_of(tokenizer: ChatTokenizer, ids) -> tuple[list[str], str]:
    """The text returned after each id, and at the end."""
    stream = TextStream(tokenizer)
    return [stream.push(i) for i in ids], stream.flush()


def test_a_character_is_told_when_all_its_bytes_have_come():
    tokenizer = load_tokenizer("tiny")
    text = "naïve 漢字 🙂, done"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # several tokens a character
    pieces, rest = pieces_of(tokenizer, [*ids, tokenizer.end])
    assert "".join(pieces) == text and rest == ""
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert "🙂" in [piece.strip() for piece in pieces]
    assert words([*ids, tokenizer.end], tokenizer) == words(ids, tokenizer) == text


def test_broken_bytes_are_told_at_the_end_or_with_what_follows():
    tokenizer = load_tokenizer("tiny")
    cut = tokenizer.encode("a漢")[:-1]
    pieces, rest = pieces_of(tokenizer, cut)
    assert "".join(pieces) == "a" and set(rest) == {"\N{REPLACEMENT CHARACTER}"}
    ids = [*cut, *tokenizer.encode("b")]
    pieces, rest = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) and rest == ""


def test_a_decoder_that_strips_the_first_space_keeps_the_others():
    """Llama's tokenizer, like Yi's: each word's token starts with a space, and the text's first space is dropped."""
    vocabulary = {"▁one": 0, "▁two": 1, "▁three": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    pieces, rest = pieces_of(ChatTokenizer(tokenizer, 9), [0, 1, 2])
    assert (pieces, rest) == (["one", " two", " three"], "")
