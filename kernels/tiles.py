# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton's compiler unpacks no tuples
"""What the Triton kernels do with tiles: rows in parts of the head dim, masks, products. Device code.

A head dim is cut into one part of 2^n columns or two, see blocks.parts_of_head_dim: WIDTHS. What has parts is a tuple
of them, which loops go over when they are compiled. Strides are (batch, head, row), those of a mask (batch, head, row,
key).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = [
    "ADDITIVE_BIAS",
    "BIAS_DOT_STRIDES",
    "BIAS_STRIDES",
    "BOOLEAN_BIAS",
    "LEAST",
    "LN2",
    "LOG2E",
    "NO_BIAS",
    "TILE_STEPS",
    "add_product",
    "additive",
    "base_of",
    "listed_tiles",
    "load_bias",
    "load_part",
    "load_parts",
    "load_tile",
    "scores",
    "store_parts",
    "zero_parts",
    "zeros",
]

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
LEAST = tl.constexpr(1e-30)  # what keys that weigh less count as, next to those seen before, where one divides by it
MOST_NEGATIVE = tl.constexpr(-2.35e38)  # times LOG2E it is finite

NO_BIAS, BOOLEAN_BIAS, ADDITIVE_BIAS = 0, 1, 2
# Arguments of their own: those of a tuple cannot be kept from specialising, and these change with the lengths.
BIAS_STRIDES = ["bias_batch", "bias_head", "bias_row", "bias_key"]
TILE_STEPS = ["tiles_batch", "tiles_head", "tiles_rows", "tiles_columns"]
BIAS_DOT_STRIDES = ["bias_dot_batch", "bias_dot_head", "bias_dot_row", "bias_dot_key"]


@triton.jit
def base_of(source, strides, batch, head):
    """Where the rows of a head begin."""
    return source + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _load_rows(
    source,
    at,
    stride,
    dim,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    CHECK: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """[ROWS, WIDTH] of source at (batch, head, row, column, end); zero from row `end` on if CHECK, and from
    column `dim` on if PADDED.

    source is a descriptor of [B, H, L, D], or a pointer to one head. A descriptor knows the end of the tensor only:
    with CLEAR, CHECK zeroes those that follow `end` before it.
    """
    batch, head, row, column, end = at
    if BY_DESCRIPTOR:
        loaded = source.load([batch, head, row, column]).reshape([ROWS, WIDTH])
        if CHECK and CLEAR:
            loaded = tl.where((row + tl.arange(0, ROWS) < end)[:, None], loaded, 0.0)
        return loaded
    else:
        rows = tl.arange(0, ROWS)
        columns = column + tl.arange(0, WIDTH)
        # an int64 address for the tile, int32 offsets inside it: half the registers
        address = source + tl.cast(row, tl.int64) * stride
        address = address + (rows[:, None] * stride + columns[None, :])
        if PADDED:
            if CHECK:
                return tl.load(address, mask=(row + rows < end)[:, None] & (columns < dim)[None, :], other=0.0)
            else:
                return tl.load(address, mask=(columns < dim)[None, :], other=0.0)
        elif CHECK:
            return tl.load(address, mask=(row + rows < end)[:, None], other=0.0)
        else:
            return tl.load(address)


@triton.jit
def load_part(
    sources,
    at,
    stride,
    dim,
    PART: tl.constexpr,
    WIDTHS: tl.constexpr,
    SHARES: tl.constexpr,
    ROWS: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    CHECK: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """One part of the rows of sources, one source for each part, as _load_rows. SHARES programs share the columns, and
    at = (batch, head, row, first column of this program, end)."""
    batch, head, row, column, end = at
    BEFORE: tl.constexpr = 0 if PART == 0 else WIDTHS[0]
    PADDED: tl.constexpr = SHARES * (BEFORE + WIDTHS[PART]) > dim
    if PART > 0:
        column = BEFORE  # the columns of two parts are not shared
    place = (batch, head, row, column, end)
    return _load_rows(sources[PART], place, stride, dim, WIDTHS[PART], PADDED, ROWS, BY_DESCRIPTOR, CHECK, CLEAR)


@triton.jit
def load_parts(source, strides, at, dim, WIDTHS: tl.constexpr, ROWS: tl.constexpr):
    """The rows of a tensor from at = (batch, head, row, end) on, in parts; zero from `end` and from column `dim` on."""
    base = base_of(source, strides, at[0], at[1])
    place = (0, 0, at[2], 0, at[3])
    parts = ()
    for i in tl.static_range(len(WIDTHS)):
        parts = parts + (load_part((base, base), place, strides[2], dim, i, WIDTHS, 1, ROWS, False, True, False),)
    return parts


@triton.jit
def _store_rows(target, value, at, stride, dim, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row, column, end = at
    rows = tl.arange(0, ROWS)
    columns = column + tl.arange(0, WIDTH)
    address = target + tl.cast(row, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    mask = (row + rows < end)[:, None] & (columns < dim)[None, :]
    tl.store(address, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def store_parts(target, strides, at, column, dim, parts, factor, WIDTHS: tl.constexpr, ROWS: tl.constexpr):
    """parts times the factor, to the rows from at = (batch, head, row, end) on, from a column on."""
    base = base_of(target, strides, at[0], at[1])
    for i in tl.static_range(len(WIDTHS)):
        _store_rows(base, parts[i] * factor, (at[2], column, at[3]), strides[2], dim, WIDTHS[i], ROWS)
        column = column + WIDTHS[i]


@triton.jit
def load_bias(
    source,
    strides,
    at,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """[BLOCK_Q, BLOCK_K], or [1, BLOCK_K] where all queries share it; zero outside. at: (row, Lq, key, Lkv)."""
    first_row, length_q, first_key, length_kv = at
    keys = tl.arange(0, BLOCK_K)
    address = source + tl.cast(first_key, tl.int64) * strides[3]
    mask = (first_key + keys < length_kv)[None, :]
    if HAS_ROWS:
        rows = tl.arange(0, BLOCK_Q)
        address = address + tl.cast(first_row, tl.int64) * strides[2]
        address = address + (rows[:, None] * strides[2] + keys[None, :] * strides[3])
        mask = mask & (first_row + rows < length_q)[:, None]
    else:
        address = address + keys[None, :] * strides[3]
    return tl.load(address, mask=mask, other=0)


@triton.jit
def listed_tiles(tiles, steps, batch, head, row):
    """(where the tiles of a row are listed, where the kinds of its tiles are, how many of the listed ones need no mask,
    how many there are) of a block mask; see block_mask.Lists."""
    at = (batch * steps[0] + head * steps[1]).to(tl.int64) * steps[2] + row
    return (
        tiles[0] + at * steps[3],
        tiles[2] + at * steps[3],
        tl.load(tiles[1] + 2 * at),
        tl.load(tiles[1] + 2 * at + 1),
    )


@triton.jit
def load_tile(bytes, at, TILE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_Q, BLOCK_K] of what a block mask says, 1 where a query sees a key. at: (what the map holds, row, key),
    which count on from one tile to the next."""
    kind, row, key = at
    address = bytes + (kind - 1).to(tl.int64) * (TILE[0] * TILE[1]) + row % TILE[0] * TILE[1] + key % TILE[1]
    rows = tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    is_cut = keys < tl.where(kind > 0, BLOCK_K, 0)
    return tl.load(address + (rows[:, None] * TILE[1] + keys[None, :]), mask=is_cut[None, :], other=1)


@triton.jit
def additive(bias):
    """An additive bias in units of log 2. The most negative finite number, with which models mask, stays finite: a row
    that has nothing else attends to all keys alike, and only -inf hides a key."""
    bias = bias.to(tl.float32)
    held = (bias < MOST_NEGATIVE) & (bias != -float("inf"))  # tl.maximum would drop a NaN
    return tl.where(held, MOST_NEGATIVE, bias) * LOG2E


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def zero_parts(WIDTHS: tl.constexpr, ROWS: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(WIDTHS)):
        parts = parts + (zeros(ROWS, WIDTHS[i]),)
    return parts


@triton.jit
def scores(of_query, of_key, start, BY_KEY: tl.constexpr):
    """start + the products of the rows of queries with those of keys, [queries, keys], or the transpose BY_KEY."""
    for i in tl.static_range(len(of_query)):
        if BY_KEY:
            start = tl.dot(of_key[i], tl.trans(of_query[i]), start)
        else:
            start = tl.dot(of_query[i], tl.trans(of_key[i]), start)
    return start


@triton.jit
def add_product(sums, weights, parts):
    """sums + weights parts, with the weights rounded as the parts are."""
    weights = weights.to(parts[0].dtype)
    added = ()
    for i in tl.static_range(len(parts)):
        added = added + (tl.dot(weights, parts[i], sums[i]),)
    return added
