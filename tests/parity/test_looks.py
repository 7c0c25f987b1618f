"""What an answer looks at, against the plain reference: one sample, head by head, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nvlm.arch.pipeline import Pipeline
from nvlm.arch.registry import placement_rule
from nvlm.attention.cache import KeepsKeys
from nvlm.data.batch import Sample
from nvlm.data.outline import build_processor, outline
from nvlm.data.samples import encode
from nvlm.explain.looks import Looks, from_mapping, to_mapping
from nvlm.explain.measure import looks_of
from nvlm.generate.generator import Generator
from nvlm.generate.score import score
from nvlm.tiling.grid import TilePlan
from tests.models import Story, Twins, record_of, reference_sample
from tests.parity import reference
from tests.parity.reference import CrossAttention, visibility
from tests.parity.twins import K, twins_with
from tests.stories import TWO

pytestmark = pytest.mark.usefixtures("twins")

# The same conversation as a prompt and, for the reference, with its answer.
ASKED = Story(
    "two", (("user", "Look: <image> what is it?"), ("assistant", "nine"), ("user", "and <image>?")), TWO.grids
)
MODELS = (("arch=xattn",), ("arch=hybrid",), ("arch=xattn", "arch.cross_every=1"))


class Alone:
    """The pre-pass of one process."""

    def __init__(self, twins: Twins) -> None:
        self.encode = lambda batches: [twins.vision.encode(batch) for batch in batches]


def generator_of(twins: Twins) -> Generator:
    return Generator(twins.config, Pipeline([twins.model], [], lend=False), Alone(twins), torch.device("cpu"))


def asked(twins: Twins, words: str) -> tuple[Sample, list[int], tuple[TilePlan, ...]]:
    """The prompt, the answer's tokens and the images' tiles."""
    processor, record = build_processor(twins.config, placement_rule(twins.config.arch.name)), record_of(ASKED)
    plans = outline(record, processor, generate=True).pictures.plans
    answer = [*processor.tokenizer.encode(words), processor.tokenizer.end]
    return encode(record, processor, generate=True), answer, plans


def looked(overrides: tuple[str, ...]) -> tuple[Twins, list[int], Looks]:
    twins = twins_with(overrides, "1d")
    prompt, answer, plans = asked(twins, "less of them")
    return twins, answer, looks_of(generator_of(twins), prompt, answer, plans)


class Kept:
    """What the reference's gated layers get at the answer's columns, and its logits there."""

    def __init__(self, twins: Twins, answer: list[int], words: str, monkeypatch) -> None:
        story = Story(ASKED.name, (*ASKED.turns, ("assistant", words)), ASKED.grids)
        self.sample, self.layers = reference_sample(story, twins.config), []
        self.columns = [t for t, label in enumerate(self.sample.labels) if label >= 0][-len(answer) :]
        assert [self.sample.labels[t] for t in self.columns] == answer

        def forward(layer: CrossAttention, h_SH: Tensor, kv_XH: Tensor, visible_SX: Tensor) -> Tensor:
            self.layers.append((layer, h_SH[self.columns], kv_XH, visible_SX[self.columns]))
            return plain(layer, h_SH, kv_XH, visible_SX)

        plain = CrossAttention.forward
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(CrossAttention, "forward", forward)
            self.logits = twins.reference.logits(self.sample)[self.columns]

    def tiles(self) -> list[tuple[int, int]]:
        return sorted({(segment.image, segment.tile) for segment in self.sample.cross})

    def keys(self, kind: str) -> Tensor:
        """[X, T] of the tiles' keys of this kind; "" for both."""
        rows = []
        for segment in self.sample.cross:
            mine = [
                float((segment.image, segment.tile) == tile and kind in ("", segment.kind)) for tile in self.tiles()
            ]
            rows += [mine] * reference.length(segment, K)
        return torch.tensor(rows, dtype=torch.float64)


def expected_of(layer: CrossAttention, h_NH: Tensor, kv_XH: Tensor, visible_NX: Tensor, tile_XT: Tensor):
    """Probabilities by tile [N, T], and the size of what each tile adds to the residual stream [N, T]."""
    q_NhE, k_XGE, v_XGE = layer.project(layer.norm(h_NH), kv_XH)
    heads, shared = q_NhE.shape[1], q_NhE.shape[1] // k_XGE.shape[1]
    shares, parts = [], []
    for head in range(heads):
        scores_NX = q_NhE[:, head] @ k_XGE[:, head // shared].T / layer.head_dim**0.5
        probabilities_NX = scores_NX.masked_fill(~visible_NX, -torch.inf).softmax(-1)
        shares.append(probabilities_NX @ tile_XT)
        read_NXE = probabilities_NX[..., None] * v_XGE[:, head // shared]
        parts.append(torch.einsum("nxe,xt->nte", read_NXE, tile_XT))
    added_NTH = torch.tanh(layer.gate) * layer.o_proj(torch.cat(parts, dim=-1))
    if tile_XT.sum(1).all():  # the parts are the whole
        assert torch.allclose(added_NTH.sum(1), layer(h_NH, kv_XH, visible_NX))
    return sum(shares) / heads, added_NTH.norm(dim=-1) / h_NH.norm(dim=-1)[:, None]


@pytest.mark.parametrize("overrides", MODELS, ids=" ".join)
def test_the_numbers_are_those_of_the_reference(overrides, monkeypatch):
    twins, answer, looks = looked(overrides)
    kept = Kept(twins, answer, "less of them", monkeypatch)
    assert [(tile.image, tile.tile) for tile in looks.tiles] == kept.tiles() and len(kept.tiles()) >= 5
    every = twins.config.arch.cross_every
    assert looks.layers == tuple(n for n in range(1, 6) if n % every == 0) and len(kept.layers) == len(looks.layers)
    with torch.no_grad():
        for number, layer in enumerate(kept.layers):
            shares, strength = expected_of(*layer, kept.keys(""))
            of_tags, _ = expected_of(*layer, kept.keys("tag"))
            near(looks.gates[number : number + 1], layer[0].gate.tanh())
            near(looks.attention[number], shares)
            near(looks.tags[number], of_tags)
            near(looks.strength[number], strength)
        logs = kept.logits.log_softmax(-1)[range(len(answer)), answer]
    near([token.probability for token in looks.tokens], logs.exp())
    assert [token.id for token in looks.tokens] == answer
    assert "".join(token.text for token in looks.tokens) == "less of them<|im_end|>"


@pytest.mark.parametrize("overrides", MODELS[:2], ids=" ".join)
def test_shares_sum_to_one(overrides):
    _, _, looks = looked(overrides)
    near(looks.attention.sum(-1), np.ones(looks.attention.shape[:2]))
    near(looks.gated.sum(-1), np.ones(len(looks.tokens)))
    assert (looks.tags.sum() > 0) == (overrides[0] == "arch=hybrid")  # tags are keys only there
    assert (looks.tags <= looks.attention + 1e-6).all()


@pytest.mark.parametrize("overrides", MODELS[:2], ids=" ".join)
def test_the_effect_is_that_of_a_tile_the_model_cannot_see(overrides, monkeypatch):
    twins, answer, looks = looked(overrides)
    kept = Kept(twins, answer, "less of them", monkeypatch)
    sees = reference.visibility
    for number in (0, len(looks.tiles) - 1):
        hidden_X = kept.keys("")[:, number] > 0
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(reference, "visibility", lambda *given, hidden_X=hidden_X: sees(*given) & ~hidden_X)
            logits = twins.reference.logits(kept.sample)[kept.columns]
        lost = kept.logits.log_softmax(-1) - logits.log_softmax(-1)
        near(looks.effect[:, number], lost[range(len(answer)), answer])
    assert np.abs(looks.effect).max() > 1e-3


def test_a_tile_that_is_not_seen_gets_nothing(monkeypatch):
    """The first answer is given before the second image."""
    twins = twins_with(("arch=hybrid",), "1d")
    assert visibility(reference_sample(TWO, twins.config), "hybrid", K).any()
    from nvlm.explain import measure

    unseen = measure.unseen_keys
    monkeypatch.setattr(
        measure, "unseen_keys", lambda batch, columns: unseen(batch, columns) | (batch.cross_image == 1)
    )
    _, _, looks = looked(("arch=hybrid",))
    second = [tile.image == 1 for tile in looks.tiles]
    assert (looks.attention[..., second] == 0).all() and (looks.strength[..., second] == 0).all()
    near(looks.attention.sum(-1), np.ones(looks.attention.shape[:2]))


def test_nothing_is_left_behind():
    twins, _, first = looked(("arch=hybrid",))
    modules = list(twins.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert all(module.cache is None for module in modules if isinstance(module, KeepsKeys))
    _, _, again = looked(("arch=hybrid",))
    assert (first.attention == again.attention).all()


def test_a_file_brings_the_numbers_back():
    _, _, looks = looked(("arch=hybrid",))
    again = from_mapping(to_mapping(looks))
    assert again.tiles == looks.tiles and again.layers == looks.layers and again.grids == looks.grids
    for name in ("gates", "attention", "tags", "strength", "effect", "gated"):
        assert np.abs(getattr(again, name) - getattr(looks, name)).max() < 1e-5


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_the_score_of_an_answer_is_the_reference_s(arch, monkeypatch):
    twins = twins_with((f"arch={arch}",), "1d")
    prompt, answer, _ = asked(twins, "less of them")
    kept = Kept(twins, answer, "less of them", monkeypatch)
    logs = kept.logits.log_softmax(-1)
    found = score(generator_of(twins), prompt, answer)
    near([found.log_probability], [float(logs[range(len(answer)), answer].sum())])
    assert not found.greedy
    likeliest = [int(logs[0].argmax())]
    assert score(generator_of(twins), prompt, likeliest).greedy


def near(found, expected) -> None:
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 2e-5 * max(1, np.abs(expected).max())
