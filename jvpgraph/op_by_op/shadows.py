"""Where tangents are kept: in shadows of storages, and what is known of storages without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from jvpgraph.errors import UnsupportedNode, UnsupportedOp
from jvpgraph.escapes import Newborn
from jvpgraph.op_by_op.modules import module_path
from jvpgraph.op_by_op.refusals import refusal
from jvpgraph.precision import Policy, Precision, has_half, precision_at, widened
from jvpgraph.rules.apply import argument_tangent, has_tangent
from jvpgraph.storages import flatten, is_to_come, key_of, plain, view_of

__all__ = ["CONSTANTS", "Shadows"]

Again = Callable[[Any, Any], tuple[Any, Any]]  # (args, tangents of those) -> outputs and their tangents

# Storages that were there before the call in which they were met first: parameters, buffers, constants.
CONSTANTS: dict[StorageWeakRef, None] = {}


class Shadows:
    """The tangents of one call, by the storage of what has them."""

    def __init__(self, precision: Precision | Policy) -> None:
        self.precision = precision
        self.precisions: Counter[str] = Counter()  # as in a Report
        self._shadows: dict[StorageWeakRef, torch.UntypedStorage] = {}
        self._dtypes: dict[StorageWeakRef, torch.dtype] = {}  # of what has a shadow
        self._seen: dict[StorageWeakRef, None] = {}  # made by ops of this call
        self._unwritten: dict[StorageWeakRef, str] = {}  # of those, what is "empty" or "zero" as far as ops can tell
        self._handed_out: dict[StorageWeakRef, str] = {}  # memory that others know of, and by what
        self._stopped = WeakTensorKeyDictionary()  # what detach made and its views: in a storage with a shadow, without
        self._unknown: dict[StorageWeakRef, UnsupportedNode] = {}  # what no rule has a tangent of, and its op
        self._newborn = Newborn()

    def precision_of(self, op: OpOverload, out: Any) -> Precision:
        """Of the tangent of an op that has just run."""
        precision = precision_at(self.precision, module_path, op)
        if has_half(out):
            self.precisions[precision] += 1
        return precision

    def tangent(self, x: Tensor) -> Tensor | None:
        """A view of the tangent of ``x``; None where it is zero. Of a DTensor, a DTensor of that of its local part.

        Raises:
            UnsupportedOp: ``x`` wraps several tensors, and one of them has a tangent; or nobody knows where its values
                come from, or no rule has its tangent.
        """
        if is_traceable_wrapper_subclass(x):
            return self._wrapped_tangent(x)
        key = key_of(x)
        if key is None:
            return None
        if key in self._unknown:
            raise UnsupportedOp([self._unknown[key]])
        if not has_tangent(x):
            return None
        shadow = self._shadows.get(key)
        if shadow is not None:
            if x in self._stopped:
                return None
            if x.dtype.to_real() != self._dtypes[key]:
                raise refusal(
                    "view", f"its bits are read as {x.dtype}, but are those of {self._dtypes[key]} with a tangent"
                )
            return view_of(shadow, x, widened(x.dtype, self.precision))
        if key not in self._seen and key not in CONSTANTS:
            self._vouch_for(x, key)
        return None

    def _wrapped_tangent(self, x: Any) -> Tensor | None:
        parts, how = flatten(x)
        dots = {name: self.tangent(part) if isinstance(part, Tensor) else part for name, part in parts.items()}
        own = [dots[name] for name, part in parts.items() if isinstance(part, Tensor)]
        if all(dot is None for dot in own):
            return None
        if len(own) > 1:
            raise refusal(type(x).__name__, "it wraps several tensors, and one of them has a tangent")
        return own[0] if is_to_come(x) else type(x).__tensor_unflatten__(dots, how, x.size(), x.stride())

    def _vouch_for(self, x: Tensor, key: StorageWeakRef) -> None:
        """No op made it. Then it has to be older than the call."""
        if x in self._newborn:
            reason = (
                "no op was seen to make it (C++, another thread, a compiled kernel), so it may depend on something "
                "with a tangent: make it before the call, or wrap what makes it in an op (torch.library) and give that "
                "a rule"
            )
            raise refusal(f"a tensor of shape {tuple(x.shape)}", reason)
        CONSTANTS[key] = None

    def stop(self, x: Tensor) -> None:
        """Let ``x`` have no tangent, though its storage has a shadow."""
        self._stopped[plain(x)] = None

    def shadowed(self, x: Tensor) -> bool:
        """Whether something in the storage of ``x`` has a tangent."""
        return key_of(plain(x)) in self._shadows

    def set_tangent(self, x: Tensor, x_dot: Tensor) -> None:
        """Give ``x`` a tangent of the same shape; a DTensor one that is distributed alike."""
        x, x_dot = plain(x), plain(x_dot)
        key = key_of(x)
        if key is None:
            raise refusal(f"a tensor of layout {x.layout}", "only dense tensors can have a tangent")
        shadow = self._shadows.get(key)
        if shadow is None:
            if key in self._handed_out:
                name = self._handed_out[key]
                raise refusal(
                    name, "something with a tangent is written to memory that was handed out earlier: clone it first"
                )
            size = x.untyped_storage().nbytes() // x.itemsize * widened(x.dtype, self.precision).itemsize
            shadow = torch.zeros(size, dtype=torch.uint8, device=x.device).untyped_storage()
            self._shadows[key], self._dtypes[key] = shadow, x.dtype.to_real()
        elif x.dtype.to_real() != self._dtypes[key]:
            raise refusal("a write", f"it writes {x.dtype} into memory that holds {self._dtypes[key]} with a tangent")
        for dim, (size, stride) in enumerate(zip(x.size(), x.stride())):
            if stride == 0 and size > 1:  # one element stands for all of them
                x, x_dot = x.narrow(dim, 0, 1), x_dot.narrow(dim, 0, 1)
        view_of(shadow, x, widened(x.dtype, self.precision)).copy_(x_dot)

    def adopt(self, out: Tensor, out_dot: Tensor | None) -> None:
        """Take in what was made while the mode was asleep."""
        raise NotImplementedError

    def adopt_all(self, given: Sequence[tuple[Tensor, Tensor | None]], args: Any, again: Again | None) -> None:
        """The same of what an autograd.Function gave that has a jvp of its own."""
        for out, out_dot in given:
            self.adopt(out, out_dot)

    def set_unknown(self, x: Tensor, node: UnsupportedNode) -> None:
        """Refuse every use of ``x``, as ``node`` says."""
        key = key_of(x)
        if key is None:
            raise UnsupportedOp([node])
        self._unknown[key] = node

    def sweep(self) -> None:
        """Drop what is known of storages that are gone."""
        self._shadows = {key: shadow for key, shadow in self._shadows.items() if not key.expired()}
        self._dtypes = {key: self._dtypes[key] for key in self._shadows}
        self._seen = {key: None for key in self._seen if not key.expired()}
        self._unknown = {key: node for key, node in self._unknown.items() if not key.expired()}
        self._unwritten = {key: value for key, value in self._unwritten.items() if not key.expired()}

    def bytes(self) -> int:
        """What all shadows hold."""
        return sum(shadow.nbytes() for shadow in self._shadows.values())

    def _argument_tangent(self, value: Any) -> Any:
        return argument_tangent(value, lambda x: self.tangent(x) if isinstance(x, Tensor) else None)

    def _stopped_among(self, arguments: dict[str, Any]) -> list[Tensor]:
        tensors = [x for x in tree_leaves(list(arguments.values())) if isinstance(x, Tensor)]
        return [x for x in tensors if x in self._stopped]
