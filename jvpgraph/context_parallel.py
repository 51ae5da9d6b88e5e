"""Attention over a sequence that is split across ranks, for models without an interface of their own for it.

    cp = ContextParallel(ulysses=mesh["ulysses"].get_group(), ring=mesh["ring"].get_group())
    x = cp.shard(x, dim=1)                  # before the first block; position codes likewise
    o = cp.attention(q, k, v)               # in place of scaled_dot_product_attention(q, k, v)
    y = cp.gather(y, dim=1)                 # after the last block

Ulysses trades heads for tokens by all-to-all, so that each rank attends with some heads to the whole sequence. Ring
leaves the heads where they are and lets keys and values travel, merging by the logsumexp. With both, heads are traded
within the Ulysses group, and the longer pieces travel around the ring. Cross-attention to a text that every rank has
whole needs neither.

Every rank must compute the same loss from the gathered output. Gradients of replicated parameters are then summed, not
averaged, over the ranks.

Shapes
    q [B, H, N, D], k and v [B, Hkv, N, D] with the N tokens of this rank. Ranks are in the order of the sequence, with
    the Ulysses rank running fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jvpgraph.kernels.attention import attention, merge_attention

__all__ = ["ContextParallel"]


class ContextParallel:
    """The process groups that share a sequence, and the steps of a model that uses them.

    Args:
        ulysses: process group whose ranks divide the heads among them; the numbers of heads must divide by its size.
        ring: process group around which keys and values travel.
        tokens: the length of the whole sequence, needed only if it does not divide by the number of ranks. The first
            ranks then hold one token more than the last, as with torch.tensor_split.

    Raises:
        ValueError: neither group is given, or there are fewer tokens than ranks.
    """

    def __init__(
        self,
        *,
        ulysses: dist.ProcessGroup | None = None,
        ring: dist.ProcessGroup | None = None,
        tokens: int | None = None,
    ):
        if ulysses is None and ring is None:
            raise ValueError("context parallelism needs a process group: ulysses=, ring= or both")
        self.ulysses, self.ring = _Ranks(ulysses), _Ranks(ring)
        self.ranks = self.ulysses.size * self.ring.size
        self.rank = self.ring.rank * self.ulysses.size + self.ulysses.rank
        if tokens is not None and tokens < self.ranks:
            raise ValueError(f"{tokens} tokens cannot be split across {self.ranks} ranks")
        self.tokens = tokens

    def lengths(self, tokens: int) -> list[int]:
        """How many of the tokens each rank holds."""
        return [tokens // self.ranks + (rank < tokens % self.ranks) for rank in range(self.ranks)]

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of ``x`` along the sequence ``dim``."""
        lengths = self.lengths(self._whole(x.shape[dim]))
        return x.narrow(dim, sum(lengths[: self.rank]), lengths[self.rank])

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole sequence from the parts of all ranks; its gradient goes to each rank's own part only."""
        lengths = self._lengths_from(x.shape[dim])
        longest = max(lengths)
        if x.shape[dim] < longest:
            padding = x.new_zeros([longest - n if i == dim % x.dim() else n for i, n in enumerate(x.shape)])
            x = torch.cat([x, padding], dim)
        x = _Gather.apply(x.movedim(dim, 0), self.ulysses.size, self.ulysses.rank, self.ulysses.name)
        x = _Gather.apply(x, self.ring.size, self.ring.rank, self.ring.name)
        parts = x.unflatten(0, (self.ranks, longest)).unbind()
        return torch.cat([part[:n] for part, n in zip(parts, lengths)]).movedim(0, dim)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """softmax(scale q k') v over the keys and values of all ranks, for the queries of this one.

        Args:
            q: [B, H, N, Dqk], N the tokens of this rank.
            k, v: [B, Hkv, N, Dqk] and [B, Hkv, N, Dv].
            scale: factor on q k', default 1 / sqrt(Dqk).

        Returns:
            o [B, H, N, Dv].
        Raises:
            ValueError: heads that do not divide by the Ulysses group, or lengths that do not fit.
        """
        if not q.shape[2] == k.shape[2] == v.shape[2]:
            raise ValueError(
                f"q, k and v must be the same tokens of this rank, not {q.shape[2]}, {k.shape[2]} and {v.shape[2]}; "
                "attention to a text that every rank has whole is plain attention"
            )
        lengths = self._lengths_from(q.shape[2])
        of_ring = [sum(lengths[i : i + self.ulysses.size]) for i in range(0, self.ranks, self.ulysses.size)]
        first = self.ring.rank * self.ulysses.size
        of_ulysses = lengths[first : first + self.ulysses.size]
        q, k, v = _heads_to_tokens((q, k, v), self.ulysses, of_ulysses)
        o = _ring_attention(q, k, v, self.ring, of_ring, scale)
        return _tokens_to_heads(o, self.ulysses, of_ulysses)

    def _whole(self, tokens: int) -> int:
        if self.tokens is not None and tokens != self.tokens:
            raise ValueError(f"a sequence of {tokens} tokens, but ContextParallel was made with tokens={self.tokens}")
        if self.tokens is None and tokens % self.ranks:
            raise ValueError(
                f"{tokens} tokens do not divide by {self.ranks} ranks: use ContextParallel(tokens={tokens})"
            )
        return tokens

    def _lengths_from(self, own: int) -> list[int]:
        lengths = self.lengths(self.tokens) if self.tokens is not None else [own] * self.ranks
        if lengths[self.rank] != own:
            raise ValueError(f"rank {self.rank} got {own} tokens, but holds {lengths[self.rank]} of {self.tokens}")
        return lengths


class _Ranks:
    """A process group as constants that torch.compile can read; of one rank where there is none."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.name = "" if group is None else group.group_name
        if self.rank < 0:
            raise ValueError("this rank is not in the process group that ContextParallel was given")


def _heads_to_tokens(tensors: Sequence[Tensor], ranks: _Ranks, lengths: Sequence[int]) -> Sequence[Tensor]:
    """[B, H, N, D] each -> [B, H / ranks, sum(lengths), D] each, all in one exchange."""
    if ranks.size == 1:
        return tensors
    for x in tensors:
        if x.shape[1] % ranks.size:
            raise ValueError(
                f"{x.shape[1]} heads do not divide by the {ranks.size} ranks of the Ulysses group: "
                "make that smaller and put the other ranks into a ring"
            )
    N = tensors[0].shape[2]
    # [ranks, N, B, H / ranks * D]
    rows = [x.unflatten(1, (ranks.size, -1)).permute(1, 3, 0, 2, 4).flatten(3) for x in tensors]
    sent = torch.cat(rows, -1).flatten(0, 1)
    got = _AllToAll.apply(sent, lengths, [N] * ranks.size, ranks.name)
    parts = got.split([row.shape[-1] for row in rows], -1)
    return [part.unflatten(-1, (-1, x.shape[-1])).permute(1, 2, 0, 3) for part, x in zip(parts, tensors)]


def _tokens_to_heads(o: Tensor, ranks: _Ranks, lengths: Sequence[int]) -> Tensor:
    """[B, H / ranks, sum(lengths), D] -> [B, H, N, D]."""
    if ranks.size == 1:
        return o
    N = lengths[ranks.rank]
    got = _AllToAll.apply(o.permute(2, 0, 1, 3), [N] * ranks.size, lengths, ranks.name)
    return got.unflatten(0, (ranks.size, N)).permute(2, 0, 3, 1, 4).flatten(1, 2)


def _ring_attention(
    q: Tensor, k: Tensor, v: Tensor, ranks: _Ranks, lengths: Sequence[int], scale: float | None
) -> Tensor:
    """Attention to the keys of every rank of the ring in turn, beginning with its own."""
    merged = attention(q, k, v, scale=scale)
    D = k.shape[-1]
    kv = torch.cat([k, v], -1).movedim(2, 0) if ranks.size > 1 else k  # [N, B, Hkv, Dqk + Dv]
    for hop in range(1, ranks.size):
        source, next_source = ((ranks.rank - hop + i) % ranks.size for i in (0, 1))
        sent, got = [0] * ranks.size, [0] * ranks.size
        sent[(ranks.rank + 1) % ranks.size] = lengths[next_source]
        got[(ranks.rank - 1) % ranks.size] = lengths[source]
        kv = _AllToAll.apply(kv, got, sent, ranks.name)
        k, v = kv.movedim(0, 2).split([D, kv.shape[-1] - D], -1)
        merged = merge_attention(merged, attention(q, k, v, scale=scale))  # type: ignore[assignment]
    return merged[0]


class _AllToAll(torch.autograd.Function):
    """Rows to and from each rank; backward, the gradients of what was sent come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, got: Sequence[int], sent: Sequence[int], name: str) -> Tensor:
        ctx.how = got, sent, name
        out = torch.ops._c10d_functional.all_to_all_single(x.contiguous(), list(got), list(sent), name)
        return torch.ops._c10d_functional.wait_tensor(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        got, sent, name = ctx.how
        return _AllToAll.apply(grad, sent, got, name), None, None, None


class _Gather(torch.autograd.Function):
    """The rows of all ranks, one behind the other; backward, the gradient of the own ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, rank: int, name: str) -> Tensor:
        ctx.rows, ctx.rank = x.shape[0], rank
        if size == 1:
            return x.clone()
        out = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, name)
        return torch.ops._c10d_functional.wait_tensor(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad.narrow(0, ctx.rank * ctx.rows, ctx.rows), None, None, None
