"""Attention in the layouts and with the alignments of others, by our op; written for Dynamo to trace."""

from __future__ import annotations

import torch
from torch import Tensor

from jvpgraph.kernels.ops import OPS
from jvpgraph.kernels.window import Window as Limits
from jvpgraph.kernels.window import hide_more, sequences_mask

__all__ = ["attend", "attend_packed", "tangents", "tangents_packed"]

Window = tuple[int, int]
Qkv = tuple[Tensor, Tensor, Tensor]
Dots = tuple[Tensor | None, Tensor | None, Tensor | None]
EVERYTHING = (-1, -1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: Window = EVERYTHING,
    from_the_end: bool = True,
) -> tuple[Tensor, Tensor]:
    """(o [B, Lq, H, Dv], lse [B, H, Lq]) of q [B, Lq, H, D], k [B, Lkv, Hkv, D], v [B, Lkv, Hkv, Dv].

    Args:
        window: (left, right), -1 for no limit; causal is a right of 0.
        from_the_end: the last query is above the last key, not the first above the first.
    """
    bias, limits = _limits(q.shape[1], k.shape[1], bias, causal, window, from_the_end, q.device)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    o, lse = OPS.attention.default(q, k, v, bias, False, scale, limits)
    return o.transpose(1, 2), lse


def tangents(
    qkv: Qkv,
    dots: Dots,
    causal: bool = False,
    scale: float | None = None,
    window: Window = EVERYTHING,
    from_the_end: bool = True,
    bias_and_dot: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """The tangents of attend, for a primal by another kernel."""
    q, k, _ = qkv
    bias, bias_dot = bias_and_dot
    bias, limits = _limits(q.shape[1], k.shape[1], bias, causal, window, from_the_end, q.device)
    operands = [None if x is None else x.transpose(1, 2) for x in (*qkv, *dots)]
    *_, o_dot, lse_dot = OPS.attention_jvp.default(*operands, bias, bias_dot, False, scale, limits)
    return o_dot.transpose(1, 2), lse_dot


def _limits(
    n_q: int, n_kv: int, bias: Tensor | None, causal: bool, window: Window, from_the_end: bool, device: torch.device
) -> tuple[Tensor | None, list[int] | None]:
    """The mask and the window by which our op sees the same keys."""
    left, right = window[0], 0 if causal else window[1]
    if (left >= 0 or right >= 0) and from_the_end and n_q != n_kv:
        return hide_more(_band(n_q, n_kv, Limits.of(left, right), device), bias), None
    return bias, None if left < 0 and right < 0 else [max(left, -1), max(right, -1)]


def _band(n_q: int, n_kv: int, window: Limits, device: torch.device) -> Tensor:
    """[n_q, n_kv]: the keys within a window that is counted from the last query and the last key."""
    rows = torch.arange(n_q, device=device).unsqueeze(1) + (n_kv - n_q)
    return ~window.hides(torch.arange(n_kv, device=device) - rows)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    causal: bool = False,
    scale: float | None = None,
    window: Window = EVERYTHING,
    from_the_end: bool = True,
) -> tuple[Tensor, Tensor]:
    """(o [Tq, H, Dv], lse [H, Tq]) of sequences one after the other: q [Tq, H, D], k and v [Tkv, Hkv, D].

    Windows that are counted from the end take a mask of all pairs, unless the lengths of queries and keys are known to
    be the same: they are the same tensor.
    """
    mask, limits, cu_q, cu_kv = _limits_of_sequences(
        q.shape[0], k.shape[0], (cu_seqlens_q, cu_seqlens_kv), causal, window, from_the_end
    )
    q, k, v = q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    o, lse = OPS.attention.default(q, k, v, mask, False, scale, limits, cu_q, cu_kv)
    return o.squeeze(0).transpose(0, 1), lse.squeeze(0)


def tangents_packed(
    qkv: Qkv,
    dots: Dots,
    cu_seqlens: tuple[Tensor, Tensor],
    causal: bool = False,
    scale: float | None = None,
    window: Window = EVERYTHING,
    from_the_end: bool = True,
) -> tuple[Tensor, Tensor]:
    """The tangents of attend_packed, for a primal by another kernel."""
    q, k, _ = qkv
    mask, limits, cu_q, cu_kv = _limits_of_sequences(q.shape[0], k.shape[0], cu_seqlens, causal, window, from_the_end)
    operands = [None if x is None else x.transpose(0, 1).unsqueeze(0) for x in (*qkv, *dots)]
    *_, o_dot, lse_dot = OPS.attention_jvp.default(*operands, mask, None, False, scale, limits, cu_q, cu_kv)
    return o_dot.squeeze(0).transpose(0, 1), lse_dot.squeeze(0)


def _limits_of_sequences(
    n_q: int, n_kv: int, cu_seqlens: tuple[Tensor, Tensor], causal: bool, window: Window, from_the_end: bool
) -> tuple[Tensor | None, list[int] | None, Tensor | None, Tensor | None]:
    """The mask, the window and the offsets by which our op sees the same keys."""
    cu_q, cu_kv = cu_seqlens
    left, right = max(window[0], -1), 0 if causal else max(window[1], -1)
    limited = left >= 0 or right >= 0
    if limited and from_the_end and cu_q is not cu_kv:
        starts, ends = (cu_q[:-1], cu_kv[:-1]), (cu_q[1:], cu_kv[1:])
        mask = sequences_mask(starts, ends, n_q, n_kv, Limits.of(left, right), from_the_end=True)
        return mask, None, None, None
    return None, [left, right] if limited else None, cu_q.int(), cu_kv.int()
