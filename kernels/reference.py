"""Attention and its JVP, N x N and in one line per formula: the specification the kernels are tested against.

Math
    s = scale q k' + bias,  p = softmax(s),  o = p v,  lse = log sum exp(s)
    s_dot = scale (q_dot k' + q k_dot') + bias_dot,  h = p * s_dot,  r = rowsum(h)
    o_dot = p v_dot + h v - r * o,  lse_dot = r
Shapes
    q [..., H, Lq, Dqk], k [..., Hkv, Lkv, Dqk], v [..., Hkv, Lkv, Dv]; Hkv divides H. bias broadcasts to
    [..., H, Lq, Lkv], boolean (True attends) or additive. is_causal lets query i see keys 0..i (top left
    aligned, as torch's SDPA) and combines with bias; window (left, right) shows it keys i - left..i + right, -1 for no
    limit.
Precision
    Whatever the inputs have: call it in float64.
Fully masked rows
    o = 0, lse = -inf, o_dot = 0, lse_dot = 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None, window: tuple[int, int] | None
) -> tuple[Tensor, float]:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    s = scale * (q @ k.mT)
    if bias is not None:
        s = s.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else s + bias
    left, right = window or (-1, -1)
    ahead = torch.arange(k.shape[-2], device=s.device) - torch.arange(q.shape[-2], device=s.device)[:, None]
    if is_causal:
        s = s.masked_fill(ahead > 0, -math.inf)
    if left >= 0:
        s = s.masked_fill(ahead < -left, -math.inf)
    if right >= 0:
        s = s.masked_fill(ahead > right, -math.inf)
    return s, scale


def _probabilities(s: Tensor) -> tuple[Tensor, Tensor]:
    lse = s.logsumexp(-1)
    blind = (lse == -math.inf)[..., None]
    return s.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0), lse  # exp(s - lse) has no digits in a row of -1e9


def _repeat_heads(q: Tensor, x: Tensor) -> Tensor:
    if q.dim() < 4 or q.shape[-3] == x.shape[-3]:
        return x
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(o, lse) of softmax(scale q k' + bias) v. Differentiable by torch, except through fully masked rows."""
    k, v = _repeat_heads(q, k), _repeat_heads(q, v)
    s, _ = _scores(q, k, bias, is_causal, scale, window)
    p, lse = _probabilities(s)
    return p @ v, lse


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    bias: Tensor | None = None,
    bias_dot: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, lse, o_dot, lse_dot); a tangent given as None is zero."""
    k, v = _repeat_heads(q, k), _repeat_heads(q, v)
    k_dot, v_dot = (None if x is None else _repeat_heads(q, x) for x in (k_dot, v_dot))
    s, scale = _scores(q, k, bias, is_causal, scale, window)
    p, lse = _probabilities(s)
    o = p @ v
    s_dot = torch.zeros_like(s)
    if q_dot is not None:
        s_dot = s_dot + scale * (q_dot @ k.mT)
    if k_dot is not None:
        s_dot = s_dot + scale * (q @ k_dot.mT)
    if bias_dot is not None:
        s_dot = s_dot + bias_dot
    h = p * s_dot
    r = h.sum(-1)
    o_dot = h @ v - r[..., None] * o
    if v_dot is not None:
        o_dot = o_dot + p @ v_dot
    return o, lse, o_dot, r
