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


# ATen's fused kernels, as scaled_dot_product_attention picks them in code that runs op by op. Besides o only
# the logsumexp of the flash kernels has a tangent: others pad it, reshape it or leave it out.
def fused(outs: Any, *arguments: Any, with_lse: bool = False, **dots: Tensor | None) -> list[Tensor | None]:
    o_dot, lse_dot = attention(outs, *arguments, **dots)
    return [o_dot, lse_dot if with_lse else None, *[None] * (len(outs) - 2)]


def no_dropout(position: int) -> Any:
    """The schemas agree on q, k, v, and on little else."""
    return lambda *arguments: arguments[position] == 0


@jvp(aten._scaled_dot_product_flash_attention_for_cpu.default, when=no_dropout(3))
def flash_for_cpu(outs, q, k, v, p, causal, bias, scale, *, q_dot=None, k_dot=None, v_dot=None, bias_dot=None):
    dots = {"q_dot": q_dot, "k_dot": k_dot, "v_dot": v_dot, "bias_dot": bias_dot}
    return fused(outs, q, k, v, bias, causal, scale, with_lse=True, **dots)


@jvp(aten._scaled_dot_product_flash_attention.default, when=no_dropout(3))
def flash(outs, q, k, v, p, causal, _, scale, *, q_dot=None, k_dot=None, v_dot=None):
    return fused(outs, q, k, v, None, causal, scale, with_lse=True, q_dot=q_dot, k_dot=k_dot, v_dot=v_dot)


@jvp(aten._scaled_dot_product_efficient_attention.default, when=no_dropout(5))
def efficient(outs, q, k, v, bias, _, p, causal, scale, *, q_dot=None, k_dot=None, v_dot=None, bias_dot=None):
    dots = {"q_dot": q_dot, "k_dot": k_dot, "v_dot": v_dot, "bias_dot": bias_dot}
    return fused(outs, q, k, v, bias, causal, scale, **dots)


@jvp(aten._scaled_dot_product_cudnn_attention.default, when=no_dropout(5))
def cudnn(outs, q, k, v, bias, _, p, causal, debug, scale, *, q_dot=None, k_dot=None, v_dot=None, bias_dot=None):
    return efficient(outs, q, k, v, bias, _, p, causal, scale, q_dot=q_dot, k_dot=k_dot, v_dot=v_dot, bias_dot=bias_dot)


@jvp(aten._scaled_dot_product_fused_attention_overrideable.default, when=no_dropout(4))
def overrideable(outs, q, k, v, bias, p, causal, debug, scale, *, q_dot=None, k_dot=None, v_dot=None, bias_dot=None):
    return efficient(
        outs, q, k, v, bias, None, p, causal, scale, q_dot=q_dot, k_dot=k_dot, v_dot=v_dot, bias_dot=bias_dot
    )
