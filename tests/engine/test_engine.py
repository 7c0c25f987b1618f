"""Transformer Engine's layers without a GPU: runs whole test files once more, in processes where its Python code runs
unchanged on kernels that torch computes (tests/engine/kernels.py)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm.processes import device
from tests.engine.choose import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
MODELS = [f"tests/parity/test_{part}.py" for part in ("models", "sight", "placeholders", "labels", "te")]
ADAPTED = (
    "tests/parity/test_adapters.py::test_adapters_alone_learn_in_their_groups_and_as_the_reference[hybrid-true-none]"
)
SUITES = {
    "hybrid, packed rows": (
        [*MODELS[:1], ADAPTED, "-k", "hybrid and (losses_and_gradients and packed or adapters)"],
        9,
    ),
    "hybrid": ([*MODELS, "-k", "hybrid"], 80),
    "other models": ([*MODELS, "-k", "not hybrid"], 140),
    "adapters": (
        [
            "tests/parity/test_adapters.py",
            "tests/dist/test_adapters.py",
            "tests/engine/suites/adapters.py",
            "-m",
            "not slow",
        ],
        46,
    ),
    "fp8": (["tests/engine/suites/fp8.py"], 20),
    "userbuffers": (["tests/engine/suites/userbuffers.py"], 15),
    "plan": (["tests/engine/suites/plan.py"], 54),
    "gpu": (["tests/engine/suites/gpu.py"], 1),
    "layouts": (["tests/dist/test_layouts.py", "-m", "not slow"], 40),
    "peers": (["tests/parity/test_peers.py"], 15),
    "generation": (["tests/parity/test_generate.py", "tests/dist/test_generate.py", "-k", "not with_and_without"], 10),
    "published": (["tests/dist/test_published.py"], 8),
    "steps": (
        [
            "tests/dist/test_overlap.py",
            "tests/dist/test_nothing_there.py",
            "-k",
            "not 4 and not tensor and not context",
        ],
        6,
    ),
}
QUICK = ("hybrid, packed rows",)

pytestmark = [
    pytest.mark.skipif(device.has_cuda(), reason="for machines without a GPU"),
    pytest.mark.skipif(not PACKAGES.is_dir(), reason="make install brings Transformer Engine's Python"),
]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "suite", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SUITES]
)
def test_with_its_layers_all_is_as_it_was(suite):
    tests, least = SUITES[suite]
    command = [sys.executable, "-m", "pytest", "-p", "tests.engine.plugin", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, done.stdout[-300:]


INSTALLED = """
import sys
from pathlib import Path
from tests.engine import kernels
kernels.install(Path(sys.argv[1]))
import transformer_engine_torch as extension

def no_gpu(*args, **kwargs):
    raise RuntimeError("CUDA error: no CUDA-capable device is detected")

for name in [name for name in vars(extension) if name.startswith("multi_tensor")]:
    setattr(extension, name, no_gpu)
from nvlm.commands.compose import compose_config
from nvlm.data.loader import load_steps
from nvlm.processes.groups import distributed
from nvlm.train.loop import build_steps, build_trainer
from nvlm.train.step import train_step

for sharded in ("false", "true"):
    config = compose_config(*sys.argv[2:], f"parallel.distributed_optimizer={sharded}")
    with distributed(config.parallel, config.seed, threads=1) as device:
        trainer = build_trainer(config, device)
        losses = [train_step(trainer, data).loss for data in load_steps(build_steps(config), 0, 0)]
    assert losses[-1] < losses[0], (sharded, losses)
"""


def test_a_machine_without_a_gpu_trains_where_it_is_installed():
    """Megatron uses the optimizer kernels of these packages whenever they are installed, but they run only on GPUs."""
    options = [
        "arch=decoder", "llm.layers=1", "data.records=8", "data.workers=0", "train.global_batch=4", "train.steps=3",
        "optim.warmup=1",
    ]  # fmt: skip
    command = [sys.executable, "-c", INSTALLED, str(PACKAGES), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
