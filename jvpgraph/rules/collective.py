"""Collectives of torch.distributed: the same collective on the tangent, where it is linear.

A maximum or minimum over ranks has the tangent of the rank that attains it, or the mean over those that tie, as
torch.amax does within a tensor. Products and bitwise reductions are refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload

from jvpgraph.rules.registry import When, jvp, linear

if dist.is_available():
    import torch.distributed._functional_collectives  # defines some of the ops

__all__ = ["reduces_linearly"]


def reduces_linearly(x: Any, reduce_op: str, *_: Any) -> bool | str:
    return reduce_op.lower() in ("sum", "avg") or f"it reduces by {reduce_op}, and only sum and avg are linear"


def linearly_or_selects(x: Any, reduce_op: str, *_: Any) -> bool | str:
    known = reduce_op.lower() in ("sum", "avg", "max", "min")
    return known or f"it reduces by {reduce_op}; sum, avg, max and min have tangents: gather, then reduce locally"


def existing(namespace: str, *names: str) -> list[OpOverload]:
    """The default overloads; none of them in a build of PyTorch without distributed."""
    packets = (getattr(getattr(torch.ops, namespace), name, None) for name in names)
    return [packet.default for packet in packets if packet is not None]


def linear_collective(*ops: OpOverload, when: When | None = None) -> None:
    """The same collective on the tangent, made contiguous: several insist on it, and their primals are."""

    def register(op: OpOverload) -> None:
        jvp(op, when=when)(lambda out, x, *how, x_dot: op(_contiguous(x, x_dot), *how))

    for op in ops:
        register(op)


def selecting_collective(op: OpOverload) -> None:
    """An all-reduce: on the tangent as it is, or on what the rank contributes that attains the extremum."""

    @jvp(op, when=linearly_or_selects)
    def all_reduce(out, x, reduce_op, group, *, x_dot):
        x_dot = _contiguous(x, x_dot)
        if reduces_linearly(x, reduce_op) is True:
            return op(x_dot, reduce_op, group)
        if isinstance(x, Tensor):
            return _mean(op(_share(out, x, x_dot), "sum", group))
        return [_mean(sums) for sums in op([_share(*of) for of in zip(out, x, x_dot)], "sum", group)]


def _share(out: Tensor, x: Tensor, x_dot: Tensor) -> Tensor:
    """[2, ...]: 1 where this rank attains the extremum, and its tangent there; 0 elsewhere."""
    attained = x == _wait(out)
    return torch.stack([attained.to(x.dtype), torch.where(attained, x_dot, 0)])


def _mean(sums: Tensor) -> Tensor:
    attaining, total = _wait(sums).unbind()
    return total / attaining  # 0 / 0, a NaN, where the extremum is one


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor.default(x)


def _contiguous(x: Any, x_dot: Any) -> Any:
    if isinstance(x_dot, torch.Tensor):
        return x_dot.contiguous()
    pairs = zip(x, x_dot, strict=True)
    return [torch.zeros_like(a).contiguous() if a_dot is None else a_dot.contiguous() for a, a_dot in pairs]


c10d, with_backward = "_c10d_functional", "_c10d_functional_autograd"
for _op in existing(c10d, "all_reduce", "all_reduce_coalesced"):
    selecting_collective(_op)
linear_collective(
    *existing(c10d, "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"),
    *existing(with_backward, "reduce_scatter_tensor"),
    when=reduces_linearly,
)
linear_collective(
    *existing(c10d, "all_gather_into_tensor", "all_gather_into_tensor_coalesced"),
    *existing(c10d, "all_to_all_single", "broadcast"),
    *existing(with_backward, "all_gather_into_tensor", "all_to_all_single"),
    *existing("_dtensor", "shard_dim_alltoall"),
)
linear(*existing(c10d, "wait_tensor", "_wrap_tensor_autograd"))
