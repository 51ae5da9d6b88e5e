"""The engine of the rules: from an op, its primal values and input tangents to the output tangents.

The same function serves the compiled graph (fake tensors, recorded op by op) and the op-by-op mode (real
tensors). Zeros are None throughout. Rules come from the table, else they are derived, else the op is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, guard_or_false

from jvpgraph.errors import REMEDY, JvpgraphError
from jvpgraph.precision import HALF, has_half
from jvpgraph.rules.derived import NotDerivable, Unknown, derive
from jvpgraph.rules.registry import Rule, rule_of
from jvpgraph.rules.wide import for_precision, product_in_float32, unchanged_by_cast

__all__ = [
    "NoRule",
    "Unknown",
    "any_has_tangent",
    "apply_rule",
    "argument_tangent",
    "bind",
    "functional_form",
    "has_tangent",
    "remedy",
    "tangents_of",
]


# What is no matter of the rule: a size that depends on data, for which regions are the remedy, and full memory.
NOT_OURS = (GuardOnDataDependentSymNode, torch.OutOfMemoryError)


class NoRule(Exception):
    """Neither the table nor PyTorch has a forward derivative for this call."""


def has_tangent(value: Any) -> bool:
    """Whether a value is a tensor that can carry a tangent at all."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def any_has_tangent(op: OpOverload, out: Any) -> bool:
    """Whether one of an op's outputs can carry a tangent; as integers, bits can hide one."""
    return op is torch.ops.aten.view.dtype or any(map(has_tangent, out if isinstance(out, (tuple, list)) else (out,)))


def remedy(op: OpOverload, names: Sequence[str]) -> str:
    """What to do about an op that is refused; of another package's without a rule, how one begins.

    Args:
        names: of the arguments that have tangents.
    """
    if op.namespace in ("aten", "prims", "jvpgraph") or not names or rule_of(op) is not None:
        return REMEDY
    default = "" if len(names) == 1 else "=None"
    dots = [f"{name}_dot" for name in names]
    parameters = ", ".join(["y", *(a.name for a in op._schema.arguments), "*", *(dot + default for dot in dots)])
    return (
        f"{REMEDY} This one begins:\n"
        "    from jvpgraph.rules import jvp\n\n"
        f"    @jvp(torch.ops.{op})\n"
        f"    def rule({parameters}):\n"
        f"        return ...  # the tangent of y, linear in {' and '.join(dots)}"
    )


def argument_tangent(value: Any, tangent_of: Callable[[Any], Any]) -> Any:
    """The tangent of an op's argument; for a list a list with None for zeros, and None if all of them are."""
    if isinstance(value, (list, tuple)):
        dots = [argument_tangent(v, tangent_of) for v in value]
        return dots if any(d is not None for d in dots) else None
    return tangent_of(value)


def functional_form(op: OpOverload) -> OpOverload | None:
    """The overload that takes the same arguments, but for ``out``, and writes to none of them."""
    name = op._schema.name.split("::")[1].removesuffix("_")
    packet = getattr(getattr(torch.ops, op.namespace), name, None)
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        taken = [(a.name, str(a.type)) for a in found._schema.arguments]
        if taken == wanted and not found._schema.is_mutable:
            return found
    return None


def bind(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All schema arguments by name, defaults filled in, in schema order."""
    bound = {}
    for i, argument in enumerate(op._schema.arguments):
        if i < len(args) and not argument.kwarg_only:
            bound[argument.name] = args[i]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


def tangents_of(
    op: OpOverload, out: Any, arguments: dict[str, Any], dots: dict[str, Any], precision: str = "model"
) -> tuple[Any, str]:
    """The tangents of ``out = op(**arguments)`` and where the rule came from.

    Args:
        op: the op that was run.
        out: its primal output: a tensor, or a tuple or list of them.
        arguments: every schema argument by name (see :func:`bind`).
        dots: tangents of the active arguments by name; a list with None for tensor lists. At least one.
        precision: one of PRECISIONS. Unless it is "model", tangents of half precision may be float32, on either side.

    Returns:
        ``(out_dot, source)``: None for a zero, or with the structure of ``out``; source is "table" or
        "derived". Among several outputs, one may be :class:`Unknown`: whoever uses it has to refuse.

    Raises:
        NoRule: there is no forward derivative, or none that works for these arguments; the message gives the reason.
    """
    rule = rule_of(op)
    if any(map(has_half, (out, *arguments.values()))):
        if precision != "model" and (dot := unchanged_by_cast(op, arguments, dots)) is not None:
            return dot, "table"
        if (out_dot := product_in_float32(op, arguments, dots, precision)) is not None:
            return _conform(op, out, out_dot, True), "table"
        out, arguments, dots = for_precision(op, rule, out, arguments, dots, precision)
    try:
        unmet = rule.unmet(arguments) if rule is not None else ""
        if rule is not None and not unmet and (not rule.terms or set(dots) <= set(rule.wrt)):
            return apply_rule(rule, out, arguments, dots, precision != "model"), "table"
        try:
            out_dot = _conform(op, out, derive(op, out, arguments, dots), precision != "model")
        except NotDerivable as reason:
            raise NoRule(f"{unmet}, and {reason}" if unmet else str(reason)) from reason
    except (NoRule, JvpgraphError, *NOT_OURS):
        raise
    except NotImplementedError as reason:
        raise NoRule((str(reason).strip() or "not implemented").splitlines()[0]) from reason
    except Exception as error:
        raise NoRule(f"its derivative failed: {_first_line(error)}") from error
    if isinstance(out_dot, Unknown):
        raise NoRule(out_dot.reason)
    return out_dot, "derived"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'without a message').splitlines()[0]}"


def apply_rule(rule: Rule, out: Any, arguments: dict[str, Any], dots: dict[str, Any], wide: bool = False) -> Any:
    """The tangents of ``out`` by a rule whose preconditions hold and which knows all of ``dots``.

    Args:
        wide: those of half precision may be float32, and are where terms are added up.
    """
    return _conform(rule.op, out, _sum_of_terms(rule, out, arguments, dots, wide), wide)


def _sum_of_terms(rule: Rule, out: Any, arguments: dict[str, Any], dots: dict[str, Any], wide: bool) -> Any:
    total: Any = None
    values = (out, *arguments.values())
    for term in rule.terms:
        given = {dot: dots[name] for dot, name in zip(term.dots, term.wrt) if dots.get(name) is not None}
        if given:
            total = _plus(total, term.fn(*values[: term.takes], **given), wide)
    return total


def _plus(a: Any, b: Any, wide: bool) -> Any:
    if a is None or b is None:
        return a if b is None else b
    if isinstance(a, (tuple, list)):
        return [_plus(x, y, wide) for x, y in zip(a, b)]
    return a.to(torch.float32) + b if wide and a.dtype in HALF else a + b


def _conform(op: OpOverload, out: Any, out_dot: Any, wide: bool) -> Any:
    """Broadcast and promote a tangent to its primal, and check that it fits; ``wide``: it may have float32 for half."""
    if out_dot is None or isinstance(out_dot, Unknown):
        return out_dot
    if isinstance(out, (tuple, list)):
        if len(out) != len(out_dot):
            raise AssertionError(f"the rule of {op} gave {len(out_dot)} tangents for {len(out)} outputs")
        return [_conform(op, o, d, wide) for o, d in zip(out, out_dot)]
    if not has_tangent(out):
        return None
    if out_dot.dtype != out.dtype and not (wide and out.dtype in HALF and out_dot.dtype is torch.float32):
        if out_dot.is_complex() and not out.is_complex():
            raise AssertionError(f"the rule of {op} gave a complex tangent for a {out.dtype} output")
        out_dot = out_dot.to(out.dtype)
    if out_dot.dim() != out.dim() or any(guard_or_false(a != b) for a, b in zip(out_dot.shape, out.shape)):
        try:
            out_dot = out_dot.expand(out.shape)
        except RuntimeError as error:
            shapes = f"{tuple(out_dot.shape)} for an output of shape {tuple(out.shape)}"
            raise AssertionError(f"the rule of {op} gave a tangent of shape {shapes}") from error
    return out_dot
