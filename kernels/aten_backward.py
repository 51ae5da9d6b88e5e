"""The backward of attention from o and lse: by ATen's own CUDA kernels where they compute exactly that, else by
ours.

Math
    p = exp(s - lse),  dv = p' do,  ds = p * (do v' - rowsum(do * o)),  dq = scale ds k,  dk = scale ds' q
Shapes
    q [B, H, Lq, Dqk], k [B, Hkv, Lkv, Dqk], v [B, Hkv, Lkv, Dv], bias [B | 1, H | 1, Lq | 1, Lkv | 1], lse
    [B, H, Lq]. Any strides: what ATen's kernels take for granted is seen to by layout.for_aten.
Precision
    That of ATen, of backward_kernel or of attention_blocked. lse must be the natural logarithm, in float32: no kernel
    can tell. ATen's take p from lse, which has no digits left for it in a row whose keys are all hidden by a large
    finite bias: such rows go to ours, which sum p anew.
Scale
    ATen's kernels set what is out of sight to -inf and then multiply by scale: below 0 all of that is seen, at 0 it is
    NaN.
Windows
    Flash takes every window, but aligns it at the last query and the last key: as here only where Lq = Lkv.
Refuses
    Nothing: what ATen does not take goes to backward_kernel, and what that does not take to attention_blocked;
    backward_path says which, and why.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from jvpgraph.kernels import attention_blocked, backward_triton
from jvpgraph.kernels.attention_blocked import needs_own_sums
from jvpgraph.kernels.layout import for_aten
from jvpgraph.kernels.window import CAUSAL, EVERYTHING, Window

__all__ = ["Path", "attention_backward", "backward_path"]

aten = torch.ops.aten


class Path(NamedTuple):
    """Which kernels compute a backward, and why not ATen's, where they do not."""

    name: str  # "flash" and "efficient" are ATen's, "triton" is backward_kernel, "blocked" attention_blocked
    why: str = ""


def backward_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: Window,
    scale: float,
    has_lse_grad: bool,
    bias_needs_grad: bool,
) -> Path:
    """The first of "flash", "efficient", "triton" and "blocked" that is exact here. Of an additive bias "efficient" is
    for those that hide no row whole, which takes a look at lse."""
    why = _not_for_aten(q, k, v, scale, has_lse_grad, bias_needs_grad)
    if not why:
        if _flash_takes(q, k, v, bias, window):
            return Path("flash")
        why = _not_for_efficient(q, k, bias, window)
    not_ours = backward_triton.why_not(q, k, v, bias, bias_needs_grad=bias_needs_grad)
    if not why and bias is not None and bias.dtype != torch.bool and not not_ours:
        why = "an additive bias, which may hide whole rows"  # to see whether it does would wait for the GPU
    if not why:
        return Path("efficient")
    return Path("blocked", f"{why}, and {not_ours}" if not_ours != why else why) if not_ours else Path("triton", why)


def _not_for_aten(q: Tensor, k: Tensor, v: Tensor, scale: float, has_lse_grad: bool, bias_needs_grad: bool) -> str:
    if not scale > 0:
        return f"scale is {scale}"
    if has_lse_grad:
        return "lse has a gradient"  # which would enter rowsum(o * o_grad), and ATen's kernels form that inside
    if bias_needs_grad:
        return "the bias has a gradient"  # of B H Lq Lkv elements in ATen, whatever the bias broadcasts
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return "there is nothing to compute"
    if any(x.shape[-1] * x.element_size() % 16 for x in (q, v)):
        return "the head dim is no multiple of 16 bytes"  # which they load at a time
    return ""


def _flash_takes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: Window) -> bool:
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and bias is None
        and q.shape[-1] == v.shape[-1] <= 192  # beyond that not on every architecture
        and (window == EVERYTHING or q.shape[2] == k.shape[2])  # flash aligns its window at the bottom right
    )


def _not_for_efficient(q: Tensor, k: Tensor, bias: Tensor | None, window: Window) -> str:
    if q.shape[1] != k.shape[1]:
        return "grouped heads with a mask, unequal head dims or float32"
    if window != EVERYTHING and (window != CAUSAL or bias is not None):
        return "a sliding window of unequal lengths, or a mask that is causal too"
    if bias is not None and bias.dtype not in (torch.bool, q.dtype):
        return f"a {bias.dtype} bias beside {q.dtype}"  # rounding it would move p off lse
    return ""


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
    path = backward_path(q, k, v, bias, window, scale, lse_grad is not None, bias_needs_grad).name
    if path == "efficient" and needs_own_sums(bias, lse):
        path = "blocked"
    if path == "blocked":
        return attention_blocked.attention_backward(
            o_grad, lse_grad, q, k, v, bias, o, lse, window, scale, bias_needs_grad
        )
    if path == "triton":
        grads = backward_triton.attention_jvp_backward(
            o_grad, lse_grad, None, None, q, k, v, None, None, None, bias, o, lse, None, window, scale
        )
        return *grads[:3], None
    function = _flash_backward if path == "flash" else _efficient_backward
    o_grad, q, k, v, o = map(for_aten, (o_grad, q, k, v, o))
    return *function(o_grad, q, k, v, bias, o, for_aten(lse), window, scale), None


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
            lse,
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
        lse,
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
