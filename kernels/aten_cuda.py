"""The backward of attention from o and lse by ATen's CUDA kernels, where they compute exactly that.

Math
    p = exp(s - lse),  dv = p' do,  ds = p * (do v' - rowsum(do * o)),  dq = scale ds k,  dk = scale ds' q
Shapes
    As of call.Call and call.Gradients. Any strides: what the kernels take for granted is seen to by layout.for_aten.
Precision
    That of ATen. lse must be the natural logarithm, in float32: no kernel can tell. They take p from lse, which has no
    digits left for it in a row whose keys are all hidden by a large finite bias: such rows are not for them.
Scale
    They set what is out of sight to -inf and then multiply by scale: below 0 all of that is seen, at 0 it is NaN.
Windows
    Flash takes every window, but aligns it at the last query and the last key: as here only where Lq = Lkv.
Refuses
    What flash_refuses and efficient_refuses say.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jvpgraph.kernels.call import Call, Cotangents, Gradients, Outputs
from jvpgraph.kernels.layout import for_aten
from jvpgraph.kernels.window import CAUSAL, EVERYTHING

__all__ = ["efficient", "efficient_refuses", "flash", "flash_refuses"]

aten = torch.ops.aten


def _refuses(call: Call) -> str | None:
    """What neither takes."""
    if call.packing is not None:
        return "packed sequences"
    if call.block_mask is not None:
        return "a block mask"
    if not call.scale > 0:
        return f"scale is {call.scale}"
    if call.wanted.from_lse:
        return "lse has a gradient"  # which would enter rowsum(o * o_grad), and they form that inside
    if call.wanted.bias:
        return "the bias has a gradient"  # of B H Lq Lkv elements in ATen, whatever the bias broadcasts
    if call.is_empty:
        return "there is nothing to compute"
    if any(x.shape[-1] * x.element_size() % 16 for x in (call.q, call.v)):
        return "the head dim is no multiple of 16 bytes"  # which they load at a time
    return None


def flash_refuses(call: Call) -> str | None:
    """Why FlashAttention does not compute this."""
    q, k, v = call.q, call.k, call.v
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash takes no {q.dtype}"
    if call.bias is not None:
        return "flash takes no mask"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > 192:  # beyond that not on every architecture
        return "unequal head dims, or more than 192 columns"
    if call.window != EVERYTHING and q.shape[2] != k.shape[2]:
        return "a window of unequal lengths"  # flash aligns it at the bottom right
    return _refuses(call)


def efficient_refuses(call: Call) -> str | None:
    """Why the memory-efficient kernel does not compute this."""
    if why := _refuses(call):
        return why
    bias = call.bias
    if call.q.shape[1] != call.k.shape[1]:
        return "grouped heads with a mask, unequal head dims or float32"
    if call.window != EVERYTHING and (call.window != CAUSAL or bias is not None):
        return "a sliding window of unequal lengths, or a mask that is causal too"
    if bias is not None and bias.dtype not in (torch.bool, call.q.dtype):
        return f"a {bias.dtype} bias beside {call.q.dtype}"  # rounding it would move p off lse
    return None


def flash(call: Call, outs: Outputs, grads: Cotangents) -> Gradients:
    """The gradients of q, k and v by FlashAttention."""
    o_grad, q, k, v, o, lse = _operands(call, outs, grads)
    window, scale = call.window, call.scale
    # ATen reads lse through a raw pointer; without dropout it reads no random state and no offsets of sequences
    state = q.new_empty(2, dtype=torch.uint64)
    if window not in (EVERYTHING, CAUSAL):
        left, right = (None if width is None else min(width, k.shape[2]) for width in window)  # int32 inside
        found = aten._flash_attention_backward.default(
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
        return Gradients(*(x.transpose(1, 2) for x in found))
    found = aten._scaled_dot_product_flash_attention_backward.default(
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
    return Gradients(*found)


def efficient(call: Call, outs: Outputs, grads: Cotangents) -> Gradients:
    """The gradients of q, k and v by the memory-efficient kernel."""
    o_grad, q, k, v, o, lse = _operands(call, outs, grads)
    state = q.new_empty((), dtype=torch.int64)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward.default(
        o_grad,
        q,
        k,
        v,
        None if call.bias is None else _additive_aligned(q, k, call.bias),
        o,
        _padded_lse(lse),
        state,
        state,
        0.0,
        [True, True, True, False],
        call.window == CAUSAL,
        scale=call.scale,
    )
    return Gradients(dq, dk, dv)


def _operands(call: Call, outs: Outputs, grads: Cotangents) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of o, q, k, v, o and lse as they take for granted that these lie in memory."""
    o_grad = torch.zeros_like(outs.o) if grads.o is None else grads.o
    return (
        for_aten(o_grad),
        for_aten(call.q),
        for_aten(call.k),
        for_aten(call.v),
        for_aten(outs.o),
        for_aten(outs.lse),
    )


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
