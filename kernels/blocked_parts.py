"""What attention in blocks of plain torch shares, forward and backward: the scores of a block, see visits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jvpgraph.kernels.call import Call
from jvpgraph.kernels.visits import Chunk, Keys, Visits

__all__ = ["exp_", "needs_own_sums", "row_sums", "score_tangent_operands", "score_tangents"]

# Below this a logsumexp has lost digits of what exp(s - lse) needs. Scores do not come here, large negative biases do.
LOW = -1e3
LOG2E = 1 / math.log(2)


def exp_(x: Tensor) -> Tensor:
    """exp, in place. MKL's, which torch calls on CPUs, takes 30 times as long for -inf, which is what is hidden, and
    300 times as long for what has a denormal result; exp2 is not MKL's."""
    return x.mul_(LOG2E).exp2_() if x.device.type == "cpu" else x.exp_()


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


def score_tangents(like: Tensor, left: Tensor | None, right: Tensor | None, keys: Keys) -> Tensor:
    if left is None or right is None:
        return torch.zeros_like(like)
    return torch.bmm(left, keys.of(right).mT)


def needs_own_sums(bias: Tensor | None, lse: Tensor, *, may_wait: bool = True) -> bool:
    """Whether p = exp(s - lse) would be wrong, for lack of digits in lse: in rows whose keys are all hidden by a large
    finite bias, so that lse = log N - 1e9. Answers yes where only the device knows, and one must not wait for it."""
    if bias is None or bias.dtype == torch.bool:
        return False
    if not may_wait or (lse.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    return bool(((lse < LOW) & (lse > -math.inf)).any())


def row_sums(q_i: Tensor, k_c: Tensor, visits: Visits, chunk: Chunk, i: int, bq: int) -> tuple[Tensor, Tensor]:
    """(m, log l) with p = exp((s - m) - log l) for a block of queries, both [n, rows, 1], from s itself; +inf for m
    in a row that sees no key, which makes p = 0."""
    m = q_i.new_full((*q_i.shape[:2], 1), -math.inf)
    l = torch.zeros_like(m)
    for keys in visits.keys(chunk, i, bq):
        s = torch.bmm(q_i, keys.of(k_c).mT)
        visits.hide(s, chunk, i, bq, keys)
        m_new = torch.maximum(m, s.amax(-1, keepdim=True))
        safe = m_new.masked_fill(m_new == -math.inf, 0)
        l = l * torch.exp(m - safe) + exp_(s.sub_(safe)).sum(-1, keepdim=True)
        m = m_new
    blind = m == -math.inf
    return m.masked_fill(blind, math.inf), l.masked_fill(blind, 1).log_()
