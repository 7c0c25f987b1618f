"""The benchmarks' peers do the same work: with our weights they give our loss and our gradients (fp32)."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.peers import Peer, llava_model, transformers_model
from nvlm.arch.base import VisionLanguageModel
from nvlm.arch.pipeline import build_parts
from nvlm.attention.choice import GPU_WITH_TE
from nvlm.config.values import Config
from nvlm.data.batch import Sample
from nvlm.data.pack import collate
from nvlm.inputs.sources import projector_parts, whole_model
from nvlm.vision.encoders.internvit import description as internvit
from nvlm.vision.encoders.internvit.model import InternViT
from nvlm.vision.path import VisionPath, solo_groups
from nvlm.weights import llm
from nvlm.weights.parts import below, joined, published, shapes
from nvlm.weights.published import LANGUAGE, VISION
from tests.models import STD, TILE, load, parameters_of, sample_of, small_config
from tests.stories import ONE, ONE_TILE, SIDE_BY_SIDE, TEXT, TWO

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PEERS = {"LLaVAModel": llava_model, "transformers": transformers_model}
LLAMA3 = "{factor:4.0,low_freq_factor:1.0,high_freq_factor:4.0,original_max_position_embeddings:8192.0}"
SHAPES = {
    "qwen2": (),
    "llama": ("llm.qkv_bias=false",),
    "llama 3.1": ("llm.qkv_bias=false", "llm.rope_theta=1e8", f"llm.rope_scaling={LLAMA3}"),
    "tied": ("llm.tied=true",),
    "InternViT-300M": ("vision.norm=layer", "vision.qkv_bias=true", "vision.qk_norm=false"),
    "recomputed": ("train.recompute=full",),
}
INPUTS = {
    "one": [ONE],
    "equal lengths": [ONE, ONE, ONE],
    "all lengths": [TWO, TEXT, ONE_TILE, SIDE_BY_SIDE],
    "text alone": [TEXT],
}
LOSS, GRADIENT = 2e-6, 4e-5  # of the loss, of a tensor's largest gradient; 1.6e-7 and 4.8e-6 at worst


@dataclass(frozen=True, slots=True)
class Ours:
    """Our model and encoder, and their weights in published form."""

    config: Config
    model: VisionLanguageModel
    vision: VisionPath
    weights: dict[str, Tensor]

    def step(self, samples: Sequence[Sample]) -> tuple[float, dict[str, Tensor]]:
        """The mean loss and its gradients, under published names."""
        self.model.zero_grad(set_to_none=False)
        batch = self.vision.encode(collate([samples], TILE))
        loss = self.model(batch).sum() / batch.num_trained
        loss.backward()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters_of(self.model).items()}
        return float(loss), published(learning(self.config), gradients)


def learning(config: Config) -> list:
    return [*below(LANGUAGE, llm.parts(config.llm)), *projector_parts(config)]


def ours_of(*overrides: str) -> Ours:
    config = small_config("arch=decoder", "tiling.tag=none", *overrides)
    generator, weights = torch.Generator().manual_seed(1), {}
    for name, shape in shapes(whole_model(config, internvit.parts(config.vision))).items():
        about = 1 if "norm" in name and name.endswith("weight") or ".ls" in name else 0
        weights[name] = about + STD * torch.randn(shape, generator=generator)
    encoder = {name: weights[name] for name in weights if name.startswith(VISION)}
    (model,), vit = build_parts(config), InternViT(config, solo_groups())
    load(model, joined(learning(config), {name: weights[name] for name in weights.keys() - encoder.keys()}))
    load(vit, joined(below(VISION, internvit.parts(config.vision)), encoder))
    return Ours(config, model, VisionPath(vit, config.vision), weights)


def assert_same_work(peer: Peer, ours: Ours, samples: list[Sample]) -> None:
    expected, gradients = ours.step(samples)
    assert math.isfinite(expected) and abs(peer.step(samples) - expected) < LOSS * expected
    theirs, tiles = peer.gradients(), sum(len(sample.pixels) for sample in samples)
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert bool(gradient.any()) == ("mlp1" not in name or tiles > 0), name
        assert (theirs[name] - gradient).abs().max() <= GRADIENT * gradient.abs().max(), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", PEERS)
def test_with_our_weights_a_peer_loses_and_learns_as_we_do(kind, shape, megatron):
    ours = ours_of(*SHAPES[shape])
    peer = PEERS[kind](ours.config, CPU, ours.weights)
    for stories in INPUTS.values():  # one after the other: no step's gradients stay for the next
        assert_same_work(peer, ours, [sample_of(story, ours.config) for story in stories])


@pytest.mark.parametrize(("kind", "gradients"), [("LLaVAModel", torch.float32), ("transformers", torch.bfloat16)])
def test_in_bf16_a_peer_is_as_near_to_fp32_as_we_are(kind, gradients, megatron):
    exact, ours = ours_of(), ours_of("precision=bf16")
    samples = [sample_of(story, ours.config) for story in INPUTS["all lengths"]]
    peer = PEERS[kind](ours.config, CPU, ours.weights)
    expected = exact.step(samples)[0]
    for loss in (ours.step(samples)[0], peer.step(samples)):
        assert abs(loss - expected) < 2e-3 * expected  # 2.5e-4 at worst
    assert {gradient.dtype for gradient in peer.gradients().values()} == {gradients}


@pytest.mark.parametrize("kind", PEERS)
def test_a_peer_begins_with_random_weights_of_its_own(kind, megatron):
    """Even if ours are read from files and left uninitialized until then."""
    config = small_config("arch=decoder", "tiling.tag=none", "init.vision=null", "init.release=anywhere")
    samples = [sample_of(story, config) for story in (TWO, ONE)]
    peer = PEERS[kind](config, CPU)
    first = peer.step(samples)
    assert abs(first - math.log(config.llm.vocab)) < 0.5
    assert peer.step(samples) == first
    assert all(bool(gradient.any()) for name, gradient in peer.gradients().items())


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine")
@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed", "fp8_current"])
def test_of_transformer_engines_layers_it_is_made_of_the_same_weights(precision, monkeypatch, megatron):
    """Transformer Engine's layers can be built without a GPU, but not called."""
    widths = ("llm.hidden=32", "llm.ffn=64", "llm.head_dim=8", "vision.hidden=32", "vision.heads=4", "vision.ffn=64")
    ours, made = ours_of(f"precision={precision}", *widths), []
    monkeypatch.setattr("benchmarks.peers.wrap", lambda model, config: made.append(model))
    monkeypatch.setattr("nvlm.llm.backend.this_machine", lambda: GPU_WITH_TE)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        llava_model(ours.config, CPU, ours.weights)  # all of the weights, each in its place by name and shape
    [model] = made
    recipes = [m.config.fp8_recipe if m.config.fp8 else None for m in (model.language_model, model.vision_projection)]
    assert recipes == [ours.config.precision.recipe] * 2 and not model.vision_model.config.fp8
    fused = [m.fuse_wgrad_accumulation for m in model.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    config = ours.config
    assert fused.count(True) == 4 * config.llm.layers + 2 and fused.count(False) == 4 * config.vision.layers
    norm = model.vision_projection.encoder.linear_fc1.layer_norm_bias
    assert torch.equal(norm, ours.weights["mlp1.0.bias"].bfloat16())


COMPILED = """
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks import peers
from benchmarks.gpu_parts.sizes import TOY, a_row
from nvlm.commands.compose import compose_config


def compile_layer(layer, **how):
    layer._compiled_call_impl = compile(layer._call_impl, backend=counter, **how)

counter, compile = CompileCounter(), torch.compile
torch.nn.Module.compile, torch.compile = compile_layer, lambda function, **how: function
config = compose_config(*TOY, "arch=decoder", "precision=fp32", "tiling.tag=none", "vision.layers=3")
model, samples = peers._Tiles(config, "sdpa"), a_row(config, 2, 64, 300)
peers._compile(model)
model(pixels=peers._pixels(samples).float(), **peers._rows(samples, False, torch.device("cpu")))
assert len(model.language_model.model.layers) == 5 and counter.frame_count == 2, counter.frame_count
"""


@pytest.mark.slow
def test_layers_of_a_kind_are_compiled_once():
    """Compiling each of 21 layers would take minutes of a borrowed GPU."""
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
