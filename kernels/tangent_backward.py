"""The backward through attention and its tangent in blocks of plain torch: memory linear in the sequence length,
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
One pass
    Every row sum comes from what the forward saved, so each pair of a query and a key block is visited once: 15
    products of a tile with D columns where everything moves, 6 to recompute and 9 for gradients, against 6 in the
    forward. Products that share a factor are one: [q_dot, q] [k, k_dot]' and [do, G] [v, v_dot]', and their transposes.
    As in the forward, the mean over keys is taken out of [k, k_dot], here from both s_dot and r, which keeps
    u exact where a tangent is common to all keys. ds_dot [k, k_dot] gets it back without a sum, as
    rowsum(ds_dot) = dr.
Row sums anew
    The means under p of u, w and e are 0, dr and dlse, and a block that holds all keys of its rows sets them so. In
    half types every block does: their o and o_dot are rounded, which costs dq 4 % in bfloat16 where all keys share
    a part of v_dot of 30 standard deviations.
Shapes
    As in attention_blocked; q_dot like q and so on. The gradients of all but the biases lie in memory as B, L, H, D.
Precision
    float32 inside for float16 and bfloat16, else the dtype of the inputs. Gradients in the dtype of the inputs, those
    of the biases in the dtype inside.
Refuses
    Nothing: jvpgraph.kernels.attention checks the arguments first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jvpgraph.kernels.attention_blocked import (
    _blocks,
    _bmm_or_zeros,
    _Chunk,
    _hides,
    _mask_scores,
    _may_be_blind,
    _narrow,
    _plan,
    _row_sums,
    _rows,
    _score_tangent_operands,
    attention_backward,
    needs_own_sums,
)
from jvpgraph.kernels.layout import dtype_inside, empty_rows
from jvpgraph.kernels.window import Window

__all__ = ["attention_jvp_backward"]

Gradients = tuple[
    Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]  # of q, k, v, q_dot, k_dot, v_dot, bias, bias_dot


def attention_jvp_backward(
    o_grad: Tensor | None,
    lse_grad: Tensor | None,
    o_dot_grad: Tensor | None,
    lse_dot_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    bias: Tensor | None,
    bias_dot: Tensor | None,
    o: Tensor,
    lse: Tensor,
    o_dot: Tensor,
    lse_dot: Tensor,
    window: Window,
    scale: float,
    bias_needs_grad: bool,
    bias_dot_needs_grad: bool,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Gradients:
    """(dq, dk, dv, dq_dot, dk_dot, dv_dot, dbias, dbias_dot) from what the forward gave.

    A gradient or tangent given as None is zero; a tangent given as None has no gradient, the biases have theirs
    where asked for.
    """
    dtype = dtype_inside(q)
    if o_grad is None:
        o_grad = torch.zeros_like(o)
    dq_dot, dk_dot, dv_dot = (
        None if x is None else empty_rows(x, x.shape[2], x.shape[3]) for x in (q_dot, k_dot, v_dot)
    )
    dbias_dot = None
    if bias_dot is not None and bias_dot_needs_grad:
        dbias_dot = bias_dot.new_zeros(bias_dot.shape, dtype=dtype)
    if (o_dot_grad is None and lse_dot_grad is None) or q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        for x in (dq_dot, dk_dot, dv_dot):
            if x is not None:
                x.zero_()
        dq, dk, dv, dbias = attention_backward(
            o_grad, lse_grad, q, k, v, bias, o, lse, window, scale, bias_needs_grad, block_q=block_q, block_k=block_k
        )
        return dq, dk, dv, dq_dot, dk_dot, dv_dot, dbias, dbias_dot

    if o_dot_grad is None:
        o_dot_grad = torch.zeros_like(o)
    dq, dk, dv = (empty_rows(x, x.shape[2], x.shape[3]) for x in (q, k, v))
    dbias = bias.new_zeros(bias.shape, dtype=dtype) if bias is not None and bias_needs_grad else None
    s_moves = q_dot is not None or k_dot is not None or bias_dot is not None
    dim, dim_v, n_q, n_k = q.shape[3], v.shape[3], q.shape[2], k.shape[2]

    hides = _hides(bias)
    sums_anew = needs_own_sums(bias, lse, may_wait=lse.device.type == "cpu")
    zero = lse.new_zeros(()).expand_as(lse)
    lse_grad, lse_dot_grad = (zero if x is None else x for x in (lse_grad, lse_dot_grad))
    if _may_be_blind(bias, window):
        blind = lse == -math.inf
        lse = lse.masked_fill(blind, math.inf)  # makes p = 0 in a row that sees no key
        lse_grad, lse_dot_grad = lse_grad.masked_fill(blind, 0), lse_dot_grad.masked_fill(blind, 0)

    chunks, block_q, block_k = _plan(q, k, block_q, block_k or (n_k if q.dtype.itemsize == 2 else None))
    for chunk in chunks:
        q_c = chunk.queries(q, dtype) * scale  # [n, group, Lq, Dqk]
        k_c, v_c = chunk.keys(k, dtype), chunk.keys(v, dtype)  # [n, Lkv, Dqk], [n, Lkv, Dv]
        left, right, centre = _score_tangent_operands(chunk, q_c, k_c, q_dot, k_dot, scale)
        do_c, G_c, o_c, o_dot_c = (chunk.queries(x, dtype) for x in (o_grad, o_dot_grad, o, o_dot))
        lse_c, dlse_c, dr_c, r_c = (_column(chunk, x, dtype) for x in (lse, lse_grad, lse_dot_grad, lse_dot))
        e_shift = dlse_c - (do_c * o_c).sum(-1, keepdim=True) - (G_c * o_dot_c).sum(-1, keepdim=True)
        w_shift = dr_c - (G_c * o_c).sum(-1, keepdim=True)
        values, grads = v_c, do_c  # values' gradient is p' grads, and grads values' is part of e
        if v_dot is not None:
            values, grads = torch.cat((v_c, chunk.keys(v_dot, dtype)), -1), torch.cat((do_c, G_c), -1)
        if left is not None and centre is not None:
            r_c = r_c - left @ centre.unsqueeze(1).mT

        dk_c, dvalues = torch.zeros_like(k_c), torch.zeros_like(values)
        dv_c = dvalues[..., :dim_v]
        dright = None if right is None else torch.zeros_like(right)
        for i, bq in _blocks(0, n_q, block_q):
            q_i, grads_i, G_i = _rows(q_c, i, bq), _rows(grads, i, bq), _rows(G_c, i, bq)
            lse_i, e_shift_i, w_shift_i, r_i = (_rows(x, i, bq) for x in (lse_c, e_shift, w_shift, r_c))
            dlse_i, dr_i = _rows(dlse_c, i, bq), _rows(dr_c, i, bq)
            log_l = None
            if sums_anew:
                lse_i, log_l = _row_sums(q_i, k_c, chunk, hides, window, i, bq, block_k)
            dq_i = torch.zeros_like(q_i)
            left_i = dleft_i = None
            if left is not None and centre is not None:
                left_i, dleft_i = _rows(left, i, bq), dr_i * centre
            first, end = window.keys(i, bq, n_k)
            for j, bk in _blocks(first, end, block_k):
                k_j, v_j, values_j = (_narrow(x, 1, j, bk) for x in (k_c, v_c, values))
                s = torch.bmm(q_i, k_j.mT)
                _mask_scores(s, chunk, hides, window, i, bq, j, bk)
                p = s.sub_(lse_i).exp_() if log_l is None else s.sub_(lse_i).sub_(log_l).exp_()
                _narrow(dvalues, 1, j, bk).baddbmm_(p.mT, grads_i)
                e = torch.baddbmm(e_shift_i, grads_i, values_j.mT)
                if s_moves:
                    u = _bmm_or_zeros(s, left_i, right, j, bk)
                    if bias_dot is not None:
                        chunk.scores(u, bq).add_(chunk.bias(bias_dot, i, bq, j, bk))
                    u.sub_(r_i)
                    w = torch.baddbmm(w_shift_i, G_i, v_j.mT)
                    if bk == end - first:
                        _set_mean(u, p, 0)
                        _set_mean(w, p, dr_i)
                    e.addcmul_(u, w)
                    _narrow(dv_c, 1, j, bk).baddbmm_(u.mul_(p).mT, G_i)
                    ds_dot = w.mul_(p)
                    if left_i is not None and dleft_i is not None and right is not None and dright is not None:
                        dleft_i.baddbmm_(ds_dot, _narrow(right, 1, j, bk))
                        _narrow(dright, 1, j, bk).baddbmm_(ds_dot.mT, left_i)
                    _add_to_bias(dbias_dot, chunk, ds_dot, i, bq, j, bk)
                if bk == end - first:
                    _set_mean(e, p, dlse_i)
                ds = e.mul_(p)
                dq_i.baddbmm_(ds, k_j)
                _narrow(dk_c, 1, j, bk).baddbmm_(ds.mT, q_i)
                _add_to_bias(dbias, chunk, ds, i, bq, j, bk)
            if dleft_i is not None:
                if k_dot is not None:
                    dq_i.add_(dleft_i[..., -dim:])
                if dq_dot is not None:
                    chunk.store(dq_dot, dleft_i[..., :dim] * scale, i, bq)
            chunk.store(dq, dq_i.mul_(scale), i, bq)

        if dright is not None:
            if q_dot is not None:
                dk_c.add_(dright[..., :dim])
            _store_keys(chunk, dk_dot, dright[..., -dim:])
        _store_keys(chunk, dv_dot, dvalues[..., -dim_v:])
        _store_keys(chunk, dv, dv_c)
        _store_keys(chunk, dk, dk_c)
    return dq, dk, dv, dq_dot, dk_dot, dv_dot, dbias, dbias_dot


def _column(chunk: _Chunk, x: Tensor, dtype: torch.dtype) -> Tensor:
    """One number per query [B, H, Lq] as [n, group, Lq, 1]."""
    return chunk.queries(x.unsqueeze(-1), dtype)


def _set_mean(x: Tensor, p: Tensor, mean: Tensor | int) -> None:
    """Shift each row of x so that its mean under p is `mean`."""
    x.add_(mean - (x * p).sum(-1, keepdim=True))


def _add_to_bias(dbias: Tensor | None, chunk: _Chunk, ds: Tensor, i: int, bq: int, j: int, bk: int) -> None:
    if dbias is not None:
        part = chunk.bias(dbias, i, bq, j, bk)
        part.add_(chunk.scores(ds, bq).sum_to_size(part.shape))


def _store_keys(chunk: _Chunk, out: Tensor | None, part: Tensor) -> None:
    if out is not None:
        target = chunk.narrow(out)
        target.copy_(part.view(target.shape))
