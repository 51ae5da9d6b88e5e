"""The host side of jvpgraph.kernels.backward_kernel: from a call to three launches or four.

Refuses
    What `refuses` says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from jvpgraph.kernels.backward_kernel import keys_kernel, queries_kernel
from jvpgraph.kernels.blocks import Sweeps, backward_sweeps, parts_of_head_dim
from jvpgraph.kernels.call import Call, Cotangents, Gradients, Outputs
from jvpgraph.kernels.launch import addressable, bias_kind, bias_strides, on_device, strides_of
from jvpgraph.kernels.layout import empty_rows
from jvpgraph.kernels.tiles import TILE_STEPS
from jvpgraph.kernels.window import EVERYTHING

__all__ = ["differentiate", "refuses", "row_bytes"]


def refuses(call: Call) -> str | None:
    """Why the kernels do not take the backward of this call: they are for half types, for head dims that the table has
    room for, and give a bias no gradient and take no tangent of one."""
    arch, columns = call.place.arch, max(call.q.shape[-1], call.v.shape[-1])
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"Triton's takes no {call.q.dtype}"
    if call.wanted.bias or (call.through_tangent and call.bias_dot is not None):
        return "Triton's gives a bias no gradient, and takes no tangent of one"
    if call.packing is not None:
        return "Triton's takes no packed sequences"
    if call.block_mask is not None and call.window != EVERYTHING:
        return "Triton's takes no window beside a block mask"
    if call.is_empty:
        return "there is nothing to compute"
    sweeps = backward_sweeps(arch, columns, call.through_tangent, row_bytes(call.bias))
    if sweeps is not None and call.block_mask is not None and not _divide(sweeps, *call.block_mask.tile):
        return f"Triton's has no blocks that divide tiles of {' x '.join(map(str, call.block_mask.tile))}"
    if sweeps is None:
        mask = f" with a {call.bias.dtype} mask of rows" if call.bias is not None and row_bytes(call.bias) else ""
        return f"Triton's has no tile that fits sm_{arch} at {columns} columns{mask}"
    return None


def _divide(sweeps: Sweeps, rows: int, columns: int) -> bool:
    """Whether the blocks of all sweeps divide the tiles of a block mask."""
    return all(blocks is None or (rows % blocks.block_q == 0 and columns % blocks.block_k == 0) for blocks in sweeps)


def row_bytes(bias: Tensor | None) -> int:
    """Of an element, if the bias differs from query to query, so that tiles of it are staged; else 0."""
    return bias.element_size() if bias is not None and bias.shape[2] > 1 else 0


def differentiate(call: Call, outs: Outputs, grads: Cotangents, *, sweeps: Sweeps | None = None) -> Gradients:
    """The gradients of q, k and v and of their tangents. sweeps are for tests and measurements."""
    assert call.packing is None
    q, k, v, bias, scale = call.q, call.k, call.v, call.bias, call.scale
    o, lse, lse_grad, lse_dot_grad = outs.o, outs.lse, grads.lse, grads.lse_dot
    dots = call.dots
    active = (grads.o_dot is not None or lse_dot_grad is not None) and any(x is not None for x in dots)
    dq, dk, dv = (empty_rows(x, x.shape[2], x.shape[3]) for x in (q, k, v))
    dq_dot, dk_dot, dv_dot = (None if x is None else empty_rows(x, x.shape[2], x.shape[3]) for x in dots)
    if not active:
        for x in (dq_dot, dk_dot, dv_dot):
            if x is not None:
                x.zero_()
        dots = (None, None, None)
    o_grad = torch.zeros_like(o) if grads.o is None else grads.o
    o_dot_grad = torch.zeros_like(o) if active and grads.o_dot is None else grads.o_dot
    k_dot = dots[1]
    inputs = tuple(map(addressable, (q, k, v, *dots, o_grad, o_dot_grad if active else None)))
    batch, heads, length_q, head_dim = q.shape
    kv_heads, length_kv, head_dim_v = v.shape[1:]
    sums = _row_sums(lse, lse_grad, lse_dot_grad, outs.lse_dot if active else None)
    centre = torch.stack([x.float().mean(2) for x in (k, k if k_dot is None else k_dot)]) if active else None

    left, right = call.window
    common: dict[str, Any] = {
        "inputs": inputs,
        "bias": bias.view(torch.uint8) if bias is not None and bias.dtype == torch.bool else bias,
        "sums": sums,
        "strides": tuple(strides_of(x, 3) for x in inputs),
        **bias_strides(bias),
        "scale": float(scale),
        "heads": heads,
        "group": heads // kv_heads,
        "length_q": length_q,
        "length_kv": length_kv,
        "left": 0 if left is None else min(left, length_q),
        "right": 0 if right is None else min(right, length_kv),
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "WIDTHS": parts_of_head_dim(head_dim),
        "WIDTHS_V": parts_of_head_dim(head_dim_v),
        "ACTIVE": tuple(x is not None for x in dots),
        "TANGENT": active,
        "BIAS": bias_kind(bias),
        "BIAS_HAS_ROWS": bias is not None and bias.shape[2] > 1,
        "LIMITS": (left is not None, right is not None),
        "TILE": (0, 0) if call.block_mask is None else call.block_mask.tile,
    }
    by_query, by_key_lists = _walks(call)
    sweeps = sweeps or backward_sweeps(call.place.arch, max(head_dim, head_dim_v), active, row_bytes(bias))
    assert sweeps is not None
    of_queries = (dq, dq_dot if active else None)
    of_keys = (dk, dv, *((dk_dot, dv_dot) if active else (None, None)))
    with on_device(q.device):
        for blocks, sums_only in ((sweeps.sums, True), (sweeps.queries, False)):
            queries_kernel[(triton.cdiv(length_q, blocks.block_q) * batch * heads,)](
                **common,
                **by_query,
                o=addressable(o),
                centre=centre,
                grads=of_queries,
                o_strides=strides_of(o, 3),
                grad_strides=tuple(strides_of(x, 3) for x in of_queries),
                SUMS=sums_only,
                **blocks.options(),
            )
        by_key = [(sweeps.keys, True, sweeps.values is None)]
        if sweeps.values is not None:
            by_key.append((sweeps.values, False, True))
        for blocks, has_dk, has_dv in by_key:
            keys_kernel[(triton.cdiv(length_kv, blocks.block_k) * batch * kv_heads,)](
                **common,
                **by_key_lists,
                grads=of_keys,
                grad_strides=tuple(strides_of(x, 3) for x in of_keys),
                HAS_DK=has_dk,
                HAS_DV=has_dv,
                **blocks.options(),
            )
    return Gradients(dq, dk, dv, dq_dot, dk_dot, dv_dot)


def _walks(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernels take of a block mask, by rows of its tiles and by columns."""
    if call.block_mask is None:
        nothing = {"tiles": None, **dict.fromkeys(TILE_STEPS, 0)}
        return nothing, nothing
    by_row = call.block_mask.lists()
    by_column = call.block_mask._replace(map=call.block_mask.map.transpose(2, 3)).lists()
    first, second = ({"tiles": tuple(x), **dict(zip(TILE_STEPS, x.steps()))} for x in (by_row, by_column))
    return first, second


def _row_sums(lse: Tensor, lse_grad: Tensor | None, lse_dot_grad: Tensor | None, lse_dot: Tensor | None) -> Tensor:
    """[5, B, H, Lq] as queries_kernel takes it: lse in units of log 2, the gradients of lse and lse_dot, lse_dot."""
    blind = lse == -math.inf  # a merge of parts may have no gradient there but NaN
    sums = lse.new_zeros(5, *lse.shape)
    sums[0] = (lse * math.log2(math.e)).masked_fill(blind, math.inf)
    for field, x in zip(sums[1:], (lse_grad, lse_dot_grad, lse_dot)):
        if x is not None:
            field.copy_(x).masked_fill_(blind, 0)
    return sums
