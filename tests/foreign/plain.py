"""Attention by plain math, with masks written out: what stand-ins compute, and what ours is compared with."""

from __future__ import annotations

import torch


def plain(q, k, v, mask=None, bias=0.0, scale=None):
    """[B, L, H, D], with a boolean mask [Lq, Lk] and something added."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = (scale or q.shape[-1] ** -0.5) * q @ k.mT + bias
    if mask is None:
        return (s.softmax(-1) @ v).transpose(1, 2)
    p = s.masked_fill(~mask, torch.finfo(s.dtype).min).softmax(-1)
    return (p.masked_fill(~mask, 0) @ v).transpose(1, 2)


def band(n_q, n_k, left=-1, right=-1, from_the_end=True):
    distance = torch.arange(n_k) - torch.arange(n_q)[:, None] - (n_k - n_q if from_the_end else 0)
    seen = torch.ones(n_q, n_k, dtype=torch.bool)
    seen &= (distance <= right) | (right < 0)
    return seen & ((distance >= -left) | (left < 0))


def blocks(of_q, of_k, block=lambda n, m: torch.ones(n, m, dtype=torch.bool)):
    return torch.block_diag(*map(block, of_q, of_k)).bool()


def neighbours(n, kernel, stride, dilation, causal):
    """[n, n], token by token, as NATTEN describes it."""
    seen = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        group = list(range(i % dilation, n, dilation))
        place = i // dilation
        leader = place - place % stride + (stride - 1 if causal else stride // 2)
        leader = min(leader, len(group) - 1)
        if causal:
            window = [j for j in range(len(group)) if leader - kernel < j <= place]
        else:
            first = min(max(leader - kernel // 2, 0), len(group) - kernel)
            window = range(first, first + kernel)
        for j in window:
            seen[i, group[j]] = True
    return seen


def neighbourhoods(space, kernel_size, stride=1, dilation=1, is_causal=False):
    """[n, n] of all tokens of a grid."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for dim, size in enumerate(space):
        given = (kernel_size, stride, dilation, is_causal)
        mask = torch.kron(mask, neighbours(size, *(x[dim] if isinstance(x, tuple) else x for x in given)))
    return mask
