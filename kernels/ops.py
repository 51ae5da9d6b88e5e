"""The attention ops on real tensors and on fakes, in front of the kernels that jvpgraph.kernels.choose chooses.

Ops
    jvpgraph::attention               (o, lse): what scaled_dot_product_attention becomes; has a backward
    jvpgraph::attention_jvp           (o, lse, o_dot, lse_dot): primal and tangent in one pass over the keys
    jvpgraph::attention_jvps          the same of T tangents: dots, o_dots and lse_dots have a first dim of T
    jvpgraph::attention_backward      (dq, dk, dv, dbias): from o and lse
    jvpgraph::attention_jvp_backward  (dq, dk, dv, dq_dot, dk_dot, dv_dot, dbias, dbias_dot): through the tangent too
Those that make block masks are in jvpgraph.kernels.mask_ops.
See jvpgraph.kernels.attention for what they compute. An op takes any strides; the functions there are stricter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jvpgraph.kernels import autograd, mask_ops  # noqa: F401  which the ops have from the start
from jvpgraph.kernels.call import Call, Cotangents, Dots, Outputs, Wanted, check_call
from jvpgraph.kernels.checks import check_block_map, check_outputs, check_sequences
from jvpgraph.kernels.choose import attend, attend_all, differentiate
from jvpgraph.kernels.layout import (
    bias_grad,
    dtype_inside,
    empty_rows,
    lse_from_rank3,
    lse_to_rank3,
    rows_from_rank4,
    to_rank4,
)
from jvpgraph.kernels.schemas import AUTOCAST_KEYS, LIBRARY, OPS, SCHEMAS, arguments, how_of

__all__ = ["ALL_DOTS", "OPS", "REAL", "call_of", "one_of"]

ROWS, ROW_SUMS = ("o_grad", "o_dot_grad", "o", "o_dot"), ("lse_grad", "lse_dot_grad", "lse", "lse_dot")
INPUTS = ("q", "k", "v", "q_dot", "k_dot", "v_dot")
ALL_DOTS = ("q_dot", "k_dot", "v_dot", "bias_dot")


def _dots(given: dict[str, Any]) -> Dots:
    return given.get("q_dot"), given.get("k_dot"), given.get("v_dot")


def _check(given: dict[str, Any]) -> None:
    """Raise ValueError for arguments that do not fit together; symbolic sizes get no guard."""
    biases = given.get("bias"), given.get("bias_dot")
    check_call(given["q"], given["k"], given["v"], _dots(given), *biases, how_of(given))
    _check_outputs(given)


def _check_outputs(given: dict[str, Any]) -> None:
    """The same of what a backward is given of the forward."""
    rows, row_sums = ({name: given[name] for name in names if name in given} for names in (ROWS, ROW_SUMS))
    check_outputs(given["q"], given["v"], rows, row_sums)


def call_of(given: dict[str, Any]) -> Call:
    """The call that an op is given, by the names of its schema."""
    has_tangent_grad = given.get("o_dot_grad") is not None or given.get("lse_dot_grad") is not None
    return Call.of(
        given["q"],
        given["k"],
        given["v"],
        _dots(given),
        given.get("bias"),
        given.get("bias_dot"),
        how_of(given),
        Wanted(
            given.get("lse_grad") is not None,
            has_tangent_grad,
            bool(given.get("bias_needs_grad")),
            bool(given.get("bias_dot_needs_grad")),
        ),
    )


def _checked_call(given: dict[str, Any]) -> Call:
    """That of real tensors, of which offsets of packed sequences and maps of tiles are checked as well."""
    call = call_of(given)
    _check_outputs(given)
    if call.packing is not None:
        check_sequences(call.q, call.k, *call.packing)
    if call.block_mask is not None:
        check_block_map(*call.block_mask)
    return call


# ------------------------------------------------------------------------------------------------------- forward


def _empty_o_and_lse(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows(q, q.shape[-2], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=dtype_inside(q))


def _attention_fake(*args: Any) -> tuple[Tensor, ...]:
    given = arguments("attention", args)
    _check(given)
    return _empty_o_and_lse(given["q"], given["v"])


def _attention_real(*args: Any) -> tuple[Tensor, ...]:
    given = arguments("attention", args)
    outs, q = attend(_checked_call(given)), given["q"]
    return rows_from_rank4(outs.o, q), lse_from_rank3(outs.lse, q)


def _attention_jvp_fake(*args: Any) -> tuple[Tensor, ...]:
    given = arguments("attention_jvp", args)
    _check(given)
    q, v = given["q"], given["v"]
    return *_empty_o_and_lse(q, v), *_empty_o_and_lse(q, v)


def _attention_jvp_real(*args: Any) -> tuple[Tensor, ...]:
    given = arguments("attention_jvp", args)
    o, lse, o_dot, lse_dot = attend(_checked_call(given))
    q = given["q"]
    o_dot = torch.zeros_like(o) if o_dot is None else o_dot
    lse_dot = torch.zeros_like(lse) if lse_dot is None else lse_dot
    return rows_from_rank4(o, q), lse_from_rank3(lse, q), rows_from_rank4(o_dot, q), lse_from_rank3(lse_dot, q)


def one_of(given: dict[str, Any], t: int) -> dict[str, Any]:
    """The arguments of attention_jvps with the t-th of each tangent, as attention_jvp takes them."""
    return given | {name: given[name][t] for name in ALL_DOTS if given[name] is not None}


def _count(given: dict[str, Any]) -> Any:
    """How many tangents attention_jvps is given of each."""
    counts = [given[name].shape[0] for name in ALL_DOTS if given[name] is not None]
    if not counts or any(count != counts[0] for count in counts):
        raise ValueError(f"attention_jvps needs tangents, and as many of each; got {counts}")
    return counts[0]


def _attention_jvps_fake(*args: Any) -> tuple[Tensor, ...]:
    given = arguments("attention_jvps", args)
    count = _count(given)
    _check(one_of(given, 0))
    o, lse = _empty_o_and_lse(given["q"], given["v"])
    return o, lse, *(x.new_empty(count, *x.shape) for x in (o, lse))


def _attention_jvps_real(*args: Any) -> tuple[Tensor, ...]:
    given = arguments("attention_jvps", args)
    q, count = given["q"], _count(given)
    first = _checked_call(one_of(given, 0))  # what is looked into besides shapes is the same for all
    outs = attend_all([first, *(call_of(one_of(given, t)) for t in range(1, count))])
    o, lse = outs[0].o, outs[0].lse
    o_dots = torch.stack([rows_from_rank4(torch.zeros_like(o) if x.o_dot is None else x.o_dot, q) for x in outs])
    lse_dots = torch.stack([lse_from_rank3(torch.zeros_like(lse) if x.lse_dot is None else x.lse_dot, q) for x in outs])
    return rows_from_rank4(o, q), lse_from_rank3(lse, q), o_dots, lse_dots


# ------------------------------------------------------------------------------------------------------ backward


def _differentiated(given: dict[str, Any]) -> dict[str, Tensor | None]:
    """The gradients of all inputs by name, in the shapes of the caller; None where there is none."""
    call, q = _checked_call(given), given["q"]
    rows: dict[str, Any] = {name: None if given.get(name) is None else to_rank4(given[name]) for name in ROWS}
    sums: dict[str, Any] = {name: lse_to_rank3(q, given.get(name)) for name in ROW_SUMS}
    outs = Outputs(rows["o"], sums["lse"], rows["o_dot"], sums["lse_dot"])
    grads = Cotangents(rows["o_grad"], sums["lse_grad"], rows["o_dot_grad"], sums["lse_dot_grad"])
    found = differentiate(call.without_waiting(), outs, grads)
    of_rows = {name: x if x is None else rows_from_rank4(x, given[name]) for name, x in zip(INPUTS, found)}
    biases = {
        name: None if x is None or given.get(name) is None else bias_grad(q, given[name], x)
        for name, x in (("bias", found.bias), ("bias_dot", found.bias_dot))
    }
    return of_rows | biases


def _empty_gradient(given: dict[str, Any], name: str) -> Tensor:
    """Uninitialised: rows, or dense of a bias; without elements where there is no such input, or none is asked for."""
    x = given.get(name)
    if x is None or not given.get(f"{name}_needs_grad", True):
        return given["q"].new_empty(0)
    return x.new_empty(x.shape) if name.startswith("bias") else empty_rows(x, x.shape[-2], x.shape[-1])


def _backward_fake(op: str, names: tuple[str, ...], *args: Any) -> tuple[Tensor, ...]:
    given = arguments(op, args)
    _check(given)
    return tuple(_empty_gradient(given, name) for name in names)


def _backward_real(op: str, names: tuple[str, ...], *args: Any) -> tuple[Tensor, ...]:
    given = arguments(op, args)
    found = _differentiated(given)
    grads = []
    for name in names:
        x = found[name]
        grads.append(_empty_gradient(given, name).zero_() if x is None else x)
    return tuple(grads)


# -------------------------------------------------------------------------------------------------- registration

OF_VALUE, OF_TANGENT = ("q", "k", "v", "bias"), (*INPUTS, "bias", "bias_dot")
REAL: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "attention": _attention_real,
    "attention_jvp": _attention_jvp_real,
    "attention_jvps": _attention_jvps_real,
    "attention_backward": functools.partial(_backward_real, "attention_backward", OF_VALUE),
    "attention_jvp_backward": functools.partial(_backward_real, "attention_jvp_backward", OF_TANGENT),
}
FAKE: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "attention": _attention_fake,
    "attention_jvp": _attention_jvp_fake,
    "attention_jvps": _attention_jvps_fake,
    "attention_backward": functools.partial(_backward_fake, "attention_backward", OF_VALUE),
    "attention_jvp_backward": functools.partial(_backward_fake, "attention_jvp_backward", OF_TANGENT),
}


def _without_autocast(real: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """An implementation knows the dtypes of what it is given, and casts by itself. A backward is called within
    autocast where loss.backward() is, and a forward where what it is given was cast before."""

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            return real(*args)

    return kernel


for _name in SCHEMAS:
    LIBRARY.impl(_name, _without_autocast(REAL[_name]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"jvpgraph::{_name}", FAKE[_name], lib=LIBRARY)
