"""Types of settings: which there are, what is inside of them, and how they are called."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from jvpgraph.trainer.settings.yaml_tree import dump

hints = cache(get_type_hints)


class Variants:
    """Base of settings that come in several kinds: the key `name` of the YAML mapping says which."""

    name: ClassVar[str]

    @classmethod
    def variants(cls) -> dict[str, type[Variants]]:
        """Every kind by its name, subclasses of subclasses included."""
        found = {cls.name: cls} if "name" in vars(cls) else {}
        for sub in cls.__subclasses__():
            found |= sub.variants()
        return found

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def choice(kind: Any) -> CoreSchema:
            given = [f.name for f in settings_of(kind)]
            return core_schema.no_info_after_validator_function(
                lambda made: kind(**{name: getattr(made, name) for name in given}), handler.generate_schema(_form(kind))
            )

        choices = {name: choice(kind) for name, kind in cls.variants().items()}
        return core_schema.tagged_union_schema(choices, discriminator="name")


@cache
def _form(kind: Any) -> type:
    """What YAML says of a kind, as a dataclass: its settings and its name."""
    own = [
        (f.name, hints(kind)[f.name], field(default=f.default, default_factory=f.default_factory))  # type: ignore[call-overload]
        for f in settings_of(kind)
    ]
    return make_dataclass(kind.__name__, [("name", Literal.__getitem__(kind.name)), *own], kw_only=True)


# ---- What is inside


def settings_of(cls: Any) -> list[Field]:
    """The fields that can be given."""
    return [f for f in fields(cls) if f.init]


def default_of(f: Field) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def kinds(tp: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return get_args(tp) if get_origin(tp) in (Union, types.UnionType) else (tp,)


def variants_of(tp: Any) -> dict[str, type[Variants]]:
    """The kinds by name of a type that is, or may be, one of several."""
    found = [kind.variants() for kind in kinds(tp) if isinstance(kind, type) and issubclass(kind, Variants)]
    return {name: kind for several in found for name, kind in several.items()}


def is_choice(tp: Any) -> bool:
    """Whether there is more than one kind."""
    return isinstance(tp, type) and issubclass(tp, Variants) and list(tp.variants().values()) != [tp]


def named(data: Any, tp: Any) -> Any:
    """`objective: scm` spelled out."""
    return {"name": data} if isinstance(data, str) and variants_of(tp) else data


def dataclass_of(data: Any, tp: Any) -> type | None:
    """The dataclass that a mapping stands for, as far as its type says."""
    variants = variants_of(tp)
    name = data.get("name") if variants and isinstance(data, dict) else None
    if isinstance(name, str) and name in variants:
        return variants[name]
    return next((k for k in kinds(tp) if is_dataclass(k) and not issubclass(k, Variants)), None)  # type: ignore[arg-type, return-value]


def type_of(key: str | int, data: Any, tp: Any) -> Any:
    """The type of what is under a key of a mapping, or at an index of a list."""
    cls = dataclass_of(data, tp)
    if cls is not None:
        return hints(cls).get(str(key), Any)
    for origin, args in ((get_origin(kind), get_args(kind)) for kind in kinds(tp)):
        if origin is dict:
            return args[1]
        if origin in (list, tuple):
            each = args[:1] if args[-1] is ... else args
            return each[key] if isinstance(key, int) and key < len(each) else each[0]
    return Any


def plain(value: Any) -> Any:
    """Settings as plain YAML types. Raises TypeError for what YAML does not know."""
    if is_dataclass(value) and not isinstance(value, type):
        name = {"name": value.name} if isinstance(value, Variants) else {}
        return name | {f.name: plain(getattr(value, f.name)) for f in settings_of(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (Path, str)):
        return str(value)
    if value is None or type(value) in (bool, int, float):
        return value
    raise TypeError(f"settings cannot hold a {type(value).__name__}: {value!r}")


# ---- In words

WORDS = {bool: "bool", int: "int", float: "float", str: "text", Path: "path", type(None): "null", Any: "any"}


def in_words(tp: Any) -> str:
    """A type as `describe` and the errors show it."""
    origin, args = get_origin(tp), get_args(tp)
    if tp in WORDS:
        return WORDS[tp]
    if len(kinds(tp)) > 1:
        return " | ".join(in_words(kind) for kind in args)
    if origin is Literal:
        return " | ".join(inline(choice) for choice in args)
    if origin in (list, tuple):
        return f"[{', '.join('...' if arg is ... else in_words(arg) for arg in args)}{', ...' * (origin is list)}]"
    if origin is dict:
        return f"{{key: {in_words(args[1])}}}"
    return "one of these" if is_choice(tp) else tp.__name__


def given(value: Any) -> str:
    """What stands in the place of a setting, at most 60 characters of it."""
    text = repr(value) if isinstance(value, str) or not _is_plain(value) else inline(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, list, dict))


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def inline(value: Any) -> str:
    """A value as YAML on one line."""
    return dump(plain(value), one_line=True)
