"""Low-rank adapters in one process: no effect at first, then equal to the reference with merged weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nvlm.arch.base import VisionLanguageModel
from nvlm.arch.groups import parameter_group
from nvlm.arch.pipeline import build_parts
from nvlm.data.batch import Batch
from nvlm.llm.adapters import Adapted
from nvlm.train.optim import freeze
from nvlm.weights.merge import adapter_names, is_adapter, merge
from tests.models import adapter_gradients, batch_of, build_twins, reference_sample, small_config
from tests.near import assert_gradients_near
from tests.stories import INPUTS, ONE, TEXT

LORA = ("peft=lora", "peft.rank=3", "peft.alpha=5", "stage.new=[]")  # cross-attention that has learned before
ARCHITECTURES = ("decoder", "xattn", "hybrid")
ROWS = INPUTS["packed rows"]

pytestmark = pytest.mark.usefixtures("megatron")


def merge_state(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """`state`, by name, with adapters merged into their weights."""
    merged = {name: tensor for name, tensor in state.items() if not is_adapter(name)}
    for name, tensor in merged.items():
        down, up = adapter_names(name)
        if down in state:
            merged[name] = merge(tensor, state[down], state[up], scale)
    return merged


@torch.no_grad()
def merge_in_place(model: torch.nn.Module) -> None:
    """Merge the adapters of `model` into its weights; they stay, with an `up` of zero."""
    for linear in model.modules():
        if isinstance(linear, Adapted):
            down, up = linear.adapter.down.weight, linear.adapter.up.weight
            linear.weight.copy_(merge(linear.weight, down, up, linear.adapter.scale))
            up.zero_()


def logits_of(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """Of all tokens, with the rows arranged as in training."""
    return model.logits(model.hidden(model.attends().arranged(batch).batch))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_fresh_one_is_the_base_bit_for_bit(arch, dropout):
    config = small_config(f"arch={arch}", *LORA, f"peft.dropout={dropout}")
    (base,), (adapted,) = build_parts(small_config(f"arch={arch}")), build_parts(config)
    weights = {name: p for name, p in adapted.named_parameters() if not is_adapter(name)}
    assert weights.keys() == dict(base.named_parameters()).keys()
    for name, parameter in base.named_parameters():
        assert torch.equal(weights[name], parameter), name
    adapters = {name: p for name, p in adapted.named_parameters() if is_adapter(name)}
    per_layer, crossed = 8, 6
    layers, carriers = config.llm.layers, config.llm.layers // config.arch.cross_every if arch != "decoder" else 0
    assert len(adapters) == per_layer * layers + crossed * carriers
    for name, parameter in adapters.items():
        assert parameter.any() == name.endswith(".down.weight"), name
    firsts = {round(float(p.flatten()[0] * p.shape[1] ** 0.5), 6) for n, p in adapters.items() if ".down." in n}
    assert len(firsts) == len(adapters) // 2  # each has numbers of its own
    batch = batch_of(ROWS, build_twins(small_config(f"arch={arch}")))
    with torch.no_grad():
        assert torch.equal(adapted(batch), base(batch))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("projector", ["true", "false"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adapters_alone_learn_in_their_groups_and_as_the_reference(arch, projector, recompute):
    options = (f"stage.train_projector={projector}", f"train.recompute={recompute}", "llm.qk_norm=true")
    twins = build_twins(small_config(f"arch={arch}", *LORA, *options))
    freeze(twins.model, twins.config)
    twins.model(batch_of(ROWS, twins)).sum().backward()
    for name, parameter in twins.model.named_parameters():
        learns = is_adapter(name) or (projector == "true" and parameter_group(name) == "projector")
        assert (parameter.grad is not None) == learns, name
    for story in (story for row in ROWS for story in row):
        twins.reference(reference_sample(story, twins.config)).sum().backward()
    named = {name: p for name, p in twins.reference.named_parameters() if p.requires_grad}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    got = {name: p.grad for name, p in twins.model.named_parameters() if is_adapter(name)}
    assert_gradients_near(got, adapter_gradients(twins, gradients))


@pytest.mark.parametrize("targets", [["llm"], ["xattn"]], ids=lambda targets: targets[0])
def test_groups_that_are_no_target_learn_as_the_stage_says(targets):
    config = small_config("arch=hybrid", *LORA, f"peft.targets=[{targets[0]}]")
    (model,) = build_parts(config)
    freeze(model, config)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (is_adapter(name) or parameter_group(name) not in targets), name
        assert not is_adapter(name) or parameter_group(name) in targets


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_merged_weights_give_the_adapted_logits(arch):
    config = small_config(f"arch={arch}", *LORA)
    twins, (plain,) = build_twins(config), build_parts(small_config(f"arch={arch}"))
    batch = batch_of([[ONE], [TEXT]], twins)
    with torch.no_grad():
        expected = logits_of(twins.model, batch)
        state = merge_state(dict(twins.model.named_parameters()), config.peft.scale)
        assert state.keys() == dict(plain.named_parameters()).keys()
        plain.load_state_dict(state, strict=False)
        merge_in_place(twins.model)
        for model in (plain, twins.model):
            assert (logits_of(model, batch) - expected).abs().max() < 1e-5 * expected.abs().max()
    again = merge_state(dict(twins.model.named_parameters()), config.peft.scale)
    assert all(torch.equal(again[name], state[name]) for name in state)  # nothing is merged twice


def test_merging_sums_in_fp32_and_keeps_the_type():
    weight = torch.full((2, 3), 256.0, dtype=torch.bfloat16)
    down, up = torch.full((4, 3), 0.5, dtype=torch.bfloat16), torch.full((2, 4), 0.75, dtype=torch.bfloat16)
    merged = merge(weight, down, up, 0.9)
    assert merged.dtype == torch.bfloat16 and (merged == 258).all()  # 256 + 1.35; each rank's 0.34 alone would be lost


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_dropout_is_for_training_alone_and_a_function_of_the_place(recompute):
    dropping = build_twins(small_config("arch=hybrid", *LORA, "peft.dropout=0.5", f"train.recompute={recompute}"))
    plain = build_twins(small_config("arch=hybrid", *LORA))
    batch = batch_of([[ONE]], plain)
    later = replace(batch, place=batch.place + (1 << 40), cross_place=batch.cross_place + (1 << 40))  # of another step
    freeze(dropping.model, dropping.config)

    def gradients(*batches: Batch) -> list[Tensor]:
        dropping.model.train().zero_grad()
        losses = [dropping.model(batch).sum() for batch in batches]  # as a pipeline does: several forward passes first
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for name, p in dropping.model.named_parameters() if is_adapter(name)]

    with torch.no_grad():
        expected = plain.model.eval()(batch)
        assert torch.equal(dropping.model.eval()(batch), expected)
        trained = [dropping.model.train()(each) for each in (batch, batch, later)]
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], expected) and not torch.equal(trained[0], trained[2])
    apart = [sum(pair) for pair in zip(gradients(batch), gradients(later))]
    for together, alone in zip(gradients(batch, later), apart):
        assert torch.allclose(together, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
