"""Plain data, checked by pydantic, as an instance of its dataclass."""

from __future__ import annotations

import json
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from jvpgraph.trainer.settings.kinds import (
    dataclass_of,
    default_of,
    did_you_mean,
    given,
    in_words,
    kinds,
    named,
    plain,
    settings_of,
    type_of,
    variants_of,
)
from jvpgraph.trainer.settings.yaml_tree import PathKeys, Problem, Tree


def check(cls: type, tree: Tree, problems: list[Problem]) -> Any:
    """An instance of `cls`; None, and every problem, if the tree is none."""
    tree = Tree(_complete(tree.data, cls, (), tree, problems), tree.places)
    # a tuple of one, since pydantic takes no config beside a dataclass; JSON, in which a list is a tuple, strictly too
    adapter = TypeAdapter(tuple[cls], config=ConfigDict(strict=True, extra="forbid"))  # type: ignore[valid-type]
    try:
        return adapter.validate_json(json.dumps([tree.data], default=repr))[0]
    except ValidationError as error:
        found = {problem.path: problem for problem in (_explain(e, tree, cls) for e in error.errors())}
    # where one alternative of a union fits but for what is inside, that is the problem
    problems += [p for p in found.values() if not any(other.startswith(f"{p.path}.") for other in found)]
    return None


def _complete(data: Any, tp: Any, path: PathKeys, tree: Tree, problems: list[Problem], default: Any = MISSING) -> Any:
    """Data with what may be left out: the name of a kind, and what the field's default has in a mapping.

    Adds the problems that pydantic does not see: no number, no path, and what YAML does not know.
    """
    data = named(data, tp)
    if isinstance(data, list):
        return [_complete(item, type_of(i, data, tp), (*path, i), tree, problems) for i, item in enumerate(data)]
    if not isinstance(data, dict):
        nothing = (data != data and float in kinds(tp)) or (data == "" and Path in kinds(tp) and str not in kinds(tp))
        if nothing or not (data is None or isinstance(data, (bool, int, float, str))):
            problems.append(Problem(tree.place(path), dotted(path), _expected(tp, data)))
        return data
    variants = variants_of(tp)
    if variants and "name" in data:  # which starts from the defaults of its kind
        default = MISSING
    elif variants and (type(default) in variants.values() or len(variants) == 1):
        data = {"name": next(iter(variants)) if default is MISSING else default.name} | data
    cls = dataclass_of(data, tp)
    defaults = {f.name: default_of(f) for f in settings_of(cls)} if cls else {}
    if cls and type(default) is cls:
        defaults = {name: getattr(default, name) for name in defaults}
        data = {name: plain(inner) for name, inner in defaults.items()} | data
    return {
        key: _complete(value, type_of(key, data, tp), (*path, key), tree, problems, defaults.get(key, MISSING))
        for key, value in data.items()
    }


def _explain(error: Any, tree: Tree, tp: Any) -> Problem:
    """One of pydantic's errors with its place."""
    kind, steps = error["type"], list(error["loc"][1:])
    if kind == "missing" and isinstance(steps[-1], int):  # an item of a tuple, whose size is wrong then
        kind = str(steps.pop())
    path: PathKeys = ()
    data, cls, labels = tree.data, None, _labels(tp)
    for step in steps:
        if labels:
            labels -= 1
            continue
        cls, tp, path = dataclass_of(data, tp), type_of(step, data, tp), (*path, step)
        data = data.get(step) if isinstance(data, dict) else data[step]
        labels = _labels(tp)
    variants = variants_of(tp)
    if kind == "missing":
        return Problem(tree.place(path[:-1]), dotted(path), f"missing; expected {_allowed(tp)}")
    if kind == "unexpected_keyword_argument":
        known = [f.name for f in settings_of(cls)]
        allowed = f"allowed: {', '.join(known)}" if known else "it has no settings"
        return Problem(tree.place(path), dotted(path), f"unknown key{did_you_mean(steps[-1], known)}; {allowed}")
    if kind == "union_tag_not_found":
        return Problem(tree.place(path), dotted((*path, "name")), f"missing; one of {', '.join(variants)}")
    if kind == "union_tag_invalid":
        path, name = (*path, "name"), data["name"]
        message = f"expected one of {', '.join(variants)}, got {given(name)}{did_you_mean(name, variants)}"
        return Problem(tree.place(path), dotted(path), message)
    message = str(error["ctx"]["error"]) if kind in ("value_error", "assertion_error") else _expected(tp, data)
    return Problem(tree.place(path), dotted(path), message)


def _labels(tp: Any) -> int:
    """How many names of alternatives pydantic puts behind the place of a value of this type."""
    return (len([kind for kind in kinds(tp) if kind is not type(None)]) > 1) + bool(variants_of(tp))


def _expected(tp: Any, value: Any) -> str:
    choices = [c for kind in kinds(tp) if get_origin(kind) is Literal for c in get_args(kind) if isinstance(c, str)]
    return f"expected {_allowed(tp)}, got {given(value)}{did_you_mean(value, choices)}"


def _allowed(tp: Any) -> str:
    if variants := variants_of(tp):
        null = " | null" if type(None) in kinds(tp) else ""
        return f"one of {', '.join(variants)}, or a mapping with the key name{null}"
    return " | ".join("a mapping" if is_dataclass(kind) else in_words(kind) for kind in kinds(tp))


def dotted(path: PathKeys) -> str:
    return ".".join(map(str, path))
