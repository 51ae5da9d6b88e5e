"""How values lie in memory, with sizes and strides that may be symbols."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true, statically_known_true

__all__ = ["flat_memory", "in_layout", "memory_of", "overlaps", "span_of"]


def in_layout(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the strides of ``like``: itself, or a copy."""
    strides = [s for s, n in zip(zip(x.stride(), like.stride()), x.shape) if guard_or_true(n != 1)]
    if all(guard_or_false(a == b) for a, b in strides):
        return x
    sizes = _as_numbers(like.stride())
    order = sorted(range(like.dim()), key=lambda d: -sizes[d])
    inverse = [order.index(d) for d in range(like.dim())]
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


def _as_numbers(sizes: Any) -> list[int]:
    """Sizes by which to tell which is larger: as they were in the first call, or else every symbol a large number."""
    hints = [size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes]
    if all(hint is not None for hint in hints):
        return [int(hint) for hint in hints]
    exprs = [size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in sizes]
    symbols = sorted(set().union(*(expr.free_symbols for expr in exprs)), key=str)
    numbers = {symbol: 8192 + i for i, symbol in enumerate(symbols)}
    return [int(expr.xreplace(numbers)) for expr in exprs]


def span_of(size: Any, stride: Any) -> Any:
    """How many elements of memory lie from the first to the last."""
    return 1 + sum((n - 1) * s for n, s in zip(size, stride))


def overlaps(x: Tensor) -> bool:
    """Whether elements of ``x`` share memory, as far as is known."""
    strides = _as_numbers(x.stride())
    reach: Any = 1
    for d in sorted(range(x.dim()), key=lambda d: strides[d]):
        if statically_known_true(x.shape[d] == 1):
            continue
        if not guard_or_false(x.stride(d) >= reach):
            return True
        reach = reach + (x.shape[d] - 1) * x.stride(d)
    return False


def flat_memory(x: Tensor, like: Tensor) -> Tensor:
    """The memory that ``x`` would have, were it laid out as ``like``: zeros where that has holes."""
    span = span_of(like.shape, like.stride())
    if not guard_or_false(span == like.numel()):
        return x.new_zeros(span).as_strided_scatter(x, like.shape, like.stride(), 0)
    strides = _as_numbers(like.stride())
    order = sorted(range(like.dim()), key=lambda d: -strides[d])
    return x.permute(order).clone(memory_format=torch.contiguous_format).view(-1)


def memory_of(value: Any) -> int | None:
    """What identifies the memory of a fake value; None of what is not known, or has none."""
    is_dense = isinstance(value, FakeTensor) and value.layout is torch.strided
    return value.untyped_storage()._cdata if is_dense else None
