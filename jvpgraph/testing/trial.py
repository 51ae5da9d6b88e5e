"""The comparisons of one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jvpgraph.api import DualModule
from jvpgraph.dual_forward import dual_forward
from jvpgraph.errors import UnsupportedOp
from jvpgraph.op_by_op import OpByOp
from jvpgraph.precision import widened as dtype_of_tangent
from jvpgraph.rules.apply import has_tangent
from jvpgraph.testing.call import Call, active_leaves
from jvpgraph.testing.oracle import Event, event_distance, oracle_of, watched
from jvpgraph.testing.report import Comparison, Deviation, JvpCheck
from jvpgraph.testing.tolerances import ROUNDINGS, distance, norm, real_dtype, rtol_of, widened
from jvpgraph.tree import leaves

__all__ = ["Trial", "_op_by_op"]


class Trial:
    """The comparisons of one call, noted in ``report``."""

    def __init__(self, call: Call, dual: DualModule, rtol: float | None, atol: float, generator: torch.Generator):
        self.call, self.dual, self.atol, self.generator = call, dual, atol, generator
        self.events, dtype, note = _op_by_op(call)
        self.oracle = oracle_of(call, dtype)
        self.rtol = rtol if rtol is not None else rtol_of(dtype)
        compiler = dual._dual.settings.compiler
        self.report = JvpCheck(type(call.model).__name__, dtype, compiler, self.oracle.source)
        self.report.notes += [text for text in (self.oracle.note, note) if text]

    def run(self) -> None:
        call = self.call
        own = active_leaves(call())
        out, out_dot = self.jvp(call.dots)
        tolerance, precision = self.value_tolerance(), self.dual._dual.settings.config.tangent_precision
        for path, y in own.items():
            got = out.get(path)
            self.compare("value", path, got, y, tolerance)
            if got is not None and got.requires_grad != y.requires_grad:
                self.note("autograd", path)
        for path, wanted in self.oracle.dot.items():
            got = out_dot.get(path)
            self.compare("tangent", path, got, wanted, max(self.rtol, self.oracle.rtol))
            if got is not None and (got.requires_grad or got.dtype != dtype_of_tangent(own[path].dtype, precision)):
                self.note("tangent", path)
        if not all(c.right for c in self.report.comparisons if c.what == "tangent"):
            self.report.deviation = self.first_deviation()
        self.compare_gradients(own, out)
        self.compare_linearity(out_dot)

    def jvp(self, dots: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        out, out_dot = self.dual._dual(self.call.args, self.call.kwargs, dots)
        return active_leaves(out), active_leaves(out_dot)

    def value_tolerance(self) -> float:
        """How far the primal may be from the model's own output."""
        settings = self.dual._dual.settings
        if not settings.compiles:
            return 0.0
        if settings.compiler != "eager" or any(r.swapped for r in self.dual.reports):
            return self.rtol
        call = self.call
        tensors = [*call.model.parameters(), *call.model.buffers(), *(x for _, x in leaves((call.args, call.kwargs)))]
        dtypes = {self.report.dtype, *(real_dtype(x.dtype) for x in tensors if has_tangent(x))}
        return min(self.rtol, ROUNDINGS * max(torch.finfo(dtype).eps for dtype in dtypes))

    def compare(self, what: str, where: str, got: Tensor | None, wanted: Tensor, tolerance: float) -> None:
        error = float("inf") if got is None else distance(got, wanted, self.atol)
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
        scale = max((float(norm(w)) for w in wanted if w is not None), default=0.0)
        for name, g, w in zip(named, got, wanted):
            if g is None and w is None:
                continue
            w = torch.zeros_like(named[name]) if w is None else w
            g = torch.zeros_like(named[name]) if g is None else g
            # Relative to the largest one: a bias before a softmax has no gradient but rounding.
            error = distance(g, w, self.atol, scale)
            self.report.comparisons.append(Comparison("gradient", name, error, self.rtol))

    def compare_linearity(self, out_dot: dict[str, Tensor]) -> None:
        v = self.call.dots
        w = {path: self.random_like(x) * (norm(x) / max(x.numel(), 1) ** 0.5).to(x.dtype) for path, x in v.items()}
        at_w = self.jvp(w)[1]
        mixed = self.jvp({path: 0.6 * v[path] - 1.7 * w[path] for path in v})[1]
        half = self.jvp({path: v[path] / 2 for path in v})[1]
        for path, dot in out_dot.items():
            expected = 0.6 * widened(dot) - 1.7 * widened(at_w[path])
            self.compare("linearity", path, mixed[path], expected, self.rtol)
            self.compare("scaling", path, half[path], widened(dot) / 2, 4 * torch.finfo(dot.dtype).eps)

    def random_like(self, x: Tensor) -> Tensor:
        parts = (*x.shape, 2) if x.is_complex() else x.shape
        drawn = torch.randn(parts, generator=self.generator, dtype=torch.float64)
        return (torch.view_as_complex(drawn) if x.is_complex() else drawn).to(x)

    def first_deviation(self) -> Deviation | None:
        """The innermost module that takes right tangents and gives, or passes to a child, wrong ones."""
        before = 0.0
        stack: list[Event] = []
        last = "its beginning"  # what the innermost module did last
        pairs = list(zip(self.events, self.oracle.events))
        for mine, theirs in pairs:
            if (mine.module, mine.leaving) != (theirs.module, theirs.leaving):
                break  # the float64 copy takes another way through the model's Python
            error = max((event_distance(m, t) for m, t in zip(mine.dots, theirs.dots)), default=0.0)
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


def _op_by_op(call: Call) -> tuple[list[Event], torch.dtype, str]:
    """Events of an op-by-op run, the narrowest floating type of its active ops, and why there are none."""
    narrowest = [real_dtype(x_dot.dtype) for x_dot in call.dots.values()]

    def observe(op: Any, out: Any, dot: Any) -> None:
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
                narrowest.append(real_dtype(x.dtype))

    mode = OpByOp(observe)

    def tangent(x: Tensor) -> Tensor | None:
        dot = mode.tangent(x)
        return None if dot is None else dot.clone()

    note, events = "", []
    try:
        with torch.no_grad(), mode, watched(call.model, tangent) as events:
            dual_forward(call.model)(call.args, call.kwargs, call.dots)
    except UnsupportedOp as error:
        note = f"no module can be named, as the model does not run op by op: {error.nodes[0]}"
    return events, max(narrowest, key=rtol_of), note
