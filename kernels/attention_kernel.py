# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton's compiler unpacks no tuples
"""Attention and its JVP in one Triton kernel that streams over the keys once.

Math
    s = scale q k' + bias,  p = softmax(s),  o = p v,  lse = log sum exp(s)
    s_dot = scale (q_dot k' + q k_dot') + bias_dot,  h = p * s_dot,  r = rowsum(h)
    o_dot = p v_dot + h v - r * o,  lse_dot = r
Streaming form
    Over key blocks: running row maximum m and row sums l of p and r of h, accumulators o for p v and c for
    p v_dot + h v, all rescaled by 2^(m_old - m_new); scores are in units of log 2, so the exponential is a
    bare exp2. At the end o /= l, r /= l, o_dot = c / l - r * o, lse = m + log l.
    h is centred: o_dot does not change when a constant per row is subtracted from s_dot, but what h loses
    when it is rounded for the product with v does. So h = p * (s_dot - mu), with mu the mean of s_dot under p over
    the keys of this block, and what earlier blocks gave is brought along: with each step of mu, c -= step * o and
    r -= step * l. At the end lse_dot = r / l + mu. Any mu is right; one that is near s_dot is precise, and keys
    that come together are alike: in joint attention text and image have tangents of their own, so that the mean of
    the first keys is far from the others, and the mean of all keys from those of a query that attends to the text.
    float32, in which h is not rounded, keeps the mu of the first block in which a row sees a key.
    Key blocks that every query of a block sees whole come first and need no mask; those that the end of the keys or
    the window cuts follow, and those that no query sees are not visited. With a block mask the key blocks are those of
    the tiles listed for the queries: first those seen whole, then those of which the bytes are read, or that hang over
    the end of the keys.
    Head dims are taken in parts, see tiles.
Shapes
    q [B, H, Lq, Dqk], k [B, Hkv, Lkv, Dqk], v [B, Hkv, Lkv, Dv], bias [B | 1, H | 1, Lq | 1, Lkv | 1], lse
    [B, H, Lq]. o and o_dot lie in memory as B, L, H, D. Any strides; a tensor whose last dim is not
    contiguous is copied. Lengths, batch and heads, widths of the window and the number of packed sequences are
    run-time values: a new length compiles nothing.
    cu_seqlens (cu_q, cu_kv): sequences packed along the length of one batch, int32 [S + 1] each, ascending from 0.
    Sequence n has queries cu_q[n] .. cu_q[n + 1] and takes tiles cu_q[n] // BLOCK_Q + n and on, which are enough:
    cdiv(length, BLOCK_Q) <= cu_q[n + 1] // BLOCK_Q + 1 - cu_q[n] // BLOCK_Q. Rows of no sequence, and rows that see
    no key, get o = 0, lse = -inf, and zero tangents.
Precision
    Sums and accumulators in float32; p and h are rounded to the dtype of v for their products. float32 is
    multiplied as float32, without tf32, and only up to 64 columns. lse in natural log, float32.
Source
    Dao et al., FlashAttention (2022), and Lu and Song, sCM (2024), appendix F, for the streaming form.
"""

from __future__ import annotations

import triton
import triton.language as tl

from jvpgraph.kernels.tiles import (
    BIAS_DOT_STRIDES,
    BIAS_STRIDES,
    LEAST,
    LN2,
    LOG2E,
    TILE_STEPS,
    additive,
    base_of,
    listed_tiles,
    load_bias,
    load_part,
    load_parts,
    load_tile,
    store_parts,
    zero_parts,
)

__all__ = ["attention_kernel"]


@triton.jit
def _find_sequence(cu_q, sequences, tile, BLOCK_Q: tl.constexpr):
    """The last sequence n whose first tile, cu_q[n] // BLOCK_Q + n, is not after this one."""
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_q + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _bounds_of_packed(packing, tile, length_q, length_kv, BLOCK_Q: tl.constexpr):
    """(first row, end of the queries, first key, end of the keys, key at the position of the first row) of a tile of
    packed sequences. Nothing outside of the tensors is touched, whatever the offsets say."""
    cu_q, cu_kv, sequences = packing
    sequence = _find_sequence(cu_q, sequences, tile, BLOCK_Q)
    start_q = tl.maximum(tl.load(cu_q + sequence), 0)
    end_q = tl.minimum(tl.load(cu_q + sequence + 1), length_q)
    start_kv = tl.minimum(tl.maximum(tl.load(cu_kv + sequence), 0), length_kv)
    first_row = start_q + (tile - start_q // BLOCK_Q - sequence) * BLOCK_Q
    end_kv = tl.minimum(tl.load(cu_kv + sequence + 1), length_kv)
    end_kv = tl.where(first_row < end_q, end_kv, start_kv)  # a tile too many has no keys
    return first_row, end_q, start_kv, end_kv, start_kv + first_row - start_q


@triton.jit
def _seen_keys(own_key, start, end, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LIMITS: tl.constexpr):
    """(first_seen, whole, uncut, cut, end): keys [first_seen, end) are seen by some query of this block, [whole, uncut)
    by all, in whole blocks of keys; steps from cut on stand for the key blocks that are masked."""
    HAS_LEFT: tl.constexpr = LIMITS[0]
    HAS_RIGHT: tl.constexpr = LIMITS[1]
    whole = start
    uncut = end
    first_seen = start
    if HAS_RIGHT:
        uncut = tl.minimum(end, own_key + 1 + right)
        end = tl.minimum(end, own_key + BLOCK_Q + right)
    if HAS_LEFT:
        first_seen = tl.minimum(tl.maximum(own_key - left, start), end)
        whole = tl.maximum(own_key + BLOCK_Q - 1 - left, start)
        count = tl.maximum(uncut - whole, 0) // BLOCK_K * BLOCK_K
        whole = tl.where(count > 0, whole, first_seen)
        uncut = whole + count
        cut = uncut - tl.cdiv(whole - first_seen, BLOCK_K) * BLOCK_K
    else:
        uncut = whole + (uncut - whole) // BLOCK_K * BLOCK_K
        cut = uncut
    return first_seen, whole, uncut, cut, end


@triton.jit
def _visible(columns, own_keys, end, left, right, LIMITS: tl.constexpr):
    """Which keys, by column, a query sees at the position of which there is own_key."""
    HAS_LEFT: tl.constexpr = LIMITS[0]
    HAS_RIGHT: tl.constexpr = LIMITS[1]
    visible = (columns < end)[None, :]
    if HAS_RIGHT:
        visible = visible & (columns[None, :] <= own_keys[:, None] + right)
    if HAS_LEFT:
        visible = visible & (columns[None, :] >= own_keys[:, None] - left)
    return visible


@triton.jit(
    do_not_specialize=["heads", "group", "length_q", "length_kv", "left", "right", "sequences", *TILE_STEPS],
    do_not_specialize_on_alignment=["cu_q", "cu_kv", *BIAS_STRIDES, *BIAS_DOT_STRIDES],
)
def attention_kernel(
    queries,
    k,
    k_hi,
    k_dot,
    k_dot_hi,
    v,
    v_hi,
    v_dot,
    v_dot_hi,
    bias,
    bias_dot,
    outs,
    cu_q,
    cu_kv,
    tiles,
    strides,
    bias_batch,
    bias_head,
    bias_row,
    bias_key,
    bias_dot_batch,
    bias_dot_head,
    bias_dot_row,
    bias_dot_key,
    scale,
    heads,
    group,
    length_q,
    length_kv,
    left,
    right,
    sequences,
    tiles_batch,
    tiles_head,
    tiles_rows,
    tiles_columns,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    WIDTHS: tl.constexpr,
    WIDTHS_V: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    CUT_STAGES: tl.constexpr,
    ACTIVE: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_HAS_ROWS: tl.constexpr,
    LIMITS: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    SCALE_IS_POSITIVE: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):
    """One block of queries of one head.

    queries is (q, q_dot), outs (o, lse, o_dot, lse_dot), strides those of (q, q_dot, k, k_dot, v, v_dot, o).
    BY_DESCRIPTOR: k, v and their tangents are TMA descriptors, one for each part of the head dim, and arguments of
    their own, for Triton 3.6 takes none in a tuple; else pointers, and the `_hi` arguments are None. ACTIVE: which of
    q, k, v and the bias have a tangent. BIAS is one of NO_BIAS, BOOLEAN_BIAS, ADDITIVE_BIAS. SHARES programs share the
    columns of v, where the accumulators of all would not fit the registers. Query i sees keys i - left .. i + right,
    each limit only if LIMITS, (left, right), says so. PACKED: the lengths are those of all sequences together.
    CUT_STAGES are those of the loop over key blocks that are masked. TILE: queries and keys of a tile of the block mask
    `tiles`, see block_mask.Lists, or (0, 0) without one; the steps of its rows by batch entry and head, and how many
    rows and columns of tiles there are, are arguments of their own.
    """
    bias_strides = (bias_batch, bias_head, bias_row, bias_key)
    bias_dot_strides = (bias_dot_batch, bias_dot_head, bias_dot_row, bias_dot_key)
    HAS_Q_DOT: tl.constexpr = ACTIVE[0]
    HAS_K_DOT: tl.constexpr = ACTIVE[1]
    HAS_V_DOT: tl.constexpr = ACTIVE[2]
    HAS_BIAS_DOT: tl.constexpr = ACTIVE[3]
    HAS_LEFT: tl.constexpr = LIMITS[0]
    HAS_RIGHT: tl.constexpr = LIMITS[1]
    S_ACTIVE: tl.constexpr = HAS_Q_DOT or HAS_K_DOT or HAS_BIAS_DOT
    O_ACTIVE: tl.constexpr = S_ACTIVE or HAS_V_DOT
    # the maximum can be taken before scaling, which then fuses with the subtraction of the maximum
    SCALE_LATE: tl.constexpr = BIAS == 0 and SCALE_IS_POSITIVE
    ROUNDS: tl.constexpr = outs[0].dtype.element_ty.primitive_bitwidth < 32
    TILED: tl.constexpr = TILE[0] > 0
    MAY_BE_BLIND: tl.constexpr = BIAS != 0 or HAS_LEFT or PACKED or TILED
    # the rows behind the end of a sequence are another's, which may be NaN
    CLEAR: tl.constexpr = BY_DESCRIPTOR and PACKED

    blocks = length_q // BLOCK_Q + sequences if PACKED else tl.cdiv(length_q, BLOCK_Q)
    tile = tl.program_id(0) % blocks
    if HAS_RIGHT and not HAS_LEFT:
        tile = blocks - 1 - tile  # the longest rows first: the short ones fill the gaps at the end
    batch_head = tl.program_id(0) // blocks
    first_column = tl.program_id(1) * WIDTHS_V[0]
    batch = batch_head // heads
    head = batch_head % heads
    head_kv = head // group
    first_row = tile * BLOCK_Q
    end_q = length_q
    start_kv = 0
    end_kv = length_kv
    own_key = first_row  # the key at the position of the first row
    if PACKED:
        first_row, end_q, start_kv, end_kv, own_key = _bounds_of_packed(
            (cu_q, cu_kv, sequences), tile, length_q, length_kv, BLOCK_Q
        )
    rows = first_row + tl.arange(0, BLOCK_Q)

    queries_at = (batch, head, first_row, end_q)
    q = load_parts(queries[0], strides[0], queries_at, HEAD_DIM, WIDTHS, BLOCK_Q)
    q_dot = q
    if HAS_Q_DOT:
        q_dot = load_parts(queries[1], strides[1], queries_at, HEAD_DIM, WIDTHS, BLOCK_Q)
    k_stride = 0
    k_dot_stride = 0
    v_stride = 0
    v_dot_stride = 0
    if not BY_DESCRIPTOR:
        k = base_of(k, strides[2], batch, head_kv)
        k_hi = k
        k_stride = strides[2][2]
        v = base_of(v, strides[4], batch, head_kv)
        v_hi = v
        v_stride = strides[4][2]
        if HAS_K_DOT:
            k_dot = base_of(k_dot, strides[3], batch, head_kv)
            k_dot_hi = k_dot
            k_dot_stride = strides[3][2]
        if HAS_V_DOT:
            v_dot = base_of(v_dot, strides[5], batch, head_kv)
            v_dot_hi = v_dot
            v_dot_stride = strides[5][2]
    ks = (k, k_hi)
    vs = (v, v_hi)
    k_dots = (k_dot, k_dot_hi)
    v_dots = (v_dot, v_dot_hi)
    if BIAS != 0:
        bias = base_of(bias, bias_strides, batch, head)
    if HAS_BIAS_DOT:
        bias_dot = base_of(bias_dot, bias_dot_strides, batch, head)
    first_seen, whole, uncut, cut, end = _seen_keys(own_key, start_kv, end_kv, left, right, BLOCK_Q, BLOCK_K, LIMITS)
    if TILED:
        # steps stand for the keys of listed tiles, one behind the other
        tile_steps = (tiles_batch, tiles_head, tiles_rows, tiles_columns)
        listed, kinds, uncut, end = listed_tiles(tiles, tile_steps, batch, head, first_row // TILE[0])
        uncut = uncut * TILE[1]
        cut = uncut
        end = end * TILE[1]

    m = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    r = tl.zeros([BLOCK_Q], tl.float32)
    mu = r
    o = zero_parts(WIDTHS_V, BLOCK_Q)
    c = zero_parts(WIDTHS_V, BLOCK_Q)

    log2_scale = scale * LOG2E
    # twice the same loop: over key blocks that every query of this block sees whole, then over the others
    for CUT in tl.static_range(2):
        for step in tl.range(
            cut if CUT else whole, end if CUT else uncut, BLOCK_K, num_stages=CUT_STAGES if CUT else STAGES
        ):
            first_key = step
            end_of_part = end_kv
            if CUT and HAS_LEFT:
                # steps before `uncut` stand for the key blocks that the left limit cuts, [first_seen, whole)
                first_key = tl.where(step < uncut, step - cut + first_seen, step)
                end_of_part = tl.where(step < uncut, whole, end_kv)
            tile_column = step
            if TILED:
                tile_column = tl.load(listed + step // TILE[1])
                first_key = tile_column * TILE[1] + step % TILE[1]
            keys_at = (batch, head_kv, first_key, 0, end_kv)
            values_at = (batch, head_kv, first_key, first_column, end_kv)
            scores_at = (first_row, length_q, first_key, length_kv)
            s = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            s_dot = s
            for i in tl.static_range(len(WIDTHS)):
                keys = load_part(ks, keys_at, k_stride, HEAD_DIM, i, WIDTHS, 1, BLOCK_K, BY_DESCRIPTOR, CUT, False)
                s = tl.dot(q[i], tl.trans(keys), s, input_precision="ieee")
                if HAS_Q_DOT:
                    s_dot = tl.dot(q_dot[i], tl.trans(keys), s_dot, input_precision="ieee")
            if HAS_K_DOT:
                for i in tl.static_range(len(WIDTHS)):
                    keys = load_part(
                        k_dots, keys_at, k_dot_stride, HEAD_DIM, i, WIDTHS, 1, BLOCK_K, BY_DESCRIPTOR, CUT, False
                    )
                    s_dot = tl.dot(q[i], tl.trans(keys), s_dot, input_precision="ieee")

            if not SCALE_LATE:
                s = s * log2_scale
            if BIAS != 0:
                b = load_bias(bias, bias_strides, scores_at, BLOCK_Q, BLOCK_K, BIAS_HAS_ROWS)
                if BIAS == 1:
                    s = tl.where(b != 0, s, -float("inf"))
                else:
                    s = s + additive(b)
            if CUT:
                columns = first_key + tl.arange(0, BLOCK_K)
                if CLEAR and S_ACTIVE:
                    s_dot = tl.where((columns < end_of_part)[None, :], s_dot, 0.0)
                own_keys = own_key + tl.arange(0, BLOCK_Q)
                s = tl.where(_visible(columns, own_keys, end_of_part, left, right, LIMITS), s, -float("inf"))
                if TILED:
                    tile_at = (tl.load(kinds + tile_column), first_row, step)
                    s = tl.where(load_tile(tiles[3], tile_at, TILE, BLOCK_Q, BLOCK_K) != 0, s, -float("inf"))

            if SCALE_LATE:
                m_new = tl.maximum(m, tl.max(s, 1) * log2_scale)
            else:
                m_new = tl.maximum(m, tl.max(s, 1))
            base = m_new
            if BIAS != 0 or (CUT and (HAS_LEFT or TILED)):
                base = tl.where(m_new == -float("inf"), 0.0, m_new)  # 2^(-inf - 0) = 0 until a key is seen
            if SCALE_LATE:
                p = tl.math.exp2(s * log2_scale - base[:, None])
            else:
                p = tl.math.exp2(s - base[:, None])
            alpha = tl.math.exp2(m - base)
            m = m_new
            of_block = tl.sum(p, 1)
            l = l * alpha
            h = p
            if S_ACTIVE:
                factor = scale
                if HAS_BIAS_DOT:
                    b = load_bias(bias_dot, bias_dot_strides, scores_at, BLOCK_Q, BLOCK_K, BIAS_HAS_ROWS)
                    s_dot = s_dot * scale + b.to(tl.float32)
                    factor = 1.0
                mean = tl.sum(p * s_dot, 1) * (factor / tl.maximum(of_block, LEAST))
                if not ROUNDS:
                    mean = tl.where(l == 0, mean, mu)
                r = r * alpha
                step_of_mu = mean - mu
                mu = mean
                h = p * (s_dot * factor - mu[:, None])
                if ROUNDS:  # h sums up to zero
                    r -= step_of_mu * l
                    c = _moved(c, alpha, o, step_of_mu * alpha)
                else:
                    r += tl.sum(h, 1)
                    c = _scaled(c, alpha)
            elif HAS_V_DOT:
                c = _scaled(c, alpha)
            l = l + of_block
            o = _scaled(o, alpha)

            o_new = ()
            c_new = ()
            for i in tl.static_range(len(WIDTHS_V)):
                values = load_part(
                    vs, values_at, v_stride, HEAD_DIM_V, i, WIDTHS_V, SHARES, BLOCK_K, BY_DESCRIPTOR, CUT, CLEAR
                )
                o_new = o_new + (tl.dot(p.to(values.dtype), values, o[i], input_precision="ieee"),)
                if S_ACTIVE:
                    c_new = c_new + (tl.dot(h.to(values.dtype), values, c[i], input_precision="ieee"),)
            o = o_new
            if S_ACTIVE:
                c = c_new
            if HAS_V_DOT:
                c_new = ()
                for i in tl.static_range(len(WIDTHS_V)):
                    values = load_part(
                        v_dots,
                        values_at,
                        v_dot_stride,
                        HEAD_DIM_V,
                        i,
                        WIDTHS_V,
                        SHARES,
                        BLOCK_K,
                        BY_DESCRIPTOR,
                        CUT,
                        CLEAR,
                    )
                    c_new = c_new + (tl.dot(p.to(values.dtype), values, c[i], input_precision="ieee"),)
                c = c_new

    seen = rows < tl.where(first_column == 0, end_q, 0)  # one program of those that share v writes the row sums
    if MAY_BE_BLIND:
        blind = m == -float("inf")  # rows that see no key: l, o, c and r are 0 there
        l = tl.where(blind, 1.0, l)
    inverse = 1.0 / l
    log_sum = (m + tl.math.log2(l)) * LN2
    row_sums = batch_head.to(tl.int64) * length_q + rows
    tl.store(outs[1] + row_sums, log_sum, mask=seen)
    o = _scaled(o, inverse)
    store_parts(outs[0], strides[6], queries_at, first_column, HEAD_DIM_V, o, 1.0, WIDTHS_V, BLOCK_Q)
    if O_ACTIVE:
        r = r * inverse
        c = _scaled(c, inverse)
        if S_ACTIVE:
            tl.store(outs[3] + row_sums, r + mu, mask=seen)
            c_new = ()
            for i in tl.static_range(len(WIDTHS_V)):
                c_new = c_new + (c[i] - r[:, None] * o[i],)
            c = c_new
        store_parts(outs[2], strides[6], queries_at, first_column, HEAD_DIM_V, c, 1.0, WIDTHS_V, BLOCK_Q)


@triton.jit
def _moved(parts, factors, others, steps):
    """Each row of the parts times its factor, less that of the others times its step."""
    moved = ()
    for i in tl.static_range(len(parts)):
        moved = moved + (parts[i] * factors[:, None] - others[i] * steps[:, None],)
    return moved


@triton.jit
def _scaled(parts, factors):
    """Each row of the parts times its factor."""
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factors[:, None],)
    return scaled
