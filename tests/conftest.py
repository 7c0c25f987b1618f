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
pytest.register_assert_rewrite("tests.near", "tests.dist.checkpoints", "tests.e2e.preloaded", "tests.e2e.runs")

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


def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay on one worker because they share fixtures;
    those of tests/engine are separate whole suites."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if PurePosixPath(file).parent.name == "engine" else file

    return ByFile(config, log)
