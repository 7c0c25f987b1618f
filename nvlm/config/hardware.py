"""GPU specifications, from data sheets. Imports no torch: the planner needs neither torch nor a GPU.

FLOP/s are dense: data sheets of Hopper and Blackwell give twice as much, with structured sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass

GiB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """One kind of GPU. Memory in bytes, peaks in FLOP/s, bandwidths in bytes/s."""

    device_names: tuple[str, ...]  # as reported by the driver
    memory: int  # as seen by torch: less than in the data sheet
    fp32: float
    bf16: float
    fp8: float | None  # None: not supported
    memory_bandwidth: float
    link: float  # to the other GPUs of its node, one direction
    network: float  # to other nodes, per GPU, one direction: typical
    node: int  # GPUs in a typical node
    processors: int  # streaming multiprocessors

    def peak(self, precision: str) -> float | None:
        """Dense FLOP/s in this precision, the same for all FP8 recipes; None: not supported."""
        return {"fp32": self.fp32, "bf16": self.bf16}.get(precision, self.fp8)


# Memory: total capacity in torch's out-of-memory messages (79.1 to 79.3, 139.8, 178.3 and 44.4 GiB were observed).
GPUS = {
    # NVIDIA H100 data sheet, SXM and PCIe; HGX and DGX H100: one ConnectX-7 of 400 Gb/s per GPU.
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
        processors=132,
    ),
    "h100-pcie": GPU(  # without NVLink: PCIe 5.0 x16; a typical server has one 400 Gb/s port per two GPUs
        device_names=("NVIDIA H100 PCIe",),
        memory=int(79.1 * GiB),
        fp32=51e12,
        bf16=756e12,
        fp8=1513e12,
        memory_bandwidth=2.0e12,
        link=64e9,
        network=25e9,
        node=8,
        processors=114,
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
        processors=132,
    ),
    # NVIDIA A100 80GB data sheet, SXM; DGX A100: one HDR InfiniBand port of 200 Gb/s per GPU.
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
        processors=108,
    ),
    # NVIDIA L40S data sheet: without NVLink, PCIe 4.0 x16; a typical server has one 200 Gb/s port per two GPUs.
    "l40s": GPU(
        device_names=("NVIDIA L40S",),
        memory=int(44.4 * GiB),
        fp32=91.6e12,
        bf16=366.5e12,  # half of FP8 and four times fp32; the data sheet has 362
        fp8=733e12,
        memory_bandwidth=864e9,
        link=32e9,
        network=12.5e9,
        node=8,
        processors=142,
    ),
    # NVIDIA Blackwell architecture brief, HGX B200 at 1000 W; DGX B200: one ConnectX-7 of 400 Gb/s per GPU.
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
        processors=148,
    ),
}


def known_gpu(device_name: str) -> GPU | None:
    """The GPU for which the driver reports this name; None if it is not in the table, or is a MIG slice.

    Only full names match: "NVIDIA H100 NVL" is a different GPU from "NVIDIA H100 80GB HBM3".
    """
    return next((gpu for gpu in GPUS.values() if device_name in gpu.device_names), None)
