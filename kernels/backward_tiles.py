# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton's compiler unpacks no tuples
"""A tile of the backward of attention: what it is loaded from, and its weights. Device code; see backward_kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from jvpgraph.kernels.tiles import LOG2E, additive, load_bias, load_parts, scores, zeros

__all__ = [
    "add_outer",
    "bias_tile_of",
    "load_keys",
    "load_queries",
    "masked_scores",
    "place_of_step",
    "rounding",
    "seeing_queries",
    "seen_keys",
    "visible_of",
    "weights_of",
]


@triton.jit
def load_queries(
    inputs,
    strides,
    at,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    WIDTHS: tl.constexpr,
    WIDTHS_V: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_Q_DOT: tl.constexpr,
    TANGENT: tl.constexpr,
):
    """The parts of q, of q_dot and of the gradients of o and o_dot, of the rows from at on."""
    q = load_parts(inputs[0], strides[0], at, HEAD_DIM, WIDTHS, ROWS)
    grad = load_parts(inputs[6], strides[6], at, HEAD_DIM_V, WIDTHS_V, ROWS)
    q_dot = q
    dot_grad = grad
    if HAS_Q_DOT:
        q_dot = load_parts(inputs[3], strides[3], at, HEAD_DIM, WIDTHS, ROWS)
    if TANGENT:
        dot_grad = load_parts(inputs[7], strides[7], at, HEAD_DIM_V, WIDTHS_V, ROWS)
    return q, q_dot, grad, dot_grad


@triton.jit
def load_keys(
    inputs,
    strides,
    at,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    WIDTHS: tl.constexpr,
    WIDTHS_V: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_K_DOT: tl.constexpr,
    HAS_V_DOT: tl.constexpr,
):
    """The parts of k, k_dot, v and v_dot, of the rows from at on."""
    k = load_parts(inputs[1], strides[1], at, HEAD_DIM, WIDTHS, ROWS)
    v = load_parts(inputs[2], strides[2], at, HEAD_DIM_V, WIDTHS_V, ROWS)
    k_dot = k
    v_dot = v
    if HAS_K_DOT:
        k_dot = load_parts(inputs[4], strides[4], at, HEAD_DIM, WIDTHS, ROWS)
    if HAS_V_DOT:
        v_dot = load_parts(inputs[5], strides[5], at, HEAD_DIM_V, WIDTHS_V, ROWS)
    return k, k_dot, v, v_dot


@triton.jit
def rounding(weights, parts):
    """What the weights lose when they are rounded as the parts are."""
    return weights - weights.to(parts[0].dtype).to(tl.float32)


@triton.jit
def add_outer(sums, column, row, dim, WIDTHS: tl.constexpr):
    """sums + column row', row in memory."""
    added = ()
    first = 0
    for i in tl.static_range(len(WIDTHS)):
        columns = first + tl.arange(0, WIDTHS[i])
        part = tl.load(row + columns, mask=columns < dim, other=0.0)
        added = added + (sums[i] + column[:, None] * part[None, :],)
        first = first + WIDTHS[i]
    return added


@triton.jit
def masked_scores(
    q,
    k,
    bias,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """The scores of a tile in units of log 2, with their bias."""
    s = scores(q, k, zeros(ROWS, COLUMNS), BY_KEY) * (scale * LOG2E)
    if BIAS == 1:
        s = tl.where(bias != 0, s, -float("inf"))
    elif BIAS == 2:
        s = s + additive(bias)
    return s


@triton.jit
def weights_of(
    of_queries,
    of_keys,
    bias,
    rows,
    visible,
    scale,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVE: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """(p, u, w, e) of a tile, [BLOCK_Q, BLOCK_K] or the transpose BY_KEY; u and w are p where scores have no tangent.

    of_queries and of_keys are those of load_queries and load_keys, rows is (lse, shift of e, shift of w, r, log2 l)
    and broadcasts, bias is a tile or None.
    """
    q, q_dot, o_grad, o_dot_grad = of_queries
    k, k_dot, v, v_dot = of_keys
    lse, e_shift, w_shift, r, log_l = rows
    HAS_Q_DOT: tl.constexpr = ACTIVE[0]
    HAS_K_DOT: tl.constexpr = ACTIVE[1]
    HAS_V_DOT: tl.constexpr = ACTIVE[2]
    ROWS: tl.constexpr = BLOCK_K if BY_KEY else BLOCK_Q
    COLUMNS: tl.constexpr = BLOCK_Q if BY_KEY else BLOCK_K
    s = masked_scores(q, k, bias, scale, ROWS, COLUMNS, BIAS, BY_KEY)
    s = s - lse
    if BIAS == 2:
        s = s - log_l
    p = tl.math.exp2(tl.where(visible, s, -float("inf")))
    e = scores(o_grad, v, zeros(ROWS, COLUMNS), BY_KEY)
    if HAS_V_DOT:
        e = scores(o_dot_grad, v_dot, e, BY_KEY)
    u = p
    w = p
    if HAS_Q_DOT or HAS_K_DOT:
        u = zeros(ROWS, COLUMNS)
        if HAS_Q_DOT:
            u = scores(q_dot, k, u, BY_KEY)
        if HAS_K_DOT:
            u = scores(q, k_dot, u, BY_KEY)
        u = u * scale - r
        w = scores(o_dot_grad, v, zeros(ROWS, COLUMNS), BY_KEY) + w_shift
        e += u * w
    return p, u, w, e + e_shift


@triton.jit
def bias_tile_of(
    bias,
    strides,
    at,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """The bias of a tile, [BLOCK_Q | 1, BLOCK_K] or the transpose BY_KEY; 0 without one. at as in load_bias."""
    if BIAS == 0:
        tile = 0
    else:
        tile = load_bias(bias, strides, at, BLOCK_Q, BLOCK_K, HAS_ROWS)
        if BY_KEY:
            tile = tl.trans(tile)
    return tile


@triton.jit
def visible_of(queries, keys, end_kv, left, right, LIMITS: tl.constexpr):
    """Which query sees which key, of positions that broadcast against each other."""
    HAS_LEFT: tl.constexpr = LIMITS[0]
    HAS_RIGHT: tl.constexpr = LIMITS[1]
    visible = keys < end_kv
    if HAS_RIGHT:
        visible = visible & (keys <= queries + right)
    if HAS_LEFT:
        visible = visible & (keys >= queries - left)
    return visible


@triton.jit
def place_of_step(walk, step, SIZE: tl.constexpr, TILED: tl.constexpr):
    """(first query or key, what the map holds) of a step through listed tiles of this size; else the step itself."""
    first = step
    kind = 0
    if TILED:
        tile = tl.load(walk[0] + step // SIZE)
        first = tile * SIZE + step % SIZE
        kind = tl.load(walk[1] + tile)
    return first, kind


@triton.jit
def seen_keys(first_row, length_kv, left, right, BLOCK_Q: tl.constexpr, LIMITS: tl.constexpr):
    """[start, end) of the keys that some query of a block sees."""
    HAS_LEFT: tl.constexpr = LIMITS[0]
    HAS_RIGHT: tl.constexpr = LIMITS[1]
    start = 0
    end = length_kv
    if HAS_RIGHT:
        end = tl.minimum(end, first_row + BLOCK_Q + right)
    if HAS_LEFT:
        start = tl.minimum(tl.maximum(first_row - left, 0), end)
    return start, end


@triton.jit
def seeing_queries(first_key, length_q, left, right, BLOCK_K: tl.constexpr, LIMITS: tl.constexpr):
    """[start, end) of the queries that see some key of a block."""
    HAS_LEFT: tl.constexpr = LIMITS[0]
    HAS_RIGHT: tl.constexpr = LIMITS[1]
    start = 0
    end = length_q
    if HAS_LEFT:
        end = tl.minimum(end, first_key + BLOCK_K + left)
    if HAS_RIGHT:
        start = tl.minimum(tl.maximum(first_key - right, 0), end)
    return start, end
