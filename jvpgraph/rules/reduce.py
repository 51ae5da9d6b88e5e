"""Reductions: sums, means, extrema, softmax and what is made of them.

Statistics of half-precision inputs are formed in float32, as ATen's own kernels do. Where several elements
attain an extremum they share its tangent; where the op says which one it took, the tangent is read there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from jvpgraph.rules.pointwise import real
from jvpgraph.rules.registry import jvp, linear

__all__ = ["in_float32"]

aten = torch.ops.aten


def in_float32(x: Tensor) -> Tensor:
    """``x`` in float32, unless it is wider than that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def kept(y: Tensor, x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    """A reduction ``y`` of ``x`` over ``dim`` (none: all), with its reduced dims as size 1."""
    for d in [] if keepdim or not x.dim() else sorted(d % x.dim() for d in dim or range(x.dim())):
        y = y.unsqueeze(d)
    return y


def over(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and zero where y is: so is its gradient there, which that of the quotient alone would make NaN."""
    zero = y == 0
    return torch.where(zero, 0, x / torch.where(zero, 1, y))


linear(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cumsum.default)


@jvp(aten._softmax.default, aten._safe_softmax.default)
def softmax(p, x, dim, _, *, x_dot):
    """p_dot = p * x_dot - p * sum(p * x_dot): a symmetric Jacobian, so ATen's backward kernel is the rule."""
    return aten._softmax_backward_data(x_dot.to(p.dtype), p, dim, p.dtype)


@jvp(aten._log_softmax.default)
def log_softmax(y, x, dim, _, *, x_dot):
    """y_dot = x_dot - sum(p * x_dot). p is not exp(y): in an exponent y's rounding is a factor."""
    return x_dot - (in_float32(x).softmax(dim) * x_dot).sum(dim, keepdim=True)


@jvp(aten.logsumexp.default)
def logsumexp(y, x, dim, keepdim, *, x_dot):
    """y_dot = sum(p * x_dot)."""
    x = in_float32(x)
    y = y if y.dtype == x.dtype else x.logsumexp(dim, keepdim)  # in an exponent half's rounding is a factor
    p = (x - kept(y, x, dim, keepdim)).exp()
    return (p * x_dot).sum(dim, keepdim)


@jvp(aten.logcumsumexp.default)
def logcumsumexp(y, x, dim, *, x_dot):
    """y_dot = sum over j <= i of exp(x_j - y_i) * x_dot_j, for tangents moved to where their real parts are positive.

    The weights add up to 1, so what was added to all tangents is in y_dot as it is. PyTorch's own formula divides by
    exp(max x), which leaves nothing of what is far below.
    """
    if x.dim() == 0 or guard_or_false(x.numel() == 0):
        return x_dot
    x, x_dot = in_float32(x), in_float32(x_dot)
    highest = x.real.amax(dim, keepdim=True)
    x = x - torch.where(highest.isfinite(), highest, 0)  # what all have in common would round the differences
    y = x.logcumsumexp(dim)
    largest = x_dot.abs().amax(dim, keepdim=True)
    shift = torch.where(largest == 0, 1, 2 * largest)
    begun = y.real > -math.inf  # nothing but exp(-inf) up to here
    moved = (x + (x_dot + shift).log()).logcumsumexp(dim) - torch.where(begun, y, 0)
    return torch.where(begun, moved.exp() - shift, 0)


# Second moments
def half_spread(x: Tensor, dim: Any, correction: Any, keepdim: bool, x_dot: Tensor) -> Tensor:
    """Half the tangent of the variance: sum((x - mean(x)) * x_dot) / (n - correction)."""
    dims = (dim or range(x.dim())) if x.dim() else ()  # a scalar may be asked about its dim -1
    n = math.prod(x.shape[d] for d in dims)
    x = in_float32(x)
    centred = x - x.mean(dim or None, keepdim=True)
    return (centred * x_dot).sum(dim or None, keepdim) / (n - (1 if correction is None else correction))


def real_two_norm(x: Tensor, order: Any, *_: Any) -> bool:
    return order == 2 and real(x)


@jvp(aten.var.correction, when=real)
def var(y, x, dim, correction, keepdim, *, x_dot):
    return 2 * half_spread(x, dim, correction, keepdim, x_dot)


@jvp(aten.var_mean.correction, when=real)
def var_mean(outs, x, dim, correction, keepdim, *, x_dot):
    return 2 * half_spread(x, dim, correction, keepdim, x_dot), x_dot.mean(dim or None, keepdim)


@jvp(aten.std.correction, when=real)
def std(y, x, dim, correction, keepdim, *, x_dot):
    """As PyTorch: zero where the deviation is."""
    return over(half_spread(x, dim, correction, keepdim, x_dot), y)


@jvp(aten.std_mean.correction, when=real)
def std_mean(outs, x, dim, correction, keepdim, *, x_dot):
    return std(outs[0], x, dim, correction, keepdim, x_dot=x_dot), x_dot.mean(dim or None, keepdim)


@jvp(aten.linalg_vector_norm.default, when=real_two_norm)
def two_norm(y, x, order, dim, keepdim, dtype, *, x_dot):
    """y_dot = sum(x * x_dot) / y, and zero at the origin, as PyTorch."""
    return over((in_float32(x) * x_dot).sum(dim, keepdim), y)


@jvp(aten._cdist_forward.default)
def distances(d, x1, x2, p, _, *, x1_dot=None, x2_dot=None):
    """y_dot = sum(slope * (x1_dot - x2_dot)) over all pairs, and zero where two points are one, as PyTorch's backward.

    By the differences: products of the points themselves, which need less memory, cancel between neighbours.
    """
    apart, d = x1.unsqueeze(-2) - x2.unsqueeze(-3), torch.where(d == 0, 1, d).unsqueeze(-1)
    if p == 2:
        slope = apart / d
    elif p == 1:
        slope = apart.sign()
    elif p == math.inf:
        slope = torch.where(apart.abs() == d, apart.sign(), 0)
    else:
        slope = apart.sign() * torch.where(apart == 0, d, apart.abs()).div(d) ** (p - 1) * (1 if p else 0)
    dots = (x1_dot, 1, -2), (x2_dot, -1, -3)
    return sum((slope * dot.unsqueeze(dim)).sum(-1) * sign for dot, sign, dim in dots if dot is not None)


@jvp(aten._euclidean_dist.default)
def euclidean_distances(d, x1, x2, *, x1_dot=None, x2_dot=None):
    return distances(d, x1, x2, 2, None, x1_dot=x1_dot, x2_dot=x2_dot)


# Extrema
@jvp(aten.amax.default, aten.amin.default)
def extremum(y, x, dim, keepdim, *, x_dot):
    attained = x == kept(y, x, dim, keepdim)
    return torch.where(attained, x_dot, 0).sum(dim, keepdim) / attained.sum(dim, keepdim)


@jvp(aten.max.default, aten.min.default)
def extremum_of_all(y, x, *, x_dot):
    attained = x == y
    return torch.where(attained, x_dot, 0).sum() / attained.sum()


@jvp(aten.max.dim, aten.min.dim)
def selected(outs, x, dim, keepdim, *, x_dot):
    index = outs[1] if keepdim else outs[1].unsqueeze(dim)
    value_dot = x_dot.gather(dim, index)
    return (value_dot if keepdim else value_dot.squeeze(dim)), None


jvp(aten.topk.default)(lambda outs, x, k, dim, *_, x_dot: (x_dot.gather(dim, outs[1]), None))
jvp(aten.sort.default)(lambda outs, x, dim, *_, x_dot: (x_dot.gather(dim, outs[1]), None))
jvp(aten.sort.stable)(lambda outs, x, stable, dim, *_, x_dot: (x_dot.gather(dim, outs[1]), None))


@jvp(aten.max_pool2d_with_indices.default)
def max_pool2d(outs, x, *_, x_dot):
    """The index counts within each plane."""
    index = outs[1]
    planes = x_dot.flatten(-2).unsqueeze(-2).expand(*index.shape[:-1], -1)
    return planes.gather(-1, index), None
