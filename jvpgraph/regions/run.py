"""Regions: parts of a model that are compiled as dual graphs, while the code around them runs op by op.

During a dual call the ``forward`` of every region is replaced. The replacement takes the tangents of the arguments
from the op-by-op mode, steps out of it, runs one compiled function and gives the tangents of the outputs to the mode.
``__call__`` stays what it was, so FSDP2, activation checkpointing and user hooks see plain tensors around a plain
module. The compiled function takes the module as an argument: equal regions share one graph.

A region called inside ``torch.utils.checkpoint`` takes the checkpoint into its graph, where the compiler recomputes
the primal alone. Whatever else that checkpoint holds is recomputed by PyTorch, with the region's output for nothing.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from jvpgraph.dual_forward import dual_forward
from jvpgraph.dynamo import (
    NOT_CAPTURED,
    NOT_COMPILED,
    advice,
    backward_at_once,
    hit_recompile_limit,
    in_one_piece,
    own_errors,
)
from jvpgraph.dynamo_backend import Backend
from jvpgraph.errors import CaptureError, MarkerExecuted
from jvpgraph.markers import MAKE_DUAL
from jvpgraph.op_by_op import OpByOp
from jvpgraph.open_checkpoints import open_checkpoints
from jvpgraph.precision import Policy
from jvpgraph.regions.checkpoints import Call, hooks_taken_off, policy
from jvpgraph.regions.find import Choice, find_regions, fingerprint, parts_of
from jvpgraph.regions.kept import Kept, with_answers
from jvpgraph.regions.small import SmallGraphs
from jvpgraph.regions.writes import is_number, refuse_writes
from jvpgraph.rules.apply import has_tangent
from jvpgraph.storages import is_dtensor, is_to_come, key_of, plain
from jvpgraph.tree import Exchanged, exchange, first_copied, leading_to, leaves, put_back
from jvpgraph.unguarded import unguarded

__all__ = ["Group", "Regions", "brief"]

log = logging.getLogger("jvpgraph")


@dataclass(eq=False)
class Group:
    """Equal regions: they share their graphs.

    Attributes:
        kind: name of their class.
        names: their names in the model.
        cause: why they are no graphs; they run op by op, or their parts are regions instead. Else empty.
        graphs: how many graphs were compiled for all of them.
        calls: how often one of them ran in a graph.
        functions: compiled functions by (paths of active arguments, how they call the module, serial).
    """

    kind: str
    names: list[str] = field(default_factory=list)
    cause: str = ""
    graphs: int = 0
    calls: int = 0
    functions: dict[Any, Callable[..., Any]] = field(default_factory=dict, repr=False)
    serial: int = 0

    def __str__(self) -> str:
        what = f"{len(self.names)} x {self.kind} ({self.names[0]}{', ...' if len(self.names) > 1 else ''})"
        if self.cause:
            return f"{what}: {self.cause}"
        return f"{what}: {self.graphs} graph{'s' if self.graphs != 1 else ''}, {self.calls} calls"


@dataclass(eq=False)
class _Region:
    module: nn.Module
    name: str
    group: Group
    serial: int | None = None  # of the function that it runs in, once it has run


class Regions:
    """The regions of one model, and what became of them: print it.

    Attributes:
        whole: the model is captured as one graph, there are no regions.
        reason: why whole, or why not.
        groups: equal regions, in the order of the model.
        op_by_op: the share of the last call's time, as the CPU sees it, that was not spent in graphs; None until there
            was a call that compiled nothing.
    """

    def __init__(self, model: nn.Module, choice: Choice, backend: Backend, dynamic: bool | None):
        self.whole: bool = False
        self.reason = ""
        self.groups: list[Group] = []
        self.op_by_op: float | None = None
        self._in_graphs = 0.0
        self._model, self._choice, self._backend, self._dynamic = model, choice, backend, dynamic
        self._small = SmallGraphs(backend, dynamic)
        self._regions: list[_Region] = []
        self._structure: tuple[Any, ...] = ()
        self._mode: OpByOp | None = None
        self._patches = ExitStack()
        self._calls_of: WeakKeyDictionary[Any, list[tuple[nn.Module, bool]]] = WeakKeyDictionary()
        self._given = WeakTensorKeyDictionary()  # active arguments of the regions that ran
        self._kept: Kept = []  # by the region that has just run

    def __str__(self) -> str:
        if self.whole:
            return f"one graph: {self.reason}"
        count = sum(len(g.names) for g in self.groups)
        head = "no parts, everything runs op by op" if self._structure and not count else f"{count} regions"
        head += f": {self.reason}" if self.reason else ""
        tail = []
        if self.op_by_op is not None:
            tail.append(f"  op by op: {self.op_by_op:.0%} of the time of the last call")
        if change := advice(self.reason):
            tail.append(f"  for one graph: {change}")
        return "\n".join([head, *(f"  {group}" for group in self.groups), *tail])

    def __call__(self, forward: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        """``forward(*inputs)`` op by op, but for the regions."""
        self._find()
        start, compiled = time.perf_counter(), self._graphs()
        self._in_graphs = 0.0
        result = self._call(forward, inputs)
        if self._graphs() == compiled:
            self.op_by_op = 1 - self._in_graphs / (time.perf_counter() - start)
        return result

    def _graphs(self) -> int:
        return sum(group.graphs for group in self.groups)

    def _call(self, forward: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        with OpByOp(graphs=self._small, precision=self._backend.config.tangent_precision) as mode, self._patches:
            self._mode = mode
            try:
                for region in self._regions:
                    if not region.group.cause:
                        self._patches.enter_context(_replaced(region.module, self._runner(region)))
                return forward(*inputs)
            finally:
                self._mode = None

    def _runner(self, region: _Region) -> Callable[..., Any]:
        return functools.partial(self._run, region)

    def _find(self) -> None:
        """Find the regions, anew when modules were added, taken away, wrapped or sharded since."""
        structure = (tuple((id(m), type(m)) for m in self._model.modules()), unguarded([self._model]))
        if structure == self._structure:
            return
        self._structure, self.groups, self._regions = structure, [], []
        self._add(find_regions(self._model, self._choice))
        if self.groups:
            log.info("jvpgraph: %s", self)
        else:
            log.warning("jvpgraph: the whole model runs op by op, since it has no parts: %s", self.reason)

    def _add(self, found: Sequence[tuple[str, nn.Module]]) -> list[_Region]:
        groups: dict[Any, Group] = {}
        added = []
        for name, module in found:
            key = fingerprint(module), self._precisions(name, module)
            if key not in groups:
                groups[key] = Group(type(module).__name__)
            groups[key].names.append(name)
            added.append(_Region(module, name, groups[key]))
        self.groups += groups.values()
        self._regions += added
        return added

    def _precisions(self, path: str, region: nn.Module) -> Any:
        """What a policy says of the parts of a region: regions that differ in it are not equal."""
        policy = self._backend.config.tangent_precision
        if not isinstance(policy, Policy):
            return None
        return tuple(policy.inside(path).choices(name) for name, _ in region.named_modules())

    def _run(self, region: _Region, *args: Any, **kwargs: Any) -> Any:
        """What stands for the forward of a region."""
        mode, module = self._mode, region.module
        assert mode is not None
        own = _own_forward(module)
        frames = open_checkpoints()
        if region.group.cause:  # it ran before its group was given up
            return self._plainly(region, frames, args, kwargs)
        passed: dict[str, Any] = {"args": (module, *args), "kwargs": kwargs}
        inputs = {path: x for path, x in leaves(passed) if isinstance(x, Tensor)}
        dots = {path: dot for path, x in inputs.items() if (dot := mode.tangent(x)) is not None}
        if not dots:
            return self._plainly(region, frames, args, kwargs)
        call = Call(bool(frames), policy() if frames else None, any(map(is_dtensor, module.parameters())))
        key = (tuple(dots), call)
        try:
            with own, mode.left(), hooks_taken_off(len(frames)):
                out, out_dots = self._exchanged(region, key, passed, dots)
        except MarkerExecuted:  # by a stance of torch.compile's, for now
            return self._plainly(region, frames, args, kwargs)
        except CaptureError as error:
            self._give_up(region.group, brief(error))
            return self._plainly(region, frames, args, kwargs)
        region.group.calls += 1
        self._remember(frames, module, True)
        with mode.left():
            outs = [leaf for _, leaf in leaves(out) if has_tangent(leaf)]
            _give_tangents(mode, [*zip(outs, out_dots), *self._kept])
            mode.sweep()
        self._kept = []
        return out

    def _exchanged(self, region: _Region, key: Any, passed: dict[str, Any], dots: dict[str, Tensor]) -> Any:
        """The compiled function with other tensor objects in the places of those that have tangents."""
        active = leading_to(dots)
        if (copied := first_copied(passed, "", active)) is not None:
            raise CaptureError(f"it is given a {type(copied).__name__}, which it might change: pass a dict or a list")
        exchanged: Exchanged = []
        try:
            given = exchange(
                passed, lambda path, leaf: self._as_argument(leaf) if path in dots else leaf, "", active, exchanged
            )
            return self._compiled(region, key, given["args"], given["kwargs"], dots)
        finally:
            put_back(exchanged)

    def _as_argument(self, x: Tensor) -> Tensor:
        """``x`` as another tensor object, which cannot be mistaken for one that the region reads besides.

        Autograd would keep the storage of ``x`` until the backward, and so its tangent: what is given to one region
        only is copied, and both are free when the next region has run.
        """
        seen = x in self._given
        self._given[x] = None
        local = plain(x)
        whole = local.numel() * local.itemsize >= local.untyped_storage().nbytes()
        if is_to_come(x) or (torch.is_grad_enabled() and whole and not seen):
            return x.clone()
        return x.view_as(x)

    def _plainly(self, region: _Region, frames: list[Any], args: Any, kwargs: Any) -> Any:
        """Op by op: what carries no tangent, and what cannot be captured."""
        self._remember(frames, region.module, False)
        with _own_forward(region.module):
            return region.module.forward(*args, **kwargs)

    def _compiled(self, region: _Region, key: Any, args: Any, kwargs: Any, dots: dict[str, Tensor]) -> Any:
        """One function for all regions of a group; a second one where Dynamo keeps no more variants of the first."""
        group = region.group
        serial = group.serial if region.serial is None else region.serial
        while True:
            function = group.functions.get((key, serial))
            if function is None:
                function = group.functions[key, serial] = self._compile(group, key[1])
            start = time.perf_counter()
            try:
                with own_errors(), in_one_piece(), backward_at_once():
                    result = function(args, kwargs, dots)
                self._in_graphs += time.perf_counter() - start
            except CaptureError as error:
                if not hit_recompile_limit(error) or region.serial is not None:
                    raise
                group.serial = serial = group.serial + 1
                continue
            region.serial = serial
            return result

    def _compile(self, group: Group, call: Call) -> Callable[..., Any]:
        of_group = self._backend.inside(group.names[0])

        def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            refuse_writes(gm)
            apart = with_answers(gm, self._backend.config.tangent_precision)
            compiled = of_group(gm, example_inputs)
            group.graphs += 1
            return self._checking(gm, compiled, apart)

        function = dual_forward(call.run, precision=self._backend.config.tangent_precision)
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=self._dynamic)

    def _checking(self, gm: fx.GraphModule, compiled: Callable[..., Any], apart: Callable[..., Any]) -> Any:
        """``compiled``, unless something that is not an argument brings a tangent along, which would be lost."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        known = {n for marker in gm.graph.find_nodes(op="call_function", target=MAKE_DUAL) for n in marker.args}
        others = [i for i, node in enumerate(placeholders) if node not in known and not is_number(node)]

        def checked(*inputs: Any) -> Any:
            for i in others:
                if (
                    self._mode is not None
                    and isinstance(inputs[i], Tensor)
                    and self._mode.tangent(inputs[i]) is not None
                ):
                    raise CaptureError(f"it reads {placeholders[i].name}, which has a tangent and is not an argument")
            outs, self._kept = apart(compiled(*inputs))
            return outs

        return checked

    def _give_up(self, group: Group, cause: str) -> None:
        """Make the parts of these regions regions instead, from now on."""
        group.cause = cause
        log.warning("jvpgraph: a region cannot be captured and runs op by op: %s", group)
        parts = []
        for region in self._regions:
            if region.group is group:
                parts += [(f"{region.name}.{name}", m) for name, m in parts_of(region.module)]
        for region in self._add(parts):
            self._patches.enter_context(_replaced(region.module, self._runner(region)))

    def _remember(self, frames: list[Any], module: nn.Module, in_graph: bool) -> None:
        """For a checkpoint that is open: whether this call left its saved tensors to the checkpoint or to the graph."""
        for frame in frames:
            if frame not in self._calls_of:
                self._calls_of[frame] = []
                frame.recompute_fn = self._recomputing(frame.recompute_fn, self._calls_of[frame])
            self._calls_of[frame].append((module, in_graph))

    def _recomputing(self, recompute: Callable[..., Any], calls: list[tuple[nn.Module, bool]]) -> Callable[..., Any]:
        """A checkpoint's recomputation that saves what its forward saved: nothing of what ran in a graph."""

        def recompute_again(*args: Any) -> Any:
            remaining = iter(calls)

            def replay(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                in_graph = next(remaining)[1]
                frames = open_checkpoints()  # of checkpoints inside this one
                self._remember(frames, module, in_graph)
                # What ran in a graph left nothing to a selective checkpoint's mode, which would look for it.
                without_modes = _disable_current_modes() if in_graph else nullcontext()
                with _own_forward(module), hooks_taken_off(len(frames) + 1 if in_graph else 0), without_modes:
                    return module.forward(*args, **kwargs)

            with ExitStack() as patches:
                for module in {id(module): module for module, _ in calls}.values():
                    patches.enter_context(_replaced(module, functools.partial(replay, module)))
                return recompute(*args)

        return recompute_again


def brief(error: CaptureError) -> str:
    """The first line that says something, and the user's line, or the compiler's op, where they are named."""
    text = str(error).replace(NOT_CAPTURED, "not captured: ", 1).replace(NOT_COMPILED, "not compiled: ", 1)
    lines = [line.strip() for line in text.splitlines()]
    caused = next((line for line in lines if line.startswith(("Caused by: ", "target: "))), "")
    if not caused and "from user code:" in lines:
        frames = [line for line in lines[lines.index("from user code:") :] if line.startswith("File ")]
        caused = frames[-1] if frames else ""
    return " ".join(part for part in (lines[0], caused) if part)


def _give_tangents(mode: OpByOp, made: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """To what a region has made, or has handed through."""
    active = [(leaf, dot, mode.shadowed(leaf)) for leaf, dot in made if dot is not None]
    for leaf, dot, known in active:
        if known and not plain(dot).any():
            mode.stop(leaf)  # a detached argument that is handed through
    _set_tangents(mode, [x for x in active if not x[2]])
    for leaf in (leaf for leaf, dot in made if dot is None):
        mode.adopt(leaf, None)


def _set_tangents(mode: OpByOp, outs: Sequence[tuple[Tensor, Tensor, bool]]) -> None:
    """Give new tensors their tangents. Where ``y`` and ``y.detach()`` share memory, so do their tangents."""
    sharing = Counter(key_of(plain(leaf)) for leaf, *_ in outs)
    without = []
    for leaf, dot, _ in outs:
        if sharing[key_of(plain(leaf))] == 1 or dot.is_meta or plain(dot).any():  # meta tensors have no values
            mode.set_tangent(leaf, dot)
        else:
            without.append((leaf, dot))
    for leaf, dot in without:
        if not mode.shadowed(leaf):
            mode.set_tangent(leaf, dot)
        elif (seen := mode.tangent(plain(leaf))) is not None and seen.any():
            mode.stop(leaf)


_MISSING = object()


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward", _MISSING)
    vars(module)["forward"] = functools.update_wrapper(forward, module.forward)
    try:
        yield
    finally:
        if before is _MISSING:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = before


@contextmanager
def _own_forward(module: nn.Module) -> Iterator[None]:
    """The module as its author left it, also if it has a forward of its own in its dict."""
    replacement = vars(module)["forward"]
    own = replacement.__wrapped__
    if inspect.ismethod(own) and own.__self__ is module and own.__func__ is type(module).forward:
        del vars(module)["forward"]
    else:
        vars(module)["forward"] = own
    try:
        yield
    finally:
        vars(module)["forward"] = replacement
