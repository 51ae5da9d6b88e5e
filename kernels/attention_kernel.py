# mypy: disallow-untyped-defs=False
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
    when it is rounded for the product with v does. mu, the mean of s_dot over the first key block, is taken
    from q and the mean of those keys, and lse_dot = r + mu. Any mu is right; a near one is precise.
    Key blocks that every query of a block sees whole come first and need no mask; those that the end of the keys or
    the window cuts follow, and those that no query sees are not visited.
    A head dim is cut into two parts of 2^n columns, so 72 is 64 + 16, 96 is 64 + 32 and 192 is 128 + 64; dims
    in between round up: 112 to 128.
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

import math

import triton
import triton.language as tl

__all__ = ["ADDITIVE_BIAS", "BIAS_DOT_STRIDES", "BIAS_STRIDES", "BOOLEAN_BIAS", "NO_BIAS", "attention_kernel"]

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
MOST_NEGATIVE = tl.constexpr(-2.35e38)  # times LOG2E it is finite

NO_BIAS, BOOLEAN_BIAS, ADDITIVE_BIAS = 0, 1, 2
# Arguments of their own: those of a tuple cannot be kept from specialising, and these change with the lengths.
BIAS_STRIDES = ["bias_batch", "bias_head", "bias_row", "bias_key"]
BIAS_DOT_STRIDES = ["bias_dot_batch", "bias_dot_head", "bias_dot_row", "bias_dot_key"]


@triton.jit
def _base(source, strides, batch, head):
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
    CLEAR: tl.constexpr = False,
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
def _store_rows(target, value, row, column, end, stride, dim, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    columns = column + tl.arange(0, WIDTH)
    address = target + tl.cast(row, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    mask = (row + rows < end)[:, None] & (columns < dim)[None, :]
    tl.store(address, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _load_bias(
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
def _additive(bias):
    """An additive bias in units of log 2. The most negative finite number, with which models mask, stays finite: a row
    that has nothing else attends to all keys alike, and only -inf hides a key."""
    bias = bias.to(tl.float32)
    held = (bias < MOST_NEGATIVE) & (bias != -float("inf"))  # tl.maximum would drop a NaN
    return tl.where(held, MOST_NEGATIVE, bias) * LOG2E


@triton.jit
def _mean_product(a, b, count):
    """a mean(b over its first count rows)', [rows of a]; the other rows of b are zero."""
    mean = tl.sum(b.to(tl.float32), 0) / count
    return tl.sum(a.to(tl.float32) * mean[None, :], 1)


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


@triton.jit(
    do_not_specialize=["heads", "group", "length_q", "length_kv", "left", "right", "sequences"],
    do_not_specialize_on_alignment=["cu_q", "cu_kv", *BIAS_STRIDES, *BIAS_DOT_STRIDES],
)
def attention_kernel(
    q,
    q_dot,
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
    o,
    lse,
    o_dot,
    lse_dot,
    cu_q,
    cu_kv,
    q_strides,
    q_dot_strides,
    k_strides,
    k_dot_strides,
    v_strides,
    v_dot_strides,
    bias_batch,
    bias_head,
    bias_row,
    bias_key,
    bias_dot_batch,
    bias_dot_head,
    bias_dot_row,
    bias_dot_key,
    o_strides,
    scale,
    heads,
    group,
    length_q,
    length_kv,
    left,
    right,
    sequences,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    D_LO: tl.constexpr,
    D_HI: tl.constexpr,
    V_LO: tl.constexpr,
    V_HI: tl.constexpr,
    V_PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    CUT_STAGES: tl.constexpr,
    HAS_Q_DOT: tl.constexpr,
    HAS_K_DOT: tl.constexpr,
    HAS_V_DOT: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_HAS_ROWS: tl.constexpr,
    HAS_BIAS_DOT: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    SCALE_IS_POSITIVE: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):
    """One block of queries of one head. Strides are (batch, head, row).

    BY_DESCRIPTOR: k, v and their tangents are TMA descriptors, one for each part of the head dim; else
    pointers, and the `_hi` arguments are None. BIAS is one of NO_BIAS, BOOLEAN_BIAS, ADDITIVE_BIAS. V_PARTS programs
    share the columns of v, V_LO each, where the accumulators of all would not fit the registers. Query i sees keys
    i - left .. i + right, each limit only if HAS_LEFT or HAS_RIGHT. PACKED: the lengths are those of all sequences
    together. CUT_STAGES are those of the loop over key blocks that are masked.
    """
    bias_strides = (bias_batch, bias_head, bias_row, bias_key)
    bias_dot_strides = (bias_dot_batch, bias_dot_head, bias_dot_row, bias_dot_key)
    S_MOVES: tl.constexpr = HAS_Q_DOT or HAS_K_DOT or HAS_BIAS_DOT
    O_MOVES: tl.constexpr = S_MOVES or HAS_V_DOT
    # the maximum can be taken before scaling, which then fuses with the subtraction of the maximum
    SCALE_LATE: tl.constexpr = BIAS == 0 and SCALE_IS_POSITIVE
    MAY_BE_BLIND: tl.constexpr = BIAS != 0 or HAS_LEFT or PACKED
    # the rows behind the end of a sequence are another's, which may be NaN
    CLEAR: tl.constexpr = BY_DESCRIPTOR and PACKED

    PAD_LO: tl.constexpr = D_LO > HEAD_DIM
    PAD_HI: tl.constexpr = D_LO + D_HI > HEAD_DIM
    PAD_V_LO: tl.constexpr = V_PARTS * V_LO > HEAD_DIM_V
    PAD_V_HI: tl.constexpr = V_LO + V_HI > HEAD_DIM_V

    tiles = length_q // BLOCK_Q + sequences if PACKED else tl.cdiv(length_q, BLOCK_Q)
    tile = tl.program_id(0) % tiles
    if HAS_RIGHT and not HAS_LEFT:
        tile = tiles - 1 - tile  # the longest rows first: the short ones fill the gaps at the end
    batch_head = tl.program_id(0) // tiles
    first_column = tl.program_id(1) * V_LO
    batch = batch_head // heads
    head = batch_head % heads
    head_kv = head // group
    first_row = tile * BLOCK_Q
    end_q = length_q
    start_kv = 0
    end_kv = length_kv
    own_key = first_row  # the key at the position of the first row
    if PACKED:
        sequence = _find_sequence(cu_q, sequences, tile, BLOCK_Q)
        # nothing outside of the tensors is touched, whatever the offsets say
        start_q = tl.maximum(tl.load(cu_q + sequence), 0)
        end_q = tl.minimum(tl.load(cu_q + sequence + 1), length_q)
        start_kv = tl.minimum(tl.maximum(tl.load(cu_kv + sequence), 0), length_kv)
        first_row = start_q + (tile - start_q // BLOCK_Q - sequence) * BLOCK_Q
        end_kv = tl.minimum(tl.load(cu_kv + sequence + 1), length_kv)
        end_kv = tl.where(first_row < end_q, end_kv, start_kv)  # a tile too many has no keys
        own_key = start_kv + first_row - start_q
    rows = first_row + tl.arange(0, BLOCK_Q)

    queries_at = (0, 0, first_row, 0, end_q)
    queries_at_hi = (0, 0, first_row, D_LO, end_q)
    q = _base(q, q_strides, batch, head)
    q_lo = _load_rows(q, queries_at, q_strides[2], HEAD_DIM, D_LO, PAD_LO, BLOCK_Q, False, True)
    if D_HI:
        q_hi = _load_rows(q, queries_at_hi, q_strides[2], HEAD_DIM, D_HI, PAD_HI, BLOCK_Q, False, True)
    if HAS_Q_DOT:
        q_dot = _base(q_dot, q_dot_strides, batch, head)
        q_dot_lo = _load_rows(q_dot, queries_at, q_dot_strides[2], HEAD_DIM, D_LO, PAD_LO, BLOCK_Q, False, True)
        if D_HI:
            q_dot_hi = _load_rows(q_dot, queries_at_hi, q_dot_strides[2], HEAD_DIM, D_HI, PAD_HI, BLOCK_Q, False, True)
    k_stride = 0
    k_dot_stride = 0
    v_stride = 0
    v_dot_stride = 0
    if not BY_DESCRIPTOR:
        k = _base(k, k_strides, batch, head_kv)
        k_hi = k
        k_stride = k_strides[2]
        v = _base(v, v_strides, batch, head_kv)
        v_hi = v
        v_stride = v_strides[2]
        if HAS_K_DOT:
            k_dot = _base(k_dot, k_dot_strides, batch, head_kv)
            k_dot_hi = k_dot
            k_dot_stride = k_dot_strides[2]
        if HAS_V_DOT:
            v_dot = _base(v_dot, v_dot_strides, batch, head_kv)
            v_dot_hi = v_dot
            v_dot_stride = v_dot_strides[2]
    if BIAS != 0:
        bias = _base(bias, bias_strides, batch, head)
    if HAS_BIAS_DOT:
        bias_dot = _base(bias_dot, bias_dot_strides, batch, head)

    # keys [first_seen, end) are seen by some query of this block, [whole, uncut) by all, in whole blocks of keys
    whole = start_kv
    end = end_kv
    uncut = end_kv
    if HAS_RIGHT:
        end = tl.minimum(end_kv, own_key + BLOCK_Q + right)
        uncut = tl.minimum(end_kv, own_key + 1 + right)
    if HAS_LEFT:
        first_seen = tl.minimum(tl.maximum(own_key - left, start_kv), end)
        whole = tl.maximum(own_key + BLOCK_Q - 1 - left, start_kv)
        count = tl.maximum(uncut - whole, 0) // BLOCK_K * BLOCK_K
        whole = tl.where(count > 0, whole, first_seen)
        uncut = whole + count
        cut = uncut - tl.cdiv(whole - first_seen, BLOCK_K) * BLOCK_K
    else:
        uncut = whole + (uncut - whole) // BLOCK_K * BLOCK_K
        cut = uncut

    if S_MOVES:
        start = (batch, head_kv, whole, 0, end_kv)
        start_hi = (batch, head_kv, whole, D_LO, end_kv)
        mu = tl.zeros([BLOCK_Q], tl.float32)
        count = tl.minimum(end_kv - whole, BLOCK_K).to(tl.float32)
        if HAS_Q_DOT:
            first = _load_rows(k, start, k_stride, HEAD_DIM, D_LO, PAD_LO, BLOCK_K, BY_DESCRIPTOR, True, CLEAR)
            mu += _mean_product(q_dot_lo, first, count)
            if D_HI:
                first = _load_rows(
                    k_hi, start_hi, k_stride, HEAD_DIM, D_HI, PAD_HI, BLOCK_K, BY_DESCRIPTOR, True, CLEAR
                )
                mu += _mean_product(q_dot_hi, first, count)
        if HAS_K_DOT:
            first = _load_rows(k_dot, start, k_dot_stride, HEAD_DIM, D_LO, PAD_LO, BLOCK_K, BY_DESCRIPTOR, True, CLEAR)
            mu += _mean_product(q_lo, first, count)
            if D_HI:
                first = _load_rows(
                    k_dot_hi, start_hi, k_dot_stride, HEAD_DIM, D_HI, PAD_HI, BLOCK_K, BY_DESCRIPTOR, True, CLEAR
                )
                mu += _mean_product(q_hi, first, count)
        mu = mu * scale
        if HAS_BIAS_DOT:
            first = _load_bias(
                bias_dot, bias_dot_strides, (first_row, length_q, whole, length_kv), BLOCK_Q, BLOCK_K, BIAS_HAS_ROWS
            )
            mu += tl.sum(first.to(tl.float32), 1) / count

    m = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    r = tl.zeros([BLOCK_Q], tl.float32)
    o_lo = tl.zeros([BLOCK_Q, V_LO], tl.float32)
    c_lo = tl.zeros([BLOCK_Q, V_LO], tl.float32)
    if V_HI:
        o_hi = tl.zeros([BLOCK_Q, V_HI], tl.float32)
        c_hi = tl.zeros([BLOCK_Q, V_HI], tl.float32)

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
            keys_at = (batch, head_kv, first_key, 0, end_kv)
            keys_at_hi = (batch, head_kv, first_key, D_LO, end_kv)
            values_at = (batch, head_kv, first_key, first_column, end_kv)
            values_at_hi = (batch, head_kv, first_key, V_LO, end_kv)
            scores_at = (first_row, length_q, first_key, length_kv)
            keys = _load_rows(k, keys_at, k_stride, HEAD_DIM, D_LO, PAD_LO, BLOCK_K, BY_DESCRIPTOR, CUT)
            s = tl.dot(q_lo, tl.trans(keys), input_precision="ieee")
            if S_MOVES:
                s_dot = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            if HAS_Q_DOT:
                s_dot = tl.dot(q_dot_lo, tl.trans(keys), s_dot, input_precision="ieee")
            if D_HI:
                keys = _load_rows(k_hi, keys_at_hi, k_stride, HEAD_DIM, D_HI, PAD_HI, BLOCK_K, BY_DESCRIPTOR, CUT)
                s = tl.dot(q_hi, tl.trans(keys), s, input_precision="ieee")
                if HAS_Q_DOT:
                    s_dot = tl.dot(q_dot_hi, tl.trans(keys), s_dot, input_precision="ieee")
            if HAS_K_DOT:
                keys = _load_rows(k_dot, keys_at, k_dot_stride, HEAD_DIM, D_LO, PAD_LO, BLOCK_K, BY_DESCRIPTOR, CUT)
                s_dot = tl.dot(q_lo, tl.trans(keys), s_dot, input_precision="ieee")
                if D_HI:
                    keys = _load_rows(
                        k_dot_hi, keys_at_hi, k_dot_stride, HEAD_DIM, D_HI, PAD_HI, BLOCK_K, BY_DESCRIPTOR, CUT
                    )
                    s_dot = tl.dot(q_hi, tl.trans(keys), s_dot, input_precision="ieee")

            if not SCALE_LATE:
                s = s * log2_scale
            if BIAS != 0:
                b = _load_bias(bias, bias_strides, scores_at, BLOCK_Q, BLOCK_K, BIAS_HAS_ROWS)
                if BIAS == 1:
                    s = tl.where(b != 0, s, -float("inf"))
                else:
                    s = s + _additive(b)
            if CUT:
                columns = first_key + tl.arange(0, BLOCK_K)
                visible = (columns < end_of_part)[None, :]
                if CLEAR and S_MOVES:
                    s_dot = tl.where(visible, s_dot, 0.0)
                own_keys = own_key + tl.arange(0, BLOCK_Q)
                if HAS_RIGHT:
                    visible = visible & (columns[None, :] <= own_keys[:, None] + right)
                if HAS_LEFT:
                    visible = visible & (columns[None, :] >= own_keys[:, None] - left)
                s = tl.where(visible, s, -float("inf"))

            if SCALE_LATE:
                m_new = tl.maximum(m, tl.max(s, 1) * log2_scale)
            else:
                m_new = tl.maximum(m, tl.max(s, 1))
            base = m_new
            if BIAS != 0 or (CUT and HAS_LEFT):
                base = tl.where(m_new == -float("inf"), 0.0, m_new)  # 2^(-inf - 0) = 0 until a key is seen
            if SCALE_LATE:
                p = tl.math.exp2(s * log2_scale - base[:, None])
            else:
                p = tl.math.exp2(s - base[:, None])
            alpha = tl.math.exp2(m - base)
            m = m_new
            l = l * alpha + tl.sum(p, 1)
            o_lo = o_lo * alpha[:, None]
            if V_HI:
                o_hi = o_hi * alpha[:, None]
            if O_MOVES:
                c_lo = c_lo * alpha[:, None]
                if V_HI:
                    c_hi = c_hi * alpha[:, None]
            if S_MOVES:
                if HAS_BIAS_DOT:
                    b = _load_bias(bias_dot, bias_dot_strides, scores_at, BLOCK_Q, BLOCK_K, BIAS_HAS_ROWS)
                    h = p * (s_dot * scale + b.to(tl.float32) - mu[:, None])
                else:
                    h = p * (s_dot * scale - mu[:, None])
                r = r * alpha + tl.sum(h, 1)

            values = _load_rows(v, values_at, v_stride, HEAD_DIM_V, V_LO, PAD_V_LO, BLOCK_K, BY_DESCRIPTOR, CUT, CLEAR)
            p = p.to(values.dtype)
            o_lo = tl.dot(p, values, o_lo, input_precision="ieee")
            if S_MOVES:
                h = h.to(values.dtype)
                c_lo = tl.dot(h, values, c_lo, input_precision="ieee")
            if V_HI:
                values = _load_rows(
                    v_hi, values_at_hi, v_stride, HEAD_DIM_V, V_HI, PAD_V_HI, BLOCK_K, BY_DESCRIPTOR, CUT, CLEAR
                )
                o_hi = tl.dot(p, values, o_hi, input_precision="ieee")
                if S_MOVES:
                    c_hi = tl.dot(h, values, c_hi, input_precision="ieee")
            if HAS_V_DOT:
                values = _load_rows(
                    v_dot, values_at, v_dot_stride, HEAD_DIM_V, V_LO, PAD_V_LO, BLOCK_K, BY_DESCRIPTOR, CUT, CLEAR
                )
                c_lo = tl.dot(p, values, c_lo, input_precision="ieee")
                if V_HI:
                    values = _load_rows(
                        v_dot_hi,
                        values_at_hi,
                        v_dot_stride,
                        HEAD_DIM_V,
                        V_HI,
                        PAD_V_HI,
                        BLOCK_K,
                        BY_DESCRIPTOR,
                        CUT,
                        CLEAR,
                    )
                    c_hi = tl.dot(p, values, c_hi, input_precision="ieee")

    seen = rows < tl.where(first_column == 0, end_q, 0)  # one program of V_PARTS writes the row sums
    if MAY_BE_BLIND:
        blind = m == -float("inf")  # rows that see no key: l, o_lo, c_lo and r are 0 there
        l = tl.where(blind, 1.0, l)
        if S_MOVES:
            mu = tl.where(blind, 0.0, mu)
    inverse = 1.0 / l
    log_sum = (m + tl.math.log2(l)) * LN2
    row_sums = batch_head.to(tl.int64) * length_q + rows
    tl.store(lse + row_sums, log_sum, mask=seen)
    o = _base(o, o_strides, batch, head)
    o_lo = o_lo * inverse[:, None]
    _store_rows(o, o_lo, first_row, first_column, end_q, o_strides[2], HEAD_DIM_V, V_LO, BLOCK_Q)
    if V_HI:
        o_hi = o_hi * inverse[:, None]
        _store_rows(o, o_hi, first_row, V_LO, end_q, o_strides[2], HEAD_DIM_V, V_HI, BLOCK_Q)
    if O_MOVES:
        r = r * inverse
        c_lo = c_lo * inverse[:, None]
        if S_MOVES:
            c_lo = c_lo - r[:, None] * o_lo
            tl.store(lse_dot + row_sums, r + mu, mask=seen)
        o_dot = _base(o_dot, o_strides, batch, head)
        _store_rows(o_dot, c_lo, first_row, first_column, end_q, o_strides[2], HEAD_DIM_V, V_LO, BLOCK_Q)
        if V_HI:
            c_hi = c_hi * inverse[:, None]
            if S_MOVES:
                c_hi = c_hi - r[:, None] * o_hi
            _store_rows(o_dot, c_hi, first_row, V_LO, end_q, o_strides[2], HEAD_DIM_V, V_HI, BLOCK_Q)
