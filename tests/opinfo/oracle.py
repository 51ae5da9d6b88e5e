"""What is right: PyTorch's forward AD in float64 where central differences bear it out, and its plain backward.

Forward AD alone will not do: where PyTorch calls an op not differentiable, it returns a zero without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from tests.opinfo.database import floating

__all__ = ["Truth", "close", "error", "float_leaves", "forward_ad_of", "gradients", "truth", "wide"]

Dots = Sequence["Tensor | None"]
STEP = 1e-5
TRUSTED = 1e-5  # two central differences that agree to this, relative to the largest entry, are one
DIFFERENCES = 1e-4  # and this is how far they are from the tangent


@dataclass(frozen=True)
class Truth:
    """Values of the floating outputs, and candidates for each tangent: any of them is right. None: unknown."""

    values: list[Tensor]
    tangents: list[list[tuple[Tensor, float]]]
    suspicious: bool = False  # forward AD and the differences contradict each other


def float_leaves(out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out) if floating(x)]


def wide(x: Any) -> Any:
    """A dense float64 or complex128 copy."""
    if not floating(x):
        return x
    return x.detach().contiguous().to(torch.complex128 if x.is_complex() else torch.float64, copy=True)


def truth(fn: Callable[..., Any], tensors: Sequence[Tensor], dots: Dots) -> Truth:
    """Raises whatever fn raises."""
    tensors, dots = [wide(x) for x in tensors], [d if d is None else wide(d) for d in dots]
    with torch.no_grad():
        outs = _seeded(fn, tensors)
        values = [wide(y) for y in outs]
    analytic = forward_ad_of(fn, tensors, dots)
    pulled = _by_backward(fn, tensors, dots)
    coarse, fine = (_differences(fn, tensors, dots, step, values) for step in (STEP, STEP / 2))

    def additive(i: int, seed: int) -> bool:
        """Whether the slopes in two directions add up to the one between them, as those of a derivative do."""
        rng = torch.Generator().manual_seed(seed)
        others = [d if d is None else torch.randn(d.shape, generator=rng, dtype=d.dtype) for d in dots]
        sums = [d if d is None else d + e for d, e in zip(dots, others)]
        first, second, both = (_differences(fn, tensors, d, STEP, values) for d in (dots, others, sums))
        if first is None or second is None or both is None:
            return True
        return close(first[i] + second[i], both[i], DIFFERENCES)

    tangents: list[list[tuple[Tensor, float]]] = []
    suspicious = False
    for i, value in enumerate(values):
        candidates: list[tuple[Tensor, float]] = []
        a = analytic[i] if analytic is not None else None
        c, f = (None, None) if coarse is None or fine is None else (coarse[i], fine[i])
        settled = c is not None and f is not None and bool(f.isfinite().all()) and close(c, f, TRUSTED)
        known = settled and outs[i].dtype in (torch.float64, torch.complex128)  # else they measure the rounding
        if a is not None and (not known or close(a, f, DIFFERENCES)):
            if known or bool(a.any()):  # a zero that nothing bears out is none
                candidates.append((a, 1e-6))
                if known:  # PyTorch's formula may be the less exact of the two
                    candidates.append((f, 1e-6))
                elif f is not None and pulled is not None and pulled[i].shape == a.shape:  # a kink may have either's
                    candidates.append((torch.where(f.isfinite(), a, pulled[i]), 1e-6))
        elif known and a is not None and bool(a.any()) and not all(additive(i, seed) for seed in range(4)):
            candidates.append((a, 1e-6))  # a tie, as in a median: there is a convention, no derivative
        elif known:
            suspicious = suspicious or a is not None
            candidates.append((f, DIFFERENCES))
        elif a is None and value.numel() == 0:
            candidates.append((value, 0.0))
        tangents.append(candidates)
    return Truth(values, tangents, suspicious)


def _seeded(fn: Callable[..., Any], tensors: Sequence[Any]) -> list[Tensor]:
    torch.manual_seed(0)
    return float_leaves(fn(*tensors))


def forward_ad_of(fn: Callable[..., Any], tensors: Sequence[Tensor], dots: Dots) -> list[Tensor] | None:
    """Tangents of the outputs; None where PyTorch has none."""
    try:
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            duals = [x if d is None else forward_ad.make_dual(x.clone(), d.clone()) for x, d in zip(tensors, dots)]
            pairs = [forward_ad.unpack_dual(y) for y in _seeded(fn, duals)]
            found = [torch.zeros_like(y.primal) if y.tangent is None else y.tangent.clone() for y in pairs]
            return [wide(x) for x in found]
    except (NotImplementedError, RuntimeError):
        return None


def _by_backward(fn: Callable[..., Any], tensors: Sequence[Tensor], dots: Dots) -> list[Tensor] | None:
    """Tangents of the outputs by the backward of the backward; None where PyTorch has none."""
    try:
        inputs = [x if d is None else x.clone().requires_grad_() for x, d in zip(tensors, dots)]
        outs = _seeded(fn, inputs)
        weights = [torch.zeros_like(y, requires_grad=True) for y in outs]
        active = [(x, d) for x, d in zip(inputs, dots) if d is not None]
        recorded = [(y, w) for y, w in zip(outs, weights) if y.requires_grad]
        pulled = torch.autograd.grad(
            *([y for y, _ in recorded], [x for x, _ in active], [w for _, w in recorded]),
            create_graph=True,
            materialize_grads=True,
        )
        found = torch.autograd.grad(pulled, weights, [d for _, d in active], materialize_grads=True)
        return [wide(x) for x in found]
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def _differences(
    fn: Callable[..., Any], tensors: Sequence[Tensor], dots: Dots, step: float, at: Sequence[Tensor]
) -> list[Tensor] | None:
    """Central differences; NaN where the slopes on the two sides of ``at`` differ, as at a kink or a jump."""
    try:
        with torch.no_grad():
            up, down = (
                _seeded(fn, [x.clone() if d is None else x + s * d for x, d in zip(tensors, dots)])
                for s in (step, -step)
            )
    except RuntimeError:
        return None
    slopes = []
    for above, below, here in zip(map(wide, up), map(wide, down), at):
        if not above.shape == below.shape == here.shape:
            slopes.append(torch.full_like(here, torch.nan))
            continue
        slope, bend = (above - below) / (2 * step), (above + below - 2 * here).abs() / step
        smooth = bend <= 1e-2 * (1 + slope.abs().max()) if slope.numel() else bend == 0
        slopes.append(torch.where(smooth, slope, torch.nan))
    return slopes


def close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Relative to the largest finite entry of ``wanted``, at least 1. Where ``wanted`` is not finite, all will do."""
    return got.shape == wanted.shape and got.is_complex() == wanted.is_complex() and error(got, wanted) <= tolerance


def error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = wide(got), wide(wanted)
    got, wanted = got[wanted.isfinite()], wanted[wanted.isfinite()]
    if not wanted.numel():
        return 0.0
    largest = (got - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
    return largest if largest == largest else float("inf")


def gradients(outs: Sequence[Tensor], wrt: Sequence[Tensor]) -> list[Tensor | None]:
    """Of a fixed random projection of the outputs."""
    total: Any = 0.0
    for i, y in enumerate(outs):
        if y.requires_grad:
            w = torch.randn(y.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(y.dtype)
            total = total + (y * w).sum().real.double()
    if not isinstance(total, Tensor):
        return [None] * len(wrt)
    found = torch.autograd.grad(total, wrt, allow_unused=True)
    return [g.to_dense() if g is not None and g.layout is not torch.strided else g for g in found]
