"""Plain functions whose graphs are kept: by their code, never by what they hold.

A training step writes ``jvp(lambda z: net(z) + batch, ...)`` anew each time. To the graph the function is an argument:
Dynamo guards its code, takes the tensors of its closure as inputs and guards the rest of it, so that the next lambda
from the same line runs in the same graph, and nothing keeps the last one alive.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

__all__ = ["Function", "Kept", "call_function", "identity", "line_of", "note_graphs"]

KEPT_FUNCTIONS = 64  # graphs of plain functions that jvp keeps, least recently used first out
TOO_OFTEN = 4  # graphs of one line: from the third recompilation on, something is said
T = TypeVar("T")


class Function:
    """A function as an argument: no container, whatever else it may be."""

    __slots__ = ("__weakref__", "fn")

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn


def call_function(function: Function, *args: Any) -> Any:
    """What is captured for every plain function."""
    return function.fn(*args)


class _Same:
    """Equal if it is the same object."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def identity(fn: Callable[..., Any]) -> Hashable:
    """What functions share that can share a graph: the code and the globals of a Python function, the class of another
    callable. Closures, defaults, what it is bound to and what it was made a partial of may differ."""
    fn = _innermost(fn)
    if isinstance(fn, types.FunctionType):
        return _Same(fn.__code__), _Same(fn.__globals__)
    if type(fn).__module__ == "torch._ops":  # PyTorch's ops are objects of one class
        return _Same(fn)
    return _Same(type(fn)) if _code_of_class(fn) is not None else _Same(fn)


def _innermost(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a method or a partial."""
    while isinstance(fn, (functools.partial, types.MethodType)):
        fn = fn.func if isinstance(fn, functools.partial) else fn.__func__
    return fn


def _code_of_class(fn: Callable[..., Any]) -> types.CodeType | None:
    """What a callable object runs, if that is Python."""
    calls = (vars(base)["__call__"] for base in type(fn).__mro__ if "__call__" in vars(base))
    return getattr(next(calls, None), "__code__", None)


class Kept(Generic[T]):
    """The values used last, by key."""

    def __init__(self, most: int = KEPT_FUNCTIONS):
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._most = most

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``key``, made if there is none."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self._most:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]

    def drop(self, key: Hashable) -> None:
        self._values.pop(key, None)


def line_of(fn: Callable[..., Any]) -> str:
    """Where a function is written; the name of one that is not written in Python."""
    fn = _innermost(fn)
    code = getattr(fn, "__code__", None) or _code_of_class(fn)
    if code is None:
        return str(getattr(fn, "__qualname__", type(fn).__qualname__))
    return f"{code.co_filename}:{code.co_firstlineno} in {getattr(code, 'co_qualname', code.co_name)}"


_graphs_of: Counter[str] = Counter()


def note_graphs(fn: Callable[..., Any], count: int) -> None:
    """Say so, once, where the functions of one line are compiled again and again."""
    line = line_of(fn)
    before = _graphs_of[line]
    _graphs_of[line] += count
    if before < TOO_OFTEN <= _graphs_of[line]:
        warnings.warn(
            f"jvpgraph.jvp compiled the function at {line} for the {TOO_OFTEN}th time. Something that the graph takes "
            "for granted keeps changing: a number, a string or a callable in its closure, the length of a list, sizes "
            "(dynamic=True), which inputs have tangents. Make tensors of numbers, and pass what changes as a primal "
            "with tangent None. TORCH_LOGS=recompiles says what changed.",
            RuntimeWarning,
            stacklevel=4,
        )
