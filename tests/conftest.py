"""Shared helpers: configurations composed from conf/ as the command line does."""

from __future__ import annotations

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest

from nvlm.cli import compose_config


@pytest.fixture(scope="session")
def configured():
    """A function from overrides to a validated Config."""
    return compose_config
