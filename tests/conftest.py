"""Shared helpers: configurations composed from conf/ as the command line does."""

from __future__ import annotations

import functools
import gc
import os
from pathlib import PurePosixPath

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import hypothesis
import pytest

from nvlm.commands.compose import compose_config

# Their asserts show values too, as those of test modules do.
pytest.register_assert_rewrite(
    "tests.near", "tests.parity.twins", "tests.dist.checkpoints", "tests.e2e.preloaded", "tests.e2e.runs"
)

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def configured():
    """A function from overrides to a validated Config, which never changes."""
    return functools.cache(compose_config)


def pytest_collection_finish():
    """Imported objects stay, so exclude them from garbage collection."""
    gc.collect()
    gc.freeze()


LONGEST = (
    "tests/engine/test_engine.py", "tests/dist/test_checkpoint.py", "tests/e2e/test_kills.py",
    "tests/dist/test_layouts.py", "tests/unit/data/test_fuzz.py",
    "tests/dist/test_adapters.py", "tests/e2e/test_faults.py",
    "tests/e2e/test_train.py", "tests/e2e/test_generate.py", "tests/dist/test_nothing_there.py",
    "tests/e2e/test_weights.py", "tests/dist/test_export.py", "tests/dist/test_published.py",
    "tests/e2e/test_checkpoint.py", "tests/e2e/test_slurm.py", "tests/parity/test_models.py",
    "tests/dist/test_learning.py", "tests/dist/test_overlap.py", "tests/e2e/test_data.py", "tests/e2e/test_doctor.py",
    "tests/e2e/test_mistakes.py", "tests/dist/test_plan.py", "tests/dist/test_generate.py",
    "tests/parity/test_single_file.py", "tests/parity/test_flops.py", "tests/unit/config/test_fields.py",
    "tests/parity/test_adapters.py",
)  # fmt: skip
"""Files that take longest, with slow tests among them or without, longest first."""


def pytest_collection_modifyitems(config, items):
    """Side by side, what takes longest begins first, so that all workers end at about the same time."""
    if hasattr(config, "workerinput"):
        place = {file: number for number, file in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.nodeid.split("::")[0], len(LONGEST)))


def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay on one worker because they share fixtures;
    those of tests/engine are separate whole suites."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if PurePosixPath(file).parent.name == "engine" else file

    return ByFile(config, log)
