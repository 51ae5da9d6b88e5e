"""Forward mode one op at a time, for any Python code.

Every storage that carries tangents has a shadow: a second storage of the same size that holds, at each place, the
tangent of what stands there. A view of a tensor is then a view of its shadow, an in-place write is a write into it,
and no tensor has to be wrapped: modules, hooks and autograd see what they always see. The ops arrive below autograd,
so the primal records its graph as usual while the tangent records none, and what the backward runs later is not
shadowed at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _pop_mode,
    _push_mode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from jvpgraph.errors import UnsupportedNode, UnsupportedOp
from jvpgraph.markers import MAKE_DUAL, TANGENT_OF
from jvpgraph.rules import TABLE, NoRule, tangents_of
from jvpgraph.rules.apply import any_has_tangent, argument_tangent, bind, functional_form, has_tangent

if dist.is_available():
    from torch.distributed.tensor import DTensor

__all__ = ["OpByOp", "is_dtensor", "is_to_come", "plain"]

Observer = Callable[[OpOverload, Any, Any], None]
SWEEP_EVERY = 256  # ops between two looks for shadows whose storage is gone


class OpByOp(TorchDispatchMode):
    """Within this context, ``make_dual`` and ``tangent_of`` work in eager code.

    Args:
        observer: called with (op, primal output, tangent output) after each active op.

    Raises (from inside):
        UnsupportedOp: an op on the tangent path has no rule.
    """

    supports_higher_order_operators = True

    def __init__(self, observer: Observer | None = None):
        super().__init__()
        self._shadows: dict[StorageWeakRef, torch.UntypedStorage] = {}
        self._stopped = WeakTensorKeyDictionary()  # what detach made and its views: in a storage with a shadow, without
        self._observer = observer
        self._ops = 0

    def __enter__(self) -> OpByOp:
        local = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
        self._keys_outside = local[0](), local[1]()
        return super().__enter__()

    def tangent(self, x: Tensor) -> Tensor | None:
        """A view of the tangent of ``x``; None where it is zero. Of a DTensor, a DTensor of that of its local part.

        Raises:
            UnsupportedOp: ``x`` wraps several tensors, and one of them has a tangent.
        """
        if is_traceable_wrapper_subclass(x):
            return self._wrapped_tangent(x)
        shadow = self._shadows.get(_key(x)) if has_tangent(x) and x not in self._stopped else None
        return _view_of(shadow, x) if shadow is not None else None

    def _wrapped_tangent(self, x: Any) -> Tensor | None:
        parts, how = _flatten(x)
        dots = {name: self.tangent(part) if isinstance(part, Tensor) else part for name, part in parts.items()}
        own = [dots[name] for name, part in parts.items() if isinstance(part, Tensor)]
        if all(dot is None for dot in own):
            return None
        if len(own) > 1:
            reason = f"a {type(x).__name__} with a tangent, which wraps several tensors, is handed to a region"
            raise UnsupportedOp([UnsupportedNode(type(x).__name__, "op by op", (), _user_line(), reason)])
        return own[0] if is_to_come(x) else type(x).__tensor_unflatten__(dots, how, x.size(), x.stride())

    def stop(self, x: Tensor) -> None:
        """Let ``x`` have no tangent, though its storage has a shadow."""
        self._stopped[plain(x)] = None

    def shadowed(self, x: Tensor) -> bool:
        """Whether something in the storage of ``x`` has a tangent."""
        return _key(plain(x)) in self._shadows

    def set_tangent(self, x: Tensor, x_dot: Tensor) -> None:
        """Give ``x`` a tangent of the same shape; a DTensor one that is distributed alike."""
        x, x_dot = plain(x), plain(x_dot)
        shadow = self._shadows.get(_key(x))
        if shadow is None:
            size = x.untyped_storage().nbytes()
            shadow = torch.zeros(size, dtype=torch.uint8, device=x.device).untyped_storage()
            self._shadows[_key(x)] = shadow
        for dim, (size, stride) in enumerate(zip(x.size(), x.stride())):
            if stride == 0 and size > 1:  # one element stands for all of them
                x, x_dot = x.narrow(dim, 0, 1), x_dot.narrow(dim, 0, 1)
        _view_of(shadow, x).copy_(x_dot)

    def sweep(self) -> None:
        """Drop the shadows whose storage is gone."""
        self._shadows = {key: shadow for key, shadow in self._shadows.items() if not key.expired()}

    def bytes(self) -> int:
        """What all shadows hold."""
        return sum(shadow.nbytes() for shadow in self._shadows.values())

    @contextmanager
    def left(self) -> Iterator[None]:
        """Without this mode, and without those that were entered inside it."""
        modes = [_pop_mode()]
        while modes[-1] is not self:
            modes.append(_pop_mode())
        try:
            yield
        finally:
            for mode in reversed(modes):
                _push_mode(mode)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # a DTensor, a collective's result to come: the ops on what is inside come next
        kwargs = kwargs or {}
        self._ops += 1
        if self._ops % SWEEP_EVERY == 0:
            self.sweep()
        if func is MAKE_DUAL:
            x = args[0].clone()
            self.set_tangent(x, args[1])
            return x
        if func is TANGENT_OF:
            dot = self.tangent(args[0])
            return dot.clone() if dot is not None else torch.zeros_like(args[0])
        if func is torch.ops.aten.detach.default and _key(args[0]) in self._shadows:
            out = func(*args, **kwargs)
            self._stopped[out] = None
            return out
        if not isinstance(func, OpOverload):
            if self._argument_tangent([*args, *kwargs.values()]) is not None:
                reason = "a higher-order op, which PyTorch compiles by itself: it has a tangent in graphs only"
                raise UnsupportedOp([UnsupportedNode(str(func), "op by op", (), _user_line(), reason)])
            return func(*args, **kwargs)
        return self._run(func, args, kwargs)

    def _run(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        arguments = bind(func, args, kwargs)
        writes = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        dots = {name: dot for name, v in arguments.items() if (dot := self._argument_tangent(v)) is not None}
        stopped = self._stopped_among(arguments) if self._stopped else []
        if any(arguments[name] is x for name in writes for x in stopped):
            reason = "it writes through a detached alias of a tensor with a tangent: detach().clone() first"
            raise UnsupportedOp([_unsupported(func, dots, reason)])
        if dots and func.namespace == "c10d":
            reason = "a collective that writes into its arguments: take torch.distributed._functional_collectives"
            raise UnsupportedOp([_unsupported(func, dots, reason)])
        if not dots or (not writes and func.is_view):
            out = func(*args, **kwargs)
            for x in tree_leaves(out) if stopped else ():
                if isinstance(x, Tensor) and any(_key(x) == _key(of) for of in stopped):
                    self._stopped[x] = None
            return out
        if func not in TABLE and func._can_decompose():  # composite ops come whole under inference mode
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if writes:
            return self._run_in_place(func, args, kwargs, arguments, writes, dots)
        if func is torch.ops.aten._local_scalar_dense.default:
            reason = "a tensor with a tangent becomes a Python number, which has none: keep it a tensor, or detach it"
            raise UnsupportedOp([_unsupported(func, dots, reason)])
        out = func(*args, **kwargs)
        self._record(func, out, self._rule(func, out, arguments, dots))
        return out

    def _run_in_place(
        self,
        func: OpOverload,
        args: Any,
        kwargs: Any,
        arguments: dict[str, Any],
        writes: list[str],
        dots: Any,
    ) -> Any:
        """The tangent of the functional form first, from the old values; then the write itself."""
        targets = [arguments[name] for name in writes]
        functional = functional_form(func)
        if len(targets) != 1 or functional is None:
            raise UnsupportedOp([_unsupported(func, dots, "it writes to its arguments and has no functional form")])
        inputs = {a.name for a in functional._schema.arguments}
        arguments = {name: v for name, v in arguments.items() if name in inputs}
        dots = {name: dot for name, dot in dots.items() if name in inputs}
        dot = None
        if dots and torch.Tag.nondeterministic_seeded not in functional.tags:
            before = functional(**arguments) if func is not torch.ops.aten.copy_.default else targets[0]
            dot = self._rule(functional, before, arguments, dots)
        out = func(*args, **kwargs)
        if dot is None:
            dot = torch.zeros_like(targets[0])
        if has_tangent(targets[0]):
            self._record(func, targets[0], dot)
        return out

    def _rule(self, func: OpOverload, out: Any, arguments: dict[str, Any], dots: dict[str, Any]) -> Any:
        if not any_has_tangent(out):
            return None
        # Derived rules are forward AD, and where a mode gets its ops all that is above it is switched off.
        outside = torch._C._ForceDispatchKeyGuard(*self._keys_outside)
        with outside, torch._C._DisableAutocast(), torch.inference_mode(False), torch.no_grad():
            try:
                return _arrived(func, tangents_of(func, out, arguments, dots)[0])
            except NoRule as reason:
                raise UnsupportedOp([_unsupported(func, dots, str(reason))]) from None

    def _record(self, func: OpOverload, out: Any, dot: Any) -> None:
        if dot is None:
            return
        if isinstance(out, Tensor):
            self.set_tangent(out, dot)
        else:
            for o, d in zip(out, dot):
                if d is not None:
                    self.set_tangent(o, d)
        if self._observer is not None:
            self._observer(func, out, dot)

    def _argument_tangent(self, value: Any) -> Any:
        return argument_tangent(value, lambda x: self.tangent(x) if isinstance(x, Tensor) else None)

    def _stopped_among(self, arguments: dict[str, Any]) -> list[Tensor]:
        tensors = [x for x in tree_leaves(list(arguments.values())) if isinstance(x, Tensor)]
        return [x for x in tensors if x in self._stopped]


def is_to_come(x: Any) -> bool:
    """Whether ``x`` stands for the result of a collective that may not have arrived."""
    return dist.is_available() and isinstance(x, dist._functional_collectives.AsyncCollectiveTensor)


def is_dtensor(x: Any) -> bool:
    return dist.is_available() and isinstance(x, DTensor)


def plain(x: Any) -> Tensor:
    """The tensor in a wrapper of one."""
    while is_traceable_wrapper_subclass(x):
        tensors = [part for part in _flatten(x)[0].values() if isinstance(part, Tensor)]
        if len(tensors) != 1:
            break
        x = tensors[0]
    return x


def _flatten(x: Any) -> tuple[dict[str, Any], Any]:
    """What a wrapper wraps, of which a DTensor's mesh is no tensor, and how."""
    names, how = x.__tensor_flatten__()
    return {name: getattr(x, name) for name in names}, how


def _key(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def _view_of(shadow: torch.UntypedStorage, x: Tensor) -> Tensor:
    view = torch.empty(0, dtype=x.dtype, device=x.device)
    view.set_(shadow, x.storage_offset(), x.size(), x.stride())
    view = view.conj() if x.is_conj() else view
    return torch._neg_view(view) if x.is_neg() else view


def _arrived(func: OpOverload, dot: Any) -> Any:
    """What a collective began to compute; a shadow would copy it before it is there."""
    if func.namespace not in ("_c10d_functional", "_c10d_functional_autograd"):
        return dot
    return tree_map_only(Tensor, torch.ops._c10d_functional.wait_tensor.default, dot)


def _unsupported(func: OpOverload, dots: dict[str, Any], reason: str) -> UnsupportedNode:
    return UnsupportedNode(str(func), "op by op", tuple(dots), _user_line(), reason)


def _user_line() -> str:
    """The innermost Python frame outside of torch and this package."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("torch.", "jvpgraph.")) and module not in ("torch", "jvpgraph"):
            code = frame.f_code
            return f"{code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} in {code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]
    return "(no source line)"
