"""The model built from Transformer Engine's modules has the same parameters as ours. Runs if Transformer Engine is
installed, and from tests/engine/test_engine.py. Here its modules are built, but not called."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from nvlm.arch.pipeline import build_parts
from nvlm.attention.choice import GPU_WITH_TE
from nvlm.commands.compose import compose_config
from nvlm.llm.backend import fp8_settings
from nvlm.llm.norm import RMSNorm
from nvlm.train.checkpoint.state import is_scale, metadata
from tests.models import small_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)


def built(config, monkeypatch):
    """The model of `config` in Transformer Engine's modules, which require a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr("nvlm.llm.backend.this_machine", lambda: GPU_WITH_TE)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        return build_parts(config)[0]


@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_names_and_shapes_are_ours(arch, monkeypatch, megatron):
    shape = ("llm.hidden=32", "llm.ffn=64", "llm.head_dim=8", "llm.qk_norm=true")
    config = small_config(f"arch={arch}", "precision=bf16", *shape)
    ours, theirs = build_parts(config)[0], built(config, monkeypatch)
    assert not any(isinstance(m, RMSNorm) for m in theirs.decoder.modules())
    shapes = [{name: w.shape for name, w in model.weights().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    stored = []
    for model in (ours, theirs):
        state = model.sharded_state_dict(metadata=metadata())
        entries = [entry for name, entry in state.items() if not is_scale(name)]
        stored.append({(e.key, tuple(getattr(e, "global_shape", e.data.shape))) for e in entries})
    assert stored[0] == stored[1]


@pytest.mark.parametrize("name", ["fp8_delayed", "fp8_current", "mxfp8"])
def test_recipes_are_megatrons(name, monkeypatch, megatron):
    config = compose_config("arch=hybrid", f"precision={name}")
    model = built(config, monkeypatch)
    assert (model.config.fp8_recipe, bool(model.config.fp8)) == (config.precision.recipe, True)
    monkeypatch.setattr("nvlm.llm.backend.uses_te", lambda config: False)
    assert fp8_settings(config) == {}
