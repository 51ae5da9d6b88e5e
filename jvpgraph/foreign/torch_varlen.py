"""torch.nn.attention.varlen.varlen_attn, which is flash_attn's: windows are counted from the end of a sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jvpgraph.foreign.attend import EVERYTHING, Window, attend_packed
from jvpgraph.foreign.table import check_options, refuse, swaps

__all__: list[str] = []


@swaps("torch.nn.attention.varlen.varlen_attn", around="torch_attn::_varlen_attn")
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None = None,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: Window | None = EVERYTHING,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """query [T, H, D], key and value [T, Hkv, D]; lse [H, T]."""
    lengths = ("max_q", "max_k")
    check_options("varlen_attn", {name: x for name, x in options.items() if name not in lengths})
    if cu_seq_k is None:
        refuse("varlen_attn", "cu_seq_k", "without it, keys and values are those of a cache")
    window = EVERYTHING if window_size is None else (window_size[0], window_size[1])
    o, lse = attend_packed(query, key, value, cu_seq_q, cu_seq_k, is_causal, scale, window)
    return (o, lse) if return_aux is not None and return_aux.lse else o
