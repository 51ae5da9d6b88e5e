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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import (
    _CachingTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.weak import WeakTensorKeyDictionary

from jvpgraph.backend import Backend
from jvpgraph.capture import NOT_CAPTURED, NOT_COMPILED, backward_at_once, in_one_piece, own_errors
from jvpgraph.dual_forward import dual_forward
from jvpgraph.errors import CaptureError, MarkerExecuted
from jvpgraph.markers import MAKE_DUAL
from jvpgraph.op_by_op import OpByOp
from jvpgraph.rules.apply import has_tangent
from jvpgraph.storages import is_dtensor, is_to_come, key_of, plain
from jvpgraph.structure import leaves, map_leaves, refuse_hidden
from jvpgraph.unguarded import unguarded

__all__ = ["Choice", "Group", "Regions", "find_regions", "hit_recompile_limit", "hooks_forbid_one_graph"]

Choice = str | type[nn.Module] | Sequence[type[nn.Module]] | Callable[[nn.Module], bool]
SMALL = 0.05  # of the parameters of the largest group: below, one that "auto" finds is not worth a graph
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
    """

    def __init__(self, model: nn.Module, choice: Choice, backend: Backend, dynamic: bool | None):
        check_choice(choice)
        self.whole: bool = False
        self.reason = ""
        self.groups: list[Group] = []
        self._model, self._choice, self._backend, self._dynamic = model, choice, backend, dynamic
        self._regions: list[_Region] = []
        self._refused_one_graph = False
        self._structure: tuple[Any, ...] = ()
        self._mode: OpByOp | None = None
        self._patches = ExitStack()
        self._calls_of: WeakKeyDictionary[Any, list[tuple[nn.Module, bool]]] = WeakKeyDictionary()
        self._given = WeakTensorKeyDictionary()  # active arguments of the regions that ran

    def __str__(self) -> str:
        if self.whole:
            return f"one graph: {self.reason}"
        count = sum(len(g.names) for g in self.groups)
        head = "no parts, everything runs op by op" if self._structure and not count else f"{count} regions"
        head += f": {self.reason}" if self.reason else ""
        return "\n".join([head, *(f"  {group}" for group in self.groups)])

    def prefer_one_graph(self) -> bool:
        """Whether to capture the whole model first: "auto" does, unless hooks of the model's speak against it."""
        if self._choice != "auto" or self._refused_one_graph:
            return False
        hooks = hooks_forbid_one_graph(self._model)
        self.whole, self.reason = not hooks, f"{hooks} has hooks that run outside of graphs" if hooks else "it can be"
        return self.whole

    def one_graph_failed(self, error: CaptureError) -> None:
        """The model cannot be captured or compiled whole: use regions from now on."""
        self.whole, self._refused_one_graph = False, True
        self.reason = _brief(error)
        log.warning("jvpgraph: the model is not one graph, its parts are tried: %s", self.reason)

    def __call__(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        """``forward(*inputs)`` op by op, but for the regions."""
        self._find()
        with OpByOp() as mode, self._patches:
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
            log.warning("jvpgraph: the whole model runs op by op, it has no parts: %s", self.reason)

    def _add(self, found: Sequence[tuple[str, nn.Module]]) -> list[_Region]:
        groups: dict[Any, Group] = {}
        added = []
        for name, module in found:
            key = fingerprint(module)
            if key not in groups:
                groups[key] = Group(type(module).__name__)
            groups[key].names.append(name)
            added.append(_Region(module, name, groups[key]))
        self.groups += groups.values()
        self._regions += added
        return added

    def _run(self, region: _Region, *args: Any, **kwargs: Any) -> Any:
        """What stands for the forward of a region."""
        mode, module = self._mode, region.module
        assert mode is not None
        own = _own_forward(module)
        frames = _checkpoints()
        if region.group.cause:  # it ran before its group was given up
            return self._plainly(region, frames, args, kwargs)
        passed: dict[str, Any] = {"args": (module, *args), "kwargs": kwargs}
        inputs = {path: x for path, x in leaves(passed) if isinstance(x, Tensor)}
        dots = {path: dot for path, x in inputs.items() if (dot := mode.tangent(x)) is not None}
        if not dots:
            return self._plainly(region, frames, args, kwargs)
        call = _Call(bool(frames), _policy() if frames else None, any(map(is_dtensor, module.parameters())))
        key = (tuple(dots), call)
        try:
            with own, mode.left(), _hooks_taken_off(len(frames)):
                given = map_leaves(passed, lambda path, leaf: self._as_argument(leaf), only=dots)
                out, out_dots = self._compiled(region, key, given["args"], given["kwargs"], dots)
                refuse_hidden(out, CaptureError)
        except MarkerExecuted:  # by a stance of torch.compile's, for now
            return self._plainly(region, frames, args, kwargs)
        except CaptureError as error:
            self._give_up(region.group, _brief(error))
            return self._plainly(region, frames, args, kwargs)
        region.group.calls += 1
        self._remember(frames, module, True)
        with mode.left():
            outs = [leaf for _, leaf in leaves(out) if has_tangent(leaf)]
            handed_through = list(map(mode.shadowed, outs))
            for leaf, known in zip(outs, handed_through):
                if known and not any(_same_storage(leaf, inputs[path]) for path in dots):
                    mode.stop(leaf)  # a detached argument that is handed through
            _set_tangents(mode, [x for x in zip(outs, out_dots, handed_through) if not x[2]])
            mode.sweep()
        return out

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
            try:
                with own_errors(), in_one_piece(), backward_at_once():
                    result = function(args, kwargs, dots)
            except CaptureError as error:
                if not hit_recompile_limit(error) or region.serial is not None:
                    raise
                group.serial = serial = group.serial + 1
                continue
            region.serial = serial
            return result

    def _compile(self, group: Group, call: _Call) -> Callable[..., Any]:
        def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            _refuse_writes(gm)
            compiled = self._backend(gm, example_inputs)
            group.graphs += 1
            return self._checking(gm, compiled)

        function = dual_forward(call.run)
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=self._dynamic)

    def _checking(self, gm: fx.GraphModule, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled``, unless something that is not an argument brings a tangent along, which would be lost."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        known = {n for marker in gm.graph.find_nodes(op="call_function", target=MAKE_DUAL) for n in marker.args}
        others = [i for i, node in enumerate(placeholders) if node not in known and not _is_number(node)]

        def checked(*inputs: Any) -> Any:
            for i in others:
                if (
                    self._mode is not None
                    and isinstance(inputs[i], Tensor)
                    and self._mode.tangent(inputs[i]) is not None
                ):
                    raise CaptureError(f"it reads {placeholders[i].name}, which has a tangent and is not an argument")
            return compiled(*inputs)

        return checked

    def _give_up(self, group: Group, cause: str) -> None:
        """Make the parts of these regions regions instead, from now on."""
        group.cause = cause
        log.warning("jvpgraph: a region cannot be captured and runs op by op: %s", group)
        parts = []
        for region in self._regions:
            if region.group is group:
                parts += [(f"{region.name}.{name}", m) for name, m in _parts(region.module)]
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
                frames = _checkpoints()  # of checkpoints inside this one
                self._remember(frames, module, in_graph)
                # What ran in a graph left nothing to a selective checkpoint's mode, which would look for it.
                without_modes = _disable_current_modes() if in_graph else nullcontext()
                with _own_forward(module), _hooks_taken_off(len(frames) + 1 if in_graph else 0), without_modes:
                    return module.forward(*args, **kwargs)

            with ExitStack() as patches:
                for module in {id(module): module for module, _ in calls}.values():
                    patches.enter_context(_replaced(module, functools.partial(replay, module)))
                return recompute(*args)

        return recompute_again


def check_choice(choice: Choice) -> None:
    """Raises: ValueError: not what ``transform`` takes as regions."""
    classes = choice if isinstance(choice, (tuple, list)) else (choice,) if isinstance(choice, type) else ()
    wrong = [c for c in classes if not (isinstance(c, type) and issubclass(c, nn.Module))]
    if wrong or not (choice == "auto" or classes or callable(choice)):
        raise ValueError(
            f"regions must be None, 'auto', a class of modules, several, or a function of a module: not {choice!r}"
        )


def find_regions(model: nn.Module, choice: Choice) -> list[tuple[str, nn.Module]]:
    """Names and modules of the outermost regions; for "auto" none, where a model has no parts.

    Raises:
        ValueError: no module of the model is one of those that were asked for, or whole ones.
    """
    candidates = {name: module for name, module in model.named_modules() if _has_forward(module)}
    if choice == "auto":
        found = _repeated(model, candidates)
    else:
        wanted: Any = choice
        if isinstance(choice, (type, tuple, list)):
            classes = choice if isinstance(choice, type) else tuple(choice)
            wanted = lambda module: isinstance(module, classes)  # noqa: E731
        found = _outermost({name: module for name, module in candidates.items() if wanted(module)})
    inside = [name for name, module in candidates.items() if name and _shards_inside(module)]
    if not found and (choice != "auto" or inside):
        kinds = sorted({type(module).__name__ for name, module in candidates.items() if name and not _is_plain(module)})
        why = ""
        if inside and choice == "auto":
            why = f": parts inside of {', '.join(inside[:3])} are sharded on their own, shard whole blocks"
        raise ValueError(
            f"no module of {type(model).__name__} is a region; it has {', '.join(kinds) or 'no parts'}{why}"
        )
    return found


def fingerprint(module: nn.Module) -> Any:
    """Equal for modules of equal structure. Whether they can share a graph in the end is up to Dynamo's guards."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return (
        tuple((name, type(m)) for name, m in module.named_modules()),
        tuple((name, tuple(x.shape), x.dtype, x.requires_grad) for name, x in tensors),
    )


def hooks_forbid_one_graph(model: nn.Module) -> str:
    """Why the model's hooks cannot be compiled with it; empty if they can."""
    if isinstance(model, DistributedDataParallel):
        return "DistributedDataParallel"
    return "FSDP2" if any(vars(m).get("_is_fsdp_managed_module", False) for m in model.modules()) else ""


def hit_recompile_limit(error: CaptureError) -> bool:
    return isinstance(error.__cause__, FailOnRecompileLimitHit)


def _repeated(model: nn.Module, candidates: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """The outermost blocks that occur more than once or stand in a list, and hold a good part of the parameters."""
    blocks = {name: m for name, m in candidates.items() if name and not _is_plain(m) and not _shards_inside(m)}
    prints = {name: fingerprint(m) for name, m in blocks.items()}
    count: dict[Any, int] = {}
    for key in prints.values():
        count[key] = count.get(key, 0) + 1
    listed = {id(m) for parent in model.modules() if isinstance(parent, nn.ModuleList) for m in _unwrapped(parent)}
    repeated = {name: m for name, m in blocks.items() if count[prints[name]] > 1 or id(m) in listed}
    found = _outermost(repeated)
    size: dict[Any, int] = {}
    for name, m in found:
        size[prints[name]] = size.get(prints[name], 0) + sum(p.numel() for p in m.parameters())
    large = [(name, m) for name, m in found if size[prints[name]] >= SMALL * max(size.values())]
    return large or _outermost(blocks)


def _parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost parts of a module that are more than one layer of PyTorch's."""
    parts = {name: m for name, m in module.named_modules() if name and _has_forward(m)}
    return _outermost({name: m for name, m in parts.items() if not _is_plain(m) and not _shards_inside(m)})


def _outermost(modules: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Those that are not inside another one, each once."""
    inside = {id(part) for m in modules.values() for part in m.modules() if part is not m}
    return [(name, m) for name, m in modules.items() if id(m) not in inside]


def _has_forward(module: nn.Module) -> bool:
    """Containers are not called, wrappers for checkpointing stay around the region, and TorchScript is not captured."""
    if isinstance(module, (ActivationWrapper, torch.jit.ScriptModule)):
        return False
    return type(module).forward is not nn.Module.forward


def _is_plain(module: nn.Module) -> bool:
    """A single layer of PyTorch's, or nothing to compute with."""
    alone = next(iter(module.children()), None) is None
    return next(module.parameters(), None) is None or (alone and _own_class(module).__module__.startswith("torch.nn."))


def _own_class(module: nn.Module) -> type:
    return next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))


def _shards_inside(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules() if part is not module)


def _unwrapped(modules: nn.ModuleList) -> Iterator[nn.Module]:
    for module in modules:
        while isinstance(module, ActivationWrapper):
            module = module._checkpoint_wrapped_module
        yield module


def _brief(error: CaptureError) -> str:
    """The first line that says something, and the user's line, or the compiler's op, where they are named."""
    text = str(error).replace(NOT_CAPTURED, "not captured: ", 1).replace(NOT_COMPILED, "not compiled: ", 1)
    lines = [line.strip() for line in text.splitlines()]
    caused = next((line for line in lines if line.startswith(("Caused by: ", "target: "))), "")
    if not caused and "from user code:" in lines:
        frames = [line for line in lines[lines.index("from user code:") :] if line.startswith("File ")]
        caused = frames[-1] if frames else ""
    return " ".join(part for part in (lines[0], caused) if part)


@dataclass(frozen=True)
class _Call:
    """How a graph calls its module."""

    in_checkpoint: bool
    policy: Callable[..., Any] | None  # what a selective checkpoint keeps
    apart: bool  # AOTAutograd takes no outputs that share memory where there are DTensors

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.in_checkpoint:
            out = module.forward(*args, **kwargs)
        elif self.policy is None:
            out = checkpoint(lambda: module.forward(*args, **kwargs), use_reentrant=False)
        else:
            contexts = functools.partial(create_selective_checkpoint_contexts, self.policy)
            out = checkpoint(lambda: module.forward(*args, **kwargs), use_reentrant=False, context_fn=contexts)
        if not self.apart or isinstance(out, Tensor):
            return out
        return map_leaves(out, lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def _policy() -> Callable[..., Any] | None:
    """Of the innermost checkpoint that is open: selective ones have a mode that knows it."""
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _CachingTorchDispatchMode)]
    return modes[-1].policy_fn if modes else None


def _refuse_writes(gm: fx.GraphModule) -> None:
    """A graph's writes to what it is given do not reach the tangents of the caller's tensor."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    markers = gm.graph.find_nodes(op="call_function", target=MAKE_DUAL)
    if not any(_version(n.meta.get("example_value")) for n in placeholders + markers):
        return
    # Making a fake of a view counts as a write, too: run the graph on fresh ones.
    fakes = [n.meta["example_value"] for n in placeholders]
    mode = next(x.fake_mode for x in fakes if isinstance(x, FakeTensor))
    with mode, torch.no_grad():
        given = [x.detach().clone() if isinstance(x, Tensor) else x for x in fakes]
        fx.Interpreter(gm).run(*given)
    written = [node for node, x in zip(placeholders, given) if _version(x)]
    written += [marker.args[0] for marker in markers if _version(marker.meta["example_value"])]
    if written:
        raise CaptureError(f"it writes to {written[0].name} in place, which the code around it may see")


def _is_number(placeholder: fx.Node) -> bool:
    """Whether a Python number is given, of which Dynamo makes a tensor."""
    given = placeholder.meta.get("grapharg")
    return given is not None and not given.is_tensor


def _version(x: Any) -> int:
    return x._version if has_tangent(x) else 0


def _set_tangents(mode: OpByOp, outs: Sequence[tuple[Tensor, Tensor, bool]]) -> None:
    """Give new tensors their tangents. Where ``y`` and ``y.detach()`` share memory, so do their tangents."""
    sharing = Counter(key_of(plain(leaf)) for leaf, *_ in outs)
    without = []
    for leaf, dot, _ in outs:
        if sharing[key_of(plain(leaf))] == 1 or plain(dot).any():
            mode.set_tangent(leaf, dot)
        else:
            without.append((leaf, dot))
    for leaf, dot in without:
        if not mode.shadowed(leaf):
            mode.set_tangent(leaf, dot)
        elif (seen := mode.tangent(plain(leaf))) is not None and seen.any():
            mode.stop(leaf)


def _same_storage(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


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


def _checkpoints() -> list[Any]:
    """The checkpoints whose saved-tensor hooks are the innermost ones, innermost first."""
    frames: list[Any] = []
    taken: list[Any] = []
    try:
        while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
            frame = _frame_of(hooks[0])
            if frame is None:
                break
            frames.append(frame)
            taken.append(hooks)
            torch._C._autograd._pop_saved_tensors_default_hooks()
    finally:
        for hooks in reversed(taken):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
    return frames


def _frame_of(pack: Callable[..., Any]) -> Any:
    if getattr(pack, "__module__", "") != "torch.utils.checkpoint":
        return None
    return inspect.getclosurevars(pack).nonlocals.get("frame")


@contextmanager
def _hooks_taken_off(count: int) -> Iterator[None]:
    """Without the innermost saved-tensor hooks."""
    taken = []
    for _ in range(count):
        taken.append(torch._C._autograd._top_saved_tensors_default_hooks(True))
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for hooks in reversed(taken):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
