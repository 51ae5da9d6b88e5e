"""The backward of attention, and through its tangent, in blocks of plain torch: memory linear in the sequence length,
on any device.

Math
    forward, see attention_blocked:
        s = scale q k' + bias,  p = softmax(s),  o = p v,  lse = log sum exp(s)
        s_dot = scale (q_dot k' + q k_dot') + bias_dot,  lse_dot = r = rowsum(p * s_dot)
        o_dot = p v_dot + (p * (s_dot - r)) v
    of <do, o> + <dlse, lse> + <G, o_dot> + <dr, lse_dot>, with u = s_dot - r, row by row:
        w = G v' - rowsum(G * o) + dr
        e = do v' + G v_dot' + u * w - rowsum(do * o + G * o_dot) + dlse
        ds_dot = p * w,  ds = p * e
        dv = p' do + (p * u)' G,  dv_dot = p' G
        dq = scale (ds k + ds_dot k_dot),  dq_dot = scale ds_dot k,  dbias = ds summed as bias broadcasts
        dk = scale (ds' q + ds_dot' q_dot),  dk_dot = scale ds_dot' q,  dbias_dot = ds_dot likewise
    because rowsum(p * u) = 0: what p receives from o_dot is G v_dot' + u * (G v') - s_dot rowsum(G * o), and that
    minus its mean under p is G v_dot' + u * (G v' - rowsum(G * o)) - rowsum(G * o_dot).
    without G and dr: w = u = 0, the plain backward
One pass
    Every row sum comes from what the forward saved, so each pair of a query and a key block is visited once: 15
    products of a tile with D columns where everything is active, 6 to recompute and 9 for gradients, against 6 in the
    forward. Products that share a factor are one: [q_dot, q] [k, k_dot]' and [do, G] [v, v_dot]', and their transposes.
    As in the forward, the mean over keys is taken out of [k, k_dot], here from both s_dot and r, which keeps
    u exact where a tangent is common to all keys. ds_dot [k, k_dot] gets it back without a sum, as
    rowsum(ds_dot) = dr.
Row sums anew
    The means under p of u, w and e are 0, dr and dlse, and a block that holds all keys of its rows sets them so. In
    half types every block does: their o and o_dot are rounded, which costs dq 4 % in bfloat16 where all keys share
    a part of v_dot of 30 standard deviations.
Shapes
    As of call.Call and call.Gradients. The gradients of all but the biases lie in memory as B, L, H, D.
Precision
    float32 inside for float16 and bfloat16, else the dtype of the inputs. Gradients in the dtype of the inputs, those
    of the biases in the dtype inside.
    Where a large finite bias hides all keys of a row, it leaves lse without the digits that tell the keys apart: p is
    then taken from a maximum and a sum of its own.
Refuses
    Packed sequences, which come here one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jvpgraph.kernels.blocked_parts import exp_, needs_own_sums, row_sums, score_tangent_operands, score_tangents
from jvpgraph.kernels.call import Call, Cotangents, Gradients, Outputs
from jvpgraph.kernels.layout import dtype_inside, empty_rows
from jvpgraph.kernels.visits import Chunk, Keys, take_rows, visits_of

__all__ = ["differentiate"]


def differentiate(
    call: Call, outs: Outputs, grads: Cotangents, *, block_q: int | None = None, block_k: int | None = None
) -> Gradients:
    """The gradients of all inputs from what the forward gave and the gradients of that; those of the biases where
    call.wanted says so. block_q and block_k override the block sizes, for tests."""
    if grads.o is None:
        grads = grads._replace(o=torch.zeros_like(outs.o))
    through_tangent = (grads.o_dot is not None or grads.lse_dot is not None) and not call.is_empty
    found = _empty_gradients(call)
    if not through_tangent or call.is_empty:
        for x in found[:6] if call.is_empty else found[3:6]:
            if x is not None:
                x.zero_()
    if call.is_empty:
        return found
    assert call.packing is None
    backward = _through_tangent if through_tangent else _of_value
    return backward(call, outs, grads, found, block_q, block_k)


def _empty_gradients(call: Call) -> Gradients:
    """Uninitialised, but for the biases, which are summed up."""

    def rows(x: Tensor) -> Tensor:
        return empty_rows(x, x.shape[2], x.shape[3])

    def zeros(x: Tensor | None, is_wanted: bool) -> Tensor | None:
        return None if x is None or not is_wanted else x.new_zeros(x.shape, dtype=dtype_inside(call.q))

    q_dot, k_dot, v_dot = (None if x is None else rows(x) for x in call.dots)
    biases = zeros(call.bias, call.wanted.bias), zeros(call.bias_dot, call.wanted.bias_dot)
    return Gradients(rows(call.q), rows(call.k), rows(call.v), q_dot, k_dot, v_dot, *biases)


def _of_value(
    call: Call, outs: Outputs, grads: Cotangents, found: Gradients, block_q: int | None, block_k: int | None
) -> Gradients:
    assert grads.o is not None
    q, k, v, lse, dtype = call.q, call.k, call.v, outs.lse, dtype_inside(call.q)
    visits = visits_of(call, block_q, block_k)
    sums_anew = needs_own_sums(call.bias, lse, may_wait=lse.device.type == "cpu")
    delta = (grads.o.to(dtype) * outs.o.to(dtype)).sum(-1)  # [B, H, Lq]
    if grads.lse is not None:
        delta = delta - grads.lse.masked_fill(lse == -math.inf, 0)  # a merge of parts may have none there but NaN
    if visits.maybe_blind:
        lse = lse.masked_fill(lse == -math.inf, math.inf)  # makes p = 0 in a fully masked row
    for chunk in visits.chunks():
        q_c = chunk.queries(q, dtype) * call.scale
        k_c, v_c = chunk.keys(k, dtype), chunk.keys(v, dtype)
        do_c = chunk.queries(grads.o, dtype)
        delta_c, lse_c = chunk.queries(delta, dtype), chunk.queries(lse, dtype)
        dk_c, dv_c = torch.zeros_like(k_c), torch.zeros_like(v_c)
        for i, bq in visits.queries():
            q_i, do_i = take_rows(q_c, i, bq), take_rows(do_c, i, bq)
            delta_i, lse_i = take_rows(delta_c, i, bq).unsqueeze(-1), take_rows(lse_c, i, bq).unsqueeze(-1)
            log_l = None
            if sums_anew:
                lse_i, log_l = row_sums(q_i, k_c, visits, chunk, i, bq)
            dq_i = torch.zeros_like(q_i)
            for keys in visits.keys(chunk, i, bq):
                k_j, v_j = keys.of(k_c), keys.of(v_c)
                s = torch.bmm(q_i, k_j.mT)
                visits.hide(s, chunk, i, bq, keys)
                p = exp_(s.sub_(lse_i) if log_l is None else s.sub_(lse_i).sub_(log_l))
                keys.add_product(dv_c, p.mT, do_i)
                ds = torch.bmm(do_i, v_j.mT).sub_(delta_i).mul_(p)
                keys.add_product(dk_c, ds.mT, q_i)
                dq_i.baddbmm_(ds, k_j)
                _add_to_bias(found.bias, chunk, ds, i, bq, keys)
            chunk.store(found.q, dq_i.mul_(call.scale), i, bq)
        # keys that no query sees under a causal mask keep their zeros
        _store_keys(chunk, found.k, dk_c)
        _store_keys(chunk, found.v, dv_c)
    return found


def _through_tangent(
    call: Call, outs: Outputs, grads: Cotangents, found: Gradients, block_q: int | None, block_k: int | None
) -> Gradients:
    assert grads.o is not None
    q, k, v, lse, dtype = call.q, call.k, call.v, outs.lse, dtype_inside(call.q)
    o_dot = torch.zeros_like(outs.o) if outs.o_dot is None else outs.o_dot
    lse_dot = torch.zeros_like(lse) if outs.lse_dot is None else outs.lse_dot
    o_grad, o_dot_grad = grads.o, torch.zeros_like(o_dot) if grads.o_dot is None else grads.o_dot
    dim, dim_v = q.shape[3], v.shape[3]

    visits = visits_of(call, block_q, block_k or (k.shape[2] if dtype != q.dtype else None))
    sums_anew = needs_own_sums(call.bias, lse, may_wait=lse.device.type == "cpu")
    zero = lse.new_zeros(()).expand_as(lse)
    lse_grad, lse_dot_grad = (zero if x is None else x for x in (grads.lse, grads.lse_dot))
    if visits.maybe_blind:
        blind = lse == -math.inf
        lse = lse.masked_fill(blind, math.inf)  # makes p = 0 in a row that sees no key
        lse_grad, lse_dot_grad = lse_grad.masked_fill(blind, 0), lse_dot_grad.masked_fill(blind, 0)

    for chunk in visits.chunks():
        q_c = chunk.queries(q, dtype) * call.scale  # [n, group, Lq, Dqk]
        k_c, v_c = chunk.keys(k, dtype), chunk.keys(v, dtype)  # [n, Lkv, Dqk], [n, Lkv, Dv]
        left, right, centre = score_tangent_operands(chunk, q_c, k_c, call)
        do_c, G_c, o_c, o_dot_c = (chunk.queries(x, dtype) for x in (o_grad, o_dot_grad, outs.o, o_dot))
        lse_c, dlse_c, dr_c, r_c = (_column(chunk, x, dtype) for x in (lse, lse_grad, lse_dot_grad, lse_dot))
        e_shift = dlse_c - (do_c * o_c).sum(-1, keepdim=True) - (G_c * o_dot_c).sum(-1, keepdim=True)
        w_shift = dr_c - (G_c * o_c).sum(-1, keepdim=True)
        values, cots = v_c, do_c  # values' gradient is p' cots, and cots values' is part of e
        if call.v_dot is not None:
            values, cots = torch.cat((v_c, chunk.keys(call.v_dot, dtype)), -1), torch.cat((do_c, G_c), -1)
        if left is not None and centre is not None:
            r_c = r_c - left @ centre.unsqueeze(1).mT

        dk_c, dvalues = torch.zeros_like(k_c), torch.zeros_like(values)
        dv_c = dvalues[..., :dim_v]
        dright = None if right is None else torch.zeros_like(right)
        for i, bq in visits.queries():
            q_i, cots_i, G_i = take_rows(q_c, i, bq), take_rows(cots, i, bq), take_rows(G_c, i, bq)
            lse_i, e_shift_i, w_shift_i, r_i = (take_rows(x, i, bq) for x in (lse_c, e_shift, w_shift, r_c))
            dlse_i, dr_i = take_rows(dlse_c, i, bq), take_rows(dr_c, i, bq)
            log_l = None
            if sums_anew:
                lse_i, log_l = row_sums(q_i, k_c, visits, chunk, i, bq)
            dq_i = torch.zeros_like(q_i)
            left_i = dleft_i = None
            if left is not None and centre is not None:
                left_i, dleft_i = take_rows(left, i, bq), dr_i * centre
            for keys in visits.keys(chunk, i, bq):
                k_j, values_j = keys.of(k_c), keys.of(values)
                s = torch.bmm(q_i, k_j.mT)
                visits.hide(s, chunk, i, bq, keys)
                p = exp_(s.sub_(lse_i) if log_l is None else s.sub_(lse_i).sub_(log_l))
                keys.add_product(dvalues, p.mT, cots_i)
                e = torch.baddbmm(e_shift_i, cots_i, values_j.mT)
                if call.s_active:
                    u = score_tangents(s, left_i, right, keys)
                    if call.bias_dot is not None:
                        chunk.scores(u, bq).add_(chunk.bias(call.bias_dot, i, bq, keys))
                    u.sub_(r_i)
                    w = torch.baddbmm(w_shift_i, G_i, values_j[..., :dim_v].mT)
                    if keys.are_all:
                        _set_mean(u, p, 0)
                        _set_mean(w, p, dr_i)
                    e.addcmul_(u, w)
                    keys.add_product(dv_c, u.mul_(p).mT, G_i)
                    ds_dot = w.mul_(p)
                    if left_i is not None and dleft_i is not None and right is not None and dright is not None:
                        dleft_i.baddbmm_(ds_dot, keys.of(right))
                        keys.add_product(dright, ds_dot.mT, left_i)
                    _add_to_bias(found.bias_dot, chunk, ds_dot, i, bq, keys)
                if keys.are_all:
                    _set_mean(e, p, dlse_i)
                ds = e.mul_(p)
                dq_i.baddbmm_(ds, k_j)
                keys.add_product(dk_c, ds.mT, q_i)
                _add_to_bias(found.bias, chunk, ds, i, bq, keys)
            if dleft_i is not None:
                if call.k_dot is not None:
                    dq_i.add_(dleft_i[..., -dim:])
                if found.q_dot is not None:
                    chunk.store(found.q_dot, dleft_i[..., :dim] * call.scale, i, bq)
            chunk.store(found.q, dq_i.mul_(call.scale), i, bq)

        if dright is not None:
            if call.q_dot is not None:
                dk_c.add_(dright[..., :dim])
            _store_keys(chunk, found.k_dot, dright[..., -dim:])
        _store_keys(chunk, found.v_dot, dvalues[..., -dim_v:])
        _store_keys(chunk, found.v, dv_c)
        _store_keys(chunk, found.k, dk_c)
    return found


def _column(chunk: Chunk, x: Tensor, dtype: torch.dtype) -> Tensor:
    """One number per query [B, H, Lq] as [n, group, Lq, 1]."""
    return chunk.queries(x.unsqueeze(-1), dtype)


def _set_mean(x: Tensor, p: Tensor, mean: Tensor | int) -> None:
    """Shift each row of x so that its mean under p is `mean`."""
    x.add_(mean - (x * p).sum(-1, keepdim=True))


def _add_to_bias(dbias: Tensor | None, chunk: Chunk, ds: Tensor, i: int, bq: int, keys: Keys) -> None:
    if dbias is not None:
        keys.add(chunk.bias(dbias, i, bq), chunk.scores(ds, bq))


def _store_keys(chunk: Chunk, out: Tensor | None, part: Tensor) -> None:
    if out is not None:
        target = chunk.narrow(out)
        target.copy_(part.view(target.shape))
