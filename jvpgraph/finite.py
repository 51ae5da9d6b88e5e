"""Finding the first module that makes a tangent NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.module_tracker import ModuleTracker

from jvpgraph.errors import NonFiniteTangent
from jvpgraph.op_by_op import OpByOp

__all__ = ["check_finite", "first_module"]


def check_finite(forward: Callable[..., Any], inputs: tuple[Any, ...], dots: list[Tensor]) -> None:
    """Raise unless all tangents are finite; the call is run once more, op by op, to name the culprit.

    Raises:
        NonFiniteTangent: names the first module and op whose tangent is not finite.
    """
    if all(bool(torch.isfinite(dot).all()) for dot in dots):
        return
    culprit: list[str] = []
    with first_module(lambda op, out, dot: not _finite(dot), culprit) as mode, torch.no_grad(), mode:
        forward(*inputs)
    where = culprit[0] if culprit else "an op that is finite when run alone (the compiled kernel differs)"
    raise NonFiniteTangent(f"a tangent is NaN or infinite, first in {where}")


def first_module(matches: Callable[[OpOverload, Any, Any], bool], found: list[str]) -> _Tracked:
    """A context whose ``OpByOp`` notes in ``found`` the module and op of the first active op that ``matches``."""
    return _Tracked(matches, found)


class _Tracked:
    def __init__(self, matches: Callable[[OpOverload, Any, Any], bool], found: list[str]):
        self._matches, self._found, self._tracker = matches, found, ModuleTracker()

    def __enter__(self) -> OpByOp:
        self._tracker.__enter__()
        return OpByOp(self._observe)

    def __exit__(self, *error: Any) -> None:
        self._tracker.__exit__(*error)

    def _observe(self, op: OpOverload, out: Any, dot: Any) -> None:
        if not self._found and self._matches(op, out, dot):
            module = max(self._tracker.parents - {"Global"}, key=len, default="the function itself")
            self._found.append(f"{module}, op {op}")


def _finite(dot: Any) -> bool:
    parts = dot if isinstance(dot, (tuple, list)) else [dot]
    return all(bool(torch.isfinite(d).all()) for d in parts if d is not None)
