"""Collectives of torch.distributed: the same collective on the tangent, where it is linear.

A maximum or product over ranks is not, and is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from jvpgraph.rules.registry import linear

__all__ = ["reduces_linearly"]


def reduces_linearly(x: Any, reduce_op: str, *_: Any) -> bool:
    return reduce_op.lower() in ("sum", "avg")


def existing(namespace: str, *names: str) -> list[OpOverload]:
    """The default overloads; none of them in a build of PyTorch without distributed."""
    packets = (getattr(getattr(torch.ops, namespace), name, None) for name in names)
    return [packet.default for packet in packets if packet is not None]


linear(*existing("_c10d_functional", "all_reduce", "all_reduce_coalesced"), when=reduces_linearly)
linear(
    *existing("_c10d_functional", "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"),
    when=reduces_linearly,
)
linear(*existing("_c10d_functional", "all_gather_into_tensor", "all_gather_into_tensor_coalesced"))
linear(*existing("_c10d_functional", "all_to_all_single", "broadcast", "wait_tensor"))
linear(*existing("_dtensor", "shard_dim_alltoall"))
