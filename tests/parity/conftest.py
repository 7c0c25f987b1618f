"""Fixtures shared by the parity tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nvlm.processes.groups import distributed
from tests.models import small_config
from tests.parity.twins import reference_result, twins_of


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    """Process groups of one rank and one thread, for a whole module."""
    threads = torch.get_num_threads()
    with distributed(small_config().parallel, seed=0, threads=1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def twins(megatron: None) -> Iterator[None]:
    """What `tests.parity.twins` builds once for a module goes with its process groups."""
    yield
    for cached in (twins_of, reference_result):
        cached.cache_clear()
