"""How far apart two results are, and may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DIFFERENCES_RTOL",
    "FORWARD_AD_RTOL",
    "ROUNDINGS",
    "RTOL",
    "STEPS",
    "WIDE",
    "distance",
    "norm",
    "real_dtype",
    "rtol_of",
    "widened",
]


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


WIDE = {
    **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float64),
    torch.complex64: torch.complex128,
}


def widened(leaf: Any) -> Any:
    return leaf.detach().to(WIDE.get(leaf.dtype, leaf.dtype)) if isinstance(leaf, Tensor) else leaf


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype


def rtol_of(dtype: torch.dtype) -> float:
    return RTOL.get(real_dtype(dtype), max(RTOL.values()))


def norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(widened(x))


def distance(got: Tensor, wanted: Tensor, atol: float = 0.0, scale: float | None = None) -> float:
    """``|got - wanted| / |wanted|``, or relative to ``scale``; 0 within ``atol`` per element."""
    if got.shape != wanted.shape:
        return float("inf")
    apart = float(norm(widened(got) - widened(wanted)))
    if apart <= atol * max(got.numel(), 1) ** 0.5:
        return 0.0
    size = float(norm(wanted)) if scale is None else scale
    return apart / size if size else float("inf")
