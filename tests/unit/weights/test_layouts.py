"""Names of tensors in the layouts of whole models, against the published releases' names, written out by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from nvlm.commands.compose import compose_config
from nvlm.config.values import ConfigError
from nvlm.inputs.sources import projector_parts
from nvlm.weights.layouts import LLAVA, LLAVA_HF, NVLM, VILA, encoder_prefix, opened
from tests.published import SMALL

KINDS = [
    (LLAVA, "mlp2x_gelu", "model.mm_projector.0 model.mm_projector.2"),
    (LLAVA, "linear", "model.mm_projector"),
    (LLAVA_HF, "mlp2x_gelu", "multi_modal_projector.linear_1 multi_modal_projector.linear_2"),
    (VILA, "mlp2x_gelu", "layers.0 layers.2"),
    (VILA, "linear", "layers"),
    (VILA, "mlp_downsample", "layers.1 layers.2 layers.4"),
    (VILA, "mlp_downsample_3x3", "layers.1 layers.2 layers.4 layers.5 layers.7"),
    (NVLM, "mlp_downsample", "mlp1.0 mlp1.1 mlp1.3"),
]


@pytest.mark.parametrize(("layout", "kind", "names"), KINDS)
def test_the_projectors_names_are_the_published_ones(layout, kind, names):
    found = [part.name for part in projector_parts(compose_config(*SMALL, f"projector={kind}"), layout)]
    assert found == [f"{name}.{kind}" for name in names.split() for kind in ("weight", "bias")]


def test_a_learned_row_end_has_its_published_name():
    config = compose_config(*SMALL, "projector=mlp2x_gelu", "tiling=anyres", "vision.downsample=1")
    names = {layout.name: projector_parts(config, layout)[-1].name for layout in (LLAVA, LLAVA_HF)}
    assert names == {"llava": "model.image_newline", "llava-hf": "image_newline"}
    with pytest.raises(ConfigError, match="layout vila"):
        projector_parts(config, VILA)


FOLDERS = {
    LLAVA: ("model.mm_projector.0.weight", "model.vision_tower.vision_tower.vision_model."),
    LLAVA_HF: ("multi_modal_projector.linear_1.weight", "vision_tower.vision_model."),
    NVLM: ("mlp1.0.weight", "vision_model."),
}


@pytest.mark.parametrize("layout", FOLDERS, ids=lambda layout: layout.name)
def test_a_folder_is_recognised_by_its_tensors(tmp_path, layout):
    one, prefix = FOLDERS[layout]
    names = [one, f"{prefix}embeddings.patch_embedding.weight"]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    found, stored = opened(str(tmp_path), "init.release")
    assert (found, encoder_prefix(stored)) == (layout, prefix)


def test_both_spellings_of_llava_hf_and_an_encoder_alone():
    names = "vision_tower.embeddings.patch_embedding.weight", "vision_tower.embeddings.patch_embedding.bias"
    assert encoder_prefix(names) == "vision_tower."
    assert encoder_prefix(["text_model.x", "vision_model.embeddings.patch_embedding.weight"]) == "vision_model."
    assert encoder_prefix(["embeddings.patch_embedding.weight"]) == ""
    assert encoder_prefix(["other.embeddings.patch_embedding.weight"]) == ""


def test_a_folder_of_vila_has_three_folders(tmp_path):
    tensors = {"llm": "model.norm.weight", "vision_tower": "vision_model.head.probe", "mm_projector": "layers.0.bias"}
    for folder, name in tensors.items():
        (tmp_path / folder).mkdir()
        save_file({name: torch.zeros(1)}, tmp_path / folder / "model.safetensors")
    layout, stored = opened(str(tmp_path), "init.release")
    assert layout is VILA and stored.keys() == set(tensors.values())
    save_file({name: torch.zeros(1) for name in tensors.values()}, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(ConfigError, match="in two of them"):
        opened(str(tmp_path), "init.release")
