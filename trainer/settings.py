"""Settings: frozen dataclasses, read strictly from YAML files and the command line.

    config = load(RunConfig, Path("run.yaml"), ["stages.0.steps=100", "out=/tmp/run"])

A field may be a bool, int, float, str, Path, Literal, Any, a list, tuple or dict of those, another dataclass, one of
several `Variants`, or a union. Scalars are read by YAML 1.2's rules: 1e-4 is a number, and yes, on and 010 are text.
Every problem is reported at once, with its file and line. A file whose top level says `base: other.yaml` changes that
other file: mappings are merged, anything else is replaced.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import math
import os
import re
import textwrap
import tokenize
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from jvpgraph.trainer.yaml_tree import NUMBER, Dumper, Node, Problem, parse, plant

T = TypeVar("T")


class Variants:
    """Base of settings that come in several kinds: the key `name` of the YAML mapping says which."""

    name: ClassVar[str]

    @classmethod
    def variants(cls) -> dict[str, type]:
        """Every kind by its name, subclasses of subclasses included."""
        found = {cls.name: cls} if "name" in vars(cls) else {}
        for sub in cls.__subclasses__():
            found |= sub.variants()
        return found


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
    tree = Node({}) if path is None else _read_file(path, problems, cls)
    if tree is not None:  # an unreadable file is the only problem then
        for override in overrides:
            _override(tree, override, cls, problems)
        found = _convert(cls, tree, "", problems)
    if problems:
        raise SettingsError(problems)
    return found


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """The settings of plain Python data, which `where` names in errors. Raises SettingsError."""
    problems: list[Problem] = []
    found = _convert(cls, plant(data, where), "", problems)
    if problems:
        raise SettingsError(problems)
    return found


def to_dict(obj: Any) -> dict[str, Any]:
    """The settings as plain YAML types; `from_dict` gives them back equal."""
    plain = _plain(obj)
    assert isinstance(plain, dict)
    return plain


def save(obj: Any, path: Path) -> None:
    """Writes the settings as YAML, every default included; `load` gives them back equal."""
    text = yaml.dump(to_dict(obj), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once: whoever reads it finds the old or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def differences(a: Any, b: Any) -> list[str]:
    """One line `dotted.key: value in a -> value in b` for each setting that differs."""
    return list(_differ(a, b, ""))


# ---- Files and overrides


def _read_file(path: Path, problems: list[Problem], cls: type, children: tuple[Path, ...] = ()) -> Node | None:
    """A file merged over its base. None, and a problem, if it cannot be read."""
    if path.resolve() in children:
        problems.append(Problem(str(path), "base", "the files are each other's base"))
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        near = difflib.get_close_matches(path.name, _names_in(path.parent), n=3, cutoff=0.4)
        known = f"; there is {_any_of([str(path.parent / name) for name in near])}" if near else ""
        problems.append(Problem(str(path), "", f"no such file{known}"))
        return None
    except IsADirectoryError:
        problems.append(Problem(str(path), "", "is a folder; give a YAML file"))
        return None
    except UnicodeDecodeError as error:
        problems.append(Problem(str(path), "", f"not a YAML file: {error}"))
        return None
    tree = parse(text, str(path), problems)
    if tree is None or tree.value is None:
        return tree and Node({}, tree.place)
    if not isinstance(tree.value, dict):
        problems.append(Problem(tree.place, "", f"expected a mapping of settings, got {_given(tree.value)}"))
        return None
    if "base" in tree.value and "base" not in {f.name for f in fields(cls)}:
        base = tree.value.pop("base")
        if not isinstance(base.value, str):
            problems.append(Problem(base.place, "base", f"expected the path of a file, got {_given(base.value)}"))
            return None
        below = _read_file(path.parent / base.value, problems, cls, (*children, path.resolve()))
        return below and _merge(below, tree, cls)
    return tree


def _names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")) if folder.is_dir() else []


def _merge(below: Node, above: Node, tp: Any) -> Node:
    """`above` laid over `below`. Settings of another kind replace all of them: nothing of the old kind is left."""
    old, new = _as_variant(below, tp).value, _as_variant(above, tp).value
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return above
    if _is_variants(tp) and "name" in new and ("name" not in old or old["name"].value != new["name"].value):
        return above
    merged = dict(old)
    for key, node in new.items():
        merged[key] = _merge(old[key], node, _type_of(key, below, tp)) if key in old else node
    return Node(merged, above.place)


def _override(tree: Node, text: str, cls: type, problems: list[Problem]) -> None:
    """Sets one key. What the file leaves out on the way to it starts from its default."""
    path, equals, value_text = text.partition("=")
    keys = path.strip().split(".")
    place = f"override {text}"
    if not equals or not all(keys):
        problems.append(Problem(place, "", "expected key=value, such as stages.0.steps=100"))
        return
    value = parse(value_text, place, problems, lines=False)
    if value is None:
        return
    node, tp = tree, cls
    for depth, key in enumerate(keys):
        here, last = ".".join(keys[:depth]), depth == len(keys) - 1
        node.value = _as_variant(node, tp).value
        below = _type_of(key, node, tp)
        if isinstance(node.value, list):
            if not re.fullmatch(r"\d+", key) or int(key) >= len(node.value):
                size = f"a list of {len(node.value)}: expected an index below that, got {key!r}"
                problems.append(Problem(place, here, size))
                return
            if last:
                node.value[int(key)] = value
            else:
                node = node.value[int(key)]
        elif isinstance(node.value, dict):
            if last:
                node.value[key] = value
            elif key not in node.value or node.value[key].value is None:
                node.value[key] = _default_node(key, node, tp, place)
            node = node.value[key]
        else:
            problems.append(Problem(place, here, f"is {_given(node.value)} and has no key {key!r}"))
            return
        tp = below


def _default_node(key: str, node: Node, tp: Any, place: str) -> Node:
    """The default of a key that is not given, else an empty mapping."""
    cls = _dataclass_of(node, tp)
    for f in fields(cls) if cls else ():
        if f.name == key and (default := _default(f)) is not MISSING and default is not None:
            return plant(_plain(default), place)
    return Node({}, place)


def _as_variant(node: Node, tp: Any) -> Node:
    """`objective: scm` spelled out."""
    if _is_variants(tp) and isinstance(node.value, str):
        return Node({"name": Node(node.value, node.place)}, node.place)
    return node


def _is_variants(tp: Any) -> bool:
    return any(isinstance(kind, type) and issubclass(kind, Variants) for kind in _kinds(tp))


def _is_choice(tp: Any) -> bool:
    """Whether there is more than one kind."""
    return isinstance(tp, type) and issubclass(tp, Variants) and list(tp.variants().values()) != [tp]


def _dataclass_of(node: Node, tp: Any) -> type | None:
    """The dataclass that a mapping stands for, as far as its type says."""
    for kind in _kinds(tp):
        if isinstance(kind, type) and issubclass(kind, Variants):
            name = node.value.get("name") if isinstance(node.value, dict) else None
            found = kind.variants().get(name.value) if name and isinstance(name.value, str) else None
            if found:
                return found
        elif is_dataclass(kind):
            return kind  # type: ignore[return-value]
    return None


def _type_of(key: str, node: Node, tp: Any) -> Any:
    """The type of what is under a key of a mapping, or at an index of a list."""
    cls = _dataclass_of(node, tp)
    if cls is not None:
        return _hints(cls).get(key, Any)
    for kind in _kinds(tp):
        origin, args = get_origin(kind), get_args(kind)
        if origin is dict:
            return args[1]
        if origin in (list, tuple):
            return (
                args[min(int(key), len(args) - 1)]
                if len(args) > 1 and args[1] is not ... and key.isdigit()
                else args[0]
            )
    return Any


# ---- Data to settings

FAILED: Any = object()


def _convert(tp: Any, node: Node, path: str, problems: list[Problem], default: Any = MISSING) -> Any:
    """The value of a node as type `tp`, or FAILED with problems added."""
    value = node.value

    def fail(message: str) -> Any:
        problems.append(Problem(node.place, path, message))
        return FAILED

    if get_origin(tp) in (Union, types.UnionType):
        return _convert_union(tp, node, path, problems, default)
    if isinstance(tp, type) and issubclass(tp, Variants):
        return _convert_variant(tp, node, path, problems, default)
    if is_dataclass(tp):
        return _convert_dataclass(tp, node, path, problems, default)  # type: ignore[arg-type]
    origin, args = get_origin(tp), get_args(tp)
    if tp is Any:
        return node.plain()
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
    elif origin is dict:
        if isinstance(value, dict):
            parts = {key: _convert(args[1], child, _join(path, key), problems) for key, child in value.items()}
            return FAILED if any(part is FAILED for part in parts.values()) else parts
    elif origin in (list, tuple):
        if isinstance(value, list):
            types_of = _item_types(tp, len(value))
            if types_of is None:
                return fail(f"expected {_allowed(tp)}, got a list of {len(value)}")
            items = [
                _convert(item_type, child, _join(path, i), problems)
                for i, (item_type, child) in enumerate(zip(types_of, value))
            ]
            return FAILED if any(item is FAILED for item in items) else origin(items)
    elif tp is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
            return float(value)
    elif tp is Path:
        if isinstance(value, str) and value:
            return Path(value)
    elif tp in (type(None), bool, int, str):
        if type(value) is tp:
            return value
    elif isinstance(tp, type) and issubclass(tp, str):  # text with a check of its own
        if isinstance(value, str):
            try:
                return tp(value)
            except ValueError as error:
                return fail(str(error))
    else:
        raise TypeError(f"{path}: settings cannot have the type {tp}")
    return fail(f"expected {_allowed(tp)}, got {_given(value)}{_hint(tp, value)}")


def _convert_union(tp: Any, node: Node, path: str, problems: list[Problem], default: Any) -> Any:
    """The first alternative that fits; if none does, the problems of the one that comes closest."""
    attempts = []
    for kind in sorted(get_args(tp), key=lambda kind: kind is not type(node.value)):
        found: list[Problem] = []
        value = _convert(kind, node, path, found, default)
        if not found:
            return value
        attempts.append(found)
    inside = [
        found
        for found in attempts
        if any(problem.path != path or not problem.message.startswith("expected ") for problem in found)
    ]
    if len(inside) == 1:  # the value has the right form for this one only
        problems.extend(inside[0])
    else:
        hint = _hint(tp, node.value)
        problems.append(Problem(node.place, path, f"expected {_allowed(tp)}, got {_given(node.value)}{hint}"))
    return FAILED


def _convert_variant(tp: type[Variants], node: Node, path: str, problems: list[Problem], default: Any) -> Any:
    kinds = tp.variants()
    node = _as_variant(node, tp)
    if not isinstance(node.value, dict):
        message = f"expected a mapping with the key name, or one of {_all_of(kinds)}, got {_given(node.value)}"
        problems.append(Problem(node.place, path, message))
        return FAILED
    name = node.value.get("name")
    if name is not None:
        cls = kinds.get(name.value) if isinstance(name.value, str) else None
        if cls is None:
            message = f"expected one of {_all_of(kinds)}, got {_given(name.value)}{_did_you_mean(name.value, kinds)}"
            problems.append(Problem(name.place, _join(path, "name"), message))
            return FAILED
        default = MISSING  # a name starts from the defaults of its kind
    elif isinstance(default, tp):
        cls = type(default)
    elif len(kinds) == 1:
        (cls,) = kinds.values()
    else:
        problems.append(Problem(node.place, _join(path, "name"), f"missing; one of {_all_of(kinds)}"))
        return FAILED
    rest = {key: child for key, child in node.value.items() if key != "name"}
    return _convert_dataclass(cls, Node(rest, node.place), path, problems, default)


def _convert_dataclass(cls: type, node: Node, path: str, problems: list[Problem], default: Any) -> Any:
    """An instance of `cls`; keys that are not given come from `default` if it is one."""
    if not isinstance(node.value, dict):
        problems.append(Problem(node.place, path, f"expected a mapping, got {_given(node.value)}"))
        return FAILED
    hints, known = _hints(cls), {f.name: f for f in fields(cls) if f.init}
    before = len(problems)
    for key in node.value:
        if key not in known:
            allowed = f"allowed: {', '.join(known)}" if known else "it has no settings"
            message = f"unknown key{_did_you_mean(key, known)}; {allowed}"
            problems.append(Problem(node.value[key].place, _join(path, key), message))
    values = {}
    for key, f in known.items():
        fallback = getattr(default, key) if isinstance(default, cls) else _default(f)
        if key in node.value:
            values[key] = _convert(hints[key], node.value[key], _join(path, key), problems, fallback)
        elif fallback is not MISSING:
            values[key] = fallback
        else:
            message = f"missing; expected {_allowed(hints[key])}"
            problems.append(Problem(node.place, _join(path, key), message))
    if len(problems) > before:
        return FAILED
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(Problem(node.place, path, str(error)))
        return FAILED


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        kind = {"name": value.name} if isinstance(value, Variants) else {}
        return kind | {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (Path, str)):
        return str(value)
    if value is None or type(value) in (bool, int, float):
        return value
    raise TypeError(f"settings cannot hold a {type(value).__name__}: {value!r}")


ABSENT: Any = object()


def _differ(a: Any, b: Any, path: str) -> Iterator[str]:
    if type(a) is not type(b) or not (is_dataclass(a) or isinstance(a, (dict, list, tuple))):
        if a != b:
            yield f"{path}: {_brief(a)} -> {_brief(b)}"
        return
    left, right = _parts(a), _parts(b)
    for key in dict.fromkeys([*left, *right]):
        yield from _differ(left.get(key, ABSENT), right.get(key, ABSENT), _join(path, key))


def _parts(value: Any) -> dict[Any, Any]:
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value) if f.init}
    return value if isinstance(value, dict) else dict(enumerate(value))


def _brief(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    text = value.name if isinstance(value, Variants) else _inline(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- Types and values in words


def _kinds(tp: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return get_args(tp) if get_origin(tp) in (Union, types.UnionType) else (tp,)


def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _default(f: Field) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _item_types(tp: Any, size: int) -> list[Any] | None:
    """The type of each item of a list or tuple; None if there can be no `size` of them."""
    args = get_args(tp)
    if get_origin(tp) is list or (len(args) == 2 and args[1] is ...):
        return [args[0]] * size
    return list(args) if len(args) == size else None


def _join(path: str, key: str | int) -> str:
    return f"{path}.{key}" if path else str(key)


WORDS = {
    bool: ("true or false", "bool"),
    int: ("an integer", "int"),
    float: ("a number", "float"),
    str: ("text", "text"),
    Path: ("a path", "path"),
    type(None): ("null", "null"),
    Any: ("anything", "any"),
}


def _known(tp: Any) -> Any:
    """The type under which WORDS has it: text with a check of its own is text."""
    return str if isinstance(tp, type) and issubclass(tp, str) else tp


def _allowed(tp: Any) -> str:
    """A type in words: what the reader may write."""
    tp = _known(tp)
    if tp in WORDS:
        return WORDS[tp][0]
    if get_origin(tp) in (Union, types.UnionType):
        return " or ".join(_allowed(kind) for kind in get_args(tp))
    origin, args = get_origin(tp), get_args(tp)
    if origin is Literal:
        return f"one of {_all_of(args)}"
    if origin in (list, tuple):
        if origin is tuple and args[-1] is not ...:
            return f"a list of {len(args)} ({', '.join(_short(arg) for arg in args)})"
        return f"a list of {_short(args[0])}"
    if origin is dict:
        return f"a mapping to {_short(args[1])}"
    if isinstance(tp, type) and issubclass(tp, Variants):
        return f"one of {_all_of(tp.variants())}"
    return "a mapping"


def _short(tp: Any) -> str:
    """A type as `describe` shows it."""
    tp = _known(tp)
    if tp in WORDS:
        return WORDS[tp][1]
    if get_origin(tp) in (Union, types.UnionType):
        return " | ".join(_short(kind) for kind in get_args(tp))
    origin, args = get_origin(tp), get_args(tp)
    if origin is Literal:
        return " | ".join(_inline(choice) for choice in args)
    if origin in (list, tuple):
        return f"[{', '.join('...' if arg is ... else _short(arg) for arg in args)}{', ...' * (origin is list)}]"
    if origin is dict:
        return f"{{key: {_short(args[1])}}}"
    return "one of these" if _is_choice(tp) else tp.__name__


def _given(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:57] + '...'!r}"
    return _inline(value) if value is None or isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"


def _hint(tp: Any, value: Any) -> str:
    """What to write instead, where that is clear."""
    kinds = _kinds(tp)
    if int in kinds and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if str in kinds and isinstance(value, (bool, int, float)):
        return "; put it in quotes"
    if isinstance(value, str) and (int in kinds or float in kinds) and re.fullmatch(NUMBER, value):
        return "; write it without quotes"
    if isinstance(value, str) and bool in kinds and value.lower() in ("yes", "on", "true", "no", "off", "false"):
        return f"; write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}"
    choices = [c for kind in kinds if get_origin(kind) is Literal for c in get_args(kind) if isinstance(c, str)]
    return _did_you_mean(value, choices)


def _did_you_mean(given: Any, known: Any) -> str:
    near = difflib.get_close_matches(given, list(known), n=1) if isinstance(given, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _all_of(names: Any) -> str:
    return ", ".join(_inline(name) for name in names)


def _any_of(names: Sequence[str]) -> str:
    return " or ".join(names)


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(_plain(value), Dumper=Dumper, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


# ---- Settings in a table

Row = tuple[str, str, str, str]


def describe(cls: type) -> str:
    """All settings of a dataclass: key, type, default, and the comment behind the field in its source."""
    rows = [("key", "type", "default", "meaning"), *_rows(cls, MISSING, "", set())]
    widths = [min(max(len(row[i]) for row in rows), limit) for i, limit in ((0, 34), (1, 30), (2, 30))]
    lines = []
    for row in rows:
        line = ""
        for cell, width in zip(row, widths):
            line += cell.ljust(width) + "  "
        lines.append((line + row[-1]).rstrip())
    return "\n".join(lines)


def _rows(cls: type, instance: Any, indent: str, shown: set[type]) -> Iterator[Row]:
    """A row per setting, and those inside of it; `shown` are the choices whose kinds stand above already."""
    hints, meanings = _hints(cls), comments(cls)
    for f in fields(cls):
        if f.init:
            default = getattr(instance, f.name) if isinstance(instance, cls) else _default(f)
            meaning = meanings[f.name] or _summary(type(default))
            yield f"{indent}{f.name}", *_cells(hints[f.name], default), meaning
            yield from _rows_below(hints[f.name], default, indent + "  ", shown)


def _cells(tp: Any, default: Any) -> tuple[str, str]:
    """Type and default."""
    if default is MISSING:
        return _short(tp), "(required)"
    if _is_choice(tp) and isinstance(default, Variants):
        return _short(tp), default.name
    if is_dataclass(default):
        return _short(tp), ""  # the rows below show it
    return _short(tp), _inline(default)


def _rows_below(tp: Any, default: Any, indent: str, shown: set[type]) -> Iterator[Row]:
    """The settings inside of a setting: each kind of a choice once, later only the one that is the default."""
    for kind in _kinds(tp):
        if get_origin(kind) in (list, tuple, dict):
            for inner in dict.fromkeys(get_args(kind)):
                yield from _rows_below(inner, MISSING, indent, shown)
        elif _is_choice(kind):
            known, kinds = kind in shown, kind.variants()
            shown.add(kind)
            for name, variant in kinds.items():
                if not known or isinstance(default, variant):
                    yield f"{indent}name: {name}", "", "", _summary(variant)
                    yield from _rows(variant, default, indent + "  ", shown)
            if known:
                yield f"{indent}name: ...", "", "", f"{', '.join(kinds)}: see above"
        elif is_dataclass(kind):
            yield from _rows(kind, default, indent, shown)  # type: ignore[arg-type]


def _summary(cls: type) -> str:
    """The first line of a dataclass's own docstring."""
    text = (vars(cls).get("__doc__") or "") if is_dataclass(cls) else ""
    return "" if text.startswith(f"{cls.__name__}(") else text.strip().split("\n")[0]  # made by @dataclass


def comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, its bases included; empty where there is no source."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # made at run time
            continue
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        body = ast.parse(source).body[0]
        for statement in body.body if isinstance(body, ast.ClassDef) else ():
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
                found[statement.target.id] = " ".join(by_line[line] for line in lines if line in by_line)
    return {f.name: found.get(f.name, "") for f in fields(cls)}
