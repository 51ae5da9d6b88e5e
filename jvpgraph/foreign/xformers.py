"""xformers' memory_efficient_attention, and that of mslk, to where it moved, with the masks that are objects.

A mask is known by the name of its class, and only its tensors are read, so that lengths may change from call to call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jvpgraph.foreign.attend import attend, attend_packed, tiles_of_sequences
from jvpgraph.foreign.table import check_options, refuse, swaps

__all__: list[str] = []

NAME = "memory_efficient_attention"
OF_PAIRS = {  # causal, and whether positions are counted from the end
    "LowerTriangularMask": (True, False),
    "LowerTriangularMaskWithTensorBias": (True, False),
    "LowerTriangularFromBottomRightMask": (True, True),
    "LowerTriangularFromBottomRightLocalAttentionMask": (True, True),
    "LocalAttentionFromBottomRightMask": (False, True),
}
OF_SEQUENCES = {
    "BlockDiagonalMask": (False, False),
    "BlockDiagonalCausalMask": (True, False),
    "BlockDiagonalCausalFromBottomRightMask": (True, True),
    "BlockDiagonalCausalLocalAttentionMask": (True, False),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (True, True),
}
OF_SEQUENCES_WITH_GAPS = {  # causal; positions are counted from the end
    "BlockDiagonalPaddedKeysMask": False,
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": True,
    "BlockDiagonalLocalAttentionPaddedKeysMask": False,
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": True,
    "BlockDiagonalGappyKeysMask": False,
    "BlockDiagonalCausalWithOffsetGappyKeysMask": True,
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask": False,
}
MASKS = "xformers.ops.fmha.attn_bias", "mslk.attention.fmha.attn_bias"
FUNCTIONS = "xformers.ops", "xformers.ops.fmha", "mslk.attention.fmha"


def _of_masks(*names: str) -> list[str]:
    return [f"{module}.{name}" for module in MASKS for name in names]


class LowerTriangularMask:
    """Theirs is a wrapper of a tensor in newer versions, which Dynamo does not make."""

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def __init__(self, bias: Tensor) -> None:
        self._bias = bias


# Functions make them: Dynamo knows a class of ours by where it finds it, which here is in their globals.
@swaps(*_of_masks("LowerTriangularMask"))
def new_mask(*_: Any, **__: Any) -> LowerTriangularMask:
    return LowerTriangularMask()


@swaps(*_of_masks("LowerTriangularMaskWithTensorBias"))
def new_mask_with_bias(bias: Tensor) -> LowerTriangularMaskWithTensorBias:
    return LowerTriangularMaskWithTensorBias(bias)


@swaps(*_of_masks("_AddDenseBias"))
def add_bias(causal_bias: Any, tensor: Tensor) -> LowerTriangularMaskWithTensorBias:
    """What add_bias of theirs calls, where the mask was made outside of the graph."""
    return LowerTriangularMaskWithTensorBias(tensor)


@swaps(*(f"{module}.{NAME}" for module in FUNCTIONS))
def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    scale: float | None = None,
    output_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """[B, M, K], [B, M, H, K], or [B, M, G, H, K]; the result has the shape of the query."""
    check_options(NAME, options)
    grouped = query.dim() == 5
    if query.dim() == 3:
        q, k, v = query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    elif grouped:
        q, k, v = query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)
    else:
        q, k, v = query, key, value
    o = _with_bias(q, k, v, attn_bias, scale, query.dim())
    if query.dim() == 3:
        o = o.squeeze(2)
    elif grouped:
        o = o.unflatten(2, (query.shape[2], query.shape[3]))
    return o if output_dtype is None else o.to(output_dtype)


def _with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float | None, rank: int) -> Tensor:
    if bias is None:
        return attend(q, k, v, scale=scale)[0]
    kind = type(bias).__name__
    if kind in OF_PAIRS:
        causal, from_the_end = OF_PAIRS[kind]
        added = _of_rank_4(_added(bias), rank) if kind == "LowerTriangularMaskWithTensorBias" else None
        return attend(q, k, v, added, causal, scale, _window(bias), from_the_end)[0]
    if kind in OF_SEQUENCES or kind in OF_SEQUENCES_WITH_GAPS:
        if q.shape[0] != 1:
            refuse(NAME, "attn_bias", f"a {kind} needs sequences one after the other, in a batch of 1")
        return _of_sequences(q, k, v, bias, scale, kind)
    if isinstance(bias, torch.Tensor):
        if bias.dtype == torch.bool:
            refuse(NAME, "attn_bias", "xformers adds the bias to the scores, and a boolean one means something else")
        return attend(q, k, v, _of_rank_4(bias, rank), scale=scale)[0]
    refuse(NAME, "attn_bias", f"{kind} is a mask that our version of the function does not know")


def _added(bias: Any) -> Tensor:
    """What a mask adds to the scores, which versions keep in one place or the other."""
    tensor: Tensor = bias._subtensor if hasattr(bias, "_subtensor") else bias._bias
    return tensor


def _of_rank_4(bias: Tensor, rank: int) -> Tensor:
    """[B, H, Mq, Mk] of a bias for queries of this rank."""
    if rank == 3 and bias.dim() == 3:
        return bias.unsqueeze(1)
    return bias.flatten(1, 2) if rank == 5 and bias.dim() == 5 else bias


def _window(bias: Any) -> tuple[int, int]:
    """(left, right), which a mask may have; a window of n keys ends at the query."""
    if hasattr(bias, "window_left"):
        return bias.window_left, bias.window_right
    return (bias._window_size - 1, -1) if hasattr(bias, "_window_size") else (-1, -1)


def _of_sequences(q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float | None, kind: str) -> Tensor:
    of_q, of_k = bias.q_seqinfo, bias.k_seqinfo
    left, right = _window(bias)
    if kind in OF_SEQUENCES:
        causal, from_the_end = OF_SEQUENCES[kind]
        starts = of_q.seqstart, of_q.seqstart if of_k is of_q else of_k.seqstart
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
        return attend_packed(q, k, v, *starts, causal, scale, (left, right), from_the_end)[0].unsqueeze(0)
    n = of_k.seqlen.shape[0]
    starts = of_q.seqstart[:-1], of_k.seqstart[:n]
    ends = of_q.seqstart[1:], of_k.seqstart[:n] + of_k.seqlen
    window = left, 0 if OF_SEQUENCES_WITH_GAPS[kind] else right
    return attend(q, k, v, tiles=tiles_of_sequences(starts, ends, q.shape[1], k.shape[1], window), scale=scale)[0]
