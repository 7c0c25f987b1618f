"""Placements of the three architectures: what goes where, with how many tokens."""

from __future__ import annotations

import pytest

from nvlm.arch.registry import placement_rule
from nvlm.data.batch import ROW_END
from nvlm.data.mapped import Rows
from nvlm.tiling.grid import TilePlan
from nvlm.tiling.placement import Piece, Placement, TileMap, TileTokens, Words

TAGS = [(1,), (2, 3), (4, 5, 6)]
TOKENS = [16, 9, 4]


def told(pieces):
    """Each piece as (tile, ids or number of tokens, own tile only)."""
    return [(p.tile, p.content.ids if isinstance(p.content, Words) else p.length, p.own_tile) for p in pieces]


@pytest.mark.parametrize(
    ("arch", "stream", "cross", "lengths", "from_tiles"),
    [
        (
            "decoder",
            [(0, (1,)), (0, 16), (1, (2, 3)), (1, 9), (2, (4, 5, 6)), (2, 4)],
            [],
            (35, 0),
            (29, 0),
        ),
        ("xattn", [(0, (1,)), (1, (2, 3)), (2, (4, 5, 6))], [(0, 16), (1, 9), (2, 4)], (6, 29), (0, 29)),
        ("hybrid", [(2, (4, 5, 6)), (2, 4)], [(0, (1,)), (0, 16), (1, (2, 3)), (1, 9)], (7, 28), (4, 25)),
    ],
)
def test_tiles_of_any_number_of_tokens_are_placed(arch, stream, cross, lengths, from_tiles):
    placed = placement_rule(arch)(TilePlan(2, 1, 28), TAGS, TOKENS)
    bound = arch == "xattn"  # its tags see their own tile alone
    assert told(placed.stream) == [(*piece, bound) for piece in stream]
    assert told(placed.cross) == [(*piece, False) for piece in cross]
    assert placed.tile_tokens == (16, 9, 4)
    assert placed.lengths == lengths and placed.from_tiles == from_tiles


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_a_one_tile_image_is_its_thumbnail(arch):
    placed = placement_rule(arch)(TilePlan(1, 1, 28), [(7, 8)], [5])
    assert sum(placed.lengths) == 2 + 5 and sum(placed.from_tiles) == 5
    assert placed.from_tiles == ((0, 5) if arch == "xattn" else (5, 0))


def test_a_piece_that_disagrees_with_its_tile_is_refused():
    with pytest.raises(ValueError, match="a piece of tile 1, got 9 of its tokens, expected all 4"):
        Placement((9, 4), (Piece(0, TileTokens(9)), Piece(1, TileTokens(9))), ())


def test_a_tile_without_a_token_has_no_piece():
    with pytest.raises(ValueError, match="tokens of a tile, got 0"):
        TileTokens(0)


@pytest.mark.parametrize(
    "content",
    [
        Words((1, 2, 3)),
        TileTokens(5),
        TileMap((0, 1, 2, 3), across=2, rows=2, columns=3),
        TileMap((0, 1), across=2, rows=2, columns=3, row_ends=True, window=(0, 1, 2, 5)),
    ],
)
def test_tile_tokens_are_counted_without_words_and_row_ends(content):
    rows = Rows(starts=[0, 6, 12, 18, 24], first_mixed=24).of(content, 0, 0)
    assert (
        Piece(0, content).from_tiles
        == int((rows != ROW_END).sum())
        == len(rows.unique()) - int((rows == ROW_END).any())
    )
    assert len(rows) == (0 if isinstance(content, Words) else content.length)
