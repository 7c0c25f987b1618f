"""What reaches what: closed gates, tags and tiles, which tiles a query sees, where tiles stand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nvlm.arch.xattn.attention import GatedCrossAttention
from nvlm.data.batch import IMAGE, Batch, Sample
from nvlm.data.pack import collate
from nvlm.llm.adapters import Linears
from tests.models import (
    TILE,
    Story,
    Twins,
    batch_of,
    build_twins,
    loss_and_gradients,
    reference_sample,
    sample_of,
    small_config,
)
from tests.parity.reference import RefSample, Segment, visibility
from tests.parity.twins import (
    TAGS,
    K,
    twins_with,
)
from tests.stories import GRIDS, ONE, TEXT, TWO

pytestmark = pytest.mark.usefixtures("twins")


def text_stream(sample: Sample) -> Sample:
    """The sample without its cross-attended part."""
    none = torch.zeros(0, dtype=torch.long)
    cross = ("cross_tokens", "cross_image", "cross_tile", "cross_rows")
    return replace(sample, cross_tags=(), cross_lengths=(), **dict.fromkeys(cross, none))


@pytest.mark.parametrize("arch", ["xattn", "hybrid"])
@pytest.mark.parametrize("gates", [0.0, None], ids=["closed", "open"])
def test_with_closed_gates_it_is_the_text_model_on_the_same_stream(arch, gates):
    """X: the bare language model on words and tags; H: NVLM-D with only the thumbnails. Bit-equal in evaluation; in
    training, D omits padding on CPU, and kernels round depending on the shape of rows."""
    twins = build_twins(small_config(f"arch={arch}"), gates)
    plain = build_twins(small_config("arch=decoder"), gates)  # the reference's init gives it the same weights
    samples = [sample_of(story, twins.config) for story in (ONE, TWO, TEXT)]
    without = [text_stream(sample) for sample in samples]
    if arch == "xattn":
        nothing = {name: getattr(samples[0], name)[:0] for name in ("stream_rows", "tile_tokens", "pixels")}
        without = [replace(sample, **nothing) for sample in without]
        assert not any((sample.tokens == IMAGE).any() for sample in without)
    batches = [each.vision.encode(collate([s[:1], s[1:]], TILE)) for each, s in ((twins, samples), (plain, without))]
    learning = [each.model.train()(batch) for each, batch in zip((twins, plain), batches)]
    with torch.no_grad():
        seen = [each.model.eval()(batch) for each, batch in zip((twins, plain), batches)]
    assert seen[0].max() > 1
    assert torch.equal(*seen) == (gates == 0.0)
    assert torch.allclose(*learning, rtol=0, atol=2e-6) == (gates == 0.0)


def test_fresh_gates_are_closed_and_learn():
    twins = build_twins(small_config("arch=xattn"))
    gate = next(m for m in twins.model.modules() if isinstance(m, GatedCrossAttention)).gate
    groups, linears = twins.model.decoder.pg_collection, Linears(None, 0, 0)
    fresh = GatedCrossAttention(twins.model.config, 1, groups, init_std=0.1, linears=linears)
    assert fresh.gate.tolist() == [0.0] and fresh.gate.shape == gate.shape
    _, gradients = loss_and_gradients(build_twins(small_config("arch=xattn"), gates=0.0), batch_of([[ONE]], twins))
    for name, gradient in gradients.items():
        if ".cross_attn." in name:
            assert bool(gradient.abs().max() > 0) == name.endswith(".gate"), name


def places(sample: RefSample) -> list[tuple[Segment, range]]:
    """Each segment of the stream and its positions."""
    out, at = [], 0
    for segment in sample.stream:
        length = K if segment.kind == "tile" else len(segment.ids)
        out.append((segment, range(at, at + length)))
        at += length
    return out


def repaint(batch: Batch, sample: RefSample, keys: set[tuple[int, int]], twins: Twins) -> Batch:
    """The batch with other pixels in the tiles `keys` (image, tile); tiles are ordered by image."""
    pixels = batch.pixels.clone()
    for at, key in enumerate(sorted(sample.tiles)):
        if key in keys:
            pixels[at] = 255 - pixels[at]
    return twins.vision.encode(replace(batch, pixels=pixels))


def first_cross_output(twins: Twins, batch: Batch) -> Tensor:
    """[S, H] of row 0: what the first gated cross-attention adds, before which no query has seen an image."""
    module = next(m for m in twins.model.modules() if isinstance(m, GatedCrossAttention))
    outputs = []
    hook = module.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad():
        twins.model(batch)
    hook.remove()
    return outputs[0][:, 0]


def changed(before: Tensor, after: Tensor) -> set[int]:
    """Rows that are not bit-equal."""
    return set((before != after).any(-1).nonzero().flatten().tolist())


def test_a_tile_tag_of_x_sees_its_own_tile_alone():
    twins = twins_with(("arch=xattn",), "1d")
    sample, batch = reference_sample(TWO, twins.config), batch_of([[TWO]], twins)
    before = first_cross_output(twins, batch)
    everything = set(sample.tiles)
    assert len(everything) == 7
    for key in everything:
        mine, text_after, begun = set(), set(), False
        for segment, positions in places(sample):
            begun |= segment.image == key[0]
            if (segment.image, segment.tile) == key:
                mine |= set(positions)
            elif segment.kind == "text" and begun:
                text_after |= set(positions)
        assert len(mine) >= 3 and text_after
        own = changed(before, first_cross_output(twins, repaint(batch, sample, {key}, twins)))
        assert own == mine | text_after, key
        others = changed(before, first_cross_output(twins, repaint(batch, sample, everything - {key}, twins)))
        assert not others & mine, key
        assert text_after <= others


@pytest.mark.parametrize("tag", TAGS)
def test_queries_of_h_see_the_tiles_begun_before(tag):
    twins = twins_with(("arch=hybrid",), tag)
    sample, batch = reference_sample(TWO, twins.config), batch_of([[TWO]], twins)
    before, visible_SX = first_cross_output(twins, batch), visibility(sample, "hybrid", K)
    at = 0
    for segment in sample.cross:
        if segment.kind == "tile":
            key = {(segment.image, segment.tile)}
            after = first_cross_output(twins, repaint(batch, sample, key, twins))
            assert changed(before, after) == set(visible_SX[:, at].nonzero().flatten().tolist())
        at += K if segment.kind == "tile" else len(segment.ids)


def decoder_inputs(twins: Twins, batch: Batch) -> tuple[Tensor, Tensor]:
    """Row 0 of the decoder's inputs: the stream [S, H] and the keys [X, H]."""
    seen = []

    def keep(module, args, kwargs):
        seen.append((args[0][:, 0], kwargs["context"][:, 0]))

    hook = twins.model.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        twins.model(batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("tag", ["none", "1d"])
@pytest.mark.parametrize("tiles", GRIDS)
def test_h_has_the_thumbnail_in_the_stream_and_each_tile_in_the_keys(tiles, tag):
    turns = (("user", "a <image> b"), ("assistant", "c"))
    story = Story(f"{tiles}-tiles", turns, (GRIDS[tiles],))
    twins = twins_with(("arch=hybrid",), tag)
    sample, batch = reference_sample(story, twins.config), batch_of([[story]], twins)
    regular = tiles if tiles > 1 else 0
    tag_length = 3 if tag == "1d" else 0  # <tile_ 1 >
    assert batch.pixels.shape[0] == regular + 1
    placeholders = (batch.tokens[0] == IMAGE).nonzero().flatten().tolist()
    assert len(placeholders) == K and placeholders[-1] - placeholders[0] == K - 1
    assert (batch.cross_sample[0] >= 0).sum() == regular * (K + tag_length)
    assert (batch.cross_tokens[0] == IMAGE).sum() == regular * K

    stream, keys = decoder_inputs(twins, batch)
    for tile in range(regular + 1):
        new_stream, new_keys = decoder_inputs(twins, repaint(batch, sample, {(0, tile)}, twins))
        start = tile * (K + tag_length) + tag_length
        thumbnail = tile == regular
        assert changed(stream, new_stream) == (set(placeholders) if thumbnail else set())
        assert changed(keys, new_keys) == (set() if thumbnail else set(range(start, start + K)))


@pytest.mark.parametrize("tiles", GRIDS)
@pytest.mark.parametrize(("arch", "stream_tiles", "cross_tiles"), [("decoder", True, False), ("xattn", False, True)])
def test_counts_of_d_and_x(arch, stream_tiles, cross_tiles, tiles):
    story = Story("count", (("user", "<image>"), ("assistant", "c")), (GRIDS[tiles],))
    sample = sample_of(story, small_config(f"arch={arch}"))
    total = tiles + 1 if tiles > 1 else 1
    assert (sample.tokens == IMAGE).sum() == total * K * stream_tiles
    assert (sample.cross_tokens == IMAGE).sum() == sample.cross_tokens.numel() == total * K * cross_tiles
