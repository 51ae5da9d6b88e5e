"""Checking a transformed model against derivatives that share nothing with this package.

    print(check_jvp(model, (x, t), tangents={"x": x_dot, "t": t_dot}))

The oracle is a float64 copy of the model with the math attention: PyTorch's forward AD of that copy if it exists
and agrees with central differences, otherwise the differences. Casts to narrower types inside the model are float64
in the copy, so their cost counts as rounding, for which the tolerance leaves room.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from jvpgraph.api import DualModule, transform
from jvpgraph.backend import Backend
from jvpgraph.dual_forward import dual_forward
from jvpgraph.errors import JvpgraphError, UnsupportedOp
from jvpgraph.op_by_op import OpByOp
from jvpgraph.rules.apply import has_tangent
from jvpgraph.structure import leaves, map_leaves
from jvpgraph.tangents import Inputs, match_tangents

__all__ = ["RTOL", "Comparison", "Deviation", "JvpCheck", "JvpMismatch", "check_jvp", "float64_tangent"]

RTOL = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Default relative tolerance by the narrowest type on the tangent path. A transformer's errors measure some
tens of roundings (2e-16, 1e-7, 1e-3, 8e-3), and a thousand where a time of 1000 enters sines in float32."""

ROUNDINGS = 64
"""The most roundings that lie between two runs of the same ops of a model in different layouts."""

DIFFERENCES_RTOL = 1e-6
"""Ten times the relative error of extrapolated central differences in float64."""

FORWARD_AD_RTOL = 1e-4
"""Beyond this distance from the differences, forward AD is not trusted."""

STEPS = (1e-3, 1e-5)
"""Step sizes of the differences, in units of the tangents: the first for smooth models, the second for fast ones (a
time in [0, 1] that an embedding multiplies by 1000). The one whose extrapolation converged better counts."""


class JvpMismatch(JvpgraphError, AssertionError):
    """The transformed model is not right; ``report`` and the message say where."""

    def __init__(self, report: JvpCheck):
        self.report = report
        super().__init__(str(report))

    def __reduce__(self) -> Any:
        return type(self), (self.report,)


@dataclass(frozen=True)
class Comparison:
    """One comparison: ``|got - wanted| <= tolerance * |wanted|`` in the Euclidean norm of a leaf."""

    what: str  # "value", "tangent", "linearity", "scaling", "gradient", "autograd"
    where: str  # the output leaf by its dotted path, or the parameter
    error: float  # relative; NaN where something is not finite, infinite where shapes or types differ
    tolerance: float

    @property
    def right(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        where = self.where if len(self.where) <= 40 else "..." + self.where[-37:]
        verdict = "" if self.right else "  WRONG"
        return f"{self.what:10s} {where:40s} error {self.error:8.1e}  tolerance {self.tolerance:7.0e}{verdict}"


@dataclass(frozen=True)
class Deviation:
    """Where a tangent first departs from the oracle when the model runs op by op."""

    module: str  # dotted name and class of the module in whose code it happens
    place: str  # "its output", or between which of its children
    error: float  # relative, of the first tangent that deviates
    before: float  # the largest relative error up to there

    def __str__(self) -> str:
        return f"{self.module}: {self.place} (error {self.error:.1e}, before that at most {self.before:.1e})"


@dataclass
class JvpCheck:
    """What :func:`check_jvp` compared. Printing it gives a table."""

    model: str
    dtype: torch.dtype  # the narrowest type on the tangent path
    backend: str
    oracle: str  # "forward AD" or "differences"
    comparisons: list[Comparison] = field(default_factory=list)
    deviation: Deviation | None = None  # looked for only if a tangent is wrong
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(c.right for c in self.comparisons)

    @property
    def wrong(self) -> list[Comparison]:
        return [c for c in self.comparisons if not c.right]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        verdict = "right" if self.passed else f"{len(self.wrong)} of {len(self.comparisons)} comparisons are WRONG"
        lines = [f"{self.model} in {dtype}, backend {self.backend}, against {self.oracle} in float64: {verdict}"]
        lines += [f"  {c}" for c in self._shown()]
        if self.deviation is not None:
            lines.append(f"  first deviation: {self.deviation}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _shown(self) -> list[Comparison]:
        """All comparisons, but of the gradients that are right only the worst."""
        gradients = [c for c in self.comparisons if c.what == "gradient" and c.right]
        worst = max(gradients, key=lambda c: c.error, default=None)
        return [c for c in self.comparisons if c.what != "gradient" or not c.right or c is worst]


def check_jvp(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    tangents: Mapping[str, Any] | None = None,
    *,
    backend: str | Backend = "inductor",
    rtol: float | None = None,
    atol: float = 0.0,
    seed: int = 0,
) -> JvpCheck:
    """Check that ``transform(model)`` is right for these inputs; for tests, as the model runs twenty times.

    Compared are

    * the primal with the model's own output: bit for bit with backend "op_by_op", which makes the same calls as the
      model; within :data:`ROUNDINGS` of the narrowest type with "eager" if no attention was replaced, since a graph
      passes its tensors in other layouts, for which a processor may round differently; otherwise within ``rtol``;
    * the tangent with the float64 oracle;
    * the tangent at 0.6 v - 1.7 w with those at v and w, and the tangent at v/2 with half of the one at v, which is
      exact in binary arithmetic;
    * the gradients of a random projection of the output, for every parameter that requires one, with those of
      the model itself, relative to the largest of them.

    Args:
        model: any nn.Module, or a transformed one, whose backend and settings are then checked. It must not draw
            random numbers, so dropout has to be in eval mode.
        args, kwargs: the model's arguments; floating tensors in any type.
        tangents: as for the transformed model: name -> tensor of its input's shape, dtype and device.
        backend: as for ``transform``.
        rtol: relative tolerance of all comparisons, normwise per leaf; default: :data:`RTOL` of the narrowest
            floating type in which an active op of the model computes, after casts and autocast.
        atol: absolute tolerance on the root mean square deviation of a leaf.
        seed: for the second tangent and the projection.

    Returns:
        The report, in which everything is right.

    Raises:
        JvpMismatch: something deviates. The report is its message; if a tangent is wrong, it names the first
            module, in order of execution, whose tangents are right on the way in and wrong on the way out.
        ValueError: tangents do not fit the inputs, or the model is random.
        UnsupportedOp, CaptureError: as raised by the transformed model.
    """
    dual = model if isinstance(model, DualModule) else transform(model, backend=backend)
    if isinstance(model, DualModule):
        model = model.model
    call = _call_of(model, args, kwargs, tangents)
    trial = _Trial(call, dual, rtol, atol, torch.Generator().manual_seed(seed))
    _refuse_random(call)
    trial.run()
    if not trial.report.passed:
        raise JvpMismatch(trial.report)
    return trial.report


def float64_tangent(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    tangents: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """The oracle of :func:`check_jvp` by itself.

    Returns:
        Outputs and tangents, in float64 or complex128, by the dotted path of the output leaf ("" for a bare
        tensor), and where they come from: "forward AD" or "differences".
    """
    call = _call_of(model, args, kwargs, tangents)
    found = _oracle(call, _op_by_op(call)[1])
    return found.value, found.dot, found.source


# ------------------------------------------------------------------------------------------- one call


@dataclass(frozen=True)
class _Call:
    """A model, its arguments, and tangents by the path of their input."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dots: dict[str, Tensor]

    def __call__(self, replace: Callable[[str, Any], Any] = lambda path, leaf: leaf) -> Any:
        return self.model(*map_leaves(self.args, replace, "args"), **map_leaves(self.kwargs, replace, "kwargs"))

    def in_float64(self) -> _Call:
        model = copy.deepcopy(self.model)
        model.requires_grad_(False)._apply(_widened)
        for module in model.modules():  # tensors that are neither parameters nor buffers
            vars(module).update({k: _widened(v) for k, v in vars(module).items() if isinstance(v, Tensor)})
        args, kwargs = (map_leaves(tree, lambda _, leaf: _widened(leaf)) for tree in (self.args, self.kwargs))
        return _Call(model, args, kwargs, {path: _widened(dot) for path, dot in self.dots.items()})


def _call_of(model: nn.Module, args: Any, kwargs: Any, tangents: Any) -> _Call:
    args, kwargs = tuple(args), dict(kwargs or {})
    return _Call(model, args, kwargs, match_tangents(tangents or {}, Inputs.of(model, args, kwargs)))


WIDE = {
    **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float64),
    torch.complex64: torch.complex128,
}
CASTS = {Tensor.float: Tensor.double, Tensor.bfloat16: Tensor.double, Tensor.half: Tensor.double}


def _widened(leaf: Any) -> Any:
    return leaf.detach().to(WIDE.get(leaf.dtype, leaf.dtype)) if isinstance(leaf, Tensor) else leaf


class _InFloat64(TorchFunctionMode):
    """What the model asks for in a narrower type, it gets in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(WIDE.get(x, x) if isinstance(x, torch.dtype) else x for x in args)
        kwargs = {k: WIDE.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return CASTS.get(func, func)(*args, **kwargs)


class _Detached(TorchFunctionMode):
    """Stop-gradients stop differences too: ``x.detach()`` is what it was in the first run under this mode."""

    def __init__(self, known: list[Tensor], first: bool):
        super().__init__()
        self._known, self._first, self._count = known, first, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in DETACHING:
            return out
        if self._first:
            self._known.append(out.clone())
        self._count += 1
        return self._known[self._count - 1].clone()


DETACHING = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


def _active_leaves(out: Any) -> dict[str, Tensor]:
    return {path: x for path, x in leaves(out) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())}


def _refuse_random(call: _Call) -> None:
    def sample(seed: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            return _active_leaves(call())

    a, b = sample(1), sample(2)
    random = [path for path in a if _distance(a[path], b[path]) > _rtol(a[path].dtype)]
    if random:
        raise ValueError(
            f"the model draws random numbers: its output {random[0]!r} depends on torch's seed. "
            "Call model.eval() to switch dropout off, or pass the noise in as an input."
        )


# ------------------------------------------------------------------------------------------ the oracle


@dataclass(frozen=True)
class _Event:
    """A module is entered, or left."""

    module: str
    kind: str  # the class
    leaving: bool
    dots: tuple[Any, ...]  # tangents of its floating inputs, or outputs; None: zero


@contextmanager
def _watched(model: nn.Module, tangent: Callable[[Tensor], Tensor | None]) -> Iterator[list[_Event]]:
    """A list that fills with the events of the run in this context."""
    events: list[_Event] = []

    def note(name: str, module: nn.Module, leaving: bool, tree: Any) -> None:
        dots = tuple(tangent(x) for x in _active_leaves(tree).values())
        events.append(_Event(name, type(module).__name__, leaving, dots))

    def entering(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: note(name, module, False, (args, kwargs))

    def leaving(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, out: note(name, module, True, out)

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(entering(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leaving(name), with_kwargs=True))
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Oracle:
    value: dict[str, Tensor]
    dot: dict[str, Tensor]
    source: str
    events: list[_Event]
    rtol: float  # its own error
    note: str = ""


def _oracle(call: _Call, dtype: torch.dtype) -> _Oracle:
    """The oracle for a model whose narrowest active type is ``dtype``."""
    wide = call.in_float64()
    # A float64 model may make constants in float32: they are part of what it computes.
    casts = nullcontext() if dtype == torch.float64 else _InFloat64()
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), casts, warnings.catch_warnings():
        # torch scripts decompositions of its own on the first forward AD, and says that this is deprecated
        warnings.filterwarnings("ignore", ".torch.jit.script", DeprecationWarning)
        slopes = _differences(wide)
        try:
            exact = _forward_ad(wide)
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            return _noted(slopes, f"PyTorch's forward AD does not take this model: {reason}")
    apart = max((_distance(exact.dot[path], slopes.dot[path]) for path in exact.dot), default=0.0)
    if apart > FORWARD_AD_RTOL + 10 * slopes.rtol:
        return _noted(slopes, f"PyTorch's forward AD is not trusted: it is {apart:.1e} away from the differences")
    return exact


def _noted(oracle: _Oracle, note: str) -> _Oracle:
    return _Oracle(oracle.value, oracle.dot, oracle.source, oracle.events, oracle.rtol, note)


def _forward_ad(wide: _Call) -> _Oracle:
    def tangent(x: Tensor) -> Tensor | None:
        dot = forward_ad.unpack_dual(x).tangent
        return None if dot is None else dot.clone()

    def dual(path: str, leaf: Any) -> Any:
        if path not in wide.dots:
            return leaf
        return forward_ad.make_dual(leaf.contiguous(), wide.dots[path])  # PyTorch refuses expanded tensors

    with forward_ad.dual_level(), _watched(wide.model, tangent) as events:
        out = _active_leaves(wide(dual))
        dots = {path: tangent(y) for path, y in out.items()}
        values = {path: forward_ad.unpack_dual(y).primal.clone() for path, y in out.items()}
    dense = {path: torch.zeros_like(values[path]) if d is None else d for path, d in dots.items()}
    return _Oracle(values, dense, "forward AD", events, rtol=0.0)


def _differences(wide: _Call) -> _Oracle:
    """The better of two extrapolations of central differences at h, h/2 and h/4, each good to order h**6."""

    detached: list[Tensor] = []
    with _Detached(detached, first=True):
        values = {path: y.clone() for path, y in _active_leaves(wide()).items()}

    def run(h: float) -> tuple[dict[str, Tensor], list[_Event]]:
        with _watched(wide.model, torch.clone) as events, _Detached(detached, first=False):
            out = wide(lambda path, leaf: leaf + h * wide.dots[path] if path in wide.dots else leaf)
        return {path: y.clone() for path, y in _active_leaves(out).items()}, events

    def extrapolated(h: float) -> _Oracle:
        steps = (h, h / 2, h / 4)
        runs = [(run(step), run(-step)) for step in steps]

        def slope(ahead_and_behind: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            d = [(ahead - behind) / (2 * s) for s, (ahead, behind) in zip(steps, ahead_and_behind)]
            coarse, fine = (4 * d[1] - d[0]) / 3, (4 * d[2] - d[1]) / 3
            return (16 * fine - coarse) / 15, fine

        outs = {path: slope((a[0][path], b[0][path]) for a, b in runs) for path in runs[0][0][0]}
        events = []
        for i, event in enumerate(runs[0][0][1]):
            places = range(len(event.dots))
            dots = tuple(slope((a[1][i].dots[k], b[1][i].dots[k]) for a, b in runs)[0] for k in places)
            events.append(_Event(event.module, event.kind, event.leaving, dots))
        spread = max((_distance(fine, best) for best, fine in outs.values()), default=0.0)
        return _Oracle({}, {path: best for path, (best, _) in outs.items()}, "differences", events, spread)

    best = min((extrapolated(h) for h in STEPS), key=lambda found: found.rtol)
    return _Oracle(values, best.dot, best.source, best.events, max(best.rtol, DIFFERENCES_RTOL))


# -------------------------------------------------------------------------------------- the comparisons


class _Trial:
    """The comparisons of one call, noted in ``report``."""

    def __init__(self, call: _Call, dual: DualModule, rtol: float | None, atol: float, generator: torch.Generator):
        self.call, self.dual, self.atol, self.generator = call, dual, atol, generator
        self.events, dtype, note = _op_by_op(call)
        self.oracle = _oracle(call, dtype)
        self.rtol = rtol if rtol is not None else _rtol(dtype)
        compiler = dual._dual.settings.compiler
        self.report = JvpCheck(type(call.model).__name__, dtype, compiler, self.oracle.source)
        self.report.notes += [text for text in (self.oracle.note, note) if text]

    def run(self) -> None:
        call = self.call
        own = _active_leaves(call())
        out, out_dot = self.jvp(call.dots)
        tolerance = self.value_tolerance()
        for path, y in own.items():
            got = out.get(path)
            self.compare("value", path, got, y, tolerance)
            if got is not None and got.requires_grad != y.requires_grad:
                self.note("autograd", path)
        for path, wanted in self.oracle.dot.items():
            got = out_dot.get(path)
            self.compare("tangent", path, got, wanted, max(self.rtol, self.oracle.rtol))
            if got is not None and (got.requires_grad or got.dtype != own[path].dtype):
                self.note("tangent", path)
        if not all(c.right for c in self.report.comparisons if c.what == "tangent"):
            self.report.deviation = self.first_deviation()
        self.compare_gradients(own, out)
        self.compare_linearity(out_dot)

    def jvp(self, dots: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        out, out_dot = self.dual._dual(self.call.args, self.call.kwargs, dots)
        return _active_leaves(out), _active_leaves(out_dot)

    def value_tolerance(self) -> float:
        """How far the primal may be from the model's own output."""
        settings = self.dual._dual.settings
        if not settings.compiles:
            return 0.0
        if settings.compiler != "eager" or any(r.swapped for r in self.dual.reports):
            return self.rtol
        call = self.call
        tensors = [*call.model.parameters(), *call.model.buffers(), *(x for _, x in leaves((call.args, call.kwargs)))]
        dtypes = {self.report.dtype, *(_real(x.dtype) for x in tensors if has_tangent(x))}
        return min(self.rtol, ROUNDINGS * max(torch.finfo(dtype).eps for dtype in dtypes))

    def compare(self, what: str, where: str, got: Tensor | None, wanted: Tensor, tolerance: float) -> None:
        error = float("inf") if got is None else _distance(got, wanted, self.atol)
        self.report.comparisons.append(Comparison(what, where or "output", error, tolerance))

    def note(self, what: str, where: str) -> None:
        """Something that is wrong without being a number."""
        self.report.comparisons.append(Comparison(what, where or "output", float("inf"), 0.0))

    def compare_gradients(self, own: dict[str, Tensor], out: dict[str, Tensor]) -> None:
        named = {name: p for name, p in self.call.model.named_parameters() if p.requires_grad}
        paths = [path for path, y in own.items() if y.requires_grad and path in out and out[path].requires_grad]
        if not named or not paths:
            return
        cotangents = [self.random_like(own[path]) for path in paths]
        wanted, got = (
            torch.autograd.grad([y[path] for path in paths], list(named.values()), cotangents, allow_unused=True)
            for y in (own, out)
        )
        scale = max((float(_norm(w)) for w in wanted if w is not None), default=0.0)
        for name, g, w in zip(named, got, wanted):
            if g is None and w is None:
                continue
            w = torch.zeros_like(named[name]) if w is None else w
            g = torch.zeros_like(named[name]) if g is None else g
            # Relative to the largest one: a bias before a softmax has no gradient but rounding.
            error = _distance(g, w, self.atol, scale)
            self.report.comparisons.append(Comparison("gradient", name, error, self.rtol))

    def compare_linearity(self, out_dot: dict[str, Tensor]) -> None:
        v = self.call.dots
        w = {path: self.random_like(x) * (_norm(x) / max(x.numel(), 1) ** 0.5).to(x.dtype) for path, x in v.items()}
        at_w = self.jvp(w)[1]
        mixed = self.jvp({path: 0.6 * v[path] - 1.7 * w[path] for path in v})[1]
        half = self.jvp({path: v[path] / 2 for path in v})[1]
        for path, dot in out_dot.items():
            expected = 0.6 * _widened(dot) - 1.7 * _widened(at_w[path])
            self.compare("linearity", path, mixed[path], expected, self.rtol)
            self.compare("scaling", path, half[path], _widened(dot) / 2, 4 * torch.finfo(dot.dtype).eps)

    def random_like(self, x: Tensor) -> Tensor:
        parts = (*x.shape, 2) if x.is_complex() else x.shape
        drawn = torch.randn(parts, generator=self.generator, dtype=torch.float64)
        return (torch.view_as_complex(drawn) if x.is_complex() else drawn).to(x)

    def first_deviation(self) -> Deviation | None:
        """The innermost module that takes right tangents and gives, or passes to a child, wrong ones."""
        before = 0.0
        stack: list[_Event] = []
        last = "its beginning"  # what the innermost module did last
        pairs = list(zip(self.events, self.oracle.events))
        for mine, theirs in pairs:
            if (mine.module, mine.leaving) != (theirs.module, theirs.leaving):
                break  # the float64 copy takes another way through the model's Python
            error = max((_event_distance(m, t) for m, t in zip(mine.dots, theirs.dots)), default=0.0)
            if not error <= max(self.rtol, self.oracle.rtol):
                owner = mine if mine.leaving or not stack else stack[-1]
                if mine.leaving:
                    place = "its output" if last == "its beginning" else f"its output, after {last}"
                else:
                    place = f"between {last} and {mine.module or 'the model'}"
                return Deviation(f"{owner.module or 'the model'} ({owner.kind})", place, error, before)
            before = max(before, error)
            if mine.leaving:
                stack.pop()
                last = mine.module
            else:
                stack.append(mine)
                last = "its beginning"
        if self.events:
            self.report.notes.append(
                "op by op, the tangent of every module is right: the compiled graph differs. "
                'Try backend="eager", and Config(recognize_attention=False) or Config(swap_attention=False).'
            )
        return None


def _op_by_op(call: _Call) -> tuple[list[_Event], torch.dtype, str]:
    """Events of an op-by-op run, the narrowest floating type of its active ops, and why there are none."""
    narrowest = [_real(x_dot.dtype) for x_dot in call.dots.values()]

    def observe(op: Any, out: Any, dot: Any) -> None:
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
                narrowest.append(_real(x.dtype))

    mode = OpByOp(observe)

    def tangent(x: Tensor) -> Tensor | None:
        dot = mode.tangent(x)
        return None if dot is None else dot.clone()

    note, events = "", []
    try:
        with torch.no_grad(), mode, _watched(call.model, tangent) as events:
            dual_forward(call.model)(call.args, call.kwargs, call.dots)
    except UnsupportedOp as error:
        note = f"no module can be named, as the model does not run op by op: {error.nodes[0]}"
    return events, max(narrowest, key=_rtol), note


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype


def _rtol(dtype: torch.dtype) -> float:
    return RTOL.get(_real(dtype), max(RTOL.values()))


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_widened(x))


def _distance(got: Tensor, wanted: Tensor, atol: float = 0.0, scale: float | None = None) -> float:
    """``|got - wanted| / |wanted|``, or relative to ``scale``; 0 within ``atol`` per element."""
    if got.shape != wanted.shape:
        return float("inf")
    apart = float(_norm(_widened(got) - _widened(wanted)))
    if apart <= atol * max(got.numel(), 1) ** 0.5:
        return 0.0
    size = float(_norm(wanted)) if scale is None else scale
    return apart / size if size else float("inf")


def _event_distance(got: Tensor | None, wanted: Tensor | None) -> float:
    if got is None and wanted is None:
        return 0.0
    got = torch.zeros_like(wanted) if got is None else got  # type: ignore[arg-type]
    return _distance(got, torch.zeros_like(got) if wanted is None else wanted)
