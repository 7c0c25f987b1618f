"""The reference compared with transformers' Qwen2, Llama and InternVL, and with literal examples.

Tolerances, relative to the largest value: 1e-5 in fp32 (worst seen 3.4e-6, another order of the same sums);
1e-12 in fp64 (worst seen 5e-15), once transformers' norms and rotary tables, which compute in fp32, are
replaced by fp64 ones. No wrong constant (an eps, a scale, a bias) passes the second.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.parity.reference import (
    CrossAttention,
    RefDims,
    ReferenceNVLM,
    RefSample,
    Segment,
    attend,
    pixel_shuffle,
    visibility,
)

DIMS = RefDims(
    vit_hidden=12,
    vit_layers=2,
    vit_heads=3,
    vit_ffn=20,
    patch=2,
    image=8,
    layers=4,
    hidden=20,
    heads=4,
    kv_heads=2,
    head_dim=6,  # not hidden / heads
    ffn=28,
    vocab=37,
    rope_theta=5000.0,
    eps=1e-5,
    qkv_bias=True,
    tied=False,
    arch="decoder",
    every=2,
)
K = DIMS.tokens_per_tile
STD = 0.3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def build(dtype=torch.float64, seed=1, gates=None, **changes) -> ReferenceNVLM:
    return ReferenceNVLM(dataclasses.replace(DIMS, **changes)).to(dtype).init(seed, STD, gates)


def text(*ids: int) -> Segment:
    return Segment("text", ids)


def tag(image: int, tile: int, *ids: int) -> Segment:
    return Segment("tag", ids, image, tile)


def tile(image: int, tile: int) -> Segment:
    return Segment("tile", (), image, tile)


def sample_of(stream: list[Segment], cross: list[Segment] = (), seed: int = 0) -> RefSample:
    """Random pixels for each named tile, and a label at two of three positions."""
    generator = torch.Generator().manual_seed(seed)
    keys = sorted({(s.image, s.tile) for s in [*stream, *cross] if s.kind == "tile"})
    shape = (3, DIMS.image, DIMS.image)
    tiles = {key: torch.randint(256, shape, generator=generator, dtype=torch.uint8) for key in keys}
    count = sum(K if s.kind == "tile" else len(s.ids) for s in stream)
    labels = [-100 if t % 3 == 1 else (5 * t + 2) % DIMS.vocab for t in range(count)]
    return RefSample(list(stream), list(cross), tiles, labels)


def xattn_sample() -> RefSample:
    """Image 0: two tiles and a thumbnail; image 1: one tile; text before, between and after."""
    stream = [text(1, 2), tag(0, 0, 3, 4), tag(0, 1, 3, 5), tag(0, 2, 6), text(7), tag(1, 0, 6), text(8, 9)]
    return sample_of(stream, [tile(0, 0), tile(0, 1), tile(0, 2), tile(1, 0)])


def hybrid_sample() -> RefSample:
    """Thumbnails in the stream; image 0 has two regular tiles, image 1 none, image 2 one."""
    stream = [text(1, 2), tag(0, 2, 6), tile(0, 2), text(7), tag(1, 0, 6), tile(1, 0), text(8)]
    stream += [tag(2, 1, 6), tile(2, 1), text(9, 10)]
    return sample_of(stream, [tag(0, 0, 3, 4), tile(0, 0), tag(0, 1, 3, 5), tile(0, 1), tag(2, 0, 3), tile(2, 0)])


def assert_near(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    limit = TOLERANCE[actual.dtype] * max(1.0, expected.abs().max().item())
    gap = (actual - expected).abs().max().item()
    assert actual.shape == expected.shape and gap <= limit, f"{what} differs by {gap:.1e}, limit {limit:.1e}"


class Rotary64(nn.Module):
    """Replaces transformers' rotary tables, which are fp32."""

    def __init__(self, theta: float, width: int) -> None:
        super().__init__()
        self.inverse = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)

    def forward(self, x, position_ids):
        angle = position_ids[..., None].double() * self.inverse
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


def to_fp64(model: nn.Module) -> nn.Module:
    """Transformers' model with its fp32 parts replaced by torch's RMSNorm and fp64 rotary tables."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight.data.copy_(child.weight.data)
                setattr(parent, name, norm)
    return model.double()


LANGUAGE_MODELS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, True, False),
    "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM, True, True),
    "llama": (LlamaConfig, LlamaForCausalLM, False, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_language_model_equals_transformers(kind, dtype):
    config_class, model_class, bias, tied = LANGUAGE_MODELS[kind]
    config = config_class(
        vocab_size=DIMS.vocab,
        hidden_size=DIMS.hidden,
        intermediate_size=DIMS.ffn,
        num_hidden_layers=DIMS.layers,
        num_attention_heads=DIMS.heads,
        num_key_value_heads=DIMS.kv_heads,
        head_dim=DIMS.head_dim,
        rms_norm_eps=DIMS.eps,
        rope_parameters={"rope_type": "default", "rope_theta": DIMS.rope_theta},
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    ours = build(dtype, qkv_bias=bias, tied=tied)
    theirs = model_class(config)
    theirs.load_state_dict(ours.language_model.state_dict(), strict=True)
    if dtype == torch.float64:
        theirs = to_fp64(theirs)
        theirs.load_state_dict(ours.language_model.state_dict(), strict=True)
        theirs.model.rotary_emb = Rotary64(DIMS.rope_theta, DIMS.head_dim)

    ids = torch.randint(DIMS.vocab, (23,), generator=torch.Generator().manual_seed(0))
    sample = sample_of([text(*ids[:9].tolist()), text(*ids[9:].tolist())])
    expected = theirs(ids[None]).logits[0]
    assert expected.abs().max() > 1
    assert_near(ours.logits(sample), expected, "logits")

    ours(sample).sum().backward()
    F.cross_entropy(expected, torch.tensor(sample.labels), reduction="sum").backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(gradients) == {name for name, _ in ours.language_model.named_parameters()}
    for name, parameter in ours.language_model.named_parameters():
        assert_near(parameter.grad, gradients[name], name)


def to_internvl(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of vision_model.* -> names of transformers' InternVLVisionModel."""
    words = [
        ("embeddings.class_embedding", "embeddings.cls_token"),
        ("embeddings.position_embedding", "embeddings.position_embeddings"),
        ("embeddings.patch_embedding", "embeddings.patch_embeddings.projection"),
        ("encoder.layers", "encoder.layer"),
        (".attn.", ".attention."),
        (".proj.", ".projection_layer."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".ls1", ".lambda_1"),
        (".ls2", ".lambda_2"),
    ]
    out = {}
    for name, value in state.items():
        for ours, theirs in words:
            name = name.replace(ours, theirs)
        if name.endswith(".qkv.weight"):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[name.replace(".qkv.", f".{part}_proj.")] = rows
        else:
            out[name] = value
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_vision_encoder_equals_transformers(dtype):
    config = InternVLVisionConfig(
        hidden_size=DIMS.vit_hidden,
        num_hidden_layers=DIMS.vit_layers,
        num_attention_heads=DIMS.vit_heads,
        intermediate_size=DIMS.vit_ffn,
        attention_bias=False,
        use_qk_norm=True,
        norm_type="rms_norm",
        layer_norm_eps=1e-6,
        image_size=DIMS.image,
        patch_size=DIMS.patch,
        use_mean_pooling=True,  # which is how it spells "no final norm"
        attn_implementation="sdpa",
    )
    ours = build(dtype)
    theirs = InternVLVisionModel(config).eval()
    if dtype == torch.float64:
        theirs = to_fp64(theirs)
    theirs.load_state_dict(to_internvl(ours.vision_model.state_dict()), strict=True)

    tiles = sample_of([tile(0, 0), tile(0, 1)]).tiles
    for key, features in ours.vision_features(tiles).items():
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=dtype)[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225], dtype=dtype)[:, None, None]
        pixels = (tiles[key].to(dtype) / 255 - mean) / std
        expected = theirs(pixels[None]).last_hidden_state[0, 1:]
        # A 4x4 grid of patches, so four blocks; the numbers are patch indices in reading order.
        blocks = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
        assert_near(features, torch.stack([expected[block].flatten() for block in blocks]), str(key))
        assert not features.requires_grad


def test_pixel_shuffle_order():
    patches = torch.tensor([[10.0 * i, 10.0 * i + 1] for i in range(16)])
    shuffled = pixel_shuffle(patches, side=4)
    assert shuffled[0].tolist() == [0, 1, 10, 11, 40, 41, 50, 51]
    assert shuffled[1].tolist() == [20, 21, 30, 31, 60, 61, 70, 71]
    assert shuffled[:, 0].tolist() == [0, 20, 80, 100]


def test_pixel_shuffle_equals_released_v2():
    """The view-and-transpose form of the released code."""
    side, width = 6, 5
    patches = torch.randn(side * side, width)
    x = patches.view(side, side // 2, 2 * width).transpose(0, 1).contiguous()
    x = x.view(side // 2, side // 2, 4 * width).transpose(0, 1).reshape(-1, 4 * width)
    assert torch.equal(pixel_shuffle(patches, side), x)


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_projector(arch):
    model = build(arch=arch)
    x = torch.randn(3, 4 * DIMS.vit_hidden, dtype=torch.float64)
    weights = {name: p for name, p in model.named_parameters() if name.startswith("mlp1.")}
    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = (normed * weights["mlp1.0.weight"] + weights["mlp1.0.bias"]) @ weights["mlp1.1.weight"].T
    if arch != "xattn":
        expected = (expected * 0.5 * (1 + torch.erf(expected / 2**0.5))) @ weights["mlp1.3.weight"].T
    assert_near(model.mlp1(x), expected)
    assert len(weights) == (3 if arch == "xattn" else 4)


def test_parameter_names_and_shapes():
    model = build(arch="hybrid", layers=2, vit_layers=1)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    vision, layer = "vision_model.encoder.layers.0.", "language_model.model.layers.1."
    assert shapes["vision_model.embeddings.class_embedding"] == (1, 1, 12)
    assert shapes["vision_model.embeddings.position_embedding"] == (1, 17, 12)
    assert shapes["vision_model.embeddings.patch_embedding.weight"] == (12, 3, 2, 2)
    assert {n.removeprefix(vision): s for n, s in shapes.items() if n.startswith(vision)} == {
        "attn.qkv.weight": (36, 12),
        "attn.q_norm.weight": (12,),
        "attn.k_norm.weight": (12,),
        "attn.proj.weight": (12, 12),
        "attn.proj.bias": (12,),
        "norm1.weight": (12,),
        "norm2.weight": (12,),
        "ls1": (12,),
        "ls2": (12,),
        "mlp.fc1.weight": (20, 12),
        "mlp.fc1.bias": (20,),
        "mlp.fc2.weight": (12, 20),
        "mlp.fc2.bias": (12,),
    }
    cross = layer + "cross_attn."
    assert {n.removeprefix(cross): s for n, s in shapes.items() if ".cross_attn." in n} == {
        "norm.weight": (20,),
        "q_proj.weight": (24, 20),
        "k_proj.weight": (12, 20),
        "v_proj.weight": (12, 20),
        "o_proj.weight": (20, 24),
        "gate": (1,),
    }
    assert all(not p.requires_grad for n, p in model.named_parameters() if n.startswith("vision_model."))


def rows(matrix: list[str]) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in row.replace(" ", "")] for row in matrix])


def test_visibility_xattn():
    # keys, two per tile:  0.0 0.1 thumbnail, then image 1
    expected = rows(
        [
            "..  .. ..  ..",  # text before
            "..  .. ..  ..",
            "xx  .. ..  ..",  # both pieces of the first tag
            "xx  .. ..  ..",
            "..  xx ..  ..",
            "..  xx ..  ..",
            "..  .. xx  ..",  # thumbnail's tag
            "xx  xx xx  ..",  # text between
            "..  .. ..  xx",  # the one tile of image 1
            "xx  xx xx  xx",
            "xx  xx xx  xx",
        ]
    )
    assert torch.equal(visibility(xattn_sample(), "xattn", 2), expected)


def test_visibility_xattn_text_inside_a_block_and_images_without_tags():
    stream = [text(1), tag(0, 0, 3), text(2), tag(0, 1, 3), tag(1, 0), text(4), tag(2, 0), tag(3, 0), text(5)]
    sample = RefSample(stream, [tile(3, 0), tile(0, 0), tile(0, 1), tile(1, 0), tile(2, 0)])
    # keys, one per tile: image 3, 0.0, 0.1, 1, 2
    expected = rows([".....", ".x...", ".xx..", "..x..", ".xxx.", "xxxxx"])
    assert torch.equal(visibility(sample, "xattn", 1), expected)


def test_visibility_hybrid():
    # keys: tag tag tile, tag tag tile of image 0; tag tile of image 2 (one token per tile)
    none, first, both = "... ... ..", "xxx xxx ..", "xxx xxx xx"
    expected = rows([none, none, first, first, first, first, first, first, both, both, both, both])
    assert torch.equal(visibility(hybrid_sample(), "hybrid", 1), expected)


def test_visibility_without_keys():
    assert visibility(RefSample([text(1, 2), tile(0, 0)]), "hybrid", 4).shape == (6, 0)
    assert visibility(RefSample([]), "decoder", 4).shape == (0, 0)


def test_attend_equals_scaled_dot_product_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 6, generator=generator, dtype=torch.float64) for n, h in [(7, 4), (5, 2), (5, 2)])
    visible = torch.rand(7, 5, generator=generator) < 0.5
    visible[3] = False
    out = attend(q, k, v, visible)
    assert out[3].abs().max() == 0
    as_heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*as_heads, attn_mask=visible, enable_gqa=True)[0]
    sighted = visible.any(1)
    assert_near(out[sighted], expected.transpose(0, 1).flatten(1)[sighted])


def test_cross_attention_equals_a_loop_over_queries():
    block = build(arch="xattn").language_model.model.layers[1].cross_attn
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(3, DIMS.hidden, generator=generator, dtype=torch.float64)
    kv = torch.randn(4, DIMS.hidden, generator=generator, dtype=torch.float64)
    seen = [[], [2], [0, 1, 3]]
    visible = torch.tensor([[x in keys for x in range(4)] for keys in seen])
    expected = torch.zeros_like(h)
    for s, keys in enumerate(seen):
        if not keys:
            continue
        normed = h[s] / (h[s].square().mean() + DIMS.eps).sqrt() * block.norm.weight
        heads = []
        for n in range(4):
            at, kv_at = slice(6 * n, 6 * n + 6), slice(6 * (n // 2), 6 * (n // 2) + 6)
            q = block.q_proj.weight[at] @ normed
            scores = torch.stack([q @ (block.k_proj.weight[kv_at] @ kv[x]) for x in keys]) / 6**0.5
            values = torch.stack([block.v_proj.weight[kv_at] @ kv[x] for x in keys])
            heads.append((scores.exp() / scores.exp().sum()) @ values)
        expected[s] = block.gate.tanh() * (block.o_proj.weight @ torch.cat(heads))
    assert_near(block(h, kv, visible), expected)


def test_cross_attention_stands_between_self_attention_and_mlp():
    model = build(arch="xattn", layers=1, every=1)
    layer = model.language_model.model.layers[0]
    h = torch.randn(5, DIMS.hidden, dtype=torch.float64)
    kv = torch.randn(3, DIMS.hidden, dtype=torch.float64)
    visible = torch.ones(5, 3, dtype=torch.bool)
    middle = h + layer.self_attn(layer.input_layernorm(h))
    middle = middle + layer.cross_attn(middle, kv, visible)
    x = layer.post_attention_layernorm(middle)
    gated = F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
    assert_near(layer(h, kv, visible), middle + layer.mlp.down_proj(gated))
    assert layer.cross_attn.gate.tanh().abs() > 0.4


@pytest.mark.parametrize(("layers", "every", "expected"), [(4, 2, [1, 3]), (5, 2, [1, 3]), (3, 1, [0, 1, 2])])
def test_which_layers_hold_cross_attention(layers, every, expected):
    model = build(arch="xattn", layers=layers, every=every)
    blocks = [layer.cross_attn for layer in model.language_model.model.layers]
    assert [i for i, block in enumerate(blocks) if isinstance(block, CrossAttention)] == expected


def test_zero_gates_xattn_is_the_language_model_on_the_same_words():
    sample = xattn_sample()
    plain = sample_of([text(*s.ids) for s in sample.stream])
    assert torch.equal(build(arch="xattn", gates=0.0).logits(sample), build().logits(plain))
    assert not torch.allclose(build(arch="xattn").logits(sample), build().logits(plain))


def test_zero_gates_hybrid_is_decoder_on_the_same_stream():
    sample = hybrid_sample()
    in_stream = {(s.image, s.tile) for s in sample.stream if s.kind == "tile"}
    tiles = {key: pixels for key, pixels in sample.tiles.items() if key in in_stream}
    plain = RefSample(sample.stream, [], tiles)
    assert torch.equal(build(arch="hybrid", gates=0.0).logits(sample), build().logits(plain))
    assert not torch.allclose(build(arch="hybrid").logits(sample), build().logits(plain))


def test_only_the_gate_learns_where_the_gate_is_zero():
    model = build(arch="xattn", gates=0.0)
    model(xattn_sample()).sum().backward()
    for name, parameter in model.named_parameters():
        if ".cross_attn." in name:
            assert bool(parameter.grad.abs().max() > 0) == name.endswith(".gate"), name


def test_bind_tags_needs_open_gates_and_a_tag():
    sample = hybrid_sample()
    for gates, same in [(0.0, True), (None, False)]:
        bound = build(arch="hybrid", gates=gates, bind_tags="mean").logits(sample)
        assert torch.allclose(bound, build(arch="hybrid", gates=gates).logits(sample)) == same
    untagged = dataclasses.replace(sample, cross=[s for s in sample.cross if s.kind == "tile"])
    bound = build(arch="hybrid", bind_tags="ordered").logits(untagged)
    assert torch.equal(bound, build(arch="hybrid").logits(untagged))


def test_stream_holds_words_and_bare_projected_tiles():
    """Computed by hand, also with bound tags: a tag in the stream adds nothing to the tile after it."""
    model = build(arch="hybrid", bind_tags="ordered")
    sample = sample_of([text(1), tag(0, 0, 6), tile(0, 0), text(2)])
    words = model.language_model.model.embed_tokens.weight
    tokens = model.mlp1(model.vision_features(sample.tiles)[0, 0])
    h = torch.cat([words[[1, 6]], tokens, words[[2]]])
    for layer in model.language_model.model.layers:
        h = layer(h, h[:0], torch.zeros(len(h), 0, dtype=torch.bool))
    expected = model.language_model.lm_head(model.language_model.model.norm(h))
    assert_near(model.logits(sample), expected)


@pytest.mark.parametrize("how", ["mean", "ordered"])
def test_bind_tags_adds_the_normed_mean_word_of_the_tag(how):
    model = build(arch="hybrid", bind_tags=how)
    tiles = {key: torch.zeros(K, DIMS.hidden, dtype=torch.float64) for key in [(0, 0), (0, 1)]}
    parts = model.keys([tag(0, 0, 3, 4), tile(0, 0), tile(0, 1)], tiles)
    words, scale = model.language_model.model.embed_tokens.weight, model.cross_keys["tag_norm"].weight

    def normed(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + DIMS.eps).sqrt() * scale

    assert_near(parts[:2], normed(words[[3, 4]]))
    second, half = words[4], DIMS.hidden // 2
    if how == "ordered":
        angles = torch.tensor([10.0 ** (-2 * h / DIMS.hidden) for h in range(half)], dtype=torch.float64)
        a, b = second[:half], second[half:]
        second = torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()])
    assert_near(parts[2 : 2 + K], normed((words[3] + second) / 2).expand(K, -1))
    assert parts[2 + K :].abs().max() == 0


@pytest.mark.parametrize("arch", ["xattn", "hybrid"])
def test_a_tile_reaches_exactly_the_positions_that_see_it(arch):
    """With cross-attention only in the last layer, other pixels change other logits, row by row."""
    model = build(arch=arch, every=DIMS.layers)
    sample = xattn_sample() if arch == "xattn" else hybrid_sample()
    visible, logits = visibility(sample, arch, K), model.logits(sample)
    column = 0
    for key in sample.cross:
        if key.kind == "tile":
            tiles = dict(sample.tiles)
            tiles[key.image, key.tile] = 255 - tiles[key.image, key.tile]
            changed = (model.logits(dataclasses.replace(sample, tiles=tiles)) != logits).any(dim=1)
            assert torch.equal(changed, visible[:, column]), key
        column += K if key.kind == "tile" else len(key.ids)


def test_decoder_stream_is_causal_and_holds_tiles():
    model = build()
    stream = [text(1), tag(0, 0, 3), tile(0, 0), tag(0, 1, 4), tile(0, 1), text(2)]
    sample = sample_of(stream)
    logits = model.logits(sample)
    tiles = dict(sample.tiles)
    tiles[0, 1] = 255 - tiles[0, 1]
    changed = (model.logits(dataclasses.replace(sample, tiles=tiles)) != logits).any(dim=1)
    assert changed.tolist() == [False] * (3 + K) + [True] * (K + 1)


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_loss_is_cross_entropy_and_text_alone_trains(arch):
    model = build(arch=arch)
    sample = sample_of([text(1, 2, 3, 4, 5)])
    loss, logits = model(sample), model.logits(sample)
    for t, label in enumerate(sample.labels):
        expected = torch.zeros((), dtype=torch.float64) if label == -100 else -logits[t].log_softmax(0)[label]
        assert_near(loss[t], expected)
    assert torch.equal(build(arch=arch).logits(sample), build().logits(sample))
    loss.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        if ".cross_attn." in name:
            assert parameter.grad.abs().max() == 0, name


@pytest.mark.parametrize("arch", ["xattn", "hybrid"])
def test_gradients_are_finite_and_reach_every_trained_parameter(arch):
    model = build(arch=arch, bind_tags="ordered" if arch == "hybrid" else "none")
    model(xattn_sample() if arch == "xattn" else hybrid_sample()).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("vision_model."):
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("arch", "sample"),
    [
        ("decoder", sample_of([tag(0, 0)], [tile(0, 0)])),
        ("xattn", sample_of([tile(0, 0)])),
        ("xattn", sample_of([text(1)], [tile(0, 0)])),
        ("hybrid", sample_of([tile(0, 0)], [text(1)])),
        ("decoder", RefSample([text(1), tile(0, 0)])),
        ("decoder", dataclasses.replace(sample_of([tile(0, 0)]), stream=[text(1)])),
    ],
)
def test_a_sample_without_meaning_is_refused(arch, sample):
    with pytest.raises(ValueError):
        build(arch=arch).logits(sample)


def test_labels_must_cover_the_expanded_stream():
    sample = sample_of([text(1), tile(0, 0)])
    with pytest.raises(ValueError, match="labels"):
        build()(dataclasses.replace(sample, labels=sample.labels[:-1]))
