"""Generation with cached keys computes the same as a forward pass over the whole conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nvlm.arch.pipeline import Pipeline, next_logits
from nvlm.attention.cache import KeepsKeys, generating
from nvlm.data.batch import IGNORE, PAD, Sample
from nvlm.data.pack import collate
from nvlm.generate import decode
from nvlm.generate.decode import continue_rows
from nvlm.generate.sampling import Sampling
from nvlm.processes.groups import distributed
from tests.models import TILE, Twins, build_twins, sample_of, small_config
from tests.stories import ONE, ONE_TILE, TEXT, TWO

ARCHITECTURES = ["decoder", "xattn", "hybrid"]
STORIES = [TWO, TEXT, ONE, ONE_TILE]  # two, no, one and one image; all of different lengths


@pytest.fixture(scope="module")
def twins():
    threads = torch.get_num_threads()
    with distributed(small_config().parallel, seed=0, threads=1):
        yield {arch: build_twins(small_config(f"arch={arch}", "tiling.tag=1d")) for arch in ARCHITECTURES}
    torch.set_num_threads(threads)


def prompts(config) -> list[Sample]:
    return [sample_of(story, config) for story in STORIES]


def longer(sample: Sample, tokens: list[int]) -> Sample:
    """The sample followed by text."""
    more = {
        name: torch.cat((getattr(sample, name), torch.tensor(values)))
        for name, values in {
            "tokens": tokens,
            "labels": [IGNORE] * len(tokens),
            "image": [int(sample.image[-1])] * len(tokens),
            "tile": [int(sample.tile[-1])] * len(tokens),
        }.items()
        if tokens
    }
    return dataclasses.replace(sample, **more)


def run(twins: Twins, samples: list[Sample], sampling: Sampling, ends: Collection[int] = (), **how) -> list[list[int]]:
    batch = twins.vision.encode(collate([[sample] for sample in samples], twins.config.vision.tile_size))
    return continue_rows(stages_of(twins), batch, sampling, ends, **how)


def stages_of(twins: Twins) -> Pipeline:
    return Pipeline([twins.model], [], lend=False)


def watched(monkeypatch) -> list[tuple[int, Tensor]]:
    """A list that gets (number of computed columns, logits [B, V]) for each step."""
    seen: list[tuple[int, Tensor]] = []

    def watching(stages, batch, last_B, past):
        seen.append((batch.tokens.shape[1], next_logits(stages, batch, last_B, past)))
        return seen[-1][1]

    monkeypatch.setattr(decode, "next_logits", watching)
    return seen


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cached_logits_are_those_of_whole_conversations(arch, twins, monkeypatch):
    """fp32, within 1e-5 of the largest logit; rows that end are dropped, and the others are not affected."""
    twin, samples = twins[arch], prompts(twins[arch].config)
    stop = run(twin, samples, Sampling(max_new_tokens=3))[2][-1]
    seen = watched(monkeypatch)
    texts = run(twin, samples, Sampling(max_new_tokens=12), [stop])
    assert len(texts[2]) <= 3 and max(map(len, texts)) == 12
    assert [len(logits) for _, logits in seen] == [sum(len(text) > step for text in texts) for step in range(12)]
    assert [columns for columns, _ in seen] == [max(len(sample.tokens) for sample in samples), *[1] * 11]
    for step, (_, logits) in enumerate(seen):
        going = [row for row, text in enumerate(texts) if len(text) > step]
        whole = [longer(samples[row], texts[row][:step]) for row in going]
        batch = twin.vision.encode(collate([[sample] for sample in whole], twin.config.vision.tile_size))
        last = torch.tensor([len(sample.tokens) - 1 for sample in whole])
        with generating([twin.model]):
            expected = next_logits(stages_of(twin), batch, last)
        assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5
        assert [texts[row][step] for row in going] == expected.argmax(-1).tolist()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cached_text_is_the_recomputed_one(arch, twins):
    samples = prompts(twins[arch].config)
    for sampling in (Sampling(max_new_tokens=20), Sampling(max_new_tokens=20, temperature=1.5, top_p=0.8, seed=4)):
        texts = run(twins[arch], samples, sampling)
        ends = {texts[0][7], texts[1][4]}
        cut = [text[: next((n for n, i in enumerate(text) if i in ends), 20) + 1] for text in texts]
        for how in ({}, {"recompute": True}, {"recompute": True, "multiple": 16}):
            assert run(twins[arch], samples, sampling, ends, **how) == cut


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(arch, twins):
    samples = prompts(twins[arch].config)
    for sampling in (Sampling(max_new_tokens=10), Sampling(max_new_tokens=10, temperature=1.0, seed=7)):
        together = run(twins[arch], samples, sampling)
        for row, sample in enumerate(samples):
            alone = dataclasses.replace(sampling, seed=sampling.seed + row)
            assert run(twins[arch], [sample], alone) == [together[row]]


def test_tokens_are_told_as_they_come(twins):
    heard: list[tuple[int, int]] = []
    samples = prompts(twins["hybrid"].config)
    texts = run(twins["hybrid"], samples, Sampling(max_new_tokens=4), tell=lambda *pair: heard.append(pair))
    assert heard == [(row, texts[row][step]) for step in range(4) for row in range(len(samples))]


def test_the_model_is_as_before_also_where_generation_fails(twins):
    model, samples = twins["hybrid"].model, prompts(twins["hybrid"].config)
    keepers = [module for module in model.modules() if isinstance(module, KeepsKeys)]
    layers, carriers = 5, 2
    assert len(keepers) == layers + carriers

    def broken(row, token):
        assert all(module.cache for module in keepers) and not model.training
        raise RuntimeError("the listener is gone")

    model.train()
    with pytest.raises(RuntimeError, match="listener"):
        run(twins["hybrid"], samples, Sampling(), tell=broken)
    assert model.training and all(module.training for module in model.modules())
    assert all(module.cache is None for module in keepers)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layers_compute_the_same_with_and_without_gradients(arch, twins, monkeypatch):
    """A layer's shortcut compared with Megatron's own code, whose calls are counted to know which one ran."""
    batch = twins[arch].vision.encode(collate([[s] for s in prompts(twins[arch].config)], TILE))
    model, calls = twins[arch].model, []
    whole = TransformerLayer.forward
    monkeypatch.setattr(TransformerLayer, "forward", lambda *a, **k: calls.append(0) or whole(*a, **k))
    longways = model.hidden(batch)
    assert len(calls) == len(model.decoder.layers)
    with generating([model]):
        shortly = model.hidden(batch)
    assert len(calls) == len(model.decoder.layers)
    real = (batch.sample != PAD).t()[..., None]  # padding is not compared
    assert ((shortly - longways) * real).abs().max() < 2e-6 * longways.abs().max()
