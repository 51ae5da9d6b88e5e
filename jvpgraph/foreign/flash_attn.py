"""flash_attn 2, and the interface of flash_attn 3.

Windows are counted from the last query and the last key. The logsumexp that they return has gradients here; theirs has
none. A row without keys has the logsumexp -inf here, and +inf there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jvpgraph.foreign.attend import EVERYTHING, Window, attend, attend_packed
from jvpgraph.foreign.table import check_options, refuse, swaps

__all__: list[str] = []

FA2, FA3 = "flash_attn.flash_attn_interface", ("flash_attn_interface", "flash_attn_3.flash_attn_interface")
# Older versions of flash_attn 3 have neither, and return the logsumexp always.
OP_2, OP_3 = "flash_attn::_flash_attn_forward", "flash_attn_3::_flash_attn_forward"
OF_FUNCTIONS, OF_APPLY = {"return_attn_probs": True}, {"return_softmax": True}


def _of_2(*names: str) -> list[str]:
    return [f"{FA2}.{name}" for name in names]


def _of_3(*names: str) -> list[str]:
    return [f"{module}.{name}" for module in FA3 for name in names]


def _result(what: str, o: Tensor, lse: Tensor, options: dict[str, Any]) -> Any:
    """As they return it, once it is known that nothing is asked for that cannot be done. Of the probabilities, which
    are there with dropout only, nothing."""
    with_lse = options.pop("return_attn_probs", False)
    with_lse = options.pop("return_softmax", False) or with_lse
    check_options(what, options)
    return (o, lse, o.new_empty(0)) if with_lse else o


@swaps(*_of_2("flash_attn_func", "FlashAttnFunc"), around=OP_2)
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYTHING,
    **options: Any,
) -> Any:
    o, lse = attend(q, k, v, None, causal, softmax_scale, window_size)
    return _result("flash_attn_func", o, lse, options)


@swaps(*_of_2("flash_attn_qkvpacked_func", "FlashAttnQKVPackedFunc"), around=OP_2)
def flash_attn_qkvpacked_func(qkv: Tensor, **options: Any) -> Any:
    """qkv [B, L, 3, H, D]"""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, **options)


@swaps(*_of_2("flash_attn_kvpacked_func", "FlashAttnKVPackedFunc"), around=OP_2)
def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, **options: Any) -> Any:
    """kv [B, L, 2, H, D]"""
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, **options)


@swaps(*_of_2("flash_attn_varlen_func", "FlashAttnVarlenFunc"), around=OP_2)
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYTHING,
    **options: Any,
) -> Any:
    o, lse = attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, window_size)
    return _result("flash_attn_varlen_func", o, lse, options)


@swaps(*_of_2("flash_attn_varlen_qkvpacked_func", "FlashAttnVarlenQKVPackedFunc"), around=OP_2)
def flash_attn_varlen_qkvpacked_func(qkv: Tensor, cu_seqlens: Tensor, **options: Any) -> Any:
    """qkv [T, 3, H, D]"""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, **options)


@swaps(*_of_2("flash_attn_varlen_kvpacked_func", "FlashAttnVarlenKVPackedFunc"), around=OP_2)
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Any:
    """kv [T, 2, H, D]"""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)


# --------------------------------------------------------------------------------------------------- flash_attn 3


def _without_probabilities(result: Any) -> Any:
    return result[:2] if isinstance(result, tuple) else result


@swaps(*_of_3("flash_attn_func"), absent=OF_FUNCTIONS, around=OP_3)
@swaps(*_of_3("FlashAttnFunc"), absent=OF_APPLY, around=OP_3)
def flash_attn_3_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return _without_probabilities(flash_attn_func(q, k, v, **options))


@swaps(*_of_3("flash_attn_varlen_func"), absent=OF_FUNCTIONS, around=OP_3)
@swaps(*_of_3("FlashAttnVarlenFunc"), absent=OF_APPLY, around=OP_3)
def flash_attn_3_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Any:
    return _without_probabilities(flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, **options))


@swaps(*_of_3("flash_attn_qkvpacked_func"), absent=OF_FUNCTIONS, around=OP_3)
@swaps(*_of_3("FlashAttnQKVPackedFunc"), absent=OF_APPLY, around=OP_3)
def flash_attn_3_qkvpacked_func(qkv: Tensor, num_heads_q: int | None = None, **options: Any) -> Any:
    """qkv [B, L, 3, H, D], or [B, L, H + 2 Hkv, D] with num_heads_q = H."""
    if qkv.dim() == 5:
        q, k, v = qkv.unbind(-3)
        return flash_attn_3_func(q, k, v, **options)
    if num_heads_q is None:
        refuse("flash_attn_qkvpacked_func", "num_heads_q", "qkv has four dims, and it is not said how many are q")
    n_kv = (qkv.shape[2] - num_heads_q) // 2
    q, k, v = qkv.split([num_heads_q, n_kv, n_kv], dim=-2)
    return flash_attn_3_func(q, k, v, **options)
