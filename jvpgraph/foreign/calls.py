"""Functions of other packages op by op: a call that a tangent reaches is a call of ours, as in graphs.

Models know these functions by names in their own modules, in registries and in partials. So it is their code that is
replaced for the time of a call with tangents, whoever holds them: ours asks whether something with a tangent is among
the arguments, and runs theirs, of which there is a copy, where nothing is.

A checkpoint computes its forward again during the backward, when there are no tangents. What autograd saved then came
from ours, so what was swapped is swapped again.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils._pytree import tree_leaves

from jvpgraph.foreign import table
from jvpgraph.open_checkpoints import is_recomputing, open_checkpoints
from jvpgraph.storages import parts_of

__all__ = ["calls_as_they_were", "calls_swapped"]

OURS = "what this calls"  # in the constants of _template


class _Thread(threading.local):
    """Of this thread: the modes that are entered, and of a checkpoint that is computed again what was swapped."""

    def __init__(self) -> None:
        self.modes: list[Any] = []
        self.again: Iterator[bool] | None = None


_thread = _Thread()
_lock = threading.RLock()
_entered = 0  # how often, by all threads
_replaced: dict[FunctionType, Any] = {}  # their code, while it is replaced
_copies: WeakKeyDictionary[FunctionType, FunctionType] = WeakKeyDictionary()
_swapped_in: WeakKeyDictionary[Any, list[bool]] = WeakKeyDictionary()  # by checkpoint, in the order of its calls


@contextmanager
def calls_swapped(mode: Any) -> Iterator[None]:
    """Within this context, calls of theirs that a tangent in ``mode``, an OpByOp, reaches are calls of ours."""
    _thread.modes.append(mode)
    try:
        with _code_replaced():
            yield
    finally:
        _thread.modes.pop()


@contextmanager
def calls_as_they_were() -> Iterator[None]:
    """Inside of calls_swapped: as if that were not there, for Dynamo, which reads code."""
    _leave()
    try:
        yield
    finally:
        _enter()


@contextmanager
def _code_replaced() -> Iterator[None]:
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _entered
    with _lock:
        _entered += 1
        for theirs, swap in table.present():
            if isinstance(theirs, FunctionType) and theirs not in _replaced:
                _replaced[theirs] = theirs.__code__
                theirs.__code__ = _code(swap, theirs)


def _leave() -> None:
    global _entered
    with _lock:
        _entered -= 1
        while _replaced and not _entered:
            theirs, code = _replaced.popitem()
            theirs.__code__ = code


def _template(*args: Any, **kwargs: Any) -> Any:
    ours: Any = "what this calls"
    return ours(*args, **kwargs)


def _code(swap: table.Swap, theirs: FunctionType) -> Any:
    """Code that fits a function of theirs: it has as many free variables, and what it calls is a constant of it."""
    if theirs not in _copies or _copies[theirs].__code__ is not theirs.__code__:
        _copies[theirs] = _copy(theirs)
    call = _asking(swap, _copies[theirs])
    code = _template.__code__
    constants = tuple(call if constant == OURS else constant for constant in code.co_consts)
    return code.replace(co_consts=constants, co_freevars=theirs.__code__.co_freevars, co_name=theirs.__name__)


def _copy(theirs: FunctionType) -> FunctionType:
    copy = FunctionType(theirs.__code__, theirs.__globals__, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    for name in ("__kwdefaults__", "__qualname__", "__module__"):
        setattr(copy, name, getattr(theirs, name))
    copy.__dict__.update(theirs.__dict__)
    return copy


def _asking(swap: table.Swap, theirs: FunctionType) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _is_swapped(swap, args, kwargs):
            return theirs(*args, **kwargs)
        positional, named = table.by_name(swap, theirs, args, kwargs)
        return swap.ours(*positional, **named, **table.absent(swap, theirs))

    return call


def _is_swapped(swap: table.Swap, args: Any, kwargs: Any) -> bool:
    if _thread.again is not None and is_recomputing():
        swapped = next(_thread.again, False)
    else:
        mode = _thread.modes[-1] if _thread.modes else None
        if mode is None or not mode.is_watching():
            return False
        swapped = kwargs.get(swap.unless) is None and any(mode.tangent(x) is not None for x in _tensors(args, kwargs))
    for checkpoint in open_checkpoints():
        _remember(checkpoint, swapped)
    return swapped


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Those in masks that are objects, too."""
    for x in tree_leaves((args, kwargs)):
        inside = [x] if isinstance(x, Tensor) else getattr(x, "__dict__", {}).values()
        for tensor in inside:
            if isinstance(tensor, Tensor):
                yield from parts_of(tensor)


# ------------------------------------------------------------------------------------------------- in checkpoints


def _remember(checkpoint: Any, swapped: bool) -> None:
    if checkpoint not in _swapped_in:
        _swapped_in[checkpoint] = []
        checkpoint.recompute_fn = _recomputing(checkpoint.recompute_fn, _swapped_in[checkpoint])
    _swapped_in[checkpoint].append(swapped)


def _recomputing(recompute: Callable[..., Any], swapped: list[bool]) -> Callable[..., Any]:
    @functools.wraps(recompute)
    def recompute_again(*args: Any) -> Any:
        before, _thread.again = _thread.again, iter(swapped)
        try:
            with _code_replaced():
                return recompute(*args)
        finally:
            _thread.again = before

    return recompute_again
