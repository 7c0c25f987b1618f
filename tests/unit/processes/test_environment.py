"""The environment in which a rank starts CUDA: our defaults, which depend on the layout, and the user's values."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from nvlm.commands import evaluate, generate, launch
from nvlm.commands.compose import compose_config
from nvlm.processes.environment import set_defaults

ALWAYS = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}
SEVERAL = ALWAYS | {
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_HIGH_PRIORITY": "1",
    "NVTE_FWD_LAYERNORM_SM_MARGIN": "20",
    "NVTE_BWD_LAYERNORM_SM_MARGIN": "20",
}
SPLIT = SEVERAL | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.mark.parametrize(
    ("words", "processes", "expected"),
    [
        ((), 1, ALWAYS),
        (("parallel.data=2",), 2, SEVERAL),
        (("parallel.pipeline=2",), 2, SEVERAL),
        (("parallel.tensor=2",), 2, SPLIT),
        (("parallel.context=2",), 16, SPLIT),
    ],
)
def test_the_layout_decides(words, processes, expected):
    environment = {"HOME": "/here"}
    set_defaults(environment, compose_config(*words).parallel, processes)
    assert environment == {"HOME": "/here"} | expected


def test_what_the_user_set_stays():
    own = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    environment = dict(own)
    set_defaults(environment, compose_config("parallel.tensor=2").parallel, 2)
    assert environment.items() >= own.items()
    # torch would read only the older name, and complain about two.
    assert "PYTORCH_ALLOC_CONF" not in environment


class Late(ModuleType):
    """A module of code that starts CUDA: it keeps the environment in which it was imported."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        self.seen = dict(os.environ)
        raise KeyboardInterrupt  # what it would do is not needed


@pytest.mark.parametrize(
    ("module", "work"),
    [
        ("nvlm.train.loop", lambda config: launch.work(config, Path("runs/x"), 0.0)),
        ("nvlm.evaluate.checkpoint", lambda config: evaluate.work(SimpleNamespace(config=config))),
        ("nvlm.generate.generator", lambda config: generate.work(SimpleNamespace(config=config))),
    ],
)
def test_ranks_have_it_before_they_import_what_starts_cuda(module, work, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvlm.evaluate.during", SimpleNamespace(evaluation_of=None))
    monkeypatch.setattr(launch, "take_forks_along", lambda: None)
    monkeypatch.setitem(sys.modules, module, late := Late(module))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in SPLIT:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    with pytest.raises(KeyboardInterrupt):
        work(compose_config("parallel.tensor=2"))
    assert late.seen.items() >= SPLIT.items()
