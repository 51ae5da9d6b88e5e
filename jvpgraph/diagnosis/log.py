"""What is noted during one call: records of ops by the module that they run in, and of modules."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef

from jvpgraph.diagnosis.exact import Ran
from jvpgraph.diagnosis.kinds import kind_of
from jvpgraph.diagnosis.lockstep import Lockstep, Watcher
from jvpgraph.diagnosis.measure import (
    Alone,
    NotAlone,
    apart,
    figures,
    figures_of_value,
    norm,
    on_host,
    pairs_of,
    place_of,
    relative,
    shares,
    traffic,
)
from jvpgraph.diagnosis.records import Loss, ModuleRecord, OpRecord, finite_or
from jvpgraph.escapes import frames
from jvpgraph.op_by_op import module_path, user_line
from jvpgraph.precision import HALF, PRECISIONS, Policy, Precision, precision_at
from jvpgraph.rules.apply import has_tangent
from jvpgraph.storages import key_of, parts_of, tensors_in
from jvpgraph.tree import leaves

__all__ = ["Log"]

T = TypeVar("T")
NARROW = "input {name} is rounded to {dtype} on its way in, which costs it {error:.1e}"
GIVEN = "input {name} is {dtype} as it is given: what was rounded before the call cannot be seen"
DECIDED = "{share:.1%} of what is decided here differs from the reference, which goes the way of the model"
ALONE = "what it adds is not known: by itself it does not run ({reason})"
NUMBER = "a Python number is read here, of which the reference takes the model's, off by {error:.1e}"

NOTHING = {torch.float32: 1e-6, torch.float64: 1e-13}  # left over of a sum, by what the reference rounds to

SCALES = {"_to_copy", "convert_element_type", "make_dual", "mul", "mul_", "div", "div_", "add", "sub", "rsub", "clone"}
KEPT = 1000  # errors of storages, between two looks for those that are gone


class Log(Watcher):
    """Records of one call at ``time``.

    Args:
        precision: of tangents, as in Config.
    """

    def __init__(self, precision: Precision | Policy, time: float | None):
        self.ops: list[OpRecord] = []
        self.modules: list[ModuleRecord] = []
        self.losses: dict[tuple[str, str, str, str], Loss] = {}
        self._precision, self._time = precision, time
        self._stack: list[str] = []
        self._taken: list[dict[str, float]] = []
        self._adds: list[tuple[float, str]] = []  # the worst op of each module that is running
        self._errors: dict[StorageWeakRef | None, float] = {}  # of what ops have given
        self._makers: dict[StorageWeakRef | None, tuple[int, ...]] = {}  # the ops whose tangents are in a storage
        self._takes: list[dict[int, float]] = []  # by op, the share that those have in its tangent
        self._made: float | None = None  # the error of what the present op gives
        self._times: dict[StorageWeakRef | None, tuple[str, int, bool]] = {}  # input, elements, whether rounded
        self._files: set[str] = set()  # that define the model's modules
        self.mode: Lockstep | None = None

    @functools.cached_property
    def alone(self) -> Alone:
        assert self.mode is not None
        return Alone(self.mode)

    # -------------------------------------------------------------------------------------------------- modules

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know which module runs, and what it takes and gives."""
        self._files = {path for module in model.modules() if (path := _file_of(module))}
        handles: list[Any] = []
        for name, module in model.named_modules():
            enter, leave = functools.partial(self._enter, name), functools.partial(self._leave, name)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stack.append(name)
        self._adds.append((0.0, ""))
        self._taken.append(self._errors_of((args, kwargs)))

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        taken, given = self._taken.pop(), self._errors_of(out)
        alike = next((size for size in given if size.startswith("of ") and taken.get(size)), "norm")
        self._stack.pop()
        adds, op = self._adds.pop()
        self.modules.append(
            ModuleRecord(
                index=len(self.modules),
                time=self._time,
                module=name,
                kind=type(module).__name__,
                depth=len(self._stack),
                value=given["value"],
                tangent=given["tangent"],
                value_in=taken["value"],
                tangent_in=taken["tangent"],
                norm=given[alike],
                norm_in=taken[alike],
                adds=adds,
                adds_op=op,
            )
        )

    def _errors_of(self, tree: Any) -> dict[str, float]:
        """Of all floating tensors in it together; of DTensors, of this rank's part."""
        mode = self.mode
        tensors = [part for _, x in leaves(tree) if has_tangent(x) for part in parts_of(x)]
        nothing = {"value": 0.0, "tangent": 0.0, "norm": 0.0}
        if mode is None or not tensors or not mode.is_watching():
            return nothing
        with mode.asleep():
            exact = [mode.exact_of(x) for x in tensors]
            own_dots, dots = [mode.tangent(x) for x in tensors], [mode.exact.tangent(x) for x in exact]
            both = [(d, e) for d, e in zip(own_dots, dots) if d is not None and e is not None]
            found = {
                "value_norm": norm(exact),
                "value_error": norm([apart(x, y) for x, y in zip(tensors, exact)]),
            }
            if both:
                found["norm"] = norm([e for _, e in both])
                found["error"] = norm([apart(d, e) for d, e in both])
                for shape in dict.fromkeys(e.shape for _, e in both):
                    found[f"of {tuple(shape)}"] = norm([e for _, e in both if e.shape == shape])
            numbers = on_host(found)
        value = relative(numbers["value_error"], numbers["value_norm"])
        if not both:
            return nothing | {"value": value}
        return numbers | {"value": value, "tangent": relative(numbers["error"], numbers["norm"])}

    def _line(self) -> str:
        """Innermost in the files of the model's modules, which may be this package's; else the user's."""
        for frame in frames():
            code = frame.f_code
            if code.co_filename in self._files:
                return f"{Path(code.co_filename).name}:{frame.f_lineno} in {getattr(code, 'co_qualname', code.co_name)}"
        return user_line()

    @property
    def module(self) -> str:
        return self._stack[-1] if self._stack else ""

    # ------------------------------------------------------------------------------------------------------ ops

    def ran(self, func: OpOverload, own: Ran, exact: Ran) -> None:
        pairs = pairs_of(own, exact)
        if not pairs or not any(y.numel() for y, *_ in pairs):
            return
        try:
            alone = self.alone.figures(own, exact, pairs)
        except NotAlone as reason:
            self._lose("not compared", str(func), ALONE.format(reason=reason), 0.0)
            alone = {}
        parts = {f"share_{name}": part for name, part in shares(exact).items()}
        found = on_host(figures(own, exact, pairs) | alone | parts)
        precision = precision_at(self._precision, module_path, own.func)
        adds: dict[str, float] = {p: self._added(found, p) for p in PRECISIONS}
        broken = found["not_finite"] > 0 or found["value_not_finite"] > 0
        record = OpRecord(
            index=len(self.ops),
            time=self._time,
            module=self.module,
            op=str(func),
            kind=kind_of(own.func),
            line=self._line(),
            dtype=str(pairs[0][0].dtype).removeprefix("torch."),
            precision=precision,
            shape=tuple(pairs[0][0].shape),
            value=relative(found["value_error"], found["value_norm"]),
            tangent=relative(found["error"], found["norm"]),
            adds=adds[precision],
            adds_in=adds,
            adds_value=self._added(found, "value"),
            before=self._before(list(own.arguments.values())),
            norm=found["norm"],
            bytes_in=traffic(own),
            cancels=found.get("cancels", 1.0),
            epilogue=found.get("epilogue", 1.0),
            not_finite=found["not_finite"],
            value_not_finite=found["value_not_finite"],
            underflow=found["underflow"],
            largest=found["largest"],
            where=place_of(pairs) if broken else "",
            is_zero=found.get("cancels", 1.0) < NOTHING[pairs[0][3].dtype.to_real()],
        )
        self._note(record)
        for name in own.dots:
            for x in tensors_in(own.arguments[name]):
                for maker in self._makers.get(key_of(x), ()):
                    takes = self._takes[-1]
                    takes[maker] = max(takes.get(maker, 0.0), finite_or(found.get(f"share_{name}", 1.0), 1.0))

    def before(self, func: OpOverload, own: dict[str, Any], exact: dict[str, Any]) -> Any:
        try:
            return self.alone.value(func, own, exact)
        except NotAlone as reason:
            self._lose("not compared", str(func), ALONE.format(reason=reason), 0.0)
            return None

    def computed(self, func: OpOverload, own_arguments: dict[str, Any], own: Any, exact: Any, before: Any) -> None:
        values = [
            (x, y, z)
            for x, y, z in zip(*map(_listed, (own, exact, own if before is None else before)))
            if has_tangent(x)
        ]
        if len(func._schema.returns) > 1:
            values = values[:1]
        if not any(x.numel() for x, _, _ in values):
            return
        found = on_host(figures_of_value(values))
        dtype = values[0][0].dtype
        self._note(
            OpRecord(
                index=len(self.ops),
                time=self._time,
                module=self.module,
                op=str(func),
                kind=kind_of(func),
                line=self._line(),
                dtype=str(dtype).removeprefix("torch."),
                precision=PRECISIONS[0],
                shape=tuple(values[0][0].shape),
                value=relative(found["value_error"], found["value_norm"]),
                tangent=math.nan,
                adds=math.nan,
                adds_in=dict.fromkeys(PRECISIONS, math.nan),
                adds_value=math.nan if before is None else relative(found["adds_value"], found["value_norm"]),
                before=self._before(list(own_arguments.values())),
                norm=0.0,
                bytes_in=dict.fromkeys(PRECISIONS, 0),
                value_not_finite=found["value_not_finite"],
                active=False,
            )
        )

    def _before(self, arguments: list[Any]) -> float:
        """The largest error of what is given, as far as ops have made it."""
        given = [self._errors.get(key_of(x)) for value in arguments for x in tensors_in(value)]
        return max((error for error in given if error is not None), default=0.0)

    def weighed(self) -> list[OpRecord]:
        """The records with their influence: an error counts as much as the term that has it does in a sum, and errors
        are taken for independent."""
        squares = [0.0] * len(self.ops)
        for i, record in reversed(list(enumerate(self.ops))):
            if record.active and not squares[i]:
                squares[i] = 1.0  # nobody takes it: it is the output
            for maker, share in self._takes[i].items():
                squares[maker] += share**2 * squares[i]
        return [replace(record, influence=math.sqrt(square)) for record, square in zip(self.ops, squares)]

    def _note(self, record: OpRecord) -> None:
        self.ops.append(record)
        self._takes.append({})
        self._made = finite_or(record.value, 0.0) if record.is_zero else record.after
        if self._adds and record.badness > self._adds[-1][0]:
            self._adds[-1] = (record.badness, record.op)

    def _added(self, found: dict[str, float], what: str) -> float:
        """nan where the inputs are beyond the type that they would have to be rounded to, or the op does not run."""
        key = f"adds_{what}"
        if key not in found or not found.get(f"reached_{'model' if what == 'value' else what}", 1.0):
            return math.nan
        return relative(found[key], found["value_norm" if what == "value" else "norm"])

    def decided(self, func: OpOverload, own: Any, exact: Any) -> None:
        if isinstance(own, Tensor) and isinstance(exact, Tensor):
            if own.is_floating_point() or own.shape != exact.shape:
                return
            differing = float((own != exact).double().mean()) if own.numel() else 0.0
            if differing:
                self._lose("decision", str(func), DECIDED.format(share=differing), differing)
        elif isinstance(own, (bool, int)) and own != exact:
            self._lose("decision", str(func), DECIDED.format(share=1.0), 1.0)
        elif isinstance(own, float) and own != exact:
            error = abs(own - exact) / abs(exact) if exact else math.inf
            self._lose("number", str(func), NUMBER.format(error=error), error)

    def lost(self, func: OpOverload | str, reason: str) -> None:
        self._lose("not compared", str(func), f"not compared: {reason}", 0.0)

    def _lose(self, what: str, op: str, text: str, error: float) -> None:
        line = self._line()
        known = self.losses.get((what, self.module, op, line))
        if known is None or error > known.error:
            self.losses[what, self.module, op, line] = Loss(what, self.module, op, line, text, error, self._time)

    # ---------------------------------------------------------------------------------------------------- times

    def follow_times(self, inputs: dict[str, Tensor]) -> None:
        """Note where one of these loses digits, up to the op that makes something else of it than one number each.

        Inputs with one number for each of the batch, or a single one.
        """
        for name, x in inputs.items():
            if has_tangent(x) and x.dim() <= 2 and (x.dim() == 0 or x.numel() == x.shape[0]):
                self._times[key_of(x)] = (name, x.numel(), False)
                if x.dtype in HALF:
                    dtype = str(x.dtype).removeprefix("torch.")
                    self._lose("given", "", GIVEN.format(name=name, dtype=dtype), 0.0)

    def passed(
        self, func: OpOverload, arguments: list[Tensor], outs: list[Tensor], exact: Callable[[Tensor], Tensor]
    ) -> None:
        makers: tuple[int, ...] = (len(self.ops) - 1,)
        error = self._made
        if error is None:
            error = self._before(arguments)
            makers = tuple({maker for x in arguments for maker in self._makers.get(key_of(x), ())})
        self._made = None
        self._errors.update((key_of(out), error) for out in outs)
        self._makers.update((key_of(out), makers) for out in outs)
        if len(self._errors) > KEPT:
            self._errors, self._makers = _alive(self._errors), _alive(self._makers)
        for x in arguments if self._times and func._schema.name.partition("::")[2] in SCALES else ():
            known = self._times.get(key_of(x))
            for out in outs if known is not None else ():
                name, count, is_rounded = known  # type: ignore[misc]
                if out.numel() == count:
                    narrow = not is_rounded and out.dtype in HALF and self._narrowed(func, name, out, exact(out))
                    self._times[key_of(out)] = (name, count, is_rounded or narrow)

    def _narrowed(self, func: OpOverload, name: str, out: Tensor, exact: Tensor) -> bool:
        """Note that digits were lost, if some were."""
        found = on_host({"error": norm([apart(out, exact)]), "norm": norm([exact])})
        error = relative(found["error"], found["norm"])
        if error:
            dtype = str(out.dtype).removeprefix("torch.")
            self._lose("time", str(func), NARROW.format(name=name, dtype=dtype, error=error), error)
        return error > 0


def _alive(known: dict[StorageWeakRef | None, T]) -> dict[StorageWeakRef | None, T]:
    return {key: x for key, x in known.items() if key is not None and not key.expired()}


def _listed(out: Any) -> list[Any]:
    return list(out) if isinstance(out, (list, tuple)) else [out]


def _file_of(module: nn.Module) -> str | None:
    """Where its forward is written, unless that is torch."""
    forward = inspect.unwrap(type(module).forward)
    is_torch = forward.__module__.partition(".")[0] == "torch"
    return None if is_torch or not inspect.isfunction(forward) else forward.__code__.co_filename
