"""Block masks of windows, made from their sizes: neither a dense mask nor a part of one as wide as all keys is made.

Intervals
    Each query sees the keys from one to another, and both ascend with the query: a window that is counted from the last
    query and the last key, within one sequence or several. Where both ascend, a tile of queries and one of keys have
    in common the queries between two binary searches; and what cuts a tile is a staircase, which crosses no more tiles
    than there are rows and columns. So bytes are made for as many, and no device is waited for.
Neighbourhoods
    Of a grid of tokens, as NATTEN's: along each dim a token sees some neighbours, and of all pairs of tokens those that
    do so along every dim. How many pairs of two tiles see each other is a sum over the dims' products, so it is summed
    up dim by dim, over one dim of queries at a time. It depends on numbers alone: how many tiles are cut is counted on
    the host, once for each grid, and no device is waited for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from jvpgraph.kernels.block_mask import HIDDEN, WHOLE, BlockMask
from jvpgraph.kernels.window import Window, places

__all__ = [
    "TILE",
    "Axis",
    "Grid",
    "cut_by_intervals",
    "cut_tiles",
    "intervals_from_the_end",
    "intervals_of_sequences",
    "kept_tiles",
    "mask_of_grid",
    "mask_of_intervals",
    "tiles_of",
]

TILE = 128
STRIP = 1 << 22  # numbers that are made at once

Intervals = tuple[Tensor, Tensor]  # of each query the first key that it sees, and the last; none if that is before


# ----------------------------------------------------------------------------------------------------- intervals


def intervals_from_the_end(length_q: int, length_kv: int, window: Window, device: torch.device) -> Intervals:
    """Those of a window whose positions are counted from the last query and the last key."""
    at = torch.arange(length_q, device=device) + (length_kv - length_q)
    return _within(at, window, at.new_zeros(()), at.new_full((), length_kv))


def intervals_of_sequences(starts: Intervals, ends: Intervals, length_q: int, window: Window) -> Intervals:
    """Those of a window that is counted from the last query and the last key of each sequence.

    Args:
        starts, ends: of the sequences, among the queries and among the keys; ascending. Between them may be gaps.
    """
    sequence, inside, at = places(length_q, starts[0], ends[0], from_the_end=True)
    if not starts[0].shape[0]:
        return at * 0, at * 0 - 1
    start, end = (torch.where(sequence < 0, 0, of[1].long()[sequence.clamp(min=0)]) for of in (starts, ends))
    first, last = _within(at + end, window, start, end)
    return torch.where(inside, first, end), torch.where(inside, last, end - 1)


def _within(at: Tensor, window: Window, start: Tensor, end: Tensor) -> Intervals:
    """A window around the keys `at`, of the keys [start, end)."""
    first = start.expand_as(at) if window.left is None else torch.clamp(at - window.left, start, end)
    last = (end - 1).expand_as(at) if window.right is None else torch.clamp(at + window.right, start - 1, end - 1)
    return first, last


def cut_by_intervals(rows: int, columns: int) -> int:
    """At most as many of rows x columns tiles are cut."""
    return 2 * (rows + columns)


def mask_of_intervals(first: Tensor, last: Tensor, length_kv: int) -> BlockMask:
    """Query i sees the keys [first[i], last[i]]. Does not wait for the device.

    Args:
        first, last: int64 [Lq], both ascending, from 0 to length_kv and from -1 to length_kv - 1.
    """
    first, last, length_q = first.contiguous(), last.contiguous(), first.shape[0]
    rows, columns = tiles_of(length_q), tiles_of(length_kv)
    queries, keys = (torch.arange(n, device=first.device) * TILE for n in (rows, columns))
    last_query, last_key = (queries + TILE).clamp(max=length_q) - 1, (keys + TILE).clamp(max=length_kv) - 1
    # of the queries of a row [rows, 1], those that see some key of a column [columns]: whose interval neither ends
    # before it nor begins after it
    begins = torch.maximum(torch.searchsorted(last, keys), queries[:, None])
    ends = torch.minimum(torch.searchsorted(first, last_key, right=True), last_query[:, None] + 1)
    seeing = torch.nn.functional.pad((first <= last).cumsum(0), (1, 0))
    some = (begins < ends) & (seeing[ends] > seeing[begins])
    every = (first[last_query][:, None] <= keys) & (last[queries][:, None] >= last_key)
    kinds, row, column = _numbered(some, every, cut_by_intervals(rows, columns))
    q = _positions(row, length_q)[:, :, None]
    k = column[:, None, None] * TILE + torch.arange(TILE, device=first.device)
    return BlockMask(kinds, (first[q] <= k) & (k <= last[q]))


def tiles_of(length: int) -> int:
    return -(-length // TILE)


def _positions(tiles: Tensor, length: int) -> Tensor:
    """[n, TILE]: those of tiles; beyond the last the last."""
    return (tiles[:, None] * TILE + torch.arange(TILE, device=tiles.device)).clamp(max=length - 1)


def _numbered(some: Tensor, every: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The map of tiles of which some pairs see each other, or every one, and the row and the column of each of `count`
    bytes; of those that are not used the first."""
    cut = some & ~every
    number = cut.flatten().cumsum(0)
    kinds = torch.where(cut, number.view_as(cut), torch.where(every, WHOLE, HIDDEN)).int()
    tile = torch.arange(number.shape[0], device=cut.device)
    at = number.new_zeros(count + 1).scatter_(0, torch.where(cut.flatten(), number, 0), tile)[1:]
    return kinds[None, None], at // cut.shape[1], at % cut.shape[1]


# ------------------------------------------------------------------------------------------------ neighbourhoods


class Axis(NamedTuple):
    """Neighbours along one dim of a grid: of the tokens of a token's own remainder by the dilation, counted as
    neighbours, the `kernel` nearest, a window that is moved inwards at the ends; or if it is causal the last ones up to
    itself. The tokens of a group of `stride` share the window of the one in the middle; or if it is causal of the last.
    """

    size: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def limits(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each token the remainder, its place among those, and the first and the last place that it sees."""
        at = torch.arange(self.size, device=device, dtype=torch.int32)
        place, remainder = at // self.dilation, at % self.dilation
        final = (self.size - 1 - remainder) // self.dilation  # of the tokens of this remainder
        middle = self.stride - 1 if self.causal else self.stride // 2
        leader = torch.minimum(place // self.stride * self.stride + middle, final)
        if self.causal:
            return remainder, place, leader - self.kernel + 1, place
        first = torch.minimum((leader - self.kernel // 2).clamp(min=0), final - self.kernel + 1)
        return remainder, place, first, first + self.kernel - 1


class Grid(NamedTuple):
    """Tokens in rows of rows, and behind them `others`, keys that all of them see."""

    axes: tuple[Axis, ...]
    others: int = 0

    @classmethod
    def of(
        cls,
        space: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        causal: Sequence[bool],
        others: int = 0,
    ) -> Grid:
        return cls(tuple(map(Axis, space, kernel, stride, dilation, causal)), others)

    @property
    def tokens(self) -> int:
        n = 1
        for axis in self.axes:
            n = n * axis.size
        return n


def _strips(rows: int, columns: int) -> Iterator[range]:
    """Rows of about as many numbers as shall be made at once."""
    step = max(1, STRIP // max(1, columns))
    return (range(i, min(rows, i + step)) for i in range(0, rows, step))


def _seen(grid: Grid, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Whether some query of a tile sees some key of another, and whether each sees every one: [tiles, tiles of keys]"""
    n = grid.tokens
    rows, columns = tiles_of(n), tiles_of(n + grid.others)
    pairs = []
    along = []
    for axis in grid.axes:
        remainder, place, first, last = axis.limits(device)
        seen = (place >= first[:, None]) & (place <= last[:, None]) & (remainder == remainder[:, None])
        along.append(seen.float())
    tile = torch.arange(n, device=device) // TILE
    row = torch.arange(rows, device=device)
    for strip in _strips(rows, n + grid.others):
        of_row = row[strip.start : strip.stop, None]
        # 1 for each query of a tile; then how many of them see a key: at most 128, which every dtype has
        counts = (tile == of_row).float()
        queries = counts.sum(1, keepdim=True)
        counts = counts.view(-1, *(axis.size for axis in grid.axes))
        for seen in along:
            counts = torch.tensordot(counts, seen, dims=([1], [0]))
        counts = torch.cat((counts.flatten(1), queries.expand(-1, grid.others)), 1)
        counts = torch.nn.functional.pad(counts, (0, columns * TILE - counts.shape[1]))
        pairs.append(counts.view(-1, columns, TILE).sum(-1))
    of_tiles = [
        (size - torch.arange(count, device=device) * TILE).clamp(max=TILE)
        for size, count in ((n, rows), (n + grid.others, columns))
    ]
    found = torch.cat(pairs)
    return found > 0, found == of_tiles[0][:, None] * of_tiles[1]


@functools.lru_cache(maxsize=256)
def _counted(grid: Grid) -> tuple[Tensor, int]:
    """Which tiles the mask of a grid keeps, and how many it cuts."""
    with _disable_current_modes():
        some, every = _seen(grid, "cpu")
        return some, int((some & ~every).sum())


def cut_tiles(grid: Grid) -> int:
    """How many tiles the mask of a grid cuts."""
    return _counted(grid)[1]


def kept_tiles(grid: Grid) -> Tensor:
    """bool [tiles of queries, tiles of keys]: which are not hidden."""
    with _disable_current_modes():
        return _counted(grid)[0].clone()


def mask_of_grid(grid: Grid, device: torch.device | str = "cpu") -> BlockMask:
    """Who sees whom in a grid. Does not wait for the device."""
    kinds, row, column = _numbered(*_seen(grid, device), cut_tiles(grid))
    partial = torch.empty(len(row), TILE, TILE, dtype=torch.bool, device=device)
    limits = [axis.limits(device) for axis in grid.axes]
    for strip in _strips(len(row), TILE * TILE):
        some = slice(strip.start, strip.stop)
        q, k = _positions(row[some], grid.tokens), _positions(column[some], grid.tokens + grid.others)
        is_other, k = k >= grid.tokens, k.clamp(max=grid.tokens - 1)
        seen = None
        for axis, (remainder, place, first, last) in zip(reversed(grid.axes), reversed(limits)):
            own, theirs = (x % axis.size for x in (q, k))
            at, of = place[theirs][:, None], remainder[theirs][:, None]
            here = (at >= first[own][:, :, None]) & (at <= last[own][:, :, None])
            if axis.dilation > 1:
                here &= of == remainder[own][:, :, None]
            seen = here if seen is None else seen.logical_and_(here)
            q, k = q // axis.size, k // axis.size
        assert seen is not None
        partial[some] = seen.logical_or_(is_other[:, None]) if grid.others else seen
    return BlockMask(kinds, partial)
