"""The host side of jvpgraph.kernels.attention_kernel: from tensors to a launch.

Backward
    From o and lse by ATen's own kernels where those compute exactly this, else by backward_kernel or attention_blocked:
    see jvpgraph.kernels.aten_backward.
Refuses
    Nothing: `supports` says what the kernel takes, and jvpgraph.kernels.ops checks the arguments first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from jvpgraph.kernels import attention_blocked, backward_triton, tangent_backward
from jvpgraph.kernels.aten_backward import attention_backward, backward_path
from jvpgraph.kernels.attention_kernel import attention_kernel
from jvpgraph.kernels.backward_triton import why_not
from jvpgraph.kernels.blocks import Blocks, choose_blocks, least_columns, max_head_dim, variant
from jvpgraph.kernels.launch import addressable, arch_of, bias_kind, bias_strides, on_device, strides_of
from jvpgraph.kernels.layout import empty_rows
from jvpgraph.kernels.window import Window

__all__ = [
    "attention",
    "attention_backward",
    "attention_jvp",
    "attention_jvp_backward",
    "backward_path",
    "descriptor_strides",
    "fits_descriptor",
    "supports",
    "why_not",
]


def supports(q: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes tensors like these: on an NVIDIA GPU from Ampere on, of at most 256 columns in half
    types and 64 in float32."""
    return (
        torch.version.hip is None
        and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and max(q.shape[-1], v.shape[-1]) <= max_head_dim(q.dtype)
        and arch_of(q.device) >= 80
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: Window,
    scale: float,
    *,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    **overrides: Any,
) -> tuple[Tensor, Tensor]:
    """(o, lse). overrides: blocks and by_descriptor of _attend, for tests and measurements."""
    return _attend(q, k, v, (None, None, None, None), bias, window, scale, cu_seqlens, **overrides)[:2]


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    bias: Tensor | None,
    bias_dot: Tensor | None,
    window: Window,
    scale: float,
    *,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    **overrides: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, lse, o_dot, lse_dot). A tangent given as None is zero and costs nothing."""
    dots = (q_dot, k_dot, v_dot, bias_dot)
    o, lse, o_dot, lse_dot = _attend(q, k, v, dots, bias, window, scale, cu_seqlens, **overrides)
    return (
        o,
        lse,
        torch.zeros_like(o) if o_dot is None else o_dot,
        torch.zeros_like(lse) if lse_dot is None else lse_dot,
    )


def attention_jvp_backward(
    o_grad: Tensor | None,
    lse_grad: Tensor | None,
    o_dot_grad: Tensor | None,
    lse_dot_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    bias: Tensor | None,
    bias_dot: Tensor | None,
    o: Tensor,
    lse: Tensor,
    o_dot: Tensor,
    lse_dot: Tensor,
    window: Window,
    scale: float,
    bias_needs_grad: bool,
    bias_dot_needs_grad: bool,
) -> tangent_backward.Gradients:
    """As tangent_backward.attention_jvp_backward, in Triton where backward_triton supports it."""
    cotangents = o_grad, lse_grad, o_dot_grad, lse_dot_grad
    if backward_triton.supports(q, k, v, bias, bias_needs_grad=bias_needs_grad, bias_dot=bias_dot, moves=True):
        grads = backward_triton.attention_jvp_backward(
            *cotangents, q, k, v, q_dot, k_dot, v_dot, bias, o, lse, lse_dot, window, scale
        )
        return *grads, None, None
    saved, needs = (o, lse, o_dot, lse_dot), (bias_needs_grad, bias_dot_needs_grad)
    return tangent_backward.attention_jvp_backward(
        *cotangents, q, k, v, q_dot, k_dot, v_dot, bias, bias_dot, *saved, window, scale, *needs
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dots: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
    window: Window,
    scale: float,
    cu_seqlens: tuple[Tensor, Tensor] | None,
    *,
    blocks: Blocks | None = None,
    by_descriptor: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return attention_blocked._attend(q, k, v, dots, bias, window, scale, None, None)
    q, k, v, q_dot, k_dot, v_dot = map(addressable, (q, k, v, *dots[:3]))
    bias_dot = dots[3]
    batch, heads, length_q, head_dim = q.shape
    kv_heads, length_kv, head_dim_v = v.shape[1:]
    s_moves = q_dot is not None or k_dot is not None or bias_dot is not None
    o_moves = s_moves or v_dot is not None

    o = empty_rows(q, length_q, head_dim_v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    o_dot = empty_rows(q, length_q, head_dim_v) if o_moves else None
    lse_dot = torch.empty_like(lse) if s_moves else None
    cu_q, cu_kv, sequences = None, None, 0
    if cu_seqlens is not None:
        cu_q, cu_kv = cu_seqlens
        sequences = cu_q.shape[0] - 1
        for x, nothing in ((o, 0.0), (lse, -math.inf), (o_dot, 0.0), (lse_dot, 0.0)):
            if x is not None:
                x.fill_(nothing)  # for rows of no sequence
    left, right = window

    streamed = (k, k_dot, v, v_dot)
    arch = arch_of(q.device)
    if by_descriptor is None:
        by_descriptor = 90 <= arch < 120 and all(x is None or fits_descriptor(x) for x in streamed)
    # what follows a sequence in a block that came by descriptor is cleared in registers
    is_pipelined = by_descriptor and cu_seqlens is None and (blocks is None or blocks.num_stages > 1)
    least = least_columns(arch, (head_dim, head_dim_v), q.dtype, is_pipelined)
    if blocks is None:
        kind = variant(o_moves, bias is not None)
        padded = -(-head_dim // least) * least, -(-head_dim_v // least) * least
        blocks = choose_blocks(arch, padded, q.dtype, kind, by_descriptor)
        if cu_seqlens is not None:
            blocks = packed_blocks(blocks)
    d_lo, d_hi, v_lo, v_hi, v_parts = blocks.split(head_dim, head_dim_v, least)
    widths = ((d_lo, d_hi), (d_lo, d_hi), (v_lo, v_hi), (v_lo, v_hi))
    sources = [
        _sources(x, *width, blocks.block_k) if by_descriptor else (x, None) for x, width in zip(streamed, widths)
    ]
    tiles = triton.cdiv(length_q, blocks.block_q)
    if cu_seqlens is not None:
        tiles = length_q // blocks.block_q + sequences if sequences else 0
    grid = (tiles * batch * heads, v_parts)
    with on_device(q.device):
        attention_kernel[grid](
            q,
            q_dot,
            *(part for source in sources for part in source),
            bias.view(torch.uint8) if bias is not None and bias.dtype == torch.bool else bias,
            bias_dot,
            o,
            lse,
            o_dot,
            lse_dot,
            cu_q,
            cu_kv,
            strides_of(q, 3),
            strides_of(q_dot, 3),
            *(None if by_descriptor else strides_of(x, 3) for x in streamed),
            *bias_strides(bias).values(),
            *bias_strides(bias_dot, of_tangent=True).values(),
            strides_of(o, 3),
            float(scale),
            heads,
            heads // kv_heads,
            length_q,
            length_kv,
            0 if left is None else min(left, length_q),
            0 if right is None else min(right, length_kv),
            sequences,
            HEAD_DIM=head_dim,
            HEAD_DIM_V=head_dim_v,
            D_LO=d_lo,
            D_HI=d_hi,
            V_LO=v_lo,
            V_HI=v_hi,
            V_PARTS=v_parts,
            BLOCK_Q=blocks.block_q,
            BLOCK_K=blocks.block_k,
            STAGES=blocks.num_stages,
            CUT_STAGES=blocks.cut_stages(d_lo, d_hi, v_lo, v_hi),
            HAS_Q_DOT=q_dot is not None,
            HAS_K_DOT=k_dot is not None,
            HAS_V_DOT=v_dot is not None,
            BIAS=bias_kind(bias),
            BIAS_HAS_ROWS=bias is not None and bias.shape[2] > 1,
            HAS_BIAS_DOT=bias_dot is not None,
            HAS_LEFT=left is not None,
            HAS_RIGHT=right is not None,
            PACKED=cu_seqlens is not None,
            SCALE_IS_POSITIVE=scale > 0,
            BY_DESCRIPTOR=by_descriptor,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            enable_fp_fusion=True,  # the default until Triton 3.10
        )
    return o, lse, o_dot, lse_dot


def packed_blocks(blocks: Blocks) -> Blocks:
    """blocks for packed sequences: short ones end within a wide block of keys, and zeroing what follows takes
    registers, which on Hopper 128 keys of 64 columns do not leave."""
    return blocks._replace(block_k=min(blocks.block_k, 64))


def fits_descriptor(x: Tensor) -> bool:
    """What the hardware asks: aligned to 16 bytes, in every row too, and no dim that broadcasts.

    float32 does not gain, for its products are not on the matrix units.
    """
    size = x.element_size()
    return (
        x.dtype != torch.float32
        and x.data_ptr() % 16 == 0
        and all(
            length == 1 or (stride > 0 and stride * size % 16 == 0 and stride * size < 1 << 40)
            for length, stride in zip(x.shape[:3], x.stride())
        )
    )


def descriptor_strides(x: Tensor) -> list[int]:
    """The strides of x [B, H, L, D], but 16 where a dim of size one makes them mean nothing: they are checked."""
    return [16 if length == 1 else stride for length, stride in zip(x.shape[:3], x.stride())] + [1]


def _sources(x: Tensor | None, lo: int, hi: int, block_k: int) -> tuple[Any, Any]:
    """TMA descriptors of x [B, Hkv, Lkv, D], one for each part of its columns."""
    if x is None:
        return None, None
    strides, shape = descriptor_strides(x), list(x.shape)
    return (
        TensorDescriptor(x, shape, strides, [1, 1, block_k, lo]),
        TensorDescriptor(x, shape, strides, [1, 1, block_k, hi]) if hi else None,
    )
