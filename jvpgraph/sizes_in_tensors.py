"""Sizes that a model puts into integer tensors, computes with and reads again, followed while Dynamo traces.

Lengths of sequences, where these begin and end, grids: as data they would be sizes that nobody knows, of which few
graphs can be compiled. Here they stay what they are, ints and sizes of the graph, in arrays of numpy.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._dynamo.variables import ConstantVariable, SymNodeVariable, VariableTracker

__all__ = ["KNOWN_NUMBERS", "numbers_of", "variable_of"]

KNOWN_NUMBERS = 64  # elements of tensors, such as grids of sizes, whose values are followed
SAME = ("to", "cpu", "cuda", "long", "int", "clone", "contiguous", "detach")  # methods that keep integers
RESHAPED = ("view", "reshape", "flatten", "unsqueeze", "squeeze")
FILLED = {"full": 1, "new_full": 2}  # which argument says by what
CONSTANT = {"zeros": 0, "new_zeros": 0, "ones": 1, "new_ones": 1}
MAKERS = {"tensor": 0, "as_tensor": 0, "new_tensor": 1}  # which argument has the numbers


class _UnknownError(Exception):
    """It depends on data, or is computed by what is not followed."""


class _Size:
    """An int of the graph, with which numpy computes."""

    def __init__(self, tx: Any, variable: VariableTracker) -> None:
        self.tx, self.variable = tx, variable


def _calculated(op: Callable[..., Any], *numbers: Any) -> Any:
    tx = next((x.tx for x in numbers if isinstance(x, _Size)), None)
    if tx is None:
        return op(*numbers)
    found = VariableTracker.build(tx, op).call_function(tx, [variable_of(tx, x) for x in numbers], {})
    return _Size(tx, found) if isinstance(found, SymNodeVariable) else found.as_python_constant()


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _op = getattr(operator, _name)
    setattr(_Size, f"__{_name}__", lambda self, other, op=_op: _calculated(op, self, other))
    setattr(_Size, f"__r{_name}__", lambda self, other, op=_op: _calculated(op, other, self))


def _extreme(op: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda x: functools.reduce(functools.partial(_calculated, op), x.flat)


COMPUTED: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv")},
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "cumsum": lambda x, dim: np.cumsum(x, dim),
    "diff": lambda x: np.diff(x),
    "sum": lambda x, dim=None: x.sum(dim),
    "prod": lambda x, dim=None: x.prod(dim),
    "max": _extreme(max),
    "min": _extreme(min),
    "stack": lambda xs, dim=0: np.stack(xs, dim),
    "cat": lambda xs, dim=0: np.concatenate(xs, dim),
    "pad": lambda x, pad, mode="constant", value=None: _padded(x, pad, mode, value or 0),
    "getitem": operator.getitem,
}


def _padded(x: Any, pad: tuple[int, ...], mode: str, value: int) -> Any:
    if mode != "constant" or len(pad) != 2:
        raise _UnknownError
    first, last = (np.full((*x.shape[:-1], count), value, dtype=object) for count in pad)
    return np.concatenate([first, x, last], -1)


def numbers_of(tx: Any, node: fx.Node) -> Any:
    """What an integer tensor holds that was made of sizes: an array of ints and sizes. None: unknown."""
    try:
        return _numbers(tx, node)
    except (_UnknownError, TypeError, IndexError, ValueError):  # of arguments that the functions above do not have
        return None


def variable_of(tx: Any, numbers: Any) -> VariableTracker:
    """A number, or nested lists of numbers, as Dynamo has them."""
    if isinstance(numbers, list):
        return VariableTracker.build(tx, [variable_of(tx, x) for x in numbers])
    return numbers.variable if isinstance(numbers, _Size) else ConstantVariable.create(int(numbers))


def _numbers(tx: Any, node: fx.Node) -> Any:
    value = node.meta["example_value"]
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64) or value._version:
        raise _UnknownError
    found = np.array(_result(tx, node), dtype=object)
    if found.size > KNOWN_NUMBERS:
        raise _UnknownError
    return found


def _result(tx: Any, node: fx.Node) -> Any:
    target, args, kwargs = node.target, node.args, node.kwargs
    name = (target if isinstance(target, str) else getattr(target, "__name__", "")).strip("_")
    if name in MAKERS:
        return _known(tx, args[MAKERS[name]])
    if name in CONSTANT:
        return np.full(_shape(node), CONSTANT[name], dtype=object)
    if name in FILLED:
        by = args[FILLED[name]] if len(args) > FILLED[name] else kwargs.get("fill_value")
        return np.full(_shape(node), _known(tx, by), dtype=object)
    if name in SAME:
        return _known(tx, args[0])
    if name in RESHAPED:
        return _known(tx, args[0]).reshape(_shape(node))
    if name not in COMPUTED:
        raise _UnknownError
    others = {key: x for key, x in kwargs.items() if key not in ("dtype", "device")}
    return COMPUTED[name](*_known(tx, args), **_known(tx, others))


def _shape(node: fx.Node) -> tuple[int, ...]:
    """In numbers: a batch is as long as the list of its numbers, that somebody is about to read."""
    shape = node.meta["example_value"].shape
    hints = [n.node.hint if isinstance(n, torch.SymInt) else n for n in shape]
    if None in hints or math.prod(hints) > KNOWN_NUMBERS:
        raise _UnknownError
    return tuple(map(int, shape))


def _known(tx: Any, x: Any) -> Any:
    """An argument, of which tensors are arrays and sizes are _Size."""
    if isinstance(x, (list, tuple)):  # fx has kinds of its own
        found = [_known(tx, y) for y in x]
        return found if isinstance(x, list) else tuple(found)
    if isinstance(x, dict):
        return {name: _known(tx, y) for name, y in x.items()}
    if isinstance(x, fx.Node):
        value = x.meta["example_value"]
        if isinstance(value, torch.SymInt):
            return _Size(tx, SymNodeVariable.create(tx, fx.Proxy(x, tx.output.current_tracer), value))
        if isinstance(value, torch.Size) and x.target is torch.Size:
            return _known(tx, x.args[0])
        return value if type(value) is int else _numbers(tx, x)
    if isinstance(x, slice):
        return slice(*_known(tx, (x.start, x.stop, x.step)))
    if x is None or type(x) in (int, str):
        return x
    raise _UnknownError
