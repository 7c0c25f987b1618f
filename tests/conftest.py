"""Shared helpers: configurations composed from conf/ as the command line does."""

from __future__ import annotations

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import hypothesis
import pytest

from nvlm.cli import compose_config

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def configured():
    """A function from overrides to a validated Config."""
    return compose_config
