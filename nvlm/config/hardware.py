"""What GPUs can do, by their data sheets. Imports nothing, so that the planner needs no GPU and no torch.

FLOP/s are dense: data sheets of Hopper and Blackwell print twice as much, with structured sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass

GiB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """One kind of GPU. Memory in bytes, peaks in FLOP/s, bandwidths in bytes/s."""

    device_names: tuple[str, ...]  # as the driver tells them
    memory: int  # as torch sees it: less than the data sheet's
    fp32: float
    bf16: float
    fp8: float | None  # None: it has no FP8
    memory_bandwidth: float
    link: float  # to the other GPUs of its node, one direction
    network: float  # to other nodes, a GPU's share, one direction: what is usual
    node: int  # GPUs of a usual node

    def peak(self, precision: str) -> float | None:
        """Dense FLOP/s in the precision of this name; all FP8 recipes are alike. None: it cannot do it."""
        return {"fp32": self.fp32, "bf16": self.bf16}.get(precision, self.fp8)


# Memory: total capacity in torch's out-of-memory messages (79.1 to 79.3, 139.8 and 178.3 GiB are seen).
GPUS = {
    # NVIDIA H100 data sheet, SXM and PCIe; HGX and DGX H100: one ConnectX-7 of 400 Gb/s a GPU.
    "h100": GPU(
        device_names=("NVIDIA H100 80GB HBM3",),
        memory=int(79.1 * GiB),
        fp32=67e12,
        bf16=989.4e12,
        fp8=1978.9e12,
        memory_bandwidth=3.35e12,
        link=450e9,
        network=50e9,
        node=8,
    ),
    "h100-pcie": GPU(  # without NVLink: PCIe 5.0 x16; the usual server has one 400 Gb/s port for two GPUs
        device_names=("NVIDIA H100 PCIe",),
        memory=int(79.1 * GiB),
        fp32=51e12,
        bf16=756e12,
        fp8=1513e12,
        memory_bandwidth=2.0e12,
        link=64e9,
        network=25e9,
        node=8,
    ),
    # NVIDIA H200 data sheet, SXM.
    "h200": GPU(
        device_names=("NVIDIA H200",),
        memory=int(139.8 * GiB),
        fp32=67e12,
        bf16=989.4e12,
        fp8=1978.9e12,
        memory_bandwidth=4.8e12,
        link=450e9,
        network=50e9,
        node=8,
    ),
    # NVIDIA A100 80GB data sheet, SXM; DGX A100: one HDR InfiniBand port of 200 Gb/s a GPU.
    "a100-80gb": GPU(
        device_names=("NVIDIA A100-SXM4-80GB",),
        memory=int(79.1 * GiB),
        fp32=19.5e12,
        bf16=312e12,
        fp8=None,
        memory_bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        node=8,
    ),
    # NVIDIA Blackwell architecture brief, HGX B200 at 1000 W; DGX B200: one ConnectX-7 of 400 Gb/s a GPU.
    "b200": GPU(
        device_names=("NVIDIA B200",),
        memory=int(178.3 * GiB),
        fp32=80e12,
        bf16=2250e12,
        fp8=4500e12,
        memory_bandwidth=8e12,
        link=900e9,
        network=50e9,
        node=8,
    ),
}


def known_gpu(device_name: str) -> GPU | None:
    """The GPU whose driver tells this name; None for one that is not in the table, and for a slice of one.

    Only whole names count: "NVIDIA H100 NVL" is another chip than "NVIDIA H100 80GB HBM3".
    """
    return next((gpu for gpu in GPUS.values() if device_name in gpu.device_names), None)
