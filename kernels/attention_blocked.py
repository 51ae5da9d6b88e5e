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

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jvpgraph.kernels.blocked_parts import exp_, score_tangent_operands, score_tangents
from jvpgraph.kernels.call import Call, Outputs
from jvpgraph.kernels.layout import dtype_inside, empty_rows
from jvpgraph.kernels.visits import Chunk, take, take_rows, visits_of

__all__ = ["attend", "attend_all", "blind_outputs"]

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
    return attend_all([call], block_q=block_q, block_k=block_k)[0]


def attend_all(calls: Sequence[Call], *, block_q: int | None = None, block_k: int | None = None) -> list[Outputs]:
    """The same of calls that differ in their tangents only, with the same of them None: p is computed once for all.
    They share o and lse."""
    call = calls[0]
    if call.is_empty:
        return [blind_outputs(each) for each in calls]
    assert call.packing is None
    q, k, v, dtype, dim_v = call.q, call.k, call.v, dtype_inside(call.q), call.v.shape[3]
    first = _empty_outputs(call)
    outs = [first, *(_empty_outputs(each)._replace(o=first.o, lse=first.lse) for each in calls[1:])]
    visits = visits_of(call, block_q, block_k)
    for chunk in visits.chunks():
        q_c = chunk.queries(q, dtype) * call.scale  # [n, group, Lq, Dqk]
        k_c = chunk.keys(k, dtype)  # [n, Lkv, Dqk]
        v_dots = [chunk.keys(each.v_dot, dtype) for each in calls if each.v_dot is not None]
        values = torch.cat((chunk.keys(v, dtype), *v_dots), dim=-1)  # [n, Lkv, Dv], and each v_dot beside it
        operands = [score_tangent_operands(chunk, q_c, k_c, each) for each in calls]  # left, right, centre

        for i, bq in visits.queries():
            q_i = take_rows(q_c, i, bq)  # [n, group * bq, Dqk]
            lefts = [None if left is None else take_rows(left, i, bq) for left, *_ in operands]
            sums = None
            for keys in visits.keys(chunk, i, bq):
                s = torch.bmm(q_i, keys.of(k_c).mT)
                s_dots = []
                for each, left, (_, right, _) in zip(calls if call.s_active else (), lefts, operands):
                    s_dots.append(score_tangents(s, left, right, keys))
                    if each.bias_dot is not None:
                        chunk.scores(s_dots[-1], bq).add_(chunk.bias(each.bias_dot, i, bq, keys))
                visits.hide(s, chunk, i, bq, keys)
                sums = _absorb(sums, s, s_dots, keys.of(values), dim_v, visits.maybe_blind)
            if sums is None:  # no query of this block sees a key
                for x, value in zip(itertools.chain(*outs), itertools.cycle(BLIND)):
                    if x is not None:
                        take(chunk.narrow(x, heads_are_queries=True), 2, i, bq).fill_(value)
            else:
                centres = [centre for _, _, centre in operands]
                _store(chunk, outs, sums, lefts, centres, i, bq, visits.maybe_blind)
    return outs


@dataclass
class _Sums:
    """What a block of queries has gathered over the key blocks so far, [n, rows, ...], relative to exp(m)."""

    m: Tensor  # [n, rows, 1] running maximum of the scores
    l: Tensor  # [n, rows, 1] sum of p
    acc: Tensor  # [n, rows, Dv or more] p v, and p v_dot of each tangent beside it
    r: list[Tensor]  # [n, rows, 1] sum of h, for each tangent of the scores
    acc_dot: list[Tensor]  # [n, rows, Dv] h v, likewise


def _absorb(
    sums: _Sums | None, s: Tensor, s_dots: list[Tensor], values: Tensor, dim_v: int, may_be_empty: bool
) -> _Sums:
    """Sums over one more block of keys; overwrites s and s_dots. values is v [.., dim_v] with each v_dot beside it."""
    v = values[..., :dim_v]
    m = s.amax(-1, keepdim=True)
    if sums is not None:
        m = torch.maximum(sums.m, m)
    # exp(-inf - 0) = 0 where no key has been seen yet
    safe = m.masked_fill(m == -math.inf, 0) if may_be_empty else m
    p = exp_(s.sub_(safe))
    hs = [s_dot.mul_(p) for s_dot in s_dots]
    l = p.sum(-1, keepdim=True)
    rs = [h.sum(-1, keepdim=True) for h in hs]
    if sums is None:
        return _Sums(m, l, torch.bmm(p, values), rs, [torch.bmm(h, v) for h in hs])
    alpha = torch.exp(sums.m - safe)
    rs = [r.addcmul_(before, alpha) for r, before in zip(rs, sums.r)]
    acc_dots = [before.mul_(alpha).baddbmm_(h, v) for h, before in zip(hs, sums.acc_dot)]
    return _Sums(m, l.addcmul_(sums.l, alpha), sums.acc.mul_(alpha).baddbmm_(p, values), rs, acc_dots)


def _store(
    chunk: Chunk,
    outs: list[Outputs],
    sums: _Sums,
    lefts: Sequence[Tensor | None],
    centres: Sequence[Tensor | None],
    i: int,
    bq: int,
    maybe_blind: bool,
) -> None:
    """Write what the sums over all keys come to for queries [i, i + bq). lefts and centres: the factors of what
    centring took from each s_dot."""
    dim_v = outs[0].o.shape[3]
    empty = sums.l == 0 if maybe_blind else None  # rows that see no key at all
    inverse = (sums.l if empty is None else sums.l.masked_fill(empty, 1)).reciprocal()
    o, *of_v_dots = sums.acc.split(dim_v, dim=-1)  # p v, and each p v_dot
    o = o * inverse
    chunk.store(outs[0].o, o, i, bq)
    chunk.store(outs[0].lse, sums.m + sums.l.log(), i, bq)
    for t, (out, left, centre) in enumerate(zip(outs, lefts, centres)):
        if out.o_dot is None:
            return
        parts = [part[t] for part in (sums.acc_dot, of_v_dots) if part]
        o_dot = (parts[0] if len(parts) == 1 else parts[0].add_(parts[1])) * inverse
        if out.lse_dot is not None:
            r = sums.r[t].mul_(inverse)
            o_dot.addcmul_(r, o, value=-1)
            if left is not None and centre is not None:
                r = torch.baddbmm(r, left, centre.mT)
            chunk.store(out.lse_dot, r if empty is None else r.masked_fill(empty, 0), i, bq)
        chunk.store(out.o_dot, o_dot, i, bq)
