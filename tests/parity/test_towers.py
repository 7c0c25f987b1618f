"""SigLIP and CLIP have the features of transformers' own classes, from folders in the layouts that are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nvlm.commands.compose import compose_config
from nvlm.config.values import Config, ConfigError
from nvlm.data.amounts import Work
from nvlm.estimate.flops import model_flops
from nvlm.estimate.parameters import parameters
from nvlm.inputs.check import check_weights
from nvlm.tiling import normalize
from nvlm.vision.encoders.registry import description_of
from nvlm.vision.path import VisionPath, build_vision, load_encoder, solo_groups
from nvlm.vision.pooling import pooled
from tests.published import scatter, write_shards

SIDE, LAYERS = 31, 2  # px: 7 patches of 4 px, and 3 px that are in none; of 3 published layers
SIZES = f"""vision.hidden=24 vision.layers={LAYERS} vision.heads=3 vision.ffn=36 vision.patch=4
vision.tile_size={SIDE} precision=fp32 tiling.max_tiles=2""".split()
FAMILIES = {"siglip": "vision=siglip-so400m", "clip": "vision=clip-l-336"}

pytestmark = pytest.mark.usefixtures("megatron")


def model_of(family: str) -> torch.nn.Module:
    """transformers' own class, with one layer more than is used, a final norm and, for SigLIP, a head."""
    kinds = {
        "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
        "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
    }
    described, model = kinds[family]
    sizes = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=36, patch_size=4)
    return scatter(model(described(image_size=SIDE, attn_implementation="eager", **sizes)), seed=4)


def tower_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its tensors without the prefix that the Hub's files have and transformers 5 does not."""
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor.clone() for name, tensor in tensors.items() if tensor.is_floating_point()}


def write(folder: Path, family: str, layout: str) -> torch.nn.Module:
    """`folder` in one of the published layouts; returns the model that it holds."""
    model, folder_config = model_of(family), folder / "config.json"
    tensors, values = tower_names(model), model.config.to_dict()
    if layout == "alone":
        save_file(tensors, folder / "model.safetensors")
        folder_config.write_text(json.dumps(values))
        return model
    tensors = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(49)[None]
    others = {"text_model.embeddings.token_embedding.weight": torch.ones(5, 3), "logit_scale": torch.ones(1)}
    write_shards(folder, tensors | others, files=2)
    folder_config.write_text(json.dumps({"model_type": family, "vision_config": values, "text_config": {}}))
    return model


def config_of(family: str, folder: Path, *words: str) -> Config:
    return compose_config(FAMILIES[family], *SIZES, f"init.vision={folder}", *words)


def pixels(count: int = 3) -> torch.Tensor:
    shape = (count, 3, SIDE, SIDE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", ["alone", "with a text model"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_those_of_transformers(tmp_path, family, layout):
    model, config = write(tmp_path, family, layout), config_of(family, tmp_path)
    known, place = description_of(config.vision), torch.device("cpu")
    processor = {"siglip": transformers.SiglipImageProcessorFast, "clip": transformers.CLIPImageProcessorFast}[family]()
    assert list(known.mean) == pytest.approx(processor.image_mean) and list(known.std) == pytest.approx(
        processor.image_std
    )
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in (known.mean, known.std))
    normal = (pixels() / 255 - mean) / std
    every = model(normal, output_hidden_states=True).hidden_states
    expected = every[LAYERS][:, -49:]  # without CLIP's class token
    assert float((expected - every[LAYERS + 1][:, -49:]).abs().max()) > 0.1
    trained, frozen = load_encoder(config, place).eval()(normal), build_vision(config, place).features(pixels())
    torch.testing.assert_close(trained, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(frozen, expected.flatten(0, 1), atol=1e-4, rtol=0)
    padded = known.frozen(load_encoder(config, place), config.vision, 16)(normal)
    torch.testing.assert_close(padded, expected, atol=1e-4, rtol=0)


def test_tiles_of_which_fewer_tokens_are_expected_are_pooled(tmp_path):
    """As frames of videos before the projector; forward and backward, calls and runs of tiles in any order."""
    write(tmp_path, "siglip", "alone")
    config = config_of("siglip", tmp_path, "vision.tiles_per_call=2", "vision.tiles_per_backward=2")
    path = VisionPath(load_encoder(config, torch.device("cpu")), config.vision, learns=True, frames="bilinear")
    tiles, tokens_T = pixels(5), torch.tensor([49, 16, 49, 16, 16])
    mean, std = description_of(config.vision).mean, description_of(config.vision).std
    whole = path.encoder(normalize(tiles, mean, std))
    expected = torch.cat([whole[0], pooled(whole[1:2], 2, "bilinear")[0], whole[2], *pooled(whole[3:], 2, "bilinear")])
    torch.testing.assert_close(path.features(tiles, tokens_T), expected.detach())
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    right = torch.autograd.grad(expected, list(path.encoder.parameters()), gradient)
    path.backward(tiles, gradient, tokens_T)
    for parameter, one in zip(path.encoder.parameters(), right, strict=True):
        torch.testing.assert_close(parameter.grad, one, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="features of a tile: got 49 tokens, expected 17"):
        path.features(tiles[:1], torch.tensor([17]))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_counted_as_built(tmp_path, family):
    write(tmp_path, family, "alone")
    config = config_of(family, tmp_path)
    encoder = description_of(config.vision).build(config, solo_groups())
    assert parameters(config)["vision"].all == sum(p.numel() for p in encoder.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        encoder.requires_grad_(False)(torch.zeros(2, 3, SIDE, SIDE))
    assert counted.get_total_flops() == model_flops(config, Work(tiles=2)).vision


@pytest.mark.parametrize(
    ("family", "words", "says"),
    [
        ("siglip", ("vision.hidden=48",), "config.json: hidden_size: got 24, expected vision.hidden=48. Fix: vision.h"),
        ("siglip", ("vision.tile_size=28",), "image_size: got 31, expected vision.tile_size=28"),
        ("siglip", ("vision.layers=4",), "num_hidden_layers: got 3, expected vision.layers=4. Fix: vision.layers=3"),
        ("clip", ("vision.norm_eps=1e-6",), "layer_norm_eps: got 1e-05, expected vision.norm_eps=1e-06"),
        ("clip", (FAMILIES["siglip"],), "model_type: got clip_vision_model, expected siglip_vision_model, vision=sig"),
    ],
)
def test_another_encoder_s_folder_is_refused(tmp_path, family, words, says):
    write(tmp_path, family, "alone")
    with pytest.raises(ConfigError) as caught:
        check_weights(config_of(family, tmp_path, *words))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_the_features_need_must_be_there(tmp_path):
    write(tmp_path, "clip", "alone")
    tensors = tower_names(model_of("clip"))
    del tensors["encoder.layers.1.mlp.fc2.bias"]
    save_file(tensors | {"encoder.norm.weight": torch.ones(24)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="no encoder.layers.1.mlp.fc2.bias; encoder.norm.weight, which the model d"):
        check_weights(config_of("clip", tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="got pytorch_model.bin, a pickle, .* Fix: take the model's safetensors fil"):
        check_weights(config_of("clip", tmp_path))


@pytest.mark.parametrize(
    ("family", "described"), [("siglip", transformers.SiglipVisionConfig), ("clip", transformers.CLIPVisionConfig)]
)
def test_what_a_file_leaves_out_means_transformers_default(tmp_path, family, described):
    default = described()
    sizes = f"""vision.hidden={default.hidden_size} vision.heads={default.num_attention_heads}
    vision.layers={default.num_hidden_layers} vision.ffn={default.intermediate_size} vision.patch={default.patch_size}
    vision.tile_size={default.image_size} vision.norm_eps={default.layer_norm_eps}""".split()
    room = ("arch=decoder", "tiling.max_tiles=1", "data.seq_length=2000")
    vision = compose_config(FAMILIES[family], *room, *sizes).vision
    description_of(vision).check_config({}, vision, "init.vision")


@pytest.mark.parametrize("preset", ["siglip-tiny", "clip-tiny"])
def test_tiny_encoders_ship_with_weights(configured, preset):
    """Which tell one picture from another, and serve every architecture as vision=tiny does."""
    config = configured(f"vision={preset}", "precision=fp32")
    check_weights(config)
    side = config.vision.tile_size
    tiles = torch.full((2, 3, side, side), 255, dtype=torch.uint8)
    tiles[1, :, 30:60, 40:44] = 0  # a stroke
    blank, stroke = build_vision(config, torch.device("cpu")).features(tiles).unflatten(0, (2, -1))
    assert blank.shape == (16, config.vision.feature_width)
    change = (stroke - blank).norm(dim=-1) / blank.norm(dim=-1)
    assert change[5] > 0.3 and change[15] < change[5]  # of the cell with the stroke, and far from it


@pytest.mark.parametrize(
    ("preset", "count", "tokens"),
    [
        # Patches of 588 numbers, positions, perhaps class token and norm; a layer: 4 D^2 + 4 D, 2 D F + F + D, 4 D.
        ("siglip-so400m", 677_376 + 1_152 + 839_808 + 26 * (5_308_416 + 4_608 + 9_916_416 + 5_456 + 4_608), 729),
        (
            "clip-l-336",
            602_112 + 1_024 + 577 * 1_024 + 2_048 + 23 * (4_194_304 + 4_096 + 8_388_608 + 5_120 + 4_096),
            576,
        ),
    ],
)
@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_full_size_with_every_architecture(configured, arch, preset, count, tokens):
    config = configured(f"arch={arch}", f"vision={preset}", "llm=qwen2-7b", "dry_run=true", "tiling.max_tiles=1")
    assert parameters(config)["vision"].all == count
    assert config.vision.tile_tokens == tokens
    pooled = configured(f"vision={preset}", "pooling=concat_2x2", "llm=qwen2-7b", "dry_run=true")
    assert pooled.vision.tile_tokens == {729: 196, 576: 144}[tokens]
    assert pooled.vision.feature_width == 4 * config.vision.feature_width
