"""What the launches of the Triton kernels share: which memory, which arguments."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from jvpgraph.kernels.tiles import ADDITIVE_BIAS, BIAS_DOT_STRIDES, BIAS_STRIDES, BOOLEAN_BIAS, NO_BIAS

__all__ = [
    "addressable",
    "bias_kind",
    "bias_strides",
    "descriptor_strides",
    "fits_descriptor",
    "on_device",
    "strides_of",
]


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Where a launch goes to."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def addressable(x: Tensor | None) -> Any:
    """x, or a copy if its last dim is not contiguous, or a block of its rows spans more than int32 counts."""
    if x is None or ((x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) < 1 << 23):
        return x
    return x.contiguous()


def strides_of(x: Tensor | None, count: int) -> tuple[int, ...] | None:
    """The first strides of x; 0 for dims of size one, which broadcast, and whose stride means nothing."""
    if x is None:
        return None
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:count], x.stride()))


def bias_strides(bias: Tensor | None, *, of_tangent: bool = False) -> dict[str, int | None]:
    """The strides of a bias, or of its tangent, as the kernels call them."""
    return dict(zip(BIAS_DOT_STRIDES if of_tangent else BIAS_STRIDES, strides_of(bias, 4) or (None,) * 4))


def bias_kind(bias: Tensor | None) -> int:
    if bias is None:
        return NO_BIAS
    return BOOLEAN_BIAS if bias.dtype == torch.bool else ADDITIVE_BIAS


def fits_descriptor(x: Tensor) -> bool:
    """What the hardware asks: aligned to 16 bytes, in every row too, and no dim that broadcasts.

    float32 does not gain, for its products are not on the matrix units.
    """
    size = x.element_size()
    return (
        x.dtype != torch.float32
        and _is_aligned(x)
        and all(
            length == 1 or (stride > 0 and stride * size % 16 == 0 and stride * size < 1 << 40)
            for length, stride in zip(x.shape[:3], x.stride())
        )
    )


def descriptor_strides(x: Tensor) -> list[int]:
    """The strides of x [B, H, L, D], but 16 where a dim of size one makes them mean nothing: they are checked."""
    return [16 if length == 1 else stride for length, stride in zip(x.shape[:3], x.stride())] + [1]


def _is_aligned(x: Tensor) -> bool:
    """To 16 bytes. Of a tensor without memory: whether it would be, in memory as torch allocates it."""
    if x.device.type == "meta" or isinstance(x, FakeTensor):
        return x.storage_offset() * x.element_size() % 16 == 0
    return x.data_ptr() % 16 == 0
