"""What decides how modules run and no guard of Dynamo's looks at.

Dynamo guards the modules of a graph, their attributes and, where it is told to, their hooks. It takes for granted that
classes keep their methods and that the hooks of all modules stay what they are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torchs

__all__ = ["held_by", "modules_of", "unguarded"]

METHODS = (types.FunctionType, property, classmethod, staticmethod, functools.partialmethod)
GLOBAL_HOOKS = tuple(f"_global_{kind}_hooks" for kind in ("forward_pre", "forward", "backward_pre", "backward"))
OBSERVERS = "torch.utils.module_tracker"  # its hooks change nothing: FlopCounterMode brings them


def unguarded(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """Equal, and of equal hash, as long as the classes inside ``modules`` keep their methods and there are no other
    global hooks. Some tenths of a millisecond for a thousand modules."""
    bases = {base: None for cls in _classes(modules) for base in cls.__mro__ if base not in (nn.Module, object)}
    methods = tuple(value for base in bases for value in vars(base).values() if isinstance(value, METHODS))
    return methods, tuple(_global_hooks())


def _classes(modules: Iterable[nn.Module]) -> dict[type, None]:
    classes: dict[type, None] = {}
    waiting: list[nn.Module | None] = [*modules]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            classes[type(module)] = None
            waiting += module._modules.values()
    return classes


def _global_hooks() -> Iterator[int]:
    for name in GLOBAL_HOOKS:
        for key, hook in getattr(torchs, name, {}).items():
            if getattr(hook, "__module__", None) != OBSERVERS:
                yield key


def modules_of(fn: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a function holds in its closure, its defaults, what it is bound to, or finds in its globals."""
    return [value for value in held_by(fn) if isinstance(value, nn.Module)]


def held_by(fn: Callable[..., Any]) -> list[nn.Module | Tensor]:
    """The modules and tensors that a function holds, in containers and other functions too."""
    found: list[nn.Module | Tensor] = []
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
        elif value is fn:
            waiting += getattr(value, "__dict__", {}).values()
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
