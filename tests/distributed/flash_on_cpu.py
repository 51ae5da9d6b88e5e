"""ATen's CUDA flash attention with a kernel for CPUs, in float64, so that what calls it can be tested without a GPU.

    flash_on_cpu.install()      # in a process of its own: it stays

diffusers' ring attention merges by the logsumexp that only this op returns, and calls its backward with it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["install"]

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention.default
LIBRARY = torch.library.Library("aten", "IMPL")


@functools.cache
def install() -> None:
    """Register the kernels, and a fake whose logsumexp is as wide as the inputs; torch's own says float32."""
    LIBRARY.impl("_scaled_dot_product_flash_attention", _forward, "CPU")
    LIBRARY.impl("_scaled_dot_product_flash_attention_backward", _backward, "CPU")
    LIBRARY.impl("_scaled_dot_product_flash_attention", _fake, "Meta", allow_override=True)
    FORWARD.py_kernels.pop(torch._C.DispatchKey.Meta, None)  # torch's, which would come first
    FORWARD._dispatch_cache.clear()


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)


def _rest(q: Tensor, k: Tensor) -> tuple[Any, ...]:
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return None, None, q.shape[2], k.shape[2], seed, seed[0].clone(), q.new_empty(0)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    assert dropout_p == 0
    assert not is_causal
    s = _scores(q, k, scale)
    return (s.softmax(-1) @ v).contiguous(), s.logsumexp(-1), *_rest(q, k)


def _fake(q: Tensor, k: Tensor, v: Tensor, *how: Any, scale: float | None = None) -> tuple[Any, ...]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3]), *_rest(q, k)


def _backward(o_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *how: Any, scale: Any = None):
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    p = (_scores(q, k, scale) - lse.unsqueeze(-1)).exp()
    ds = factor * p * (o_grad @ v.transpose(-1, -2) - (o_grad * o).sum(-1, keepdim=True))
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ o_grad
