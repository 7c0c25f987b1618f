"""Parameter counts: from models on the meta device, calculated, and published (NVLM section 4.5, model cards)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from omegaconf import OmegaConf

from nvlm.commands.compose import CONF
from nvlm.config.mapping import from_mapping
from nvlm.config.values import LLMConfig
from nvlm.estimate.memory import gpus_needed
from nvlm.estimate.parameters import Count, parameters
from nvlm.processes import groups

PUBLISHED = {  # llm, projector of D and H, projector of X without its norm
    "34b": (34_388_917_248, 408_970_240),
    "72b": (72_706_203_648, 620_717_056),
}


@pytest.fixture(scope="module")
def joined(configured):
    with groups.distributed(configured().parallel, seed=0):
        yield


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("size", ["34b", "72b"])
@pytest.mark.parametrize("letter", ["d", "x", "h"])
def test_all_recipes_build_with_exact_counts(configured, joined, letter, size, stage):
    from nvlm.arch.pipeline import build_parts
    from nvlm.train.optim import count_groups, freeze
    from nvlm.vision.encoders.internvit.model import InternViT
    from nvlm.vision.path import solo_groups

    config = configured(f"+experiment=nvlm_{letter}_{size}_{stage}", "dry_run=true")
    whole = dataclasses.replace(config, parallel=configured().parallel)
    with torch.device("meta"):
        (model,) = build_parts(whole)
        encoder = InternViT(whole, solo_groups()).requires_grad_(False)
    freeze(model, whole)
    counts = {count.name: count for count in count_groups([model], encoder)}
    built = {name: Count(all=count.parameters, learning=count.learning) for name, count in counts.items()}
    assert built == parameters(config)
    llm, projector = PUBLISHED[size]
    assert counts["vision"].parameters == 5_536_496_000
    assert counts["llm"].parameters == llm
    if letter != "x":
        assert counts["projector"].parameters == projector
    if letter == "d":
        total = sum(count.parameters for count in counts.values())
        assert total == {"34b": 40_334_383_488, "72b": 78_863_416_704}[size]
    learning = {name for name, count in counts.items() if count.learning}
    assert learning == set(config.stage.trainable) - ({"xattn"} if letter == "d" else set())
    assert all(not parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("arch", ["decoder", "hybrid"])
def test_adapters_are_counted_exactly(configured, joined, arch):
    from nvlm.arch.pipeline import build_parts
    from nvlm.train.optim import freeze

    config = configured(f"arch={arch}", "llm=yi-34b", "dry_run=true", "peft=lora", "peft.rank=8", "stage.new=[]")
    whole = dataclasses.replace(config, parallel=configured().parallel)
    with torch.device("meta"):
        (model,) = build_parts(whole)
    freeze(model, whole)
    learning = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "projector" not in name)
    counts = parameters(config)
    assert learning == counts["llm"].learning + counts["xattn"].learning > 0
    assert sum(p.numel() for p in model.parameters()) == sum(counts[g].all for g in ("projector", "xattn", "llm"))
    full = configured(f"arch={arch}", "llm=yi-34b", "dry_run=true")
    assert gpus_needed(config) < gpus_needed(full)


def test_gpus_needed_fall_with_more_shards(configured):
    def needed(*overrides):
        return gpus_needed(configured("llm=qwen2-72b", "dry_run=true", *overrides))

    assert needed() % 8 == 0
    assert needed("parallel.pipeline=4") < needed()
    assert needed("parallel.tensor=1", "parallel.sequence=false") is None
    assert needed("stage=pretrain") < needed()


PRESETS = {  # the numbers of parameters on the model cards, exact
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "vicuna-7b": 6_738_415_616,
    "vicuna-13b": 13_015_864_320,
    "mistral-7b": 7_241_732_096,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "yi-34b": 34_388_917_248,
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
    "qwen2-0.5b": 494_032_768,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


def counted(llm: LLMConfig) -> int:
    """The language model's parameters, by hand."""
    queries, keys, h = llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim, llm.hidden
    attention = 2 * h * (queries + keys) + llm.qkv_bias * (queries + 2 * keys) + llm.qk_norm * 2 * llm.head_dim
    return (2 - llm.tied) * llm.vocab * h + llm.layers * (attention + 3 * h * llm.ffn + 2 * h) + h


def preset(name: str) -> LLMConfig:
    """The language model in conf/llm/NAME.yaml, without Hydra, which takes longer."""
    common, own = (OmegaConf.load(CONF / "llm" / f"{file}.yaml").llm for file in ("common/large", name))
    return from_mapping(LLMConfig, OmegaConf.to_container(OmegaConf.merge(common, own)), "llm.")


def test_presets_have_their_published_numbers_of_parameters(configured):
    config = configured("llm=qwen3-8b", "arch=decoder")
    assert config.llm == preset("qwen3-8b")
    assert {*PRESETS, "tiny"} == {file.stem for file in (CONF / "llm").glob("*.yaml")}
    for name, published in PRESETS.items():
        llm = preset(name)
        assert llm.name == name and llm.layers % llm.cross_every == 0
        assert counted(llm) == published == parameters(dataclasses.replace(config, llm=llm))["llm"].all


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration_that_runs(configured, name):
    for arch in ("decoder", "hybrid"):
        config = configured(f"llm={name}", f"arch={arch}", "dry_run=true")
        assert config.llm == preset(name) and config.vision.name == "internvit-6b"
