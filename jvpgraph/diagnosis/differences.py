"""Central differences in the place of tangents: how far off they are, by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jvpgraph.diagnosis.exact import widened
from jvpgraph.diagnosis.lockstep import Lockstep, Watcher
from jvpgraph.diagnosis.measure import apart, norm, on_host, relative
from jvpgraph.diagnosis.records import Difference
from jvpgraph.precision import HALF
from jvpgraph.rules.apply import has_tangent
from jvpgraph.tree import leaves, map_leaves

__all__ = ["STEPS", "differences"]

STEPS = tuple(2.0**-k for k in range(1, 14, 2))

Run = Callable[[Any, Any], Any]  # the model on (args, kwargs)


def differences(
    run: Run,
    args: Any,
    kwargs: Any,
    dots: Mapping[str, Tensor],
    wanted: Sequence[Tensor],
    steps: Sequence[float],
    time: float | None,
    dtype: torch.dtype,
) -> Iterator[Difference]:
    """The error of each step in the dtype of the model, and in float32 if the model computes in half precision.

    Args:
        run: the model, with the random numbers of the first run.
        dots: tangents by path.
        wanted: the tangents of floating outputs, in order.
        dtype: of the model.
    """

    def in_own(sign: float) -> list[Tensor]:
        moved = _moved(args, kwargs, dots, sign, torch.float64)
        return [x for _, x in leaves(run(*_rounded(moved, args, kwargs))) if has_tangent(x)]

    def in_float32(sign: float) -> list[Tensor]:
        moved = _moved(args, kwargs, dots, sign, torch.float32)
        given = _rounded(moved, args, kwargs)
        with Lockstep(torch.float32, Watcher()) as mode:
            with mode.asleep():
                for x, exact in zip(_active(given, dots), _active(moved, dots)):
                    mode.give(x, exact)
            out = run(*given)
            with mode.asleep():
                return [mode.exact_of(x).clone() for _, x in leaves(out) if has_tangent(x)]

    ways = {str(dtype).removeprefix("torch."): in_own} | ({"float32": in_float32} if dtype in HALF else {})
    for name, way in ways.items():
        for step in steps:
            ahead, behind = way(step), way(-step)
            slopes = [(a.to(w.dtype) - b.to(w.dtype)) / (2 * step) for a, b, w in zip(ahead, behind, wanted)]
            found = on_host({"error": norm(list(map(apart, slopes, wanted))), "norm": norm(list(wanted))})
            yield Difference(name, step, relative(found["error"], found["norm"], math.inf), time)


def _moved(args: Any, kwargs: Any, dots: Mapping[str, Tensor], step: float, dtype: torch.dtype) -> tuple[Any, Any]:
    """The inputs further along, in a type that does not round the step; always copies."""

    def move(path: str, leaf: Any) -> Any:
        wide = widened(leaf.dtype, torch.float32 if leaf.device.type == "mps" else dtype)
        return leaf.to(wide, copy=True) + step * dots[path].to(wide)

    return map_leaves(args, move, "args", dots), map_leaves(kwargs, move, "kwargs", dots)


def _rounded(moved: tuple[Any, Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """In the types of the inputs themselves, each in memory of its own."""

    def copied(tree: Any, like: Any, prefix: str) -> Any:
        dtypes = {path: leaf.dtype for path, leaf in leaves(like) if isinstance(leaf, Tensor)}

        def cast(path: str, leaf: Any) -> Any:
            inner = path.removeprefix(prefix).removeprefix(".")
            return leaf.to(dtypes[inner], copy=True) if has_tangent(leaf) else leaf

        return map_leaves(tree, cast, prefix)

    return copied(moved[0], args, "args"), copied(moved[1], kwargs, "kwargs")


def _active(tree: tuple[Any, Any], dots: Mapping[str, Tensor]) -> list[Tensor]:
    found = {f"args.{path}": leaf for path, leaf in leaves(tree[0])} | {
        f"kwargs.{path}": leaf for path, leaf in leaves(tree[1])
    }
    return [found[path] for path in dots]
