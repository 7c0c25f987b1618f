"""AnyRes and crops: the counts that the papers' code yields, transformers' functions, and what each token shows."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvlm.arch.registry import placement_rule
from nvlm.data.batch import ROW_END
from nvlm.data.mapped import Rows
from nvlm.tiling.anyres import Joined, MapTiling, best_grid, unpadded
from nvlm.tiling.pixels import tile_image
from nvlm.tiling.placement import RowEnd, TileMap, TileTokens
from nvlm.tiling.resample import Resampling, halved, taps
from nvlm.tiling.tags import tile_tags

NEXT = MapTiling(
    tile_size=336, grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), joined=Joined(newline=True, cap=None), fill=None
)
ALL = tuple((cols, rows) for cols in range(1, 7) for rows in range(1, 7))
ONE_VISION = MapTiling(tile_size=384, grids=ALL, joined=Joined(newline=True, cap=9), fill=None)
CROPS = replace(NEXT, grids=None, joined=Joined(newline=True, cap=4))


def shown(plan, side):
    return plan.shown([()] * plan.num_tiles, [side * side] * plan.num_tiles)


def count(plan, side):
    return sum(part.content.length for part in shown(plan, side))


@pytest.mark.parametrize(
    ("size", "tokens"), [((672, 672), 2928), ((1024, 768), 2340), ((1920, 1080), 1948), ((400, 2000), 1656)]
)
def test_llava_nexts_counts(size, tokens):
    """336 px and 24 patches a side, with row ends: square, 4:3, 16:9 and 1:5."""
    assert count(NEXT(*size, 4), 24) == tokens


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((384, 384), 1485), ((512, 512), 3699), ((800, 600), 4725), ((1920, 1080), 7269), ((3000, 1000), 7215),
        ((400, 2000), 6075), ((2304, 2304), 7371),
    ],
)  # fmt: skip
def test_onevisions_counts(size, tokens):
    assert count(ONE_VISION(*size, 36), 27) == tokens


def test_where_transformers_and_the_original_round_apart():
    """59 columns of 81 are kept by LLaVA's code, which rounds down, and 61 by transformers."""
    plan = ONE_VISION(820, 1107, 36)
    assert (plan.cols, plan.rows) == (3, 3)
    for (height, width), side in (((1107, 820), 1), ((820, 1107), 0)):
        kept = {how: unpadded((width, height), 81, 81, how) for how in ("down", "digits")}
        widths = {how: window[2 + side] - window[side] for how, window in kept.items()}
        assert widths == {"down": 59, "digits": 61}


def sizes(seed, count=300, most=3000):
    generator = random.Random(seed)
    return [(generator.randint(1, most), generator.randint(1, most)) for _ in range(count)]


def test_the_grid_and_the_window_are_those_of_transformers():
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    for tiling, side in ((NEXT, 24), (ONE_VISION, 27)):
        pinpoints = [(rows * tiling.tile_size, cols * tiling.tile_size) for cols, rows in tiling.grids]
        for width, height in sizes(side):
            cols, rows = best_grid(width, height, tiling.grids, tiling.tile_size)
            best = select_best_resolution((height, width), pinpoints)
            assert (rows * tiling.tile_size, cols * tiling.tile_size) == tuple(best), (width, height)
            numbers = torch.arange(rows * side * cols * side).view(1, rows * side, cols * side)
            kept = unpad_image(numbers, (height, width))[0]
            top, left, bottom, right = unpadded((width, height), rows * side, cols * side, "digits")
            assert torch.equal(kept, numbers[0, top:bottom, left:right]), (width, height)


def test_the_pixels_are_those_of_transformers():
    from transformers import LlavaNextImageProcessorPil

    noise = np.random.default_rng(0)
    processor = LlavaNextImageProcessorPil(
        image_grid_pinpoints=[[rows * 336, cols * 336] for cols, rows in NEXT.grids],
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        do_normalize=False,
        do_rescale=False,
    )
    for size in ((500, 300), (90, 400), (336, 672)):
        image = Image.fromarray(noise.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
        theirs = torch.as_tensor(np.array(processor(image, return_tensors="np")["pixel_values"][0]))
        ours = tile_image(image, NEXT(*size, 4), "exact")
        theirs = torch.cat((theirs[1:], theirs[:1]))  # ours has the whole picture last
        # The whole picture: their processor resizes its shorter edge and crops, where LLaVA's stretches it.
        assert torch.equal(ours[:-1].float(), theirs[: len(ours) - 1].float())


@pytest.mark.parametrize("tiling", [NEXT, ONE_VISION, CROPS], ids=["next", "onevision", "crops"])
def test_predicted_tokens_are_those_that_are_made(tiling):
    side = 27 if tiling is ONE_VISION else 24
    for width, height in [*sizes(7, 330, 2500), (1, 3000), (3000, 1), (5000, 5000)]:
        plan = tiling(width, height, 36)
        assert 1 <= plan.num_regular <= 36
        starts = [side * side * tile for tile in range(plan.num_tiles)]
        rows = Rows(starts=starts, first_mixed=side * side * plan.num_tiles)
        made = [rows.of(part.content, 0, part.tile) for part in shown(plan, side)]
        assert [len(one) for one in made] == [part.content.length for part in shown(plan, side)]
        assert len(rows.table()[0]) == sum(int((one >= rows.first_mixed).sum()) for one in made)


@pytest.mark.parametrize("size", [(1000, 400), (400, 1000), (650, 640), (2000, 2000)])
def test_padding_never_survives_and_each_token_shows_its_place(size):
    """The picture's right half is white on its red left half: tokens of the map show it, and none the black padding."""
    width, height = size
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[..., 0] = 255
    picture[:, width // 2 :] = 255
    plan, side = NEXT(width, height, 4), 24
    pixels = tile_image(Image.fromarray(picture), plan, "exact").float()
    patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14).mean((-1, -2))  # [T, 3, side, side]
    tokens = patches.permute(0, 2, 3, 1).reshape(-1, 3)
    (_, part) = shown(plan, side)
    starts = [side * side * tile for tile in range(plan.num_tiles)]
    rows = Rows(starts=starts, first_mixed=10**6).of(part.content, 0, 0).view(part.content.shape[0], -1)
    assert (rows[:, -1] == ROW_END).all() and (rows[:, :-1] >= 0).all()
    image = tokens[rows[:, :-1]]
    inner = image[1:-1, 1:-1]
    assert (inner[..., 0] > 250).all()  # red and white both, black nowhere
    half = image.shape[1] // 2
    assert (inner[:, : half - 2, 1] < 5).all() and (inner[:, half + 1 :, 1] > 250).all()


@pytest.mark.parametrize("kind", ["bilinear", "average", "max"])
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_resampled_maps_are_torchs(kind, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(1, 3, rows, columns, generator=generator)
    if kind == "bilinear":
        new = Resampling((max(1, rows * 2 // 3), max(1, columns * 3 // 4)))
        right = torch.nn.functional.interpolate(old, size=new.size, mode="bilinear")[0]
    elif min(rows, columns) < 2:
        return
    else:
        new = halved(rows, columns, kind)
        pool = torch.nn.functional.avg_pool2d if kind == "average" else torch.nn.functional.max_pool2d
        right = pool(old, 2)[0]
    content = TileMap((0,), 1, rows, columns, resampled=new)
    numbers = Rows(starts=[0], first_mixed=rows * columns)
    numbers.of(content, 0, 0)
    sources, weights, largest = numbers.table()
    parts = old[0].flatten(1)[:, sources]
    got = parts.amax(-1) if largest.all() else (parts * weights).sum(-1)
    assert torch.allclose(got.view(right.shape), right, atol=1e-5)


def test_half_of_27():
    assert [halved(27, 27, kind).size for kind in ("bilinear", "average", "max")] == [(14, 14), (13, 13), (13, 13)]
    assert halved(24, 24, "bilinear").size == (12, 12)
    assert taps(4, 2, "bilinear") == [((0, 1), (0.5, 0.5)), ((2, 3), (0.5, 0.5))]


def test_the_most_tokens_of_any_image_are_those_of_the_full_plans():
    """By trying many sizes; 8,073 is above the 7,371 of a square picture, as maps of 2 x 5 tiles are not reduced."""
    for tiling, side, most in ((NEXT, 24, 2928), (ONE_VISION, 27, None), (CROPS, 24, None)):
        known = max(count(plan, side) for plan in tiling.full(36))
        tried = [(width, height) for width in range(40, 2400, 90) for height in range(40, 2400, 90)]
        assert max(count(tiling(*size, 36), side) for size in tried) <= known
        assert most is None or known == most
    assert max(count(plan, 27) for plan in ONE_VISION.full(36)) >= 8073


def test_tags_stand_before_each_tile_that_shows_something():
    plan = NEXT(1920, 1080, 4)
    tags = [(number,) for number in range(1, plan.num_tiles + 1)]
    parts = plan.shown(tags, [576] * plan.num_tiles)
    assert [part.tag for part in parts] == [(5,), (1,), (2,), (3,), (4,)] and parts[0].overview
    whole = shown(plan, 24)[1].content
    assert sum(part.content.length - part.content.ends for part in parts[1:]) == whole.length - whole.ends
    assert tile_tags(plan, "2d_grid", 4)[:2] == ("<tile_x0_y0>", "<tile_x1_y0>")


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_each_architecture_places_the_map(arch):
    plan = NEXT(1920, 1080, 4)
    placed = placement_rule(arch)(plan, [()] * 5, [576] * 5)
    stream, keys = ([piece.content for piece in pieces if piece.tiles] for pieces in (placed.stream, placed.cross))
    whole, (_, part) = TileTokens(576), shown(plan, 24)
    assert stream == {"decoder": [whole, part.content], "xattn": [], "hybrid": [whole]}[arch]
    tiles = keys[arch == "xattn" :]  # its keys begin with the whole picture
    assert (arch == "decoder") == (not keys) and [one.tiles for one in tiles] == [(k,) for k in range(len(tiles))]
    if keys:
        assert sum(one.length for one in tiles) == part.content.length - part.content.ends
        assert not any(one.row_ends for one in tiles)


def test_one_tile_is_the_whole_picture_and_an_end_of_rows():
    """As in LLaVA's code: with mm_patch_merge_type=spatial_unpad, pictures of one tile have an image_newline too."""
    for tiling in (NEXT, ONE_VISION, CROPS, replace(NEXT, grids=())):
        plan = tiling(900, 500, 1)
        assert plan.num_tiles == 1 and [part.content for part in shown(plan, 24)] == [TileTokens(576), RowEnd()]


def test_a_padded_picture_has_its_filling():
    plan = replace(NEXT, grids=(), fill=(10, 20, 30))(200, 100, 1)
    red = Image.new("RGB", (200, 100), (255, 0, 0))
    for resize in ("exact", "fast", "draft"):
        (tile,) = tile_image(red, plan, resize)
        assert tile[:, 0, 0].tolist() == [10, 20, 30] and tile[:, 168, 168].tolist() == [255, 0, 0]
    assert torch.equal(
        tile_image(red, plan, "exact")[0],
        torch.as_tensor(np.array(_expanded(red, (10, 20, 30)).resize((336, 336)))).permute(2, 0, 1),
    )


def _expanded(image, colour):
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
