"""Walking the arguments and outputs of models: tensors inside tuples, lists, deques, mappings and dataclasses.

Plain recursion over plain containers, because Dynamo traces it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Exchanged",
    "exchange",
    "first_copied",
    "leading_to",
    "leaves",
    "map_leaves",
    "put_back",
    "refuse_hidden",
    "refuse_objects",
]

LEAVES = (Tensor, type(None), bool, int, float, complex, str, nn.Module)


def map_leaves(tree: Any, fn: Callable[[str, Any], Any], path: str = "", only: Collection[str] | None = None) -> Any:
    """``tree`` with every leaf replaced by ``fn(path, leaf)``; paths are dotted: ``added_cond.text_embeds``, ``x.0``.

    Containers keep their type: mappings (diffusers' output classes are mappings), named tuples, torch.return_types,
    deques, dataclasses.

    Args:
        only: the paths of the leaves to replace. What has none of them inside is handed through as it is.
    """
    return _mapped(tree, fn, path, None if only is None else leading_to(only))


def _mapped(tree: Any, fn: Callable[[str, Any], Any], path: str, leading: Collection[str] | None) -> Any:
    if leading is not None and path not in leading:
        return tree
    held = _held(tree)
    if held is None:
        return fn(path, tree)
    return _like(tree, {key: _mapped(value, fn, _join(path, key), leading) for key, value in held.items()})


Exchanged = list[tuple[Any, Any, Any, Any]]  # (container, place in it, what was there, what is there now)


def exchange(tree: Any, fn: Callable[[str, Any], Any], path: str, leading: Collection[str], done: Exchanged) -> Any:
    """:func:`map_leaves` for the time of a call: lists, dicts and dataclasses stay the ones that they are.

    Whoever else holds one, or gets hold of it during the call, means the same one: a cache that a callee writes to, a
    list that is an attribute as well.

    Args:
        leading: :func:`leading_to` the leaves to replace.
        done: is given what :func:`put_back` needs when the call is over.
    """
    if path not in leading:
        return tree
    held = _held(tree)
    if held is None:
        return fn(path, tree)
    now = {key: exchange(value, fn, _join(path, key), leading, done) for key, value in held.items()}
    if not _is_exchanged_in_place(tree):
        return _like(tree, now)
    for key, before in held.items():
        if _join(path, key) in leading and not _is_exchanged_in_place(before):
            _put(tree, key, now[key])
            done.append((tree, key, before, now[key]))
    return tree


def put_back(done: Exchanged) -> None:
    """What :func:`exchange` has put into containers goes, and what was there comes back; all else stays."""
    for container, key, before, now in reversed(done):
        held = _held(container) or {}
        if key in held and _same(held[key], now):
            _put(container, key, before)
        elif isinstance(now, Tensor):
            for other, value in held.items():
                if value is now:
                    _put(container, other, before)


def first_copied(tree: Any, path: str, leading: Collection[str]) -> Any:
    """A container that :func:`exchange` copies though it could be changed, or None."""
    held = _held(tree)
    if held is None or path not in leading:
        return None
    fixed = isinstance(tree, (tuple, types.MappingProxyType)) or _is_frozen(type(tree))
    if not fixed and not _is_exchanged_in_place(tree):
        return tree
    parts = (first_copied(value, _join(path, key), leading) for key, value in held.items())
    return next((part for part in parts if part is not None), None)


def _is_exchanged_in_place(tree: Any) -> bool:
    """Not for a subclass, whose own methods might do more."""
    if type(tree) in (list, dict, OrderedDict, defaultdict, deque):
        return True
    if not dataclasses.is_dataclass(tree) or isinstance(tree, (type, Mapping)):
        return False
    return not _is_frozen(type(tree)) and type(tree).__setattr__ is object.__setattr__


def _is_frozen(kind: Any) -> Any:
    params = getattr(kind, "__dataclass_params__", None)
    return params is not None and params.frozen


def _put(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, (Mapping, list, deque)):
        container[key] = value  # type: ignore[index]
    else:
        setattr(container, key, value)


def _held(tree: Any) -> dict[Any, Any] | None:
    """What a container holds, by what it is found at; None: ``tree`` is a leaf."""
    if isinstance(tree, LEAVES):
        return None
    if isinstance(tree, Mapping):
        return dict(tree.items())
    if isinstance(tree, (list, tuple, deque)):
        return dict(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {name: getattr(tree, name) for name in _field_names(tree)}
    return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other))
    return one == other if isinstance(one, (bool, int, float, complex, str)) else one is other


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, in order."""
    found: list[tuple[str, Any]] = []
    _collect(tree, "", found)
    return found


def _collect(tree: Any, path: str, found: list[tuple[str, Any]]) -> None:
    held = _held(tree)
    if held is not None:
        for key, value in held.items():
            _collect(value, _join(path, key), found)
    elif isinstance(tree, frozenset) and torch.compiler.is_compiling():
        raise ValueError(f"Dynamo cannot return a frozenset, as the output at {path!r} is: return a list")
    else:
        found.append((path, tree))


def _field_names(tree: Any, computed: bool = True) -> list[str]:
    """The fields of a dataclass, without those that its constructor computes or with them."""
    return [f.name for f in dataclasses.fields(tree) if (f.init or computed) and hasattr(tree, f.name)]


def leading_to(paths: Iterable[str]) -> set[str]:
    """These paths, and those of the containers around them."""
    found: set[str] = set()
    for path in paths:
        while path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else f"{key}"


def _like(tree: Any, items: dict[Any, Any]) -> Any:
    """A container of the kind of ``tree`` that holds ``items``, by what they are found at."""
    if isinstance(tree, Mapping):
        return _mapping_like(tree, items)
    if isinstance(tree, (list, tuple, deque)):
        return _sequence_like(tree, list(items.values()))
    return _dataclass_like(tree, items)


def _mapping_like(tree: Any, items: dict[Any, Any]) -> Any:
    kind: Any = type(tree)
    if kind is dict:
        return items
    if kind is OrderedDict:
        return OrderedDict(items)
    if kind is defaultdict:
        return defaultdict(tree.default_factory, items)
    if kind is types.MappingProxyType:
        return types.MappingProxyType(items)
    if torch.compiler.is_compiling():  # Dynamo knows no copy
        if dataclasses.is_dataclass(tree):
            return kind(**items)
        if not isinstance(tree, dict):
            return kind(items)
        new = kind.__new__(kind)
        for name, value in vars(tree).items():
            setattr(new, name, value)
    else:
        new = copy.copy(tree)
    for key, value in items.items():
        new[key] = value
    return new


def _sequence_like(tree: Any, items: list[Any]) -> Any:
    kind = type(tree)
    if kind in (list, tuple):
        return kind(items)
    if isinstance(tree, deque):
        return deque(items, tree.maxlen)
    if hasattr(tree, "_fields"):
        return kind(*items)
    if kind.__module__ == "torch.return_types":
        return kind(items)
    if torch.compiler.is_compiling():
        return tuple(items) if isinstance(tree, tuple) else items
    if isinstance(tree, tuple):  # torch.Size has room for numbers only
        return tuple(items) if isinstance(tree, torch.Size) else tuple.__new__(kind, items)
    new = copy.copy(tree)
    new[:] = items
    return new


def _dataclass_like(tree: Any, fields: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():  # Dynamo knows no copy, and what the constructor computes has its tangent
        return dataclasses.replace(tree, **{name: fields[name] for name in _field_names(tree, computed=False)})
    new = copy.copy(tree)
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    return new


def refuse_objects(out: Any, error: type[Exception]) -> None:
    """Raise ``error`` where an output holds something that is not walked through, which :func:`refuse_hidden` would
    have to look into: for Dynamo, which cannot."""
    for path, leaf in leaves(out):
        if not isinstance(leaf, (*LEAVES, torch.dtype, torch.device)):
            raise error(f"the output{f' at {path!r}' if path else ''} is {_a(type(leaf).__name__)}, not a tensor")


def refuse_hidden(out: Any, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` where an output holds tensors in something that is not walked through: they would have no
    tangent, and nobody would say so."""
    for path, leaf in leaves(out):
        if isinstance(leaf, LEAVES):
            continue
        what = f"the output{f' at {path!r}' if path else ''} is {_a(type(leaf).__name__)}"
        if hasattr(leaf, "__array_interface__") and leaf.__array_interface__["typestr"][1] in "fc":
            raise error(f"{what}, which may have lost a tangent: return a tensor")
        if isinstance(leaf, Iterator):
            raise error(f"{what}, which is computed when it is read: return a list")
        if isinstance(leaf, (set, frozenset)) and _holds_tensors(leaf):
            raise error(f"{what} of tensors, in no order that their tangents could have: return a list")
        if _holds_tensors(leaf):
            raise error(
                f"{what} that holds tensors, with no place for their tangents: return the tensors, or a tuple, list, "
                "mapping or dataclass of them"
            )


def _holds_tensors(value: Any) -> bool:
    waiting, seen = [value], set()
    while waiting:
        here = waiting.pop()
        if id(here) in seen or isinstance(here, (type, types.ModuleType, nn.Module)):
            continue
        seen.add(id(here))
        if isinstance(here, Tensor):
            if here.is_floating_point() or here.is_complex():
                return True
        else:
            waiting += _inside(here)
    return False


def _inside(value: Any) -> Iterable[Any]:
    """What an object holds: its elements, its attributes, the cells and defaults of a function."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple, deque, set, frozenset, type({}.values()), type({}.items()))):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, types.FunctionType):
        yield from value.__defaults__ or ()
        for cell in value.__closure__ or ():
            yield from _contents(cell)
    yield from getattr(value, "__dict__", {}).values()
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield getattr(value, name)


def _contents(cell: types.CellType) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # not assigned yet
        return


def _a(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
