"""Packages that only some settings need."""

from __future__ import annotations

import importlib
from types import ModuleType


def optional(module: str, package: str, without: str, extra: str | None = None) -> ModuleType:
    """A module that need not be installed.

    Args:
        without: settings that do without it.
        extra: of this package, that brings it.

    Raises:
        ValueError: it is not there; the message says how to install it or do without.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = package if extra is None else f"'jvpgraph[{extra}]'"
        raise ValueError(
            f"the settings ask for {package}: pip install {install}, or set {without} ({error})"
        ) from error


def torchao(module: str, without: str) -> ModuleType:
    return optional(f"torchao.{module}", "torchao", without, "memory")
