"""GPUs by their driver's names for them."""

from __future__ import annotations

import pytest

from nvlm.config.hardware import GPUS, known_gpu


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name, expected):
    assert known_gpu(name) is GPUS[expected]


@pytest.mark.parametrize(
    "name",
    ["NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 4090", ""],
)
def test_another_chip_or_a_slice_of_one_is_not_taken_for_it(name):
    assert known_gpu(name) is None


def test_peaks_are_dense():
    """Figures with sparsity would halve every MFU: fp8 is twice bf16, and bf16 stays below 1 PF on Hopper."""
    for name, gpu in GPUS.items():
        assert gpu.fp8 is None or gpu.fp8 == pytest.approx(2 * gpu.bf16, rel=0.01), name
    assert GPUS["h100"].peak("bf16") == GPUS["h200"].peak("bf16") < 1e15
    assert GPUS["h200"].peak("fp8_current") == GPUS["h200"].peak("mxfp8") == GPUS["h200"].fp8
    assert GPUS["a100-80gb"].peak("fp8_delayed") is None
    assert GPUS["h100"].peak("fp32") < 0.1 * GPUS["h100"].peak("bf16")
