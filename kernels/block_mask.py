"""Block-sparse masks: which tiles of queries and keys attention visits, and who sees whom in those that are cut.

A mask is a map of tiles and the bytes of some of them, so that memory and time follow the tiles that are kept: of
65,520 tokens that see all frames up to their own, 17 MB in place of 4.3 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = [
    "HIDDEN",
    "WHOLE",
    "BlockMask",
    "MaskMod",
    "as_block_mask",
    "list_blocks",
    "positions_of",
    "summary_of",
]

HIDDEN, WHOLE = 0, -1
# A dense boolean mask of as many pairs is looked through for tiles of SUMMARY queries and keys that it hides or shows
# whole; they are used if they are at least that share.
SUMMARY, PAIRS_TO_SUMMARIZE, SHARE_TO_USE = 128, 1 << 20, 0.25
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch, head, query, key: whether it is seen


class Lists(NamedTuple):
    """The tiles that each row of a block mask keeps, as kernels walk through them."""

    columns: Tensor  # int32 [B | 1, H | 1, rows, columns]: those to read no mask in, those to mask, the hidden ones
    counts: Tensor  # int32 [B | 1, H | 1, rows, 2]: how many are before the first to mask, and before the first hidden
    kinds: Tensor  # the map: of those to mask, WHOLE hang over the end
    bytes: Tensor  # uint8 [n, BQ, BK]

    def steps(self) -> tuple[int, int, int, int]:
        """From a batch entry, and from a head, to the next, in units of the rows of a head; rows; columns."""
        batch, heads, rows, columns = self.columns.shape
        return heads if batch > 1 else 0, 1 if heads > 1 else 0, rows, columns


class BlockMask(NamedTuple):
    """A mask in tiles of BQ queries and BK keys, counted from the first query and the first key.

    map: int32 [B | 1, H | 1, tiles of queries, tiles of keys]: HIDDEN, WHOLE (each query of the tile sees each key), or
        n from 1 on: as partial[n - 1] says.
    partial: bool [n, BQ, BK], True where a query sees a key. Its last dims are the size of a tile, also where n is 0.
        What lies beyond the last query or key does not matter.
    """

    map: Tensor
    partial: Tensor

    @property
    def tile(self) -> tuple[int, int]:
        """Queries and keys of a tile."""
        return self.partial.shape[1], self.partial.shape[2]

    def kept(self) -> float:
        """The share of tiles that are visited. Waits for the device."""
        return float((self.map != HIDDEN).float().mean())

    def lists(self, length_kv: int = 0) -> Lists:
        """For keys of this length, if it is asked which tiles hang over their end. Does not wait for the device."""
        kinds = self.map.contiguous()
        order = torch.where(kinds == HIDDEN, 2, kinds != WHOLE).to(torch.uint8)
        if length_kv % self.tile[1]:
            order[..., -1].clamp_(min=1)
        columns = order.argsort(dim=-1, stable=True).int()
        counts = torch.stack([(order < kind).sum(-1) for kind in (1, 2)], -1).int()
        return Lists(columns, counts, kinds, self.partial.contiguous().view(torch.uint8))

    def dense(self, length_q: int, length_kv: int) -> Tensor:
        """[B | 1, H | 1, Lq, Lkv], True where a query sees a key. Does not wait for the device."""
        seen = self.tiles_of(self.map)  # [B, H, nQ, nK, BQ, BK]
        return seen.transpose(3, 4).flatten(4).flatten(2, 3)[:, :, :length_q, :length_kv]

    def tiles_of(self, kinds: Tensor) -> Tensor:
        """The bytes of tiles of these kinds, values of the map: [..., BQ, BK]."""
        kinds = kinds[..., None, None]
        if not self.partial.shape[0]:
            return (kinds == WHOLE).expand(*kinds.shape[:-2], *self.tile)
        of_cut = self.partial[(kinds[..., 0, 0] - 1).clamp(min=0).long()]
        return torch.where(kinds > 0, of_cut, kinds == WHOLE)

    @classmethod
    def of(
        cls,
        mask_mod: MaskMod,
        length_q: int,
        length_kv: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
        tile: tuple[int, int] = (128, 128),
        device: Any = None,
    ) -> BlockMask:
        """That of a function of 0-dim indices (batch, head, query, key), as flex_attention's mask_mod: without ever
        making the dense mask.

        Args:
            batch, heads: None for a mask that is the same for all.
            tile: queries and keys of a tile. A hidden tile costs nothing; smaller ones follow a mask more closely.
        """
        rows, columns = (torch.arange(n, device=device, dtype=torch.int32) for n in (length_q, length_kv))
        which = [torch.arange(n or 1, device=device, dtype=torch.int32) for n in (batch, heads)]
        seen_by = _on_axes(mask_mod)
        return cls._of_strips((seen_by(*which, strip, columns) for strip in rows.split(tile[0])), tile)

    @classmethod
    def of_dense(cls, mask: Tensor, tile: tuple[int, int] = (128, 128)) -> BlockMask:
        """That of a boolean mask [B | 1, H | 1, Lq, Lkv], True where a query sees a key. Waits for the device."""
        return cls._of_strips(mask.split(tile[0], 2), tile)

    @classmethod
    def _of_strips(cls, strips: Iterable[Tensor], tile: tuple[int, int]) -> BlockMask:
        """That of rows of tiles, [B | 1, H | 1, rows, Lkv] each."""
        maps, partial, count = [], [], 0
        for strip in strips:
            kinds, cut = _tiled(strip, tile, count)
            maps.append(kinds)
            partial.append(cut)
            count += cut.shape[0]
        return cls(torch.cat(maps, 2), torch.cat(partial))

    @classmethod
    def of_flex(cls, flex: Any, batch: int, heads: int) -> BlockMask:
        """That of a BlockMask of torch.nn.attention.flex_attention, for as many batch entries and heads where it or its
        mask_mod tells them apart. Waits for the device."""
        tile = flex.BLOCK_SIZE
        rows, columns = (-(-length // size) for length, size in zip(flex.seq_lengths, tile))
        lists = (flex.kv_num_blocks, flex.kv_indices, flex.full_kv_num_blocks, flex.full_kv_indices)
        # its mask_mod is asked for each batch entry and head, whether or not its lists tell these apart
        asked = _asks_for(flex.mask_mod, flex.kv_num_blocks.device)
        batch, heads = (n if ask else own for n, own, ask in zip((batch, heads), flex.kv_num_blocks.shape, asked))
        map, places = list_blocks(*lists, batch, heads, rows, columns)
        seen_by = torch.vmap(_on_axes(flex.mask_mod, outer=0))
        partial = torch.zeros((len(places), *tile), dtype=torch.bool, device=map.device)
        for at in torch.arange(len(places)).split(max(1, (1 << 24) // (tile[0] * tile[1]))):
            some = slice(int(at[0]), int(at[-1]) + 1)
            b, h, q, k, inside = positions_of(places[some], *tile, *flex.seq_lengths)
            partial[some] = seen_by(b[:, 0, 0], h[:, 0, 0], q[:, :, 0], k[:, 0]) & inside
        return cls(map, partial)


def as_block_mask(mask: Any, batch: int, heads: int) -> BlockMask:
    """mask, or that of a BlockMask of flex_attention."""
    return mask if isinstance(mask, BlockMask) else BlockMask.of_flex(mask, batch, heads)


def _asks_for(mask_mod: MaskMod, device: torch.device) -> tuple[bool, bool]:
    """Whether a mask_mod depends on the batch entry, and on the head."""
    indices = (torch.zeros((), dtype=torch.int32, device=device) for _ in range(4))
    batch, head, *_ = make_fx(mask_mod)(*indices).graph.find_nodes(op="placeholder")
    return bool(batch.users), bool(head.users)


def _on_axes(mask_mod: MaskMod, outer: int = 2) -> Callable[..., Tensor]:
    """mask_mod on [Lq] queries and [Lkv] keys, and on [B] and [H] in front of them if outer is 2."""
    on = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    on = torch.vmap(on, in_dims=(None, None, 0, None))
    if outer:
        on = torch.vmap(on, in_dims=(None, 0, None, None))
        on = torch.vmap(on, in_dims=(0, None, None, None))
    return on


def _some_and_every(seen: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Whether some query of a row of tiles [B, H, rows, Lkv] sees some key of a tile, and whether each sees every key,
    [B, H, tiles]."""
    bits = seen.view(torch.uint8)  # in which amin takes a ninth of the time of all
    more = -seen.shape[3] % columns
    some, every = (
        torch.nn.functional.pad(of(bits, 2), (0, more), value=outside).unflatten(2, (-1, columns))
        for of, outside in ((torch.amax, 0), (torch.amin, 1))
    )
    return some.amax(-1).bool(), every.amin(-1).bool()


def summary_of(bias: Tensor | None) -> BlockMask | None:
    """Which tiles a dense boolean mask on a CPU hides or shows whole, without bytes; None where it is not worth it."""
    if bias is None or bias.dtype != torch.bool or bias.device.type != "cpu" or 1 in bias.shape[2:]:
        return None
    if bias.shape[2:].numel() < PAIRS_TO_SUMMARIZE:
        return None
    of_rows = zip(*(_some_and_every(strip, SUMMARY) for strip in bias.split(SUMMARY, 2)))
    some, every = (torch.stack(x, 2) for x in of_rows)  # [B, H, tiles of queries, tiles of keys]
    if (every | ~some).float().mean() < SHARE_TO_USE:
        return None
    kinds = torch.where(some, torch.where(every, WHOLE, 1), HIDDEN).int()
    return BlockMask(kinds, bias.new_empty(0, SUMMARY, SUMMARY))


def _tiled(seen: Tensor, tile: tuple[int, int], before: int) -> tuple[Tensor, Tensor]:
    """The map and the cut tiles of one row of tiles [B, H, rows, Lkv], of which `before` come before."""
    some, whole = _some_and_every(seen, tile[1])
    cut = some & ~whole
    kinds = torch.where(cut, cut.flatten().cumsum(0).view_as(cut) + before, -whole.int())
    missing = tile[0] - seen.shape[2], -seen.shape[3] % tile[1]
    padded = torch.nn.functional.pad(seen, (0, missing[1], 0, missing[0])) if any(missing) else seen
    return kinds.int().unsqueeze(2), padded.unflatten(3, (-1, tile[1])).transpose(2, 3)[cut]


def list_blocks(
    count: Tensor,
    index: Tensor,
    full_count: Tensor | None,
    full_index: Tensor | None,
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    all_whole: bool = False,
) -> tuple[Tensor, Tensor]:
    """The map of flex_attention's lists, and where the tiles that its mask_mod decides on are.

    Args:
        count, index: [B | 1, H | 1, rows], [B | 1, H | 1, rows, any]: the first `count` of `index` of each row of tiles
            are those on which mask_mod decides; all_whole: which it lets be whole.
        full_count, full_index: likewise of tiles that are whole.
        batch, heads: of the map; 1 for a map that is the same for all.
        rows, columns: of tiles. Lists may be of more.

    Returns:
        map as in BlockMask, places [n, 4]: batch entry, head, row and column of partial[0], partial[1], ...
    """

    def listed(count: Tensor, index: Tensor) -> Tensor:
        count, index = count[:, :, :rows, None], index[:, :, :rows]
        there = torch.arange(index.shape[-1], device=index.device) < count
        index = torch.where(there & (index < columns), index, columns).long()  # what is not listed may be anything
        found = index.new_zeros(*index.shape[:-1], columns + 1, dtype=torch.bool)
        return found.scatter_(-1, index, True)[..., :columns].expand(batch, heads, -1, -1)

    cut = listed(count, index)
    whole = torch.zeros_like(cut) if full_count is None or full_index is None else listed(full_count, full_index)
    if all_whole:
        whole, cut = whole | cut, torch.zeros_like(cut)
    cut = cut & ~whole
    places = cut.new_empty((0, 4), dtype=torch.int64) if all_whole else cut.nonzero().contiguous()
    kinds = torch.where(cut, cut.flatten().cumsum(0).view_as(cut), -whole.long())
    return kinds.int().contiguous(), places


def positions_of(places: Tensor, block_q: Any, block_k: Any, length_q: Any, length_kv: Any) -> tuple[Tensor, ...]:
    """Batch entry, head [n, 1, 1], queries [n, BQ, 1] and keys [n, 1, BK] of tiles, int32; those beyond the last one
    are the last one, for whatever looks them up. And which pairs are not beyond it, bool [n, BQ, BK]."""
    b, h, row, column = places.int().unbind(1)
    q = row[:, None] * block_q + torch.arange(block_q, device=places.device, dtype=torch.int32)
    k = column[:, None] * block_k + torch.arange(block_k, device=places.device, dtype=torch.int32)
    q, k = q[:, :, None], k[:, None, :]
    inside = (q < length_q) & (k < length_kv)
    return b[:, None, None], h[:, None, None], q.clamp(max=length_q - 1), k.clamp(max=length_kv - 1), inside
