"""What the attention ops refuse, and how they say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = [
    "check_block_map",
    "check_how",
    "check_operands",
    "check_outputs",
    "check_sequences",
    "check_strides",
    "check_tangents",
    "refusal",
]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _surely(condition: bool | torch.SymBool) -> bool:
    """Whether a refusal applies; of symbolic sizes only what is certain, so that they get no guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def refusal(what: str, **given: Tensor | None) -> ValueError:
    shown = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in given.items() if x is not None)
    return ValueError(f"{what}; got {shown}")


def check_operands(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    given = {"q": q, "k": k, "v": v, "bias": bias}
    rank = q.dim()
    if rank < 3 or k.dim() != rank or v.dim() != rank:
        raise refusal("attention needs q, k, v of one rank, [batch, (heads,) length, dim] or more", **given)
    if q.dtype not in FLOAT_DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise refusal(f"attention needs q, k, v of one dtype among {FLOAT_DTYPES}", **given)
    if k.device != q.device or v.device != q.device:
        raise refusal(f"attention needs q, k, v on one device, not on {q.device}, {k.device}, {v.device}", **given)
    if _surely(q.shape[-1] != k.shape[-1]):
        raise refusal("attention needs q and k of one head dim", **given)
    if _surely(k.shape[-2] != v.shape[-2]):
        raise refusal("attention needs k and v of one length", **given)
    for i in range(1 if rank == 3 else rank - 3):
        if _surely(q.shape[i] != k.shape[i]) or _surely(q.shape[i] != v.shape[i]):
            raise refusal("attention does not broadcast batch dims: q, k, v must agree in them", **given)
    if rank > 3:
        _check_heads(q.shape[-3], k.shape[-3], v.shape[-3], given)
    if bias is not None:
        _check_bias(q, k, bias, given)


def _check_heads(heads: int, kv_heads: int, v_heads: int, given: dict[str, Tensor | None]) -> None:
    if _surely(v_heads != kv_heads):
        raise refusal("attention needs as many heads in v as in k", **given)
    if _surely(heads == kv_heads):
        return
    if _surely(kv_heads == 0) or _surely(heads % kv_heads != 0):
        raise refusal("attention needs the number of heads of k and v to divide that of q", **given)


def _check_bias(q: Tensor, k: Tensor, bias: Tensor, given: dict[str, Tensor | None]) -> None:
    if bias.dtype not in (torch.bool, torch.float32, q.dtype):
        raise refusal(
            "attention needs a boolean bias (True attends), or an additive one in float32 or the dtype of q",
            **given,
        )
    if bias.device != q.device:
        raise refusal(f"attention needs the bias on {q.device}, not on {bias.device}", **given)
    target = (*q.shape[:-1], k.shape[-2])
    if bias.dim() > len(target) or any(
        _surely(have != 1) and _surely(have != want) for have, want in zip(bias.shape[::-1], target[::-1])
    ):
        raise refusal(f"attention needs a bias that broadcasts to {tuple(target)}", **given)


def check_tangents(**pairs: tuple[Tensor | None, Tensor | None]) -> None:
    for name, (x, x_dot) in pairs.items():
        if x_dot is None:
            continue
        if x is None or not x.is_floating_point():
            state = "absent" if x is None else "boolean"
            raise ValueError(f"attention_jvp got {name}_dot, but {name} is {state}")
        if x_dot.device != x.device:
            raise refusal(
                f"attention_jvp needs {name}_dot on the device of {name}, {x.device}, not on {x_dot.device}",
                **{name: x, f"{name}_dot": x_dot},
            )
        if x_dot.dtype != x.dtype or x_dot.dim() != x.dim() or _differ(x_dot.shape, x.shape):
            raise refusal(
                f"attention_jvp needs {name}_dot of the shape and dtype of {name}",
                **{name: x, f"{name}_dot": x_dot},
            )


def check_how(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    window: Sequence[int] | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    block_map: Tensor | None,
    partial_blocks: Tensor | None,
) -> None:
    """Raise ValueError for a window, packed sequences or a block mask that the ops do not take."""
    if window is not None and (len(window) != 2 or any(width < -1 for width in window)):
        raise ValueError(f"attention needs a window (left, right) of widths from 0, or -1 for no limit; got {window}")
    if block_map is not None or partial_blocks is not None:
        if cu_seqlens_q is not None or cu_seqlens_kv is not None:
            raise ValueError("attention of packed sequences takes no block mask: sequences see themselves only")
        _check_block_mask(q, k, block_map, partial_blocks)
    if cu_seqlens_q is None and cu_seqlens_kv is None:
        return
    if cu_seqlens_q is None or cu_seqlens_kv is None:
        raise ValueError("attention needs both cu_seqlens_q and cu_seqlens_kv, or neither")
    given = {"q": q, "k": k, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
    if bias is not None:
        raise refusal("attention of packed sequences takes no bias: sequences see themselves only", bias=bias, **given)
    if q.dim() != 4 or _surely(q.shape[0] != 1):
        raise refusal("attention of packed sequences needs q, k, v of batch 1, [1, heads, total length, dim]", **given)
    for x in (cu_seqlens_q, cu_seqlens_kv):
        if x.dtype != torch.int32 or x.dim() != 1 or x.device != q.device or x.stride(0) != 1:
            raise refusal(f"attention needs cu_seqlens as contiguous int32 [sequences + 1] on {q.device}", **given)
    if _surely(cu_seqlens_q.shape[0] != cu_seqlens_kv.shape[0]) or _surely(cu_seqlens_q.shape[0] < 1):
        raise refusal("attention needs cu_seqlens_q and cu_seqlens_kv of one length, sequences + 1", **given)


def _check_block_mask(q: Tensor, k: Tensor, map: Tensor | None, partial: Tensor | None) -> None:
    given = {"q": q, "k": k, "block_map": map, "partial_blocks": partial}
    if map is None or partial is None:
        raise ValueError("attention needs both block_map and partial_blocks, or neither")
    if map.dtype != torch.int32 or partial.dtype != torch.bool or map.dim() != 4 or partial.dim() != 3:
        raise refusal(
            "attention needs a block mask of int32 [B | 1, H | 1, tiles, tiles] and bool [n, BQ, BK]", **given
        )
    if map.device != q.device or partial.device != q.device:
        raise refusal(f"attention needs the block mask on {q.device}, not on {map.device}, {partial.device}", **given)
    if q.dim() != 4:
        raise refusal("attention with a block mask needs q, k, v of rank 4, [batch, heads, length, dim]", **given)
    if any(_surely(have != 1) and _surely(have != want) for have, want in zip(map.shape, q.shape[:2])):
        raise refusal("attention needs a block mask for one batch entry and head, or for all", **given)
    for length, tiles, size in (
        (q.shape[2], map.shape[2], partial.shape[1]),
        (k.shape[2], map.shape[3], partial.shape[2]),
    ):
        if _surely(size < 1) or _surely(tiles != -(-length // size)):
            raise refusal("attention needs a block mask of as many tiles as cover q and k", **given)


def check_block_map(map: Tensor, partial: Tensor) -> None:
    """Raise ValueError unless the map of a block mask points to tiles that there are. On a GPU, which is not waited
    for, what is wrong is an assertion that fails there."""
    if map.device.type == "meta":
        return
    right = ((map >= -1) & (map <= partial.shape[0])).all()
    what = f"block_map must hold 0, -1, or the number of one of {partial.shape[0]} partial_blocks, from 1 on"
    if map.device.type == "cpu":
        if not right:
            raise ValueError(what)
    else:
        torch._assert_async(right, what)


def check_sequences(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor) -> None:
    """Raise ValueError unless the offsets of packed sequences ascend from 0 to the lengths at most. On a GPU, which is
    not waited for, what is wrong is an assertion that fails there."""
    for name, cu, total in (("cu_seqlens_q", cu_seqlens_q, q.shape[2]), ("cu_seqlens_kv", cu_seqlens_kv, k.shape[2])):
        right = (cu[0] == 0) & (cu[-1] <= total) & (cu[1:] >= cu[:-1]).all()
        what = f"{name} must ascend from 0 to the total length {total} at most"
        if cu.device.type == "cpu":
            if not right:
                raise ValueError(f"{what}; got {cu.tolist()}")
        else:
            torch._assert_async(right, what)


def check_outputs(q: Tensor, v: Tensor, rows: dict[str, Tensor | None], row_sums: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless what a backward is given has the shape and dtype of what the forward gave.

    Args:
        rows: o and what is like it, [..., Lq, Dv] in the dtype of q.
        row_sums: lse and what is like it, [..., Lq] in float32, or float64 beside it.
    """
    inside = torch.float64 if q.dtype == torch.float64 else torch.float32
    for given, shape, dtype in ((rows, (*q.shape[:-1], v.shape[-1]), q.dtype), (row_sums, q.shape[:-1], inside)):
        for name, x in given.items():
            if x is None:
                continue
            if x.dtype != dtype or x.device != q.device or x.dim() != len(shape) or _differ(x.shape, shape):
                raise refusal(
                    f"the backward of attention needs {name} {tuple(shape)} in {dtype} on {q.device}, as the forward "
                    "gives it",
                    **{name: x},
                )


def _differ(have: Sequence[Any], want: Sequence[Any]) -> bool:
    return any(_surely(a != b) for a, b in zip(have, want))


def check_strides(**tensors: Tensor | None) -> None:
    """Raise ValueError for what the ops cope with in graphs, by a copy, and a caller should know of."""
    for name, x in tensors.items():
        if x is not None and x.dim() and _surely(x.stride(-1) != 1) and _surely(x.shape[-1] > 1):
            raise ValueError(
                f"attention needs tensors whose last dim is contiguous (stride 1); got {name} {tuple(x.shape)} with "
                f"strides {x.stride()}: call {name}.contiguous()"
            )
