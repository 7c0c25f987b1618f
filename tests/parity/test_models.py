"""The three architectures compared with the plain reference, and invariants of each.

Ours computes in fp32, the reference in fp64 from the same weights; tests/near.py has the tolerances.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from nvlm.arch.groups import parameter_group
from nvlm.arch.pipeline import Pipeline, next_logits
from nvlm.arch.registry import placement_rule
from nvlm.arch.xattn.attention import GatedCrossAttention
from nvlm.attention.cache import generating
from nvlm.attention.kernels import per_sample
from nvlm.config.values import cross_layers
from nvlm.data.batch import IGNORE, IMAGE, Batch, Sample
from nvlm.data.messages import first_question
from nvlm.data.outline import build_processor
from nvlm.data.pack import collate
from nvlm.data.samples import encode
from nvlm.data.tokenizer import load_tokenizer
from nvlm.llm.adapters import Linears
from nvlm.train.optim import freeze
from nvlm.vision.pooling import pixel_shuffle
from nvlm.weights import llm as llm_weights
from nvlm.weights.parts import joined
from tests.models import (
    TILE,
    Story,
    Twins,
    batch_of,
    below,
    build_twins,
    loss_and_gradients,
    parameters_of,
    record_of,
    reference_sample,
    sample_of,
    small_config,
    to_ours,
    to_reference,
)
from tests.near import GRADIENT, assert_gradients_near, assert_near
from tests.parity.reference import RefSample, Segment, visibility
from tests.stories import GRIDS, INPUTS, ONE, ONE_TILE, SIDE_BY_SIDE, TEXT, TWO

K = (TILE // 2 // 2) ** 2  # tokens of a tile: patches of 2 px, then 2 x 2 of them
TAGS = ("none", "1d", "2d_grid", "2d_bbox")
ARCHITECTURES = ("decoder", "xattn", "hybrid")

MODELS = {
    "decoder": ("arch=decoder",),
    "xattn": ("arch=xattn",),
    "hybrid": ("arch=hybrid",),
    "hybrid-unbound": ("arch=hybrid", "arch.bind_tags=false"),
}
VARIANTS = {
    "decoder-llama": ("arch=decoder", "llm.qkv_bias=false"),
    "xattn-llama": ("arch=xattn", "llm.qkv_bias=false"),
    "hybrid-llama": ("arch=hybrid", "llm.qkv_bias=false"),
    "decoder-tied": ("arch=decoder", "llm.tied=true"),
    "hybrid-tied": ("arch=hybrid", "llm.tied=true"),
    "xattn-every-layer": ("arch=xattn", "arch.cross_every=1"),
    "hybrid-last-layer": ("arch=hybrid", "arch.cross_every=5"),
    "decoder-one-group": ("arch=decoder", "llm.kv_heads=1"),
    "xattn-ungrouped": ("arch=xattn", "llm.kv_heads=4"),
}


@pytest.fixture(scope="module", autouse=True)
def clean(megatron: None) -> Iterator[None]:
    """Objects built once for all tests here end with their process groups."""
    yield
    for cached in (twins_of, reference_result):
        cached.cache_clear()


@cache
def twins_of(*overrides: str) -> Twins:
    return build_twins(small_config(*overrides))


def twins_with(overrides: tuple[str, ...], tag: str = "1d") -> Twins:
    """Tags change the records, not the model: one model serves all tags."""
    return replace(twins_of(*overrides), config=small_config(*overrides, f"tiling.tag={tag}"))


@cache
def reference_result(overrides: tuple[str, ...], tag: str, story: Story) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [S] of one story alone and the gradients of its sum, zero where nothing was reached."""
    twins = twins_with(overrides, tag)
    twins.reference.zero_grad(set_to_none=True)
    loss_S = twins.reference(reference_sample(story, twins.config))
    loss_S.sum().backward()
    learning = {name: p for name, p in twins.reference.named_parameters() if p.requires_grad}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learning.items()}
    return loss_S.detach(), gradients


def assert_equals_reference(overrides: tuple[str, ...], tag: str, rows: list[list[Story]]) -> None:
    twins = twins_with(overrides, tag)
    loss_BS, gradients = loss_and_gradients(twins, batch_of(rows, twins))
    total: dict[str, Tensor] = {}
    for row, loss_S in zip(rows, loss_BS):
        at = 0
        for story in row:
            expected, parts = reference_result(overrides, tag, story)
            assert expected.abs().max() > 1  # or the comparison would mean little
            assert_near(loss_S[at : at + len(expected)], expected, story.name)
            at += len(expected)
            total = {name: total.get(name, 0) + part for name, part in parts.items()}
        assert loss_S[at:].abs().sum() == 0  # padding
    assert_gradients_near(gradients, total)


# --- parity ---


def test_vision_features_equal_the_reference():
    twins = twins_of("arch=decoder")
    sample = reference_sample(TWO, twins.config)
    expected = torch.cat([*twins.reference.vision_features(sample.tiles).values()])
    pixels = torch.stack([*sample.tiles.values()])
    features = twins.vision.features(pixels)
    assert features.shape == (7 * K, 4 * twins.config.vision.hidden)
    assert_near(features, expected, "features")
    assert twins.vision.features(pixels[:0]).shape == (0, *features.shape[1:])


def test_pixel_shuffle_order():
    """A 4 x 4 grid of patches, numbered in reading order: each token is a 2 x 2 block in reading order."""
    numbers = torch.arange(16.0).view(1, 16, 1)
    blocks = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert pixel_shuffle(numbers)[0].tolist() == blocks
    assert pixel_shuffle(torch.cat([numbers, numbers + 16]))[1].tolist() == [[n + 16 for n in b] for b in blocks]


@pytest.mark.parametrize("rows", INPUTS)
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradients_equal_the_reference(model, tag, rows):
    assert_equals_reference(MODELS[model], tag, INPUTS[rows])


@pytest.mark.parametrize("model", MODELS)
def test_samples_that_go_apart_equal_the_reference_too(model, monkeypatch):
    monkeypatch.setattr(per_sample, "WORTH_A_CALL", 0)  # here they are short, and a mask would tell them apart
    assert_equals_reference(MODELS[model], "1d", INPUTS["packed rows"])


@pytest.mark.parametrize("model", VARIANTS)
def test_other_language_models_equal_the_reference(model):
    assert_equals_reference(VARIANTS[model], "1d", INPUTS["packed rows"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_next_tokens_are_the_references_likeliest(arch):
    overrides = (f"arch={arch}",)
    twins = twins_with(overrides)
    stories = [ONE, TEXT, TWO]
    batch = batch_of([[story] for story in stories], twins)
    lengths = [len(reference_sample(story, twins.config).labels) for story in stories]
    for back in range(1, 4):
        stages = Pipeline([twins.model], [], lend=False)
        with generating([twins.model]):
            likeliest = next_logits(stages, batch, torch.tensor(lengths) - back).argmax(-1)
        for story, length, token in zip(stories, lengths, likeliest):
            logits_SV = twins.reference.logits(reference_sample(story, twins.config))
            assert token == logits_SV[length - back].argmax()


@pytest.mark.parametrize("overrides", [*MODELS.values(), *VARIANTS.values()], ids=[*MODELS, *VARIANTS])
def test_weights_survive_the_round_trip(overrides):
    twins = twins_of(*overrides)
    state = {name: p for name, p in twins.reference.named_parameters() if not name.startswith("vision_model.")}
    there_and_back = to_reference(to_ours(state, twins.config), twins.config)
    assert there_and_back.keys() == state.keys()
    assert all(torch.equal(there_and_back[name], p) for name, p in state.items())


def test_missing_and_surplus_weights_are_named():
    twins = twins_of("arch=hybrid")
    state = below("language_model.", dict(twins.reference.named_parameters()))
    parts = llm_weights.parts(twins.config.llm, cross_layers(twins.config))
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\] of 1"):
        joined(parts, {n: t for n, t in state.items() if "lm_head" not in n})
    with pytest.raises(ValueError, match=r"surplus .*layers.1.cross_attn.* of 12"):
        joined(llm_weights.parts(twins.config.llm), state)


# --- gates ---


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


# --- who sees what ---


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


# --- training on anything ---


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
@pytest.mark.parametrize("rows", [[[TEXT], [TEXT, TEXT]], []], ids=["text", "nothing"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_batch_without_pictures_trains_all_that_learns(arch, rows, stage):
    """Data-parallel ranks wait for each other's gradients, so each parameter must have one, even if it is zero."""
    twins = build_twins(small_config(f"arch={arch}", f"stage={stage}"))
    freeze(twins.model, twins.config)
    loss = twins.model(batch_of(rows, twins)).sum()
    torch.autograd.backward(loss)
    assert (loss > 1) == bool(rows)
    for name, parameter in parameters_of(twins.model).items():
        group = parameter_group(name)
        assert (parameter.grad is not None) == (group in twins.config.stage.trainable), name
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
            reached = bool(rows) and group == "llm"
            assert bool(parameter.grad.abs().max() > 0) == reached, name


WORDS = (
    "seven", " 42", "<|im_end|>", "<|im_start|>assistant\n", "<tile_1>", "</Image>", "\n", " caf\u00e9",
    "<Image>", "\u4e03", "{", "<box> (0, 0), (999, 999) </box>",
)  # fmt: skip


def random_story(seed: int) -> Story:
    """One to three exchanges, maybe after a system turn, with images anywhere, even in answers."""
    rng = random.Random(seed)
    turns = [("system", "".join(rng.choices(WORDS, k=2)))] if rng.random() < 0.3 else []
    grids = []
    for _ in range(rng.randint(1, 3)):
        for role in ("user", "assistant"):
            words = rng.choices(WORDS, k=rng.randint(0, 4))
            if rng.random() < (0.5 if role == "user" else 0.15):
                words.insert(rng.randint(0, len(words)), "<image>")
                grids.append(rng.choice([*GRIDS.values()]))
            turns.append((role, "".join(words)))
    return Story(f"random-{seed}", tuple(turns), tuple(grids), rng.choice(["marks", "parts"]))


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_labels_spell_what_the_assistant_says_and_nothing_else(arch, tag):
    tokenizer = load_tokenizer("tiny")
    roomy = dict(seq_length=4096, cross_length=4096)
    config = small_config(f"arch={arch}", f"tiling.tag={tag}")
    config = replace(config, data=replace(config.data, **roomy))
    pictures = 0
    for seed in range(40):
        story = random_story(seed)
        pictures += len(story.grids)
        sample = sample_of(story, config)
        at = (sample.labels != IGNORE).nonzero().flatten()
        assert torch.equal(sample.labels[at], sample.tokens[at + 1])  # the token that comes next
        spoken: list[list[int]] = [[]]
        for token in sample.labels[at].tolist():
            assert token >= 0
            spoken[-1].append(token)
            if token == tokenizer.im_end:
                spoken.append([])
        assert spoken.pop() == []
        expected = [words.replace("<image>", "") for role, words in story.turns if role == "assistant"]
        assert [tokenizer.decode(ids[:-1]) for ids in spoken] == expected
        assert sample.labels.tolist() == reference_sample(story, config).labels
    assert pictures > 30


# --- placeholders ---


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


# --- packing, freezing, recomputing ---


@pytest.mark.parametrize("model", MODELS)
def test_a_packed_row_holds_the_losses_of_its_samples_alone(model):
    twins = twins_with(MODELS[model])
    rows = [[TEXT, TWO, ONE, ONE_TILE], [SIDE_BY_SIDE, ONE]]
    together = batch_of(rows, twins)
    with torch.no_grad():
        packed = twins.model(together).view_as(together.tokens)  # rows may come in a line
        for row, stories in enumerate(rows):
            at = 0
            for story in stories:
                batch = batch_of([[story]], twins)
                alone = twins.model(batch)[0, : batch.num_tokens]
                assert alone.max() > 1
                here = slice(at, at + len(alone))
                assert_near(packed[row, here], alone, story.name)
                # Rotary angles are relative, so the losses would not tell.
                assert together.positions[row, here].tolist() == list(range(len(alone)))
                at += len(alone)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_what_learns_in_pretraining_gets_the_references_gradients(model, recompute):
    """The language model is frozen. The encoder never learns, and encoding keeps no graph that would hold
    activations."""
    overrides, rows = MODELS[model], INPUTS["packed rows"]
    twins = build_twins(small_config(*overrides, "stage=pretrain", f"train.recompute={recompute}"))
    freeze(twins.model, twins.config)
    batch = batch_of(rows, twins)
    assert not batch.features.requires_grad and batch.features.grad_fn is None
    torch.autograd.backward(twins.model(batch).sum())
    frozen = {name for name, p in parameters_of(twins.model).items() if p.grad is None}
    assert frozen == {name for name, _ in parameters_of(twins.model).items() if parameter_group(name) == "llm"}
    encoder = twins.vision.encoder
    assert not encoder.training
    assert all(not p.requires_grad and p.grad is None for p in encoder.parameters())

    zeros = {name: torch.zeros_like(p) for name, p in parameters_of(twins.model).items()}
    mine = {name: zeros[name] if p.grad is None else p.grad for name, p in parameters_of(twins.model).items()}
    parts = [reference_result(overrides, "1d", story)[1] for row in rows for story in row]
    learning = [name for name in parts[0] if name.startswith(("mlp1.", "cross_keys.")) or ".cross_attn." in name]
    assert len(learning) == len(zeros) - len(frozen) + len(cross_layers(twins.config))  # k and v lie in one
    gradients = to_reference(mine, twins.config)
    assert_gradients_near({n: gradients[n] for n in learning}, {n: sum(p[n] for p in parts) for n in learning})


@pytest.mark.parametrize("rows", ["packed rows", "text alone"])
@pytest.mark.parametrize("stage", ["sft", "pretrain"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_recomputing_changes_nothing(arch, stage, rows):
    results, calls = [], []
    for recompute in ("none", "selective", "full"):
        twins = build_twins(small_config(f"arch={arch}", f"stage={stage}", f"train.recompute={recompute}"))
        freeze(twins.model, twins.config)
        count, last = [], twins.model.decoder.layers[-1]
        for what, part in (("layer", last), ("mlp", last.mlp.linear_fc1)):
            part.register_forward_pre_hook(lambda module, _, what=what, count=count: count.append(what))
        loss = twins.model(batch_of(INPUTS[rows], twins))
        torch.autograd.backward(loss.sum())
        gradients = {n: p.grad for n, p in parameters_of(twins.model).items() if p.requires_grad}
        assert gradients and all(gradient is not None for gradient in gradients.values())
        results.append({"loss": loss.detach(), **gradients})
        calls.append(Counter(count))
    assert [(c["layer"], c["mlp"]) for c in calls] == [(1, 1), (1, 2), (2, 2)]
    for result in results[1:]:
        for name, expected in results[0].items():
            assert_near(result[name], expected, name, GRADIENT)


def test_generation_prompts_end_where_the_assistant_begins():
    config = small_config("arch=decoder")
    processor = build_processor(config, placement_rule(config.arch.name))
    whole, prompt = (
        encode(record_of(TWO), processor),
        encode(first_question(record_of(TWO))[0], processor, generate=True),
    )
    assert torch.equal(prompt.tokens, whole.tokens[: len(prompt.tokens)])
    first = (whole.labels != IGNORE).nonzero()[0].item()
    assert len(prompt.tokens) == first + 1 and (prompt.labels == IGNORE).all()
