"""All settings in a table, as `jvpgraph train --help` shows them."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin

from jvpgraph.trainer.settings.kinds import Variants, default_of, hints, in_words, inline, is_choice, kinds, settings_of

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
    meanings = comments(cls)
    for f in settings_of(cls):
        default, tp = getattr(instance, f.name) if isinstance(instance, cls) else default_of(f), hints(cls)[f.name]
        yield f"{indent}{f.name}", *_cells(tp, default), meanings[f.name] or _summary(type(default))
        yield from _rows_below(tp, default, indent + "  ", shown)


def _cells(tp: Any, default: Any) -> tuple[str, str]:
    """Type and default."""
    if default is MISSING:
        return in_words(tp), "(required)"
    if is_choice(tp) and isinstance(default, Variants):
        return in_words(tp), default.name
    if is_dataclass(default):
        return in_words(tp), ""  # the rows below show it
    return in_words(tp), inline(default)


def _rows_below(tp: Any, default: Any, indent: str, shown: set[type]) -> Iterator[Row]:
    """The settings inside of a setting: each kind of a choice once, later only the one that is the default."""
    for kind in kinds(tp):
        if get_origin(kind) in (list, tuple, dict):
            for inner in dict.fromkeys(get_args(kind)):
                yield from _rows_below(inner, MISSING, indent, shown)
        elif is_choice(kind):
            known, variants = kind in shown, kind.variants()
            shown.add(kind)
            for name, variant in variants.items():
                if not known or isinstance(default, variant):
                    yield f"{indent}name: {name}", "", "", _summary(variant)
                    yield from _rows(variant, default, indent + "  ", shown)
            if known:
                yield f"{indent}name: ...", "", "", f"{', '.join(variants)}: see above"
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
