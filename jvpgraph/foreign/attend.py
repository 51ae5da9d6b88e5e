"""Attention in the layouts and with the alignments of others, by our op; written for Dynamo to trace."""

from __future__ import annotations

import torch
from torch import Tensor

from jvpgraph.kernels.ops import OPS
from jvpgraph.kernels.window import Window as Limits
from jvpgraph.kernels.window_masks import intervals_from_the_end, intervals_of_sequences

__all__ = ["attend", "attend_packed", "tangents", "tangents_packed", "tiles_of_sequences"]

Window = tuple[int, int]
Qkv = tuple[Tensor, Tensor, Tensor]
Dots = tuple[Tensor | None, Tensor | None, Tensor | None]
Tiles = tuple[Tensor, Tensor] | tuple[None, None]  # map and bytes of a block mask
EVERYTHING, NO_TILES = (-1, -1), (None, None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: Window = EVERYTHING,
    from_the_end: bool = True,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [B, Lq, H, Dv], lse [B, H, Lq]) of q [B, Lq, H, D], k [B, Lkv, Hkv, D], v [B, Lkv, Hkv, Dv].

    Args:
        window: (left, right), -1 for no limit; causal is a right of 0.
        from_the_end: the last query is above the last key, not the first above the first.
        tiles: a block mask, map and bytes, for calls without a window.
    """
    limits, of_window = _limits(q.shape[1], k.shape[1], causal, window, from_the_end, q.device)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    o, lse = OPS.attention.default(q, k, v, bias, False, scale, limits, None, None, *(tiles or of_window))
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
    limits, tiles = _limits(q.shape[1], k.shape[1], causal, window, from_the_end, q.device)
    operands = [None if x is None else x.transpose(1, 2) for x in (*qkv, *dots)]
    *_, o_dot, lse_dot = OPS.attention_jvp.default(*operands, *bias_and_dot, False, scale, limits, None, None, *tiles)
    return o_dot.transpose(1, 2), lse_dot


def _limits(
    n_q: int, n_kv: int, causal: bool, window: Window, from_the_end: bool, device: torch.device
) -> tuple[list[int] | None, Tiles]:
    """The window, or the block mask, by which our op sees the same keys."""
    left, right = window[0], 0 if causal else window[1]
    if left < 0 and right < 0:
        return None, NO_TILES
    if from_the_end and n_q != n_kv:
        ends = intervals_from_the_end(n_q, n_kv, Limits.of(left, right), device)
        return None, OPS.interval_mask.default(*ends, n_kv)
    return [max(left, -1), max(right, -1)], NO_TILES


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

    Windows that are counted from the end take a block mask, unless the lengths of queries and keys are known to be the
    same: they are the same tensor.
    """
    how = _limits_of_sequences(q.shape[0], k.shape[0], (cu_seqlens_q, cu_seqlens_kv), causal, window, from_the_end)
    q, k, v = q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    o, lse = OPS.attention.default(q, k, v, None, False, scale, *how)
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
    how = _limits_of_sequences(q.shape[0], k.shape[0], cu_seqlens, causal, window, from_the_end)
    operands = [None if x is None else x.transpose(0, 1).unsqueeze(0) for x in (*qkv, *dots)]
    *_, o_dot, lse_dot = OPS.attention_jvp.default(*operands, None, None, False, scale, *how)
    return o_dot.squeeze(0).transpose(0, 1), lse_dot.squeeze(0)


def _limits_of_sequences(
    n_q: int, n_kv: int, cu_seqlens: tuple[Tensor, Tensor], causal: bool, window: Window, from_the_end: bool
) -> tuple[list[int] | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The window, the offsets and the block mask by which our op sees the same keys."""
    cu_q, cu_kv = cu_seqlens
    left, right = max(window[0], -1), 0 if causal else max(window[1], -1)
    limited = left >= 0 or right >= 0
    if limited and from_the_end and cu_q is not cu_kv:
        starts, ends = (cu_q[:-1], cu_kv[:-1]), (cu_q[1:], cu_kv[1:])
        return None, None, None, *tiles_of_sequences(starts, ends, n_q, n_kv, (left, right))
    return [left, right] if limited else None, cu_q.int(), cu_kv.int(), None, None


def tiles_of_sequences(
    starts: tuple[Tensor, Tensor], ends: tuple[Tensor, Tensor], n_q: int, n_kv: int, window: Window
) -> Tiles:
    """The block mask of a window within sequences, counted from their ends: see window_masks.intervals_of_sequences."""
    tiles: Tiles = OPS.interval_mask.default(*intervals_of_sequences(starts, ends, n_q, Limits.of(*window)), n_kv)
    return tiles
