"""Parameter counts: from models on the meta device, calculated, and published (NVLM section 4.5, model cards)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

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


def test_a_preset_has_its_published_number_of_parameters(configured):
    published = {"llama3.1-8b": 8_030_261_248, "qwen2-7b": 7_615_616_512}
    assert {llm: parameters(configured(f"llm={llm}", "arch=decoder"))["llm"].all for llm in published} == published
