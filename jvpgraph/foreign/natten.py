"""NATTEN's fused neighbourhood attention in one, two and three dims, as attention with a block mask: see Axis in
jvpgraph.kernels.window_masks for who sees whom."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jvpgraph.foreign.attend import attend, attend_packed
from jvpgraph.foreign.table import check_options, refuse, swaps
from jvpgraph.kernels.ops import OPS

__all__: list[str] = []

TILES = {
    *("q_tile_shape", "kv_tile_shape", "backward_q_tile_shape", "backward_kv_tile_shape", "backward_kv_splits"),
    *("backward_use_pt_reduction", "run_persistent_kernel", "kernel_schedule", "torch_compile"),
    *("q_tile_size", "kv_tile_size", "backward_q_tile_size", "backward_kv_tile_size"),
}
MERGED = "natten.functional"
OF_SEQUENCES = "cumulative_seqlen_", "seqlens_"
PACKED = [f"{name}{side}" for name in OF_SEQUENCES for side in ("Q", "KV")]


@swaps(*(f"{MERGED}.{name}" for name in ("na1d", "na2d", "na3d", "neighborhood_attention_generic")))
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    rpb: Tensor | None = None,
    **options: Any,
) -> Any:
    """query, key, value [B, *spatial, H, D], additional ones [B, N, H, D]; lse [B, *spatial, H]."""
    _check("natten", options)
    if rpb is not None:
        refuse("natten", "rpb", "relative positional biases are not built into our mask")
    space = query.shape[1:-2]
    windows = ([_of_dim(x, dim) for dim in range(len(space))] for x in (kernel_size, stride, dilation, is_causal))
    q, k, v = (x.flatten(1, -3) for x in (query, key, value))
    others = 0
    if additional_keys is not None and additional_values is not None:
        k, v, others = (
            torch.cat([k, additional_keys], 1),
            torch.cat([v, additional_values], 1),
            additional_keys.shape[1],
        )
    tiles = OPS.grid_mask.default(list(space), *windows, others, query.device)
    o, lse = attend(q, k, v, tiles=tiles, scale=scale or None)
    o = o.reshape(*query.shape[:-1], value.shape[-1])
    return (o, lse.transpose(1, 2).reshape(query.shape[:-1])) if return_lse else o


def _check(what: str, options: dict[str, Any]) -> None:
    check_options(what, {name: value for name, value in options.items() if name not in TILES})


def _of_dim(value: Any, dim: int) -> Any:
    return value[dim] if isinstance(value, (tuple, list)) else value


@swaps(f"{MERGED}.attention")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """query [B, L, H, D]; lse [B, L, H]. Packed [1, T, H, D], with lengths or, of one more, offsets."""
    others = {name: x for name, x in options.items() if name not in PACKED and not name.startswith("max_seqlen_")}
    _check("natten.attention", others)
    cu_q, cu_kv = (_offsets(options, side) for side in ("Q", "KV"))
    if cu_q is not None and cu_kv is not None:
        same = any(options.get(f"{name}Q") is options.get(f"{name}KV") is not None for name in OF_SEQUENCES)
        if is_causal and not same:
            refuse(
                "natten.attention",
                "is_causal",
                "it is not known that sequences have as many keys as queries: pass the same tensor for both",
            )
        cu_kv = cu_q if same else cu_kv
        o, lse = attend_packed(query[0], key[0], value[0], cu_q, cu_kv, is_causal, scale or None, from_the_end=False)
        return (o[None], lse.mT[None]) if return_lse else o[None]
    if cu_q is not None or cu_kv is not None:
        refuse("natten.attention", "seqlens_Q, seqlens_KV", "those of queries or of keys are missing")
    if is_causal and query.shape[1] != key.shape[1]:
        refuse("natten.attention", "is_causal", "there are not as many keys as queries")
    o, lse = attend(query, key, value, None, is_causal, scale or None, from_the_end=False)
    return (o, lse.transpose(1, 2)) if return_lse else o


def _offsets(options: dict[str, Any], side: str) -> Tensor | None:
    """Where packed sequences begin and end; None where there is one in each row of the batch."""
    given: Tensor | None = options.get(f"cumulative_seqlen_{side}")
    lengths = options.get(f"seqlens_{side}")
    return given if lengths is None else F.pad(lengths.cumsum(0), (1, 0)).int()


@swaps(*(f"{MERGED}.na{n}d_varlen" for n in (1, 2, 3)))
def packed_neighbourhoods(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Any:
    """Grids of several sizes, one after the other."""
    refuse(
        "natten", "layout", "neighbourhoods in grids of several sizes are not taken: call na1d, na2d or na3d for each"
    )
