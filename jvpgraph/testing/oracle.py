"""What is right: forward AD of a float64 copy where central differences bear it out, else the differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from jvpgraph.testing.call import Call, Detached, InFloat64, active_leaves
from jvpgraph.testing.tolerances import DIFFERENCES_RTOL, FORWARD_AD_RTOL, STEPS, distance

__all__ = ["Event", "event_distance", "oracle_of", "watched"]


@dataclass(frozen=True)
class Event:
    """A module is entered, or left."""

    module: str
    kind: str  # the class
    leaving: bool
    dots: tuple[Any, ...]  # tangents of its floating inputs, or outputs; None: zero


@contextmanager
def watched(model: nn.Module, tangent: Callable[[Tensor], Tensor | None]) -> Iterator[list[Event]]:
    """A list that fills with the events of the run in this context."""
    events: list[Event] = []

    def note(name: str, module: nn.Module, leaving: bool, tree: Any) -> None:
        dots = tuple(tangent(x) for x in active_leaves(tree).values())
        events.append(Event(name, type(module).__name__, leaving, dots))

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
class Oracle:
    value: dict[str, Tensor]
    dot: dict[str, Tensor]
    source: str
    events: list[Event]
    rtol: float  # its own error
    note: str = ""


def oracle_of(call: Call, dtype: torch.dtype) -> Oracle:
    """The oracle for a model whose narrowest active type is ``dtype``."""
    wide = call.in_float64()
    # A float64 model may make constants in float32: they are part of what it computes.
    casts = nullcontext() if dtype == torch.float64 else InFloat64()
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), casts, warnings.catch_warnings():
        # torch scripts decompositions of its own on the first forward AD, and says that this is deprecated
        warnings.filterwarnings("ignore", ".torch.jit.script", DeprecationWarning)
        slopes = _differences(wide)
        try:
            exact = _forward_ad(wide)
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            return _noted(slopes, f"PyTorch's forward AD does not take this model: {reason}")
    apart = max((distance(exact.dot[path], slopes.dot[path]) for path in exact.dot), default=0.0)
    if apart > FORWARD_AD_RTOL + 10 * slopes.rtol:
        return _noted(slopes, f"PyTorch's forward AD is not trusted: it is {apart:.1e} away from the differences")
    return exact


def _noted(oracle: Oracle, note: str) -> Oracle:
    return Oracle(oracle.value, oracle.dot, oracle.source, oracle.events, oracle.rtol, note)


def _forward_ad(wide: Call) -> Oracle:
    def tangent(x: Tensor) -> Tensor | None:
        dot = forward_ad.unpack_dual(x).tangent
        return None if dot is None else dot.clone()

    def dual(path: str, leaf: Any) -> Any:
        if path not in wide.dots:
            return leaf
        return forward_ad.make_dual(leaf.contiguous(), wide.dots[path])  # PyTorch refuses expanded tensors

    with forward_ad.dual_level(), watched(wide.model, tangent) as events:
        out = active_leaves(wide(dual))
        dots = {path: tangent(y) for path, y in out.items()}
        values = {path: forward_ad.unpack_dual(y).primal.clone() for path, y in out.items()}
    dense = {path: torch.zeros_like(values[path]) if d is None else d for path, d in dots.items()}
    return Oracle(values, dense, "forward AD", events, rtol=0.0)


def _differences(wide: Call) -> Oracle:
    """The better of two extrapolations of central differences at h, h/2 and h/4, each good to order h**6."""

    detached: list[Tensor] = []
    with Detached(detached, first=True):
        values = {path: y.clone() for path, y in active_leaves(wide()).items()}

    def run(h: float) -> tuple[dict[str, Tensor], list[Event]]:
        with watched(wide.model, torch.clone) as events, Detached(detached, first=False):
            out = wide(lambda path, leaf: leaf + h * wide.dots[path] if path in wide.dots else leaf)
        return {path: y.clone() for path, y in active_leaves(out).items()}, events

    def extrapolated(h: float) -> Oracle:
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
            events.append(Event(event.module, event.kind, event.leaving, dots))
        spread = max((distance(fine, best) for best, fine in outs.values()), default=0.0)
        return Oracle({}, {path: best for path, (best, _) in outs.items()}, "differences", events, spread)

    best = min((extrapolated(h) for h in STEPS), key=lambda found: found.rtol)
    return Oracle(values, best.dot, best.source, best.events, max(best.rtol, DIFFERENCES_RTOL))


def event_distance(got: Tensor | None, wanted: Tensor | None) -> float:
    if got is None and wanted is None:
        return 0.0
    got = torch.zeros_like(wanted) if got is None else got  # type: ignore[arg-type]
    return distance(got, torch.zeros_like(got) if wanted is None else wanted)
