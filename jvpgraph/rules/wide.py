"""Rules evaluated in float32 where the model computes in half precision.

A tangent then has half precision or float32: it is widened where something is computed of it. There are three kinds of
ops.

* What only moves elements leaves the tangent as it is.
* Products, attention, collectives and the ops of other packages take and give tangents in the dtype of the primal: that
  is what tensor cores are fast with, and messages stay short. The two products of a rule are added up in float32. A
  thin product, of a few rows, columns or channels, costs nearly nothing, and what it rounds stays: the embedding of
  the time, modulation, patches in and out. It takes its tangent in two parts, of which the second is what the first
  has been rounded by.
* Everything else is evaluated in float32, on the primal's values cast up: residual streams, norms, modulation,
  rotations, activations, reductions.

A cast to half precision is part of the primal; its tangent stays in float32.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from jvpgraph.kernels.products import mm_float32
from jvpgraph.precision import HALF, widened
from jvpgraph.rules.pointwise import times
from jvpgraph.rules.registry import Rule

__all__ = [
    "MOVES",
    "PRODUCTS",
    "WIDE_PRODUCTS",
    "for_precision",
    "is_attention",
    "name_of",
    "only_moves",
    "product_in_float32",
    "rounded",
    "unchanged_by_cast",
]

aten = torch.ops.aten

MOVES = {
    *("alias", "cat", "clone", "constant_pad_nd", "detach", "diagonal_scatter", "flip", "gather", "index"),
    *("_unsafe_index", "index_select", "lift_fresh_copy", "masked_fill", "masked_select", "pixel_shuffle"),
    *("pixel_unshuffle", "repeat", "roll", "select_scatter", "slice_scatter", "stack", "tril", "triu", "where"),
    *("_unsafe_view", "_reshape_alias"),
}
PRODUCTS = {
    *("mm", "bmm", "mv", "dot", "vdot", "matmul", "_trilinear", "_grouped_mm", "addmm", "addmv", "baddbmm", "addbmm"),
    *("addr", "convolution", "_convolution", "linear", "bilinear"),
}
ADDED = {"addmv": "self", "convolution": "bias"}  # to a product with a rule of the table: no operand of it
# Those that give float32: what is added, and the operands.
WIDE_PRODUCTS = {
    aten.mm.default: (None, "self", "mat2"),
    aten.bmm.default: (None, "self", "mat2"),
    aten.addmm.default: ("self", "mat1", "mat2"),
    aten.baddbmm.default: ("self", "batch1", "batch2"),
}
ATTENTION = ("attention", "_efficient_attention_forward", "_flash_attention_forward")
# Of which the rules know how they were rounded.
KNOWN = {"native_layer_norm", "native_group_norm", "_fused_rms_norm", "logsumexp"}
THIN = 128  # rows, columns or channels: a hundredth of a network's products
CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)


def for_precision(
    op: OpOverload, rule: Rule | None, out: Any, arguments: dict[str, Any], dots: dict[str, Any], precision: str
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """What the rule of an op is to be given in place of its output, its arguments and their tangents."""
    name = name_of(op)
    if precision == "model" or op is aten.view.dtype or op.namespace not in ("aten", "prims", "jvpgraph"):
        return out, arguments, rounded(arguments, dots)
    if only_moves(op):
        return _moved(rule, out, arguments, dots)
    if name in KNOWN or "batch_norm" in name:
        return out, arguments, _up(dots)
    product = name in PRODUCTS and not _thin_convolution(arguments)
    if (product or is_attention(op)) and precision == "float32":
        return out, arguments, rounded(arguments, dots, but=ADDED.get(name, ""))
    wide = {name: _up(widened(x) if isinstance(x, torch.dtype) else x) for name, x in arguments.items()}
    return _up(out), wide, _up(dots)


def name_of(op: OpOverload) -> str:
    """Without the namespace and the overload."""
    return op._schema.name.partition("::")[2]


def only_moves(op: Any) -> bool:
    """Whether an op computes nothing."""
    return isinstance(op, OpOverload) and (op.is_view or name_of(op) in MOVES)


def is_attention(op: OpOverload) -> bool:
    """Whether it computes softmax(q k') v as one."""
    name = name_of(op)
    return name in ATTENTION or name.startswith("_scaled_dot_product")


def unchanged_by_cast(op: OpOverload, arguments: dict[str, Any], dots: dict[str, Any]) -> Tensor | None:
    """The tangent that goes in, if a cast of the model's does nothing else to it than round."""
    dot = next(iter(dots.values()))
    dtype = arguments.get("dtype")
    cast = op in CASTS and dtype in HALF and arguments.get("device") is None
    return dot if cast and dot.dtype is torch.float32 else None


def product_in_float32(
    op: OpOverload, arguments: dict[str, Any], dots: dict[str, Any], precision: str
) -> Tensor | None:
    """beta a_dot + alpha (b_dot c + b c_dot) for beta a + alpha b c: of operands in half precision, added in float32.

    None for other ops.
    """
    if precision != "float32" or op not in WIDE_PRODUCTS:
        return None
    added, left, right = WIDE_PRODUCTS[op]
    b, c = arguments[left], arguments[right]
    terms = []
    if (b_dot := dots.get(left)) is not None:
        terms.append(times(arguments.get("alpha", 1), _product(b_dot, c)))
    if (c_dot := dots.get(right)) is not None:
        terms.append(times(arguments.get("alpha", 1), mm_float32(b, c_dot.to(c.dtype))))
    if added is not None and (a_dot := dots.get(added)) is not None:
        terms.append(times(arguments["beta"], a_dot.to(torch.float32)))
    return functools.reduce(operator.add, terms)


def _product(b_dot: Tensor, c: Tensor) -> Tensor:
    rows = b_dot.to(c.dtype)
    if b_dot.dtype is not torch.float32 or b_dot.dim() > 2 or not any(map(_few, (*b_dot.shape, c.shape[1]))):
        return mm_float32(rows, c)
    rest = (b_dot - rows).to(c.dtype)
    return mm_float32(torch.cat([rows, rest]), c).unflatten(0, (2, -1)).sum(0)  # one product reads c once


def _thin_convolution(arguments: dict[str, Any]) -> bool:
    """Of patches, or of the first few channels."""
    weight = arguments.get("weight")
    return "stride" in arguments and isinstance(weight, Tensor) and _few(math.prod(weight.shape[1:]))


def _few(size: Any) -> bool:
    """By what is known when a graph is made: what is decided of a size here is no guard."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return hint is not None and hint <= THIN


def rounded(arguments: dict[str, Any], dots: dict[str, Any], but: str = "") -> dict[str, Any]:
    """Tangents in the dtypes of their primals."""
    return {name: dot if name == but else _as(dot, arguments[name]) for name, dot in dots.items()}


def _as(dot: Any, primal: Any) -> Any:
    if isinstance(dot, (list, tuple)):
        return [_as(d, p) for d, p in zip(dot, primal)]
    return dot if dot is None or dot.dtype == primal.dtype else dot.to(primal.dtype)


def _moved(
    rule: Rule | None, out: Any, arguments: dict[str, Any], dots: dict[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """As they come; all in float32 if one of them is, and so zeros that are made like what has no tangent."""
    leaves = [d for dot in dots.values() for d in (dot if isinstance(dot, (list, tuple)) else [dot]) if d is not None]
    if all(dot.dtype in HALF for dot in leaves):
        return out, arguments, dots
    zeros = [name for name in (rule.wrt if rule is not None else ()) if _lacks(dots.get(name))]
    return out, {name: _up(x) if name in zeros else x for name, x in arguments.items()}, _up(dots)


def _lacks(dot: Any) -> bool:
    return any(map(_lacks, dot)) if isinstance(dot, (list, tuple)) else dot is None


def _up(value: Any) -> Any:
    """Tensors in half precision in float32."""
    return tree_map_only(Tensor, lambda x: x.to(torch.float32) if x.dtype in HALF else x, value)
