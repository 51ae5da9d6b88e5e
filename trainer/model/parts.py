"""Tensors that may be spread over processes: the part of this one, and the whole; what most of them are; weights in
bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, its parts on the CPU or on the device: a collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    here: Any = tensor.to(tensor.device_mesh.device_type)
    whole: Tensor = here.full_tensor()
    return whole


def commonest_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """That of most of their numbers; None: there are none."""
    sizes = Counter[torch.dtype]()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.numel()
    return max(sizes, key=sizes.__getitem__, default=None)


def in_bytes(tensor: Tensor) -> bool:
    """Whether a weight is one of torchao's, with a scale for each row."""
    return hasattr(tensor, "qdata")


def parts_of(tensor: Any) -> list[Tensor]:
    """The tensor itself, and those that a weight in bytes is made of."""
    inside = tensor.__tensor_flatten__()[0] if in_bytes(tensor) else ()
    return [tensor, *(getattr(tensor, name) for name in inside)]


def widened(tensor: Tensor) -> Tensor:
    """The values of a weight in bytes, in the dtype that products with it have; any other tensor itself."""
    if not in_bytes(tensor):
        return tensor
    return tensor.dequantize()  # type: ignore[no-any-return]
