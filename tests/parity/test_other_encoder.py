"""A second encoder that only this test knows, to show that nothing outside vision/encoders knows the first.

It is one linear over patches: no class token, no layers, names, normalisation and token count of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nvlm.commands.compose import compose_config
from nvlm.config.modules import EncoderModules, Linear
from nvlm.config.values import Config, ConfigError
from nvlm.data.amounts import Work
from nvlm.estimate.flops import model_flops
from nvlm.estimate.memory import memory
from nvlm.estimate.parameters import parameters
from nvlm.export.describe import exported_encoder
from nvlm.inputs.check import check_weights
from nvlm.inputs.identity import of_encoder
from nvlm.vision.encoders.interface import EncoderDescription
from nvlm.vision.encoders.registry import ENCODERS
from nvlm.vision.path import build_vision
from nvlm.vision.source import vision_source
from nvlm.weights.parts import Part
from nvlm.weights.published import check_values

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
WIDTH, PATCH, SIDE = 6, 2, 8  # the last two px: 16 patches a tile, 4 tokens of width 24
SIZES = f"""vision.encoder=patches vision.hidden={WIDTH} vision.heads=1 vision.patch={PATCH} vision.tile_size={SIDE}
precision=fp32 tiling.max_tiles=2""".split()


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * PATCH**2, WIDTH)

    def forward(self, pixels):
        patches = nn.functional.unfold(pixels, PATCH, stride=PATCH)  # [T, 3 x patch x patch, P]
        return self.linear(patches.transpose(1, 2))


def parts(vision, stored):
    shapes = {"w": ("linear.weight", (WIDTH, 3 * PATCH**2)), "b": ("linear.bias", (WIDTH,))}
    return [Part(name=name, shape=shape, ours=ours) for name, (ours, shape) in shapes.items()]


def check_config(values, vision, key):
    check_values(values, {"width": ("vision.hidden", vision.hidden)}, key, values)


def modules(vision):
    linear = Linear(name="linear", group="vision", inputs=3 * PATCH**2, outputs=WIDTH, bias=True)
    patches = (SIDE // PATCH) ** 2
    return EncoderModules(embedding=(linear,), layer=(), layers=0, patches=patches, tokens=patches, width=WIDTH)


DESCRIPTION = EncoderDescription(
    name="patches", code=("patches.Patches",), mean=MEAN, std=STD, unseen=(), fixed={"qk_norm": True}, shipped={},
    crops=False,
    unneeded=lambda vision, name: name.startswith("pool."),
    modules=modules, parts=parts, check_config=check_config, export=None,
    build=lambda config, groups: Patches(), frozen=lambda encoder, vision, multiple: encoder,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Its published weights, with a head that the features do not need."""
    monkeypatch.setitem(ENCODERS, "patches", DESCRIPTION)
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(WIDTH, 3 * PATCH**2, generator=generator), "b": torch.randn(WIDTH, generator=generator)}
    save_file(weights | {"pool.w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"width": WIDTH, "auto_map": {"AutoModel": "patches.Patches"}}))
    return tmp_path


@pytest.fixture
def config(folder) -> Config:
    return compose_config(*SIZES, f"init.vision={folder}")


def test_its_features_are_those_of_its_weights(config, folder, megatron):
    pixels = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    path = build_vision(config, torch.device("cpu"))
    got = path.features(pixels)
    tokens = config.vision.tile_tokens
    assert got.numel() == 3 * tokens * 4 * WIDTH and tokens == 4
    weight = vision_source(config).folder
    assert weight == str(folder)
    normal = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    patch = normal[1, :, 2:4, 4:6].flatten()  # of the second row of patches, the third
    feature = patch @ path.encoder.linear.weight.t() + path.encoder.linear.bias
    token = got.view(3, tokens, 4 * WIDTH)[1, 1]  # the patches (0, 2), (0, 3), (1, 2), (1, 3)
    torch.testing.assert_close(token[2 * WIDTH : 3 * WIDTH], feature)
    assert not path.features(pixels[:0]).numel()


def test_it_is_checked_and_identified_by_its_own_rules(config, folder):
    check_weights(config)
    before = of_encoder(config)
    save_file({"w": torch.zeros(WIDTH, 12), "b": torch.zeros(WIDTH)}, folder / "model.safetensors")
    assert not of_encoder(config).same(before)
    with pytest.raises(ConfigError, match="config.json: width: got 6, expected vision.hidden=8"):
        check_weights(compose_config(*SIZES, "vision.hidden=8", f"init.vision={folder}"))
    with pytest.raises(
        ConfigError, match="vision.qk_norm: got False, expected true: vision.encoder=patches has no oth"
    ):
        compose_config(*SIZES, "vision.qk_norm=false")
    with pytest.raises(ConfigError, match="vision.encoder: got 'patchez', expected one of internvit, siglip, clip, p"):
        compose_config(*SIZES, "vision.encoder=patchez")


def test_it_is_counted_by_its_own_list(config):
    assert parameters(config)["vision"].all == sum(p.numel() for p in Patches().parameters())
    assert model_flops(config, Work(tiles=2)).vision == 2 * 16 * 2 * 3 * PATCH**2 * WIDTH
    assert memory(config, replicas=1).encoder == 4 * parameters(config)["vision"].all


def test_an_export_has_no_class_for_it(config):
    with pytest.raises(ConfigError, match="vision.encoder=patches: got no class in an export"):
        exported_encoder(config, vision_source(config))
