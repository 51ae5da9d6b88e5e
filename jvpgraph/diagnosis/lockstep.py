"""A model op by op, and after each op the reference of it.

The reference has a storage for each storage whose values were rounded: a second shadow, of values, beside the one of
tangents, and one of tangents beside that. Both live as long as what they belong to. Constants of the model have none;
they are cast up where an op reads them, and the copy goes when the op is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from jvpgraph.diagnosis.exact import REFUSED, Exact, Ran, first_line, has_unknown, widened
from jvpgraph.diagnosis.kinds import moves
from jvpgraph.errors import UnsupportedNode
from jvpgraph.escapes import Graphs
from jvpgraph.markers import MAKE_DUAL, TANGENT_OF
from jvpgraph.op_by_op import OpByOp
from jvpgraph.op_by_op.kinds import BATCH_NORMS, COPIES, DRAWS, EMPTY, READS_NOTHING
from jvpgraph.precision import Policy, Precision
from jvpgraph.rules.apply import bind, has_tangent
from jvpgraph.storages import key_of, tensors_in, view_of

__all__ = ["Lockstep", "Watcher"]

aten = torch.ops.aten
SWEEP_EVERY = 4  # ops; the reference of an activation is four times as large as the activation
OUTSIDE = "it ran outside of torch's ops, or as a graph of its own: the reference takes its result as it is"
UNABLE = "the reference cannot run it ({reason}), and takes its result as it is"
RANDOM = "it draws random numbers: the reference takes its result as it is"
FROM_BITS = "it reads bits: the reference takes its result as it is"


class Watcher:
    """What is told of the ops, with their references. Nothing is noted by this one."""

    def ran(self, func: OpOverload, own: Ran, exact: Ran) -> None:
        """Both have a tangent; nothing has been written in place yet in the reference."""

    def before(self, func: OpOverload, own: dict[str, Any], exact: dict[str, Any]) -> Any:
        """An op without a tangent is about to run in the reference; what is returned goes to :meth:`computed`."""

    def computed(self, func: OpOverload, own_arguments: dict[str, Any], own: Any, exact: Any, before: Any) -> None:
        """Both have a value."""

    def decided(self, func: OpOverload, own: Any, exact: Any) -> None:
        """Something that is not floating, or a Python number, was computed of what was rounded."""

    def lost(self, func: OpOverload | str, reason: str) -> None:
        """There is no reference of this op: it begins anew with what the op gave."""

    def passed(
        self, func: OpOverload, arguments: list[Any], outs: list[Tensor], exact: Callable[[Tensor], Tensor]
    ) -> None:
        """An op was run, and has a reference."""


class Lockstep(OpByOp):
    """Within this context ops are run twice: as the model asks for it, and in the type of the reference.

    Args:
        reference: the dtype of real numbers in the reference.
        watcher: what is told.
        precision, graphs: as for OpByOp.
    """

    def __init__(
        self,
        reference: torch.dtype,
        watcher: Watcher,
        precision: Precision | Policy = "model",
        graphs: Graphs | None = None,
    ):
        super().__init__(precision=precision, graphs=self._graph if graphs else None)
        self.reference, self.watcher = reference, watcher
        self.exact = Exact(self._compare)
        self.answers: list[tuple[Tensor, Tensor | None]] = []  # outputs of the reference and their tangents
        self._exact_storages: dict[StorageWeakRef, torch.UntypedStorage] = {}
        self._own: Ran | None = None
        self._running: OpOverload | None = None
        self._count = 0
        self._graphs, self._has_reference = graphs, False

    def __enter__(self) -> Lockstep:
        super().__enter__()
        self.exact.follow(self)
        return self

    def sweep(self) -> None:
        super().sweep()
        self._exact_storages = {key: s for key, s in self._exact_storages.items() if not key.expired()}
        self.exact.sweep()

    def adopt(self, out: Tensor, out_dot: Tensor | None) -> None:
        super().adopt(out, out_dot)
        if has_tangent(out) and not self._has_reference:
            self.watcher.lost("a call", OUTSIDE)
            with self.asleep():
                self._take_over(out)

    def adopt_all(self, given: Sequence[tuple[Tensor, Tensor | None]], args: Any, again: Any) -> None:
        """The reference is the same Function of the reference's arguments."""
        self._has_reference = again is not None
        try:
            super().adopt_all(given, args, again)
        finally:
            self._has_reference = False
        if again is None:
            return
        wide = tuple(self._wide(x) for x in args)
        try:
            dots = [self.exact.tangent(x) if has_tangent(x) else None for x in wide]
            found = again(
                wide, [torch.zeros_like(x) if d is None and has_tangent(x) else d for x, d in zip(wide, dots)]
            )
            for (x, _), y, y_dot in zip(given, *found, strict=True):
                self.give(x, y, y_dot)
        except torch.OutOfMemoryError:
            raise
        except (*REFUSED, AttributeError) as error:  # its code may want a context that is PyTorch's
            self._lose("a Function", UNABLE.format(reason=first_line(error)), [x for x, _ in given if has_tangent(x)])

    # ------------------------------------------------------------------------------------ what the reference has

    def exact_of(self, x: Tensor) -> Tensor:
        """The reference of ``x``: a view of what stands for its storage, or a copy of a constant."""
        if not has_tangent(x):
            return x
        key, dtype = key_of(x), widened(x.dtype, self.reference)
        storage = self._exact_storages.get(key) if key is not None else None
        if storage is None:
            y = x.to(dtype)
            self.exact._made(y)
            return y
        y = view_of(storage, x, dtype)
        if x in self._stopped:
            self.exact.stop(y)
        return y

    def give(self, x: Tensor, exact: Tensor, exact_dot: Tensor | None = None) -> None:
        """Let ``exact`` be the reference of ``x``, which has a storage of its own."""
        dtype = widened(x.dtype, self.reference)
        size = x.untyped_storage().nbytes() // x.itemsize * dtype.itemsize
        storage = torch.zeros(size, dtype=torch.uint8, device=x.device).untyped_storage()
        y = view_of(storage, x, dtype)
        y.copy_(exact)
        self._bind(x, storage, y)
        if exact_dot is not None:
            self.exact.set_tangent(y, exact_dot)

    def _bind(self, x: Tensor, storage: torch.UntypedStorage, y: Tensor) -> None:
        key = key_of(x)
        assert key is not None
        self._exact_storages[key] = storage
        self.exact._made(y)

    def _take_over(self, x: Tensor) -> None:
        """Begin anew with the model's own values and tangents."""
        if key_of(x) is None:
            return
        whole = torch.empty(0, dtype=x.dtype, device=x.device)
        whole.set_(x.untyped_storage(), 0, (x.untyped_storage().nbytes() // x.itemsize,), (1,))
        copy = whole.to(widened(x.dtype, self.reference), copy=True)
        self._bind(x, copy.untyped_storage(), copy)
        dot = self.tangent(x)
        if dot is not None:
            self.exact.set_tangent(self.exact_of(x), dot)

    def _graph(self, _mode: OpByOp, op: Any, args: Any, kwargs: Any) -> Any:
        """A higher-order op that runs as a graph of its own, and the same of the reference."""
        assert self._graphs is not None
        self._has_reference = True
        try:
            outs = self._graphs(self, op, args, kwargs)
        finally:
            self._has_reference = False
        if outs is NotImplemented:
            return outs
        try:
            with self.asleep():
                wide_args, wide_kwargs = self._wide(args), self._wide(kwargs)
            found = self._graphs(InPlaceOf(self), op, wide_args, wide_kwargs)
            with self.asleep():
                for x, y in zip(outs, found):
                    if key_of(y) not in self.exact._unknown:
                        self._keep(x, y, shared=False)
        except torch.OutOfMemoryError:
            raise
        except REFUSED as error:
            with self.asleep():
                self._lose(str(op), UNABLE.format(reason=first_line(error)), [x for x in outs if has_tangent(x)])
        return outs

    def _known(self, x: Any) -> bool:
        return has_tangent(x) and key_of(x) in self._exact_storages

    # ---------------------------------------------------------------------------------------------- what is run

    def _dispatch(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        self._count += 1
        count = self._count
        if count % SWEEP_EVERY == 0:
            self.sweep()
        if func is MAKE_DUAL:
            exact = self.exact_of(args[0])
            out = super()._dispatch(func, args, kwargs)
            self.give(out, exact, args[1])
            self.watcher.passed(func, [args[0]], [out], self.exact_of)
            return out
        if func is TANGENT_OF:
            exact = self.exact_of(args[0])
            dot = self.exact.tangent(exact)
            self.answers.append((exact, None if dot is None else dot.clone()))
            return super()._dispatch(func, args, kwargs)
        if func is aten.detach.default:
            return super()._dispatch(func, args, kwargs)
        arguments = bind(func, args, kwargs)
        written = _written(func, arguments)
        operands = [x for value in arguments.values() for x in tensors_in(value)]
        if any(map(self._known, operands)):
            for x in written:
                if not self._known(x):
                    self._take_over(x)
        self._own = None
        out = super()._dispatch(func, args, kwargs)
        if count == self._count:  # else it was taken apart, and its parts have come here
            self._follow(func, args, kwargs, operands, written, out)
        return out

    def _rule(self, func: OpOverload, out: Any, arguments: dict[str, Any], dots: dict[str, Any]) -> Any:
        dot = super()._rule(func, out, arguments, dots)
        self._own = Ran(func, out, arguments, dots, dot)
        return dot

    def _compare(self, exact: Ran) -> None:
        own, func = self._own, self._running
        if own is None or func is None or own.dot is None or exact.dot is None or own.func is not exact.func:
            return
        if not has_unknown(own.dot) and not has_unknown(exact.dot):
            self.watcher.ran(func, own, exact)

    def _follow(
        self, func: OpOverload, args: Any, kwargs: Any, operands: list[Tensor], written: list[Tensor], out: Any
    ) -> None:
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) or x.is_meta for x in (*operands, *results)):
            return  # DTensor asks what shapes come out
        floating = [x for x in results if has_tangent(x)]
        known = any(map(self._known, operands))
        keys = {key_of(x) for x in operands}
        new = [x for x in floating if key_of(x) not in keys and key_of(x) is not None]
        if (not (new or written) and floating) or _name(func) in EMPTY:
            return  # a view, or nothing yet
        random = _is_random(func, bind(func, args, kwargs))
        if not known and (random or written or not new or _is_exact(func)):
            return
        if func is aten.view.dtype and known:
            self._lose(func, FROM_BITS, new)
            return
        if random:
            self._drew(func, args, new, written, out)
            return
        self._running = func
        try:
            wide_args, wide_kwargs = self._wide(args), self._wide(kwargs)
            before = None
            inactive = self._own is None and bool(floating) and not (moves(func) or _name(func) in READS_NOTHING)
            if inactive:
                before = self.watcher.before(func, bind(func, args, kwargs), bind(func, wide_args, wide_kwargs))
            found = self.exact.run(func, wide_args, wide_kwargs, out)
        except torch.OutOfMemoryError:
            raise
        except REFUSED as error:
            self._lose(func, UNABLE.format(reason=first_line(error)), [*new, *written])
            return
        finally:
            self._running = None
        if not floating and not written:
            self.watcher.decided(func, out, found)
            return
        if inactive:
            self.watcher.computed(func, bind(func, args, kwargs), out, found, before)
        given = {key_of(x) for x in tree_leaves((wide_args, wide_kwargs)) if isinstance(x, Tensor)}
        for x, y in zip(tree_leaves(out), tree_leaves(found), strict=True):
            if isinstance(x, Tensor) and any(x is z for z in new):
                self._keep(x, y, shared=key_of(y) in given)
            elif isinstance(x, Tensor) and x.dtype is torch.bool:
                self.watcher.decided(func, x, y)
        self.watcher.passed(func, operands, [*new, *written], self.exact_of)

    def _keep(self, x: Tensor, y: Tensor, shared: bool) -> None:
        """``y`` is the reference of ``x``."""
        dtype = widened(x.dtype, self.reference)
        alike = (y.dtype, y.stride(), y.storage_offset()) == (dtype, x.stride(), x.storage_offset())
        items = x.untyped_storage().nbytes() // x.itemsize
        if alike and not shared and y.untyped_storage().nbytes() // y.itemsize == items and not y.is_conj():
            self._bind(x, y.untyped_storage(), y)
        else:
            self.give(x, y, self.exact.tangent(y))

    def _drew(self, func: OpOverload, args: Any, new: list[Tensor], written: list[Tensor], out: Any) -> None:
        """What was drawn is the same in both."""
        if func is aten.native_dropout.default:
            x, p = args[0], args[1]
            kept = out[1].to(widened(x.dtype, self.reference)) / max(1 - p, 1e-30)
            self._running = func
            try:
                self._keep(out[0], self.exact._dispatch(aten.mul.Tensor, (self.exact_of(x), kept), {}), shared=False)
            finally:
                self._running = None
        elif written:
            for x in written:
                if self._known(x):
                    self._take_over(x)
        elif func._schema.name != "aten::bernoulli":
            self._lose(func, RANDOM, new)

    def _lose(self, func: OpOverload | str, reason: str, outs: list[Tensor]) -> None:
        for x in outs:
            self._take_over(x)
        self.watcher.lost(func, reason)

    def _wide(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.exact_of(value)
        if isinstance(value, torch.dtype):
            return widened(value, self.reference)
        if isinstance(value, dict):
            return {name: self._wide(x) for name, x in value.items()}
        return type(value)(map(self._wide, value)) if type(value) in (list, tuple) else value


class InPlaceOf:
    """What a graph of the reference is told in the place of the mode."""

    def __init__(self, mode: Lockstep):
        self._exact = mode.exact
        self.left, self.asleep = mode.left, mode.asleep

    def is_watching(self) -> bool:
        return True

    def tangent(self, x: Tensor) -> Tensor | None:
        self._exact._made(x)
        return self._exact.tangent(x)

    def adopt(self, out: Tensor, out_dot: Tensor | None) -> None:
        self._exact._made(out)
        if out_dot is not None:
            self._exact.set_tangent(out, out_dot)

    def set_unknown(self, x: Tensor, node: UnsupportedNode) -> None:
        self._exact.set_unknown(x, node)


def _written(func: OpOverload, arguments: dict[str, Any]) -> list[Tensor]:
    """Floating tensors that the op writes to; the statistics of batch norms among them, which do not say so."""
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if _name(func) in BATCH_NORMS and arguments["training"]:
        names += ["running_mean", "running_var"]
    return [x for name in names for x in tensors_in(arguments[name]) if has_tangent(x)]


def _is_exact(func: OpOverload) -> bool:
    """Whether what it gives is, element by element, what it is given; or nobody knows what it computes."""
    if func.namespace not in ("aten", "prims", "jvpgraph") or func is aten.view.dtype:
        return True
    name = _name(func)
    return moves(func) or (name in COPIES and name != "_to_copy")


def _is_random(func: OpOverload, arguments: dict[str, Any]) -> bool:
    if _name(func) in DRAWS:
        return True
    seeded = torch.Tag.nondeterministic_seeded in func.tags
    return seeded and bool(arguments.get("dropout_p", True)) and arguments.get("train", True) is not False


def _name(func: OpOverload) -> str:
    return func._schema.name.partition("::")[2]
