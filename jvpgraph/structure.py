"""Walking the arguments and outputs of models: tensors inside tuples, lists, mappings and dataclasses.

Plain recursion over plain containers, because Dynamo traces it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["leaves", "map_leaves"]

LEAVES = (Tensor, type(None), bool, int, float, complex, str, nn.Module)


def map_leaves(tree: Any, fn: Callable[[str, Any], Any], path: str = "") -> Any:
    """``tree`` with every leaf replaced by ``fn(path, leaf)``; paths are dotted: ``added_cond.text_embeds``, ``x.0``.

    Mappings keep their type (diffusers' output classes are mappings), as do named tuples and dataclasses.
    """
    if isinstance(tree, LEAVES):
        return fn(path, tree)
    if isinstance(tree, Mapping):
        return _like(tree, {k: map_leaves(v, fn, _join(path, k)) for k, v in tree.items()})
    if isinstance(tree, (list, tuple)):
        items = [map_leaves(v, fn, _join(path, i)) for i, v in enumerate(tree)]
        if hasattr(tree, "_fields"):
            return type(tree)(*items)
        return tuple(items) if isinstance(tree, tuple) else items
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(
            tree, **{n: map_leaves(getattr(tree, n), fn, _join(path, n)) for n in _field_names(tree)}
        )
    return fn(path, tree)


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, in order."""
    found: list[tuple[str, Any]] = []
    _collect(tree, "", found)
    return found


def _collect(tree: Any, path: str, found: list[tuple[str, Any]]) -> None:
    if isinstance(tree, LEAVES):
        found.append((path, tree))
    elif isinstance(tree, Mapping):
        for k, v in tree.items():
            _collect(v, _join(path, k), found)
    elif isinstance(tree, (list, tuple)):
        for i, v in enumerate(tree):
            _collect(v, _join(path, i), found)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for name in _field_names(tree):
            _collect(getattr(tree, name), _join(path, name), found)
    else:
        found.append((path, tree))


def _field_names(tree: Any) -> list[str]:
    """The fields a dataclass is made of; what it computes from them is left to its constructor."""
    return [f.name for f in dataclasses.fields(tree) if f.init]


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else f"{key}"


def _like(tree: Any, items: dict[Any, Any]) -> Any:
    if type(tree) is dict:
        return items
    return type(tree)(**items) if all(isinstance(k, str) for k in items) else type(tree)(items)
