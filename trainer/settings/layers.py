"""Where settings come from: a YAML file, over the files that it names as its `base`, below the overrides."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from jvpgraph.trainer.plug import Plug
from jvpgraph.trainer.settings.check import dotted
from jvpgraph.trainer.settings.kinds import (
    dataclass_of,
    default_of,
    given,
    kinds,
    named,
    plain,
    settings_of,
    type_of,
    variants_of,
)
from jvpgraph.trainer.settings.yaml_tree import Problem, Tree, parse


def read(path: Path, cls: type, problems: list[Problem], above: tuple[Path, ...] = ()) -> list[Tree]:
    """A file and its bases, the lowest first; nothing, and a problem, if one of them cannot be read."""
    tree = _read(path, problems) if path.resolve() not in above else None
    if path.resolve() in above:
        problems.append(Problem(str(path), "base", "the files are each other's base"))
    if tree is None or "base" not in tree.data or "base" in {f.name for f in fields(cls)}:
        return [] if tree is None else [tree]
    base = tree.data.pop("base")
    if not isinstance(base, str):
        problems.append(Problem(tree.place(("base",)), "base", f"expected the path of a file, got {given(base)}"))
        return []
    below = read(path.parent / base, cls, problems, (*above, path.resolve()))
    return [*below, tree] if below else []


def _read(path: Path, problems: list[Problem]) -> Tree | None:
    try:
        tree = parse(path.read_text(encoding="utf-8"), str(path), problems)
        if tree is None or isinstance(tree.data, dict):
            return tree
        if tree.data is None:
            return Tree({}, tree.places)
        problems.append(Problem(tree.place(()), "", f"expected a mapping of settings, got {given(tree.data)}"))
    except (FileNotFoundError, NotADirectoryError):
        files = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, files, n=3, cutoff=0.4)
        known = f"; there is {' or '.join(str(path.parent / name) for name in near)}" if near else ""
        problems.append(Problem(str(path), "", f"no such file{known}"))
    except IsADirectoryError:
        problems.append(Problem(str(path), "", "is a folder; give a YAML file"))
    except UnicodeDecodeError as error:
        problems.append(Problem(str(path), "", f"not a YAML file: {error}"))
    return None


def merge(below: Any, above: Any, tp: Any) -> Any:
    """`above` laid over `below`. Settings of another kind, and another function, replace all of the old ones."""
    old, new = named(below, tp), named(above, tp)
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return above
    if variants_of(tp) and "name" in new and ("name" not in old or old["name"] != new["name"]):
        return above
    if Plug in kinds(tp) and "load" in new and new["load"] != old.get("load"):
        return above
    return old | {k: merge(old[k], value, type_of(k, old, tp)) if k in old else value for k, value in new.items()}


@dataclass(frozen=True)
class Override:
    """`stages.0.steps=100`: one setting to be replaced."""

    place: str
    keys: tuple[str, ...]
    value: Any

    def apply(self, tree: Tree, cls: type, problems: list[Problem]) -> Tree:
        """The tree with it, or a problem."""
        path: list[str | int] = []
        try:
            data = self._put(tree.data, cls, path)
        except LookupError as error:
            problems.append(Problem(self.place, dotted(tuple(path)), str(error.args[0])))
            return tree
        here = tuple(path)
        places = {at: place for at, place in tree.places.items() if at[: len(here)] != here}
        new = {here[:n]: self.place for n in range(1, len(here) + 1) if here[:n] not in places}
        return Tree(data, places | new)

    def _put(self, data: Any, tp: Any, path: list[str | int]) -> Any:
        """Data with the value below `path`, which grows. What is left out on the way to it starts from its default."""
        if len(path) == len(self.keys):
            return self.value
        data, key = named(data, tp), self.keys[len(path)]
        if isinstance(data, dict):
            inner = data.get(key)
            inner, inner_type = _default(key, data, tp) if inner is None else inner, type_of(key, data, tp)
            path.append(key)
            return data | {key: self._put(inner, inner_type, path)}
        if not isinstance(data, list):
            raise LookupError(f"is {given(data)} and has no key {key!r}")
        if not key.isdecimal() or int(key) >= len(data):
            raise LookupError(f"a list of {len(data)}: expected an index below that, got {key!r}")
        index = int(key)
        path.append(index)
        return [*data[:index], self._put(data[index], type_of(index, data, tp), path), *data[index + 1 :]]


def read_overrides(texts: Sequence[str], problems: list[Problem]) -> list[Override]:
    """Those that can be read; a problem for each other one."""
    found = []
    for text in texts:
        path, equals, value_text = text.partition("=")
        keys, place = tuple(path.strip().split(".")), f"override {text}"
        wrong: list[Problem] = []
        value = parse(value_text, place, wrong)
        if not equals or not all(keys):
            problems.append(Problem(place, "", "expected key=value, such as stages.0.steps=100"))
        elif value is None or wrong:
            problems += [Problem(place, p.path, p.message) for p in wrong]
        else:
            found.append(Override(place, keys, value.data))
    return found


def _default(key: str, data: Any, tp: Any) -> Any:
    """The default of a key that is not given, else an empty mapping."""
    cls = dataclass_of(data, tp)
    found = next((default_of(f) for f in settings_of(cls) if f.name == key), None) if cls else None
    return {} if found is None or found is MISSING else plain(found)
