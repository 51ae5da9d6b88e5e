"""The figures of one op: norms of errors, computed where the tensors are and read once at the end."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

from jvpgraph.diagnosis.exact import REFUSED, Ran, first_line, has_unknown, widened
from jvpgraph.diagnosis.kinds import kind_of, moves
from jvpgraph.op_by_op import OpByOp
from jvpgraph.op_by_op.kinds import BATCH_NORMS
from jvpgraph.precision import HALF, PRECISIONS, Precision
from jvpgraph.precision import widened as dtype_of_tangent
from jvpgraph.rules.apply import functional_form, has_tangent
from jvpgraph.rules.wide import WIDE_PRODUCTS, is_attention

__all__ = [
    "Alone",
    "NotAlone",
    "Pairs",
    "apart",
    "figures",
    "figures_of_value",
    "norm",
    "on_host",
    "pairs_of",
    "place_of",
    "relative",
    "shares",
    "traffic",
]

aten = torch.ops.aten
WRITES_UNSAID = tuple(f"aten::{name}" for name in BATCH_NORMS)
SUMS = ("aten::sum", "aten::mean")
FEW = 4
Pairs = list[tuple[Tensor, Tensor, Tensor, Tensor]]  # value, its reference, tangent, its reference


def pairs_of(own: Ran, exact: Ran) -> Pairs:
    """The first result that has a tangent, or all in a list of them."""
    if kind_of(own.func) == "collective":
        tree_map_only(Tensor, torch.ops._c10d_functional.wait_tensor.default, (own.out, exact.out))
    results = [ran.arguments["src"] if ran.func is aten.copy.default else ran.out for ran in (own, exact)]
    if isinstance(own.out, Tensor):
        return [(results[0].to(own.out.dtype).expand_as(own.dot), results[1].expand_as(exact.dot), own.dot, exact.dot)]
    rows = zip(*results, own.dot, exact.dot)
    found = [row for row in rows if isinstance(row[2], Tensor) and isinstance(row[3], Tensor)]
    return found if len(own.func._schema.returns) == 1 else found[:1]


def norm(tensors: list[Tensor]) -> Tensor:
    """Of all elements together, as a number of float64 where there is such a thing on the device."""
    norms = [torch.linalg.vector_norm(x.to(widened(x.dtype, torch.float32))) for x in tensors]
    return torch.linalg.vector_norm(torch.stack([x.to(norms[0].dtype) for x in norms]))


def apart(found: Tensor, wanted: Tensor) -> Tensor:
    found = found.to(wanted.dtype)
    return (found - wanted).masked_fill_(found == wanted, 0)  # infinite in both: hidden scores


def share(masks: list[Tensor]) -> Tensor:
    count = functools.reduce(operator.add, (mask.sum() for mask in masks))
    return count / max(sum(mask.numel() for mask in masks), 1)


def figures(own: Ran, exact: Ran, pairs: Pairs) -> dict[str, Tensor]:
    """Of what the model has computed from what it had."""
    values, dots = [(y, z) for y, z, _, _ in pairs], [(d, e) for _, _, d, e in pairs]
    found = {
        "value_norm": norm([_finite(z) for _, z in values]),
        "value_error": norm([apart(y, z) for y, z in values]),
        "norm": norm([e for _, e in dots]),
        "error": norm([apart(d, e) for d, e in dots]),
        "value_not_finite": share([~torch.isfinite(y) & torch.isfinite(z) for y, z in values]),
        "not_finite": share([~torch.isfinite(d) & torch.isfinite(e) for d, e in dots]),
        "underflow": share([(d == 0) & (e != 0) for d, e in dots]),
        "largest": torch.stack([_largest(d) for d, _ in dots]).amax(),
    }
    if exact.parts:
        found["cancels"] = norm([exact.dot]) / functools.reduce(operator.add, (norm([part]) for part in exact.parts))
    elif exact.func._schema.name in SUMS and isinstance(exact.dot, Tensor):
        name, dot = next(iter(exact.dots.items()))
        found["cancels"] = norm([exact.dot]) / norm([exact.func(**{**exact.arguments, name: dot.abs()})])
    if is_attention(exact.func):
        found |= _epilogue(exact)
    return found


def shares(exact: Ran) -> dict[str, Tensor]:
    """By argument with a tangent, how large its term is beside the whole; 1 where terms cannot be told apart."""
    names = list(exact.dots)
    if exact.parts:
        terms: list[Any] = list(exact.parts)
    else:
        terms = list(exact.dots.values()) if moves(exact.func) else []
    whole = _norm_of(exact.dot)
    return {name: _norm_of(term) / whole for name, term in zip(names, terms)} or dict.fromkeys(names, torch.ones(()))


def _norm_of(dot: Any) -> Tensor:
    return norm([x for x in tree_leaves(dot) if isinstance(x, Tensor)])


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(~torch.isfinite(x), 0)


def figures_of_value(values: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Of an op without a tangent: its results, those of the reference, and those that it has by itself."""
    return {
        "value_norm": norm([_finite(y) for _, y, _ in values]),
        "value_error": norm([apart(x, y) for x, y, _ in values]),
        "adds_value": norm([apart(z, y) for _, y, z in values]),
        "value_not_finite": share([~torch.isfinite(x) & torch.isfinite(y) for x, y, _ in values]),
    }


def _largest(dot: Tensor) -> Tensor:
    if not dot.numel():
        return dot.new_zeros((), dtype=torch.float32)
    size = dot.abs().amax().to(torch.float32)
    return torch.nan_to_num(size / torch.finfo(dot.dtype).max, nan=math.inf, posinf=math.inf)


def _epilogue(exact: Ran) -> dict[str, Tensor]:
    """|o_dot| / (|o_dot + r o| + |r o|): r = lse_dot less the mean of the tangents of the scores over all keys."""
    (q, k), o, o_dot, r = list(exact.arguments.values())[:2], exact.out[0], exact.dot[0], exact.dot[1]
    q_dot, k_dot = (exact.dots.get(name) for name in list(exact.arguments)[:2])
    if r is None or o_dot is None or q.dim() != 4:
        return {}
    r = (r.squeeze(-1) if r.dim() == 4 else r)[..., : o.shape[-2]]  # as kernels have it, some of them padded
    groups = q.shape[1] // k.shape[1]
    scale = exact.arguments.get("scale") or q.shape[-1] ** -0.5

    def mean(x: Tensor) -> Tensor:
        return x.mean(-2, keepdim=True).repeat_interleave(groups, 1)

    centre = torch.zeros_like(r)
    if q_dot is not None:
        centre = centre + (q_dot * mean(k)).sum(-1)
    if k_dot is not None:
        centre = centre + (q * mean(k_dot)).sum(-1)
    mean_part = (r - scale * centre).unsqueeze(-1) * o
    return {"epilogue": norm([o_dot]) / (norm([o_dot + mean_part]) + norm([mean_part]))}


class NotAlone(Exception):
    """An op does not run by itself on the reference's inputs; the message says why."""


class Alone:
    """Each op by itself: what it makes of the reference's inputs, rounded as the model has them."""

    def __init__(self, outer: OpByOp):
        self._outer = outer
        self._modes = {precision: OpByOp(precision=precision) for precision in PRECISIONS}

    def figures(self, own: Ran, exact: Ran, pairs: Pairs) -> dict[str, Tensor]:
        """``adds_<precision>`` and ``adds_value``: norms of errors; ``reached``: whether the inputs can be rounded.

        Of what only moves elements all are zero.

        Raises:
            NotAlone: there are no such figures.
        """
        if moves(own.func):
            zero = pairs[0][3].new_zeros((), dtype=torch.float32)
            return {f"adds_{precision}": zero for precision in PRECISIONS} | {"adds_value": zero}
        arguments = {name: _rounded(value, own.arguments[name]) for name, value in exact.arguments.items()}
        try:
            return self._figures(own, exact, arguments)
        except torch.OutOfMemoryError:
            raise
        except REFUSED as error:
            raise NotAlone(first_line(error)) from error

    @staticmethod
    def value(func: OpOverload, own: dict[str, Any], exact: dict[str, Any]) -> Any:
        """Of an op without a tangent.

        Raises:
            NotAlone: it does not run by itself.
        """
        functional = functional_form(func) if func._schema.is_mutable else func
        if functional is None:
            raise NotAlone("it has no functional form")
        names = [argument.name for argument in functional._schema.arguments]
        try:
            return functional(**{name: _rounded(exact[name], own[name]) for name in names})
        except torch.OutOfMemoryError:
            raise
        except REFUSED as error:
            raise NotAlone(first_line(error)) from error

    def _figures(self, own: Ran, exact: Ran, arguments: dict[str, Any]) -> dict[str, Tensor]:
        if own.func._schema.name in WRITES_UNSAID:
            arguments = {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        out = own.func(**arguments)
        found: dict[str, Tensor] = {}
        half = any(x.dtype in HALF for x in tree_leaves((arguments, out)) if isinstance(x, Tensor))
        for precision in PRECISIONS if half else PRECISIONS[:1]:
            dots = {name: _dot_rounded(dot, own.arguments[name], precision) for name, dot in exact.dots.items()}
            mode = self._modes[precision]
            mode._keys_outside = self._outer._keys_outside
            dot = mode._rule(own.func, out, arguments, dots)
            if has_unknown(dot):
                raise NotAlone("nobody knows its tangent")
            pairs = pairs_of(Ran(own.func, out, arguments, dots, dot), exact)
            found[f"adds_{precision}"] = norm([apart(d, e) for _, _, d, e in pairs])
            if precision == PRECISIONS[0]:
                found["adds_value"] = norm([apart(y, z) for y, z, _, _ in pairs])
            if any(x.dtype is torch.float16 for x in tree_leaves(arguments) if isinstance(x, Tensor)):
                inputs = [x for x in tree_leaves((arguments, dots)) if has_tangent(x)]
                found[f"reached_{precision}"] = torch.stack([torch.isfinite(x).all() for x in inputs]).all()
        return found | {f"adds_{precision}": found["adds_model"] for precision in PRECISIONS if not half}


def _rounded(value: Any, like: Any) -> Any:
    """The reference's argument in the dtype of the model's."""
    if isinstance(value, Tensor):
        return value.to(like.dtype) if has_tangent(value) else value
    if isinstance(value, (list, tuple)):
        return [_rounded(x, y) for x, y in zip(value, like)]
    return like


def _dot_rounded(dot: Any, primal: Any, precision: Precision) -> Any:
    if isinstance(dot, (list, tuple)):
        return [_dot_rounded(d, p, precision) for d, p in zip(dot, primal)]
    return None if dot is None else dot.to(dtype_of_tangent(primal.dtype, precision))


def traffic(own: Ran) -> dict[str, int]:
    """Bytes of its tangents, read and written, in each precision: in float32 products still take half precision, and
    attention and convolutions give it."""
    kind = kind_of(own.func)
    taken, given = own.dots, own.dot
    pairs_in = [p for name, dot in taken.items() for p in _with_primals(dot, own.arguments[name])]
    pairs_out = _with_primals(given, own.out)
    takes_half = kind in ("product", "attention", "collective", "other")
    gives_half = takes_half and own.func not in WIDE_PRODUCTS

    def bytes_of(pairs: list[tuple[Tensor, Tensor]], wide: bool) -> int:
        precision: Precision = "float32" if wide else "model"
        return sum(d.numel() * dtype_of_tangent(p.dtype, precision).itemsize for d, p in pairs)

    return {
        "model": bytes_of(pairs_in, False) + bytes_of(pairs_out, False),
        "float32": bytes_of(pairs_in, not takes_half) + bytes_of(pairs_out, not gives_half),
        "float32_matmul": bytes_of(pairs_in, True) + bytes_of(pairs_out, True),
    }


def _with_primals(dot: Any, primal: Any) -> list[tuple[Tensor, Tensor]]:
    if isinstance(dot, (list, tuple)):
        return [pair for d, p in zip(dot, primal) for pair in _with_primals(d, p)]
    return [(dot, primal)] if isinstance(dot, Tensor) else []


def place_of(pairs: Pairs) -> str:
    """Which part of the result is not finite: the few indices of a dim that have it all, such as those of one head."""
    for y, z, d, e in pairs:
        bad = (~torch.isfinite(d) & torch.isfinite(e)) | (~torch.isfinite(y) & torch.isfinite(z))
        if not bool(bad.any()):
            continue
        parts = []
        for dim, size in enumerate(bad.shape):
            others = [other for other in range(bad.dim()) if other != dim]
            indices = (bad.sum(others) if others else bad).nonzero().flatten().tolist()
            if len(indices) <= min(size // 2, FEW):
                parts.append(f"{', '.join(map(str, indices))} of {size} in dim {dim}")
        return "; ".join(parts)
    return ""


def on_host(figures: dict[str, Tensor]) -> dict[str, float]:
    """All numbers in one transfer."""
    devices = {x.device.type for x in figures.values()}
    dtype = torch.float32 if "mps" in devices else torch.float64
    numbers = torch.stack([x.to(dtype) for x in figures.values()]).tolist()
    return dict(zip(figures, numbers))


def relative(error: float, size: float, of_nothing: float = math.nan) -> float:
    """Infinite where something is not finite; ``of_nothing`` where the reference is zero, and what was found is not."""
    if not math.isfinite(error):
        return math.inf
    return error / size if size else (of_nothing if error else 0.0)
