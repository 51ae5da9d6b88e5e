"""Calls of the implementations in jvpgraph.kernels, as short as tests want them.

backend is a module with `attend` or `differentiate`: an implementation, or jvpgraph.kernels.choose for the plan's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jvpgraph.kernels.call import Call, Cotangents, Gradients, Outputs, Wanted
from jvpgraph.kernels.window import Window


def attention(backend: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any, **options: Any) -> Any:
    """(o, lse). rest: window and scale."""
    return attention_jvp(backend, q, k, v, None, None, None, bias, None, *rest, **options)[:2]


def attention_jvp(backend: Any, *call: Any, packing: Any = None, **options: Any) -> tuple[Tensor, ...]:
    """(o, lse, o_dot, lse_dot), zeros where nothing has a tangent. call: the fields of a Call, up to the scale."""
    o, lse, o_dot, lse_dot = backend.attend(Call(*call, packing=packing), **options)
    o_dot = torch.zeros_like(o) if o_dot is None else o_dot
    return o, lse, o_dot, torch.zeros_like(lse) if lse_dot is None else lse_dot


def attention_backward(
    backend: Any,
    grads: tuple[Tensor, Tensor | None],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    outs: tuple[Tensor, Tensor],
    how: tuple[Window, float],
    bias: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias) from the gradients of o and lse; inputs are q, k, v and the bias."""
    wanted = Wanted(from_lse=grads[1] is not None, bias=bias)
    call = Call(*inputs[:3], bias=inputs[3], window=how[0], scale=how[1], wanted=wanted)
    found = backend.differentiate(call, Outputs(*outs), Cotangents(*grads), **options)
    return found.q, found.k, found.v, found.bias


def attention_jvp_backward(
    backend: Any,
    grads: tuple[Tensor | None, ...],
    inputs: tuple[Any, ...],
    outs: tuple[Tensor, ...],
    how: tuple[Window, float],
    biases: tuple[bool, bool] = (False, False),
    **options: Any,
) -> Gradients:
    """All gradients, from those of o, lse, o_dot and lse_dot; inputs are the tensors of a Call, outs all outputs."""
    wanted = Wanted(grads[1] is not None, grads[2] is not None or grads[3] is not None, *biases)
    call = Call(*inputs, window=how[0], scale=how[1], wanted=wanted)
    return backend.differentiate(call, Outputs(*outs), Cotangents(*grads), **options)
