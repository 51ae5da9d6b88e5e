"""Attention and its backward by ATen's flash kernel for CPUs, where it computes the same thing: the primal is then bit
for bit what the unchanged model gives.

Math, Shapes
    As in attention_blocked, without tangents.
Refuses
    What `refuses` and `backward_refuses` say. Of a scale that is not positive it sets what is out of sight to -inf and
    then multiplies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jvpgraph.kernels.call import Call, Cotangents, Gradients, Outputs
from jvpgraph.kernels.layout import for_aten
from jvpgraph.kernels.window import CAUSAL, EVERYTHING

__all__ = ["attend", "backward_refuses", "differentiate", "refuses"]

aten = torch.ops.aten


def refuses(call: Call) -> str | None:
    """Why the kernel does not take the forward of this call."""
    return "ATen's has no tangent" if call.is_active else _refuses(call)


def _refuses(call: Call) -> str | None:
    q, k, v = call.q, call.k, call.v
    if call.packing is not None:
        return "packed sequences"
    if call.block_mask is not None:
        return "a block mask"
    if q.shape[1] != k.shape[1] or q.shape[3] != v.shape[3]:
        return "grouped heads, or unequal head dims"
    if call.window != EVERYTHING and (call.window != CAUSAL or call.bias is not None):
        return "a sliding window, or a mask that is causal too"
    if not call.scale > 0:
        return f"scale is {call.scale}"
    return "there is nothing to compute" if call.is_empty else None


def backward_refuses(call: Call) -> str | None:
    """Why the kernel does not take the backward of this call."""
    if call.wanted.from_lse:
        return "lse has a gradient"
    if call.wanted.bias:
        return "the bias has a gradient"
    if call.q.dtype.itemsize == 2 and call.k.shape[2] < 256:
        return "few keys in half types"  # 2.5 times as slow as blocks of torch ops at 64 keys, faster from 256 on
    return _refuses(call)


def _additive(q: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """bias as the kernel takes it, and which rows see no key at all [B | 1, H | 1, Lq | 1]."""
    if bias is None:
        return None, None
    if bias.dtype == torch.bool:
        return bias.new_zeros(bias.shape, dtype=q.dtype).masked_fill_(~bias, -math.inf), ~bias.any(-1)
    # the kernel takes float32 beside half types, but nothing else than the dtype of q otherwise
    additive = bias.to(q.dtype) if q.dtype == torch.float64 else bias
    return for_aten(additive), bias.amax(-1) == -math.inf


def attend(call: Call) -> Outputs:
    """o and lse."""
    additive, empty = _additive(call.q, call.bias)
    q, k, v = map(for_aten, (call.q, call.k, call.v))
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, call.window == CAUSAL, attn_mask=additive, scale=call.scale
    )
    if empty is not None:
        lse = lse.masked_fill(empty, -math.inf)  # the kernel says 0
    return Outputs(o, lse.contiguous())


def differentiate(call: Call, outs: Outputs, grads: Cotangents) -> Gradients:
    """The gradients of q, k and v."""
    additive, _ = _additive(call.q, call.bias)
    o_grad = torch.zeros_like(outs.o) if grads.o is None else grads.o
    lse = outs.lse
    if call.bias is not None:
        lse = lse.masked_fill(lse == -math.inf, 0)
    o_grad, q, k, v, o, lse = map(for_aten, (o_grad, call.q, call.k, call.v, outs.o, lse))
    return Gradients(
        *aten._scaled_dot_product_flash_attention_for_cpu_backward(
            o_grad, q, k, v, o, lse, 0.0, call.window == CAUSAL, attn_mask=additive, scale=call.scale
        )
    )
