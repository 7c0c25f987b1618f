"""What the layers of Transformer Engine compute, without a GPU: whole files of tests once more, in processes where its
own Python runs as it is, on kernels that torch computes (tests/engine/kernels.py)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm import device
from tests.engine.choose import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
SUITES = {
    "models": (["tests/parity/test_models.py", "tests/parity/test_te.py"], 200),
    "fp8": (["tests/engine/fp8.py"], 18),
    "plan": (["tests/engine/plan.py"], 54),
    "gpu": (["tests/engine/gpu.py"], 1),
    "layouts": (["tests/dist/test_layouts.py", "-m", "not slow"], 40),
    "peers": (["tests/parity/test_peers.py"], 15),
    "generation": (["tests/parity/test_generate.py", "tests/dist/test_generate.py", "-k", "not with_and_without"], 10),
    "published": (["tests/dist/test_published.py"], 8),
    "steps": (["tests/dist/test_overlap.py", "tests/dist/test_nothing_there.py", "-m", "not slow"], 6),
}
QUICK = ("models",)

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
