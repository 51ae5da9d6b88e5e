"""From the shapes that callers have to the rank 4 of the implementations, and back.

Callers give [B, H, L, D], [B, L, D] without heads, or more leading batch dims; outputs lie in memory as B, L, H, D
whatever the strides of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "bias_grad",
    "bias_to_rank4",
    "dtype_inside",
    "empty_rows",
    "for_aten",
    "lse_from_rank3",
    "lse_to_rank3",
    "rows_from_rank4",
    "to_rank4",
]


def empty_rows(like: Tensor, length: int, dim: int) -> Tensor:
    """Uninitialised [..., H, length, dim] for like [..., H, L, D], in memory [..., length, H, dim]."""
    if like.dim() == 3:
        return like.new_empty(like.shape[0], length, dim)
    return like.new_empty(*like.shape[:-3], length, like.shape[-3], dim).transpose(-3, -2)


def for_aten(x: Tensor, *, aligned: bool | None = None) -> Tensor:
    """x as ATen's fused kernels take for granted that it lies in memory, without looking: its last dim contiguous, its
    rows one behind the other, on a GPU from multiples of 16 bytes on, which is what they load at a time. A copy if it
    does not. Every operand goes through here, whether it is rows, a mask, or one number per row. aligned: to 16 bytes,
    by default where x is not on the CPU."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride()) if size > 1]
    whole = x.shape[-1] <= 1 or x.stride(-1) == 1
    if x.dim() > 1 and x.shape[-2] > 1:
        whole = whole and x.stride(-2) >= x.shape[-1]
    if x.dim() < 4:
        whole = x.is_contiguous()
    elif x.device.type != "cpu" if aligned is None else aligned:
        whole = whole and all(step * x.itemsize % 16 == 0 for step in (x.storage_offset(), *steps))
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def dtype_inside(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def to_rank4(x: Tensor) -> Tensor:
    """[B, L, D] -> [B, 1, L, D]; [b1, b2, ..., H, L, D] -> [b1 b2 ..., H, L, D]."""
    if x.dim() == 4:
        return x
    return x.unsqueeze(1) if x.dim() == 3 else x.flatten(0, -4)


def bias_to_rank4(q: Tensor, bias: Tensor | None) -> Tensor | None:
    """bias as [B | 1, H | 1, Lq | 1, Lkv | 1]: a view, but for partly broadcast batch dims of rank > 4."""
    if bias is None:
        return None
    bias = bias[(None,) * (q.dim() - bias.dim())]
    if q.dim() == 4:
        return bias
    if q.dim() == 3:
        return bias.unsqueeze(1)
    lead = bias.shape[:-3]
    if any(size != 1 for size in lead):
        bias = bias.expand(*q.shape[:-3], *bias.shape[-3:])
    return bias.flatten(0, -4)


def bias_grad(q: Tensor, bias: Tensor, dbias: Tensor) -> Tensor:
    """The gradient of a rank-4 bias brought back to the shape and dtype of the caller's."""
    if q.dim() > 4 and dbias.shape[0] != 1:
        dbias = dbias.unflatten(0, q.shape[:-3]).sum_to_size((1,) * max(0, q.dim() - bias.dim()) + tuple(bias.shape))
    return dbias.reshape(bias.shape).to(bias.dtype).contiguous()


def _dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides torch.empty gives to shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def rows_from_rank4(x: Tensor, like: Tensor) -> Tensor:
    """A rank-4 [B, H, L, D] as empty_rows lays it out, down to the strides of dims of size one."""
    if like.dim() == 3:
        x = x.squeeze(1)
        strides = _dense_strides(x.shape)
    else:
        x = x if like.dim() == 4 else x.unflatten(0, like.shape[:-3])
        *lead, heads, length, dim = x.shape
        *outer, step_length, step_heads, one = _dense_strides((*lead, length, heads, dim))
        strides = (*outer, step_heads, step_length, one)
    return x if x.stride() == strides else empty_rows(like, x.shape[-2], x.shape[-1]).copy_(x)


def lse_from_rank3(x: Tensor, q: Tensor) -> Tensor:
    x = x.reshape(q.shape[:-1])
    return x if x.stride() == _dense_strides(x.shape) else x.new_empty(x.shape).copy_(x)


def lse_to_rank3(q: Tensor, lse: Tensor | None) -> Tensor | None:
    if lse is None or q.dim() == 4:
        return lse
    return lse.unsqueeze(1) if q.dim() == 3 else lse.flatten(0, -3)
