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
from jvpgraph.precision import Policy, Precision

__all__ = ["check_finite"]


def check_finite(
    forward: Callable[..., Any] | None,
    inputs: tuple[Any, ...],
    dots: list[Tensor],
    precision: Precision | Policy = "model",
) -> None:
    """Raise unless all tangents are finite; the call is run once more, op by op, to name the culprit.

    Args:
        forward: None where one rank of several cannot run it again, for it may wait for the others.
        precision: of tangents, as in Config.

    Raises:
        NonFiniteTangent: names the first module and op whose tangent is not finite.
    """
    if all(bool(torch.isfinite(dot).all()) for dot in dots):
        return
    if forward is None:
        raise NonFiniteTangent(
            "a tangent is NaN or infinite on this rank; run the model in one process with these inputs to have the "
            "module named"
        )
    culprit = (
        _first_module(forward, inputs, precision) or "an op that is finite when run alone (the compiled kernel differs)"
    )
    raise NonFiniteTangent(f"a tangent is NaN or infinite, first in {culprit}")


def _first_module(forward: Callable[..., Any], inputs: tuple[Any, ...], precision: Precision | Policy) -> str | None:
    found: list[str] = []

    def observe(op: OpOverload, _out: Any, dot: Any) -> None:
        if not found and not _finite(dot):
            module = max(tracker.parents - {"Global"}, key=len, default="the function itself")
            found.append(f"{module}, op {op}")

    with ModuleTracker() as tracker, torch.no_grad(), OpByOp(observe, precision=precision):
        forward(*inputs)
    return found[0] if found else None


def _finite(dot: Any) -> bool:
    parts = dot if isinstance(dot, (tuple, list)) else [dot]
    return all(bool(torch.isfinite(d).all()) for d in parts if d is not None)
