"""aten::_efficient_attention_forward, which xformers and PyTorch call by itself: swapped in graphs, and its rule.

In graphs its gradient could not be traced: PyTorch's fake of that has other arguments than the op (2.13).
Windows are of causal masks alone: a query sees the last so many keys, itself included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jvpgraph.foreign.attend import Window, attend, attend_packed, tangents, tangents_packed
from jvpgraph.foreign.table import REFUSED, refuse, swaps
from jvpgraph.rules.registry import jvp_by_name

__all__: list[str] = []

NAME = "_efficient_attention_forward"
FROM_THE_START, FROM_THE_END = 1, 2  # values of custom_mask_type that are causal
PADDING = 32  # to a multiple of which the kernel brings the rows of its logsumexp


def _unmet(given: dict[str, Any]) -> str:
    """Why such a call is refused; empty where it is not."""
    if given["dropout_p"] != 0:
        return f"dropout_p: {REFUSED['dropout_p']}"
    if given["seqlen_k"] is not None:
        return "seqlen_k: keys end before the next sequence begins, for which xformers has masks"
    if given["custom_mask_type"] not in (0, FROM_THE_START, FROM_THE_END):
        return "custom_mask_type: a mask that our version of the function does not know"
    if given["window_size"] is not None and not given["custom_mask_type"]:
        return "window_size: windows are of causal masks only"
    bias, packed = given["bias"], given["cu_seqlens_q"] is not None
    if bias is not None and packed:
        return "bias: added to packed sequences, of which our kernel takes masks only"
    if bias is not None and bias.dim() != 4:
        return "bias: our kernel takes one of four dims, [B, H, Lq, Lkv]"
    return "" if packed == (given["cu_seqlens_k"] is not None) else "cu_seqlens_q: either both are packed, or neither"


def _window(kind: int, window_size: int | None) -> tuple[bool, Window, bool]:
    """Whether the mask is causal, its window, and whether both are counted from the end."""
    return kind != 0, (-1 if window_size is None else window_size - 1, -1), kind == FROM_THE_END


@swaps(f"torch.ops.aten.{NAME}", f"torch.ops.aten.{NAME}.default")
def efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
    seqlen_k: Tensor | None = None,
    window_size: int | None = None,
) -> tuple[Any, ...]:
    """query [B, Lq, H, D], key and value [B, Lkv, H, D], or [1, T, H, D] packed."""
    given = {"bias": bias, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "dropout_p": dropout_p}
    given |= {"custom_mask_type": custom_mask_type, "seqlen_k": seqlen_k, "window_size": window_size}
    if reason := _unmet(given):
        argument, _, why = reason.partition(": ")
        refuse(NAME, argument, why)
    causal, window, from_the_end = _window(custom_mask_type, window_size)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        o, lse = attend(query, key, value, bias, causal, scale, window, from_the_end)
    else:
        whole = query.squeeze(0), key.squeeze(0), value.squeeze(0)
        o, lse = attend_packed(*whole, cu_seqlens_q, cu_seqlens_k, causal, scale, window, from_the_end)
        o = o.unsqueeze(0)
    most = query.shape[1] if max_seqlen_q is None else max_seqlen_q
    rows = -(-most // PADDING) * PADDING if compute_log_sumexp else 0
    lse = _as_theirs(lse.float(), cu_seqlens_q, rows, math.inf)
    seed = torch.empty((), dtype=torch.long, device=query.device).zero_()
    return o, lse, seed, seed.clone(), most, key.shape[1] if max_seqlen_k is None else max_seqlen_k


def _as_theirs(lse: Tensor, cu_seqlens: Tensor | None, rows: int, rest: float) -> Tensor:
    """[B, H, rows] of a logsumexp [B, H, Lq], or by sequences of [H, T]; where there is no query, ``rest``."""
    if cu_seqlens is None:
        return F.pad(lse, (0, rows - lse.shape[-1]), value=rest) if rows else lse[..., :0]
    at = torch.arange(rows, device=lse.device)
    starts, ends = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    own = lse[:, (starts + at).clamp(max=lse.shape[1] - 1)].transpose(0, 1)  # [S, H, rows]
    return torch.where((at < ends - starts).unsqueeze(1), own, rest)


def _unmet_by_rule(given: dict[str, Any]) -> str:
    reason = _unmet(given)
    if reason or given["window_size"] is None:
        return reason
    return (
        "window_size: PyTorch's gradient of the op leaves it out: call xformers.ops.memory_efficient_attention, or "
        "torch.ops.aten._efficient_attention_forward in a graph, where it is swapped"
    )


@jvp_by_name(f"aten::{NAME}", wrt="query key value bias", unmet=_unmet_by_rule)
def rule(outs: Any, given: dict[str, Any], dots: dict[str, Any]) -> list[Tensor | None]:
    """Of the output and the logsumexp, which is empty where it is not asked for."""
    qkv = given["query"], given["key"], given["value"]
    own = dots["query_dot"], dots["key_dot"], dots["value_dot"]
    causal, window, from_the_end = _window(given["custom_mask_type"], None)
    cu_q, scale = given["cu_seqlens_q"], given["scale"]
    if cu_q is None:
        bias = given["bias"], dots["bias_dot"]
        o_dot, lse_dot = tangents(qkv, own, causal, scale, window, from_the_end, bias)
    else:
        q, k, v = (x.squeeze(0) for x in qkv)
        q_dot, k_dot, v_dot = (None if x is None else x.squeeze(0) for x in own)
        how = (cu_q, given["cu_seqlens_k"]), causal, scale, window, from_the_end
        o_dot, lse_dot = tangents_packed((q, k, v), (q_dot, k_dot, v_dot), *how)
        o_dot = o_dot.unsqueeze(0)
    if not given["compute_log_sumexp"]:
        return [o_dot, *[None] * 5]
    return [o_dot, _as_theirs(lse_dot, cu_q, outs[1].shape[-1], 0.0), *[None] * 4]
