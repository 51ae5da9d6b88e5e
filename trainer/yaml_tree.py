"""YAML as a tree whose every value knows its file and line, read by YAML 1.2's rules for scalars."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

INT = r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)"
EXPONENT = r"[eE][-+]?[0-9]+"
FLOAT = (
    rf"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:{EXPONENT})?|\.[0-9]+(?:{EXPONENT})?"
    rf"|[0-9][0-9_]*{EXPONENT}|\.(?:inf|Inf|INF))"
)
NUMBER = rf"{INT}|{FLOAT}"
SCALARS = {  # YAML 1.2's core schema: tag, pattern, first characters
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (INT, [*"-+0123456789"]),
    "float": (rf"{FLOAT}|\.(?:nan|NaN|NAN)", [*"-+.0123456789"]),
    "merge": (r"<<", ["<"]),
}


class Loader(yaml.SafeLoader):
    """Reads scalars by YAML 1.2's rules."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would not read as text, and writes short lists on one line."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        flat = not any(isinstance(item, (list, dict)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)


for _tag, (_pattern, _first) in SCALARS.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
Dumper.add_representer(list, Dumper.represent_list)


@dataclass(frozen=True)
class Problem:
    """One mistake in the settings: `place` is file:line or the override, `path` the dotted key."""

    place: str
    path: str
    message: str

    def __str__(self) -> str:
        return "  ".join(part for part in (self.place, f"{self.path}: {self.message}".removeprefix(": ")) if part)


@dataclass
class Node:
    """A value with the place that it comes from; the values of lists and dicts are nodes again."""

    value: Any
    place: str = ""

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def plant(data: Any, place: str) -> Node:
    """Nodes for plain data; anything that YAML does not know stays as it is and fails its type check."""
    if isinstance(data, Mapping):
        return Node({str(key): plant(value, place) for key, value in data.items()}, place)
    if isinstance(data, (list, tuple)):
        return Node([plant(value, place) for value in data], place)
    return Node(data, place)


def parse(text: str, name: str, problems: list[Problem], *, lines: bool = True) -> Node | None:
    """The nodes of a YAML text; None, and a problem, if it is none."""
    loader = Loader(text)
    try:
        root = loader.get_single_node()
        return Node(None, name) if root is None else _graft(root, loader, name, lines, problems, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if lines and mark else name
        problems.append(Problem(place, "", f"not YAML: {', '.join(filter(None, [error.context, error.problem]))}"))
    except (yaml.YAMLError, ValueError) as error:  # forbidden characters; numbers that Python does not take
        problems.append(Problem(name, "", f"not YAML: {error}"))
    finally:
        loader.dispose()
    return None


def _graft(
    node: yaml.Node, loader: Loader, name: str, lines: bool, problems: list[Problem], parents: tuple[yaml.Node, ...]
) -> Node:
    place = f"{name}:{node.start_mark.line + 1}" if lines else name
    if node in parents:
        raise yaml.constructor.ConstructorError(None, None, "an alias inside of its own anchor", node.start_mark)

    def graft(child: yaml.Node) -> Node:
        return _graft(child, loader, name, lines, problems, (*parents, node))

    if isinstance(node, yaml.SequenceNode):
        return Node([graft(child) for child in node.value], place)
    if isinstance(node, yaml.MappingNode):
        merged: dict[str, Node] = {}
        own: dict[str, Node] = {}
        for key, child in node.value:
            at = f"{name}:{key.start_mark.line + 1}" if lines else name
            if not isinstance(key, yaml.ScalarNode):
                problems.append(Problem(at, "", "a key must be text, not a list or a mapping"))
            elif key.tag.endswith(":merge"):
                shared = graft(child)
                for source in shared.value if isinstance(shared.value, list) else [shared]:
                    if isinstance(source.value, dict):
                        merged = source.value | merged
                    else:
                        problems.append(Problem(at, "<<", "merges mappings only"))
            elif key.value in own:
                problems.append(Problem(at, key.value, f"given twice; the first one is at {own[key.value].place}"))
            else:
                own[key.value] = Node(graft(child).value, at)  # problems are looked for where the key stands
        return Node(merged | own, place)
    known = node.tag.rpartition(":")[2] in SCALARS or node.tag.endswith(":str")
    if not known:
        raise yaml.constructor.ConstructorError(None, None, f"unknown tag {node.tag}", node.start_mark)
    return Node(loader.construct_object(node), place)
