"""Settings: frozen dataclasses, read strictly from YAML files and the command line.

    config = load(RunConfig, Path("run.yaml"), ["stages.0.steps=100", "out=/tmp/run"])

A field may be a bool, int, float, str, Path, Literal, Any, a list, tuple or dict of those, another dataclass, one of
several `Variants`, or a union. Scalars are read by YAML 1.2's rules: 1e-4 is a number, and yes, on and 010 are text.
Every problem is reported at once, with its file and line.

Two keys at the top of a file come first. `base: other.yaml` changes that other file: mappings are merged, anything else
is replaced. `imports: [mine.py]`, where the dataclass has such a field, imports modules that define kinds of settings.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from jvpgraph.trainer.files import write_whole
from jvpgraph.trainer.plug import PlugError, import_module
from jvpgraph.trainer.settings.check import check
from jvpgraph.trainer.settings.kinds import Variants, inline, plain
from jvpgraph.trainer.settings.layers import Override, merge, read, read_overrides
from jvpgraph.trainer.settings.table import comments, describe
from jvpgraph.trainer.settings.yaml_tree import Problem, Tree, dump

__all__ = [
    "Problem",
    "SettingsError",
    "Variants",
    "comments",
    "describe",
    "differences",
    "from_dict",
    "load",
    "save",
    "text",
    "to_dict",
]

T = TypeVar("T")


class SettingsError(ValueError):
    """Everything that is wrong with the settings."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''} in the settings"
        super().__init__("\n".join([count, *(textwrap.indent(str(problem), "  ") for problem in self.problems)]))

    def __reduce__(self) -> tuple[type, tuple[tuple[Problem, ...]]]:  # the message is made from the problems
        return type(self), (self.problems,)


def load(cls: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """The settings of a YAML file, changed by overrides such as `stages.0.steps=100`, whose values are YAML.

    Raises SettingsError with everything that is wrong.
    """
    problems: list[Problem] = []
    layers = [Tree({})] if path is None else read(path, cls, problems)
    if not layers:  # an unreadable file is the only problem then
        raise SettingsError(problems)
    return _settings(cls, layers, read_overrides(overrides, problems), problems)


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """The settings of plain Python data, which `where` names in errors. Raises SettingsError."""
    return _settings(cls, [Tree(dict(data), {(): where})], [], [])


def _settings(cls: type[T], layers: Sequence[Tree], changes: Sequence[Override], problems: list[Problem]) -> T:
    if "imports" in {f.name for f in fields(cls)}:  # type: ignore[arg-type]
        _import(cls, layers, changes, problems)
    tree = layers[0]
    for layer in layers[1:]:
        tree = Tree(merge(tree.data, layer.data, cls), tree.places | layer.places)
    for change in changes:
        tree = change.apply(tree, cls, problems)
    found = check(cls, tree, problems)
    if problems:
        raise SettingsError(problems)
    return found


def _import(cls: type, layers: Sequence[Tree], changes: Sequence[Override], problems: list[Problem]) -> None:
    """Imports what the highest layer names. Raises SettingsError if that fails: kinds would be unknown."""
    tree = next((layer for layer in reversed(layers) if "imports" in layer.data), Tree({}))
    for change in changes:
        if change.keys[0] == "imports":
            tree = change.apply(tree, cls, [])
    listed = tree.data.get("imports")
    failed = []
    for i, name in enumerate(listed if isinstance(listed, list) else ()):
        try:
            if isinstance(name, str):
                import_module(name)
        except PlugError as error:
            failed.append(Problem(tree.place(("imports", i)), f"imports.{i}", str(error)))
    if failed:
        raise SettingsError([*problems, *failed])


def to_dict(obj: Any) -> dict[str, Any]:
    """The settings as plain YAML types; `from_dict` gives them back equal."""
    found = plain(obj)
    assert isinstance(found, dict)
    return found


def save(obj: Any, path: Path) -> None:
    """Writes the settings as YAML, every default included; `load` gives them back equal."""
    write_whole(path, text(obj))


def text(obj: Any) -> str:
    """The settings as YAML, every default included."""
    return dump(to_dict(obj))


def differences(a: Any, b: Any) -> list[str]:
    """One line `dotted.key: value in a -> value in b` for each setting that differs."""
    return list(_differ(plain(a), plain(b), ""))


ABSENT = object()


def _differ(a: Any, b: Any, path: str) -> Iterator[str]:
    if type(a) is type(b) is list:
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if type(a) is type(b) is dict and a.get("name") == b.get("name"):
        for key in dict.fromkeys([*a, *b]):
            yield from _differ(a.get(key, ABSENT), b.get(key, ABSENT), f"{path}.{key}".removeprefix("."))
    elif a != b:
        yield f"{path}: {_brief(a)} -> {_brief(b)}"


def _brief(value: Any) -> str:
    text = "absent" if value is ABSENT else inline(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
