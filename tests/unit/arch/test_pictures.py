"""Pictures of any number of tokens, and maps of several tiles with ends of rows: from the placement to what fills each
placeholder. What is expected is built from [rows, columns] images by permuting and joining them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm.arch import registry
from nvlm.arch.decoder.fusion import fill as fill_stream
from nvlm.arch.hybrid.fusion import _repeated
from nvlm.arch.pictures import picture_tokens
from nvlm.attention.visibility import visible
from nvlm.data.batch import IMAGE, PAD, ROW_END, check_placeholders
from nvlm.data.outline import build_processor, outline
from nvlm.data.pack import collate
from nvlm.data.record import Record
from nvlm.data.samples import encode
from nvlm.data.work import count_work
from nvlm.tiling.placement import Piece, Placement, TileMap, TileTokens, Words
from nvlm.tiling.resample import Resampling

TALL, WIDE = 3, 2  # tokens of a regular tile, down and across
THUMBNAIL = 5  # tokens of the thumbnail
WIDTH = 7


def anyres(plan, tags, tokens, row_ends=True, window=None):
    """The thumbnail, then all regular tiles as one map with a learned vector after each row; also as keys."""
    last, counts = plan.num_regular, (*[TALL * WIDE] * plan.num_regular, THUMBNAIL)
    stream = [Piece(last, Words(tags[last])), Piece(last, TileTokens(THUMBNAIL))]
    if not plan.num_regular:
        return Placement(counts, tuple(stream), ())
    whole = Piece(0, TileMap(tuple(range(last)), plan.cols, TALL, WIDE, row_ends, window))
    bound = Piece(0, Words(tags[0]), own_tile=True)
    return Placement(
        counts, (*stream, bound, whole), (Piece(0, Words(tags[0])), whole, Piece(last, TileTokens(THUMBNAIL)))
    )


def windowed(plan, tags, tokens):
    """The same without the map's first row, its first column and its last row."""
    return anyres(plan, tags, tokens, window=(1, 1, plan.rows * TALL - 1, plan.cols * WIDE))


def without_ends(plan, tags, tokens):
    """The map as it is."""
    return anyres(plan, tags, tokens, row_ends=False)


RULES = {"whole": anyres, "windowed": windowed, "without ends": without_ends}


def record(name, *sizes):
    """A conversation about pictures of these sizes."""
    noise = np.random.default_rng(len(name))
    pictures = [Image.fromarray(noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    messages = [{"role": "user", "content": "<image>" * len(sizes) + "?"}, {"role": "assistant", "content": "Yes."}]
    return Record(name, messages, pictures)


@pytest.fixture
def samples(configured):
    """(rule) -> samples: of two images, of one that is its own thumbnail, of text, of one image."""
    plain = build_processor(configured("arch=hybrid", "data.seq_length=4000"), registry.placement_rule("hybrid"))

    def made(rule):
        chosen = replace(plain, placement=rule, cross_length=4000)
        records = [
            record("two", (300, 200), (100, 300)),
            record("own", (90, 90)),
            record("text"),
            record("a", (200, 100)),
        ]
        return [(encode(one, chosen), outline(one, chosen).pictures.plans) for one in records]

    return made


def map_of(tiles, plan, kind, end):
    """[tokens of the regular tiles, WIDTH] as the map's tokens, row by row; `end` after each row."""
    image = tiles.view(plan.rows, plan.cols, TALL, WIDE, WIDTH).permute(0, 2, 1, 3, 4)
    image = image.reshape(plan.rows * TALL, plan.cols * WIDE, WIDTH)
    if kind == "windowed":
        image = image[1:-1, 1:]
    if kind != "without ends":
        image = torch.cat([image, end.expand(len(image), 1, WIDTH)], dim=1)
    return image.flatten(0, 1)


def expected(features, plans, kind, end):
    """What fills the placeholders of one sample's stream, and of its keys."""
    stream, keys = [torch.zeros(0, WIDTH)], [torch.zeros(0, WIDTH)]
    for plan in plans:
        tiles, thumbnail, features = features.split(
            [plan.num_regular * TALL * WIDE, THUMBNAIL, len(features) - plan.num_regular * TALL * WIDE - THUMBNAIL]
        )
        stream.append(thumbnail)
        if plan.num_regular:
            together = map_of(tiles, plan, kind, end)
            stream.append(together)
            keys += [together, thumbnail]
    assert not len(features)
    return torch.cat(stream), torch.cat(keys)


@pytest.mark.parametrize("kind", RULES)
def test_maps_of_tiles_fill_their_placeholders(samples, kind):
    generator = torch.Generator().manual_seed(0)
    made, end = samples(RULES[kind]), torch.randn(WIDTH, generator=generator)
    assert [plan.num_regular for _, plans in made for plan in plans] == [6, 3, 0, 2]
    batch = collate([[made[0][0], made[2][0], made[1][0]], [made[3][0]]], 112)
    in_order = [made[0], made[2], made[1], made[3]]
    parts = [torch.randn(int(sample.tile_tokens.sum()), WIDTH, generator=generator) for sample, _ in in_order]
    stream, keys = zip(*(expected(part, plans, kind, end) for part, (_, plans) in zip(parts, in_order)))
    assert [int((sample.tokens == IMAGE).sum()) for sample, _ in in_order] == [len(part) for part in stream]
    assert batch.stream_counts.tolist() == [len(part) for part in stream]
    assert batch.cross_counts.tolist() == [len(part) for part in keys]

    whole = batch.with_features(torch.cat(parts))
    check_placeholders(whole)
    row_end = None if kind == "without ends" else end.clone().requires_grad_()
    for rows, right in ((batch.stream_rows, torch.cat(stream)), (batch.cross_rows, torch.cat(keys))):
        got = picture_tokens(whole, rows, lambda features: 2 * features, row_end)
        assert got.shape == right.shape
        assert torch.equal(got[rows != ROW_END], 2 * right[rows != ROW_END])
        assert torch.equal(got[rows == ROW_END], right[rows == ROW_END])
        if row_end is not None:
            (gradient,) = torch.autograd.grad(got.sum(), row_end)
            assert (gradient == int((rows == ROW_END).sum())).all() and gradient.any()
    work = count_work(batch)
    assert work.projected == sum(int((rows != ROW_END).sum()) for rows in (batch.stream_rows, batch.cross_rows))
    assert batch.cross_lengths.sum() == len(batch.cross_rows)


def test_a_rank_that_has_some_tiles_finds_them_in_any_order(samples):
    """Here the tiles of the keys alone, last tile first."""
    made = samples(without_ends)
    batch = collate([[sample for sample, _ in made]], 112)
    features = torch.randn(int(batch.tile_tokens.sum()), WIDTH)
    tiles = batch.tiles_of(batch.cross_rows).unique().flip(0)
    assert 0 < len(tiles) < len(batch.pixels)
    parts = torch.arange(len(features)).split(batch.tile_tokens.tolist())
    held = torch.cat([parts[tile] for tile in tiles])
    rows = torch.full((len(features),), PAD)
    rows[held] = torch.arange(len(held))
    some = batch.with_some_features(features[held], rows)
    assert torch.equal(some.features_of(batch.cross_rows), features[batch.cross_rows])
    with pytest.raises(AssertionError, match="was not sent to this process"):
        some.features_of(batch.stream_rows)


def test_the_stream_takes_a_map_column_by_column(samples):
    """Context-parallel ranks compute some columns: each token is at its position in the whole stream."""
    made = samples(without_ends)
    batch = collate([[made[0][0]], [made[3][0]]], 112)
    batch = batch.with_features(torch.randn(int(batch.tile_tokens.sum()), WIDTH))
    words = torch.zeros(*batch.tokens.shape, WIDTH)
    whole = fill_stream(words, batch, slice(None), lambda features: features)
    assert torch.equal(whole[batch.tokens == IMAGE], batch.features_of(batch.stream_rows))
    columns = torch.arange(batch.tokens.shape[1])[1::3]
    some = fill_stream(words[:, columns], batch, columns, lambda features: features)
    assert torch.equal(some, whole[:, columns])


def test_who_is_bound_to_a_map_sees_all_of_it_and_nothing_else(samples):
    (sample, (plan,)) = samples(anyres)[3]
    stream, keys = (torch.zeros_like(x) for x in (sample.tokens, sample.cross_tokens))
    seen = visible(stream, sample.image, sample.tile, keys, sample.cross_image, sample.cross_tile)
    bound = seen[sample.tile == 0]
    map_length = plan.rows * TALL * (plan.cols * WIDE + 1)
    tag = len(sample.cross_tokens) - map_length - THUMBNAIL
    assert len(bound) == tag > 0 and (bound == bound[0]).all()
    assert bound[0].tolist() == [True] * (tag + map_length) + [False] * THUMBNAIL
    assert seen[sample.labels.ne(-100)].all()  # the answer sees everything


def test_ends_of_rows_need_a_vector(samples):
    made = samples(anyres)
    batch = collate([[made[3][0]]], 112)
    batch = batch.with_features(torch.randn(int(batch.tile_tokens.sum()), WIDTH))
    with pytest.raises(AssertionError, match="the end of a map's row has no feature"):
        picture_tokens(batch, batch.stream_rows, lambda features: features)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(tiles=(0, 1, 2)), "tiles of a map, got 3, expected whole rows of 2"),
        (dict(tiles=()), "tiles of a map, got 0"),
        (dict(window=(0, 0, 7, 4)), r"window of a map, got \(0, 0, 7, 4\), expected some of its 6 x 4 tokens"),
        (dict(window=(2, 0, 2, 4)), "window of a map"),
    ],
)
def test_maps_that_are_none_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        TileMap(**dict(tiles=(0, 1, 2, 3), across=2, rows=3, columns=2) | changes)


def test_a_map_takes_whole_tiles_and_is_known_by_its_first():
    four = TileMap((1, 2), 2, rows=3, columns=2)
    assert Placement((1, 6, 6), (Piece(1, four),), ()).from_tiles == (12, 0)
    with pytest.raises(ValueError, match="a piece of tile 2, got 6 of its tokens, expected all 5"):
        Placement((1, 6, 5), (Piece(1, four),), ())
    with pytest.raises(ValueError, match="a map's own tile, got 2, expected its first, 1"):
        Placement((1, 6, 6), (Piece(2, four),), ())


def test_tags_reach_the_tokens_of_pieces_of_any_length():
    """NVLM-H adds each tag's mean to its tile's tokens: against an index, with gradients."""
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([3, 3, 1, 4, 4])
    weights = torch.randn(15, WIDTH, dtype=torch.float64)
    got, right = _repeated(x, times), x[torch.repeat_interleave(times)]
    assert torch.equal(got, right)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (got, right)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


def mixed(plan, tags, tokens):
    """The thumbnail, then the map of all regular tiles with fewer rows and columns; then again, by its maxima."""
    placed = anyres(plan, tags, tokens)
    if not plan.num_regular:
        return placed
    *before, whole = placed.stream
    rows, columns = plan.rows * TALL, plan.cols * WIDE
    smaller = Resampling((rows - 1, columns - 1)), Resampling((rows // 2, columns // 2), "max")
    maps = [replace(whole, content=replace(whole.content, resampled=one)) for one in smaller]
    return replace(placed, stream=(*before, *maps), cross=(maps[0],))


def test_tokens_are_mixed_after_they_are_projected(samples):
    """Against torch's own filters on maps that are laid out by hand; also column by column, and with gradients."""
    made, generator = samples(mixed), torch.Generator().manual_seed(1)
    batch = collate([[made[0][0], made[2][0]], [made[3][0]]], 112)
    features = torch.randn(int(batch.tile_tokens.sum()), WIDTH, generator=generator, dtype=torch.float64)
    end = torch.randn(WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    batch = batch.with_features(features)
    check_placeholders(batch)
    learned = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)

    def project(x):
        return torch.tanh(x @ learned)

    parts, rest = [], project(features)
    for plan in (*made[0][1], *made[3][1]):
        regular = plan.num_regular * TALL * WIDE
        tiles, thumbnail, rest = rest.split([regular, THUMBNAIL, len(rest) - regular - THUMBNAIL])
        image = map_of(tiles, plan, "without ends", None).view(1, plan.rows * TALL, plan.cols * WIDE, WIDTH)
        image = image.permute(0, 3, 1, 2)
        rows, columns = image.shape[2:]
        maps = (
            torch.nn.functional.interpolate(image, size=(rows - 1, columns - 1), mode="bilinear"),
            torch.nn.functional.max_pool2d(image, 2),
        )
        parts.append(thumbnail)
        for one in maps:
            lines = one[0].permute(1, 2, 0)
            parts.append(torch.cat((lines, end.expand(len(lines), 1, WIDTH)), dim=1).flatten(0, 1))
    right = torch.cat(parts)
    got = picture_tokens(batch, batch.stream_rows, project, end)
    assert torch.allclose(got, right, rtol=0, atol=1e-6)  # the weights are fp32
    cotangent = torch.randn(right.shape, generator=generator, dtype=torch.float64)
    wanted, found = (torch.autograd.grad((x * cotangent).sum(), (learned, end)) for x in (right, got))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(found, wanted))

    words = torch.zeros(*batch.tokens.shape, WIDTH, dtype=torch.float64)
    whole = fill_stream(words, batch, slice(None), project, end)
    columns = torch.arange(batch.tokens.shape[1])[1::3]
    assert torch.allclose(fill_stream(words[:, columns], batch, columns, project, end), whole[:, columns], atol=1e-12)
    assert count_work(batch).projected == sum(len(batch.sources_of(r)) for r in (batch.stream_rows, batch.cross_rows))
    assert set(batch.tiles_of(batch.cross_rows).tolist()) <= set(range(len(batch.tile_tokens)))
