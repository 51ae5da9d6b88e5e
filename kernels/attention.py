"""The attention ops of jvpgraph: checks, shapes, autograd and autocast, in front of one implementation per
device.

Ops
    jvpgraph::attention           (o, lse): what scaled_dot_product_attention becomes; has a backward
    jvpgraph::attention_jvp       (o, lse, o_dot, lse_dot): primal and tangent in one pass over the keys
    jvpgraph::attention_backward  (dq, dk, dv, dbias): from o and lse
Math
    s = scale q k' + bias,  p = softmax(s),  o = p v,  lse = log sum exp(s)
    s_dot = scale (q_dot k' + q k_dot') + bias_dot,  h = p * s_dot,  r = rowsum(h)
    o_dot = p v_dot + h v - r * o,  lse_dot = r
Shapes
    q [B, H, Lq, Dqk], k [B, Hkv, Lkv, Dqk], v [B, Hkv, Lkv, Dv] with Hkv a divisor of H; also [B, L, D]
    without heads, and more leading batch dims. bias broadcasts to [B, H, Lq, Lkv] from any rank up to that
    of q: boolean (True attends) or additive. o and the gradients lie in memory as B, L, H, D and are viewed
    as B, H, L, D, whatever the strides of the inputs; lse [B, H, Lq].
Precision
    lse in natural log; lse and all sums in float32 (float64 for float64 inputs), o in the dtype of q.
Fully masked rows
    o = 0, lse = -inf, and zero tangents and gradients.
Refuses
    Mixed dtypes, head dims or head counts that do not fit, a bias that does not broadcast (ValueError);
    forward-mode AD through the ops, which would otherwise give a silent zero, and gradients of o_dot
    (RuntimeError).
Source
    Dao et al., FlashAttention (2022) for the online softmax; Lu and Song, sCM (2024), appendix F for its JVP.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true

from jvpgraph.kernels import attention_blocked

if TYPE_CHECKING or importlib.util.find_spec("triton"):  # there is none but for Linux
    from jvpgraph.kernels import attention_triton
else:
    attention_triton = None

__all__ = ["attention", "attention_backward", "attention_jvp", "implementation", "merge_attention"]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LIBRARY = torch.library.Library("jvpgraph", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, bool is_causal=False, float? scale=None)"
    " -> (Tensor o, Tensor lse)",
    tags=TAGS,
)
LIBRARY.define(
    "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? q_dot, Tensor? k_dot, Tensor? v_dot,"
    " Tensor? bias=None, Tensor? bias_dot=None, bool is_causal=False, float? scale=None)"
    " -> (Tensor o, Tensor lse, Tensor o_dot, Tensor lse_dot)",
    tags=TAGS,
)
LIBRARY.define(
    "attention_backward(Tensor o_grad, Tensor? lse_grad, Tensor q, Tensor k, Tensor v, Tensor? bias,"
    " Tensor o, Tensor lse, bool is_causal=False, float? scale=None, bool bias_needs_grad=False)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    tags=TAGS,
)
OPS = torch.ops.jvpgraph


class Implementation(Protocol):
    """What a device provides: the functions of attention_blocked, on checked rank-4 arguments."""

    def attention(self, *args: Any) -> tuple[Tensor, Tensor]: ...
    def attention_jvp(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def attention_backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...


def implementation(q: Tensor, v: Tensor) -> Implementation:
    """The implementation for the device, dtype and head dims: the one place where a kernel is chosen.

    Triton on the GPUs and dims that it supports, else attention_blocked; JVPGRAPH_ATTENTION=blocked asks for the
    latter everywhere.
    """
    wanted = os.environ.get("JVPGRAPH_ATTENTION", "triton")
    if wanted not in ("triton", "blocked"):
        raise ValueError(f"JVPGRAPH_ATTENTION is {wanted!r}: it takes triton or blocked")
    if wanted == "triton" and attention_triton is not None and attention_triton.supports(q, v):
        return attention_triton
    return attention_blocked


# ---------------------------------------------------------------------------------------------------- checks


def _surely(condition: bool | torch.SymBool) -> bool:
    """Whether a refusal applies; of symbolic sizes only what is certain, so that they get no guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def _refusal(what: str, **given: Tensor | None) -> ValueError:
    shown = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in given.items() if x is not None)
    return ValueError(f"{what}; got {shown}")


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    given = {"q": q, "k": k, "v": v, "bias": bias}
    rank = q.dim()
    if rank < 3 or k.dim() != rank or v.dim() != rank:
        raise _refusal("attention needs q, k, v of one rank, [batch, (heads,) length, dim] or more", **given)
    if q.dtype not in FLOAT_DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise _refusal(f"attention needs q, k, v of one dtype among {FLOAT_DTYPES}", **given)
    if k.device != q.device or v.device != q.device:
        raise _refusal(f"attention needs q, k, v on one device, not on {q.device}, {k.device}, {v.device}", **given)
    if _surely(q.shape[-1] != k.shape[-1]):
        raise _refusal("attention needs q and k of one head dim", **given)
    if _surely(k.shape[-2] != v.shape[-2]):
        raise _refusal("attention needs k and v of one length", **given)
    for i in range(1 if rank == 3 else rank - 3):
        if _surely(q.shape[i] != k.shape[i]) or _surely(q.shape[i] != v.shape[i]):
            raise _refusal("attention does not broadcast batch dims: q, k, v must agree in them", **given)
    if rank > 3:
        _check_heads(q.shape[-3], k.shape[-3], v.shape[-3], given)
    if bias is not None:
        _check_bias(q, k, bias, given)


def _check_heads(heads: int, kv_heads: int, v_heads: int, given: dict[str, Tensor | None]) -> None:
    if _surely(v_heads != kv_heads):
        raise _refusal("attention needs as many heads in v as in k", **given)
    if _surely(heads == kv_heads):
        return
    if _surely(kv_heads == 0) or _surely(heads % kv_heads != 0):
        raise _refusal("attention needs the number of heads of k and v to divide that of q", **given)


def _check_bias(q: Tensor, k: Tensor, bias: Tensor, given: dict[str, Tensor | None]) -> None:
    if bias.dtype not in (torch.bool, torch.float32, q.dtype):
        raise _refusal(
            "attention needs a boolean bias (True attends), or an additive one in float32 or the dtype of q",
            **given,
        )
    if bias.device != q.device:
        raise _refusal(f"attention needs the bias on {q.device}, not on {bias.device}", **given)
    target = (*q.shape[:-1], k.shape[-2])
    if bias.dim() > len(target) or any(
        _surely(have != 1) and _surely(have != want) for have, want in zip(bias.shape[::-1], target[::-1])
    ):
        raise _refusal(f"attention needs a bias that broadcasts to {tuple(target)}", **given)


def _check_tangents(**pairs: tuple[Tensor | None, Tensor | None]) -> None:
    for name, (x, x_dot) in pairs.items():
        if x_dot is None:
            continue
        if x is None or not x.is_floating_point():
            state = "absent" if x is None else "boolean"
            raise ValueError(f"attention_jvp got {name}_dot, but {name} is {state}")
        if (
            x_dot.dtype != x.dtype
            or x_dot.dim() != x.dim()
            or any(_surely(a != b) for a, b in zip(x_dot.shape, x.shape))
        ):
            raise _refusal(
                f"attention_jvp needs {name}_dot of the shape and dtype of {name}",
                **{name: x, f"{name}_dot": x_dot},
            )


# ---------------------------------------------------------------------------------------------------- layout


def _empty_rows(like: Tensor, length: int, dim: int) -> Tensor:
    """Uninitialised [..., H, length, dim] for like [..., H, L, D], in memory [..., length, H, dim]."""
    if like.dim() == 3:
        return like.new_empty(like.shape[0], length, dim)
    return like.new_empty(*like.shape[:-3], length, like.shape[-3], dim).transpose(-3, -2)


def _dtype_inside(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is not None:
        return scale
    return 1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0


def _to_rank4(x: Tensor | None) -> Tensor | None:
    """[B, L, D] -> [B, 1, L, D]; [b1, b2, ..., H, L, D] -> [b1 b2 ..., H, L, D]."""
    if x is None or x.dim() == 4:
        return x
    return x.unsqueeze(1) if x.dim() == 3 else x.flatten(0, -4)


def _bias_to_rank4(q: Tensor, bias: Tensor | None) -> Tensor | None:
    """bias as [B | 1, H | 1, Lq | 1, Lkv | 1]: a view, but for partly broadcast batch dims of rank > 4."""
    if bias is None:
        return None
    bias = bias[(None,) * (q.dim() - bias.dim())]
    if q.dim() == 4:
        return bias
    if q.dim() == 3:
        return bias.unsqueeze(1)
    lead = bias.shape[:-3]
    if any(size != 1 for size in lead):
        bias = bias.expand(*q.shape[:-3], *bias.shape[-3:])
    return bias.flatten(0, -4)


def _bias_grad(q: Tensor, bias: Tensor, dbias: Tensor) -> Tensor:
    """The gradient of a rank-4 bias brought back to the shape and dtype of the caller's."""
    if q.dim() > 4 and dbias.shape[0] != 1:
        dbias = dbias.unflatten(0, q.shape[:-3]).sum_to_size((1,) * max(0, q.dim() - bias.dim()) + tuple(bias.shape))
    return dbias.reshape(bias.shape).to(bias.dtype).contiguous()


def _dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides torch.empty gives to shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _rows_from_rank4(x: Tensor, like: Tensor) -> Tensor:
    """A rank-4 [B, H, L, D] as _empty_rows lays it out, down to the strides of dims of size one."""
    if like.dim() == 3:
        x = x.squeeze(1)
        strides = _dense_strides(x.shape)
    else:
        x = x if like.dim() == 4 else x.unflatten(0, like.shape[:-3])
        *lead, heads, length, dim = x.shape
        *outer, step_length, step_heads, one = _dense_strides((*lead, length, heads, dim))
        strides = (*outer, step_heads, step_length, one)
    return x if x.stride() == strides else _empty_rows(like, x.shape[-2], x.shape[-1]).copy_(x)


def _lse_from_rank3(x: Tensor, q: Tensor) -> Tensor:
    x = x.reshape(q.shape[:-1])
    return x if x.stride() == _dense_strides(x.shape) else x.new_empty(x.shape).copy_(x)


def _lse_to_rank3(q: Tensor, lse: Tensor | None) -> Tensor | None:
    if lse is None or q.dim() == 4:
        return lse
    return lse.unsqueeze(1) if q.dim() == 3 else lse.flatten(0, -3)


# --------------------------------------------------------------------------- the ops: real tensors and fakes


def _empty_o_and_lse(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_rows(q, q.shape[-2], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_dtype_inside(q))


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, bias)
    return _empty_o_and_lse(q, v)


def _attention_real(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, bias)
    o, lse = implementation(q, v).attention(
        *map(_to_rank4, (q, k, v)), _bias_to_rank4(q, bias), is_causal, _scale(q, scale)
    )
    return _rows_from_rank4(o, q), _lse_from_rank3(lse, q)


def _attention_jvp_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    bias: Tensor | None = None,
    bias_dot: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_jvp(q, k, v, q_dot, k_dot, v_dot, bias, bias_dot)
    return *_empty_o_and_lse(q, v), *_empty_o_and_lse(q, v)


def _attention_jvp_real(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    bias: Tensor | None = None,
    bias_dot: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_jvp(q, k, v, q_dot, k_dot, v_dot, bias, bias_dot)
    o, lse, o_dot, lse_dot = implementation(q, v).attention_jvp(
        *map(_to_rank4, (q, k, v, q_dot, k_dot, v_dot)),
        _bias_to_rank4(q, bias),
        _bias_to_rank4(q, bias_dot),
        is_causal,
        _scale(q, scale),
    )
    return (
        _rows_from_rank4(o, q),
        _lse_from_rank3(lse, q),
        _rows_from_rank4(o_dot, q),
        _lse_from_rank3(lse_dot, q),
    )


def _check_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    bias: Tensor | None,
    bias_dot: Tensor | None,
) -> None:
    _check(q, k, v, bias)
    _check_tangents(q=(q, q_dot), k=(k, k_dot), v=(v, v_dot), bias=(bias, bias_dot))


def _attention_backward_fake(
    o_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    bias_needs_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_needs_grad else q.new_empty(0)
    dq, dk, dv = (_empty_rows(x, x.shape[-2], x.shape[-1]) for x in (q, k, v))
    return dq, dk, dv, dbias


def _attention_backward_real(
    o_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    bias_needs_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(q, k, v, bias)
    dq, dk, dv, dbias = implementation(q, v).attention_backward(
        _to_rank4(o_grad),
        _lse_to_rank3(q, lse_grad),
        *map(_to_rank4, (q, k, v)),
        _bias_to_rank4(q, bias),
        _to_rank4(o),
        _lse_to_rank3(q, lse),
        is_causal,
        _scale(q, scale),
        bias_needs_grad,
    )
    dq, dk, dv = (_rows_from_rank4(x, like) for x, like in ((dq, q), (dk, k), (dv, v)))
    if bias is None or dbias is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, _bias_grad(q, bias, dbias)


for _name, _real, _fake in (
    ("attention", _attention_real, _attention_fake),
    ("attention_jvp", _attention_jvp_real, _attention_jvp_fake),
    ("attention_backward", _attention_backward_real, _attention_backward_fake),
):
    LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"jvpgraph::{_name}", _fake, lib=LIBRARY)


# -------------------------------------------------------------------------------------------------- autograd


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


def _gradients(
    ctx: Any, o_grad: Tensor | None, lse_grad: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, bias from what _save kept."""
    q, k, v, bias, o, lse = ctx.saved_tensors
    if o_grad is None and lse_grad is None:
        return None, None, None, None
    needs_q, needs_k, needs_v, needs_bias = ctx.needs
    dq, dk, dv, dbias = OPS.attention_backward.default(
        torch.zeros_like(o) if o_grad is None else o_grad,
        lse_grad,
        q,
        k,
        v,
        bias,
        o,
        lse,
        ctx.is_causal,
        ctx.scale,
        needs_bias,
    )
    return (
        dq if needs_q else None,
        dk if needs_k else None,
        dv if needs_v else None,
        dbias if needs_bias else None,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], o: Tensor, lse: Tensor, is_causal: bool, scale: float | None) -> None:
    q, k, v, bias = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, o, lse)
    ctx.is_causal, ctx.scale = is_causal, scale
    ctx.needs = tuple(x is not None and x.requires_grad for x in inputs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, q: Any, k: Any, v: Any, bias: Any, is_causal: Any, scale: Any) -> Any:
        o, lse = _below_autograd(OPS.attention.default, keyset, q, k, v, bias, is_causal, scale)
        _save(ctx, (q, k, v, bias), o, lse, is_causal, scale)
        return o, lse

    @staticmethod
    def backward(ctx: Any, o_grad: Any, lse_grad: Any) -> Any:
        return None, *_gradients(ctx, o_grad, lse_grad), None, None


class _AttentionJvp(torch.autograd.Function):
    """Differentiable in o and lse; the tangents are constants to reverse mode, and say so when asked."""

    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        q: Any,
        k: Any,
        v: Any,
        q_dot: Any,
        k_dot: Any,
        v_dot: Any,
        bias: Any,
        bias_dot: Any,
        is_causal: Any,
        scale: Any,
    ) -> Any:
        args = (q, k, v, q_dot, k_dot, v_dot, bias, bias_dot, is_causal, scale)
        o, lse, o_dot, lse_dot = _below_autograd(OPS.attention_jvp.default, keyset, *args)
        _save(ctx, (q, k, v, bias), o, lse, is_causal, scale)
        return o, lse, o_dot, lse_dot

    @staticmethod
    def backward(ctx: Any, o_grad: Any, lse_grad: Any, o_dot_grad: Any, lse_dot_grad: Any) -> Any:
        if o_dot_grad is not None or lse_dot_grad is not None:
            raise RuntimeError("jvpgraph::attention_jvp: the tangents o_dot and lse_dot have no gradient; detach them")
        dq, dk, dv, dbias = _gradients(ctx, o_grad, lse_grad)
        return None, dq, dk, dv, None, None, None, dbias, None, None, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        return _below_autograd(OPS.attention_backward.default, keyset, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("jvpgraph::attention_backward: second derivatives of attention are not implemented")


def _differentiable(op: str, function: type[torch.autograd.Function], defaults: tuple[Any, ...]) -> Any:
    """The kernel of op above autograd; defaults fill the trailing arguments that the dispatcher left out."""
    overload = getattr(OPS, op).default
    arity = len(overload._schema.arguments)

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        _refuse_forward_ad(op, *tensors)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            missing = arity - len(args)
            return function.apply(keyset, *args, *(defaults[-missing:] if missing else ()))
        return _below_autograd(overload, keyset, *args)

    return kernel


for _name, _function, _defaults in (
    ("attention", _Attention, (None, False, None)),
    ("attention_jvp", _AttentionJvp, (None, None, False, None)),
    ("attention_backward", _AttentionBackward, (False, None, False)),
):
    LIBRARY.impl(_name, _differentiable(_name, _function, _defaults), "Autograd", with_keyset=True)


# -------------------------------------------------------------------------------------------------- autocast


def _autocast(op: str, device_type: str) -> Any:
    """Casts what scaled_dot_product_attention casts under autocast: floating-point tensors but float64."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def cast(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(device_type)) if eligible else x

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(OPS, op).default(*map(cast, args))

    return kernel


for _name in ("attention", "attention_jvp"):
    LIBRARY.impl(_name, _autocast(_name, "cpu"), "AutocastCPU")
    LIBRARY.impl(_name, _autocast(_name, "cuda"), "AutocastCUDA")


# ------------------------------------------------------------------------------------------ public functions


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k' + bias) v, and the log of the softmax's denominator.

    Args:
        q: [B, H, Lq, Dqk], or [B, Lq, Dqk], or with more leading batch dims; any strides.
        k: [B, Hkv, Lkv, Dqk], Hkv a divisor of H.
        v: [B, Hkv, Lkv, Dv].
        bias: broadcasts to [B, H, Lq, Lkv], from any rank up to that of q; boolean (True attends), or
            additive in float32 or the dtype of q, outside the scale.
        is_causal: query i sees keys 0..i; combines with bias.
        scale: factor on q k', default 1 / sqrt(Dqk).
    Returns:
        o [B, H, Lq, Dv] in the dtype of q, laid out as B, Lq, H, Dv; lse [B, H, Lq], natural log, float32
        (float64 for float64). Both have gradients in q, k, v and additive bias.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: an input carries a tangent of torch's own forward mode.
    """
    return OPS.attention.default(q, k, v, bias, is_causal, scale)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    bias: Tensor | None = None,
    bias_dot: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention and its directional derivative, in one pass over the keys and memory linear in their number.

    Args:
        q, k, v, bias, is_causal, scale: as for attention.
        q_dot, k_dot, v_dot, bias_dot: tangents, each of the shape and dtype of its primal, or None where
            that does not move: then its products are not computed.
    Returns:
        o, lse as attention gives them; o_dot, lse_dot likewise, without gradients.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        RuntimeError: a gradient of o_dot or lse_dot is asked for, or an input carries a tangent of torch's
            own forward mode.
    """
    return OPS.attention_jvp.default(q, k, v, q_dot, k_dot, v_dot, bias, bias_dot, is_causal, scale)


def attention_backward(
    o_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    bias_needs_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias from the o and lse of attention or attention_jvp.

    Returns:
        dq, dk, dv shaped as q, k, v; dbias shaped as bias, or an empty tensor unless bias_needs_grad.
    """
    return OPS.attention_backward.default(o_grad, lse_grad, q, k, v, bias, o, lse, is_causal, scale, bias_needs_grad)


def merge_attention(*parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Attention over the union of disjoint key sets, from attention over each.

    With w_i = exp(lse_i - lse): o = sum w_i o_i, o_dot = sum w_i (o_dot_i + (lse_dot_i - lse_dot) o_i),
    lse_dot = sum w_i lse_dot_i.

    Args:
        parts: (o, lse) or (o, lse, o_dot, lse_dot) of each key set, shaped as attention and attention_jvp
            return them.
    Returns:
        The same tuple for all keys together; a row that no part attends to gives o = 0, lse = -inf and zero
        tangents.
    """
    if not parts or len({len(part) for part in parts}) != 1 or len(parts[0]) not in (2, 4):
        raise ValueError("merge_attention needs tuples (o, lse), or tuples (o, lse, o_dot, lse_dot), all of one length")
    lses = torch.stack([part[1] for part in parts])
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == -math.inf, 0)).exp()
    dtype = parts[0][0].dtype
    o = sum(w[..., None] * part[0] for w, part in zip(weights, parts))
    if len(parts[0]) == 2:
        return o.to(dtype), lse
    lse_dot = sum(w * part[3] for w, part in zip(weights, parts))
    o_dot = sum(w[..., None] * (part[2] + (part[3] - lse_dot)[..., None] * part[0]) for w, part in zip(weights, parts))
    return o.to(dtype), lse, o_dot.to(dtype), lse_dot
