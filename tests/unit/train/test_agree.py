"""What the ranks of a replica tell one another about a step, as far as there is only one of them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from nvlm.data.amounts import Work
from nvlm.data.loader import StepData
from nvlm.train.agree import agreed


def test_a_replica_of_one_rank_does_not_wait_for_its_gpu():
    data = StepData((), records=3, skipped=(), work=Work())
    # The meta device stands in for a GPU: it has no value to read.
    assert agreed(data, SimpleNamespace(size=lambda: 1), torch.device("meta")) is data
