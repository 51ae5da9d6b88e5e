"""The host side of jvpgraph.kernels.attention_kernel: from a call to a launch.

Refuses
    What `refuses` says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from jvpgraph.kernels.attention_kernel import attention_kernel
from jvpgraph.kernels.blocks import Blocks, Parts, choose_blocks, least_columns, max_head_dim, variant
from jvpgraph.kernels.call import Call, Outputs
from jvpgraph.kernels.launch import (
    addressable,
    bias_kind,
    bias_strides,
    descriptor_strides,
    fits_descriptor,
    on_device,
    strides_of,
)
from jvpgraph.kernels.layout import empty_rows
from jvpgraph.kernels.window import EVERYTHING

__all__ = ["attend", "blocks_within", "packed_blocks", "refuses"]


def refuses(call: Call) -> str | None:
    """Why the kernel does not take this call: it is for NVIDIA's GPUs from Ampere on, for at most 256 columns in half
    types and 64 in float32."""
    if call.place.kind != "cuda" or call.place.arch < 80:
        return "Triton's is for NVIDIA's GPUs from Ampere on"
    if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"Triton's takes no {call.q.dtype}"
    most = max_head_dim(call.q.dtype)
    if max(call.q.shape[-1], call.v.shape[-1]) > most:
        return f"Triton's takes {most} columns of {call.q.dtype} at most"
    if call.block_mask is not None:
        if call.window != EVERYTHING:
            return "Triton's takes no window beside a block mask"
        rows, columns = call.block_mask.tile
        if rows % 16 or columns % 16:
            return f"Triton's takes tiles of multiples of 16 queries and keys, not of {rows} x {columns}"
    return "there is nothing to compute" if call.is_empty else None


def attend(call: Call, *, blocks: Blocks | None = None, by_descriptor: bool | None = None) -> Outputs:
    """o and lse, and o_dot and lse_dot where there are tangents for them. blocks and by_descriptor are for tests and
    measurements."""
    q, k, v, q_dot, k_dot, v_dot = map(addressable, (call.q, call.k, call.v, *call.dots))
    bias, bias_dot, scale = call.bias, call.bias_dot, call.scale
    batch, heads, length_q, head_dim = q.shape
    kv_heads, length_kv, head_dim_v = v.shape[1:]

    o = empty_rows(q, length_q, head_dim_v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    o_dot = empty_rows(q, length_q, head_dim_v) if call.is_active else None
    lse_dot = torch.empty_like(lse) if call.s_active else None
    cu_q, cu_kv, sequences = None, None, 0
    if call.packing is not None:
        cu_q, cu_kv = call.packing
        sequences = cu_q.shape[0] - 1
        for x, nothing in ((o, 0.0), (lse, -math.inf), (o_dot, 0.0), (lse_dot, 0.0)):
            if x is not None:
                x.fill_(nothing)  # for rows of no sequence
    lists = None if call.block_mask is None else call.block_mask.lists(length_kv)
    left, right = call.window

    streamed = (k, k_dot, v, v_dot)
    arch = call.place.arch
    if by_descriptor is None:
        by_descriptor = 90 <= arch < 120 and all(x is None or fits_descriptor(x) for x in streamed)
    # what follows a sequence in a block that came by descriptor is cleared in registers
    is_pipelined = by_descriptor and call.packing is None and (blocks is None or blocks.num_stages > 1)
    least = least_columns(arch, (head_dim, head_dim_v), q.dtype, is_pipelined)
    if blocks is None:
        kind = variant(call.is_active, bias is not None or lists is not None)
        padded = -(-head_dim // least) * least, -(-head_dim_v // least) * least
        blocks = choose_blocks(arch, padded, q.dtype, kind, by_descriptor)
        if call.packing is not None:
            blocks = packed_blocks(blocks)
    if call.block_mask is not None:
        blocks = blocks_within(blocks, call.block_mask.tile)
    widths, widths_v, shares = blocks.split(head_dim, head_dim_v, least)
    of_streamed = (widths, widths, widths_v, widths_v)
    sources = [
        _descriptors(x, of_x, blocks.block_k) if by_descriptor else (x, None) for x, of_x in zip(streamed, of_streamed)
    ]
    tiles = triton.cdiv(length_q, blocks.block_q)
    if call.packing is not None:
        tiles = length_q // blocks.block_q + sequences if sequences else 0
    grid = (tiles * batch * heads, shares)
    with on_device(q.device):
        attention_kernel[grid](
            (q, q_dot),
            *(part for source in sources for part in source),
            bias.view(torch.uint8) if bias is not None and bias.dtype == torch.bool else bias,
            bias_dot,
            (o, lse, o_dot, lse_dot),
            cu_q,
            cu_kv,
            None if lists is None else tuple(lists),
            tuple(strides_of(x, 3) for x in (q, q_dot, *((None,) * 4 if by_descriptor else streamed), o)),
            *bias_strides(bias).values(),
            *bias_strides(bias_dot, of_tangent=True).values(),
            float(scale),
            heads,
            heads // kv_heads,
            length_q,
            length_kv,
            0 if left is None else min(left, length_q),
            0 if right is None else min(right, length_kv),
            sequences,
            *((0, 0, 0, 0) if lists is None else lists.steps()),
            HEAD_DIM=head_dim,
            HEAD_DIM_V=head_dim_v,
            WIDTHS=widths,
            WIDTHS_V=widths_v,
            SHARES=shares,
            BLOCK_Q=blocks.block_q,
            BLOCK_K=blocks.block_k,
            STAGES=blocks.num_stages,
            CUT_STAGES=blocks.cut_stages(*widths, *widths_v),
            ACTIVE=tuple(x is not None for x in (q_dot, k_dot, v_dot, bias_dot)),
            BIAS=bias_kind(bias),
            BIAS_HAS_ROWS=bias is not None and bias.shape[2] > 1,
            LIMITS=(left is not None, right is not None),
            PACKED=call.packing is not None,
            TILE=(0, 0) if call.block_mask is None else call.block_mask.tile,
            SCALE_IS_POSITIVE=scale > 0,
            BY_DESCRIPTOR=by_descriptor,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            enable_fp_fusion=True,  # the default until Triton 3.10
        )
    return Outputs(o, lse, o_dot, lse_dot)


def packed_blocks(blocks: Blocks) -> Blocks:
    """blocks for packed sequences: short ones end within a wide block of keys, and zeroing what follows takes
    registers, which on Hopper 128 keys of 64 columns do not leave."""
    return blocks._replace(block_k=min(blocks.block_k, 64))


def blocks_within(blocks: Blocks, tile: tuple[int, int]) -> Blocks:
    """blocks that divide the tiles of a block mask, with as many rows for each warp where there are that many."""
    while tile[0] % blocks.block_q:
        blocks = blocks._replace(block_q=blocks.block_q // 2, num_warps=max(4, blocks.num_warps // 2))
    while tile[1] % blocks.block_k:
        blocks = blocks._replace(block_k=blocks.block_k // 2)
    return blocks


def _descriptors(x: Tensor | None, widths: Parts, block_k: int) -> tuple[Any, Any]:
    """TMA descriptors of x [B, Hkv, Lkv, D], one for each part of its columns."""
    if x is None:
        return None, None
    strides, shape = descriptor_strides(x), list(x.shape)
    first, *second = (TensorDescriptor(x, shape, strides, [1, 1, block_k, width]) for width in widths)
    return first, second[0] if second else None
