"""The attention ops above the implementations: gradients, refusals of torch's own forward mode, and autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from jvpgraph.kernels.call import How
from jvpgraph.kernels.schemas import AUTOCAST_KEYS, DEFAULTS, LIBRARY, OPS

__all__: list[str] = []

OF_HOW = 4  # tensors, which are the last of its fields


def _refuse_forward_ad(op: str, *tensors: Tensor | None) -> None:
    """Raise if a tensor carries a tangent of torch's own forward mode, which the op would silently drop."""
    for x in tensors:
        if x is None:
            continue
        if forward_ad._current_level < 0 and not torch._C._functorch.is_gradtrackingtensor(x):
            continue  # no level is open, and x is not a dual of torch.func.jvp replayed from a graph
        if torch._VF._unpack_dual(x, level=0)[1] is not None:
            raise RuntimeError(
                f"jvpgraph::{op} has no rule for torch.func.jvp or torch.autograd.forward_ad: use "
                "jvpgraph.transform for the model, or jvpgraph.kernels.attention.attention_jvp for this op"
            )


def _below_autograd(op: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _gradients(ctx: Any, o_grad: Tensor | None, lse_grad: Tensor | None) -> list[Tensor | None]:
    """Gradients of q, k, v, bias from what was saved."""
    q, k, v, bias, o, lse, *rest = ctx.saved_tensors
    if o_grad is None and lse_grad is None:
        return [None] * 4
    grads = OPS.attention_backward.default(
        _or_zeros(o_grad, o), lse_grad, q, k, v, bias, o, lse, *ctx.how, *rest[:OF_HOW], ctx.needs["bias"]
    )
    return [grad if ctx.needs[name] else None for name, grad in zip(("q", "k", "v", "bias"), grads)]


def _save(ctx: Any, inputs: dict[str, Tensor | None], outs: Sequence[Tensor], how: How, *more: Any) -> None:
    """Keep what the backward needs: q, k, v, bias of the inputs, o and lse of the outs, and whatever more."""
    kept = [inputs[name] for name in ("q", "k", "v", "bias")]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept, *outs[:2], *how[-OF_HOW:], *more)
    ctx.how = how[:-OF_HOW]
    ctx.needs = {name: x is not None and x.requires_grad for name, x in inputs.items()}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, q: Any, k: Any, v: Any, bias: Any, *how: Any) -> Any:
        outs = _below_autograd(OPS.attention.default, keyset, q, k, v, bias, *how)
        _save(ctx, {"q": q, "k": k, "v": v, "bias": bias}, outs, How(*how))
        return outs

    @staticmethod
    def backward(ctx: Any, o_grad: Any, lse_grad: Any) -> Any:
        return None, *_gradients(ctx, o_grad, lse_grad), *[None] * len(How._fields)


class _AttentionJvp(torch.autograd.Function):
    """Differentiable in o and lse. The tangents are constants to reverse mode, and say so when asked, unless
    differentiable_tangent."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        outs = _below_autograd(OPS.attention_jvp.default, keyset, *args)
        names = ("q", "k", "v", "q_dot", "k_dot", "v_dot", "bias", "bias_dot")
        inputs, how, ctx.differentiable = dict(zip(names, args)), How(*args[8:-1]), args[-1]
        dots = [inputs[name] for name in ("q_dot", "k_dot", "v_dot", "bias_dot")]
        _save(ctx, inputs, outs, how, *((*dots, *outs[2:]) if ctx.differentiable else ()))
        return outs

    @staticmethod
    def backward(ctx: Any, o_grad: Any, lse_grad: Any, o_dot_grad: Any, lse_dot_grad: Any) -> Any:
        rest = [None] * (len(How._fields) + 1)
        if o_dot_grad is None and lse_dot_grad is None:
            dq, dk, dv, dbias = _gradients(ctx, o_grad, lse_grad)
            return None, dq, dk, dv, None, None, None, dbias, None, *rest
        if not ctx.differentiable:
            raise RuntimeError(
                "jvpgraph::attention_jvp: the tangents o_dot and lse_dot have no gradient; detach them, or ask for it "
                "with differentiable_tangent=True"
            )
        q, k, v, bias, o, lse, *of_how = ctx.saved_tensors[:-6]
        q_dot, k_dot, v_dot, bias_dot, o_dot, lse_dot = ctx.saved_tensors[-6:]
        grads = OPS.attention_jvp_backward.default(
            *(o_grad, lse_grad, o_dot_grad, lse_dot_grad, q, k, v, q_dot, k_dot, v_dot, bias, bias_dot),
            *(o, lse, o_dot, lse_dot, *ctx.how, *of_how, ctx.needs["bias"], ctx.needs["bias_dot"]),
        )
        needed = [grad if needs else None for grad, needs in zip(grads, ctx.needs.values())]
        return None, *needed, *rest


def _no_second_derivative(op: str) -> type[torch.autograd.Function]:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            return _below_autograd(getattr(OPS, op).default, keyset, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"jvpgraph::{op}: second derivatives of attention are not implemented")

    return Backward


def _differentiable(op: str, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The kernel of op above autograd."""
    overload, defaults = getattr(OPS, op).default, list(DEFAULTS[op].values())

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        _refuse_forward_ad(op, *tensors)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return function.apply(keyset, *args, *defaults[len(args) :])  # the dispatcher leaves defaults out
        return _below_autograd(overload, keyset, *args)

    return kernel


for _name, _function in (
    ("attention", _Attention),
    ("attention_jvp", _AttentionJvp),
    ("attention_jvps", _no_second_derivative("attention_jvps")),
    ("attention_backward", _no_second_derivative("attention_backward")),
    ("attention_jvp_backward", _no_second_derivative("attention_jvp_backward")),
):
    LIBRARY.impl(_name, _differentiable(_name, _function), "Autograd", with_keyset=True)


# -------------------------------------------------------------------------------------------------- autocast


def _autocast(op: str, device_type: str) -> Any:
    """Casts what scaled_dot_product_attention casts under autocast: floating-point tensors but float64."""

    def cast(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(device_type)) if eligible else x

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            return getattr(OPS, op).default(*map(cast, args))

    return kernel


for _name in ("attention", "attention_jvp"):
    LIBRARY.impl(_name, _autocast(_name, "cpu"), "AutocastCPU")
    LIBRARY.impl(_name, _autocast(_name, "cuda"), "AutocastCUDA")
