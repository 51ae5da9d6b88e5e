"""Tensors that may be spread over processes: the part of this one, and the whole; and what most of them are."""

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
