"""The choices made for a GPU and for Transformer Engine, tested without either."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from nvlm.attention.choice import GPU_WITH_TE
from nvlm.attention.kernels.flex import _compiled
from nvlm.commands import launch
from nvlm.config.values import ConfigError
from nvlm.llm import backend, build
from nvlm.processes import device


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that the machine has a GPU and that layers are Transformer Engine's."""
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(backend, "this_machine", lambda: GPU_WITH_TE)


def test_a_meta_model_is_not_allocated_on_the_gpu(configured, gpu):
    """On a GPU, Megatron's initialization names the device, which overrides the block with the meta device."""
    config = configured("arch=decoder", "parallel.context=2")
    assert not build.base_config(config, num_layers=1, hidden_size=8, num_attention_heads=1).use_cpu_initialization
    with torch.device("meta"):
        assert build.base_config(config, num_layers=1, hidden_size=8, num_attention_heads=1).use_cpu_initialization


def test_rows_that_are_no_line_turn_without_the_fused_kernel(configured, gpu, monkeypatch):
    made = []
    monkeypatch.setattr(build, "base_config", lambda config, **shape: made.append(shape["apply_rope_fusion"]))
    for context in (1, 2):
        build.llm_config(configured("arch=decoder", f"parallel.context={context}"))
    assert made == [True, False]


BUFFERED = ("parallel.userbuffers=true", "parallel.tensor=2", "parallel.sequence=true", "data.row_length=512")


@pytest.mark.parametrize("words", [("train.offload=true",), (*BUFFERED, "precision=bf16")], ids=["offload", "buffers"])
def test_what_only_transformer_engine_can_do_is_refused_without_it(words, configured, monkeypatch):
    config, key = configured("arch=decoder", "train.micro_batch=1", *words), words[0].removesuffix("=true")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"{key}=true: got no Transformer Engine, .* or {key}=false"):
        launch.check_engine(config)
    monkeypatch.setattr(backend, "why_not_te", lambda: "ImportError: not here")
    with pytest.raises(ConfigError, match=rf"{key}=true: got no Transformer Engine \(ImportError: not here\)"):
        backend.check_precision(config)
    monkeypatch.setattr(backend, "why_not_te", lambda: None)
    with pytest.raises(ConfigError, match=f"{key}=true: got a machine without a usable GPU"):
        backend.check_precision(config)


def test_compiled_attention_may_have_more_kinds_than_torch_s_limit():
    with torch._dynamo.config.patch(recompile_limit=8):
        _compiled.__wrapped__(torch.add)
        assert torch._dynamo.config.recompile_limit >= 64
