"""The list of modules is the only description of the model: what is added to it is counted everywhere, and what is
built has exactly its parameters."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from nvlm.arch import registry
from nvlm.attention.choice import kernels_of
from nvlm.config.modules import Linear, Norm
from nvlm.data.amounts import Work
from nvlm.estimate import model
from nvlm.estimate.activations import kept
from nvlm.estimate.flops import hardware_flops
from nvlm.estimate.load import step_load
from nvlm.estimate.parameters import encoder_weights, held, parameters, weights
from nvlm.processes import groups

BUILT = {
    "NVLM-D": ("arch=decoder", "llm=qwen2-7b", "vision=internvit-300m"),
    "NVLM-D, with a longer projector": ("arch=decoder", "projector=mlp_downsample_3x3", "tiling=anyres"),
    "NVLM-D, norms of heads": ("arch=decoder", "llm=qwen3-0.6b", "vision=tiny"),
    "NVLM-X": ("arch=xattn", "llm=llama3.1-8b", "vision=internvit-6b", "stage=pretrain"),
    "NVLM-H, tied, adapters": ("arch=hybrid", "llm.tied=true", "peft=lora", "stage.new=[]"),
    "NVLM-H, adapters of cross-attention": ("arch=hybrid", "peft=lora", "stage.new=[]", "peft.targets=[xattn]"),
}


@pytest.fixture(scope="module")
def joined(configured):
    with groups.distributed(configured().parallel, seed=0):
        yield


@pytest.mark.parametrize("name", BUILT)
def test_every_parameter_that_is_built_is_in_the_list_by_name(configured, joined, name):
    from nvlm.arch.pipeline import build_parts
    from nvlm.train.optim import freeze
    from nvlm.vision.encoders.internvit.model import InternViT
    from nvlm.vision.path import solo_groups

    config = configured(*BUILT[name], "precision=fp32", "dry_run=true")
    config = replace(config, parallel=configured().parallel)
    with torch.device("meta"):
        (built,) = build_parts(config)
        encoder = InternViT(config, solo_groups()).requires_grad_(False)
    freeze(built, config)
    for listed, module in ((weights(config, 0), built), (encoder_weights(config), encoder)):
        wanted = Counter()
        for one in listed:
            wanted[one.name, one.size, one.learns] += one.count
        found = Counter((whole_name(n), p.numel(), p.requires_grad) for n, p in module.named_parameters())
        assert found == wanted


def whole_name(name: str) -> str:
    """The list names the modules of a layer without its number."""
    return re.sub(r"^decoder\.layers\.\d+\.", "", name)


@pytest.fixture
def with_module(monkeypatch):
    """A function that inserts one more module before the last one of NVLM-X's cross-attention."""

    def add(module) -> None:
        described = registry.description("xattn")

        def carried(llm):
            (branch,) = described.carried(llm)
            return (replace(branch, modules=(*branch.modules[:-1], module, branch.modules[-1])),)

        monkeypatch.setattr(model, "description", lambda name: replace(described, carried=carried))
        model._model.cache_clear()

    yield add
    model._model.cache_clear()


def numbers(config) -> dict[str, float]:
    """What one micro-batch costs, of 1000 tokens in FLOPs."""
    load = step_load(config, replicas=1)
    return {
        "parameters": parameters(config)["xattn"].all,
        "learning": held(config, 0).learning,
        "flops": hardware_flops(config, Work(tokens=1000)).total,
        "kept": kept(config, 0, load, kernels_of(config)).total,
        "tokens": load.tokens,
    }


def test_a_linear_that_is_added_to_the_list_is_counted_everywhere(configured, with_module):
    config = configured("arch=xattn", "precision=fp32")
    before, wide, layers = numbers(config), config.llm.hidden, len(model.model_of(config).carriers)
    with_module(Linear(name="cross_attention.extra", group="xattn", inputs=wide, outputs=3 * wide, split="outputs"))
    after = numbers(config)
    added = {key: after[key] - before[key] for key in before}
    assert layers > 0 and added["parameters"] == added["learning"] == layers * 3 * wide**2
    assert added["flops"] == 3 * 2 * 1000 * added["parameters"]  # forward, gradients of inputs and of weights
    assert added["kept"] == layers * before["tokens"] * wide * 4  # its input
    split = replace(config, parallel=replace(config.parallel, tensor=2))
    assert held(split, 0).learning < after["learning"]
    rank = {one.name: one.size for one in weights(split, 0)}
    assert rank["cross_attention.extra.weight"] == 3 * wide**2 // 2


def test_a_linear_that_does_not_learn_keeps_nothing(configured, with_module):
    config = configured("arch=xattn", "precision=fp32", "stage.train_xattn=false")
    before = numbers(config)
    wide = config.llm.hidden
    with_module(Linear(name="cross_attention.extra", group="xattn", inputs=wide, outputs=wide, split="outputs"))
    after = numbers(config)
    assert after["parameters"] > before["parameters"] and after["learning"] == before["learning"]
    assert after["kept"] == before["kept"]
    assert after["flops"] - before["flops"] == 2 * 2 * 1000 * (after["parameters"] - before["parameters"])


def test_a_norm_that_is_added_to_the_list_is_counted_everywhere(configured, with_module):
    config = configured("arch=xattn", "precision=fp32")
    before, wide, layers = numbers(config), config.llm.hidden, len(model.model_of(config).carriers)
    with_module(Norm(name="cross_attention.norm", group="xattn", width=wide))
    after = numbers(config)
    added = {key: after[key] - before[key] for key in before}
    assert added["parameters"] == added["learning"] == layers * wide
    assert added["kept"] == layers * before["tokens"] * (wide * 4 + 4)  # its input, and one factor a token
    assert added["flops"] == 0
