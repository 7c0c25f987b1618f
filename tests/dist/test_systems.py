"""LLaVA-OneVision in every layout: a SigLIP that learns, AnyRes with its cap, videos, row ends, two linears and Qwen2.

The reference is transformers' class in fp64. Each layout reads its folder, so reading is tested as well; what each
picture's tokens are, how many and in which order, comes from transformers' own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from nvlm.arch.pipeline import build_parts
from nvlm.config.values import Config
from nvlm.data.batch import IGNORE, IMAGE
from nvlm.inputs.sources import whole_model
from nvlm.processes.groups import distributed
from nvlm.tiling import normalize
from nvlm.vision.encoders.registry import description_of
from nvlm.weights.layouts import LLAVA_HF
from nvlm.weights.parts import below as prefixed
from nvlm.weights.parts import published
from tests.dist.layouts import ALL, LAYOUTS, MICRO_BATCHES, Case, metadata, outcomes_of
from tests.models import TILE, Story, below, record_of, sample_of, small_config
from tests.near import assert_gradients_near
from tests.stories import BESIDE_A_VIDEO, TEXT, VIDEO

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

PLACEHOLDER = 343  # an id that no text uses; the one before it stands for videos
STEPS = (*MICRO_BATCHES[:2], (*MICRO_BATCHES[2], (BESIDE_A_VIDEO, TEXT), (VIDEO,)), *MICRO_BATCHES[3:])
GRIDS = ("1x1", "1x2", "2x1", "2x2", "1x3", "3x1", "3x2")
SETTINGS = (
    "arch=decoder", "vision.encoder=siglip", "vision.norm=layer", "vision.qkv_bias=true", "vision.qk_norm=false",
    "vision.downsample=1", "vision.norm_eps=1e-6", "projector=mlp2x_gelu", "tiling=anyres_max_9", "tiling.cap=2",
    f"tiling.pinpoints=[{','.join(GRIDS)}]", "tiling.max_tiles=6", "tiling.unpad=digits", "tiling.several=same",
    "data.image_marks=false", "stage.train_vision=true", "stage.new=[]", "llm.layers=4",
    "video.pool=bilinear", "video.separator=once", "video.frames=3",
)  # fmt: skip


def released(config: Config, folder: Path):
    """transformers' model with random weights, in fp64, saved to `folder` in fp32."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision, llm = config.vision, config.llm
    tower = SiglipVisionConfig(
        hidden_size=vision.hidden, intermediate_size=vision.ffn, num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads, image_size=TILE, patch_size=vision.patch, vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        hidden_size=llm.hidden, intermediate_size=llm.ffn, num_hidden_layers=llm.layers, num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads, head_dim=llm.head_dim, vocab_size=llm.vocab, rms_norm_eps=llm.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta}, tie_word_embeddings=False,
        max_position_embeddings=llm.max_positions,
    )  # fmt: skip
    pinpoints = [[int(rows) * TILE, int(cols) * TILE] for cols, rows in (grid.split("x") for grid in GRIDS)]
    whole = LlavaOnevisionConfig(
        vision_config=tower, text_config=text, image_token_index=PLACEHOLDER, video_token_index=PLACEHOLDER - 1,
        image_grid_pinpoints=pinpoints, vision_aspect_ratio="anyres_max_2", vision_feature_layer=-1,
        vision_feature_select_strategy="full", projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(whole)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return model.double()


def losses_of(model, story: Story, config: Config) -> Tensor:
    """The loss at each trained token of a story."""
    sample, known = sample_of(story, config), description_of(config.vision)
    pixels = normalize(sample.pixels, known.mean, known.std, torch.float64)
    tiles = pixels.split([plan.num_tiles for plan in _plans(story, config)])
    images = [torch.cat((each[-1:], each[:-1])) for each in tiles[: len(story.grids)]]  # theirs: whole picture first
    shown = {}
    if images:
        most = max(map(len, images))
        padded = [torch.cat((image, image.new_zeros(most - len(image), *image.shape[1:]))) for image in images]
        sizes = [image.size[::-1] for image in record_of(story).images[: len(images)]]
        shown |= dict(pixel_values=torch.stack(padded), image_sizes=torch.tensor(sizes))
    if story.videos:
        shown |= dict(pixel_values_videos=torch.stack(tiles[len(images) :]))
    kinds = torch.where(sample.image < len(images), PLACEHOLDER, PLACEHOLDER - 1)
    ids = torch.where(sample.tokens == IMAGE, kinds, sample.tokens)
    assert not (sample.tokens >= PLACEHOLDER - 1).any()
    logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **shown).logits[0]
    labels = sample.labels
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")[labels != IGNORE]


def _plans(story: Story, config: Config):
    from nvlm.arch.registry import placement_rule
    from nvlm.data.outline import build_processor, outline

    return outline(record_of(story), build_processor(config, placement_rule("decoder"))).pictures.plans


@dataclass(frozen=True)
class Expected:
    """The reference's loss and gradients, and what every layout starts from."""

    case: Case
    loss: float
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Expected:
    folder = tmp_path_factory.mktemp("release")
    config = small_config(*SETTINGS, f"init.release={folder}", "init.vision=null", "dry_run=true")
    model = released(config, folder)
    stories = [story for rows in STEPS for row in rows for story in row]
    losses = torch.cat([losses_of(model, story, config) for story in stories])
    losses.mean().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return Expected(Case(config, folder, STEPS), float(losses.mean()), gradients)


@pytest.fixture(scope="module")
def outcomes(expected, tmp_path_factory):
    """What layouts.outcomes_of returns, by layout."""

    def cases(world: int) -> dict[str, Case]:
        return {layout: expected.case.laid_out(**sizes) for layout, sizes in LAYOUTS[world].items()}

    return outcomes_of(cases, tmp_path_factory)


def gradients_in(out: Path, config: Config, named: set[str]) -> dict[str, Tensor]:
    """The gradients that a layout wrote, under transformers' names."""
    with distributed(small_config().parallel, seed=0, threads=1):
        (model,) = build_parts(config)
        state = model.sharded_state_dict(metadata=metadata())
        loaded = dist_checkpointing.load({"part0": state}, str(out))["part0"]
        ours = {model.whole_name(name): tensor for name, tensor in loaded.items() if torch.is_tensor(tensor)}
        plain = dist_checkpointing.load_plain_tensors(str(out))
    of_encoder = below("vision.", plain)
    vision = prefixed(LLAVA_HF.vision[0], description_of(config.vision).parts(config.vision, {}))
    found = published(whole_model(config, (), LLAVA_HF), ours) | published(vision, of_encoder)
    return {_in_memory(name, named): tensor for name, tensor in found.items()}


def _in_memory(name: str, named: set[str]) -> str:
    name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "language_model")
    for choice in (name, f"model.{name}", f"model.{name}".replace("vision_tower.vision_model", "vision_tower")):
        if choice in named:
            return choice
    raise AssertionError(f"transformers has no {name}")


@pytest.mark.parametrize(("world", "layout"), ALL)
def test_loss_and_all_gradients_equal_transformers(world, layout, expected, outcomes):
    ranks, out = outcomes(world, layout)
    for rank in ranks:
        assert rank.loss == pytest.approx(expected.loss, rel=1e-5)
        assert rank.copies_differ == 0
    got = gradients_in(out, expected.case.config, set(expected.gradients))
    unused = {name for name in expected.gradients if "post_layernorm" in name}
    assert got.keys() == expected.gradients.keys() - unused
    # A tower's key biases change no attention weight: their gradients are zero but for rounding.
    idle = {name for name in got if "vision_tower" in name and name.endswith("k_proj.bias")}
    assert all(got[name].abs().max() < 1e-6 for name in idle)
    rest = got.keys() - idle
    assert_gradients_near({n: got[n] for n in rest}, {n: expected.gradients[n] for n in rest}, cancelling=1e-5)
    norm = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    assert all(rank.grad_norm == pytest.approx(float(norm), rel=1e-5) for rank in ranks)
