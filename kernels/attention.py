"""Attention and its JVP: the functions to call, and what they compute.

Math
    s = scale q k' + bias,  p = softmax(s),  o = p v,  lse = log sum exp(s)
    s_dot = scale (q_dot k' + q k_dot') + bias_dot,  h = p * s_dot,  r = rowsum(h)
    o_dot = p v_dot + h v - r * o,  lse_dot = r
Shapes
    q [B, H, Lq, Dqk], k [B, Hkv, Lkv, Dqk], v [B, Hkv, Lkv, Dv] with Hkv a divisor of H; also [B, L, D]
    without heads, and more leading batch dims. bias broadcasts to [B, H, Lq, Lkv] from any rank up to that
    of q: boolean (True attends) or additive. o and the gradients lie in memory as B, L, H, D and are viewed
    as B, H, L, D, whatever the strides of the inputs; lse [B, H, Lq].
Windows
    is_causal: query i sees keys 0..i. window (left, right): keys i - left..i + right, -1 for no limit. Positions are
    counted from the first query and the first key (top left aligned, as torch's SDPA).
Packed sequences
    q [1, H, Tq, Dqk], k and v [1, Hkv, Tkv, D] of sequences one after the other; sequence n has the queries
    cu_seqlens_q[n] to cu_seqlens_q[n + 1] and the keys cu_seqlens_kv[n] to cu_seqlens_kv[n + 1], both int32, and sees
    itself only. Positions in a window count within a sequence. Lengths are read on the device: none is compiled in.
    Offsets have to ascend from 0 to at most the length: a ValueError otherwise, on a GPU a failed assertion there.
    The backward waits for the lengths, and takes each sequence on its own; while a CUDA graph is captured it takes a
    dense mask instead, a byte for each pair of a query and a key.
Block masks
    map [B | 1, H | 1, tiles, tiles] and the bytes of the tiles that are cut: what is hidden is not visited, and no mask
    is read in tiles that are seen whole. A pair is seen if block mask, bias and window all let it. See
    jvpgraph.kernels.block_mask.
Precision
    lse in natural log; lse and all sums in float32 (float64 for float64 inputs), o in the dtype of q.
Fully masked rows
    o = 0, lse = -inf, and zero tangents and gradients, for rows masked by -inf or a boolean bias. A finite bias,
    however large, masks no row fully: it is added in the dtype inside, and p, the tangent and the gradients are those
    of softmax(s + bias), which is uniform where the bias leaves nothing of s.
Layouts
    Any strides, of every operand: the layouts that ATen's kernels require are made for them (layout.for_aten).
Refuses
    Mixed dtypes and devices, head dims or head counts that do not fit, a bias that does not broadcast, dropout, a last
    dim that is not contiguous (ValueError); forward-mode AD through the ops, which would otherwise give a silent zero,
    and gradients of o_dot unless differentiable_tangent (RuntimeError).
Source
    Dao et al., FlashAttention (2022) for the online softmax; Lu and Song, sCM (2024), appendix F for its JVP.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from jvpgraph.kernels.block_mask import as_block_mask
from jvpgraph.kernels.call import How
from jvpgraph.kernels.checks import check_strides
from jvpgraph.kernels.ops import OPS

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Options", "attention", "attention_backward", "attention_jvp", "merge_attention"]


class Options(TypedDict, total=False):
    """What the functions take by keyword.

    window: (left, right): query i sees keys i - left..i + right; -1 for no limit.
    cu_seqlens_q, cu_seqlens_kv: int32 [S + 1], ascending from 0: where the S sequences packed along Lq and Lkv begin
        and end. Needs B = 1 and no bias. What lies outside of all sequences counts as fully masked.
    block_mask: which tiles of queries and keys are visited, and who sees whom in those that are cut: a BlockMask of
        jvpgraph.kernels.block_mask, or of torch.nn.attention.flex_attention, which is converted on each call.
    dropout_p: for calls written for scaled_dot_product_attention; anything but 0 is refused.
    """

    window: tuple[int, int] | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_kv: Tensor | None
    block_mask: Any
    dropout_p: float


def _how(
    q: Tensor,
    is_causal: bool,
    scale: float | None,
    *,
    window: tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    block_mask: Any = None,
    dropout_p: float = 0.0,
) -> How:
    """As the ops take it."""
    if dropout_p != 0:
        raise ValueError(f"attention has no dropout, the tangent of which would need the same mask; got {dropout_p}")
    if block_mask is not None and q.dim() != 4:
        raise ValueError(f"attention with a block mask needs q, k, v of rank 4; got {tuple(q.shape)}")
    blocks = (None, None) if block_mask is None else as_block_mask(block_mask, *q.shape[:2])
    return How(is_causal, scale, window, cu_seqlens_q, cu_seqlens_kv, *blocks)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k' + bias) v, and the log of the softmax's denominator.

    Args:
        q: [B, H, Lq, Dqk], or [B, Lq, Dqk], or with more leading batch dims; any strides but that of the last dim,
            which is contiguous.
        k: [B, Hkv, Lkv, Dqk], Hkv a divisor of H.
        v: [B, Hkv, Lkv, Dv].
        bias: broadcasts to [B, H, Lq, Lkv], from any rank up to that of q; boolean (True attends), or
            additive in float32 or the dtype of q, outside the scale.
        is_causal: query i sees keys 0..i; combines with bias and window.
        scale: factor on q k', default 1 / sqrt(Dqk).
        options: see Options.

    Returns:
        o [B, H, Lq, Dv] in the dtype of q, laid out as B, Lq, H, Dv; lse [B, H, Lq], natural log, float32
        (float64 for float64). Both have gradients in q, k, v and additive bias.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit, or dropout is asked for.
        RuntimeError: an input carries a tangent of torch's own forward mode.
    """
    check_strides(q=q, k=k, v=v)
    return OPS.attention.default(q, k, v, bias, *_how(q, is_causal, scale, **options))


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
    *,
    differentiable_tangent: bool = False,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention and its directional derivative, in one pass over the keys and memory linear in their number.

    Args:
        q, k, v, bias, is_causal, scale, options: as for attention.
        q_dot, k_dot, v_dot, bias_dot: tangents, each of the shape and dtype of its primal, or None for an
            inactive one, whose products are then not computed.
        differentiable_tangent: o_dot and lse_dot have gradients too, in all primals and tangents.

    Returns:
        o, lse as attention gives them; o_dot, lse_dot likewise, without gradients unless differentiable_tangent.
    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit, or dropout is asked for.
        RuntimeError: a gradient of o_dot or lse_dot is asked for without differentiable_tangent, or an input carries a
            tangent of torch's own forward mode.
    """
    check_strides(q=q, k=k, v=v, q_dot=q_dot, k_dot=k_dot, v_dot=v_dot)
    how = _how(q, is_causal, scale, **options)
    return OPS.attention_jvp.default(q, k, v, q_dot, k_dot, v_dot, bias, bias_dot, *how, differentiable_tangent)


def attention_backward(
    o_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    bias_needs_grad: bool = False,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias from the o and lse of attention or attention_jvp.

    Returns:
        dq, dk, dv shaped as q, k, v; dbias shaped as bias, or an empty tensor unless bias_needs_grad.
    """
    check_strides(q=q, k=k, v=v)
    how = _how(q, is_causal, scale, **options)
    return OPS.attention_backward.default(o_grad, lse_grad, q, k, v, bias, o, lse, *how, bias_needs_grad)


def merge_attention(*parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Attention over the union of disjoint key sets, from attention over each.

    With w_i = exp(lse_i - lse), which sum up to 1: o = sum w_i o_i, lse_dot = sum w_i lse_dot_i,
    o_dot = sum w_i (o_dot_i + (lse_dot_i - lse_dot) o_i).

    Args:
        parts: (o, lse) or (o, lse, o_dot, lse_dot) of each key set, shaped as attention and attention_jvp
            return them.

    Returns:
        The same tuple for all keys together; a row that no part attends to gives o = 0, lse = -inf and zero
        tangents.
    """
    if not parts or len({len(part) for part in parts}) != 1 or len(parts[0]) not in (2, 4):
        raise ValueError("merge_attention needs tuples (o, lse), or tuples (o, lse, o_dot, lse_dot), all of one length")
    lses = torch.stack([part[1] for part in parts])
    lse = lses.logsumexp(0)
    blind = lse == -math.inf
    # not exp(lses - lse), which has no digits where a large finite mask hides all keys; keys of such parts weigh alike
    # where parts have as many
    weights = lses.masked_fill(blind, 0).softmax(0).masked_fill(blind, 0)
    dtype = parts[0][0].dtype
    o = sum(w[..., None] * part[0] for w, part in zip(weights, parts))
    if len(parts[0]) == 2:
        return o.to(dtype), lse
    lse_dot = sum(w * part[3] for w, part in zip(weights, parts))
    o_dot = sum(w[..., None] * (part[2] + (part[3] - lse_dot)[..., None] * part[0]) for w, part in zip(weights, parts))
    return o.to(dtype), lse, o_dot.to(dtype), lse_dot
