"""What functionalized writes are, which PyTorch gives no gradient, and what computes the same with one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["WRITES"]

aten = torch.ops.aten


def _copied(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What x.copy_(source) leaves in x: aten.copy itself has no gradient."""
    return source.to(x.device, x.dtype).expand(x.shape).clone()


# aten.copy itself has no gradient, zero not where it is complex.
WRITES: dict[OpOverload, Callable[..., Tensor]] = {aten.copy.default: _copied, aten.zero.default: torch.zeros_like}
