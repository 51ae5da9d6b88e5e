"""YAML by ruamel.yaml, with the line of each value. Scalars by YAML 1.2's rules, but 010 and dates are text."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.resolver import BaseResolver, implicit_resolvers

PathKeys = tuple[str | int, ...]


class Resolver(BaseResolver):
    """Which plain scalars are numbers and so on; all others are text."""

    processing_version = (1, 2)  # type: ignore[assignment]

    def __init__(self, version: Any = None, loader: Any = None) -> None:
        super().__init__(loader)


RESOLVED = [f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "float", "merge", "int", "str")]
Resolver.add_implicit_resolver_base(RESOLVED[4], re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)\Z"), "-+0123456789")
for _versions, _tag, _pattern, _first in implicit_resolvers:
    if (1, 2) in _versions and _tag in RESOLVED[:4]:
        Resolver.add_implicit_resolver_base(_tag, _pattern, _first)


@dataclass(frozen=True)
class Problem:
    """One mistake in the settings: `place` is file:line or the override, `path` the dotted key."""

    place: str
    path: str
    message: str

    def __str__(self) -> str:
        return "  ".join(part for part in (self.place, f"{self.path}: {self.message}".removeprefix(": ")) if part)


@dataclass(frozen=True)
class Tree:
    """Plain data, and the places that they come from by path; what has none comes from where its parent does."""

    data: Any
    places: dict[PathKeys, str] = field(default_factory=dict)

    def place(self, path: PathKeys) -> str:
        return next((self.places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.places), "")


def dump(data: Any, *, one_line: bool = False) -> str:
    """Plain data as YAML that `parse` reads as the same data."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.sort_base_mapping_type_on_output = Resolver, False  # type: ignore[assignment]
    yaml.default_flow_style = one_line or None  # type: ignore[assignment]  # None: what holds only scalars is on one line
    yaml.width = 10**9 if one_line else 120  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue().removesuffix("\n").removesuffix("\n...") if one_line else stream.getvalue()


def parse(text: str, name: str, problems: list[Problem]) -> Tree | None:
    """The data of a YAML text, with places such as name:3; None, and a problem, if it is none."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = Resolver
    try:
        root = yaml.compose(text)
        if root is None:
            return Tree(None, {(): name})
        reader = _Reader(yaml, name, problems)
        return Tree(reader.read(root, (), ()), reader.places | {(): f"{name}:{root.start_mark.line + 1}"})
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = f"not YAML: {', '.join(filter(None, [error.context, error.problem]))}"
        problems.append(Problem(f"{name}:{mark.line + 1}" if mark else name, "", message))
    except (YAMLError, ValueError) as error:  # forbidden characters; numbers that Python does not take
        problems.append(Problem(name, "", f"not YAML: {error}"))
    return None


@dataclass
class _Reader:
    """Makes data of ruamel's nodes, whose aliases may be circles and whose keys may stand twice."""

    yaml: YAML
    name: str
    problems: list[Problem]
    places: dict[PathKeys, str] = field(default_factory=dict)

    def read(self, node: Node, path: PathKeys, parents: tuple[Node, ...]) -> Any:
        self.places.setdefault(path, self.line(node))
        if node in parents:
            raise MarkedYAMLError(None, None, "an alias inside of its own anchor", node.start_mark)
        if isinstance(node, MappingNode):
            return self.mapping(node, path, (*parents, node))
        if isinstance(node, SequenceNode):
            return [self.read(child, (*path, i), (*parents, node)) for i, child in enumerate(node.value)]
        if str(node.tag) not in RESOLVED:
            raise MarkedYAMLError(None, None, f"unknown tag {node.tag}", node.start_mark)
        return self.yaml.constructor.construct_object(node)

    def mapping(self, node: MappingNode, path: PathKeys, parents: tuple[Node, ...]) -> dict[str, Any]:
        self.yaml.constructor.flatten_mapping(node)
        merged = len(node.merge or ())  # by `<<`; these come first
        found: dict[str, Any] = {}
        own: dict[str, str] = {}
        for i, (key, child) in enumerate(node.value):
            if not isinstance(key, ScalarNode):
                self.problems.append(Problem(self.line(key), "", "a key must be text, not a list or a mapping"))
            elif key.value in own:
                message = f"given twice; the first one is at {own[key.value]}"
                self.problems.append(Problem(self.line(key), key.value, message))
            else:
                self.places[(*path, key.value)] = self.line(key)  # where one looks for what is wrong
                found[key.value] = self.read(child, (*path, key.value), parents)
                if i >= merged:
                    own[key.value] = self.line(key)
        return found

    def line(self, node: Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"
