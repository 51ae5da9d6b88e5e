"""Attention, its JVP and its backward in blocks of plain torch: memory linear in the sequence length, on any
device.

Math
    s = scale q k' + bias,  p = softmax(s),  o = p v,  lse = log sum exp(s)
    s_dot = scale (q_dot k' + q k_dot') + bias_dot,  h = p * s_dot,  r = rowsum(h)
    o_dot = p v_dot + h v - r * o,  lse_dot = r
    backward: p = exp(s - lse),  dv = p' do,  ds = p * (do v' - rowsum(do * o) + dlse),  dq = scale ds k,  dk
        = scale ds' q,
    dbias = ds summed over the dims that bias broadcasts
Streaming form
    Over key blocks: running row maximum m, row sum l, and accumulators for o, for p v_dot + h v and for r,
    all rescaled by exp(m_old - m_new) (FlashAttention's online softmax). s_dot is one product, [q_dot, q]
    [k, k_dot]', and is centred: o_dot does not change when a constant per row is subtracted from s_dot, so
    the mean over keys of [k, k_dot] is taken out first, which keeps r * o from cancelling against h v where
    a tangent is common to all keys; lse_dot gets it back. A block holds TILE_ELEMENTS scores; batch entries
    and heads share a block while they fit, so a small problem is one block and takes no rescaling. Query
    heads of a group are stacked as rows, so grouped keys and values are never repeated.
Shapes
    q [B, H, Lq, Dqk], k [B, Hkv, Lkv, Dqk], v [B, Hkv, Lkv, Dv], bias [B | 1, H | 1, Lq | 1, Lkv | 1], lse
    [B, H, Lq]. o and the gradients of q, k, v lie in memory as B, L, H, D.
Precision
    float32 inside for float16 and bfloat16, else the dtype of the inputs; lse likewise. Without tangents a
    CPU uses ATen's own flash kernel where that computes the same thing, so the primal is then bit for bit
    what the unchanged model gives. Where a large finite bias hides all keys of a row, it leaves lse without the
    digits that tell the keys apart: the backward then takes p from a maximum and a sum of its own.
Refuses
    Nothing: jvpgraph.kernels.attention checks the arguments first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jvpgraph.kernels.layout import dtype_inside, empty_rows, for_aten
from jvpgraph.kernels.window import CAUSAL, EVERYTHING, Window

__all__ = ["attention", "attention_backward", "attention_jvp", "needs_own_sums"]

aten = torch.ops.aten

# Scores per block. The two score blocks of a JVP (2 MiB) should stay in the cache of a CPU; elsewhere
# launches cost.
TILE_ELEMENTS = {"cpu": 1 << 18}
TILE_ELEMENTS_ELSEWHERE = 1 << 25
# Keys per block: long enough for an efficient matmul, short enough to leave rows in the block.
BLOCK_K = {"cpu": 512}
BLOCK_K_ELSEWHERE = 4096
# Below this a logsumexp has lost digits of what exp(s - lse) needs. Scores do not come here, large negative biases do.
LOW = -1e3


@dataclass(frozen=True)
class _Chunk:
    """Batch entries [batch, +batches) and key heads [head, +heads), each with `group` query heads."""

    batch: int
    batches: int
    head: int
    heads: int
    group: int

    def narrow(self, x: Tensor, heads_are_queries: bool = False) -> Tensor:
        """This chunk of x [B | 1, H | 1, ...]; dims of size one broadcast and stay."""
        times = self.group if heads_are_queries else 1
        x = _narrow_unless_one(x, 0, self.batch, self.batches)
        return _narrow_unless_one(x, 1, self.head * times, self.heads * times)

    def keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, Hkv, L, D] -> [batches * heads, L, D]"""
        return self.narrow(x).to(dtype).reshape(self.batches * self.heads, x.shape[2], x.shape[3])

    def queries(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, H, L, ...] -> [batches * heads, group, L, ...]"""
        x = self.narrow(x, heads_are_queries=True).to(dtype)
        return x.reshape(self.batches * self.heads, self.group, *x.shape[2:])

    def bias(self, bias: Tensor, i: int, bq: int, j: int, bk: int) -> Tensor:
        """A block of bias as [batches | 1, heads | 1, group | 1, bq | 1, bk | 1]."""
        bias = self.narrow(bias, heads_are_queries=True)
        bias = _narrow_unless_one(_narrow_unless_one(bias, 2, i, bq), 3, j, bk)
        if bias.shape[1] == 1:
            return bias.unsqueeze(2)
        return bias.unflatten(1, (self.heads, self.group))

    def scores(self, s: Tensor, bq: int) -> Tensor:
        """[batches * heads, group * bq, bk] viewed so that a block of bias broadcasts to it."""
        return s.view(self.batches, self.heads, self.group, bq, s.shape[-1])

    def store(self, out: Tensor, rows: Tensor, i: int, bq: int) -> None:
        """Write rows [batches * heads, group * bq, ...] to queries [i, i + bq) of out [B, H, Lq, ...]."""
        part = _narrow(self.narrow(out, heads_are_queries=True), 2, i, bq)
        part.copy_(rows.reshape(part.shape))


def _narrow(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return x if x.shape[dim] == length else x.narrow(dim, start, length)


def _narrow_unless_one(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return x if x.shape[dim] == 1 else _narrow(x, dim, start, length)


def _rows(x: Tensor, i: int, bq: int) -> Tensor:
    """Queries [i, i + bq) of x [n, group, L, ...] as [n, group * bq, ...]."""
    return _narrow(x, 2, i, bq).flatten(1, 2)


def _blocks(first: int, end: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, size) of each block of [first, end) of a dim."""
    for start in range(first, end, block):
        yield start, min(block, end - start)


def _plan(q: Tensor, k: Tensor, block_q: int | None, block_k: int | None) -> tuple[Iterator[_Chunk], int, int]:
    """The chunks of batch and heads, and the block sizes within each."""
    budget = TILE_ELEMENTS.get(q.device.type, TILE_ELEMENTS_ELSEWHERE)
    batch, heads, n_q = q.shape[:3]
    kv_heads, n_k = k.shape[1:3]
    group = heads // kv_heads
    bk = min(n_k, block_k or max(BLOCK_K.get(q.device.type, BLOCK_K_ELSEWHERE), budget // max(1, n_q * group)))
    bq = min(n_q, block_q or max(16, budget // (bk * group)))
    fit = max(1, budget // (bk * bq * group))
    batches, heads_each = (min(batch, fit // kv_heads), kv_heads) if fit >= kv_heads else (1, fit)
    chunks = (
        _Chunk(b, nb, h, nh, group)
        for b, nb in _blocks(0, batch, batches)
        for h, nh in _blocks(0, kv_heads, heads_each)
    )
    return chunks, bq, bk


def _mask_scores(
    s: Tensor, chunk: _Chunk, bias: Tensor | None, window: Window, i: int, bq: int, j: int, bk: int
) -> None:
    """Apply bias (boolean: inverted, True hides) and the window to a block of scores, in place."""
    if bias is not None:
        block = chunk.bias(bias, i, bq, j, bk)
        if bias.dtype == torch.bool:
            chunk.scores(s, bq).masked_fill_(block, -math.inf)
        else:
            chunk.scores(s, bq).add_(block)
    if window.cuts(i, bq, j, j + bk):
        ahead = torch.arange(j, j + bk, device=s.device) - torch.arange(i, i + bq, device=s.device)[:, None]
        chunk.scores(s, bq).masked_fill_(window.hides(ahead), -math.inf)


def _may_be_blind(bias: Tensor | None, window: Window) -> bool:
    """Whether there may be queries that see no key at all."""
    return bias is not None or window.left is not None


def _hides(bias: Tensor | None) -> Tensor | None:
    """Boolean bias says who attends; masked_fill wants who does not."""
    return ~bias if bias is not None and bias.dtype == torch.bool else bias


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: Window,
    scale: float,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(o, lse). block_q and block_k override the block sizes, for tests."""
    if block_q is None and block_k is None and _flash_applies(q, k, v, bias, window, scale):
        return _flash(q, k, v, bias, window, scale)
    return _attend(q, k, v, (None, None, None, None), bias, window, scale, block_q, block_k)[:2]


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    bias: Tensor | None,
    bias_dot: Tensor | None,
    window: Window,
    scale: float,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, lse, o_dot, lse_dot). A tangent given as None is zero and costs nothing."""
    dots = (q_dot, k_dot, v_dot, bias_dot)
    o, lse, o_dot, lse_dot = _attend(q, k, v, dots, bias, window, scale, block_q, block_k)
    return (
        o,
        lse,
        torch.zeros_like(o) if o_dot is None else o_dot,
        torch.zeros_like(lse) if lse_dot is None else lse_dot,
    )


@dataclass
class _Sums:
    """What a block of queries has gathered over the key blocks so far, [n, rows, ...], relative to exp(m)."""

    m: Tensor  # [n, rows, 1] running maximum of the scores
    l: Tensor  # [n, rows, 1] sum of p
    acc: Tensor  # [n, rows, Dv or 2 Dv] p v, and p v_dot beside it
    r: Tensor | None  # [n, rows, 1] sum of h
    acc_dot: Tensor | None  # [n, rows, Dv] h v


def _absorb(
    sums: _Sums | None, s: Tensor, s_dot: Tensor | None, values: Tensor, v: Tensor, may_be_empty: bool
) -> _Sums:
    """Sums over one more block of keys; overwrites s and s_dot. values is [v, v_dot], or v again."""
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


def _store_blind(
    chunk: _Chunk, o: Tensor, lse: Tensor, o_dot: Tensor | None, lse_dot: Tensor | None, i: int, bq: int
) -> None:
    """Write what queries [i, i + bq) get that see no key."""
    for x, value in ((o, 0.0), (lse, -math.inf), (o_dot, 0.0), (lse_dot, 0.0)):
        if x is not None:
            _narrow(chunk.narrow(x, heads_are_queries=True), 2, i, bq).fill_(value)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dots: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
    window: Window,
    scale: float,
    block_q: int | None,
    block_k: int | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    q_dot, k_dot, v_dot, bias_dot = dots
    dtype = dtype_inside(q)
    n_q, n_k, dim_v = q.shape[2], k.shape[2], v.shape[3]
    s_moves = q_dot is not None or k_dot is not None or bias_dot is not None

    o = empty_rows(q, n_q, dim_v)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    o_dot = empty_rows(q, n_q, dim_v) if s_moves or v_dot is not None else None
    lse_dot = torch.empty_like(lse) if s_moves else None
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        for x in (o, o_dot, lse_dot):
            if x is not None:
                x.zero_()
        lse.fill_(-math.inf)
        return o, lse, o_dot, lse_dot

    hides = _hides(bias)
    may_be_blind = _may_be_blind(bias, window)
    chunks, block_q, block_k = _plan(q, k, block_q, block_k)
    for chunk in chunks:
        q_c = chunk.queries(q, dtype) * scale  # [n, group, Lq, Dqk]
        k_c = chunk.keys(k, dtype)  # [n, Lkv, Dqk]
        v_c = chunk.keys(v, dtype)  # [n, Lkv, Dv]
        values = v_c if v_dot is None else torch.cat((v_c, chunk.keys(v_dot, dtype)), dim=-1)
        left, right, centre = _score_tangent_operands(chunk, q_c, k_c, q_dot, k_dot, scale)

        for i, bq in _blocks(0, n_q, block_q):
            q_i = _rows(q_c, i, bq)  # [n, group * bq, Dqk]
            left_i = None if left is None else _rows(left, i, bq)
            sums = None
            first, end = window.keys(i, bq, n_k)
            for j, bk in _blocks(first, end, block_k):
                s = torch.bmm(q_i, _narrow(k_c, 1, j, bk).mT)
                s_dot = None
                if s_moves:
                    s_dot = _bmm_or_zeros(s, left_i, right, j, bk)
                    if bias_dot is not None:
                        chunk.scores(s_dot, bq).add_(chunk.bias(bias_dot, i, bq, j, bk))
                _mask_scores(s, chunk, hides, window, i, bq, j, bk)
                v_j = _narrow(v_c, 1, j, bk)
                sums = _absorb(sums, s, s_dot, _narrow(values, 1, j, bk), v_j, may_be_blind)
            if sums is None:  # no query of this block sees a key
                _store_blind(chunk, o, lse, o_dot, lse_dot, i, bq)
                continue

            empty = sums.l == 0 if may_be_blind else None  # rows that see no key at all
            inverse = (sums.l if empty is None else sums.l.masked_fill(empty, 1)).reciprocal()
            o_i = sums.acc[..., :dim_v] * inverse
            chunk.store(o, o_i, i, bq)
            chunk.store(lse, sums.m + sums.l.log(), i, bq)
            if o_dot is None:
                continue
            total = sums.acc[..., dim_v:]  # p v_dot, empty if v does not move
            if sums.acc_dot is not None:
                total = sums.acc_dot if v_dot is None else sums.acc_dot.add_(total)
            o_dot_i = total * inverse
            if sums.r is not None and lse_dot is not None:
                r = sums.r.mul_(inverse)
                o_dot_i.addcmul_(r, o_i, value=-1)
                if left_i is not None and centre is not None:
                    r = torch.baddbmm(r, left_i, centre.mT)
                chunk.store(lse_dot, r if empty is None else r.masked_fill(empty, 0), i, bq)
            chunk.store(o_dot, o_dot_i, i, bq)
    return o, lse, o_dot, lse_dot


def _score_tangent_operands(
    chunk: _Chunk, q_c: Tensor, k_c: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, scale: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """left [n, group, Lq, D], right [n, Lkv, D], centre [n, 1, D] with left (right + centre)' = s_dot, but
    for bias_dot.

    centre is the mean over keys, so left right' has mean zero in every row.
    """
    lefts, rights = [], []
    if q_dot is not None:
        lefts.append(chunk.queries(q_dot, q_c.dtype) * scale)
        rights.append(k_c)
    if k_dot is not None:
        lefts.append(q_c)
        rights.append(chunk.keys(k_dot, q_c.dtype))
    if not lefts:
        return None, None, None
    left, right = (torch.cat(x, dim=-1) if len(x) > 1 else x[0] for x in (lefts, rights))
    centre = right.mean(1, keepdim=True)
    return left, right - centre, centre


def _bmm_or_zeros(like: Tensor, left: Tensor | None, right: Tensor | None, j: int, bk: int) -> Tensor:
    if left is None or right is None:
        return torch.zeros_like(like)
    return torch.bmm(left, _narrow(right, 1, j, bk).mT)


def attention_backward(
    o_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: Window,
    scale: float,
    bias_needs_grad: bool,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias) from the forward's o and lse; dbias is None unless asked for."""
    if (
        block_q is None
        and block_k is None
        and lse_grad is None
        and not bias_needs_grad
        # in half types ATen takes 2.5 times as long as the blocks below at 64 keys, and less from 256 on
        and (q.dtype.itemsize > 2 or k.shape[2] >= 256)
        and _flash_applies(q, k, v, bias, window, scale)
        and not needs_own_sums(bias, lse)
    ):
        return *_flash_backward(o_grad, q, k, v, bias, o, lse, window, scale), None
    dtype = dtype_inside(q)
    n_q, n_k = q.shape[2], k.shape[2]
    dq = empty_rows(q, n_q, q.shape[3])
    dk = empty_rows(k, n_k, k.shape[3])
    dv = empty_rows(v, n_k, v.shape[3])
    dbias = bias.new_zeros(bias.shape, dtype=dtype) if bias is not None and bias_needs_grad else None
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias

    hides = _hides(bias)
    sums_anew = needs_own_sums(bias, lse, may_wait=lse.device.type == "cpu")
    delta = (o_grad.to(dtype) * o.to(dtype)).sum(-1)  # [B, H, Lq]
    if lse_grad is not None:
        delta = delta - lse_grad.masked_fill(lse == -math.inf, 0)  # a merge of parts may have none there but NaN
    if _may_be_blind(bias, window):
        lse = lse.masked_fill(lse == -math.inf, math.inf)  # makes p = 0 in a fully masked row
    chunks, block_q, block_k = _plan(q, k, block_q, block_k)
    for chunk in chunks:
        q_c = chunk.queries(q, dtype) * scale
        k_c, v_c = chunk.keys(k, dtype), chunk.keys(v, dtype)
        o_grad_c = chunk.queries(o_grad, dtype)
        delta_c, lse_c = chunk.queries(delta, dtype), chunk.queries(lse, dtype)
        dk_c, dv_c = torch.zeros_like(k_c), torch.zeros_like(v_c)
        for i, bq in _blocks(0, n_q, block_q):
            q_i, o_grad_i = _rows(q_c, i, bq), _rows(o_grad_c, i, bq)
            delta_i, lse_i = _rows(delta_c, i, bq).unsqueeze(-1), _rows(lse_c, i, bq).unsqueeze(-1)
            log_l = None
            if sums_anew:
                lse_i, log_l = _row_sums(q_i, k_c, chunk, hides, window, i, bq, block_k)
            dq_i = torch.zeros_like(q_i)
            first, end = window.keys(i, bq, n_k)
            for j, bk in _blocks(first, end, block_k):
                k_j, v_j = _narrow(k_c, 1, j, bk), _narrow(v_c, 1, j, bk)
                s = torch.bmm(q_i, k_j.mT)
                _mask_scores(s, chunk, hides, window, i, bq, j, bk)
                p = s.sub_(lse_i).exp_() if log_l is None else s.sub_(lse_i).sub_(log_l).exp_()
                _narrow(dv_c, 1, j, bk).baddbmm_(p.mT, o_grad_i)
                ds = torch.bmm(o_grad_i, v_j.mT).sub_(delta_i).mul_(p)
                _narrow(dk_c, 1, j, bk).baddbmm_(ds.mT, q_i)
                dq_i.baddbmm_(ds, k_j)
                if dbias is not None:
                    part = chunk.bias(dbias, i, bq, j, bk)
                    part.add_(chunk.scores(ds, bq).sum_to_size(part.shape))
            chunk.store(dq, dq_i.mul_(scale), i, bq)
        # keys that no query sees under a causal mask keep their zeros
        for out, part in ((dk, dk_c), (dv, dv_c)):
            target = chunk.narrow(out)
            target.copy_(part.view(target.shape))
    return dq, dk, dv, dbias


def needs_own_sums(bias: Tensor | None, lse: Tensor, *, may_wait: bool = True) -> bool:
    """Whether p = exp(s - lse) would be wrong, for lack of digits in lse: in rows whose keys are all hidden by a large
    finite bias, so that lse = log N - 1e9. Answers yes where only the device knows, and one must not wait for it."""
    if bias is None or bias.dtype == torch.bool:
        return False
    if not may_wait or (lse.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    return bool(((lse < LOW) & (lse > -math.inf)).any())


def _row_sums(
    q_i: Tensor, k_c: Tensor, chunk: _Chunk, bias: Tensor | None, window: Window, i: int, bq: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """(m, log l) with p = exp((s - m) - log l) for a block of queries, both [n, rows, 1], from s itself; +inf for m
    in a row that sees no key, which makes p = 0."""
    m = q_i.new_full((*q_i.shape[:2], 1), -math.inf)
    l = torch.zeros_like(m)
    first, end = window.keys(i, bq, k_c.shape[1])
    for j, bk in _blocks(first, end, block_k):
        s = torch.bmm(q_i, _narrow(k_c, 1, j, bk).mT)
        _mask_scores(s, chunk, bias, window, i, bq, j, bk)
        m_new = torch.maximum(m, s.amax(-1, keepdim=True))
        safe = m_new.masked_fill(m_new == -math.inf, 0)
        l = l * torch.exp(m - safe) + s.sub_(safe).exp_().sum(-1, keepdim=True)
        m = m_new
    blind = m == -math.inf
    return m.masked_fill(blind, math.inf), l.masked_fill(blind, 1).log_()


def _flash_applies(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: Window, scale: float) -> bool:
    """Whether ATen's CPU flash kernel computes exactly this, and takes these arguments."""
    return (
        q.device.type == "cpu"
        and q.shape[1] == k.shape[1]
        and q.shape[3] == v.shape[3]
        and (window == EVERYTHING or (window == CAUSAL and bias is None))
        and scale > 0  # it sets what is out of sight to -inf and then multiplies by scale
        and q.numel() > 0
        and k.numel() > 0
    )


def _additive(q: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """bias as the flash kernel takes it, and which rows see no key at all [B | 1, H | 1, Lq | 1]."""
    if bias is None:
        return None, None
    if bias.dtype == torch.bool:
        return bias.new_zeros(bias.shape, dtype=q.dtype).masked_fill_(~bias, -math.inf), ~bias.any(-1)
    # the kernel takes float32 beside half types, but nothing else than the dtype of q otherwise
    additive = bias.to(q.dtype) if q.dtype == torch.float64 else bias
    return for_aten(additive), bias.amax(-1) == -math.inf


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: Window, scale: float) -> tuple[Tensor, Tensor]:
    additive, empty = _additive(q, bias)
    q, k, v = map(for_aten, (q, k, v))
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, window == CAUSAL, attn_mask=additive, scale=scale
    )
    if empty is not None:
        lse = lse.masked_fill(empty, -math.inf)  # the kernel says 0
    return o, lse.contiguous()


def _flash_backward(
    o_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    additive, _ = _additive(q, bias)
    if bias is not None:
        lse = lse.masked_fill(lse == -math.inf, 0)
    o_grad, q, k, v, o, lse = map(for_aten, (o_grad, q, k, v, o, lse))
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        o_grad, q, k, v, o, lse, 0.0, window == CAUSAL, attn_mask=additive, scale=scale
    )
