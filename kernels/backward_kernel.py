# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton's compiler unpacks no tuples
"""The backward of attention, and of its tangent, in Triton: three sweeps over pairs of query and key blocks.

Math
    forward, see attention_kernel: s, p, o, lse, and with tangents s_dot, o_dot, lse_dot = r
    of <do, o> + <dlse, lse> + <G, o_dot> + <dr, lse_dot>, with u = s_dot - r, row by row:
        w = G v' - mean(G v') + dr
        e = do v' + G v_dot' + u * w - mean(do v' + G v_dot' + u * G v') + dlse
        ds = p * e,  ds_dot = p * w
        dv = p' do + (p * u)' G,  dv_dot = p' G
        dq = scale (ds k + ds_dot k_dot),  dq_dot = scale ds_dot k
        dk = scale (ds' q + ds_dot' q_dot),  dk_dot = scale ds_dot' q
    where mean is that under p. backward_blocked derives it. Without G and dr it is the plain backward, u = w = 0.
Streaming form
    row_sums_kernel    the means, one program per block of queries, over keys
    queries_kernel     dq and dq_dot, likewise
    keys_kernel        dk, dk_dot, dv and dv_dot, one program per block of keys, over the queries of all its heads
    No sum crosses programs, so a result does not depend on their order. Tiles are computed twice or thrice instead:
    27 products of a tile with D columns where everything moves; 7 where nothing does, for the mean of do v' is
    then rowsum(do * o).
Shapes
    As in attention_kernel. The row sums are float32 [5, B, H, Lq]: lse in units of log 2 and +inf where a row sees no
    key, which makes p = 0; the shifts of e and of w; r; with an additive bias log2 l, and m in place of lse. centre
    is the mean over keys of k and of k_dot, float32 [2, B, Hkv, Dqk].
    WIDTHS and WIDTHS_V cut the head dims into parts of 2^n columns, which a tile needs.
Precision
    Sums in float32; p, p * u, ds and ds_dot are rounded to the dtype of the inputs for their products. With tangents
    the means are swept anew, since mean(do v') = rowsum(do * o) would take over what o was rounded by; and what
    rounding adds to the rows of ds and ds_dot, which sum up to dlse and dr, is multiplied by the centre and taken back.
    Both matter where keys share a tangent. A large finite bias that hides all keys of a row leaves lse = m + log l
    without the digits of l, so that with an additive bias the sums sweep takes m and l anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from jvpgraph.kernels.attention_kernel import BIAS_STRIDES, LOG2E, _additive, _base, _load_bias, _load_rows, _store_rows

__all__ = ["keys_kernel", "queries_kernel"]


@triton.jit
def _load_parts(source, strides, at, dim, WIDTHS: tl.constexpr, ROWS: tl.constexpr):
    """The rows of source from at = (batch, head, row, end) on, in parts; zero behind `end` and column `dim`."""
    base = _base(source, strides, at[0], at[1])
    parts = ()
    first = 0
    for i in tl.static_range(len(WIDTHS)):
        parts = parts + (
            _load_rows(base, (0, 0, at[2], first, at[3]), strides[2], dim, WIDTHS[i], True, ROWS, False, True),
        )
        first = first + WIDTHS[i]
    return parts


@triton.jit
def _store_parts(target, strides, at, dim, parts, factor, WIDTHS: tl.constexpr, ROWS: tl.constexpr):
    base = _base(target, strides, at[0], at[1])
    first = 0
    for i in tl.static_range(len(WIDTHS)):
        _store_rows(base, parts[i] * factor, at[2], first, at[3], strides[2], dim, WIDTHS[i], ROWS)
        first = first + WIDTHS[i]


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def _zero_parts(WIDTHS: tl.constexpr, ROWS: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(WIDTHS)):
        parts = parts + (_zeros(ROWS, WIDTHS[i]),)
    return parts


@triton.jit
def _scores(of_query, of_key, start, BY_KEY: tl.constexpr):
    """start + the products of the rows of queries with those of keys, [queries, keys], or the transpose BY_KEY."""
    for i in tl.static_range(len(of_query)):
        if BY_KEY:
            start = tl.dot(of_key[i], tl.trans(of_query[i]), start)
        else:
            start = tl.dot(of_query[i], tl.trans(of_key[i]), start)
    return start


@triton.jit
def _add_product(sums, weights, parts):
    """sums + weights parts, with the weights rounded as the parts are."""
    weights = weights.to(parts[0].dtype)
    added = ()
    for i in tl.static_range(len(parts)):
        added = added + (tl.dot(weights, parts[i], sums[i]),)
    return added


@triton.jit
def _rounding(weights, parts):
    """What the weights lose when they are rounded as the parts are."""
    return weights - weights.to(parts[0].dtype).to(tl.float32)


@triton.jit
def _add_outer(sums, column, row, dim, WIDTHS: tl.constexpr):
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
def _masked_scores(
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
    s = _scores(q, k, _zeros(ROWS, COLUMNS), BY_KEY) * (scale * LOG2E)
    if BIAS == 1:
        s = tl.where(bias != 0, s, -float("inf"))
    elif BIAS == 2:
        s = s + _additive(bias)
    return s


@triton.jit
def _weights(
    q,
    k,
    v,
    q_dot,
    k_dot,
    v_dot,
    o_grad,
    o_dot_grad,
    bias,
    rows,
    visible,
    scale,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_Q_DOT: tl.constexpr,
    HAS_K_DOT: tl.constexpr,
    HAS_V_DOT: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """(p, u, w, e) of a tile, [BLOCK_Q, BLOCK_K] or the transpose BY_KEY; u and w are p where scores do not move.

    The tensors are tuples of parts, rows is (lse, shift of e, shift of w, r, log2 l) and broadcasts, bias is a tile or
    None.
    """
    lse, e_shift, w_shift, r, log_l = rows
    ROWS: tl.constexpr = BLOCK_K if BY_KEY else BLOCK_Q
    COLUMNS: tl.constexpr = BLOCK_Q if BY_KEY else BLOCK_K
    s = _masked_scores(q, k, bias, scale, ROWS, COLUMNS, BIAS, BY_KEY)
    s = s - lse
    if BIAS == 2:
        s = s - log_l
    p = tl.math.exp2(tl.where(visible, s, -float("inf")))
    e = _scores(o_grad, v, _zeros(ROWS, COLUMNS), BY_KEY)
    if HAS_V_DOT:
        e = _scores(o_dot_grad, v_dot, e, BY_KEY)
    u = p
    w = p
    if HAS_Q_DOT or HAS_K_DOT:
        u = _zeros(ROWS, COLUMNS)
        if HAS_Q_DOT:
            u = _scores(q_dot, k, u, BY_KEY)
        if HAS_K_DOT:
            u = _scores(q, k_dot, u, BY_KEY)
        u = u * scale - r
        w = _scores(o_dot_grad, v, _zeros(ROWS, COLUMNS), BY_KEY) + w_shift
        e += u * w
    return p, u, w, e + e_shift


@triton.jit
def _bias_tile(
    bias,
    strides,
    at,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """The bias of a tile, [BLOCK_Q | 1, BLOCK_K] or the transpose BY_KEY; 0 without one. at as in _load_bias."""
    if BIAS == 0:
        tile = 0
    else:
        tile = _load_bias(bias, strides, at, BLOCK_Q, BLOCK_K, HAS_ROWS)
        if BY_KEY:
            tile = tl.trans(tile)
    return tile


@triton.jit
def _visible(queries, keys, end_kv, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which query sees which key, of positions that broadcast against each other."""
    visible = keys < end_kv
    if HAS_RIGHT:
        visible = visible & (keys <= queries + right)
    if HAS_LEFT:
        visible = visible & (keys >= queries - left)
    return visible


@triton.jit
def _seen_keys(
    first_row, length_kv, left, right, BLOCK_Q: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """[start, end) of the keys that some query of a block sees."""
    start = 0
    end = length_kv
    if HAS_RIGHT:
        end = tl.minimum(end, first_row + BLOCK_Q + right)
    if HAS_LEFT:
        start = tl.minimum(tl.maximum(first_row - left, 0), end)
    return start, end


@triton.jit
def _seeing_queries(
    first_key, length_q, left, right, BLOCK_K: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """[start, end) of the queries that see some key of a block."""
    start = 0
    end = length_q
    if HAS_LEFT:
        end = tl.minimum(end, first_key + BLOCK_K + left)
    if HAS_RIGHT:
        start = tl.minimum(tl.maximum(first_key - right, 0), end)
    return start, end


@triton.jit(
    do_not_specialize=["heads", "group", "length_q", "length_kv", "left", "right"],
    do_not_specialize_on_alignment=BIAS_STRIDES,
)
def queries_kernel(
    q,
    k,
    v,
    q_dot,
    k_dot,
    v_dot,
    o_grad,
    o_dot_grad,
    bias,
    sums,
    o,
    centre,
    dq,
    dq_dot,
    q_strides,
    k_strides,
    v_strides,
    q_dot_strides,
    k_dot_strides,
    v_dot_strides,
    o_grad_strides,
    o_dot_grad_strides,
    bias_batch,
    bias_head,
    bias_row,
    bias_key,
    o_strides,
    dq_strides,
    dq_dot_strides,
    scale,
    heads,
    group,
    length_q,
    length_kv,
    left,
    right,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    WIDTHS: tl.constexpr,
    WIDTHS_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_Q_DOT: tl.constexpr,
    HAS_K_DOT: tl.constexpr,
    HAS_V_DOT: tl.constexpr,
    MOVES: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_HAS_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """One block of queries of one head. With SUMS its row sums: in come dlse, dr and r in the fields 1 to 3, out go the
    shifts of e and of w, an r that is the mean of s_dot to float32, and m and log2 l. Else dq and dq_dot."""
    bias_strides = (bias_batch, bias_head, bias_row, bias_key)
    S_MOVES: tl.constexpr = HAS_Q_DOT or HAS_K_DOT
    tiles = tl.cdiv(length_q, BLOCK_Q)
    first_row = (tl.program_id(0) % tiles) * BLOCK_Q
    batch_head = tl.program_id(0) // tiles
    batch = batch_head // heads
    head = batch_head % heads
    head_kv = head // group
    queries = first_row + tl.arange(0, BLOCK_Q)
    inside = queries < length_q
    sums += batch_head.to(tl.int64) * length_q + queries
    size = (tl.num_programs(0) // tiles).to(tl.int64) * length_q  # of a field

    queries_at = (batch, head, first_row, length_q)
    q_parts = _load_parts(q, q_strides, queries_at, HEAD_DIM, WIDTHS, BLOCK_Q)
    grad_parts = _load_parts(o_grad, o_grad_strides, queries_at, HEAD_DIM_V, WIDTHS_V, BLOCK_Q)
    q_dot_parts = q_parts
    dot_grad_parts = grad_parts
    if HAS_Q_DOT:
        q_dot_parts = _load_parts(q_dot, q_dot_strides, queries_at, HEAD_DIM, WIDTHS, BLOCK_Q)
    if MOVES:
        dot_grad_parts = _load_parts(o_dot_grad, o_dot_grad_strides, queries_at, HEAD_DIM_V, WIDTHS_V, BLOCK_Q)
    if BIAS != 0:
        bias = _base(bias, bias_strides, batch, head)

    lse = tl.load(sums, mask=inside, other=float("inf"))
    e_shift = tl.zeros([BLOCK_Q], tl.float32)
    w_shift = tl.zeros([BLOCK_Q], tl.float32)
    r = tl.zeros([BLOCK_Q], tl.float32)
    if MOVES:
        r = tl.load(sums + 3 * size, mask=inside, other=0.0)
    if not SUMS:
        e_shift = tl.load(sums + size, mask=inside, other=0.0)
        if MOVES:
            w_shift = tl.load(sums + 2 * size, mask=inside, other=0.0)
    log_l = e_shift
    start, end = _seen_keys(first_row, length_kv, left, right, BLOCK_Q, HAS_LEFT, HAS_RIGHT)
    if BIAS == 2:
        if SUMS:
            lse = tl.full([BLOCK_Q], -float("inf"), tl.float32)
            l = tl.zeros([BLOCK_Q], tl.float32)
            for first_key in tl.range(start, end, BLOCK_K, num_stages=STAGES):
                keys_at = (batch, head_kv, first_key, length_kv)
                k_parts = _load_parts(k, k_strides, keys_at, HEAD_DIM, WIDTHS, BLOCK_K)
                at = (first_row, length_q, first_key, length_kv)
                bias_tile = _bias_tile(bias, bias_strides, at, BLOCK_Q, BLOCK_K, BIAS_HAS_ROWS, BIAS, False)
                keys = first_key + tl.arange(0, BLOCK_K)
                visible = _visible(queries[:, None], keys[None, :], length_kv, left, right, HAS_LEFT, HAS_RIGHT)
                s = _masked_scores(q_parts, k_parts, bias_tile, scale, BLOCK_Q, BLOCK_K, BIAS, False)
                s = tl.where(visible, s, -float("inf"))
                m = tl.maximum(lse, tl.max(s, 1))
                base = tl.where(m == -float("inf"), 0.0, m)
                l = l * tl.math.exp2(lse - base) + tl.sum(tl.math.exp2(s - base[:, None]), 1)
                lse = m
            seen = lse != -float("inf")
            lse = tl.where(seen, lse, float("inf"))
            log_l = tl.math.log2(tl.where(seen, l, 1.0))
            tl.store(sums, lse, mask=inside)
            tl.store(sums + 4 * size, log_l, mask=inside)
        else:
            log_l = tl.load(sums + 4 * size, mask=inside, other=0.0)
    rows = (lse[:, None], e_shift[:, None], w_shift[:, None], r[:, None], log_l[:, None])

    # means under p, or what rounding took from the rows of ds and ds_dot
    total_u = tl.zeros([BLOCK_Q], tl.float32)
    total_w = tl.zeros([BLOCK_Q], tl.float32)
    total_e = tl.zeros([BLOCK_Q], tl.float32)
    dq_parts = _zero_parts(WIDTHS, BLOCK_Q)
    dq_dot_parts = dq_parts
    if SUMS and not MOVES:
        end = start
        o_parts = _load_parts(o, o_strides, queries_at, HEAD_DIM_V, WIDTHS_V, BLOCK_Q)
        for i in tl.static_range(len(WIDTHS_V)):
            total_e += tl.sum(grad_parts[i].to(tl.float32) * o_parts[i].to(tl.float32), 1)
    for first_key in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        keys_at = (batch, head_kv, first_key, length_kv)
        k_parts = _load_parts(k, k_strides, keys_at, HEAD_DIM, WIDTHS, BLOCK_K)
        v_parts = _load_parts(v, v_strides, keys_at, HEAD_DIM_V, WIDTHS_V, BLOCK_K)
        k_dot_parts = k_parts
        v_dot_parts = v_parts
        if HAS_K_DOT:
            k_dot_parts = _load_parts(k_dot, k_dot_strides, keys_at, HEAD_DIM, WIDTHS, BLOCK_K)
        if HAS_V_DOT:
            v_dot_parts = _load_parts(v_dot, v_dot_strides, keys_at, HEAD_DIM_V, WIDTHS_V, BLOCK_K)
        at = (first_row, length_q, first_key, length_kv)
        bias_tile = _bias_tile(bias, bias_strides, at, BLOCK_Q, BLOCK_K, BIAS_HAS_ROWS, BIAS, False)
        keys = first_key + tl.arange(0, BLOCK_K)
        visible = _visible(queries[:, None], keys[None, :], length_kv, left, right, HAS_LEFT, HAS_RIGHT)
        p, u, w, e = _weights(
            q_parts,
            k_parts,
            v_parts,
            q_dot_parts,
            k_dot_parts,
            v_dot_parts,
            grad_parts,
            dot_grad_parts,
            bias_tile,
            rows,
            visible,
            scale,
            BLOCK_Q,
            BLOCK_K,
            BIAS,
            HAS_Q_DOT,
            HAS_K_DOT,
            HAS_V_DOT,
            False,
        )
        if SUMS:
            total_e += tl.sum(p * e, 1)
            if S_MOVES:
                total_u += tl.sum(p * u, 1)
                total_w += tl.sum(p * w, 1)
        else:
            ds = p * e
            dq_parts = _add_product(dq_parts, ds, k_parts)
            if MOVES:
                total_e += tl.sum(_rounding(ds, k_parts), 1)
            if S_MOVES:
                ds_dot = p * w
                total_w += tl.sum(_rounding(ds_dot, k_parts), 1)
                if HAS_K_DOT:
                    dq_parts = _add_product(dq_parts, ds_dot, k_dot_parts)
                if HAS_Q_DOT:
                    dq_dot_parts = _add_product(dq_dot_parts, ds_dot, k_parts)

    if SUMS:
        # e was taken with the r that came in: u * w of u - mean(u) has the mean of u * w less mean(u) mean(w)
        dlse = tl.load(sums + size, mask=inside, other=0.0)
        tl.store(sums + size, dlse - (total_e - total_u * total_w), mask=inside)
        if MOVES:
            dr = tl.load(sums + 2 * size, mask=inside, other=0.0)
            tl.store(sums + 2 * size, dr - total_w, mask=inside)
            tl.store(sums + 3 * size, r + total_u, mask=inside)
    else:
        if MOVES:
            centre += (batch * (heads // group) + head_kv).to(tl.int64) * HEAD_DIM
            centre_dot = centre + (size // length_q // group) * HEAD_DIM
            dq_parts = _add_outer(dq_parts, total_e, centre, HEAD_DIM, WIDTHS)
            if HAS_K_DOT:
                dq_parts = _add_outer(dq_parts, total_w, centre_dot, HEAD_DIM, WIDTHS)
            if HAS_Q_DOT:
                dq_dot_parts = _add_outer(dq_dot_parts, total_w, centre, HEAD_DIM, WIDTHS)
        _store_parts(dq, dq_strides, queries_at, HEAD_DIM, dq_parts, scale, WIDTHS, BLOCK_Q)
        if HAS_Q_DOT:
            _store_parts(dq_dot, dq_dot_strides, queries_at, HEAD_DIM, dq_dot_parts, scale, WIDTHS, BLOCK_Q)


@triton.jit(
    do_not_specialize=["heads", "group", "length_q", "length_kv", "left", "right"],
    do_not_specialize_on_alignment=BIAS_STRIDES,
)
def keys_kernel(
    q,
    k,
    v,
    q_dot,
    k_dot,
    v_dot,
    o_grad,
    o_dot_grad,
    bias,
    sums,
    dk,
    dv,
    dk_dot,
    dv_dot,
    q_strides,
    k_strides,
    v_strides,
    q_dot_strides,
    k_dot_strides,
    v_dot_strides,
    o_grad_strides,
    o_dot_grad_strides,
    bias_batch,
    bias_head,
    bias_row,
    bias_key,
    dk_strides,
    dv_strides,
    dk_dot_strides,
    dv_dot_strides,
    scale,
    heads,
    group,
    length_q,
    length_kv,
    left,
    right,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    WIDTHS: tl.constexpr,
    WIDTHS_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_Q_DOT: tl.constexpr,
    HAS_K_DOT: tl.constexpr,
    HAS_V_DOT: tl.constexpr,
    MOVES: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_HAS_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
):
    """dk, dv, dk_dot and dv_dot of one block of keys of one head, from the queries of all heads that share it."""
    bias_strides = (bias_batch, bias_head, bias_row, bias_key)
    S_MOVES: tl.constexpr = HAS_Q_DOT or HAS_K_DOT
    tiles = tl.cdiv(length_kv, BLOCK_K)
    first_key = (tl.program_id(0) % tiles) * BLOCK_K
    batch_head = tl.program_id(0) // tiles
    kv_heads = heads // group
    batch = batch_head // kv_heads
    head_kv = batch_head % kv_heads
    keys = first_key + tl.arange(0, BLOCK_K)
    size = (tl.num_programs(0) // tiles * group).to(tl.int64) * length_q  # of a field

    keys_at = (batch, head_kv, first_key, length_kv)
    k_parts = _load_parts(k, k_strides, keys_at, HEAD_DIM, WIDTHS, BLOCK_K)
    v_parts = _load_parts(v, v_strides, keys_at, HEAD_DIM_V, WIDTHS_V, BLOCK_K)
    k_dot_parts = k_parts
    v_dot_parts = v_parts
    if HAS_K_DOT:
        k_dot_parts = _load_parts(k_dot, k_dot_strides, keys_at, HEAD_DIM, WIDTHS, BLOCK_K)
    if HAS_V_DOT:
        v_dot_parts = _load_parts(v_dot, v_dot_strides, keys_at, HEAD_DIM_V, WIDTHS_V, BLOCK_K)

    dk_parts = _zero_parts(WIDTHS, BLOCK_K)
    dv_parts = _zero_parts(WIDTHS_V, BLOCK_K)
    dk_dot_parts = dk_parts
    dv_dot_parts = dv_parts
    start, end = _seeing_queries(first_key, length_q, left, right, BLOCK_K, HAS_LEFT, HAS_RIGHT)
    for member in range(group):
        head = head_kv * group + member
        bias_base = bias
        if BIAS != 0:
            bias_base = _base(bias, bias_strides, batch, head)
        own = sums + (batch * heads + head).to(tl.int64) * length_q
        for first_row in tl.range(start, end, BLOCK_Q, num_stages=STAGES):
            queries_at = (batch, head, first_row, length_q)
            q_parts = _load_parts(q, q_strides, queries_at, HEAD_DIM, WIDTHS, BLOCK_Q)
            grad_parts = _load_parts(o_grad, o_grad_strides, queries_at, HEAD_DIM_V, WIDTHS_V, BLOCK_Q)
            q_dot_parts = q_parts
            dot_grad_parts = grad_parts
            if HAS_Q_DOT:
                q_dot_parts = _load_parts(q_dot, q_dot_strides, queries_at, HEAD_DIM, WIDTHS, BLOCK_Q)
            if MOVES:
                dot_grad_parts = _load_parts(o_dot_grad, o_dot_grad_strides, queries_at, HEAD_DIM_V, WIDTHS_V, BLOCK_Q)
            queries = first_row + tl.arange(0, BLOCK_Q)
            inside = queries < length_q
            lse = tl.load(own + queries, mask=inside, other=float("inf"))
            e_shift = tl.load(own + size + queries, mask=inside, other=0.0)
            w_shift = e_shift
            r = e_shift
            if S_MOVES:
                w_shift = tl.load(own + 2 * size + queries, mask=inside, other=0.0)
                r = tl.load(own + 3 * size + queries, mask=inside, other=0.0)
            log_l = e_shift
            if BIAS == 2:
                log_l = tl.load(own + 4 * size + queries, mask=inside, other=0.0)
            rows = (lse[None, :], e_shift[None, :], w_shift[None, :], r[None, :], log_l[None, :])
            at = (first_row, length_q, first_key, length_kv)
            bias_tile = _bias_tile(bias_base, bias_strides, at, BLOCK_Q, BLOCK_K, BIAS_HAS_ROWS, BIAS, True)
            visible = _visible(queries[None, :], keys[:, None], length_kv, left, right, HAS_LEFT, HAS_RIGHT)
            p, u, w, e = _weights(
                q_parts,
                k_parts,
                v_parts,
                q_dot_parts,
                k_dot_parts,
                v_dot_parts,
                grad_parts,
                dot_grad_parts,
                bias_tile,
                rows,
                visible,
                scale,
                BLOCK_Q,
                BLOCK_K,
                BIAS,
                HAS_Q_DOT,
                HAS_K_DOT,
                HAS_V_DOT,
                True,
            )
            if HAS_DV:
                dv_parts = _add_product(dv_parts, p, grad_parts)
                if HAS_V_DOT:
                    dv_dot_parts = _add_product(dv_dot_parts, p, dot_grad_parts)
                if S_MOVES:
                    dv_parts = _add_product(dv_parts, p * u, dot_grad_parts)
            if HAS_DK:
                dk_parts = _add_product(dk_parts, p * e, q_parts)
                if HAS_Q_DOT:
                    dk_parts = _add_product(dk_parts, p * w, q_dot_parts)
                if HAS_K_DOT:
                    dk_dot_parts = _add_product(dk_dot_parts, p * w, q_parts)

    if HAS_DV:
        _store_parts(dv, dv_strides, keys_at, HEAD_DIM_V, dv_parts, 1.0, WIDTHS_V, BLOCK_K)
        if HAS_V_DOT:
            _store_parts(dv_dot, dv_dot_strides, keys_at, HEAD_DIM_V, dv_dot_parts, 1.0, WIDTHS_V, BLOCK_K)
    if HAS_DK:
        _store_parts(dk, dk_strides, keys_at, HEAD_DIM, dk_parts, scale, WIDTHS, BLOCK_K)
        if HAS_K_DOT:
            _store_parts(dk_dot, dk_dot_strides, keys_at, HEAD_DIM, dk_dot_parts, scale, WIDTHS, BLOCK_K)
