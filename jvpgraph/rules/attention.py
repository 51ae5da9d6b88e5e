"""Attention: one call of ``jvpgraph::attention_jvp``, whichever kernel the primal used.

Every rule is joint: a query, key, value or bias without a tangent costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import jvpgraph.kernels.attention  # noqa: F401  defines the ops
from jvpgraph.rules.registry import jvp

aten, ours = torch.ops.aten, torch.ops.jvpgraph


@jvp(ours.attention.default)
def attention(outs, q, k, v, bias, *how, q_dot=None, k_dot=None, v_dot=None, bias_dot=None):
    return ours.attention_jvp(q, k, v, q_dot, k_dot, v_dot, bias, bias_dot, *how)[2:]


# ATen's fused kernels, as scaled_dot_product_attention picks them in code that runs op by op, and as ring attention
# calls them for the logsumexp by which it merges. Its tangent is in the shape that the kernel gives it.
def fused(outs: Any, *arguments: Any, lse_like: Tensor | None = None, **dots: Tensor | None) -> list[Tensor | None]:
    o_dot, lse_dot = attention(outs, *arguments, **dots)
    return [o_dot, None if lse_like is None else _in_shape_of(lse_like, lse_dot), *[None] * (len(outs) - 2)]


def _in_shape_of(lse: Tensor, lse_dot: Tensor) -> Tensor:
    """[B, H, L] as cuDNN has it, [B, H, L, 1], or as the efficient kernel does: L padded to a multiple of 32."""
    if lse.dim() > lse_dot.dim():
        return lse_dot.unsqueeze(-1)
    return torch.nn.functional.pad(lse_dot, (0, lse.shape[-1] - lse_dot.shape[-1]))


def no_dropout(position: int) -> Any:
    """The schemas agree on q, k, v, and on little else."""
    return lambda *arguments: arguments[position] == 0


def no_dropout_and_one_alignment(q: Tensor, k: Tensor, v: Tensor, p: float, causal: bool, *_: Any) -> bool:
    """The flash kernel counts causal positions from the last query and key, the rule from the first ones."""
    return p == 0 and (not causal or q.shape[-2] == k.shape[-2])


@jvp(aten._scaled_dot_product_flash_attention_for_cpu.default, when=no_dropout(3))
def flash_for_cpu(outs, q, k, v, p, causal, bias, scale, *, q_dot=None, k_dot=None, v_dot=None, bias_dot=None):
    dots = {"q_dot": q_dot, "k_dot": k_dot, "v_dot": v_dot, "bias_dot": bias_dot}
    return fused(outs, q, k, v, bias, causal, scale, lse_like=outs[1], **dots)


@jvp(aten._scaled_dot_product_flash_attention.default, when=no_dropout_and_one_alignment)
def flash(outs, q, k, v, p, causal, _, scale, *, q_dot=None, k_dot=None, v_dot=None):
    dots = {"q_dot": q_dot, "k_dot": k_dot, "v_dot": v_dot}
    return fused(outs, q, k, v, None, causal, scale, lse_like=outs[1], **dots)


@jvp(aten._scaled_dot_product_efficient_attention.default, when=no_dropout(5))
def efficient(outs, q, k, v, bias, with_lse, p, causal, scale, *, q_dot=None, k_dot=None, v_dot=None, bias_dot=None):
    dots = {"q_dot": q_dot, "k_dot": k_dot, "v_dot": v_dot, "bias_dot": bias_dot}
    return fused(outs, q, k, v, bias, causal, scale, lse_like=outs[1] if with_lse else None, **dots)


@jvp(aten._scaled_dot_product_cudnn_attention.default, when=no_dropout(5))
def cudnn(outs, q, k, v, bias, with_lse, p, causal, debug, scale, *, q_dot=None, k_dot=None, v_dot=None, bias_dot=None):
    dots = {"q_dot": q_dot, "k_dot": k_dot, "v_dot": v_dot, "bias_dot": bias_dot}
    return efficient(outs, q, k, v, bias, with_lse, p, causal, scale, **dots)


@jvp(aten._scaled_dot_product_fused_attention_overrideable.default, when=no_dropout(4))
def overrideable(outs, q, k, v, bias, p, causal, debug, scale, *, q_dot=None, k_dot=None, v_dot=None, bias_dot=None):
    dots = {"q_dot": q_dot, "k_dot": k_dot, "v_dot": v_dot, "bias_dot": bias_dot}
    return fused(outs, q, k, v, bias, causal, scale, lse_like=outs[1], **dots)
