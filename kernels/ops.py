"""The attention ops as the dispatcher sees them: schemas, shapes, autograd and autocast, in front of one
implementation per device.

Ops
    jvpgraph::attention               (o, lse): what scaled_dot_product_attention becomes; has a backward
    jvpgraph::attention_jvp           (o, lse, o_dot, lse_dot): primal and tangent in one pass over the keys
    jvpgraph::attention_backward      (dq, dk, dv, dbias): from o and lse
    jvpgraph::attention_jvp_backward  (dq, dk, dv, dq_dot, dk_dot, dv_dot, dbias, dbias_dot): through the tangent too
See jvpgraph.kernels.attention for what they compute. An op takes any strides; the functions there are stricter.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from jvpgraph.kernels import attention_blocked, tangent_backward
from jvpgraph.kernels.checks import check_how, check_operands, check_outputs, check_sequences, check_tangents
from jvpgraph.kernels.layout import (
    bias_grad,
    bias_to_rank4,
    dtype_inside,
    empty_rows,
    lse_from_rank3,
    lse_to_rank3,
    rows_from_rank4,
    to_rank4,
)
from jvpgraph.kernels.window import Window, packed_mask

__all__ = ["OPS", "How", "describe", "implementation"]


def _imported(name: str) -> tuple[Any, str]:
    """(jvpgraph.kernels.<name>, ""), or (None, why not). There is no Triton but for Linux, one that is too old or too
    new lacks what is asked of it, and one that is broken raises anything: nobody needs it to import this package."""
    try:
        return importlib.import_module(f"jvpgraph.kernels.{name}"), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


attention_triton, NO_TRITON = _imported("attention_triton")
attention_gluon, _ = _imported("attention_gluon")

LIBRARY = torch.library.Library("jvpgraph", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
OPS = torch.ops.jvpgraph

QKV = "Tensor q, Tensor k, Tensor v"
DOTS = "Tensor? q_dot, Tensor? k_dot, Tensor? v_dot"
HOW = (
    "bool is_causal=False, float? scale=None, int[]? window=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_kv=None"
)
SCHEMAS = {
    "attention": f"({QKV}, Tensor? bias=None, {HOW}) -> (Tensor o, Tensor lse)",
    "attention_jvp": f"({QKV}, {DOTS}, Tensor? bias=None, Tensor? bias_dot=None, {HOW},"
    " bool differentiable_tangent=False) -> (Tensor o, Tensor lse, Tensor o_dot, Tensor lse_dot)",
    "attention_backward": f"(Tensor o_grad, Tensor? lse_grad, {QKV}, Tensor? bias, Tensor o, Tensor lse, {HOW},"
    " bool bias_needs_grad=False) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    "attention_jvp_backward": "(Tensor? o_grad, Tensor? lse_grad, Tensor? o_dot_grad, Tensor? lse_dot_grad,"
    f" {QKV}, {DOTS}, Tensor? bias, Tensor? bias_dot, Tensor o, Tensor lse, Tensor o_dot, Tensor lse_dot, {HOW},"
    " bool bias_needs_grad=False, bool bias_dot_needs_grad=False) -> (Tensor dq, Tensor dk, Tensor dv,"
    " Tensor dq_dot, Tensor dk_dot, Tensor dv_dot, Tensor dbias, Tensor dbias_dot)",
}
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=TAGS)


class How(NamedTuple):
    """What all ops share after their tensors, in the order of the schemas."""

    is_causal: bool = False
    scale: float | None = None
    window: Sequence[int] | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None

    def inside(self, q: Tensor) -> tuple[Window, float]:
        """The window and the scale as implementations take them."""
        left, right = (None if width < 0 else width for width in self.window or (-1, -1))
        scale = self.scale
        if scale is None:
            scale = 1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
        return Window(left, 0 if self.is_causal else right), scale

    def sequences(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
        """The queries and the keys of each packed sequence. Waits for the device."""
        ends = (cu.tolist() for cu in self.packing(q, k))
        yield from ((slice(*at_q), slice(*at_kv)) for at_q, at_kv in zip(*map(itertools.pairwise, ends)))

    def packing(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The offsets of the sequences of queries and of keys, which there are."""
        assert self.cu_seqlens_q is not None
        assert self.cu_seqlens_kv is not None
        check_sequences(q, k, self.cu_seqlens_q, self.cu_seqlens_kv)
        return self.cu_seqlens_q, self.cu_seqlens_kv

    def without_waiting(self, q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[How, Tensor | None]:
        """This and the bias, but packed sequences as a dense mask while a CUDA graph is captured, which must not wait
        for their lengths: a byte for each pair of a query and a key."""
        if self.cu_seqlens_q is None or self.cu_seqlens_kv is None or not _is_capturing(q):
            return self, bias
        check_sequences(q, k, self.cu_seqlens_q, self.cu_seqlens_kv)
        mask = packed_mask(self.cu_seqlens_q, self.cu_seqlens_kv, q.shape[2], k.shape[2], self.inside(q)[0])
        return How(False, self.scale), mask


def _is_capturing(q: Tensor) -> bool:
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


class Implementation(Protocol):
    """What a device provides: the functions of attention_blocked, on checked rank-4 arguments."""

    def attention(self, *args: Any, **packed: Any) -> tuple[Tensor, Tensor]: ...
    def attention_jvp(self, *args: Any, **packed: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def attention_backward(self, *args: Any, **blocks: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...


def implementation(q: Tensor, v: Tensor) -> Implementation:
    """The implementation for the device, dtype and head dims: the one place where a kernel is chosen.

    Triton on the GPUs and dims that it supports, Gluon where a GPU showed that to be faster, else attention_blocked.
    JVPGRAPH_ATTENTION=gluon, triton or blocked asks for one of them wherever it can be.
    """
    wanted = os.environ.get("JVPGRAPH_ATTENTION")
    if wanted not in (None, "gluon", "triton", "blocked"):
        raise ValueError(f"JVPGRAPH_ATTENTION is {wanted!r}: it takes gluon, triton or blocked")
    if attention_triton is None and q.is_cuda and wanted != "blocked":
        warnings.warn(
            f"attention goes to blocks of torch ops, for Triton could not be imported ({NO_TRITON}): "
            "install the one that this torch asks for, or set JVPGRAPH_ATTENTION=blocked",
            stacklevel=2,
        )
    if wanted == "blocked" or attention_triton is None or not attention_triton.supports(q, v):
        return attention_blocked
    if wanted == "triton" or attention_gluon is None or not attention_gluon.supports(q, v):
        return attention_triton
    return attention_gluon if wanted == "gluon" or attention_gluon.is_faster(q, v) else attention_triton


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *rest: Any,
    bias_dot: Tensor | None = None,
    differentiable_tangent: bool = False,
) -> str:
    """Which kernels compute attention of tensors like these, and its gradients in q, k and v.

    Args:
        q, k, v, bias, rest: as of the op `attention`; fakes do, but for symbolic sizes.
        bias_dot, differentiable_tangent: as of `attention_jvp`.
    """
    if q.device.type == "meta":
        return "the kernel of the device it will be on: this is meta"
    chosen: Any = implementation(q, v)
    if chosen is attention_blocked:
        return "blocks of torch ops"
    how, bias = How(*rest), bias_to_rank4(q, bias)
    window, scale = how.inside(q)
    name, why = chosen.backward_path(q, k, v, bias, window, scale, False, False)
    packed = None if how.cu_seqlens_q is None or how.cu_seqlens_kv is None else (how.cu_seqlens_q, how.cu_seqlens_kv)
    gluon = chosen is attention_gluon and attention_gluon.supports(q, v, bias, window, scale, packed)
    forward = "Gluon" if gluon else "Triton"
    described = f"{forward}, backward by {NAMES_OF_BACKWARDS[name]}" + (f": {why}" if why else "")
    if not differentiable_tangent:
        return described
    why_not = attention_triton.why_not(q, k, v, bias, bias_dot=bias_to_rank4(q, bias_dot), moves=True)
    way = NAMES_OF_BACKWARDS["blocked" if why_not else "triton"]
    return f"{described}; through the tangent by {way}" + (f": {why_not}" if why_not else "")


NAMES_OF_BACKWARDS = {
    "flash": "ATen's flash",
    "efficient": "ATen's efficient kernel",
    "triton": "Triton",
    "blocked": "blocks of torch ops",
}


def _jvp_backward(q: Tensor, v: Tensor) -> Callable[..., tangent_backward.Gradients]:
    """The backward through the tangent that goes with the implementation."""
    chosen: Any = implementation(q, v)
    return (tangent_backward if chosen is attention_blocked else chosen).attention_jvp_backward


# --------------------------------------------------------------------------- the ops: real tensors and fakes


def _empty_o_and_lse(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows(q, q.shape[-2], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=dtype_inside(q))


def _blind_o_and_lse(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What queries get that see no key."""
    o, lse = _empty_o_and_lse(q, v)
    return o.zero_(), lse.fill_(-math.inf)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *rest: Any) -> tuple[Tensor, ...]:
    check_operands(q, k, v, bias)
    check_how(q, k, bias, *How(*rest)[2:])
    return _empty_o_and_lse(q, v)


def _attention_real(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *rest: Any) -> tuple[Tensor, ...]:
    how = How(*rest)
    check_operands(q, k, v, bias)
    check_how(q, k, bias, *how[2:])
    chosen, inside = implementation(q, v), how.inside(q)
    if how.cu_seqlens_q is None:
        o, lse = chosen.attention(*map(to_rank4, (q, k, v)), bias_to_rank4(q, bias), *inside)
    elif chosen is not attention_blocked:
        o, lse = chosen.attention(q, k, v, None, *inside, cu_seqlens=how.packing(q, k))
    else:
        o, lse = _blind_o_and_lse(q, v)
        for at_q, at_kv in how.sequences(q, k):
            part = chosen.attention(q[:, :, at_q], k[:, :, at_kv], v[:, :, at_kv], None, *inside)
            o[:, :, at_q], lse[:, :, at_q] = part
    return rows_from_rank4(o, q), lse_from_rank3(lse, q)


def _attention_jvp_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    bias: Tensor | None = None,
    bias_dot: Tensor | None = None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    check_operands(q, k, v, bias)
    check_tangents(q=(q, q_dot), k=(k, k_dot), v=(v, v_dot), bias=(bias, bias_dot))
    check_how(q, k, bias, *How(*rest[:5])[2:])
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
    *rest: Any,
) -> tuple[Tensor, ...]:
    how = How(*rest[:5])
    check_operands(q, k, v, bias)
    check_tangents(q=(q, q_dot), k=(k, k_dot), v=(v, v_dot), bias=(bias, bias_dot))
    check_how(q, k, bias, *how[2:])
    chosen, inside = implementation(q, v), how.inside(q)
    operands = (q, k, v, q_dot, k_dot, v_dot)
    if how.cu_seqlens_q is None:
        biases = bias_to_rank4(q, bias), bias_to_rank4(q, bias_dot)
        o, lse, o_dot, lse_dot = chosen.attention_jvp(*map(to_rank4, operands), *biases, *inside)
    elif chosen is not attention_blocked:
        packing = how.packing(q, k)
        o, lse, o_dot, lse_dot = chosen.attention_jvp(*operands, None, None, *inside, cu_seqlens=packing)
    else:
        (o, lse), (o_dot, lse_dot) = _blind_o_and_lse(q, v), _empty_o_and_lse(q, v)
        outs = (o, lse, o_dot.zero_(), lse_dot.zero_())
        for at_q, at_kv in how.sequences(q, k):
            part = [None if x is None else x[:, :, at] for x, at in zip(operands, (at_q, at_kv, at_kv) * 2)]
            for out, value in zip(outs, chosen.attention_jvp(*part, None, None, *inside)):
                out[:, :, at_q] = value
    return rows_from_rank4(o, q), lse_from_rank3(lse, q), rows_from_rank4(o_dot, q), lse_from_rank3(lse_dot, q)


def _grads_like(*inputs: Tensor | None, rows: int) -> list[Tensor]:
    """Uninitialised gradients: of the first `rows` inputs as rows, of the rest, which are biases, dense; empty
    for None."""
    absent = inputs[0].new_empty  # type: ignore[union-attr]
    return [
        absent(0) if x is None else empty_rows(x, x.shape[-2], x.shape[-1]) if i < rows else x.new_empty(x.shape)
        for i, x in enumerate(inputs)
    ]


def _attention_backward_fake(
    o_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    check_operands(q, k, v, bias)
    check_outputs(q, v, {"o_grad": o_grad, "o": o}, {"lse": lse, "lse_grad": lse_grad})
    check_how(q, k, bias, *How(*rest[:5])[2:])
    bias_needs_grad = len(rest) > 5 and rest[5]
    return tuple(_grads_like(q, k, v, bias if bias_needs_grad else None, rows=3))


def _attention_backward_real(
    o_grad: Tensor,
    lse_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    how, bias_needs_grad = How(*rest[:5]), len(rest) > 5 and rest[5]
    check_operands(q, k, v, bias)
    check_outputs(q, v, {"o_grad": o_grad, "o": o}, {"lse": lse, "lse_grad": lse_grad})
    check_how(q, k, bias, *how[2:])
    how, bias = how.without_waiting(q, k, bias)
    chosen, inside = implementation(q, v), how.inside(q)
    dbias = None
    if how.cu_seqlens_q is None:
        dq, dk, dv, dbias = chosen.attention_backward(
            to_rank4(o_grad),
            lse_to_rank3(q, lse_grad),
            *map(to_rank4, (q, k, v)),
            bias_to_rank4(q, bias),
            to_rank4(o),
            lse_to_rank3(q, lse),
            *inside,
            bias_needs_grad,
        )
    else:
        dq, dk, dv = outs = [x.zero_() for x in _grads_like(q, k, v, rows=3)]
        for at_q, at_kv in how.sequences(q, k):
            at = (at_q, at_q, at_q, at_kv, at_kv, at_q, at_q)
            part = [None if x is None else x[:, :, span] for x, span in zip((o_grad, lse_grad, q, k, v, o, lse), at)]
            *grads, _ = chosen.attention_backward(*part[:5], None, *part[5:], *inside, False)
            for out, span, value in zip(outs, (at_q, at_kv, at_kv), grads):
                out[:, :, span] = value
    dq, dk, dv = (rows_from_rank4(x, like) for x, like in ((dq, q), (dk, k), (dv, v)))
    if bias is None or dbias is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, bias_grad(q, bias, dbias)


class Tangents(NamedTuple):
    """The tensors of attention_jvp_backward, in the order of its schema."""

    o_grad: Tensor | None
    lse_grad: Tensor | None
    o_dot_grad: Tensor | None
    lse_dot_grad: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    q_dot: Tensor | None
    k_dot: Tensor | None
    v_dot: Tensor | None
    bias: Tensor | None
    bias_dot: Tensor | None
    o: Tensor
    lse: Tensor
    o_dot: Tensor
    lse_dot: Tensor

    def check(self) -> None:
        """Raises ValueError for what does not fit q, k and v."""
        check_operands(self.q, self.k, self.v, self.bias)
        check_tangents(
            q=(self.q, self.q_dot), k=(self.k, self.k_dot), v=(self.v, self.v_dot), bias=(self.bias, self.bias_dot)
        )
        rows, row_sums = ("o_grad", "o_dot_grad", "o", "o_dot"), ("lse_grad", "lse_dot_grad", "lse", "lse_dot")
        x = self._asdict()
        check_outputs(self.q, self.v, {name: x[name] for name in rows}, {name: x[name] for name in row_sums})

    def rank4(self) -> list[Tensor | None]:
        """All of them as implementations take them."""
        lses, biases = ("lse_grad", "lse_dot_grad", "lse", "lse_dot"), ("bias", "bias_dot")
        return [
            lse_to_rank3(self.q, x) if name in lses else bias_to_rank4(self.q, x) if name in biases else to_rank4(x)
            for name, x in self._asdict().items()
        ]

    def narrow(self, at_q: slice, at_kv: slice) -> list[Tensor | None]:
        """Those of one packed sequence."""
        of_keys = ("k", "v", "k_dot", "v_dot")
        return [
            None if x is None else x[:, :, at_kv if name in of_keys else at_q] for name, x in self._asdict().items()
        ]


def _attention_jvp_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    given, (needs_bias, needs_bias_dot) = Tangents(*args[:16]), (*args[21:], False, False)[:2]
    given.check()
    check_how(given.q, given.k, given.bias, *How(*args[16:21])[2:])
    biases = given.bias if needs_bias else None, given.bias_dot if needs_bias_dot else None
    return tuple(_grads_like(*given[4:10], *biases, rows=6))


def _attention_jvp_backward_real(*args: Any) -> tuple[Tensor, ...]:
    given, how, needs = Tangents(*args[:16]), How(*args[16:21]), (*args[21:], False, False)[:2]
    q, k, v, bias, bias_dot = given.q, given.k, given.v, given.bias, given.bias_dot
    given.check()
    check_how(q, k, bias, *how[2:])
    how, bias = how.without_waiting(q, k, bias)
    given = given._replace(bias=bias)
    backward = _jvp_backward(q, v)
    grads: Sequence[Tensor | None]
    if how.cu_seqlens_q is None:
        *grads, dbias, dbias_dot = backward(*given.rank4(), *how.inside(q), *needs)
    else:
        dbias = dbias_dot = None
        grads = zeros = [x.zero_() for x in _grads_like(*given[4:10], rows=6)]
        for at_q, at_kv in how.sequences(q, k):
            part = backward(*given.narrow(at_q, at_kv), *how.inside(q), False, False)
            for out, span, value in zip(zeros, (at_q, at_kv, at_kv) * 2, part):
                if value is not None:
                    out[:, :, span] = value
    rows = [
        q.new_empty(0) if like is None or x is None else rows_from_rank4(x, like) for x, like in zip(grads, given[4:10])
    ]
    biases = [
        q.new_empty(0) if like is None or x is None else bias_grad(q, like, x)
        for x, like in ((dbias, bias), (dbias_dot, bias_dot))
    ]
    return *rows, *biases


AUTOCAST_KEYS = functools.reduce(
    operator.or_,
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
        for name in ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS", "AutocastHPU", "AutocastPrivateUse1")
        if hasattr(torch._C.DispatchKey, name)
    ),
)


def _without_autocast(real: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation knows the dtypes of what it is given, and casts by itself. A backward is called within
    autocast where loss.backward() is, and a forward where what it is given was cast before."""

    @functools.wraps(real)
    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            return real(*args)

    return kernel


for _name, _real, _fake in (
    ("attention", _attention_real, _attention_fake),
    ("attention_jvp", _attention_jvp_real, _attention_jvp_fake),
    ("attention_backward", _attention_backward_real, _attention_backward_fake),
    ("attention_jvp_backward", _attention_jvp_backward_real, _attention_jvp_backward_fake),
):
    LIBRARY.impl(_name, _without_autocast(_real), "CompositeExplicitAutograd")
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


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _gradients(ctx: Any, o_grad: Tensor | None, lse_grad: Tensor | None) -> list[Tensor | None]:
    """Gradients of q, k, v, bias from what was saved."""
    q, k, v, bias, o, lse, cu_q, cu_kv, *_ = ctx.saved_tensors
    if o_grad is None and lse_grad is None:
        return [None] * 4
    grads = OPS.attention_backward.default(
        _or_zeros(o_grad, o), lse_grad, q, k, v, bias, o, lse, *ctx.how, cu_q, cu_kv, ctx.needs["bias"]
    )
    return [grad if ctx.needs[name] else None for name, grad in zip(("q", "k", "v", "bias"), grads)]


def _save(ctx: Any, inputs: dict[str, Tensor | None], outs: Sequence[Tensor], how: How, *more: Any) -> None:
    """Keep what the backward needs: q, k, v, bias of the inputs, o and lse of the outs, and whatever more."""
    kept = [inputs[name] for name in ("q", "k", "v", "bias")]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept, *outs[:2], how.cu_seqlens_q, how.cu_seqlens_kv, *more)
    ctx.how = how[:3]
    ctx.needs = {name: x is not None and x.requires_grad for name, x in inputs.items()}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, q: Any, k: Any, v: Any, bias: Any, *how: Any) -> Any:
        outs = _below_autograd(OPS.attention.default, keyset, q, k, v, bias, *how)
        _save(ctx, {"q": q, "k": k, "v": v, "bias": bias}, outs, How(*how))
        return outs

    @staticmethod
    def backward(ctx: Any, o_grad: Any, lse_grad: Any) -> Any:
        return None, *_gradients(ctx, o_grad, lse_grad), *[None] * 5


class _AttentionJvp(torch.autograd.Function):
    """Differentiable in o and lse. The tangents are constants to reverse mode, and say so when asked, unless
    differentiable_tangent."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        outs = _below_autograd(OPS.attention_jvp.default, keyset, *args)
        names = ("q", "k", "v", "q_dot", "k_dot", "v_dot", "bias", "bias_dot")
        inputs, how, ctx.differentiable = dict(zip(names, args)), How(*args[8:13]), args[13]
        dots = [inputs[name] for name in ("q_dot", "k_dot", "v_dot", "bias_dot")]
        _save(ctx, inputs, outs, how, *((*dots, *outs[2:]) if ctx.differentiable else ()))
        return outs

    @staticmethod
    def backward(ctx: Any, o_grad: Any, lse_grad: Any, o_dot_grad: Any, lse_dot_grad: Any) -> Any:
        rest = [None] * 6
        if o_dot_grad is None and lse_dot_grad is None:
            dq, dk, dv, dbias = _gradients(ctx, o_grad, lse_grad)
            return None, dq, dk, dv, None, None, None, dbias, None, *rest
        if not ctx.differentiable:
            raise RuntimeError(
                "jvpgraph::attention_jvp: the tangents o_dot and lse_dot have no gradient; detach them, or ask for it "
                "with differentiable_tangent=True"
            )
        q, k, v, bias, o, lse, cu_q, cu_kv, q_dot, k_dot, v_dot, bias_dot, o_dot, lse_dot = ctx.saved_tensors
        grads = OPS.attention_jvp_backward.default(
            *(o_grad, lse_grad, o_dot_grad, lse_dot_grad, q, k, v, q_dot, k_dot, v_dot, bias, bias_dot),
            *(o, lse, o_dot, lse_dot, *ctx.how, cu_q, cu_kv, ctx.needs["bias"], ctx.needs["bias_dot"]),
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
    overload = getattr(OPS, op).default
    defaults = [argument.default_value for argument in overload._schema.arguments]

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
