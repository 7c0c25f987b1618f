"""Records with videos as samples: frames as tiles, their tokens and separators, budgets, indices and shares."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from nvlm.arch import registry
from nvlm.arch.pictures import picture_tokens
from nvlm.config.values import ConfigError
from nvlm.data.batch import ROW_END
from nvlm.data.measure import lengths, measure
from nvlm.data.outline import build_processor, outline
from nvlm.data.pack import collate
from nvlm.data.record import BadRecord, Record, TooLong
from nvlm.data.samples import Share, encode, fill
from nvlm.data.video.clip import Video
from nvlm.tiling.frames import FrameTiling
from nvlm.tiling.pixels import tile_frames
from tests.clips import STEP, clip, picture

CLIP = Video(clip(20))
PAGE = Image.fromarray(picture(5, (96, 48)))


def record(*pictures, question="What?") -> Record:
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
    return Record("r", talk, list(pictures))


def processor(configured, arch="decoder", *overrides):
    config = configured(f"arch={arch}", "tiling.max_tiles=2", "video.frames=5", "data.seq_length=2048", *overrides)
    return build_processor(config, registry.placement_rule(arch))


# A frame of SigLIP-384 has 27 x 27 tokens, one of CLIP-L-336 24 x 24.
@pytest.mark.parametrize(
    ("rule", "frames", "tokens", "expected"),
    [
        (dict(pool="bilinear", separator="once"), 32, 729, 32 * 196 + 1),  # LLaVA-OneVision: 6272 and a newline
        (dict(pool="average"), 32, 576, 32 * 144),  # LLaVA-NeXT-Video
        (dict(pool="max", separator="frame"), 8, 729, 8 * (13 * 13 + 1)),
        (dict(pool="bilinear", separator="row"), 8, 729, 8 * 14 * 15),
        (dict(), 8, 256, 8 * 256),
        (dict(separator="row"), 2, 256, 2 * 16 * 17),
        # Of 64 frames, 16 are slow: 14 rows of 14 and a newline; 48 are fast: 7 rows of 7 and a newline.
        (dict(pool="bilinear", separator="row", slow_every=4), 64, 729, 16 * 14 * 15 + 48 * 7 * 8),
    ],
)
def test_the_tokens_of_a_video_are_those_of_its_system(rule, frames, tokens, expected):
    plan = FrameTiling(tile_size=384, **rule).of(frames)
    shown = plan.shown([()] * frames, [tokens] * frames)
    assert plan.num_tiles == frames and sum(part.content.length for part in shown) == expected


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_a_video_is_one_picture_whose_tiles_are_its_frames_in_order(configured, arch):
    made = processor(configured, arch, "video.separator=frame")
    sample = encode(record(CLIP), made)
    assert [round(float(tile[:, :, tile.shape[2] // 2 :].float().mean()) / STEP) - 1 for tile in sample.pixels] == [
        0, 4, 9, 14, 19,
    ]  # fmt: skip
    assert len(sample.tile_tokens) == 5 and set(sample.image.tolist()) == {-1, 0}
    per_tile = made.tile_tokens
    if arch == "xattn":
        assert len(sample.cross_rows) == 5 * per_tile and not len(sample.stream_rows)
        assert sample.cross_tile.tolist() == [frame for frame in range(5) for _ in range(per_tile)]
    else:
        rows = [*range(per_tile), ROW_END, *range(per_tile, 2 * per_tile), ROW_END]
        assert sample.stream_rows[: len(rows)].tolist() == rows and len(sample.stream_rows) == 5 * (per_tile + 1)
        assert not len(sample.cross_rows)


def test_videos_and_images_mix_in_a_record_and_in_a_batch(configured):
    made = processor(configured)
    both = record(CLIP, PAGE, question="<image> then <image>")
    sketch = outline(both, made)
    assert [plan.num_tiles for plan in sketch.pictures.plans] == [5, 3]
    batch = collate([[encode(both, made), encode(record(PAGE), made)]], made.tile_size)
    assert len(batch.pixels) == 5 + 3 + 3


def test_pooling_a_video_is_torchs_pooling_of_its_projected_frames(configured):
    pools = {
        "average": lambda x: torch.nn.functional.avg_pool2d(x, 2),
        "max": lambda x: torch.nn.functional.max_pool2d(x, 2),
        "bilinear": lambda x: torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear"),
    }
    for pool, expected in pools.items():
        made = processor(configured, "decoder", f"video.pool={pool}", "video.separator=once")
        batch = collate([[encode(record(CLIP), made)]], made.tile_size)
        side = round(made.tile_tokens**0.5)
        features = torch.randn(int(batch.tile_tokens.sum()), 6)
        end = torch.randn(6)
        found = picture_tokens(batch.with_features(features), batch.stream_rows, torch.tanh, end)
        maps = torch.tanh(features).view(5, side, side, 6).permute(0, 3, 1, 2)
        pooled = expected(maps).permute(0, 2, 3, 1).reshape(-1, 6)
        torch.testing.assert_close(found, torch.cat((pooled, end[None])))


@pytest.mark.parametrize("arch", ["decoder", "xattn"])
def test_lengths_are_known_from_headers_and_from_an_index(configured, arch):
    made = processor(configured, arch, "video.rate=4", "video.pool=average", "video.separator=row")
    one = record(CLIP, PAGE)
    sample, planned = encode(one, made), outline(one, made)
    assert planned.lengths == (sample.tokens.numel(), sample.cross_tokens.numel())
    assert lengths(measure(one, made), made) == (planned.lengths, planned.pictures)
    assert planned.pictures.sizes[0] == (64, 48, 5)  # each 2nd or 3rd of 20: more than 5, so 5


def test_the_ranks_of_a_replica_divide_videos_as_they_do_images(configured):
    made = processor(configured)
    one = record(CLIP, PAGE, CLIP)
    sketch, whole = outline(one, made), encode(one, made)
    halves = [fill(one, sketch, made, Share((0, 1, 1), own)) for own in (0, 1)]
    assert [len(half.pixels) for half in halves] == [5, 3 + 5]
    assert torch.equal(torch.cat([half.pixels for half in halves]), whole.pixels)


def test_a_video_that_does_not_fit_is_refused_and_an_image_beside_it_gets_fewer_tiles(configured):
    made = processor(configured, "decoder", "data.seq_length=400")
    assert made.tile_tokens == 16
    assert outline(record(CLIP, PAGE), made).pictures.plans[1].num_tiles == 3
    long = processor(configured, "decoder", "data.seq_length=400", "video.frames=40")
    with pytest.raises(TooLong, match="images do not fit the text stream"):
        outline(record(CLIP), long)


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_a_frame_is_stretched_padded_or_cut_to_a_square(fit, resize):
    frame = picture(10, (64, 32))  # its left eighth is red
    plan = FrameTiling(tile_size=32, fit=fit, fill=(0, 0, 255)).of(1)
    (tile,) = tile_frames([frame], plan, resize)
    assert tile.shape == (3, 32, 32)
    middle_left, top = tile[:, 16, 0].tolist(), tile[:, 0, 16].tolist()
    grey = [STEP * 11] * 3
    assert top == ([0, 0, 255] if fit == "pad" else grey)
    assert middle_left == (grey if fit == "crop" else [255, 0, 0])


def test_a_video_that_breaks_after_planning_leaves_black_tiles_of_the_planned_number(configured):
    made = processor(configured)
    good = record(CLIP)
    sketch = outline(good, made)
    broken = record(Video(clip(20, header_first=True)[:-200]))
    assert outline(broken, made).lengths == sketch.lengths  # the header says nothing
    with pytest.raises(BadRecord, match="cut short"):
        encode(broken, made)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("video.frames=0",), "video.frames: got 0, expected"),
        (("video.rate=0",), "video.rate: got 0"),
        (("video.pool=mean",), "video.pool: got 'mean', expected one of"),
        (("video.slow_every=2", "video.pool=average"), "video.slow_every: got 2, expected 0, or video.pool=bilinear"),
        (("video.pool=max", "vision.downsample=8"), "video.pool: got max of frames of 1 x 1 tokens, expected at least"),
    ],
)
def test_settings_of_videos_that_cannot_be_are_refused(configured, overrides, message):
    with pytest.raises(ConfigError, match=message):
        configured(*overrides)
