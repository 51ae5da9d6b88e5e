"""What the launches of the Triton kernels share: which GPU, which memory, which arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from jvpgraph.kernels.attention_kernel import ADDITIVE_BIAS, BIAS_DOT_STRIDES, BIAS_STRIDES, BOOLEAN_BIAS, NO_BIAS

__all__ = ["addressable", "arch_of", "bias_kind", "bias_strides", "on_device", "pretended_gpu", "strides_of"]


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Where a launch goes to."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_pretended = 0  # what meta tensors are taken to be on


@contextlib.contextmanager
def pretended_gpu(arch: int) -> Iterator[None]:
    """Inside, meta tensors are on a GPU of this compute capability: for jvpgraph.kernels.recorded."""
    global _pretended
    before, _pretended = _pretended, arch
    try:
        yield
    finally:
        _pretended = before


def arch_of(device: torch.device) -> int:
    """Compute capability, 80 for 8.0; of the interpreter, 0."""
    if device.type != "cuda":
        return _pretended if device.type == "meta" else 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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
