"""What decides how modules run, but is not covered by Dynamo's guards.

Dynamo guards the modules of a graph, their attributes and, if asked to, their hooks. It takes for granted that classes
keep their methods, both those of modules and those of what modules hold (diffusers' attention processors), and that
the global hooks of modules stay what they are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torchs

__all__ = ["held_by", "modules_of", "unguarded", "unobserved"]

METHODS = (types.FunctionType, property, classmethod, staticmethod, functools.partialmethod)
GLOBAL_HOOKS = tuple(f"_global_{kind}_hooks" for kind in ("forward_pre", "forward", "backward_pre", "backward"))
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
SIMPLE = frozenset(
    {type(None), bool, int, float, str, types.FunctionType, Tensor, nn.Parameter, torch.dtype, torch.device}
)
MOST = 64  # of what a container holds: a vocabulary is none of processors
# What FSDP2 holds in the middle of an update, of several backwards, and lets go at its end.
PLUMBING = "torch.distributed."
DEPTH = 2  # of plain objects in plain objects: a module may hold its trainer, and that the whole program
# Their hooks change nothing: FlopCounterMode and MemTracker bring them.
OBSERVERS = ("torch.utils.module_tracker", "torch.distributed._tools.mod_tracker")


def unguarded(called: Iterable[Any]) -> tuple[Any, ...]:
    """Equal, and of equal hash, as long as the classes of ``called`` and of what is inside keep their methods, and no
    other global hooks come. Some milliseconds for a thousand modules."""
    classes = _classes([(value, 1) for value in called])
    bases = {base for cls in classes for base in cls.__mro__ if base not in (nn.Module, object)}
    methods = frozenset(
        (base, name, value, getattr(value, "__code__", None))
        for base in bases
        for name, value in vars(base).items()
        if isinstance(value, METHODS)
    )
    return methods, tuple(_global_hooks())


def _classes(waiting: list[tuple[Any, int]]) -> set[type]:
    """The classes of modules, of the modules in them and of the plain objects that these hold, and those hold."""
    classes: set[type] = set()
    seen: set[int] = set()
    while waiting:
        value, depth = waiting.pop()
        kind = type(value)
        if kind in SIMPLE or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            classes.add(kind)
            waiting += [(module, 1) for module in value._modules.values()]
            attributes = vars(value)
            names = attributes.keys() - OF_EVERY_MODULE
            waiting += [(held, 1) for name in names if type(held := attributes[name]) not in SIMPLE]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(held, depth) for held in value] if len(value) <= MOST else []
        elif isinstance(value, dict):
            waiting += [(held, depth) for held in value.values()] if len(value) <= MOST else []
        elif isinstance(value, types.MethodType):
            waiting.append((value.__self__, depth))
        elif depth <= DEPTH and not isinstance(value, (type, types.ModuleType, Tensor)) and not _is_plumbing(kind):
            classes.add(kind)
            waiting += [(held, depth + 1) for held in getattr(value, "__dict__", {}).values()]
    return classes


def _is_plumbing(kind: type) -> bool:
    return kind.__module__.startswith(PLUMBING)


def _global_hooks() -> Iterator[int]:
    for name in GLOBAL_HOOKS:
        for key, hook in getattr(torchs, name, {}).items():
            if not _observes(hook):
                yield key


def _observes(hook: Any) -> bool:
    return getattr(hook, "__module__", None) in OBSERVERS


@contextmanager
def unobserved() -> Iterator[None]:
    """Without the hooks of trackers, which Dynamo cannot trace."""
    taken = []
    for name in GLOBAL_HOOKS:
        hooks = getattr(torchs, name, {})
        if any(map(_observes, hooks.values())):
            taken.append((hooks, dict(hooks)))
            for key in [key for key, hook in hooks.items() if _observes(hook)]:
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)


def modules_of(fn: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a function holds in its closure, its defaults, what it is bound to, or finds in its globals."""
    return [value for value in held_by(fn) if isinstance(value, nn.Module)]


def held_by(fn: Callable[..., Any]) -> list[Any]:
    """The modules, tensors and plain objects that a function holds, in containers and other functions too."""
    found: list[Any] = []
    waiting: list[Any] = [fn]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (nn.Module, Tensor)):
            found.append(value)
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            waiting += [value.__func__, value.__self__, *getattr(value.__self__, "__dict__", {}).values()]
        elif isinstance(value, types.FunctionType):
            waiting += _held(value)
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif type(value) not in SIMPLE:
            found.append(value)
            waiting += getattr(value, "__dict__", {}).values() if value is fn else ()
    return found


def _held(fn: types.FunctionType) -> Iterator[Any]:
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from fn.__defaults__ or ()
    yield from (fn.__kwdefaults__ or {}).values()
    for name in fn.__code__.co_names:
        value = fn.__globals__.get(name)
        if isinstance(value, (nn.Module, Tensor, types.FunctionType)):
            yield value
