"""Forward mode one op at a time, for any Python code.

Every storage that carries tangents has a shadow: a second storage of the same size that holds, at each place, the
tangent of what stands there. A view of a tensor is then a view of its shadow, an in-place write is a write into it,
and no tensor has to be wrapped: modules, hooks and autograd see what they always see. The ops arrive below autograd,
so the primal records its graph as usual while the tangent records none, and what the backward runs later is not
shadowed at all.

A tensor whose values come from something with a tangent has one, or raises. So no tensor is taken for a constant
unless an op that was seen made its storage, or it is older than the call; and what an op left empty or zero has to be
so still when it is read, or something that is no op wrote there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import eval_frame
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from jvpgraph.autograd_function import functions_watched
from jvpgraph.errors import UnsupportedNode, UnsupportedOp
from jvpgraph.escapes import HIGHER_ORDER, Calls, Graphs, frames
from jvpgraph.foreign.calls import calls_as_they_were
from jvpgraph.markers import MAKE_DUAL, TANGENT_OF
from jvpgraph.op_by_op.kinds import (
    BATCH_NORMS,
    COPIES,
    DRAWS,
    EMPTY,
    OVERWRITES,
    READS_NOTHING,
    VOUCHED,
    ZERO,
    is_about,
)
from jvpgraph.op_by_op.refusals import NUMBER, refusal, unsupported, user_line
from jvpgraph.op_by_op.shadows import CONSTANTS, Shadows
from jvpgraph.precision import Policy, Precision
from jvpgraph.rules import TABLE, NoRule, tangents_of
from jvpgraph.rules.apply import Unknown, any_has_tangent, bind, functional_form, has_tangent
from jvpgraph.storages import (
    all_bytes,
    copy_of_memory,
    is_dtensor,
    is_to_come,
    is_wrapper,
    key_of,
    parts_of,
    plain,
    tensors_in,
    view_of,
)
from jvpgraph.tracing import flex_on_any_device

__all__ = ["OpByOp"]

aten = torch.ops.aten
MOVED = (
    "as_strided counts in the memory of an input, which is a small part of a larger one and has been copied from "
    "there: pass x.clone()"
)
Observer = Callable[[OpOverload, Any, Any], None]
SWEEP_EVERY = 256  # ops between two looks for shadows whose storage is gone


def _lazy_bits() -> AbstractContextManager[Any]:
    """Conjugation and negation are resolved in here, too.

    PyTorch excludes both inside of a mode: an op that calls others on x.mH, as pinv does, would take it for x.mT.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


class OpByOp(Shadows, TorchDispatchMode):
    """Within this context, ``make_dual`` and ``tangent_of`` work in eager code.

    Args:
        observer: called with (op, primal output, tangent output) after each active op.
        graphs: (mode, op, args, kwargs) runs a higher-order op as a graph, or returns NotImplemented.
        precision: of tangents, as in Config.

    Raises (from inside):
        UnsupportedOp: an op on the tangent path has no rule, or something with a tangent leaves where ops can be seen.
    """

    supports_higher_order_operators = True

    def __init__(
        self, observer: Observer | None = None, graphs: Graphs | None = None, precision: Precision | Policy = "model"
    ):
        TorchDispatchMode.__init__(self)
        Shadows.__init__(self, precision)
        self._moved: dict[StorageWeakRef | None, bool] = {}  # copies of inputs elsewhere: whether strides are kept
        self._stopping = False
        self.rules: dict[str, Counter[str]] = {"table": Counter(), "derived": Counter()}  # as in a Report
        self._observer = observer
        self._ops = 0
        self._calls = Calls(self, graphs)
        self._entered = ExitStack()
        self._asleep = False

    def __enter__(self) -> OpByOp:
        self._stance = eval_frame._stance
        local = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
        self._keys_outside = local[0](), local[1]()
        list(map(CONSTANTS.pop, [key for key in CONSTANTS if key.expired()]))
        with ExitStack() as entered:
            entered.enter_context(torch.jit.optimized_execution(False))  # nothing fused
            entered.enter_context(torch.compiler.set_stance("force_eager"))  # torch.cond compiles itself
            entered.enter_context(self._newborn)
            entered.enter_context(self._calls)
            entered.enter_context(functions_watched(self, user_line))
            entered.enter_context(flex_on_any_device())
            self._entered = entered.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered.close()

    def is_watching(self) -> bool:
        """Whether ops come here, and are looked at."""
        return not self._asleep and any(mode is self for mode in _get_current_dispatch_mode_stack())

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Let code run as if this mode were not there."""
        before, self._asleep = self._asleep, True
        try:
            with self._calls.left():
                yield
        finally:
            self._asleep = before

    def adopt(self, out: Tensor, out_dot: Tensor | None) -> None:
        """Take in what was made while this mode was asleep."""
        self._made(out)
        if out_dot is not None:
            self.set_tangent(out, out_dot)

    @contextmanager
    def left(self) -> Iterator[None]:
        """Without this mode, and without those that were entered inside it."""
        modes = [_pop_mode()]
        while modes[-1] is not self:
            modes.append(_pop_mode())
        within = eval_frame._set_stance(self._stance)
        try:
            with self._calls.left(), calls_as_they_were():
                yield
        finally:
            eval_frame._set_stance(within)
            for mode in reversed(modes):
                _push_mode(mode)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """This mode, for what one of its ops is made of."""
        _push_mode(self)
        try:
            yield
        finally:
            _pop_mode()

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """What is detached within was meant to have no tangent."""
        before, self._stopping = self._stopping, True
        try:
            yield
        finally:
            self._stopping = before

    def handed_out(self, x: Tensor, name: str) -> None:
        """``name`` lets others read and write the memory of ``x``."""
        self._refuse_escape(x, name)
        for part in parts_of(x):
            key = key_of(part)
            if key is not None:
                self._handed_out[key] = name

    def address_taken(self, x: Tensor, name: str) -> None:
        """A kernel is given the memory of ``x``, to read it or to write there."""
        self._refuse_escape(x, name)

    def _refuse_escape(self, x: Tensor, name: str) -> None:
        for part in parts_of(x):
            if self.shadowed(part):
                reason = (
                    "something with a tangent leaves torch's ops, and its tangent would be lost: stay with torch's "
                    "ops, or wrap the code in an op (torch.library) and give that a rule; if no tangent is needed, "
                    "use .detach().clone()"
                )
                raise refusal(name, reason)
            self._unwritten.pop(key_of(part), None)  # type: ignore[arg-type]

    def made_a_number(self, x: Tensor, name: str) -> None:
        if not is_dtensor(x) and any(self.tangent(part) is not None for part in parts_of(x)):
            raise refusal(name, NUMBER)

    def became_a_leaf(self, x: Tensor) -> None:
        if any(part in self._stopped for part in parts_of(x)):
            reason = (
                "a detached tensor is to be differentiated, but detach has stopped its tangent: use x.clone(), or "
                "x.requires_grad_() itself"
            )
            raise refusal("requires_grad_", reason)

    def became_data(self, x: Tensor, of: Tensor) -> None:
        self.tangent(x)
        if plain(x) in self._stopped:
            self.stop(of)
        else:
            self._stopped.pop(plain(of), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._asleep:
            return func(*args, **kwargs)
        if types and self._left_to_wrappers(func, args, kwargs):
            return NotImplemented
        if isinstance(func, OpOverload):
            with torch._C.DisableTorchFunction(), _lazy_bits():
                return self._dispatch(func, args, kwargs)
        if str(func) in HIGHER_ORDER:
            with self._again():
                return HIGHER_ORDER[str(func)](*args, **kwargs)
        if self._argument_tangent(tree_leaves([args, kwargs])) is not None:
            raise refusal(str(func), "a higher-order op that PyTorch compiles by itself: it has no tangent op by op")
        return func(*args, **kwargs)

    def _left_to_wrappers(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether the ops on what is inside come next: a DTensor's, a collective's result to come, others'.

        Raises:
            UnsupportedOp: a wrapper that may rearrange what it wraps has something with a tangent inside.
        """
        wrappers = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and is_wrapper(x)]
        for x in wrappers if not is_about(func) else ():
            if not (is_dtensor(x) or is_to_come(x)) and any(map(self.shadowed, parts_of(x))):
                reason = (
                    f"a {type(x).__name__} wraps something with a tangent, and how it computes with that cannot be seen"
                )
                raise UnsupportedOp([UnsupportedNode(str(func), "op by op", (), user_line(), reason)])
        return bool(wrappers)

    def _dispatch(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        self._ops += 1
        if self._ops % SWEEP_EVERY == 0:
            self.sweep()
        if func is MAKE_DUAL:
            x = copy_of_memory(args[0])
            self.set_tangent(x, args[1])
            if (x.storage_offset(), x.stride()) != (args[0].storage_offset(), args[0].stride()):
                self._moved[key_of(x)] = x.stride() == args[0].stride()
            return x
        if func is aten.as_strided.default and not self._counts_alike(*args, **kwargs):
            raise UnsupportedOp([unsupported(func, {"self": args[0]}, MOVED)])
        if func is TANGENT_OF:
            self._check_written(func, {"y": args[0]}, [])
            dot, dtype = self.tangent(args[0]), (*args, None, None)[2] or args[0].dtype
            return self._made(torch.zeros_like(args[0], dtype=dtype) if dot is None else dot.to(dtype, copy=True))
        if func is aten.detach.default:
            return self._detach(*args)
        return self._made(self._run(func, args, kwargs))

    def _detach(self, x: Tensor) -> Tensor:
        """Never raises: autograd, which saves tensors detached, could not go on."""
        out = aten.detach.default(x)
        key = key_of(x)
        if key in self._shadows:
            if self._stopping or (self._calls.blind and _asked_for()) or x in self._stopped:
                self._stopped[out] = None
        elif key is not None and key not in self._seen and x not in self._newborn:
            CONSTANTS[key] = None
        return out

    def _counts_alike(self, x: Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> bool:
        """Whether as_strided finds in the copy of an input what it would find in the input."""
        same_strides = self._moved.get(key_of(x))  # type: ignore[arg-type]
        return same_strides is None or (same_strides and storage_offset is None)

    def _made(self, out: Any) -> Any:
        """Remember that an op made these storages."""
        for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(x, Tensor) and (key := key_of(x)) is not None:
                self._seen[key] = None
        return out

    def _run(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.removeprefix("aten::")
        arguments = bind(func, args, kwargs)
        writes = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if name in VOUCHED:
            for x in tree_leaves(list(arguments.values())):
                if isinstance(x, Tensor) and (key := key_of(x)) is not None:
                    self._seen[key] = None
        elif self._unwritten:
            self._check_written(func, arguments, writes)
        dots = {name: dot for name, v in arguments.items() if (dot := self._argument_tangent(v)) is not None}
        stopped = self._stopped_among(arguments) if self._stopped else []
        if any(x is y for name in writes for x in tensors_in(arguments[name]) for y in stopped):
            reason = "it writes through a detached alias of a tensor with a tangent: detach().clone() first"
            raise UnsupportedOp([unsupported(func, dots, reason)])
        if dots and func.namespace == "c10d":
            reason = "a collective that writes into its arguments: use torch.distributed._functional_collectives"
            raise UnsupportedOp([unsupported(func, dots, reason)])
        if dots and func not in TABLE and func._can_decompose():  # composite ops come whole under inference mode
            with self._again():
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if name in EMPTY | ZERO or (name in COPIES and self._unwritten.get(key_of(args[0])) == "empty"):  # type: ignore[arg-type]
            out = func(*args, **kwargs)
            if has_tangent(out) and (key := key_of(out)) is not None:
                self._unwritten[key] = "zero" if name in ZERO else "empty"
            return out
        if dots and name in BATCH_NORMS and arguments["training"] and arguments["running_mean"] is not None:
            return self._run_batch_norm(func, args, kwargs, arguments, dots)
        if not dots or (not writes and func.is_view):
            self._refuse_reading_bits(func, arguments, writes)
            out = func(*args, **kwargs)
            for x in tree_leaves(out) if stopped else ():
                if isinstance(x, Tensor) and key_of(x) in {key_of(of) for of in stopped}:
                    self._stopped[x] = None
            if not dots or all(self.shadowed(x) for x in tree_leaves(out) if has_tangent(x)):
                return out
            self._record(func, out, self._rule(func, out, arguments, dots))  # a view by its schema, which was copied
            return out
        if writes:
            return self._run_in_place(func, args, kwargs, arguments, writes, dots)
        if func is aten._local_scalar_dense.default:
            raise UnsupportedOp([unsupported(func, dots, NUMBER)])
        out = func(*args, **kwargs)
        self._record(func, out, self._rule(func, out, arguments, dots))
        return out

    def _run_batch_norm(self, func: OpOverload, args: Any, kwargs: Any, arguments: dict[str, Any], dots: Any) -> Any:
        """In training it writes to the running statistics and does not say so."""
        out = func(*args, **kwargs)
        functional = aten._native_batch_norm_legit_functional.default
        names = [a.name for a in functional._schema.arguments]
        outs = (*out[:3], arguments["running_mean"], arguments["running_var"])
        self._record(func, outs, self._rule(functional, outs, dict(zip(names, arguments.values())), dots))
        return out

    def _check_written(self, func: OpOverload, arguments: dict[str, Any], writes: list[str]) -> None:
        """Refuse to read what ops left empty or zero, where something that is no op may have written.

        Raises:
            UnsupportedOp: an empty tensor is read, or one of zeros has others in it.
        """
        name = func._schema.name.removeprefix("aten::")
        outs = {a.name for a in func._schema.arguments if a.is_out or (a.name in writes and a.name != "self")}
        for argument, value in arguments.items():
            for x in tensors_in(value):
                key = key_of(x)
                if key not in self._unwritten:
                    continue
                if torch.Tag.inplace_view in func.tags or name == "_unsafe_view":
                    continue  # of the memory it reads and writes nothing
                view = func.is_view and not func._can_decompose()
                if (name in READS_NOTHING or view or func is aten.detach.default) and argument not in writes:
                    continue
                if name in COPIES and self._unwritten[key] == "empty":
                    continue  # what it makes is no less empty
                if arguments.get("beta") == 0 and argument in ("self", "input"):
                    continue
                written = argument in outs or name in OVERWRITES or func.namespace not in ("aten", "jvpgraph")
                if not written and x.numel() and not self._is_still_zero(x, key):
                    reason = (
                        f"{argument} was made {self._unwritten[key]}, and no op was seen to write to it (C++, a "
                        "kernel launched by hand): wrap what writes in an op (torch.library) and give that a rule"
                    )
                    raise UnsupportedOp([unsupported(func, {}, reason)])
                del self._unwritten[key]

    def _is_still_zero(self, x: Tensor, key: StorageWeakRef) -> bool:
        if x.device.type == "meta" or isinstance(x, FakeTensor):
            return True
        return self._unwritten[key] == "zero" and not bool(view_of(x.untyped_storage(), all_bytes(x)).any())

    def _refuse_reading_bits(self, func: OpOverload, arguments: dict[str, Any], writes: list[str]) -> None:
        """Integers in a storage with a shadow are the bits of what has a tangent."""
        if not self._shadows or func.is_view or func._schema.name.removeprefix("aten::") in READS_NOTHING:
            return
        for name, value in arguments.items():
            for x in tensors_in(value):
                if not has_tangent(x) and not is_wrapper(x) and self.shadowed(x):
                    reason = f"{name} holds, as {x.dtype}, the bits of something with a tangent, and bits have none"
                    raise UnsupportedOp([unsupported(func, {}, reason)])

    def _run_in_place(
        self, func: OpOverload, args: Any, kwargs: Any, arguments: dict[str, Any], writes: list[str], dots: Any
    ) -> Any:
        """The tangent of the functional form first, from the old values; then the write itself."""
        targets = [x for name in writes for x in tensors_in(arguments[name])]
        drawn = func._schema.name.removeprefix("aten::") in DRAWS
        dot = None if drawn else self._tangent_of_write(func, arguments, writes, targets, dots)
        out = func(*args, **kwargs)
        for x, x_dot in zip(targets, _flat_dots(dot, len(targets))):
            if has_tangent(x) and (x_dot is not None or self.shadowed(x)):
                self._record(func, x, torch.zeros_like(x) if x_dot is None else x_dot)
        return out

    def _tangent_of_write(
        self, func: OpOverload, arguments: dict[str, Any], writes: list[str], targets: list[Tensor], dots: Any
    ) -> Any:
        functional = functional_form(func)
        if any(_reads_later(value, targets) for name, value in arguments.items() if name not in writes):
            raise UnsupportedOp([unsupported(func, dots, "it reads for one tensor what it wrote for an earlier one")])
        if functional is None:
            raise UnsupportedOp([unsupported(func, dots, "it writes to its arguments and has no functional form")])
        inputs = {a.name for a in functional._schema.arguments}
        arguments = {name: v for name, v in arguments.items() if name in inputs}
        dots = {name: dot for name, dot in dots.items() if name in inputs}
        if not dots:
            return None
        if torch.Tag.nondeterministic_seeded in functional.tags:
            raise UnsupportedOp([unsupported(func, dots, "it draws random numbers in place")])
        before = functional(**arguments) if func is not aten.copy_.default else targets[0]
        if len(tensors_in(before)) != len(targets):
            raise UnsupportedOp([unsupported(func, dots, "it writes to more than its functional form returns")])
        return self._rule(functional, before, arguments, dots)

    def _rule(self, func: OpOverload, out: Any, arguments: dict[str, Any], dots: dict[str, Any]) -> Any:
        if not any_has_tangent(func, out):
            return None
        # Derived rules are forward AD, and where a mode gets its ops all that is above it is switched off.
        outside = torch._C._ForceDispatchKeyGuard(*self._keys_outside)
        with outside, torch._C._DisableAutocast(), torch.inference_mode(False), torch.no_grad():
            try:
                dot, source = tangents_of(func, out, arguments, dots, self.precision_of(func, out))
                self.rules[source][str(func)] += 1
                return _arrived(func, dot)
            except NoRule as reason:
                raise UnsupportedOp([unsupported(func, dots, str(reason))]) from None

    def _record(self, func: OpOverload, out: Any, dot: Any) -> None:
        if dot is None:
            return
        for o, d in [(out, dot)] if isinstance(out, Tensor) else zip(out, dot):
            if isinstance(d, Unknown):
                self.set_unknown(o, unsupported(func, {}, d.reason))
            elif d is not None:
                self.set_tangent(o, d)
        if self._observer is not None:
            self._observer(func, out, dot)


def _reads_later(value: Any, targets: list[Tensor]) -> bool:
    """Whether an op on lists, which goes through them in order, reads in ``value`` what it has written by then."""
    per_tensor = value if isinstance(value, (list, tuple)) else [value] * len(targets)
    read = [set(map(key_of, tensors_in(x))) for x in per_tensor]
    return any(key_of(x) in keys for i, x in enumerate(targets) for keys in read[i + 1 :])


def _flat_dots(dot: Any, count: int) -> list[Any]:
    return [None] * count if dot is None else [dot] if isinstance(dot, Tensor) else list(dot)


def _asked_for() -> bool:
    """Whether a detach came through the dispatcher: autograd, which saves tensors detached, calls the mode directly.

    For code that torch functions are not told of. Elsewhere a detach that is none was not asked for by anyone.
    """
    if not torch._C._dispatch_tls_local_exclude_set().has(torch._C.DispatchKey.AutogradFunctionality):
        return False
    modules = (frame.f_globals.get("__name__", "") for frame in frames())
    between = ("jvpgraph.op_by_op", "torch._dynamo.", "torch._compile", "torch.utils._python_dispatch")
    return next(module for module in modules if not module.startswith(between)) != "torch.autograd.graph"


def _arrived(func: OpOverload, dot: Any) -> Any:
    """What a collective began to compute; a shadow would copy it before it is there."""
    if func.namespace not in ("_c10d_functional", "_c10d_functional_autograd"):
        return dot
    return tree_map_only(Tensor, torch.ops._c10d_functional.wait_tensor.default, dot)
