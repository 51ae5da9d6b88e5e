"""Values in a graph that depend on none of its inputs, but for sizes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["constant_of", "hint_of"]


class _UnknownError(Exception):
    """It depends on an input, or on chance."""


def hint_of(size: int | torch.SymInt) -> int | None:
    """A size in this call, without a guard on it; None if it depends on data."""
    return int(size) if isinstance(size, int) else size.node.hint


def constant_of(node: fx.Node) -> Any:
    """What a node of an ATen graph comes to at the sizes of this call, on the CPU; None if it depends on the values of
    an input. Runs what it depends on."""
    try:
        with _disable_current_modes(), torch.no_grad():
            return _value(node, {})
    except _UnknownError:
        return None


def _value(node: fx.Node, found: dict[fx.Node, Any]) -> Any:
    if node not in found:
        if isinstance(node.meta.get("val"), (int, torch.SymInt)):
            found[node] = _known(node.meta["val"])
        else:
            found[node] = _constant(node) if node.op == "get_attr" else _result(node, found)
    return found[node]


def _known(size: int | torch.SymInt) -> int:
    hint = hint_of(size)
    if hint is None:
        raise _UnknownError
    return hint


def _constant(node: fx.Node) -> Tensor:
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.is_meta:
        raise _UnknownError
    return value.cpu()


def _result(node: fx.Node, found: dict[fx.Node, Any]) -> Any:
    target = node.target
    is_op = isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded not in target.tags
    if node.op != "call_function" or not (is_op or target is operator.getitem):
        raise _UnknownError
    if is_op and target._schema.is_mutable:  # type: ignore[union-attr]
        raise _UnknownError
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda x: _argument(x, found))  # type: ignore[misc]
    return target(*args, **kwargs)  # type: ignore[operator]


def _argument(x: Any, found: dict[fx.Node, Any]) -> Any:
    if isinstance(x, fx.Node):
        return _value(x, found)
    if isinstance(x, torch.SymInt):
        return _known(x)
    return torch.device("cpu") if isinstance(x, torch.device) else x
