"""Memory and speed of GPUs, as their makers publish them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `plan --help` needs no torch
    import torch


@dataclass(frozen=True)
class GPU:
    """One device.

    Attributes:
        memory: bytes.
        half: FLOPs per second of dense bfloat16 products, summed in float32.
        single: of float32 products, without TF32, which is torch's default.
    """

    memory: float
    half: float
    single: float

    def peak(self, dtype: torch.dtype) -> float:
        """FLOPs per second."""
        return self.half if dtype.itemsize == 2 else self.single


def gpu(gib: float, half: float, single: float) -> GPU:
    """Memory in GiB, speed in TFLOPs per second."""
    return GPU(gib * 2**30, half * 1e12, single * 1e12)


GPUS = {
    "a100-40gb": gpu(40, 312, 19.5),
    "a100": gpu(80, 312, 19.5),
    "h100": gpu(80, 989, 67),
    "h200": gpu(140, 989, 67),
    "b200": gpu(180, 2250, 75),
    "l40s": gpu(45, 362, 91.6),
    "rtx3090": gpu(24, 71, 35.6),
    "rtx4090": gpu(24, 165, 82.6),
    "rtx5090": gpu(32, 210, 105),
    "mi300x": gpu(192, 1307, 163),
}
USABLE = 0.93  # of the memory: the rest goes to the context, libraries and gaps between allocations
LINK = 20e9  # bytes per second between CPU and GPU: PCIe 4.0 x16 has 32e9, of which copies see two thirds


NAMED = {
    r"NVIDIA A100-(SXM4|PCIE)-40GB": "a100-40gb",
    r"NVIDIA A100-SXM4-80GB|NVIDIA A100 80GB PCIe": "a100",
    r"NVIDIA H100 80GB HBM3": "h100",
    r"NVIDIA H200": "h200",
    r"NVIDIA B200": "b200",
    r"NVIDIA L40S": "l40s",
    r"NVIDIA GeForce RTX 3090": "rtx3090",
    r"NVIDIA GeForce RTX 4090": "rtx4090",
    r"NVIDIA GeForce RTX 5090": "rtx5090",
    r"AMD Instinct MI300X( .*)?": "mi300x",
}
"""What drivers call them. Others of nearly the same name (PCIe, NVL, Laptop, a part of one by MIG) are slower."""


def gpu_named(name: str) -> GPU | None:
    """By the whole of the name that the driver gives; None: not known."""
    return next((GPUS[key] for pattern, key in NAMED.items() if re.fullmatch(pattern, name)), None)
