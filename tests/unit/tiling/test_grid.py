"""Grid choice compared with published vectors and with a plain second implementation of the published rule."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nvlm.tiling import TilePlan, choose_grid, fit_max_tiles, plan_tiles, ratios, tokens_per_tile
from nvlm.tiling.grid import DynamicTiling

SIX = {
    (1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (2, 1), (2, 2), (2, 3),
    (3, 1), (3, 2), (4, 1), (5, 1), (6, 1),
}  # fmt: skip

# (width, height): grid at 6 tiles, grid at 12 tiles
VECTORS = {
    (448, 448): ((1, 1), (1, 1)),
    (633, 633): ((1, 1), (1, 1)),
    (634, 634): ((2, 2), (2, 2)),
    (640, 480): ((3, 2), (4, 3)),
    (1024, 768): ((3, 2), (4, 3)),
    (1920, 1080): ((2, 1), (4, 2)),
    (1080, 1920): ((1, 2), (2, 4)),
    (1654, 2339): ((2, 3), (2, 3)),
    (1000, 400): ((3, 1), (5, 2)),
    (400, 160): ((2, 1), (5, 2)),
    (3000, 500): ((6, 1), (6, 1)),
    (300, 2000): ((1, 6), (1, 7)),
}


def reference_grid(width, height, max_num, size=448):
    """The published rule: a Python set of pairs, sorted by product; for a large image the later of two tied pairs
    wins."""
    pairs = set()
    for n in range(1, max_num + 1):
        for i in range(1, n + 1):
            for j in range(1, n + 1):
                if 1 <= i * j <= max_num:
                    pairs.add((i, j))
    wanted = width / height
    best_diff, best = float("inf"), (1, 1)
    for pair in sorted(pairs, key=lambda p: p[0] * p[1]):
        diff = abs(wanted - pair[0] / pair[1])
        if diff < best_diff:
            best_diff, best = diff, pair
        elif diff == best_diff:
            if width * height > 0.5 * size * size * pair[0] * pair[1]:
                best = pair
    return best


def test_ratios_up_to_6_are_the_papers_14():
    assert len(ratios(6)) == 14
    assert set(ratios(6)) == SIX


def test_there_are_35_ratios_up_to_12():
    assert len(ratios(12)) == len(set(ratios(12))) == 35
    assert all(cols * rows <= 12 for cols, rows in ratios(12))


@pytest.mark.parametrize("max_tiles", [1, 6, 12, 40])
def test_ratios_come_by_tile_count(max_tiles):
    counts = [cols * rows for cols, rows in ratios(max_tiles)]
    assert counts == sorted(counts)


def test_grids_of_equal_count_are_never_neighbours_in_aspect():
    # Why the order among equal counts cannot change a choice.
    for max_tiles in range(1, 65):
        counts: dict[Fraction, set[int]] = {}
        for cols, rows in ratios(max_tiles):
            counts.setdefault(Fraction(cols, rows), set()).add(cols * rows)
        in_order = [counts[aspect] for aspect in sorted(counts)]
        assert all(a.isdisjoint(b) for a, b in zip(in_order, in_order[1:], strict=False))


@pytest.mark.parametrize("size", VECTORS)
def test_published_vectors(size):
    assert (choose_grid(*size, max_tiles=6), choose_grid(*size, max_tiles=12)) == VECTORS[size]


@settings(max_examples=3000, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(1, 16), st.sampled_from([28, 336, 448]))
@example(1250, 500, 6, 448)
@example(5, 12, 6, 448)
def test_equals_the_published_rule(width, height, max_tiles, tile_size):
    assert choose_grid(width, height, max_tiles, tile_size) == reference_grid(width, height, max_tiles, tile_size)


@settings(max_examples=1000, deadline=None)
@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
def test_equals_the_published_rule_on_ties(scale, shrink, a, b):
    # Sizes in small whole proportions, where exact ties are common, around the area at which the tie turns.
    width, height = a * scale, b * scale + (shrink == 1)
    for max_tiles in (6, 12):
        assert choose_grid(width, height, max_tiles) == reference_grid(width, height, max_tiles)


def test_area_decides_a_tie():
    # 2.5 lies midway between 2:1 and 3:1; three tiles need more than 1.5 * 448^2 = 301,056 px.
    assert choose_grid(865, 346) == (2, 1)
    assert choose_grid(870, 348) == (3, 1)


def test_a_tie_of_fractions_need_not_be_a_tie_of_floats():
    # 5:12 lies midway between 1:3 and 1:2. In floats 1:2 is nearer, so no area makes it three tiles.
    assert Fraction(1, 2) - Fraction(5, 12) == Fraction(5, 12) - Fraction(1, 3)
    large = choose_grid(5000, 12000)
    assert large == reference_grid(5000, 12000, 6)
    assert large == choose_grid(5, 12)


def test_plan_of_a_wide_image():
    plan = plan_tiles(640, 480)
    assert plan == TilePlan(3, 2, 448)
    assert (plan.num_regular, plan.num_tiles, plan.width, plan.height) == (6, 7, 1344, 896)
    assert plan.boxes() == (
        (0, 0, 448, 448),
        (448, 0, 896, 448),
        (896, 0, 1344, 448),
        (0, 448, 448, 896),
        (448, 448, 896, 896),
        (896, 448, 1344, 896),
    )


def test_plan_of_a_1x1_image_has_the_thumbnail_alone():
    plan = plan_tiles(100, 100)
    assert (plan.num_regular, plan.num_tiles, plan.width, plan.height) == (0, 1, 448, 448)
    assert plan.boxes() == ()


def test_tile_size_reaches_the_plan():
    assert plan_tiles(64, 64, 6, 28) == TilePlan(2, 2, 28)
    assert plan_tiles(64, 64, 6, 56) == TilePlan(1, 1, 56)
    assert TilePlan(1, 2, 28).boxes() == ((0, 0, 28, 28), (0, 28, 28, 56))


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ((0, 5), "width"),
        ((5, -1), "height"),
        ((5, 5, 0), "max_tiles"),
        ((5, 5, 6, 0), "tile_size"),
    ],
)
def test_sizes_must_be_positive(args, name):
    with pytest.raises(ValueError, match=rf"{name}, got .* expected .* fix: "):
        plan_tiles(*args)


def test_fit_keeps_the_limit_when_there_is_room():
    sizes = [(640, 480), (100, 100)]
    plans = fit_max_tiles(sizes, 8 * 256, lambda plan: plan.num_tiles * 256)
    assert plans == (TilePlan(3, 2), TilePlan(1, 1))
    # 100x100 px is more than half of 2x2 tiles of 56 px.
    assert fit_max_tiles([(100, 100)], 5, lambda plan: plan.num_tiles, 4, DynamicTiling(56)) == (TilePlan(2, 2, 56),)


def test_fit_steps_the_limit_down_for_every_image():
    sizes = [(640, 480), (640, 480)]

    def grids(room, max_tiles):
        plans = fit_max_tiles(sizes, room, lambda plan: plan.num_tiles, max_tiles)
        return {(plan.cols, plan.rows) for plan in plans}

    assert grids(26, 12) == {(4, 3)}
    assert grids(25, 12) == {(3, 2)}  # 8 tiles: 3x2 already
    assert grids(13, 12) == {(1, 1)}  # 4 tiles: nearest to 4:3 is 1x1
    assert grids(2, 12) == {(1, 1)}


def test_fit_takes_each_rung_and_no_other():
    tried = []

    def never(plan):
        tried.append(plan.cols)
        return 10**6

    def rungs(max_tiles):
        tried.clear()
        with pytest.raises(ValueError):
            fit_max_tiles([(10**6, 1)], 5, never, max_tiles)  # so wide that every limit is one row
        return tried[:]

    assert rungs(12) == [12, 8, 6, 4, 2, 1]
    assert rungs(6) == [6, 4, 2, 1]
    assert rungs(7) == [7, 6, 4, 2, 1]
    assert rungs(1) == [1]


def test_fit_names_both_counts_when_nothing_fits():
    with pytest.raises(ValueError, match=r"2 images that need 512 tokens .* at most 511 available, fix: "):
        fit_max_tiles([(640, 480), (100, 100)], 511, lambda plan: plan.num_tiles * 256)


def test_fit_of_no_images_is_empty():
    assert fit_max_tiles([], 0, lambda plan: plan.num_tiles) == ()


def test_grid_tags_and_budget_load_no_torch():
    code = (
        "import sys, nvlm.tiling, nvlm.tiling.grid, nvlm.tiling.tags, nvlm.tiling.placement\n"
        "assert 'torch' not in sys.modules and 'PIL' not in sys.modules\n"
        "from nvlm.tiling import normalize, tile_image\n"
        "assert 'torch' in sys.modules and callable(normalize) and callable(tile_image)\n"
        "assert not [name for name in sys.modules if name.startswith('megatron')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    import nvlm.tiling

    with pytest.raises(AttributeError, match="no_such_name"):
        nvlm.tiling.no_such_name  # noqa: B018
    for name in nvlm.tiling.__all__:
        assert getattr(nvlm.tiling, name) is not None


def test_a_tile_is_256_tokens():
    assert tokens_per_tile() == 256
    assert tokens_per_tile(448, 14, 1) == 1024
    assert tokens_per_tile(56, 14, 2) == 4


def test_a_tile_of_siglip_is_729_patches():
    """384 px in patches of 14: 27 and 6 px that fill none; 28 with VILA's zeros, 13 and 14 where LLaVA-NeXT pools."""
    assert tokens_per_tile(384, 14, 1) == 27**2
    assert tokens_per_tile(384, 14, 2, "concat", pads=True) == 196
    assert tokens_per_tile(384, 14, 3) == 81
    assert tokens_per_tile(448, 14, 3, "concat", pads=True) == 121
    assert [tokens_per_tile(384, 14, 2, pool) for pool in ("average", "max", "bilinear")] == [169, 169, 196]
    assert [tokens_per_tile(336, 14, 2, pool) for pool in ("average", "max", "bilinear", "concat")] == [144] * 4


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ((384, 14, 2), "got 27 patches per side, expected a multiple of 2"),
        ((448, 14, 3), "got 32 patches per side, expected a multiple of 3"),
        ((448, 14, 33, "average"), "got blocks of 33 x 33, expected at most 32 patches"),
    ],
)
def test_blocks_must_fit_the_grid(sizes, complaint):
    with pytest.raises(ValueError, match=complaint):
        tokens_per_tile(*sizes)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ((0, 14, 2), "tile_size, got 0"),
        ((448, 0, 2), "patch_size, got 0"),
        ((448, 14, -2), "downsample, got -2"),
    ],
)
def test_sizes_of_a_tile_must_be_positive(sizes, complaint):
    with pytest.raises(ValueError, match=f"{complaint}, expected a positive number, fix: "):
        tokens_per_tile(*sizes)
