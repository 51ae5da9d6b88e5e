"""Which blocks of queries and keys attention in blocks of plain torch visits, in which order, and what it hides there.

A block holds TILE_ELEMENTS scores; batch entries and heads share a block while they fit, so a small problem is one
block and takes no rescaling. Query heads of a group are stacked as rows, so grouped keys and values are never repeated.

With a mask in tiles, a block is a row of tiles with those of its keys that are kept, gathered so that products are
wide however they are scattered: first the tiles that are seen whole, then those that are cut, of which alone a mask is
read. Batch entries and heads with tiles of their own take a block each; query heads of a group share the tiles that one
of them keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jvpgraph.kernels.block_mask import HIDDEN, WHOLE, BlockMask
from jvpgraph.kernels.call import Call, is_capturing

__all__ = ["Chunk", "Keys", "Visits", "take", "take_rows", "visits_of"]

# Scores per block. The two score blocks of a JVP (2 MiB) should stay in the cache of a CPU; elsewhere
# launches cost.
TILE_ELEMENTS = {"cpu": 1 << 18}
TILE_ELEMENTS_ELSEWHERE = 1 << 25
# Keys per block: long enough for an efficient matmul, short enough to leave rows in the block.
BLOCK_K = {"cpu": 512}
BLOCK_K_ELSEWHERE = 4096

# Integers as wide as the scores, and the one that has the bits of -inf.
BITS = {torch.float32: (torch.int32, -1 << 23), torch.float64: (torch.int64, -1 << 52)}


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

    def bias(self, bias: Tensor, i: int, bq: int, keys: Keys | None = None) -> Tensor:
        """A block of bias as [batches | 1, heads | 1, group | 1, bq | 1, bk | 1]; a view, if of all keys."""
        rows = _take_unless_one(self.narrow(bias, heads_are_queries=True), 2, i, bq)
        return self.by_group(rows if keys is None else keys.of(rows, 3))

    def by_group(self, x: Tensor) -> Tensor:
        """[batches | 1, query heads | 1, ...] -> [batches | 1, heads | 1, group | 1, ...]"""
        return x.unsqueeze(2) if x.shape[1] == 1 else x.unflatten(1, (self.heads, self.group))

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


def _hide(s: Tensor, hidden: Tensor) -> None:
    """s.masked_fill_(hidden, -inf), whatever s is there. On a CPU that takes a branch for each score, and a fifth of
    the time by bits, of which those of a mask that scores share are made once."""
    if s.device.type != "cpu" or s.dtype not in BITS:
        s.masked_fill_(hidden, -math.inf)
        return
    bits, minus_infinity = BITS[s.dtype]
    hides = hidden.view(torch.uint8).to(bits)
    s.view(bits).bitwise_and_(hides - 1).bitwise_or_(hides.mul_(minus_infinity))


def _blocks_of(first: int, end: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, size) of each block of [first, end) of a dim."""
    for start in range(first, end, block):
        yield start, min(block, end - start)


class Keys(NamedTuple):
    """Keys that are visited together."""

    runs: tuple[tuple[int, int], ...]  # (first, how many), one behind the other
    are_all: bool = False  # that the queries see
    hidden: Tensor | None = None  # [batches | 1, heads | 1, group | 1, bq, n], True hides, of the last n
    tiles: tuple[Tensor, int] | None = None  # where the runs are tiles: which, and of how many keys

    def of(self, x: Tensor, dim: int = 1) -> Tensor:
        """These keys of x, in this order; x if it has one for all."""
        if self.tiles is not None and dim == 1 and x.shape[1] > 1:
            return self._in_tiles(x).index_select(1, self.tiles[0]).flatten(1, 2)
        parts = [_take_unless_one(x, dim, *run) for run in self.runs]
        return parts[0] if len(parts) == 1 or x.shape[dim] == 1 else torch.cat(parts, dim)

    def add_product(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        """Add a b to these keys of sums [n, Lkv, D]."""
        if len(self.runs) == 1:
            take(sums, 1, *self.runs[0]).baddbmm_(a, b)
            return
        product = torch.bmm(a, b)
        if self.tiles is not None:
            self._in_tiles(sums).index_add_(1, self.tiles[0], self._in_tiles(product))
            return
        parts = product.split([length for _, length in self.runs], 1)
        for run, part in zip(self.runs, parts):
            take(sums, 1, *run).add_(part)

    def _in_tiles(self, x: Tensor) -> Tensor:
        """x [n, Lkv, D] as [n, tiles, keys of one, D], but for a last one that is not whole."""
        assert self.tiles is not None
        size = self.tiles[1]
        return take(x, 1, 0, x.shape[1] // size * size).unflatten(1, (-1, size))

    def add(self, sums: Tensor, x: Tensor) -> None:
        """Add x to these keys, the last dim of sums; summed over as sums broadcasts."""
        parts = (x,) if sums.shape[-1] == 1 else x.split([length for _, length in self.runs], -1)
        for run, part in zip(self.runs, parts):
            target = _take_unless_one(sums, sums.dim() - 1, *run)
            target.add_(part.sum_to_size(target.shape))

    def positions(self, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(first, first + n, device=device) for first, n in self.runs])


class Visits:
    """Every block of queries with each block of keys that its window leaves."""

    def __init__(self, call: Call, block_q: int | None = None, block_k: int | None = None):
        """block_q and block_k override the sizes of blocks."""
        q, bias = call.q, call.bias
        self.window, self.maybe_blind = call.window, bias is not None or call.window.left is not None
        # boolean bias says who attends; masked_fill wants who does not
        self.bias = ~bias if bias is not None and bias.dtype == torch.bool else bias
        self.batch, self.heads, self.n_q = q.shape[:3]
        self.kv_heads, self.n_k = call.k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.budget = TILE_ELEMENTS.get(q.device.type, TILE_ELEMENTS_ELSEWHERE)
        self.block_q, self.block_k = self._sizes(BLOCK_K.get(q.device.type, BLOCK_K_ELSEWHERE), block_q, block_k)

    def _sizes(self, least_k: int, block_q: int | None, block_k: int | None) -> tuple[int, int]:
        bk = min(self.n_k, block_k or max(least_k, self.budget // max(1, self.n_q * self.group)))
        return min(self.n_q, block_q or max(16, self.budget // (bk * self.group))), bk

    def chunks(self) -> Iterator[Chunk]:
        """Of batch and heads."""
        fit = max(1, self.budget // (self.block_k * self.block_q * self.group))
        batches, heads = (min(self.batch, fit // self.kv_heads), self.kv_heads) if fit >= self.kv_heads else (1, fit)
        return self._chunks(batches, heads)

    def _chunks(self, batches: int, heads: int) -> Iterator[Chunk]:
        for b, nb in _blocks_of(0, self.batch, batches):
            for h, nh in _blocks_of(0, self.kv_heads, heads):
                yield Chunk(b, nb, h, nh, self.group)

    def queries(self) -> Iterator[tuple[int, int]]:
        """(first, how many) of each block of queries."""
        return _blocks_of(0, self.n_q, self.block_q)

    def keys(self, chunk: Chunk, i: int, bq: int) -> Iterator[Keys]:
        """Those that one of the queries [i, i + bq) may see."""
        first, end = self.window.keys(i, bq, self.n_k)
        for run in _blocks_of(first, end, self.block_k):
            yield Keys((run,), are_all=run[1] == end - first)

    def hide(self, s: Tensor, chunk: Chunk, i: int, bq: int, keys: Keys) -> None:
        """Apply bias and masks to a block of scores, in place."""
        if self.bias is not None:
            block = chunk.bias(self.bias, i, bq, keys)
            if self.bias.dtype == torch.bool:
                _hide(chunk.scores(s, bq), block)
            else:
                chunk.scores(s, bq).add_(block)
        if keys.hidden is not None:
            n = keys.hidden.shape[-1]
            _hide(chunk.scores(s, bq)[..., s.shape[-1] - n :], keys.hidden)
        if any(self.window.cuts(i, bq, first, first + n) for first, n in keys.runs):
            ahead = keys.positions(s.device) - torch.arange(i, i + bq, device=s.device)[:, None]
            _hide(chunk.scores(s, bq), self.window.hides(ahead))


class TiledVisits(Visits):
    """Each row of tiles with the tiles that a mask keeps."""

    def __init__(
        self,
        call: Call,
        mask: BlockMask,
        is_summary: bool = False,
        block_q: int | None = None,
        block_k: int | None = None,
    ):
        """Waits for the device. is_summary: mask has no bytes, and stands for the bias, whose bytes are taken instead.
        block_q and block_k override the sizes of blocks, which hold at least one row and one tile."""
        self.mask, self.kinds = mask, mask.map.cpu()
        super().__init__(call, block_q, block_k)
        self.maybe_blind = True
        self.bytes: Tensor | None = None  # of the bias, where the mask has none
        if is_summary:
            self.bytes, self.bias = self.bias, None
        # by rows first, so that those of several tiles lie one beside the other
        self.hides = ~mask.partial.transpose(0, 1).contiguous()
        self._planned: tuple[Chunk, Tensor, Tensor] | None = None

    def _sizes(self, least_k: int, block_q: int | None, block_k: int | None) -> tuple[int, int]:
        rows, columns = self.mask.tile
        longest = columns * int((self.kinds != HIDDEN).sum(-1).max())
        bk = max(1, min(self.n_k, longest, block_k or max(least_k, self.budget // (rows * self.group))))
        return min(rows, self.n_q, block_q or max(16, self.budget // (bk * self.group))), bk

    def _chunks(self, batches: int, heads: int) -> Iterator[Chunk]:
        own = self.kinds.shape[:2]
        return super()._chunks(1 if own[0] > 1 else batches, 1 if own[1] > 1 else heads)

    def queries(self) -> Iterator[tuple[int, int]]:
        rows = self.mask.tile[0]
        for i, n in _blocks_of(0, self.n_q, rows):
            yield from _blocks_of(i, i + n, self.block_q)

    def _plan(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Which tiles the chunk sees whole, and which others it keeps, [tiles of queries, tiles of keys]."""
        if self._planned is None or self._planned[0] is not chunk:
            kinds = chunk.narrow(self.kinds, heads_are_queries=True)
            whole, kept = (kinds == WHOLE).all(0).all(0), (kinds != HIDDEN).any(0).any(0)
            self._planned = chunk, whole, kept & ~whole
        return self._planned[1:]

    def keys(self, chunk: Chunk, i: int, bq: int) -> Iterator[Keys]:
        rows, columns = self.mask.tile
        first, end = self.window.keys(i, bq, self.n_k)
        from_tile = first // columns
        to_tile = -(-end // columns) if end > first else from_tile
        of_row = (x[i // rows, from_tile:to_tile].nonzero().flatten() + from_tile for x in self._plan(chunk))
        whole, cut = (x.tolist() for x in of_row)
        tiles = whole + cut
        together = max(1, self.block_k // columns)
        for start in range(0, len(tiles), together):
            some = tiles[start : start + together]
            of_cut = some[max(0, len(whole) - start) :]
            hidden = self._hidden(chunk, i, bq, of_cut) if of_cut else None
            runs = self._runs(some)
            in_tiles = None
            if len(runs) > 1 and (max(some) + 1) * columns <= self.n_k:  # fewer calls than run by run
                in_tiles = torch.tensor(some, device=self.hides.device), columns
            yield Keys(runs, len(some) == len(tiles), hidden, in_tiles)

    def _runs(self, tiles: list[int]) -> tuple[tuple[int, int], ...]:
        """Tiles that follow one another are one run."""
        size = self.mask.tile[1]
        runs: list[tuple[int, int]] = []
        for tile in tiles:
            start, end = tile * size, min(tile * size + size, self.n_k)
            if runs and sum(runs[-1]) == start:
                runs[-1] = runs[-1][0], end - runs[-1][0]
            else:
                runs.append((start, end - start))
        return tuple(runs)

    def _hidden(self, chunk: Chunk, i: int, bq: int, tiles: list[int]) -> Tensor:
        runs = self._runs(tiles)
        if self.bytes is not None:
            return chunk.bias(self.bytes, i, bq, Keys(runs))
        rows, width = self.mask.tile[0], sum(n for _, n in runs)
        kinds = chunk.narrow(self.mask.map, heads_are_queries=True)[:, :, i // rows, tiles]
        if kinds.shape[:2] == (1, 1):  # each is cut
            hidden = take(self.hides, 0, i % rows, bq).index_select(1, (kinds[0, 0] - 1).long())
            return take(hidden.flatten(1), 1, 0, width)[None, None, None]
        seen = take(self.mask.tiles_of(kinds), 3, i % rows, bq)  # [batches, query heads, tiles, bq, columns]
        hidden = ~seen.transpose(2, 3).flatten(3)
        return chunk.by_group(take(hidden, 3, 0, width))


def visits_of(call: Call, block_q: int | None = None, block_k: int | None = None) -> Visits:
    """Those of a call. block_q and block_k override the sizes of blocks."""
    if call.block_mask is not None and (call.q.is_meta or is_capturing(call.q)):  # which tiles are kept is not known
        return Visits(call.with_dense_mask(), block_q, block_k)
    if call.block_mask is not None:
        return TiledVisits(call, call.block_mask, False, block_q, block_k)
    summary = None if block_q else call.summary
    return Visits(call, block_q, block_k) if summary is None else TiledVisits(call, summary, True, None, block_k)
