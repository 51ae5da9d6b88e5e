"""Products and convolutions: one term per operand, none for the operands that are inactive."""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from jvpgraph.rules.pointwise import times
from jvpgraph.rules.registry import bilinear, jvp

aten = torch.ops.aten

bilinear(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)


def plus_product(op: OpOverload, product: OpOverload) -> None:
    """y = beta * a + alpha * product(b, c)."""
    jvp(op)(lambda y, a, b, c, beta, alpha, *, a_dot: times(beta, a_dot))
    jvp(op)(lambda y, a, b, c, beta, alpha, *, b_dot: times(alpha, product(b_dot, c)))
    jvp(op)(lambda y, a, b, c, beta, alpha, *, c_dot: times(alpha, product(b, c_dot)))


plus_product(aten.addmm.default, aten.mm.default)
plus_product(aten.addmv.default, aten.mv.default)
plus_product(aten.baddbmm.default, aten.bmm.default)

jvp(aten.convolution.default)(lambda y, x, w, b, *how, x_dot: aten.convolution(x_dot, w, None, *how))
jvp(aten.convolution.default)(lambda y, x, w, b, *how, w_dot: aten.convolution(x, w_dot, None, *how))
jvp(aten.convolution.default)(lambda y, x, w, b, *how, b_dot: b_dot.view(-1, *[1] * (x.dim() - 2)))


@jvp(aten.cholesky_solve.default)
def cholesky_solve(y, b, c, upper, *, b_dot=None, c_dot=None):
    """(L L')^-1 b. What is on the other side of the diagonal does not matter."""
    half = torch.triu if upper else torch.tril
    if c_dot is not None:
        factor, factor_dot = half(c), half(c_dot)
        square = factor.mH @ factor_dot if upper else factor_dot @ factor.mH
        b_dot = (0 if b_dot is None else b_dot) - (square + square.mH) @ y
    return aten.cholesky_solve(b_dot, c, upper)
