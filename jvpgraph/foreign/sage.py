"""SageAttention, whose kernels quantize: value, tangent and gradients here are those of the exact attention.

Its own functions have no backward. The value differs from theirs by their quantization, some per mille.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jvpgraph.foreign.attend import attend, attend_packed
from jvpgraph.foreign.table import check_options, refuse, swaps

__all__: list[str] = []

CORE = "sageattention.core"
WITH_MASK = f"{CORE}.sageattn_qk_int8_pv_fp16_triton"  # the others take a mask and ignore it
KERNELS = (
    *("sageattn", "sageattn_qk_int8_pv_fp16_cuda"),
    *("sageattn_qk_int8_pv_fp8_cuda", "sageattn_qk_int8_pv_fp8_cuda_sm90"),
)
NOT_OF_3 = {"tensor_layout": "HND", "sm_scale": None, "return_lse": False}
OF_QUANTIZATION = {
    *("quantization_backend", "qk_quant_gran", "pv_accum_dtype", "smooth_k", "smooth_v", "per_block_mean"),
}


def _check(what: str, options: dict[str, Any]) -> None:
    check_options(what, {name: value for name, value in options.items() if name not in OF_QUANTIZATION})


@swaps(*(f"{CORE}.{name}" for name in KERNELS))
def sageattn(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
    if attn_mask is not None:
        refuse("sageattn", "attn_mask", "SageAttention ignores it: call scaled_dot_product_attention")
    return sageattn_with_mask(q, k, v, **options)


@swaps(WITH_MASK)
def sageattn_with_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """q, k, v [B, H, L, D] with the layout HND, [B, L, H, D] with NHD; lse [B, H, L]."""
    _check("sageattn", options)
    heads_first = tensor_layout == "HND"
    if heads_first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    o, lse = attend(q, k, v, attn_mask, is_causal, sm_scale, from_the_end=False)
    o = o.transpose(1, 2).contiguous() if heads_first else o  # as theirs lies in memory, of which models take views
    return (o, lse) if return_lse else o


@swaps(f"{CORE}.sageattn_varlen")
def sageattn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool = False,
    sm_scale: float | None = None,
    **options: Any,
) -> Tensor:
    """q [T, H, D], k and v [T, Hkv, D]"""
    _check("sageattn_varlen", options)
    return attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal, sm_scale, from_the_end=False)[0]


@swaps("sageattn3.api.sageattn3_blackwell")
def sageattn3_blackwell(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, **options: Any) -> Any:
    """[B, H, L, D]"""
    for name, value in options.items():
        if name in NOT_OF_3 and value != NOT_OF_3[name]:
            refuse("sageattn3_blackwell", name, "SageAttention 3 ignores it, where SageAttention does not")
    return sageattn(q, k, v, is_causal=is_causal, **options)
