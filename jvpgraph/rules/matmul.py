"""Products, convolutions and what undoes products: one term per operand, none for the operands that are inactive."""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from jvpgraph.rules.derived import Unknown
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
    if c_dot is not None:
        b_dot = (0 if b_dot is None else b_dot) - _square_dot(c, c_dot, upper) @ y
    return aten.cholesky_solve(b_dot, c, upper)


@jvp(aten.cholesky_inverse.default)
def cholesky_inverse(y, c, upper=False, *, c_dot):
    """(L L')^-1. PyTorch's formula is right for few L only."""
    return -(y @ _square_dot(c, c_dot, upper) @ y)


def _square_dot(c: torch.Tensor, c_dot: torch.Tensor, upper: bool) -> torch.Tensor:
    half = torch.triu if upper else torch.tril
    factor, factor_dot = half(c), half(c_dot)
    square = factor.mH @ factor_dot if upper else factor_dot @ factor.mH
    return square + square.mH


# Solving and determinants. PyTorch's formulas take the factors that the op returns besides, which have no gradient.
FACTORS = Unknown("the factors that it returns besides have no tangent: take torch.linalg.lu_factor")


@jvp(aten._linalg_solve_ex.default)
def solve(outs, a, b, left, check_errors, *, a_dot=None, b_dot=None):
    """With a y = b:  a y_dot = b_dot - a_dot y."""
    y = outs[0].unsqueeze(-1) if _is_vector(a, b) else outs[0]
    moved = None if a_dot is None else a_dot @ y if left else y @ a_dot
    if moved is not None and _is_vector(a, b):
        moved = moved.squeeze(-1)
    right = b_dot if moved is None else -moved if b_dot is None else b_dot - moved
    return aten._linalg_solve_ex(a, right, left=left)[0], FACTORS, None, None


def _is_vector(a: torch.Tensor, b: torch.Tensor) -> bool:
    return b.dim() == 1 or (b.dim() == a.dim() - 1 and tuple(b.shape) == tuple(a.shape[:-1]))


def _trace_of_quotient(a: torch.Tensor, a_dot: torch.Tensor) -> torch.Tensor:
    return aten._linalg_solve_ex(a, a_dot)[0].diagonal(0, -2, -1).sum(-1)


@jvp(aten._linalg_det.default)
def det(outs, a, *, a_dot):
    """d det(a) = det(a) tr(a^-1 da) = tr(adj(a) da), which is continuous: of a singular a that of its neighbour.

    Both factors are of the same LU: of others, that round otherwise, a determinant of nothing but rounding errors times
    an inverse of the same would be any number.
    """
    if a.shape[-1] == 0:
        return torch.zeros_like(outs[0]), FACTORS, None
    singular = (aten.linalg_lu_factor_ex(a.detach())[0].diagonal(0, -2, -1) == 0).any(-1)
    size = a.detach().abs().amax((-2, -1), keepdim=True)
    above_rounding = 16 * a.shape[-1] * torch.finfo(a.dtype).eps  # or it might make up for the step
    step = torch.where(size == 0, 1, size) * above_rounding
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    regular = torch.where(singular[..., None, None], a + step * identity, a)
    lu, pivots, _ = aten.linalg_lu_factor_ex(regular)
    left = lu.diagonal(0, -2, -1) == 0  # where the step has only turned what is missing
    lu = lu + torch.diag_embed(torch.where(left, step[..., 0], 0))
    swaps = (pivots != torch.arange(1, a.shape[-1] + 1, device=a.device)).sum(-1)
    value = lu.diagonal(0, -2, -1).prod(-1) * (1 - 2 * (swaps % 2))
    return value * aten.linalg_lu_solve(lu, pivots, a_dot).diagonal(0, -2, -1).sum(-1), FACTORS, None


@jvp(aten._linalg_slogdet.default)
def slogdet(outs, a, *, a_dot):
    """log det(a) = log sign + log |det|, and so real and imaginary part of tr(a^-1 da)."""
    trace = _trace_of_quotient(a, a_dot)
    if not a.is_complex():
        return None, trace, FACTORS, None
    return 1j * trace.imag * outs[0], trace.real, FACTORS, None


# Eigenvectors. PyTorch's formulas divide 0 by 0 on the diagonal and write 0 there, after which gradients are NaN.
def turned(values: torch.Tensor, vectors: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Tangents of the eigenvectors, none along themselves: V (m_ij / (l_j - l_i)) for m = V^-1 A_dot V."""
    same = torch.eye(m.shape[-1], dtype=torch.bool, device=m.device)
    apart = torch.where(same, 1, values.unsqueeze(-2) - values.unsqueeze(-1))
    return vectors @ torch.where(same, 0, m / apart)


def with_vectors(a: torch.Tensor, uplo: str, compute_v: bool) -> bool | str:
    return compute_v or "the tangents of eigenvalues need the eigenvectors: take torch.linalg.eigh"


@jvp(aten._linalg_eigh.default, when=with_vectors)
def eigh(outs, a, uplo, compute_v, *, a_dot):
    """Of the half of ``a`` that is read."""
    values, v = outs
    half = a_dot.tril(-1) if uplo.upper() == "L" else a_dot.triu(1)
    m = v.mH @ (half + half.mH + torch.diag_embed(a_dot.diagonal(0, -2, -1).real)) @ v
    return m.diagonal(0, -2, -1).real, turned(values, v, m)


@jvp(aten.linalg_eig.default)
def eig(outs, a, *, a_dot):
    """The eigenvectors stay of length 1."""
    values, v = outs
    m = torch.linalg.solve_ex(v, a_dot.to(v.dtype) @ v)[0]
    v_dot = turned(values, v, m)
    return m.diagonal(0, -2, -1), v_dot - v * (v.conj() * v_dot).sum(-2, keepdim=True).real
