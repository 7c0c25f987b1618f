"""Tile tags, as the literal strings given to the tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm.tiling import TAG_STYLES, TilePlan, ratios, tile_tags

GLOBAL = "<tile_global_thumbnail>"


def test_known_styles():
    assert TAG_STYLES == ("none", "1d", "2d_grid", "2d_bbox")


def test_none_is_an_empty_string_per_tile():
    assert tile_tags(TilePlan(2, 1), "none") == ("", "", "")


def test_1d():
    assert tile_tags(TilePlan(2, 2), "1d") == ("<tile_1>", "<tile_2>", "<tile_3>", "<tile_4>", GLOBAL)


def test_1d_pads_to_the_digits_of_max_tiles():
    assert tile_tags(TilePlan(2, 1), "1d", max_tiles=12) == ("<tile_01>", "<tile_02>", GLOBAL)
    assert tile_tags(TilePlan(4, 3), "1d", max_tiles=12)[8:] == (
        "<tile_09>", "<tile_10>", "<tile_11>", "<tile_12>", GLOBAL,
    )  # fmt: skip
    assert tile_tags(TilePlan(2, 1), "1d", max_tiles=9)[0] == "<tile_1>"
    assert tile_tags(TilePlan(2, 1), "1d", max_tiles=10)[0] == "<tile_01>"
    assert tile_tags(TilePlan(2, 1), "1d", max_tiles=100)[0] == "<tile_001>"


def test_1d_refuses_more_tiles_than_it_can_number():
    with pytest.raises(ValueError, match="got 12, expected at most max_tiles = 6"):
        tile_tags(TilePlan(4, 3), "1d", max_tiles=6)


def test_2d_grid_is_column_then_row():
    assert tile_tags(TilePlan(3, 2), "2d_grid") == (
        "<tile_x0_y0>", "<tile_x1_y0>", "<tile_x2_y0>",
        "<tile_x0_y1>", "<tile_x1_y1>", "<tile_x2_y1>",
        GLOBAL,
    )  # fmt: skip


def test_2d_bbox():
    assert tile_tags(TilePlan(3, 2), "2d_bbox") == (
        "<box> (0, 0), (333, 500) </box>",
        "<box> (333, 0), (666, 500) </box>",
        "<box> (666, 0), (999, 500) </box>",
        "<box> (0, 500), (333, 999) </box>",
        "<box> (333, 500), (666, 999) </box>",
        "<box> (666, 500), (999, 999) </box>",
        "<box> (0, 0), (999, 999) </box>",
    )
    # 999 * k / 4 = 249.75, 499.5, 749.25
    assert tile_tags(TilePlan(1, 4), "2d_bbox")[1:3] == (
        "<box> (0, 250), (999, 500) </box>",
        "<box> (0, 500), (999, 749) </box>",
    )


@pytest.mark.parametrize(
    ("style", "tag"),
    [("none", ""), ("1d", "<g0>"), ("2d_grid", "<g0>"), ("2d_bbox", "<box> (0, 0), (999, 999) </box>")],
)
def test_a_1x1_image_has_the_thumbnails_tag_alone(style, tag):
    assert tile_tags(TilePlan(1, 1), style, thumbnail="<g0>") == (tag,)


def test_the_thumbnail_string_is_the_callers():
    for style in ("1d", "2d_grid"):
        assert tile_tags(TilePlan(1, 2), style, thumbnail="<tile_global>")[-1] == "<tile_global>"


@given(st.sampled_from(ratios(12)), st.sampled_from(TAG_STYLES))
def test_one_tag_per_tile_and_all_different(grid, style):
    plan = TilePlan(*grid)
    tags = tile_tags(plan, style, max_tiles=12)
    assert len(tags) == plan.num_tiles
    if style != "none" and plan.num_regular:
        assert len(set(tags)) == plan.num_tiles


def test_an_unknown_style_lists_the_known_ones():
    with pytest.raises(ValueError, match="got '3d', expected one of none, 1d, 2d_grid, 2d_bbox"):
        tile_tags(TilePlan(1, 1), "3d")
