# mypy: disallow-untyped-defs=False
"""Attention and its JVP for Hopper with warps of different jobs: one loads, two groups of four multiply.

Math, Streaming form, Precision
    Those of jvpgraph.kernels.attention_kernel, which is the specification of this kernel: Gluon cannot be interpreted.
    Keys are visited in another order. First come the last BLOCK_K of them, those masked that whole blocks counted from
    key 0 cover too; so no other block needs a mask, and the accumulators start from a product instead of from zeros.
Roles
    One warp asks the TMA for everything. Two warpgroups take 64 queries each; while one of them is at its softmax, the
    products of the other keep the matrix units busy. Both read each block of keys from the same place.
Handshake
    Each of the STAGES places for keys (k and k_dot) and for values (v and v_dot) has two barriers. `full` counts the
    one arrival of the loader and its bytes; TMA delivers whole boxes, zeros outside of the tensor, so the bytes are the
    same at the ends. `empty` counts one arrival of each warpgroup. Use n of a place completes phase n of both; parity
    n & 1 of `full` is awaited to read it, and parity (n + 1) & 1 of `empty` to fill it, which a new barrier grants.
Shapes
    As in attention_kernel, q [B, H, Lq, D], with D = Dv at most 128, padded to 64 or 128 by the TMA, which stores no
    padding either. Lengths and counts are run-time values.
Refuses
    What `refuses` says.
Source
    Shah et al., FlashAttention-3 (2024), for the roles.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from jvpgraph.kernels.blocks import GLUON_IS_FASTER, GLUON_TABLE, GLUON_VALUE_FROM, GluonBlocks, gluon_blocks
from jvpgraph.kernels.call import Call, Outputs
from jvpgraph.kernels.launch import descriptor_strides, fits_descriptor, on_device
from jvpgraph.kernels.layout import empty_rows
from jvpgraph.kernels.window import EVERYTHING

__all__ = ["attend", "refuses", "unproven"]

LOG2E = gl.constexpr(math.log2(math.e))
LN2 = gl.constexpr(math.log(2))
LEAST = gl.constexpr(1e-30)  # see tiles
ROWS = gl.constexpr(64)  # queries of a warpgroup: the M of wgmma
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# Names of Triton 3.9 and 3.6.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


# ---------------------------------------------------------------------------------------------------- kernel


@gluon.jit
def _locate(heads, length_q):
    """(batch, head, first row) of this program's queries. Each role computes them where it needs them: over the loop
    they would take registers."""
    tiles = (length_q + 2 * ROWS - 1) // (2 * ROWS)
    batch_head = gl.program_id(0) // tiles
    return batch_head // heads, batch_head % heads, gl.program_id(0) % tiles * (2 * ROWS)


@gluon.jit
def _produce(
    loads,
    STAGES: gl.constexpr,
    HAS_Q_DOT: gl.constexpr,
    HAS_K_DOT: gl.constexpr,
    HAS_V_DOT: gl.constexpr,
):
    """Everything into shared memory: the queries once, then keys and values block by block."""
    sources, buffers, barriers, heads, group, length_q, length_kv = loads
    q, q_dot, k, k_dot, v, v_dot = sources
    q_to, q_dot_to, k_to, k_dot_to, v_to, v_dot_to = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    batch, head, first_row = _locate(heads, length_q)
    head_kv = head // group
    BLOCK_K: gl.constexpr = k.block_shape[2]
    ROW_BYTES: gl.constexpr = k.block_shape[3] * 2
    mbarrier.expect(q_full, 2 * ROWS * ROW_BYTES * (1 + HAS_Q_DOT))
    for part in gl.static_range(2):
        _load(q, [batch, head, first_row + part * ROWS, 0], q_full, q_to.index(part))
        if HAS_Q_DOT:
            _load(q_dot, [batch, head, first_row + part * ROWS, 0], q_full, q_dot_to.index(part))
    for block in range((length_kv + BLOCK_K - 1) // BLOCK_K):
        place = block % STAGES
        parity = (block // STAGES) & 1
        key = gl.where(block == 0, length_kv - BLOCK_K, (block - 1) * BLOCK_K)
        full = k_full.index(place)
        mbarrier.wait(k_empty.index(place), parity ^ 1)
        mbarrier.expect(full, BLOCK_K * ROW_BYTES * (1 + HAS_K_DOT))
        _load(k, [batch, head_kv, key, 0], full, k_to.index(place))
        if HAS_K_DOT:
            _load(k_dot, [batch, head_kv, key, 0], full, k_dot_to.index(place))
        full = v_full.index(place)
        mbarrier.wait(v_empty.index(place), parity ^ 1)
        mbarrier.expect(full, BLOCK_K * ROW_BYTES * (1 + HAS_V_DOT))
        _load(v, [batch, head_kv, key, 0], full, v_to.index(place))
        if HAS_V_DOT:
            _load(v_dot, [batch, head_kv, key, 0], full, v_dot_to.index(place))


@gluon.jit
def _weigh(p, s_dot, sums, scale, FIRST: gl.constexpr, OF_ROWS: gl.constexpr):
    """h, centred by the mean of s_dot over this block, and (r, c, mu) as they are when centred likewise: see
    attention_kernel. sums: (sum of p over this block, l, r, o, c, mu), the others without this block."""
    of_block, l, r, o, c, mu = sums
    mean = gl.sum(p * s_dot, 1) * (scale / of_block)
    if not FIRST:
        mean = gl.where(of_block > LEAST, mean, mu)
        step = mean - mu
        r = r - step * l
        c = c - gl.expand_dims(gl.convert_layout(step, gl.SliceLayout(1, OF_ROWS)), 1) * o
    return p * (s_dot * scale - gl.expand_dims(mean, 1)), r, c, mean


@gluon.jit
def _visit(
    state,
    queries,
    buffers,
    barriers,
    block,
    hidden,
    scale,
    FIRST: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_Q_DOT: gl.constexpr,
    HAS_K_DOT: gl.constexpr,
    HAS_V_DOT: gl.constexpr,
):
    """The sums after one more block of keys. FIRST: there are none yet, and the first `hidden` keys of the block are
    not to be seen. The products of p wait for s_dot: to centre anew takes o as it was before them."""
    m, l, r, o, c, mu = state
    q, q_dot = queries
    keys, keys_dot, values, values_dot = buffers
    k_full, k_empty, v_full, v_empty = barriers
    S_ACTIVE: gl.constexpr = HAS_Q_DOT or HAS_K_DOT
    O_ACTIVE: gl.constexpr = S_ACTIVE or HAS_V_DOT
    BLOCK_K: gl.constexpr = keys.shape[3]
    WIDTH: gl.constexpr = keys.shape[4]
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    OF_ROWS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OF_ROWS, 2)

    place = block % STAGES
    parity = (block // STAGES) & 1
    nothing = gl.zeros([ROWS, BLOCK_K], gl.float32, OF_SCORES)

    mbarrier.wait(k_full.index(place), parity)
    k = keys.index(place).reshape([BLOCK_K, WIDTH]).permute((1, 0))
    s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    if HAS_Q_DOT:
        s_dot = warpgroup_mma(q_dot, k, nothing, use_acc=False, is_async=True)
    if HAS_K_DOT:
        k_dot = keys_dot.index(place).reshape([BLOCK_K, WIDTH]).permute((1, 0))
        if HAS_Q_DOT:
            s_dot = warpgroup_mma(q, k_dot, s_dot, is_async=True)
        else:
            s_dot = warpgroup_mma(q, k_dot, nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(HAS_Q_DOT + HAS_K_DOT, deps=(s,))
    log2_scale = scale * LOG2E
    if FIRST:
        columns = gl.arange(0, BLOCK_K, gl.SliceLayout(0, OF_SCORES))
        s = gl.where(gl.expand_dims(columns, 0) >= hidden, s, -float("inf"))
        m_new = gl.max(s, 1) * log2_scale
    else:
        m_new = gl.maximum(m, gl.max(s, 1) * log2_scale)
    p = gl.exp2(s * log2_scale - gl.expand_dims(m_new, 1))
    of_block = gl.sum(p, 1)
    if not FIRST:
        alpha = gl.exp2(m - m_new)
        l = l * alpha
        r = r * alpha
        alpha_of_rows = gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, OF_ROWS)), 1)
        o = o * alpha_of_rows
        if O_ACTIVE:
            c = c * alpha_of_rows
    if S_ACTIVE:
        s_dot = warpgroup_mma_wait(0, deps=(s_dot,))
    mbarrier.arrive(k_empty.index(place), count=1)
    if S_ACTIVE:
        h, r, c, mu = _weigh(p, s_dot, (of_block, l, r, o, c, mu), scale, FIRST, OF_ROWS)
        h = gl.convert_layout(h.to(values.dtype), OPERAND)
    l = l + of_block
    p_operand = gl.convert_layout(p.to(values.dtype), OPERAND)

    mbarrier.wait(v_full.index(place), parity)
    v = values.index(place).reshape([BLOCK_K, WIDTH])
    o = warpgroup_mma(p_operand, v, o, use_acc=not FIRST, is_async=True)
    if HAS_V_DOT:
        v_dot = values_dot.index(place).reshape([BLOCK_K, WIDTH])
        c = warpgroup_mma(p_operand, v_dot, c, use_acc=not FIRST, is_async=True)
    if S_ACTIVE:
        c = warpgroup_mma(h, v, c, use_acc=HAS_V_DOT or not FIRST, is_async=True)
    # to leave these in flight over the edge of the loop makes ptxas serialise all products
    o, c = warpgroup_mma_wait(0, deps=(o, c))
    mbarrier.arrive(v_empty.index(place), count=1)
    return m_new, l, r, o, c, mu


@gluon.jit
def _consume(
    work,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_Q_DOT: gl.constexpr,
    HAS_K_DOT: gl.constexpr,
    HAS_V_DOT: gl.constexpr,
):
    """64 queries, from their products with keys to the outputs."""
    targets, buffers, barriers, heads, length_q, length_kv, scale = work
    o_to, lse_to, o_dot_to, lse_dot_to = targets
    q_all, q_dot_all, keys, keys_dot, values, values_dot = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    S_ACTIVE: gl.constexpr = HAS_Q_DOT or HAS_K_DOT
    O_ACTIVE: gl.constexpr = S_ACTIVE or HAS_V_DOT
    BLOCK_K: gl.constexpr = keys.shape[3]
    WIDTH: gl.constexpr = keys.shape[4]
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    OF_ROWS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    SUMS: gl.constexpr = gl.SliceLayout(1, OF_SCORES)

    q = q_all.index(GROUP).reshape([ROWS, WIDTH])
    q_dot = q_dot_all.index(GROUP).reshape([ROWS, WIDTH])
    queries = (q, q_dot)
    streamed = (keys, keys_dot, values, values_dot)
    handshake = (k_full, k_empty, v_full, v_empty)
    none = gl.zeros([ROWS], gl.float32, SUMS)
    start = gl.zeros([ROWS, WIDTH], gl.float32, OF_ROWS)
    state = (none, none, none, start, start, none)
    blocks = (length_kv + BLOCK_K - 1) // BLOCK_K
    whole = (blocks - 1) * BLOCK_K  # keys that come after the first block
    hidden = whole - (length_kv - BLOCK_K)
    mbarrier.wait(q_full, 0)
    m, l, r, o, c, mu = _visit(
        state,
        queries,
        streamed,
        handshake,
        0,
        hidden,
        scale,
        True,
        STAGES,
        HAS_Q_DOT,
        HAS_K_DOT,
        HAS_V_DOT,
    )
    for block in range(1, blocks):
        m, l, r, o, c, mu = _visit(
            (m, l, r, o, c, mu),
            queries,
            streamed,
            handshake,
            block,
            hidden,
            scale,
            False,
            STAGES,
            HAS_Q_DOT,
            HAS_K_DOT,
            HAS_V_DOT,
        )

    batch, head, first_row = _locate(heads, length_q)
    first_row += GROUP * ROWS
    rows = first_row + gl.arange(0, ROWS, SUMS)
    inside = rows < length_q
    row_sums = (batch * heads + head).to(gl.int64) * length_q + rows
    inverse = 1.0 / l
    gl.store(lse_to + row_sums, (m + gl.log2(l)) * LN2, mask=inside)
    o = o * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, OF_ROWS)), 1)
    # the queries have been read by all four warps, and the tiles of shared memory take the outputs
    _barrier()
    q.store(o.to(values.dtype))
    if O_ACTIVE:
        c = c * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, OF_ROWS)), 1)
        if S_ACTIVE:
            r = r * inverse
            gl.store(lse_dot_to + row_sums, r + mu, mask=inside)
            c = c - gl.expand_dims(gl.convert_layout(r, gl.SliceLayout(1, OF_ROWS)), 1) * o
        q_dot.store(c.to(values.dtype))
    fence_async_shared()
    _store(o_to, [batch, head, first_row, 0], q_all.index(GROUP))
    if O_ACTIVE:
        _store(o_dot_to, [batch, head, first_row, 0], q_dot_all.index(GROUP))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "group", "length_q", "length_kv"])
def attention_jvp_kernel(
    q,
    q_dot,
    k,
    k_dot,
    v,
    v_dot,
    o,
    lse,
    o_dot,
    lse_dot,
    scale,
    heads,
    group,
    length_q,
    length_kv,
    STAGES: gl.constexpr,
    HAS_Q_DOT: gl.constexpr,
    HAS_K_DOT: gl.constexpr,
    HAS_V_DOT: gl.constexpr,
):
    """128 queries of one head. All but lse, lse_dot are descriptors of [B, H, L, D]; that of an absent tangent, and
    lse_dot where s is not active, stand for nothing and are not read. Without any tangent, nor is o_dot."""
    BLOCK_K: gl.constexpr = k.block_shape[2]
    WIDTH: gl.constexpr = k.block_shape[3]

    # q_dot's takes o_dot in the end, whether there is a q_dot or not
    q_buffer = gl.allocate_shared_memory(q.dtype, [2, 1, 1, ROWS, WIDTH], q.layout)
    q_dot_buffer = gl.allocate_shared_memory(q.dtype, [2, 1, 1, ROWS, WIDTH], q.layout)
    k_buffer = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_K, WIDTH], k.layout)
    v_buffer = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_K, WIDTH], k.layout)
    k_dot_buffer = k_buffer
    v_dot_buffer = v_buffer
    if HAS_K_DOT:
        k_dot_buffer = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_K, WIDTH], k.layout)
    if HAS_V_DOT:
        v_dot_buffer = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_K, WIDTH], k.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for place in gl.static_range(STAGES):
        mbarrier.init(k_full.index(place), count=1)
        mbarrier.init(k_empty.index(place), count=2)
        mbarrier.init(v_full.index(place), count=1)
        mbarrier.init(v_empty.index(place), count=2)
    fence_async_shared()

    sources = (q, q_dot, k, k_dot, v, v_dot)
    targets = (o, lse, o_dot, lse_dot)
    buffers = (q_buffer, q_dot_buffer, k_buffer, k_dot_buffer, v_buffer, v_dot_buffer)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    loads = (sources, buffers, barriers, heads, group, length_q, length_kv)
    work = (targets, buffers, barriers, heads, length_q, length_kv, scale)
    gl.warp_specialize(
        [
            (_consume, (work, 0, STAGES, HAS_Q_DOT, HAS_K_DOT, HAS_V_DOT)),
            (_consume, (work, 1, STAGES, HAS_Q_DOT, HAS_K_DOT, HAS_V_DOT)),
            (_produce, (loads, STAGES, HAS_Q_DOT, HAS_K_DOT, HAS_V_DOT)),
        ],
        [4, 1],  # warps of the second warpgroup and of the loader
        [240, 24],  # their registers per thread; the first warpgroup is left 240 of the 3 x 168
    )


# -------------------------------------------------------------------------------------------- host functions


def refuses(call: Call) -> str | None:
    """Why the kernel does not take this call: it is for Hopper, for half types, for as many columns in v as in q, a
    multiple of 8 up to 128, for every key seen by every query of its head, and for no bias; of the value alone, for as
    many columns as it has been faster at."""
    tensors = {"q": call.q, "k": call.k, "v": call.v} | dict(zip(("q_dot", "k_dot", "v_dot"), call.dots))
    columns, most = call.q.shape[-1], max(entry.head_dim for entry in GLUON_TABLE)
    if call.place != ("cuda", 90):
        return "Gluon's is for Hopper"
    if call.q.dtype not in TYPES:
        return f"Gluon's takes no {call.q.dtype}"
    if columns != call.v.shape[-1] or columns % 8 or not 0 < columns <= most:
        return f"Gluon's takes as many columns in v as in q, a multiple of 8 up to {most}"
    if call.bias is not None or call.bias_dot is not None or call.window != EVERYTHING or call.packing is not None:
        return "Gluon's takes no mask, no window and no packed sequences"
    if call.block_mask is not None:
        return "Gluon's takes no block mask"
    if not call.scale > 0:
        return f"scale is {call.scale}"
    if not call.is_active and columns < GLUON_VALUE_FROM:
        return f"Gluon's is slower than Triton's for the value alone below {GLUON_VALUE_FROM} columns"
    if call.is_empty:
        return "there is nothing to compute"
    bad = [name for name, x in tensors.items() if x is not None and not (x.stride(3) == 1 and fits_descriptor(x))]
    return f"{', '.join(bad)} cannot be loaded by the TMA: broadcast, misaligned or transposed" if bad else None


def unproven(call: Call) -> str | None:
    """Why it is not the first choice for a call that it takes, where no GPU like this one has shown it to be faster at
    such a head dim and dtype."""
    if (call.place.arch, call.q.shape[-1], call.q.dtype) in GLUON_IS_FASTER:
        return None
    return f"no GPU has shown Gluon's to be faster at {call.q.shape[-1]} columns of {call.q.dtype}"


def attend(call: Call, *, blocks: GluonBlocks | None = None) -> Outputs:
    """o and lse, and o_dot and lse_dot where there are tangents for them. blocks are for tests and measurements."""
    q, k, v = call.q, call.k, call.v
    q_dot, k_dot, v_dot = call.dots
    batch, heads, length_q, head_dim = q.shape
    kv_heads, length_kv = k.shape[1:3]
    o = empty_rows(q, length_q, head_dim)
    o_dot = empty_rows(q, length_q, head_dim) if call.is_active else o
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    lse_dot = torch.empty_like(lse) if call.s_active else lse
    width, of_table = gluon_blocks(head_dim, 2 + (k_dot is not None) + (v_dot is not None), call.is_active)
    blocks = blocks or of_table
    operands = (q, q if q_dot is None else q_dot), (k, k if k_dot is None else k_dot, v, v if v_dot is None else v_dot)
    with on_device(q.device):
        attention_jvp_kernel[(triton.cdiv(length_q, 2 * ROWS.value) * batch * heads,)](
            *(_descriptor(x, ROWS.value, width) for x in operands[0]),
            *(_descriptor(x, blocks.block_k, width) for x in operands[1]),
            _descriptor(o, ROWS.value, width),
            lse,
            _descriptor(o_dot, ROWS.value, width),
            lse_dot,
            float(call.scale),
            heads,
            heads // kv_heads,
            length_q,
            length_kv,
            STAGES=blocks.stages,
            HAS_Q_DOT=q_dot is not None,
            HAS_K_DOT=k_dot is not None,
            HAS_V_DOT=v_dot is not None,
            num_warps=4,
            enable_fp_fusion=True,  # the default until Triton 3.10
        )
    return Outputs(o, lse, o_dot if call.is_active else None, lse_dot if call.s_active else None)


def layout_of(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How the TMA writes a box of [1, 1, rows, width], and wgmma reads it."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], TYPES[dtype])


def _descriptor(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    layout = layout_of(rows, width, x.dtype)
    return TensorDescriptor(x, list(x.shape), descriptor_strides(x), [1, 1, rows, width], layout)
