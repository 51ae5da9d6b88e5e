"""What is tried with each op, and what becomes of it."""

from __future__ import annotations

import traceback
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import trace_rules
from torch._inductor import config as inductor_config

import jvpgraph
from tests.opinfo.database import LAYOUTS, Call, calls, floating
from tests.opinfo.oracle import Truth, close, error, float_leaves, forward_ad_of, gradients, truth

__all__ = ["PHASES", "VERDICTS", "Case", "Phase", "Verdict", "cases", "examine"]

# In the order of how bad they are. unknown: no oracle; torch: torch.compile itself fails or is wrong; raises: op does.
VERDICTS = ("crash", "wrong", "raw", "torch", "refused", "unknown", "raises", "right")
PACKAGE = Path(jvpgraph.__file__).parent.parent
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}  # at least; and what PyTorch's is off by
NO_GRAPH = ("the model cannot be captured", "the compiler cannot compile")
OWN = (jvpgraph.UnsupportedOp, jvpgraph.CaptureError)

trace_rules.MOD_INLINELIST.add("torch.testing._internal")  # the database's lambdas are user code here
trace_rules.get_mod_inlinelist.cache_clear()


@dataclass(frozen=True)
class Phase:
    """One way to run calls. ``most`` samples of an op, ``subsets`` of them also with one active input at a time."""

    backend: str
    most: int
    subsets: int = 0
    form: str = "call"
    layouts: tuple[str, ...] = LAYOUTS[:1]
    dtype: torch.dtype = torch.float64
    inference: bool = False
    dynamic: bool | None = False
    resized: bool = False
    differentiable: bool = False
    gradients: bool = True


PHASES: dict[str, Phase] = {
    "op_by_op": Phase("op_by_op", 48, subsets=6),
    "op_by_op in place": Phase("op_by_op", 6, form="in place"),
    "op_by_op out=": Phase("op_by_op", 3, form="out", gradients=False),
    "op_by_op layouts": Phase("op_by_op", 3, layouts=LAYOUTS[1:]),
    "op_by_op inference mode": Phase("op_by_op", 8, inference=True),
    "op_by_op complex": Phase("op_by_op", 6, subsets=1, dtype=torch.complex128),
    "op_by_op float32": Phase("op_by_op", 3, dtype=torch.float32),
    "op_by_op bfloat16": Phase("op_by_op", 3, dtype=torch.bfloat16),
    "eager": Phase("eager", 1),
    "eager, more samples": Phase("eager", 4, subsets=1),
    "eager in place": Phase("eager", 1, form="in place"),
    "eager out=": Phase("eager", 1, form="out", gradients=False),
    "eager layouts": Phase("eager", 1, layouts=LAYOUTS[1:]),
    "eager inference mode": Phase("eager", 1, inference=True),
    "eager dynamic=True": Phase("eager", 2, dynamic=True),
    "eager two sizes": Phase("eager", 1, dynamic=None, resized=True),
    "eager complex": Phase("eager", 2, dtype=torch.complex128),
    "eager bfloat16": Phase("eager", 1, dtype=torch.bfloat16),
    "eager differentiable": Phase("eager", 1, differentiable=True, gradients=False),
    "inductor": Phase("inductor", 1, dtype=torch.float32),
}


@dataclass(frozen=True)
class Case:
    """A call, the second size of it where there is one, and which of its tensors are active."""

    call: Call
    active: tuple[int, ...]
    larger: tuple[Tensor, ...] | None = None

    def __str__(self) -> str:
        return f"{self.call}, active {', '.join(f't{i}' for i in self.active)}"


@dataclass(frozen=True)
class Verdict:
    what: str
    why: str = ""


def cases(name: str, phase: Phase) -> Iterator[Case]:
    """The cases of an op in a phase, the same each time."""
    for layout in phase.layouts:
        for i, call in enumerate(calls(name, phase.dtype, phase.form, phase.most, layout)):
            active = tuple(j for j, x in enumerate(call.tensors) if floating(x))
            if not active:
                continue
            larger = _resized(call) if phase.resized else None
            if phase.resized and larger is None:
                continue
            yield Case(call, active, larger)
            if i < phase.subsets and 1 < len(active) < 6:
                yield from (Case(call, (j,), larger) for j in active)


def _resized(call: Call) -> tuple[Tensor, ...] | None:
    """Every size of the most frequent kind doubled, in whichever kind the op takes it."""
    sizes = [n for x in call.tensors for n in x.shape if n > 1]
    for size in sorted(set(sizes), key=lambda n: (-sizes.count(n), n)):
        larger = tuple(_doubled(x, size) for x in call.tensors)
        try:
            out = call.fn(*larger)
        except Exception:
            continue
        if not (hasattr(out, "info") and out.info.any()):  # as from cholesky_ex, which says there that it failed
            return larger
    return None


def _doubled(x: Tensor, size: int) -> Tensor:
    y = x.repeat([2 if n == size else 1 for n in x.shape])
    return y * (1 + 0.1 * _random(y, "doubled")) if floating(x) else y


def _random(like: Tensor, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    wide = torch.complex128 if like.is_complex() else torch.float64
    return torch.randn(like.shape, generator=generator, dtype=wide).to(like.dtype)


def examine(case: Case, phase: Phase) -> Verdict:
    """What becomes of a case."""
    call = case.call
    mode: AbstractContextManager[Any] = torch.inference_mode() if phase.inference else nullcontext()
    for tensors in (call.tensors, case.larger):
        if tensors is None:
            continue
        dots = tuple(_random(x, f"dot{i}") if i in case.active else None for i, x in enumerate(tensors))
        try:
            right = truth(call.fn, tensors, dots)
        except Exception as error:
            return Verdict("raises", _first_line(error))
        inputs, wanted = _with_gradients(call, tensors, phase)
        if phase.differentiable and wanted is None:
            wanted = _wanted_of_tangent(call, tensors, dots)
        with mode:
            verdict = _run(call, inputs, dots, right, wanted, phase)
            if verdict.what == "raw" and (cause := _raised(call, tensors)):
                return Verdict("raises", cause)  # of this layout or dtype, which the oracle does not see
            if verdict == Verdict("wrong", "gradient") and phase.layouts != LAYOUTS[:1]:
                _, wanted = _with_gradients(call, tuple(x.detach().clone().contiguous() for x in tensors), phase)
                verdict = _run(call, inputs, dots, right, wanted, phase)  # equal numbers are sorted as they lie
            if verdict.what == "wrong" and phase.backend == "inductor":
                torch._dynamo.reset()  # Inductor draws other random numbers than eager, with and without tangents
                with inductor_config.patch(fallback_random=True):
                    verdict = _run(call, inputs, dots, right, wanted, phase)
        if verdict.what in ("wrong", "raw") and phase.backend != "op_by_op" and _torch_fails(call, inputs, phase):
            return Verdict("torch", verdict.why)
        if verdict.what == "refused" and verdict.why.startswith(NO_GRAPH) and not _torch_fails(call, inputs, phase):
            return Verdict("raw", f"with tangents only: {verdict.why}")
        if verdict.what != "right":
            return verdict
    return verdict


def _raised(call: Call, tensors: Sequence[Tensor]) -> str:
    """What the plain op raises of these very tensors, or nothing."""
    try:
        call.fn(*(x.detach() for x in tensors))
    except Exception as error:
        return _first_line(error)
    return ""


def _run(
    call: Call, inputs: tuple[Tensor, ...], dots: Any, right: Truth, wanted: list[Tensor | None] | None, phase: Phase
) -> Verdict:
    options: dict[str, Any] = {"backend": phase.backend}
    if phase.backend != "op_by_op":
        options |= {"dynamic": phase.dynamic, "differentiable_tangent": phase.differentiable}
    if phase.differentiable:
        inputs = tuple(x.detach().requires_grad_(floating(x)) for x in inputs)
        dots = tuple(d if d is None else d.requires_grad_() for d in dots)
    torch.manual_seed(0)
    try:
        out, out_dot = jvpgraph.jvp(call.fn, inputs, dots, **options)
    except Exception as error:
        return Verdict("refused" if _ours(error) else "raw", _first_line(error))
    outs, tangents = float_leaves(out), float_leaves(out_dot)
    if len(outs) != len(tangents) or len(outs) != len(right.values):
        return Verdict("wrong", f"{len(outs)} values, {len(tangents)} tangents, {len(right.values)} expected")
    verdict = _compared(call, inputs, dots, outs, tangents, right, phase)
    if verdict.what != "right" or wanted is None:
        return verdict
    wrt = [x for x in inputs if x.requires_grad]
    if phase.differentiable:
        wrt += [d for d in dots if d is not None]
    try:
        got = gradients(tangents if phase.differentiable else outs, wrt)
    except Exception as error:
        return Verdict("refused" if _ours(error) else "raw", f"backward: {_first_line(error)}")
    for g, w in zip(got, wanted):
        if not close(_or_zero(g, w), _or_zero(w, g), max(TOLERANCE.get(x.dtype, 1e-7) for x in inputs)):
            if phase.differentiable and (slopes := _slopes_agree(call, inputs, dots, tangents, got)) is not False:
                return verdict if slopes else Verdict("unknown", "the tangent has no settled derivative")
            return Verdict("wrong", "gradient")
    return verdict


def _slopes_agree(
    call: Call, inputs: Sequence[Tensor], dots: Any, tangents: Sequence[Tensor], got: Sequence[Tensor | None]
) -> bool | None:
    """Whether gradients of the tangents are the slopes of forward AD's, where PyTorch's reverse mode says otherwise.

    None: forward AD's tangents are others (it has none of native_layer_norm's mean), or their slopes do not settle.
    """
    moves = [torch.randn_like(x) for x in (*(x for x in inputs if x.requires_grad), *filter(torch.is_tensor, dots))]

    def along(step: float) -> list[Tensor] | None:
        way = iter(moves)
        moved = [x.detach() + step * next(way) if x.requires_grad else x for x in inputs]
        return forward_ad_of(call.fn, moved, [d if d is None else d.detach() + step * next(way) for d in dots])

    def slope(h: float) -> Tensor | None:
        ahead, behind = along(h), along(-h)
        if ahead is None or behind is None:
            return None
        terms = (((a - b) * _weight(i, a)).sum() for i, (a, b) in enumerate(zip(ahead, behind)))
        return sum(terms, torch.zeros((), dtype=torch.float64)) / (2 * h)

    here, coarse, fine = along(0.0), slope(1e-5), slope(5e-6)
    if here is None or coarse is None or fine is None or not fine.isfinite() or not close(coarse, fine, 1e-4):
        return None
    if not all(close(a, b, 1e-6) for a, b in zip(tangents, here, strict=True)):
        return None
    products = ((g * m).sum() for g, m in zip(got, moves) if g is not None)
    return close(sum(products, torch.zeros_like(fine)), fine, 1e-4)


def _or_zero(x: Tensor | None, other: Tensor | None) -> Tensor:
    return x if x is not None else torch.zeros_like(other) if other is not None else torch.zeros(())


def _compared(
    call: Call, inputs: Sequence[Tensor], dots: Any, outs: Any, tangents: Any, right: Truth, phase: Phase
) -> Verdict:
    least = max(TOLERANCE.get(x.dtype, 0.0) for x in inputs)
    own = forward_ad_of(call.fn, [x.detach().contiguous() for x in inputs], dots) if least else None
    unknown = False
    for i, (y, y_dot) in enumerate(zip(outs, tangents)):
        if not close(y, right.values[i], 10 * least or 1e-9):
            with torch.no_grad():
                torch.manual_seed(0)
                plain = float_leaves(call.fn(*inputs))[i]
            if not close(y, plain, least or 1e-9):
                return Verdict("wrong", f"value {i} is off by {error(y, plain):.1e}")
        candidates = right.tangents[i]
        if not candidates:
            unknown = True
            continue
        off = error(own[i], candidates[0][0]) if own is not None and own[i].shape == candidates[0][0].shape else 0.0
        if not any(close(y_dot, t, max(tolerance, least, 10 * off)) for t, tolerance in candidates):
            zero = "" if bool(y_dot.any()) else ", a silent zero"
            worst = error(y_dot, candidates[0][0]) if y_dot.shape == candidates[0][0].shape else float("inf")
            bad = ", as forward AD is" if right.suspicious else ""
            return Verdict("wrong", f"tangent {i} is off by {worst:.1e}{zero}{bad}")
    return Verdict("unknown" if unknown else "right")


def _with_gradients(
    call: Call, tensors: Sequence[Tensor], phase: Phase
) -> tuple[tuple[Tensor, ...], list[Tensor | None] | None]:
    """The inputs, with gradients where the op has them, and those of the plain op."""
    plain = tuple(x.detach() for x in tensors)
    if not phase.gradients or phase.inference:
        return plain, None
    inputs = tuple(x.detach().requires_grad_(floating(x)) for x in tensors)
    try:
        torch.manual_seed(0)
        outs = float_leaves(call.fn(*inputs))
        return inputs, gradients(outs, [x for x in inputs if x.requires_grad])
    except Exception:
        return plain, None


def _wanted_of_tangent(call: Call, tensors: Sequence[Tensor], dots: Any) -> list[Tensor | None] | None:
    """Gradients of a projection of the tangent by reverse mode alone: <w, J v> is <J' w, v>."""
    if any(x.is_complex() for x in tensors):
        return None
    inputs = [x.detach().requires_grad_(floating(x)) for x in tensors]
    moving = [d if d is None else d.detach().requires_grad_() for d in dots]
    try:
        torch.manual_seed(0)
        outs = [y for y in float_leaves(call.fn(*inputs)) if y.requires_grad]
        active = [x for x, d in zip(inputs, moving) if d is not None]
        total: Any = sum((y * _weight(i, y)).sum() for i, y in enumerate(outs))
        pulled = torch.autograd.grad(total, active, create_graph=True, materialize_grads=True)
        product = sum((g * d).sum() for g, d in zip(pulled, [d for d in moving if d is not None]))
        wrt = [x for x in inputs if x.requires_grad] + [d for d in moving if d is not None]
        return list(torch.autograd.grad(product, wrt, allow_unused=True))
    except Exception:
        return None


def _weight(i: int, y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(y.dtype)


def _torch_fails(call: Call, inputs: tuple[Tensor, ...], phase: Phase) -> bool:
    """Whether plain torch.compile of the same call fails too, or is wrong."""
    compiler = "inductor" if phase.backend == "inductor" else "aot_eager"
    torch._dynamo.reset()
    try:
        if phase.differentiable:
            inputs = tuple(x.detach().requires_grad_(floating(x)) for x in inputs)
        torch.manual_seed(0)
        plain = float_leaves(call.fn(*inputs))
        torch.manual_seed(0)
        compiled = torch.compile(call.fn, backend=compiler, fullgraph=True, dynamic=phase.dynamic)
        outs = float_leaves(compiled(*inputs))
        wrt = [x for x in inputs if x.requires_grad]
        pairs = list(zip(outs, plain)) + list(zip(gradients(outs, wrt), gradients(plain, wrt)))
        return not all(close(_or_zero(a, b), _or_zero(b, a), TOLERANCE.get(phase.dtype, 1e-9)) for a, b in pairs)
    except Exception:
        return True


def _ours(error: Exception) -> bool:
    if isinstance(error, OWN):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def _first_line(error: BaseException) -> str:
    if isinstance(error, jvpgraph.UnsupportedOp):
        return "; ".join(dict.fromkeys(f"{node.op}: {node.reason}" for node in error.nodes))[:300]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    prefix = "" if isinstance(error, OWN) else f"{type(error).__name__}: "
    return (prefix + " ".join(lines[:2]))[:300]


def with_backend(phase: Phase, backend: str) -> Phase:
    return replace(phase, backend=backend)
