"""The backward of attention from o and lse, by ATen's own CUDA kernels where they compute exactly that.

Math
    p = exp(s - lse),  dv = p' do,  ds = p * (do v' - rowsum(do * o)),  dq = scale ds k,  dk = scale ds' q
Shapes
    q [B, H, Lq, Dqk], k [B, Hkv, Lkv, Dqk], v [B, Hkv, Lkv, Dv], bias [B | 1, H | 1, Lq | 1, Lkv | 1], lse
    [B, H, Lq]. o in memory as B, L, H, D, which is how ATen's kernels want it.
Precision
    That of ATen. lse must be the natural logarithm, in float32: neither kernel can tell.
Windows
    Flash takes every window, but aligns it at the last query and the last key: as here only where Lq = Lkv.
Refuses
    Nothing: what ATen does not take goes to attention_blocked; backward_path says which, and why.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jvpgraph.kernels import attention_blocked
from jvpgraph.kernels.window import CAUSAL, EVERYTHING, Window

__all__ = ["attention_backward", "backward_path"]

aten = torch.ops.aten


def backward_path(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: Window, has_lse_grad: bool, bias_needs_grad: bool
) -> str:
    """The first of "flash", "efficient" (ATen's kernels) and "blocked" (attention_blocked) that is exact here."""
    if has_lse_grad:
        return "blocked"  # ATen's kernels form rowsum(o * o_grad) inside, where the gradient of lse would enter
    if bias_needs_grad:
        return "blocked"  # ATen's gradient of a bias has B H Lq Lkv elements, whatever the bias broadcasts
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return "blocked"
    if any(x.shape[-1] * x.element_size() % 16 for x in (q, v)):
        return "blocked"  # they load 16 bytes at a time
    if (
        q.dtype in (torch.float16, torch.bfloat16)
        and bias is None
        and q.shape[-1] == v.shape[-1] <= 192  # beyond that not on every architecture
        and (window == EVERYTHING or q.shape[2] == k.shape[2])  # flash aligns its window at the bottom right
    ):
        return "flash"
    if (
        q.shape[1] == k.shape[1]  # no grouped heads
        and (window == EVERYTHING or (window == CAUSAL and bias is None))
        and (bias is None or bias.dtype in (torch.bool, q.dtype))  # rounding a float32 bias would move p off lse
    ):
        return "efficient"
    return "blocked"


def attention_backward(
    o_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: Window,
    scale: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias) from the forward's o and lse; dbias is None unless asked for."""
    path = backward_path(q, k, v, bias, window, lse_grad is not None, bias_needs_grad)
    if path == "blocked":
        return attention_blocked.attention_backward(
            o_grad, lse_grad, q, k, v, bias, o, lse, window, scale, bias_needs_grad
        )
    function = _flash_backward if path == "flash" else _efficient_backward
    o_grad, q, k, v = map(_last_dim_contiguous, (o_grad, q, k, v))
    return *function(o_grad, q, k, v, bias, o, lse, window, scale), None


def _flash_backward(
    o_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    assert bias is None
    # ATen reads lse through a raw pointer; without dropout it reads no random state and no offsets of sequences
    state = q.new_empty(2, dtype=torch.uint64)
    if window not in (EVERYTHING, CAUSAL):
        left, right = (None if width is None else min(width, k.shape[2]) for width in window)  # int32 inside
        grads = aten._flash_attention_backward.default(
            *(x.transpose(1, 2) for x in (o_grad, q, k, v, o)),
            lse.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            False,
            state,
            state,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return tuple(x.transpose(1, 2) for x in grads)
    return aten._scaled_dot_product_flash_attention_backward.default(
        o_grad,
        q,
        k,
        v,
        o,
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        window == CAUSAL,
        state,
        state,
        scale=scale,
    )


def _efficient_backward(
    o_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    state = q.new_empty((), dtype=torch.int64)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward.default(
        o_grad,
        q,
        k,
        v,
        None if bias is None else _additive_aligned(q, k, bias),
        o,
        _padded_lse(lse),
        state,
        state,
        0.0,
        [True, True, True, False],
        window == CAUSAL,
        scale=scale,
    )
    return dq, dk, dv


def _padded_lse(lse: Tensor) -> Tensor:
    """[B, H, Lq up to a multiple of 32]; +inf, which makes p = 0, in the padding and in rows that see no key."""
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    return torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)


def _additive_aligned(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """bias as an additive [B, H, Lq, Lkv] in the dtype of q: broadcast by strides, rows aligned to 16 elements."""
    length = k.shape[2]
    rows = q.new_zeros(*bias.shape[:3], length + -length % 16).narrow(-1, 0, length)
    if bias.dtype == torch.bool:
        rows.masked_fill_(~bias, -math.inf)
    else:
        rows.copy_(bias)
    return rows.expand(*q.shape[:3], length)


def _last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
