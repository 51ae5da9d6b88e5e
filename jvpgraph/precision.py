"""Which precision tangents have: that of the model, or float32 where the model computes in half precision."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["HALF", "PRECISIONS", "Precision", "has_half", "widened"]

Precision = Literal["model", "float32", "float32_matmul"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
HALF = (torch.float16, torch.bfloat16)


def widened(dtype: torch.dtype, precision: str = "float32") -> torch.dtype:
    """What tangents of primals of this dtype have."""
    return torch.float32 if precision != "model" and dtype in HALF else dtype


def has_half(value: Any) -> bool:
    """Whether there is a tensor in half precision in an argument of an op, which may be a list."""
    if isinstance(value, (list, tuple)):
        return any(map(has_half, value))
    return isinstance(value, Tensor) and value.dtype in HALF
