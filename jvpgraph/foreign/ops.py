"""Rules of ops of other packages: where models call them directly, and op by op.

The primal stays theirs, and so does its backward; the tangent is by our kernel. Arguments go by different names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jvpgraph.foreign.attend import tangents, tangents_packed
from jvpgraph.foreign.table import REFUSED
from jvpgraph.rules.registry import jvp_by_name

__all__: list[str] = []

Arguments = dict[str, Any]
DENSE = ("flash_attn::_flash_attn_forward", "_diffusers_flash_attn_3::_flash_attn_forward")
EITHER = ("flash_attn_3::_flash_attn_forward", "aten::_flash_attention_forward")
PACKED = ("flash_attn::_flash_attn_varlen_forward", "torch_attn::_varlen_attn")
OLDER = 8  # outputs of flash_attn before 2.7: o, the operands padded, o padded, lse, the rest


def _first(given: Arguments, *names: str, default: Any = None) -> Any:
    """By the first of these names that the op has, unless that is None."""
    return next((given[name] for name in names if given.get(name) is not None), default)


def unmet(given: Arguments) -> str:
    """Why the tangent of such a call is not known; empty where it is."""
    new_keys = {"k_new": "it writes new keys into a cache", "out_": "it writes into a given tensor"}
    for name, reason in (REFUSED | new_keys).items():
        value = given.get(name)
        if value is not None and (isinstance(value, Tensor) or value != 0):
            return f"{name}: {reason}"
    q_packed, k_packed = _offsets(given)
    return "" if (q_packed is None) == (k_packed is None) else "queries alone are packed, which our kernel does not do"


def _offsets(given: Arguments) -> tuple[Any, Any]:
    q = _first(given, "cu_seqlens_q", "cum_seq_q", "cu_seq_q")
    return q, _first(given, "cu_seqlens_k", "cum_seq_k", "cu_seq_k")


@jvp_by_name(*DENSE, *EITHER, *PACKED, wrt="q k v query key value", unmet=unmet)
def attention(outs: Any, given: Arguments, dots: Arguments) -> list[Tensor | None]:
    """Of every output: o, lse in the shape that the kernel gives it, and none of what else there is."""
    q, k, v = (_first(given, *names) for names in (("q", "query"), ("k", "key"), ("v", "value")))
    own = tuple(_first(dots, f"{a}_dot", f"{b}_dot") for a, b in (("q", "query"), ("k", "key"), ("v", "value")))
    causal = bool(_first(given, "causal", "is_causal", default=False))
    window = _first(given, "window_size")
    left, right = window or (_first(given, f"window_size_{side}", default=-1) for side in ("left", "right"))
    scale = _first(given, "softmax_scale", "scale")
    cu_q, cu_k = _offsets(given)
    if cu_q is None:
        o_dot, lse_dot = tangents((q, k, v), own, causal, scale, (left, right))
    else:
        o_dot, lse_dot = tangents_packed((q, k, v), own, (cu_q, cu_k), causal, scale, (left, right))
    if len(outs) == OLDER:
        return [o_dot, *own, o_dot, lse_dot, None, None]
    if "attention_chunk" in given and "window_size_left" not in given:  # diffusers', [B, L, H]
        lse_dot = lse_dot.mT
    return [o_dot, lse_dot, *[None] * (len(outs) - 2)]


@jvp_by_name("aten::_grouped_mm", wrt="self mat2", unmet=lambda given: "")
def grouped_mm(y: Tensor, given: Arguments, dots: Arguments) -> Any:
    """Linear in either operand; the offsets of the groups have no tangent."""
    product, a, b = torch.ops.aten._grouped_mm.default, given["self"], given["mat2"]
    how = (given.get("offs"), None, given.get("out_dtype"))
    a_dot, b_dot = dots["self_dot"], dots["mat2_dot"]
    if a_dot is None or b_dot is None:
        return product(a, b_dot, *how) if a_dot is None else product(a_dot, b, *how)
    return product(a_dot, b, *how) + product(a, b_dot, *how)
