"""Collectives of torch.distributed: the same collective on the tangent, where it is linear.

A maximum or product over ranks is not, and is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from jvpgraph.rules.registry import When, jvp, linear

__all__ = ["reduces_linearly"]


def reduces_linearly(x: Any, reduce_op: str, *_: Any) -> bool:
    return reduce_op.lower() in ("sum", "avg")


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


def _contiguous(x: Any, x_dot: Any) -> Any:
    if isinstance(x_dot, torch.Tensor):
        return x_dot.contiguous()
    pairs = zip(x, x_dot, strict=True)
    return [torch.zeros_like(a).contiguous() if a_dot is None else a_dot.contiguous() for a, a_dot in pairs]


c10d = "_c10d_functional"
linear_collective(
    *existing(c10d, "all_reduce", "all_reduce_coalesced"),
    *existing(c10d, "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"),
    when=reduces_linearly,
)
linear_collective(
    *existing(c10d, "all_gather_into_tensor", "all_gather_into_tensor_coalesced"),
    *existing(c10d, "all_to_all_single", "broadcast"),
    *existing("_dtensor", "shard_dim_alltoall"),
)
linear(*existing(c10d, "wait_tensor"))
