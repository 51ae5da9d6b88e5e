"""Checks of numbers in settings, for `__post_init__`: each raises ValueError that names the field and its range."""

from __future__ import annotations

import math
from typing import Any


def positive(settings: Any, *names: str) -> None:
    """Those of the fields that are not None are above 0."""
    _check(settings, names, lambda value: value > 0, "above 0")


def not_negative(settings: Any, *names: str) -> None:
    """Those of the fields that are not None are 0 or above."""
    _check(settings, names, lambda value: value >= 0, "0 or above")


def finite(settings: Any, *names: str) -> None:
    """Those of the fields that are not None are numbers without an infinity among them."""
    _check(settings, names, lambda value: True, "finite")


def _check(settings: Any, names: tuple[str, ...], fits: Any, words: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (fits(value) and math.isfinite(value)):
            raise ValueError(f"{name} is {value} and must be {words}")
