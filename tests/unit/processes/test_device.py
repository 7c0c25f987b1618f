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


def test_what_a_gpu_gets_is_page_locked(monkeypatch):
    locked = torch.ones(1)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: locked)
    x = torch.zeros(2)
    assert device.page_locked(x, torch.device("cuda", 0)) is locked
    assert device.page_locked(x, torch.device("cpu")) is x is device.to_device(x, torch.device("cpu"))
    there = torch.zeros(2, device="meta")
    assert device.page_locked(there, torch.device("cuda", 0)) is there


class OnGpu(torch.Tensor):
    is_cuda = True


def test_a_function_is_compiled_once_and_only_for_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function: asked.append(function) or (lambda *args: "compiled"))
    double = device.compiled(lambda x, factor: x * factor)
    assert double(torch.ones(1), 2) == 2 and not asked
    on_gpu = torch.ones(1).as_subclass(OnGpu)
    assert [double(on_gpu, 2), double(on_gpu, 3)] == ["compiled"] * 2 and len(asked) == 1
