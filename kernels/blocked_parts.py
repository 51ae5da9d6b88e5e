"""What attention in blocks of plain torch shares, forward and backward: which block comes when, and scores of one.

A block holds TILE_ELEMENTS scores; batch entries and heads share a block while they fit, so a small problem is one
block and takes no rescaling. Query heads of a group are stacked as rows, so grouped keys and values are never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jvpgraph.kernels.call import Call
from jvpgraph.kernels.window import Window

__all__ = [
    "Chunk",
    "blocks_of",
    "hidden_by",
    "mask_scores",
    "may_be_blind",
    "needs_own_sums",
    "plan_blocks",
    "row_sums",
    "score_tangent_operands",
    "score_tangents",
    "take",
    "take_rows",
]

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
class Chunk:
    """Batch entries [batch, +batches) and key heads [head, +heads), each with `group` query heads."""

    batch: int
    batches: int
    head: int
    heads: int
    group: int

    def narrow(self, x: Tensor, heads_are_queries: bool = False) -> Tensor:
        """This chunk of x [B | 1, H | 1, ...]; dims of size one broadcast and stay."""
        times = self.group if heads_are_queries else 1
        x = _take_unless_one(x, 0, self.batch, self.batches)
        return _take_unless_one(x, 1, self.head * times, self.heads * times)

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
        bias = _take_unless_one(_take_unless_one(bias, 2, i, bq), 3, j, bk)
        if bias.shape[1] == 1:
            return bias.unsqueeze(2)
        return bias.unflatten(1, (self.heads, self.group))

    def scores(self, s: Tensor, bq: int) -> Tensor:
        """[batches * heads, group * bq, bk] viewed so that a block of bias broadcasts to it."""
        return s.view(self.batches, self.heads, self.group, bq, s.shape[-1])

    def store(self, out: Tensor, rows: Tensor, i: int, bq: int) -> None:
        """Write rows [batches * heads, group * bq, ...] to queries [i, i + bq) of out [B, H, Lq, ...]."""
        part = take(self.narrow(out, heads_are_queries=True), 2, i, bq)
        part.copy_(rows.reshape(part.shape))


def take(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return x if x.shape[dim] == length else x.narrow(dim, start, length)


def _take_unless_one(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return x if x.shape[dim] == 1 else take(x, dim, start, length)


def take_rows(x: Tensor, i: int, bq: int) -> Tensor:
    """Queries [i, i + bq) of x [n, group, L, ...] as [n, group * bq, ...]."""
    return take(x, 2, i, bq).flatten(1, 2)


def blocks_of(first: int, end: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, size) of each block of [first, end) of a dim."""
    for start in range(first, end, block):
        yield start, min(block, end - start)


def plan_blocks(q: Tensor, k: Tensor, block_q: int | None, block_k: int | None) -> tuple[Iterator[Chunk], int, int]:
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
        Chunk(b, nb, h, nh, group)
        for b, nb in blocks_of(0, batch, batches)
        for h, nh in blocks_of(0, kv_heads, heads_each)
    )
    return chunks, bq, bk


def score_tangent_operands(
    chunk: Chunk, q_c: Tensor, k_c: Tensor, call: Call
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """left [n, group, Lq, D], right [n, Lkv, D], centre [n, 1, D] with left (right + centre)' = s_dot, but
    for bias_dot.

    centre is the mean over keys, so left right' has mean zero in every row.
    """
    lefts, rights = [], []
    if call.q_dot is not None:
        lefts.append(chunk.queries(call.q_dot, q_c.dtype) * call.scale)
        rights.append(k_c)
    if call.k_dot is not None:
        lefts.append(q_c)
        rights.append(chunk.keys(call.k_dot, q_c.dtype))
    if not lefts:
        return None, None, None
    left, right = (torch.cat(x, dim=-1) if len(x) > 1 else x[0] for x in (lefts, rights))
    centre = right.mean(1, keepdim=True)
    return left, right - centre, centre


def score_tangents(like: Tensor, left: Tensor | None, right: Tensor | None, j: int, bk: int) -> Tensor:
    if left is None or right is None:
        return torch.zeros_like(like)
    return torch.bmm(left, take(right, 1, j, bk).mT)


def mask_scores(s: Tensor, chunk: Chunk, bias: Tensor | None, window: Window, i: int, bq: int, j: int, bk: int) -> None:
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


def may_be_blind(bias: Tensor | None, window: Window) -> bool:
    """Whether there may be queries that see no key at all."""
    return bias is not None or window.left is not None


def hidden_by(bias: Tensor | None) -> Tensor | None:
    """Boolean bias says who attends; masked_fill wants who does not."""
    return ~bias if bias is not None and bias.dtype == torch.bool else bias


def needs_own_sums(bias: Tensor | None, lse: Tensor, *, may_wait: bool = True) -> bool:
    """Whether p = exp(s - lse) would be wrong, for lack of digits in lse: in rows whose keys are all hidden by a large
    finite bias, so that lse = log N - 1e9. Answers yes where only the device knows, and one must not wait for it."""
    if bias is None or bias.dtype == torch.bool:
        return False
    if not may_wait or (lse.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    return bool(((lse < LOW) & (lse > -math.inf)).any())


def row_sums(
    q_i: Tensor, k_c: Tensor, chunk: Chunk, bias: Tensor | None, window: Window, i: int, bq: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """(m, log l) with p = exp((s - m) - log l) for a block of queries, both [n, rows, 1], from s itself; +inf for m
    in a row that sees no key, which makes p = 0."""
    m = q_i.new_full((*q_i.shape[:2], 1), -math.inf)
    l = torch.zeros_like(m)
    first, end = window.keys(i, bq, k_c.shape[1])
    for j, bk in blocks_of(first, end, block_k):
        s = torch.bmm(q_i, take(k_c, 1, j, bk).mT)
        mask_scores(s, chunk, bias, window, i, bq, j, bk)
        m_new = torch.maximum(m, s.amax(-1, keepdim=True))
        safe = m_new.masked_fill(m_new == -math.inf, 0)
        l = l * torch.exp(m - safe) + s.sub_(safe).exp_().sum(-1, keepdim=True)
        m = m_new
    blind = m == -math.inf
    return m.masked_fill(blind, math.inf), l.masked_fill(blind, 1).log_()
