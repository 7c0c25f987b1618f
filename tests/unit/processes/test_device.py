"""What is measured of this process."""

from __future__ import annotations

import torch

from nvlm.processes import device


def test_peak_memory_on_cpu_is_the_most_so_far(monkeypatch):
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    before = device.peak_memory()
    torch.ones(before // 4)  # four bytes each: as much again; freed at once
    after = device.peak_memory()
    assert 1.5 * before < after < 3 * before
    assert device.peak_memory() >= after
