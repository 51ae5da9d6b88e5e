"""What the attention dispatcher of diffusers calls for its backends, other than those that are torch's own already.

Kernels from the hub are functions without a name that is known beforehand, so that the backend's own function is
written again. Sequences of several lengths are cut out there one by one, by lengths that depend on data: here keys
beyond a length are masked. Parallel calls are left to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jvpgraph.foreign.attend import EVERYTHING, Window, attend
from jvpgraph.foreign.table import check_options, refuse, swaps

__all__: list[str] = []

DISPATCH = "diffusers.models.attention_dispatch"
PARALLEL = "_parallel_config"
FLASH = (
    *("_flash_attention", "_flash_attention_hub", "_flash_attention_3", "_flash_attention_3_hub"),
    *("_flash_attention_4_hub", "_aiter_flash_attention"),
)
SAGE = ("_sage_attention", "_sage_attention_hub", "_sage_attention_blackwell_hub")
VARLEN = (
    *("_flash_varlen_attention", "_flash_varlen_attention_3", "_flash_varlen_attention_hub"),
    *("_flash_attention_3_varlen_hub", "_sage_varlen_attention"),
)


def _of(names: tuple[str, ...]) -> list[str]:
    return [f"{DISPATCH}.{name}" for name in names]


@swaps(*_of(FLASH), unless=PARALLEL)
def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Window = EVERYTHING,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """[B, L, H, D]; windows are counted from the end."""
    _check(attn_mask, options)
    o, lse = attend(query, key, value, None, is_causal, scale, window_size)
    return (o, lse) if return_lse else o


@swaps(*_of(SAGE), unless=PARALLEL)
def sage(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """[B, L, H, D]; the exact attention."""
    _check(attn_mask, options)
    o, lse = attend(query, key, value, None, is_causal, scale, from_the_end=False)
    return (o, lse) if return_lse else o


def _check(mask: Tensor | None, options: dict[str, Any]) -> None:
    if mask is not None:
        refuse("diffusers", "attn_mask", "this attention backend takes no mask: set the backend native")
    check_options("diffusers", {name: value for name, value in options.items() if name != PARALLEL})


@swaps(*_of(VARLEN), unless=PARALLEL)
def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Window = EVERYTHING,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """[B, L, H, D]. Of a mask only the number of keys that it shows in a row of the batch matters: the first ones."""
    _check(None, options)
    if return_lse:
        refuse("diffusers", "return_lse", "the logsumexp of packed sequences has another layout in each backend")
    limited = is_causal or max(window_size[0], window_size[1]) >= 0
    if attn_mask is None:
        return attend(query, key, value, None, is_causal, scale, window_size)[0]
    if limited:
        refuse("diffusers", "attn_mask", "a mask together with a window, which starts from the end of each sequence")
    batch, n = query.shape[0], key.shape[1]
    shown = _rows(attn_mask, batch, n).sum(-1, keepdim=True)
    seen = torch.arange(n, device=key.device) < shown
    return attend(query, key, value, seen[:, None, None, :], scale=scale)[0]


def _rows(mask: Tensor, batch: int, n: int) -> Tensor:
    """[B, Lkv] of a boolean mask of one to four dims: which keys some query sees."""
    if mask.dtype != torch.bool:
        refuse("diffusers", "attn_mask", "packed sequences need a boolean mask")
    while mask.dim() > 2:
        mask = mask.any(1)
    return mask.expand(batch, n)
