"""What a dispatch mode cannot see: values that leave torch's ops, and tensors that come from outside of them.

Values leave by torch functions (``numpy``, ``tolist``, ``data_ptr``, pickling), which a function mode sees. Tensors
that no op made are known by the age of their objects: one that was there before the call is a constant of the model.
"""

from __future__ import annotations

import dis
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["HIGHER_ORDER", "Calls", "Graphs", "Newborn", "Watcher", "frames"]

Graphs = Callable[[Any, Any, Any, Any], Any]

LOOK_THROUGH = ("torch._tensor", "torch.storage", "torch.overrides", "torch.utils._contextlib")
IDENTITY = ("_cdata", "nbytes", "size", "_weak_ref", "device", "resizable", "is_shared")
LEAKY = ("torch.serialization", "torch.multiprocessing", "torch.package")  # of torch, but what they read goes elsewhere


def _cond(pred: Any, true_fn: Any, false_fn: Any, operands: Any) -> Any:
    return (true_fn if pred else false_fn)(*operands)


def _while_loop(cond_fn: Any, body_fn: Any, carried: Any, additional: Any) -> Any:
    while cond_fn(*carried, *additional):
        carried = body_fn(*carried, *additional)
    return tuple(carried)


def _map(fn: Any, xs: Any, additional: Any) -> Any:
    rounds = [fn(*row, *additional) for row in zip(*(x.unbind() for x in xs), strict=True)]
    return tree_map(lambda *outs: torch.stack(outs), *rounds)


def _scan(combine: Any, init: Any, xs: Any, additional: Any) -> Any:
    carried, rounds = tuple(init), []
    for row in zip(*(x.unbind() for x in xs), strict=True):
        outs = tuple(combine(*carried, *row, *additional))
        carried = outs[: len(init)]
        rounds.append(outs[len(init) :])
    return (*carried, *(torch.stack(outs) for outs in zip(*rounds, strict=True)))


HIGHER_ORDER: dict[str, Callable[..., Any]] = {
    "cond": _cond,
    "while_loop": _while_loop,
    "map_impl": _map,
    "scan": _scan,
}


class Watcher(Protocol):
    """What the function mode reports to. Each method may refuse."""

    def left(self) -> Any: ...

    def stopping(self) -> Any: ...

    def stop(self, x: Tensor) -> None: ...

    def handed_out(self, x: Tensor, name: str) -> None: ...

    def address_taken(self, x: Tensor, name: str) -> None: ...

    def made_a_number(self, x: Tensor, name: str) -> None: ...

    def became_a_leaf(self, x: Tensor) -> None: ...

    def became_data(self, x: Tensor, of: Tensor) -> None: ...


class Newborn:
    """Which tensor objects were made while this is entered.

    Every object begins in the youngest generation of the garbage collector. That is emptied at the start, and what a
    collection is about to move on is noted.
    """

    def __init__(self) -> None:
        self._noted: dict[int, weakref.ref[Tensor]] = {}

    def __enter__(self) -> Newborn:
        gc.collect(0)
        gc.callbacks.append(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._note)
        self._noted.clear()

    def __contains__(self, x: Tensor) -> bool:
        noted = self._noted.get(id(x))
        return (noted is not None and noted() is x) or id(x) in map(id, gc.get_objects(0))

    def _note(self, phase: str, _info: dict[str, Any]) -> None:
        if phase == "start":
            young = [x for x in gc.get_objects(0) if issubclass(type(x), Tensor)]
            self._noted = {i: ref for i, ref in self._noted.items() if ref() is not None}
            self._noted.update((id(x), weakref.ref(x)) for x in young)


class Calls(TorchFunctionMode):
    """Reports to a :class:`Watcher` the torch functions by which values leave."""

    def __init__(self, watcher: Watcher, graphs: Graphs | None = None):
        super().__init__()
        self._watcher, self._graphs = watcher, graphs
        self.blind = 0  # Python functions of torch's that run now: what they call is not told

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handle = _HANDLERS.get(func)
        if handle is not None:
            return handle(self._watcher, func, args, kwargs)
        if isinstance(func, HigherOrderOperator) and self._graphs is not None:
            found = self._graphs(self._watcher, func, args, kwargs)
            if found is not NotImplemented:
                return found
        if isinstance(func, HigherOrderOperator) and str(func) in HIGHER_ORDER:
            with self:  # above autograd: what the branches hold gets gradients too
                return HIGHER_ORDER[str(func)](*args, **kwargs)
        if not isinstance(func, FunctionType):
            return func(*args, **kwargs)
        self.blind += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.blind -= 1

    @contextmanager
    def left(self) -> Iterator[None]:
        """Without this mode; those that were entered inside it stay."""
        stack = _get_current_function_mode_stack()
        if self not in stack:  # it is running
            yield
            return
        inner = stack[stack.index(self) + 1 :]
        self._swap([self, *inner], inner)
        try:
            yield
        finally:
            self._swap(inner, [self, *inner])

    @staticmethod
    def _swap(present: list[Any], wanted: list[Any]) -> None:
        for _ in present:
            _pop_mode()
        for mode in wanted:
            _push_mode(mode)


def frames() -> Iterator[Any]:
    """The Python frames that led here, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def _caller() -> str:
    """The module of the innermost frame that means what it calls."""
    modules = (frame.f_globals.get("__name__", "") for frame in frames())
    return next((module for module in modules if not module.startswith((*LOOK_THROUGH, __name__))), "")


def _asked_by_torch() -> bool:
    """Whether torch looks at the memory for its own bookkeeping."""
    module = _caller()
    return module.startswith(("torch.", "jvpgraph.")) and not module.startswith(LEAKY)


def _name(func: Any) -> str:
    """``numpy``, or for an attribute what it is called."""
    owner = getattr(func, "__self__", None)
    name: str = (
        getattr(owner, "__name__", None) or getattr(getattr(owner, "fget", None), "__name__", None) or func.__name__
    )
    return name


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]


def _memory(watcher: Watcher, func: Any, args: Any, kwargs: Any) -> Any:
    for x in _tensors(args, kwargs):
        watcher.handed_out(x, _name(func))
    return func(*args, **kwargs)


def _identifies() -> bool:
    """Whether the caller only goes on to ask a storage which one it is, or how large."""
    for frame in frames():
        if not frame.f_globals.get("__name__", "").startswith((*LOOK_THROUGH, __name__)):
            following = (
                i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti and i.opname != "CACHE"
            )
            asked = next((i for i in following if not i.opname.startswith(("PRECALL", "CALL"))), None)
            return asked is not None and asked.opname in ("LOAD_ATTR", "LOAD_METHOD") and asked.argval in IDENTITY
    return False


def _address(watcher: Watcher, func: Any, args: Any, kwargs: Any) -> Any:
    if not (_asked_by_torch() or (func is Tensor.untyped_storage and _identifies())):
        watcher.address_taken(args[0], _name(func))
    return func(*args, **kwargs)


def _number(watcher: Watcher, func: Any, args: Any, kwargs: Any) -> Any:
    watcher.made_a_number(args[0], _name(func))
    return func(*args, **kwargs)


def _data(watcher: Watcher, func: Any, args: Any, kwargs: Any) -> Any:
    """A tensor in a list becomes a number; by itself it is copied by ops, and detached by some of these functions."""
    for x in _tensors([a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor)], {}):
        watcher.made_a_number(x, _name(func))
    return func(*args, **kwargs) if func in (torch.as_tensor, torch.asarray) else _detach(watcher, func, args, kwargs)


def _detach(watcher: Watcher, func: Any, args: Any, kwargs: Any) -> Any:
    if _caller().startswith("torch.masked"):  # which detaches whatever leaves a MaskedTensor
        return func(*args, **kwargs)
    with watcher.stopping():
        return func(*args, **kwargs)


def _set_data(watcher: Watcher, func: Any, args: Any, kwargs: Any) -> Any:
    watcher.became_data(args[1], args[0])
    return func(*args, **kwargs)


def _detach_in_place(watcher: Watcher, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    watcher.stop(out)
    return out


def _require_grad(watcher: Watcher, func: Any, args: Any, kwargs: Any) -> Any:
    if all(args[1:]) and all(kwargs.values()):
        watcher.became_a_leaf(args[0])
    return func(*args, **kwargs)


def _text(watcher: Watcher, func: Any, args: Any, kwargs: Any) -> Any:
    with watcher.left():  # printing is no use that has a tangent
        return func(*args, **kwargs)


Handler = Callable[[Watcher, Any, Any, Any], Any]


def _handlers() -> dict[Any, Handler]:
    named: dict[Handler, tuple[str, ...]] = {
        _memory: ("numpy", "__array__", "__dlpack__", "__reduce_ex__", "__deepcopy__", "apply_", "map_", "map2_"),
        _address: ("data_ptr", "untyped_storage", "storage"),
        _number: ("item", "tolist", "__float__", "__int__", "__index__", "__complex__"),
        _data: ("new_tensor", "new"),
        _detach: ("detach",),
        _detach_in_place: ("detach_",),
        _require_grad: ("requires_grad_",),
        _text: ("__repr__", "__format__"),
    }
    found = {getattr(Tensor, name): handler for handler, names in named.items() for name in names}
    found |= dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray), _data)
    found[torch.detach_] = _detach_in_place
    found[Tensor.__cuda_array_interface__.__get__] = _memory  # type: ignore[attr-defined]
    found[Tensor.data.__get__] = _detach  # type: ignore[attr-defined]
    found |= dict.fromkeys((torch.detach, torch.ops.aten.detach, torch.ops.aten.detach.default), _detach)
    found[Tensor.data.__set__] = _set_data  # type: ignore[attr-defined]
    found[Tensor.requires_grad.__set__] = _require_grad  # type: ignore[attr-defined]
    return found


_HANDLERS = _handlers()
