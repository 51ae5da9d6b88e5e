"""The ops that make block masks, on real tensors and on fakes.

Ops
    jvpgraph::block_map      (block_map, places): the tiles of a block mask from flex_attention's lists
    jvpgraph::interval_mask  (block_map, partial_blocks): query i sees the keys first[i] to last[i], both ascending
    jvpgraph::grid_mask      (block_map, partial_blocks): neighbourhoods in a grid of tokens
How many tiles are cut is data in the first. In the last it follows from sizes, by no formula that could be written in
symbols: where one of them is a symbol, it is taken for data in graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from jvpgraph.kernels.block_mask import list_blocks
from jvpgraph.kernels.schemas import LIBRARY
from jvpgraph.kernels.window_masks import (
    TILE,
    Grid,
    cut_by_intervals,
    cut_tiles,
    mask_of_grid,
    mask_of_intervals,
    tiles_of,
)

__all__: list[str] = []


def _new_size() -> Any:
    context = torch.library.get_ctx()
    with _sizes_may_be_data(context._shape_env):
        return context.new_dynamic_size()


@contextlib.contextmanager
def _sizes_may_be_data(shape_env: Any) -> Iterator[None]:
    """Inside, fakes may have sizes that depend on data, also where Dynamo was not asked for such ops: this one is ours,
    and comes after it."""
    before = shape_env.settings
    shape_env.settings = dataclasses.replace(before, allow_dynamic_output_shape_ops=True)
    try:
        yield
    finally:
        shape_env.settings = before


def _block_map_fake(
    count: Tensor,
    index: Tensor,
    full_count: Any,
    full_index: Any,
    batch: Any,
    heads: Any,
    rows: Any,
    columns: Any,
    all_whole: bool = False,
) -> tuple[Tensor, Tensor]:
    places: Any = 0
    if not all_whole:
        places = _new_size()
    empty = count.new_empty((batch, heads, rows, columns), dtype=torch.int32)
    return empty, count.new_empty((places, 4), dtype=torch.int64)


def _interval_mask_fake(first: Tensor, last: Tensor, length_kv: Any) -> tuple[Tensor, Tensor]:
    rows, columns = tiles_of(first.shape[0]), tiles_of(length_kv)
    return _empty(rows, columns, cut_by_intervals(rows, columns), first.device)


def _grid_mask(*args: Any) -> tuple[Tensor, Tensor]:
    *sizes, device = args
    return tuple(mask_of_grid(Grid.of(*sizes), device))  # type: ignore[return-value]


def _grid_mask_fake(*args: Any) -> tuple[Tensor, Tensor]:
    *sizes, device = args
    grid = Grid.of(*sizes)
    if any(isinstance(n, torch.SymInt) for n in (*itertools.chain(*grid.axes), grid.others)):
        count = _new_size()
    else:
        count = cut_tiles(grid)
    return _empty(tiles_of(grid.tokens), tiles_of(grid.tokens + grid.others), count, device)


def _empty(rows: Any, columns: Any, count: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    kinds = torch.empty((1, 1, rows, columns), dtype=torch.int32, device=device)
    return kinds, torch.empty((count, TILE, TILE), dtype=torch.bool, device=device)


FAKES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "block_map": _block_map_fake,
    "interval_mask": _interval_mask_fake,
    "grid_mask": _grid_mask_fake,
}
REAL: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "block_map": list_blocks,
    "interval_mask": lambda *args: tuple(mask_of_intervals(*args)),
    "grid_mask": _grid_mask,
}
for _name, _real in REAL.items():
    LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"jvpgraph::{_name}", FAKES[_name], lib=LIBRARY)
