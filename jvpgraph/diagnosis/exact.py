"""The reference: each op again, in a wider type, on values and tangents that were never rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from jvpgraph.diagnosis.kinds import moves
from jvpgraph.errors import JvpgraphError
from jvpgraph.op_by_op import OpByOp
from jvpgraph.rules.apply import Unknown, bind
from jvpgraph.rules.wide import is_attention

__all__ = ["REFERENCES", "REFUSED", "Exact", "Ran", "first_line", "has_unknown", "widened"]

aten, ours = torch.ops.aten, torch.ops.jvpgraph
REFERENCES = {"float64": (torch.float64, torch.complex128), "float32": (torch.float32, torch.complex64)}
# What an op may raise in another type than the model's; memory that is full is no matter of the op.
REFUSED = (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError, JvpgraphError)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def widened(dtype: torch.dtype, reference: torch.dtype) -> torch.dtype:
    """What the reference has in place of ``dtype``, which may be wider already."""
    if dtype.is_complex:
        real = torch.empty(0, dtype=dtype).real.dtype
        return reference.to_complex() if real.itemsize < reference.itemsize else dtype
    return reference if dtype.is_floating_point and dtype.itemsize < reference.itemsize else dtype


@dataclass
class Ran:
    """A rule that was evaluated: of the functional form of an op, before anything was written in place."""

    func: OpOverload
    out: Any
    arguments: dict[str, Any]
    dots: dict[str, Any]
    dot: Any
    parts: tuple[Tensor, ...] = ()  # the terms of dot, if there are several


class Exact(OpByOp):
    """Driven by hand, with the ops of another mode that sees them.

    Args:
        seen: called with each rule that was evaluated, before the op writes in place.
    """

    def __init__(self, seen: Callable[[Ran], None]):
        super().__init__()
        self._seen_rule = seen

    def follow(self, outer: OpByOp) -> None:
        """Be what ``outer`` is, which has been entered."""
        self._keys_outside = outer._keys_outside

    def run(self, func: OpOverload, args: Any, kwargs: Any, like: Any) -> Any:
        """``func`` on the reference's values, with its tangent.

        Args:
            like: what the op has given, of which integers are taken over.
        """
        arguments = bind(func, args, kwargs)
        if is_attention(func) and func.namespace == "aten":
            return self._attend(func, arguments, like)
        changed = {name: value for name, value in _in_any_type(func, arguments).items() if value is not arguments[name]}
        if changed:
            names = [a.name for a in func._schema.arguments if not a.kwarg_only]
            kwargs = {a.name: arguments[a.name] for a in func._schema.arguments if a.kwarg_only} | changed
            args = [kwargs.pop(name, arguments[name]) for name in names]
        return self._dispatch(func, tuple(args), kwargs)

    def _attend(self, func: OpOverload, arguments: dict[str, Any], like: Any) -> Any:
        """By an op of ours, which takes every dtype."""
        bias = arguments.get("attn_bias", arguments.get("attn_mask"))
        qkv = arguments["query"], arguments["key"], arguments["value"]
        o, lse = ours.attention.default(*qkv, bias, arguments["is_causal"], arguments.get("scale"))
        wanted = like[1]
        if isinstance(wanted, Tensor) and wanted.numel():
            lse = lse.unsqueeze(-1) if wanted.dim() > lse.dim() else lse
            lse = torch.nn.functional.pad(lse, (0, wanted.shape[-1] - lse.shape[-1])) if wanted.dim() == 3 else lse
        out = (o, lse, *like[2:])
        self._made(out)
        dots = {name: dot for name, v in arguments.items() if (dot := self._argument_tangent(v)) is not None}
        if dots:
            self._record(func, out, self._rule(func, out, arguments, dots))
        return out

    def _rule(self, func: OpOverload, out: Any, arguments: dict[str, Any], dots: dict[str, Any]) -> Any:
        parts: list[Any] = []
        if len(dots) > 1 and not moves(func) and not is_attention(func):
            parts = [super(Exact, self)._rule(func, out, arguments, {name: dot}) for name, dot in dots.items()]
        if parts and all(isinstance(part, Tensor) for part in parts):
            dot = sum(parts[1:], parts[0])
        else:
            parts, dot = [], super()._rule(func, out, arguments, dots)
        self._seen_rule(Ran(func, out, arguments, dots, dot, tuple(parts)))
        return dot


def _in_any_type(func: OpOverload, arguments: dict[str, Any]) -> dict[str, Any]:
    """What an op can be told in the reference's type to compute the same."""
    name = func._schema.name
    if "half_to_float" in arguments:
        return arguments | {"half_to_float": False}
    if name == "aten::_fused_rms_norm" and arguments["eps"] is None:  # that of the type in which it is added up
        x = arguments["input"]
        return arguments | {"eps": torch.finfo(torch.float32).eps} if x.dtype is torch.float64 else arguments
    return arguments


def has_unknown(dot: Any) -> bool:
    return any(isinstance(d, Unknown) for d in tree_leaves(dot))
