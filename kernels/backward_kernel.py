# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

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
    queries_kernel     with SUMS the means, one program per block of queries, over keys; then dq and dq_dot, likewise
    keys_kernel        dk, dk_dot, dv and dv_dot, one program per block of keys, over the queries of all its heads
    No sum crosses programs, so a result does not depend on their order. Tiles are computed twice or thrice instead:
    27 products of a tile with D columns where everything is active; 7 where nothing is, for the mean of do v' is
    then rowsum(do * o).
Shapes
    As in attention_kernel. The row sums are float32 [5, B, H, Lq]: lse in units of log 2 and +inf where a row sees no
    key, which makes p = 0; the shifts of e and of w; r; with an additive bias log2 l, and m in place of lse. centre
    is the mean over keys of k and of k_dot, float32 [2, B, Hkv, Dqk].
    Head dims are taken in parts, see tiles. `inputs` is (q, k, v, q_dot, k_dot, v_dot, gradient of o, that of o_dot),
    and `strides` those of them; what is not there is None. LIMITS: whether a window has a left and a right one.
    TILE and `tiles` as in attention_kernel; keys_kernel takes the lists of the transposed map.
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

from jvpgraph.kernels.backward_tiles import (
    add_outer,
    bias_tile_of,
    load_keys,
    load_queries,
    masked_scores,
    place_of_step,
    rounding,
    seeing_queries,
    seen_keys,
    visible_of,
    weights_of,
)
from jvpgraph.kernels.tiles import (
    BIAS_STRIDES,
    TILE_STEPS,
    add_product,
    base_of,
    listed_tiles,
    load_parts,
    load_tile,
    store_parts,
    zero_parts,
)

__all__ = ["keys_kernel", "queries_kernel"]


@triton.jit(
    do_not_specialize=["heads", "group", "length_q", "length_kv", "left", "right", *TILE_STEPS],
    do_not_specialize_on_alignment=BIAS_STRIDES,
)
def queries_kernel(
    inputs,
    bias,
    tiles,
    sums,
    o,
    centre,
    grads,
    strides,
    bias_batch,
    bias_head,
    bias_row,
    bias_key,
    o_strides,
    grad_strides,
    scale,
    heads,
    group,
    length_q,
    length_kv,
    left,
    right,
    tiles_batch,
    tiles_head,
    tiles_rows,
    tiles_columns,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    WIDTHS: tl.constexpr,
    WIDTHS_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVE: tl.constexpr,
    TANGENT: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_HAS_ROWS: tl.constexpr,
    LIMITS: tl.constexpr,
    TILE: tl.constexpr,
    SUMS: tl.constexpr,
):
    """One block of queries of one head. With SUMS its row sums: in come dlse, dr and r in the fields 1 to 3, out go the
    shifts of e and of w, an r that is the mean of s_dot to float32, and m and log2 l. Else dq and dq_dot."""
    bias_strides = (bias_batch, bias_head, bias_row, bias_key)
    tile_steps = (tiles_batch, tiles_head, tiles_rows, tiles_columns)
    TILED: tl.constexpr = TILE[0] > 0
    HAS_Q_DOT: tl.constexpr = ACTIVE[0]
    HAS_K_DOT: tl.constexpr = ACTIVE[1]
    HAS_V_DOT: tl.constexpr = ACTIVE[2]
    S_ACTIVE: tl.constexpr = HAS_Q_DOT or HAS_K_DOT
    blocks = tl.cdiv(length_q, BLOCK_Q)
    first_row = (tl.program_id(0) % blocks) * BLOCK_Q
    batch_head = tl.program_id(0) // blocks
    batch = batch_head // heads
    head = batch_head % heads
    head_kv = head // group
    queries = first_row + tl.arange(0, BLOCK_Q)
    inside = queries < length_q
    sums += batch_head.to(tl.int64) * length_q + queries
    size = (tl.num_programs(0) // blocks).to(tl.int64) * length_q  # of a field

    queries_at = (batch, head, first_row, length_q)
    of_queries = load_queries(
        inputs, strides, queries_at, HEAD_DIM, HEAD_DIM_V, WIDTHS, WIDTHS_V, BLOCK_Q, HAS_Q_DOT, TANGENT
    )
    q_parts = of_queries[0]
    grad_parts = of_queries[2]
    if BIAS != 0:
        bias = base_of(bias, bias_strides, batch, head)

    lse = tl.load(sums, mask=inside, other=float("inf"))
    e_shift = tl.zeros([BLOCK_Q], tl.float32)
    w_shift = tl.zeros([BLOCK_Q], tl.float32)
    r = tl.zeros([BLOCK_Q], tl.float32)
    if TANGENT:
        r = tl.load(sums + 3 * size, mask=inside, other=0.0)
    if not SUMS:
        e_shift = tl.load(sums + size, mask=inside, other=0.0)
        if TANGENT:
            w_shift = tl.load(sums + 2 * size, mask=inside, other=0.0)
    log_l = e_shift
    start, end = seen_keys(first_row, length_kv, left, right, BLOCK_Q, LIMITS)
    walk = (tiles, tiles, tiles)
    if TILED:
        # steps stand for the keys of listed tiles, one behind the other
        listed, kinds, _, end = listed_tiles(tiles, tile_steps, batch, head, first_row // TILE[0])
        walk = (listed, kinds, tiles[3])
        end = end * TILE[1]
    if BIAS == 2:
        if SUMS:
            lse = tl.full([BLOCK_Q], -float("inf"), tl.float32)
            l = tl.zeros([BLOCK_Q], tl.float32)
            for step in tl.range(start, end, BLOCK_K, num_stages=STAGES):
                first_key, kind = place_of_step(walk, step, TILE[1], TILED)
                keys_at = (batch, head_kv, first_key, length_kv)
                k_parts = load_parts(inputs[1], strides[1], keys_at, HEAD_DIM, WIDTHS, BLOCK_K)
                at = (first_row, length_q, first_key, length_kv)
                bias_tile = bias_tile_of(bias, bias_strides, at, BLOCK_Q, BLOCK_K, BIAS_HAS_ROWS, BIAS, False)
                keys = first_key + tl.arange(0, BLOCK_K)
                visible = visible_of(queries[:, None], keys[None, :], length_kv, left, right, LIMITS)
                if TILED:
                    visible &= load_tile(walk[2], (kind, first_row, step), TILE, BLOCK_Q, BLOCK_K) != 0
                s = masked_scores(q_parts, k_parts, bias_tile, scale, BLOCK_Q, BLOCK_K, BIAS, False)
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
    dq_parts = zero_parts(WIDTHS, BLOCK_Q)
    dq_dot_parts = dq_parts
    if SUMS and not TANGENT:
        end = start
        o_parts = load_parts(o, o_strides, queries_at, HEAD_DIM_V, WIDTHS_V, BLOCK_Q)
        for i in tl.static_range(len(WIDTHS_V)):
            total_e += tl.sum(grad_parts[i].to(tl.float32) * o_parts[i].to(tl.float32), 1)
    for step in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        first_key, kind = place_of_step(walk, step, TILE[1], TILED)
        keys_at = (batch, head_kv, first_key, length_kv)
        of_keys = load_keys(
            inputs, strides, keys_at, HEAD_DIM, HEAD_DIM_V, WIDTHS, WIDTHS_V, BLOCK_K, HAS_K_DOT, HAS_V_DOT
        )
        k_parts = of_keys[0]
        k_dot_parts = of_keys[1]
        at = (first_row, length_q, first_key, length_kv)
        bias_tile = bias_tile_of(bias, bias_strides, at, BLOCK_Q, BLOCK_K, BIAS_HAS_ROWS, BIAS, False)
        keys = first_key + tl.arange(0, BLOCK_K)
        visible = visible_of(queries[:, None], keys[None, :], length_kv, left, right, LIMITS)
        if TILED:
            visible &= load_tile(walk[2], (kind, first_row, step), TILE, BLOCK_Q, BLOCK_K) != 0
        p, u, w, e = weights_of(
            of_queries, of_keys, bias_tile, rows, visible, scale, BLOCK_Q, BLOCK_K, BIAS, ACTIVE, False
        )
        if SUMS:
            total_e += tl.sum(p * e, 1)
            if S_ACTIVE:
                total_u += tl.sum(p * u, 1)
                total_w += tl.sum(p * w, 1)
        else:
            ds = p * e
            dq_parts = add_product(dq_parts, ds, k_parts)
            if TANGENT:
                total_e += tl.sum(rounding(ds, k_parts), 1)
            if S_ACTIVE:
                ds_dot = p * w
                total_w += tl.sum(rounding(ds_dot, k_parts), 1)
                if HAS_K_DOT:
                    dq_parts = add_product(dq_parts, ds_dot, k_dot_parts)
                if HAS_Q_DOT:
                    dq_dot_parts = add_product(dq_dot_parts, ds_dot, k_parts)

    if SUMS:
        # e was taken with the r that came in: u * w of u - mean(u) has the mean of u * w less mean(u) mean(w)
        dlse = tl.load(sums + size, mask=inside, other=0.0)
        tl.store(sums + size, dlse - (total_e - total_u * total_w), mask=inside)
        if TANGENT:
            dr = tl.load(sums + 2 * size, mask=inside, other=0.0)
            tl.store(sums + 2 * size, dr - total_w, mask=inside)
            tl.store(sums + 3 * size, r + total_u, mask=inside)
    else:
        if TANGENT:
            centre += (batch * (heads // group) + head_kv).to(tl.int64) * HEAD_DIM
            centre_dot = centre + (size // length_q // group) * HEAD_DIM
            dq_parts = add_outer(dq_parts, total_e, centre, HEAD_DIM, WIDTHS)
            if HAS_K_DOT:
                dq_parts = add_outer(dq_parts, total_w, centre_dot, HEAD_DIM, WIDTHS)
            if HAS_Q_DOT:
                dq_dot_parts = add_outer(dq_dot_parts, total_w, centre, HEAD_DIM, WIDTHS)
        store_parts(grads[0], grad_strides[0], queries_at, 0, HEAD_DIM, dq_parts, scale, WIDTHS, BLOCK_Q)
        if HAS_Q_DOT:
            store_parts(grads[1], grad_strides[1], queries_at, 0, HEAD_DIM, dq_dot_parts, scale, WIDTHS, BLOCK_Q)


@triton.jit(
    do_not_specialize=["heads", "group", "length_q", "length_kv", "left", "right", *TILE_STEPS],
    do_not_specialize_on_alignment=BIAS_STRIDES,
)
def keys_kernel(
    inputs,
    bias,
    tiles,
    sums,
    grads,
    strides,
    bias_batch,
    bias_head,
    bias_row,
    bias_key,
    grad_strides,
    scale,
    heads,
    group,
    length_q,
    length_kv,
    left,
    right,
    tiles_batch,
    tiles_head,
    tiles_rows,
    tiles_columns,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    WIDTHS: tl.constexpr,
    WIDTHS_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVE: tl.constexpr,
    TANGENT: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_HAS_ROWS: tl.constexpr,
    LIMITS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
):
    """dk, dv, dk_dot and dv_dot of one block of keys of one head, from the queries of all heads that share it."""
    bias_strides = (bias_batch, bias_head, bias_row, bias_key)
    tile_steps = (tiles_batch, tiles_head, tiles_rows, tiles_columns)
    TILED: tl.constexpr = TILE[0] > 0
    HAS_Q_DOT: tl.constexpr = ACTIVE[0]
    HAS_K_DOT: tl.constexpr = ACTIVE[1]
    HAS_V_DOT: tl.constexpr = ACTIVE[2]
    S_ACTIVE: tl.constexpr = HAS_Q_DOT or HAS_K_DOT
    blocks = tl.cdiv(length_kv, BLOCK_K)
    first_key = (tl.program_id(0) % blocks) * BLOCK_K
    batch_head = tl.program_id(0) // blocks
    kv_heads = heads // group
    batch = batch_head // kv_heads
    head_kv = batch_head % kv_heads
    keys = first_key + tl.arange(0, BLOCK_K)
    size = (tl.num_programs(0) // blocks * group).to(tl.int64) * length_q  # of a field

    keys_at = (batch, head_kv, first_key, length_kv)
    of_keys = load_keys(inputs, strides, keys_at, HEAD_DIM, HEAD_DIM_V, WIDTHS, WIDTHS_V, BLOCK_K, HAS_K_DOT, HAS_V_DOT)

    dk_parts = zero_parts(WIDTHS, BLOCK_K)
    dv_parts = zero_parts(WIDTHS_V, BLOCK_K)
    dk_dot_parts = dk_parts
    dv_dot_parts = dv_parts
    start, end = seeing_queries(first_key, length_q, left, right, BLOCK_K, LIMITS)
    for member in range(group):
        head = head_kv * group + member
        bias_base = bias
        if BIAS != 0:
            bias_base = base_of(bias, bias_strides, batch, head)
        own = sums + (batch * heads + head).to(tl.int64) * length_q
        walk = (tiles, tiles, tiles)
        if TILED:
            listed, kinds, _, end = listed_tiles(tiles, tile_steps, batch, head, first_key // TILE[1])
            walk = (listed, kinds, tiles[3])
            end = end * TILE[0]
        for step in tl.range(start, end, BLOCK_Q, num_stages=STAGES):
            first_row, kind = place_of_step(walk, step, TILE[0], TILED)
            queries_at = (batch, head, first_row, length_q)
            of_queries = load_queries(
                inputs, strides, queries_at, HEAD_DIM, HEAD_DIM_V, WIDTHS, WIDTHS_V, BLOCK_Q, HAS_Q_DOT, TANGENT
            )
            q_parts, q_dot_parts, grad_parts, dot_grad_parts = of_queries
            queries = first_row + tl.arange(0, BLOCK_Q)
            inside = queries < length_q
            lse = tl.load(own + queries, mask=inside, other=float("inf"))
            e_shift = tl.load(own + size + queries, mask=inside, other=0.0)
            w_shift = e_shift
            r = e_shift
            if S_ACTIVE:
                w_shift = tl.load(own + 2 * size + queries, mask=inside, other=0.0)
                r = tl.load(own + 3 * size + queries, mask=inside, other=0.0)
            log_l = e_shift
            if BIAS == 2:
                log_l = tl.load(own + 4 * size + queries, mask=inside, other=0.0)
            rows = (lse[None, :], e_shift[None, :], w_shift[None, :], r[None, :], log_l[None, :])
            at = (first_row, length_q, first_key, length_kv)
            bias_tile = bias_tile_of(bias_base, bias_strides, at, BLOCK_Q, BLOCK_K, BIAS_HAS_ROWS, BIAS, True)
            visible = visible_of(queries[None, :], keys[:, None], length_kv, left, right, LIMITS)
            if TILED:
                visible &= tl.trans(load_tile(walk[2], (kind, step, first_key), TILE, BLOCK_Q, BLOCK_K)) != 0
            p, u, w, e = weights_of(
                of_queries, of_keys, bias_tile, rows, visible, scale, BLOCK_Q, BLOCK_K, BIAS, ACTIVE, True
            )
            if HAS_DV:
                dv_parts = add_product(dv_parts, p, grad_parts)
                if HAS_V_DOT:
                    dv_dot_parts = add_product(dv_dot_parts, p, dot_grad_parts)
                if S_ACTIVE:
                    dv_parts = add_product(dv_parts, p * u, dot_grad_parts)
            if HAS_DK:
                dk_parts = add_product(dk_parts, p * e, q_parts)
                if HAS_Q_DOT:
                    dk_parts = add_product(dk_parts, p * w, q_dot_parts)
                if HAS_K_DOT:
                    dk_dot_parts = add_product(dk_dot_parts, p * w, q_parts)

    if HAS_DV:
        store_parts(grads[1], grad_strides[1], keys_at, 0, HEAD_DIM_V, dv_parts, 1.0, WIDTHS_V, BLOCK_K)
        if HAS_V_DOT:
            store_parts(grads[3], grad_strides[3], keys_at, 0, HEAD_DIM_V, dv_dot_parts, 1.0, WIDTHS_V, BLOCK_K)
    if HAS_DK:
        store_parts(grads[0], grad_strides[0], keys_at, 0, HEAD_DIM, dk_parts, scale, WIDTHS, BLOCK_K)
        if HAS_K_DOT:
            store_parts(grads[2], grad_strides[2], keys_at, 0, HEAD_DIM, dk_dot_parts, scale, WIDTHS, BLOCK_K)
