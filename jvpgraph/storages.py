"""Tensors by what they consist of: plain ones inside wrappers, and the storages of those."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

if dist.is_available():
    from torch.distributed.tensor import DTensor

__all__ = [
    "all_bytes",
    "copy_of_memory",
    "flatten",
    "is_dtensor",
    "is_to_come",
    "is_wrapper",
    "key_of",
    "parts_of",
    "plain",
    "tensors_in",
    "view_of",
]


def is_to_come(x: Any) -> bool:
    """Whether ``x`` stands for the result of a collective that may not have arrived."""
    return dist.is_available() and isinstance(x, dist._functional_collectives.AsyncCollectiveTensor)


def is_dtensor(x: Any) -> bool:
    return dist.is_available() and isinstance(x, DTensor)


def plain(x: Any) -> Tensor:
    """The tensor in a wrapper of one."""
    while is_traceable_wrapper_subclass(x):
        tensors = [part for part in flatten(x)[0].values() if isinstance(part, Tensor)]
        if len(tensors) != 1:
            break
        x = tensors[0]
    return x


def flatten(x: Any) -> tuple[dict[str, Any], Any]:
    """What a wrapper wraps, of which a DTensor's mesh is no tensor, and how."""
    names, how = x.__tensor_flatten__()
    return {name: getattr(x, name) for name in names}, how


def _overlaps(x: Tensor) -> bool:
    """Whether elements share memory, as in what expand made: the tangents given for them need not be the same."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.size()) if size != 1):
        if stride < reach:
            return True
        reach += (size - 1) * stride
    return False


def copy_of_memory(x: Tensor) -> Tensor:
    """A copy of ``x`` that lies in memory as x does, with what else is there; where x is a small part, only that."""
    if is_wrapper(x) or x.is_conj() or x.is_neg() or x.layout is not torch.strided:
        return x.clone()
    items = x.untyped_storage().nbytes() // x.itemsize
    if items > 2 * x.numel() or _overlaps(x):
        return x.clone()
    whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage(), 0, (items,), (1,))
    return whole.clone().as_strided(x.size(), x.stride(), x.storage_offset())


def key_of(x: Tensor) -> StorageWeakRef | None:
    """The storage; None where there is no such thing, as in a sparse tensor."""
    if x.layout is not torch.strided or x.is_nested or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return None
    return StorageWeakRef(x.untyped_storage())


def is_wrapper(x: Tensor) -> bool:
    """Whether its class says what ops do."""
    own = type(x).__torch_dispatch__
    return own is not torch._C._disabled_torch_dispatch_impl and type(x) is not Tensor and not isinstance(x, FakeTensor)


def parts_of(x: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of, whatever wraps them."""
    if not is_wrapper(x):
        return [x]
    inside = flatten(x)[0] if is_traceable_wrapper_subclass(x) else vars(x)
    return [
        part for y in tree_leaves(list(inside.values())) if isinstance(y, Tensor) and y is not x for part in parts_of(y)
    ]


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return []


def all_bytes(x: Tensor) -> Tensor:
    """Something of the shape of all of the storage."""
    return torch.empty(x.untyped_storage().nbytes(), dtype=torch.uint8, device=x.device)


def view_of(shadow: torch.UntypedStorage, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    view = torch.empty(0, dtype=dtype or x.dtype, device=x.device)
    view.set_(shadow, x.storage_offset(), x.size(), x.stride())
    view = view.conj() if x.is_conj() else view
    return torch._neg_view(view) if x.is_neg() else view
