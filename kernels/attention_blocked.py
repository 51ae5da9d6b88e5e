"""Attention and its JVP in blocks of plain torch: memory linear in the sequence length, on any device.

Math
    s = scale q k' + bias,  p = softmax(s),  o = p v,  lse = log sum exp(s)
    s_dot = scale (q_dot k' + q k_dot') + bias_dot,  h = p * s_dot,  r = rowsum(h)
    o_dot = p v_dot + h v - r * o,  lse_dot = r
Streaming form
    Over key blocks: running row maximum m, row sum l, and accumulators for o, for p v_dot + h v and for r,
    all rescaled by exp(m_old - m_new) (FlashAttention's online softmax). s_dot is one product, [q_dot, q]
    [k, k_dot]', and is centred: o_dot does not change when a constant per row is subtracted from s_dot, so
    the mean over keys of [k, k_dot] is taken out first, which keeps r * o from cancelling against h v where
    a tangent is common to all keys; lse_dot gets it back. What a block is: see visits.
Shapes
    As of call.Call and call.Outputs.
Precision
    float32 inside for float16 and bfloat16, else the dtype of the inputs; lse likewise.
Refuses
    Packed sequences, which come here one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jvpgraph.kernels.blocked_parts import score_tangent_operands, score_tangents
from jvpgraph.kernels.call import Call, Outputs
from jvpgraph.kernels.layout import dtype_inside, empty_rows
from jvpgraph.kernels.visits import Chunk, take, take_rows, visits_of

__all__ = ["attend", "blind_outputs"]

BLIND = (0.0, -math.inf, 0.0, 0.0)  # o, lse, o_dot and lse_dot of a query that sees no key


def _empty_outputs(call: Call) -> Outputs:
    q, length, dim = call.q, call.q.shape[2], call.v.shape[3]
    o, lse = empty_rows(q, length, dim), q.new_empty(q.shape[:3], dtype=dtype_inside(q))
    o_dot = empty_rows(q, length, dim) if call.is_active else None
    return Outputs(o, lse, o_dot, torch.empty_like(lse) if call.s_active else None)


def blind_outputs(call: Call) -> Outputs:
    """What queries get that see no key."""
    outs = _empty_outputs(call)
    for x, value in zip(outs, BLIND):
        if x is not None:
            x.fill_(value)
    return outs


def attend(call: Call, *, block_q: int | None = None, block_k: int | None = None) -> Outputs:
    """o and lse, and o_dot and lse_dot where there are tangents for them. block_q and block_k override the block sizes,
    for tests."""
    if call.is_empty:
        return blind_outputs(call)
    assert call.packing is None
    q, k, v, dtype, dim_v = call.q, call.k, call.v, dtype_inside(call.q), call.v.shape[3]
    outs = _empty_outputs(call)
    visits = visits_of(call, block_q, block_k)
    for chunk in visits.chunks():
        q_c = chunk.queries(q, dtype) * call.scale  # [n, group, Lq, Dqk]
        k_c = chunk.keys(k, dtype)  # [n, Lkv, Dqk]
        values = chunk.keys(v, dtype)  # [n, Lkv, Dv], and v_dot beside it
        if call.v_dot is not None:
            values = torch.cat((values, chunk.keys(call.v_dot, dtype)), dim=-1)
        left, right, centre = score_tangent_operands(chunk, q_c, k_c, call)

        for i, bq in visits.queries():
            q_i = take_rows(q_c, i, bq)  # [n, group * bq, Dqk]
            left_i = None if left is None else take_rows(left, i, bq)
            sums = None
            for keys in visits.keys(chunk, i, bq):
                s = torch.bmm(q_i, keys.of(k_c).mT)
                s_dot = None
                if call.s_active:
                    s_dot = score_tangents(s, left_i, right, keys)
                    if call.bias_dot is not None:
                        chunk.scores(s_dot, bq).add_(chunk.bias(call.bias_dot, i, bq, keys))
                visits.hide(s, chunk, i, bq, keys)
                sums = _absorb(sums, s, s_dot, keys.of(values), dim_v, visits.maybe_blind)
            if sums is None:  # no query of this block sees a key
                for x, value in zip(outs, BLIND):
                    if x is not None:
                        take(chunk.narrow(x, heads_are_queries=True), 2, i, bq).fill_(value)
            else:
                shift = None if left_i is None or centre is None else (left_i, centre)
                _store(chunk, outs, sums, shift, i, bq, visits.maybe_blind)
    return outs


@dataclass
class _Sums:
    """What a block of queries has gathered over the key blocks so far, [n, rows, ...], relative to exp(m)."""

    m: Tensor  # [n, rows, 1] running maximum of the scores
    l: Tensor  # [n, rows, 1] sum of p
    acc: Tensor  # [n, rows, Dv or 2 Dv] p v, and p v_dot beside it
    r: Tensor | None  # [n, rows, 1] sum of h
    acc_dot: Tensor | None  # [n, rows, Dv] h v


def _absorb(
    sums: _Sums | None, s: Tensor, s_dot: Tensor | None, values: Tensor, dim_v: int, may_be_empty: bool
) -> _Sums:
    """Sums over one more block of keys; overwrites s and s_dot. values is v, of dim_v columns, and v_dot beside it."""
    v = values[..., :dim_v]
    m = s.amax(-1, keepdim=True)
    if sums is not None:
        m = torch.maximum(sums.m, m)
    # exp(-inf - 0) = 0 where no key has been seen yet
    safe = m.masked_fill(m == -math.inf, 0) if may_be_empty else m
    p = s.sub_(safe).exp_()
    h = None if s_dot is None else s_dot.mul_(p)
    l = p.sum(-1, keepdim=True)
    r = None if h is None else h.sum(-1, keepdim=True)
    if sums is None:
        return _Sums(m, l, torch.bmm(p, values), r, None if h is None else torch.bmm(h, v))
    alpha = torch.exp(sums.m - safe)
    acc, acc_dot = sums.acc.mul_(alpha).baddbmm_(p, values), None
    if r is not None and h is not None and sums.r is not None and sums.acc_dot is not None:
        r.addcmul_(sums.r, alpha)
        acc_dot = sums.acc_dot.mul_(alpha).baddbmm_(h, v)
    return _Sums(m, l.addcmul_(sums.l, alpha), acc, r, acc_dot)


def _store(
    chunk: Chunk, outs: Outputs, sums: _Sums, shift: tuple[Tensor, Tensor] | None, i: int, bq: int, maybe_blind: bool
) -> None:
    """Write what the sums over all keys come to for queries [i, i + bq). shift: the factors of what centring took from
    s_dot."""
    dim_v = outs.o.shape[3]
    empty = sums.l == 0 if maybe_blind else None  # rows that see no key at all
    inverse = (sums.l if empty is None else sums.l.masked_fill(empty, 1)).reciprocal()
    o_i = sums.acc[..., :dim_v] * inverse
    chunk.store(outs.o, o_i, i, bq)
    chunk.store(outs.lse, sums.m + sums.l.log(), i, bq)
    if outs.o_dot is None:
        return
    total = sums.acc[..., dim_v:]  # p v_dot, empty where v has no tangent
    if sums.acc_dot is not None:
        total = sums.acc_dot.add_(total) if total.shape[-1] else sums.acc_dot
    o_dot_i = total * inverse
    if sums.r is not None and outs.lse_dot is not None:
        r = sums.r.mul_(inverse)
        o_dot_i.addcmul_(r, o_i, value=-1)
        if shift is not None:
            r = torch.baddbmm(r, shift[0], shift[1].mT)
        chunk.store(outs.lse_dot, r if empty is None else r.masked_fill(empty, 0), i, bq)
    chunk.store(outs.o_dot, o_dot_i, i, bq)
