"""The three architectures compared with the plain reference, and invariants of each.

Ours computes in fp32, the reference in fp64 from the same weights; tests/near.py has the tolerances.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from nvlm.arch.groups import parameter_group
from nvlm.arch.pipeline import Pipeline, next_logits
from nvlm.attention.cache import generating
from nvlm.attention.kernels import per_sample
from nvlm.config.values import cross_layers
from nvlm.train.optim import freeze
from nvlm.vision.pooling import pixel_shuffle
from nvlm.weights import llm as llm_weights
from nvlm.weights.parts import joined
from tests.models import (
    batch_of,
    below,
    build_twins,
    parameters_of,
    reference_sample,
    small_config,
    to_ours,
    to_reference,
)
from tests.near import GRADIENT, assert_gradients_near, assert_near
from tests.parity.twins import (
    ARCHITECTURES,
    MODELS,
    TAGS,
    VARIANTS,
    K,
    assert_equals_reference,
    reference_result,
    twins_of,
    twins_with,
)
from tests.stories import INPUTS, ONE, ONE_TILE, SIDE_BY_SIDE, TEXT, TWO

pytestmark = pytest.mark.usefixtures("twins")


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
