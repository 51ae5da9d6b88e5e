"""Pointwise ops: one line of calculus each.

Formulas are written so that half precision does not overflow before the result does. Where ATen has a fused
backward kernel it serves as forward rule: the Jacobian of a pointwise function is diagonal, hence its own
transpose, and the kernel computes in float32 whatever the inputs have. At kinks and ties the convention is
PyTorch's (relu'(0) = 0, a clamp passes its bounds, equal operands of a maximum share).
"""

from __future__ import annotations

import cmath
import math
from typing import Any

import torch
import torch._inductor.inductor_prims  # defines fma
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from jvpgraph.rules.derived import Unknown
from jvpgraph.rules.registry import bilinear, jvp, linear, no_tangent

__all__ = ["real", "times"]

aten = torch.ops.aten
fma = getattr(getattr(torch.ops.prims, "fma", None), "default", None)


def times(c: Any, x: Tensor) -> Tensor:
    """``c * x``, without a kernel for the usual ``c = 1``."""
    return x if guard_or_false(c == 1) else c * x


def real(x: Tensor, *_: Any) -> bool:
    return not x.is_complex()


def has_logarithm(x: Any, n: Tensor) -> bool:
    return x != 0 and (isinstance(x, complex) or n.is_complex() or x > 0)


def logarithm(x: Any) -> Any:
    return cmath.log(x) if isinstance(x, complex) or x < 0 else math.log(x)


BUFFER = Unknown("what the op saves for its backward has no tangent")

# Piecewise constant, constant, or random
no_tangent(aten.floor.default, aten.ceil.default, aten.trunc.default, aten.sign.default)
no_tangent(aten.round.default, aten.round.decimals, aten.floor_divide.default)
no_tangent(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)
no_tangent(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
no_tangent(aten.zero.default, aten.fill.Scalar)
no_tangent(aten.rand_like.default, aten.randn_like.default, aten.bernoulli.default, aten.bernoulli.p)
no_tangent(aten.uniform.default, aten.normal_functional.default, aten.exponential.default, aten.geometric.default)
no_tangent(aten.log_normal.default, aten.cauchy.default, aten.random.default, aten.random.to)
no_tangent(aten.randint_like.default, aten.randint_like.low_dtype, aten.new_empty_strided.default)

# Arithmetic
linear(aten.neg.default, aten.mul.Scalar, aten.div.Scalar)
bilinear(aten.mul.Tensor)

jvp(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)(lambda y, a, *_, a_dot: a_dot)
jvp(aten.add.Tensor)(lambda y, a, b, alpha, *, b_dot: times(alpha, b_dot))
jvp(aten.sub.Tensor)(lambda y, a, b, alpha, *, b_dot: times(-alpha, b_dot))
jvp(aten.rsub.Scalar)(lambda y, a, b, alpha, *, a_dot: times(-alpha, a_dot))
jvp(aten.remainder.Scalar, aten.fmod.Scalar)(lambda y, x, n, *, x_dot: x_dot)
jvp(aten.div.Tensor)(lambda y, a, b, *, a_dot: a_dot / b)
jvp(aten.div.Tensor)(lambda y, a, b, *, b_dot: -y * (b_dot / b))
jvp(aten.reciprocal.default)(lambda y, x, *, x_dot: -y * (x_dot * y))


@jvp(aten.div.Tensor_mode)
def div_rounded(y, a, b, rounding_mode, *, a_dot=None, b_dot=None):
    """Constant between the jumps: only the unrounded mode has a tangent."""
    if rounding_mode is not None:
        return None
    numerator = 0 if a_dot is None else a_dot
    return (numerator if b_dot is None else numerator - y * b_dot) / b


jvp(aten.addcmul.default)(lambda y, a, b, c, value, *, a_dot: a_dot)
jvp(aten.addcmul.default)(lambda y, a, b, c, value, *, b_dot: times(value, b_dot * c))
jvp(aten.addcmul.default)(lambda y, a, b, c, value, *, c_dot: times(value, b * c_dot))
jvp(aten.addcdiv.default)(lambda y, a, b, c, value, *, a_dot: a_dot)
jvp(aten.addcdiv.default)(lambda y, a, b, c, value, *, b_dot: times(value, b_dot / c))
jvp(aten.addcdiv.default)(lambda y, a, b, c, value, *, c_dot: times(-value, (b / c) * (c_dot / c)))
if fma is not None:  # a * b + c, which Dynamo makes of addcmul_
    jvp(fma)(lambda y, a, b, c, *, a_dot: a_dot * b)
    jvp(fma)(lambda y, a, b, c, *, b_dot: a * b_dot)
    jvp(fma)(lambda y, a, b, c, *, c_dot: c_dot)
jvp(aten.lerp.Scalar, aten.lerp.Tensor)(lambda y, a, b, w, *, a_dot: a_dot * (1 - w))
jvp(aten.lerp.Scalar, aten.lerp.Tensor)(lambda y, a, b, w, *, b_dot: b_dot * w)
jvp(aten.lerp.Tensor)(lambda y, a, b, w, *, w_dot: w_dot * (b - a))

# Powers, exponentials, logarithms
jvp(aten.sqrt.default)(lambda y, x, *, x_dot: x_dot / (2 * y))
jvp(aten.rsqrt.default)(lambda y, x, *, x_dot: -0.5 * y * (x_dot / x))
jvp(aten.exp.default)(lambda y, x, *, x_dot: x_dot * y)
jvp(aten.exp2.default)(lambda y, x, *, x_dot: x_dot * y * math.log(2))
jvp(aten.expm1.default)(lambda y, x, *, x_dot: x_dot * x.exp())
jvp(aten.log.default)(lambda y, x, *, x_dot: x_dot / x)
jvp(aten.log2.default)(lambda y, x, *, x_dot: x_dot / (x * math.log(2)))
jvp(aten.log10.default)(lambda y, x, *, x_dot: x_dot / (x * math.log(10)))
jvp(aten.log1p.default)(lambda y, x, *, x_dot: x_dot / (1 + x))
jvp(aten.pow.Scalar, when=has_logarithm)(lambda y, x, n, *, n_dot: n_dot * y * logarithm(x))
# 1 for what is not taken, of which 0 x inf would be in the gradient
jvp(aten.pow.Tensor_Tensor)(
    lambda y, x, n, *, x_dot: torch.where(n == 0, 0, x_dot * n * torch.where(n == 0, 1, x) ** (n - 1))
)


@jvp(aten.pow.Tensor_Tensor)
def pow_by_exponent(y, x, n, *, n_dot):
    """A real base of a complex exponent has a complex logarithm, which PyTorch's formula cuts down to its real part."""
    at_zero = (x == 0) & ((n.real if n.is_complex() else n) >= 0)
    return torch.where(at_zero, 0, n_dot * y * torch.where(at_zero, 1, x).to(y.dtype).log())


@jvp(aten.pow.Tensor_Scalar)
def pow_by_number(y, x, n, *, x_dot):
    if isinstance(n, torch.SymFloat):  # read from data, so that nobody knows now whether it is 0
        power: Any = n
        is_zero = torch.scalar_tensor(power) == 0
        return torch.where(is_zero, 0, x_dot * (power * torch.where(is_zero, 1, x) ** (power - 1)))
    return None if n == 0 else x_dot * (n * x ** (n - 1))


# Trigonometry
jvp(aten.sin.default)(lambda y, x, *, x_dot: x_dot * x.cos())
jvp(aten.cos.default)(lambda y, x, *, x_dot: -x_dot * x.sin())
jvp(aten.tan.default)(lambda y, x, *, x_dot: x_dot * (1 + y * y))
jvp(aten.asin.default)(lambda y, x, *, x_dot: x_dot * (1 - x * x).rsqrt())
jvp(aten.acos.default)(lambda y, x, *, x_dot: -x_dot * (1 - x * x).rsqrt())
jvp(aten.atan.default)(lambda y, x, *, x_dot: x_dot / (1 + x * x))
jvp(aten.atan2.default)(lambda y, a, b, *, a_dot: a_dot * b / (a * a + b * b))
jvp(aten.atan2.default)(lambda y, a, b, *, b_dot: -b_dot * a / (a * a + b * b))
jvp(aten.sinh.default)(lambda y, x, *, x_dot: x_dot * x.cosh())
jvp(aten.cosh.default)(lambda y, x, *, x_dot: x_dot * x.sinh())
jvp(aten.erf.default)(lambda y, x, *, x_dot: x_dot * (2 / math.sqrt(math.pi)) * (-x * x).exp())

# Activations
jvp(aten.sigmoid.default, when=real)(lambda y, x, *, x_dot: aten.sigmoid_backward(x_dot, y))
jvp(aten.tanh.default, when=real)(lambda y, x, *, x_dot: aten.tanh_backward(x_dot, y))
jvp(aten.relu.default)(lambda y, x, *, x_dot: aten.threshold_backward(x_dot, y, 0))


@jvp(aten.silu.default)
def silu(y, x, *, x_dot):
    """PyTorch's kernel, or where it is wrong, as for complex numbers: s * (1 + x * (1 - s))."""
    if real(x):
        return aten.silu_backward(x_dot, x)
    s = x.sigmoid()
    return x_dot * (s + y * (1 - s))


@jvp(aten.rrelu_with_noise_functional.default)
def rrelu(outs, x, noise, lower, upper, training, _, *, x_dot):
    """The slopes that the primal drew, or their mean."""
    if training:
        return x_dot * outs[1], None
    return aten.leaky_relu_backward(x_dot, x, (lower + upper) / 2, False), None


@jvp(aten.glu.default)
def glu(y, x, dim, *, x_dot):
    n = y.shape[dim]
    a, b, a_dot, b_dot = (aten.slice(t, dim, start, start + n) for t in (x, x_dot) for start in (0, n))
    s = b.sigmoid()
    return a_dot * s + a * aten.sigmoid_backward(b_dot, s)


jvp(aten.gelu.default)(lambda y, x, a, *, x_dot: aten.gelu_backward(x_dot, x, approximate=a))
jvp(aten.mish.default)(lambda y, x, *, x_dot: aten.mish_backward(x_dot, x))
jvp(aten.softplus.default)(lambda y, x, b, t, *, x_dot: aten.softplus_backward(x_dot, x, b, t))
jvp(aten.log_sigmoid_forward.default)(lambda out, x, *, x_dot: (x_dot * (-x).sigmoid(), BUFFER))
jvp(aten.leaky_relu.default)(lambda y, x, slope, *, x_dot: aten.leaky_relu_backward(x_dot, x, slope, False))
jvp(aten.elu.default)(lambda y, x, a, s, i, *, x_dot: aten.elu_backward(x_dot, a, s, i, False, x))
jvp(aten.hardtanh.default)(lambda y, x, low, high, *, x_dot: aten.hardtanh_backward(x_dot, x, low, high))
# Of hardsigmoid_backward and logit_backward PyTorch has no derivative.
jvp(aten.hardsigmoid.default)(lambda y, x, *, x_dot: torch.where((x > -3) & (x < 3), x_dot / 6, 0))
jvp(aten.hardswish.default)(lambda y, x, *, x_dot: aten.hardswish_backward(x_dot, x))


@jvp(aten.logit.default)
def logit(y, x, eps=None, *, x_dot):
    """Clamped to [eps, 1 - eps], and constant beyond; without eps it is not defined there."""
    low = 0.0 if eps is None or eps < 0 else eps
    beyond = (x < low) | (x > 1 - low)
    p = torch.where(beyond, 0.5, x)  # no 0 x inf in the gradient of what is not taken
    return torch.where(beyond, torch.nan if eps is None or eps < 0 else 0, x_dot / (p * (1 - p)))


# Choice
linear(aten.where.self, wrt="self other")
linear(aten.masked_fill.Tensor, wrt="self value")
linear(aten.masked_scatter.default, wrt="self source")
jvp(aten.nan_to_num.default)(lambda y, x, *_, x_dot: torch.where(x.isfinite(), x_dot, 0))  # x_dot is NaN, too, there
jvp(aten.masked_fill.Scalar)(lambda y, x, mask, value, *, x_dot: x_dot.masked_fill(mask, 0))
jvp(aten.abs.default, when=real)(lambda y, x, *, x_dot: x_dot * x.sign())
jvp(
    *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
    *(aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor),
)(lambda y, x, *_, x_dot: torch.where(y == x, x_dot, 0))
jvp(aten.maximum.default, aten.minimum.default)(lambda y, a, b, *, a_dot: _share(y == a, a == b, a_dot))
jvp(aten.maximum.default, aten.minimum.default)(lambda y, a, b, *, b_dot: _share(y == b, a == b, b_dot))


@jvp(aten.copysign.Tensor)
def copysign(y, x, sign, *, x_dot=None, sign_dot=None):
    return None if x_dot is None else x_dot * (x.sign() * y.sign())


def _share(wins: Tensor, tie: Tensor, x_dot: Tensor) -> Tensor:
    return torch.where(tie, 0.5 * x_dot, torch.where(wins, x_dot, 0))


def each(fn: Any) -> Any:
    """The rule of a foreach op whose first list is active: ``fn(x, c, x_dot)`` of each tensor with its number."""

    def rule(ys, xs, cs, *, xs_dot):
        cs = cs if isinstance(cs, (list, tuple)) else [cs] * len(xs)
        return [None if x_dot is None else fn(y, x, c, x_dot) for y, x, c, x_dot in zip(ys, xs, cs, xs_dot)]

    return rule


# PyTorch's formulas scale the tangent by the number where it wins.
jvp(
    *(aten._foreach_maximum.Scalar, aten._foreach_maximum.ScalarList),
    *(aten._foreach_minimum.Scalar, aten._foreach_minimum.ScalarList),
)(each(lambda y, x, c, x_dot: _share(y == x, x == c, x_dot)))


@jvp(aten.native_dropout.default)
def dropout(outs, x, p, train, *, x_dot):
    """The mask that the primal drew, and its scale."""
    return (x_dot if train is False or p == 0 else x_dot * outs[1] * (0 if p == 1 else 1 / (1 - p)), None)


linear(aten.masked_select.default)
jvp(aten.bincount.default)(lambda y, x, w, least, *, w_dot: aten.bincount(x, w_dot, least))


# Losses
def reduced(loss: Tensor, reduction: int) -> Tensor:
    return (loss, loss.mean(), loss.sum())[reduction] if reduction else loss


@jvp(aten.binary_cross_entropy.default)
def binary_cross_entropy(y, x, t, w, reduction, *, x_dot=None, t_dot=None, w_dot=None):
    """-w (t log x + (1 - t) log(1 - x)), with both logarithms cut off at -100, as the op has them."""
    log_x, log_rest = x.log().clamp_min(-100), (-x).log1p().clamp_min(-100)
    terms = []
    if x_dot is not None:
        terms.append(x_dot * (x - t) / ((1 - x) * x).clamp_min(1e-12))  # PyTorch's bound
    if t_dot is not None:
        terms.append(t_dot * (log_rest - log_x))
    slope = sum(terms) if w is None or not terms else sum(terms) * w
    if w_dot is not None:
        slope = slope - w_dot * (t * log_x + (1 - t) * log_rest) if terms else -w_dot * (t * log_x + (1 - t) * log_rest)
    return reduced(slope, reduction)


def negative_log_likelihood(op: Any) -> None:
    """Linear in the logarithms; a mean is over the weights of the classes that were hit."""
    jvp(op)(lambda outs, x, t, w, *how, x_dot: (op(x_dot, t, w, *how)[0], None))

    @jvp(op)
    def weights(outs, x, t, w, reduction, ignore_index, *, w_dot):
        if reduction != 1:
            return op(x, t, w_dot, reduction, ignore_index)
        sum_dot, total_dot = op(x, t, w_dot, 2, ignore_index)
        return (sum_dot - outs[0] * total_dot) / outs[1], total_dot


negative_log_likelihood(aten.nll_loss_forward.default)
negative_log_likelihood(aten.nll_loss2d_forward.default)

# Complex numbers
linear(aten._conj.default, aten.view_as_real.default)
linear(aten.complex.default, wrt="real imag")
jvp(aten.view_as_complex.default)(lambda y, x, *, x_dot: torch.view_as_complex(x_dot.contiguous()))
jvp(aten.polar.default)(lambda y, r, angle, *, r_dot: torch.polar(r_dot, angle))
jvp(aten.polar.default)(lambda y, r, angle, *, angle_dot: 1j * y * angle_dot)
