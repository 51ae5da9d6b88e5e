"""One row per rule of the table: the op, and the calls on which it is checked.

A call is written like the call of the op, with drawn tensors in place of tensors::

    R(3, 4)               float64, uniform in [-2, 2];  R(3, low=0.1, high=3.0), R(3, dtype=torch.float32)
    C(3, 4)               complex128, both parts uniform in [-2, 2]
    Z(5, below=3)         int64 in [0, 3);  Z(5, distinct=True) is a permutation
    M(3, 4)               bool
    V([0.0, 1.0])         these float64 values

and wrapped in ``call``. Differences say nothing at points without a derivative and on uninitialised memory
(``kink``), and little in float32 (``coarse``): PyTorch's convention is then the only oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives  # defines some of the ops
from torch import Tensor
from torch._ops import OpOverload

import jvpgraph.kernels.attention  # noqa: F401  defines the ops

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
fma = getattr(getattr(torch.ops.prims, "fma", None), "default", None)
with_backward = torch.ops._c10d_functional_autograd

Draw = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Drawn:
    """A tensor argument: how to draw it."""

    draw: Draw


def R(*shape: int, low: float = -2.0, high: float = 2.0, dtype: torch.dtype = torch.float64) -> Drawn:
    return Drawn(lambda rng: (low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)).to(dtype))


def C(*shape: int) -> Drawn:
    return Drawn(lambda rng: torch.view_as_complex(R(*shape, 2).draw(rng)))


def Z(*shape: int, below: int = 1, distinct: bool = False) -> Drawn:
    if distinct:
        return Drawn(lambda rng: torch.randperm(*shape, generator=rng))
    return Drawn(lambda rng: torch.randint(below, shape, generator=rng))


def M(*shape: int) -> Drawn:
    return Drawn(lambda rng: torch.rand(shape, generator=rng) < 0.5)


def V(values: Any) -> Drawn:
    return Drawn(lambda rng: torch.tensor(values, dtype=torch.float64))


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    smooth: bool = True
    tolerance: float = 1e-9


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


def kink(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs, smooth=False)


def coarse(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs, smooth=False, tolerance=1e-6)


@dataclass(frozen=True)
class Case:
    """A row.

    Args:
        op: the op.
        calls: what it is called with.
        primal: what to run instead of an op that needs another device.
        formula: whether PyTorch's forward formula, if any, is an oracle.
        reverse: whether its backward is one.
        strided: whether the op takes primals of any layout (tangents always come in any layout).
        aside: indices of outputs that get no tangent by convention, though they vary.
        group: whether it needs a process group.
    """

    op: OpOverload
    calls: tuple[Call, ...]
    primal: Callable[..., Any] | None = None
    formula: bool = True
    reverse: bool = True
    strided: bool = True
    aside: tuple[int, ...] = ()
    group: bool = False

    @property
    def run(self) -> Callable[..., Any]:
        return self.primal or self.op


def rows(ops: Iterable[OpOverload], *calls: Call, **properties: Any) -> list[Case]:
    return [Case(op, calls, **properties) for op in ops]


def row(op: OpOverload, *calls: Call, **properties: Any) -> list[Case]:
    return rows([op], *calls, **properties)


# Several arguments that are used often
POSITIVE = R(3, 4, low=0.3, high=3.0)
INSIDE = R(3, 4, low=-0.9, high=0.9)
IMAGE, VIDEO = R(2, 4, 6, 6), R(1, 2, 4, 4, 4)
BROADCAST = (call(R(3, 4), R(4)), call(R(3, 1), R(2, 1, 4)), call(R(3, 4), R()), call(R(3), C(2, 3)))
PROBABILITY = R(3, 4, low=0.1, high=0.9)
LISTS = call([R(3, 4), R(2)], [0.3, -0.2])
MIXED = coarse(R(3, 4, dtype=torch.float32), R(3, 4))
IN_3_4 = Z(3, 4, below=3)

POINTWISE = [
    # no tangent
    *row(aten.copysign.Tensor, call(R(3, 4), R(4)), kink(V([0.0, 1.0, -1.0]), V([1.0, -0.0, 1.0]))),
    *rows([aten.floor.default, aten.ceil.default, aten.trunc.default, aten.sign.default], call(R(3, 4))),
    *rows([aten.round.default], call(R(3, 4))),
    *row(aten.round.decimals, call(R(3, 4), decimals=1)),
    *row(aten.floor_divide.default, call(R(3, 4), POSITIVE), reverse=False),
    *rows([aten.zeros_like.default, aten.ones_like.default, aten.zero.default], call(R(3, 4))),
    *rows([aten.full_like.default, aten.fill.Scalar], call(R(3, 4), 2.0)),
    *rows([aten.new_zeros.default, aten.new_ones.default], call(R(3, 4), [2, 2])),
    *row(aten.new_full.default, call(R(3, 4), [2, 2], 1.5)),
    *row(aten.new_empty.default, kink(R(3, 4), [2, 2])),
    *row(aten.empty_like.default, kink(R(3, 4))),
    *row(aten.detach.default, call(R(3, 4)), formula=False, reverse=False),  # PyTorch's own stops the tangent
    *row(
        torch.ops.prims.convert_element_type.default,
        *(call(R(3, 4), torch.complex128), coarse(R(3, 4), torch.float32)),
        formula=False,
        reverse=False,
    ),
    *rows([aten.rand_like.default, aten.randn_like.default], call(R(3, 4))),
    *row(aten.bernoulli.default, call(R(3, 4, low=0.1, high=0.9)), reverse=False),
    *row(aten.bernoulli.p, call(R(3, 4), 0.3), reverse=False),
    *row(aten.uniform.default, call(R(3, 4)), reverse=False),
    *row(aten.normal_functional.default, call(R(3, 4)), reverse=False),
    *rows(
        [aten.exponential.default, aten.log_normal.default, aten.cauchy.default, aten.random.default],
        call(R(3, 4)),
        reverse=False,
    ),
    *row(aten.geometric.default, call(R(3, 4), 0.3), reverse=False),
    *rows([aten.random.to, aten.randint_like.default], call(R(3, 4), 7), reverse=False),
    *rows([aten.randint_like.low_dtype], call(R(3, 4), -2, 7), reverse=False),
    *row(aten.new_empty_strided.default, kink(R(3, 4), [2, 2], [2, 1])),
    # arithmetic
    *row(aten.neg.default, call(R(3, 4)), call(C(3, 4))),
    *row(aten.mul.Tensor, *BROADCAST, MIXED, call(C(3), C(2, 3)), call(R(3, 4), 2.5)),
    *rows([aten.mul.Scalar, aten.div.Scalar], call(R(3, 4), 2.5), call(C(3), 2 + 1j)),
    *rows([aten.add.Tensor, aten.sub.Tensor], *BROADCAST, MIXED, call(R(3, 4), R(4), alpha=3), call(R(3), 2)),
    *rows([aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar], call(R(3, 4), 2.5), call(R(3, 4), 2, 3)),
    *rows([aten.remainder.Scalar, aten.fmod.Scalar], call(R(3, 4), 0.7)),
    *row(aten.div.Tensor, call(R(3, 4), R(4, low=0.5)), call(R(3, 1), C(2, 1, 4)), call(R(3), 2.0)),
    *row(
        aten.div.Tensor_mode,
        *(call(R(3, 4), R(4, low=0.5), rounding_mode=m) for m in (None, "floor", "trunc")),
    ),
    *row(aten.reciprocal.default, call(POSITIVE), call(C(3, 4))),
    *row(aten.addcmul.default, call(R(3, 4), R(4), R(3, 1)), call(R(4), R(3, 4), R(3, 4), value=2)),
    *row(aten.addcdiv.default, call(R(3, 4), R(4), POSITIVE), call(R(4), R(3, 4), POSITIVE, value=2)),
    *(row(fma, call(R(3, 4), R(4), R(3, 1)), call(R(3), R(3), R(3)), formula=False) if fma is not None else ()),
    *row(aten.lerp.Scalar, call(R(3, 4), R(4), 0.3), call(R(3, 4), R(4), 0.8)),
    *row(aten.lerp.Tensor, call(R(3, 4), R(4), R(3, 1))),
    # powers, exponentials, logarithms
    *rows([aten.sqrt.default, aten.rsqrt.default, aten.log.default], call(POSITIVE), call(C(3, 4))),
    *rows([aten.log2.default, aten.log10.default, aten.log1p.default], call(POSITIVE), call(C(3, 4))),
    *rows([aten.exp.default, aten.exp2.default], call(R(3, 4)), call(C(3, 4))),
    *row(aten.expm1.default, call(R(3, 4)), call(C(3, 4))),
    *row(
        aten.pow.Tensor_Scalar,
        *(call(R(3, 4), n) for n in (0, 1, 2, 3, -1)),
        *(call(POSITIVE, 0.5), call(C(3), 3), kink(V([0.0, 1.0]), 0), kink(V([0.0, 1.0]), 1.5)),
    ),
    *row(
        aten.pow.Scalar,
        *(call(2.5, R(3, 4)), call(2 + 1j, R(3, 4)), call(-2.5, C(3)), call(1j, C(3))),
        formula=False,  # theirs takes the real part of the logarithm
        reverse=False,
    ),
    *row(
        aten.pow.Tensor_Tensor,
        *(call(POSITIVE, R(4)), call(R(3, 4, low=0.1), R()), kink(V([0.0, 0.0, 2.0]), V([0.0, 2.0, 0.0]))),
        *(call(C(3, 4), C(4)), call(POSITIVE, C(4)), call(C(4), R(3, 4))),
        formula=False,
        reverse=False,
    ),
    # trigonometry
    *rows([aten.sin.default, aten.cos.default, aten.tan.default], call(R(3, 4)), call(C(3, 4))),
    *rows([aten.sinh.default, aten.cosh.default, aten.atan.default], call(R(3, 4)), call(C(3, 4))),
    *rows([aten.asin.default, aten.acos.default], call(INSIDE)),
    *row(aten.atan2.default, call(R(3, 4), R(4))),
    *row(aten.erf.default, call(R(3, 4))),
    # activations
    *rows([aten.sigmoid.default, aten.tanh.default, aten.mish.default], call(R(3, 4))),
    *row(aten.silu.default, call(R(3, 4)), call(C(3, 4)), formula=False, reverse=False),  # theirs is wrong for complex
    *row(
        aten.rrelu_with_noise_functional.default,
        *(call(R(3, 4), R(3, 4), 0.1, 0.4, training) for training in (False, True)),
        aside=(1,),
        reverse=False,
        strided=False,
    ),
    *row(aten.glu.default, call(R(3, 4)), call(R(4, 3, 2), -3)),
    *rows([aten.relu.default], call(R(3, 4)), kink(V([0.0, -1.0]))),
    *row(aten.gelu.default, call(R(3, 4)), call(R(3, 4), approximate="tanh")),
    *row(aten.softplus.default, call(R(3, 4)), call(R(3, 4), 2.0, 1.5)),
    *row(aten.log_sigmoid_forward.default, call(R(3, 4)), aside=(1,)),
    *row(aten.leaky_relu.default, call(R(3, 4)), call(R(3, 4), 0.2), kink(V([0.0]))),
    *row(aten.elu.default, call(R(3, 4)), call(R(3, 4), 1.5, 1.1, 0.7)),
    *row(aten.hardtanh.default, call(R(3, 4)), call(R(3, 4), 0, 1.2), kink(V([-1.0, 1.0]))),
    *row(aten.hardswish.default, call(R(3, 4, low=-5, high=5))),
    # PyTorch's own derivative takes its sixth from float32.
    *row(aten.hardsigmoid.default, call(R(3, 4, low=-5, high=5)), formula=False, reverse=False),
    *row(aten.logit.default, call(R(3, 4, low=0.3, high=0.7)), call(R(3, 4, low=-1, high=2), 0.4)),
    # choice
    *row(aten.where.self, call(M(3, 4), R(3, 4), R(4)), call(M(3, 1), R(4), R())),
    *row(aten.masked_fill.Scalar, call(R(3, 4), M(4), 7.0), call(R(4), M(3, 4), -float("inf"))),
    *row(aten.masked_fill.Tensor, call(R(3, 4), M(4), R())),
    *row(aten.masked_select.default, call(R(3, 4), M(4)), call(R(4), M(3, 4))),
    *row(aten.bincount.default, call(Z(5, below=3), R(5)), call(Z(3, below=2), R(3), 4), reverse=False),
    *row(aten.masked_scatter.default, call(R(3, 4), M(4), R(3, 4))),
    *row(aten.abs.default, call(R(3, 4)), kink(V([0.0, 1.0]))),
    *row(
        aten.clamp.default,
        *(call(R(3, 4), -1, 0.5), call(R(3, 4), None, 0.5), call(R(3, 4), 0), kink(V([0.0, 1.0]), 0, 1)),
    ),
    *rows([aten.clamp_min.default, aten.clamp_max.default], call(R(3, 4), 0.5), kink(V([0.0]), 0)),
    *row(aten.nan_to_num.default, call(R(3, 4)), call(R(3, 4), 1.0, 2.0, 3.0)),
    *row(aten.clamp.Tensor, call(R(3, 4), R(4, high=0), R(4, low=0)), call(R(3, 4), None, R(4))),
    *rows([aten.clamp_min.Tensor, aten.clamp_max.Tensor], call(R(3, 4), R(4))),
    *rows(
        [aten.maximum.default, aten.minimum.default],
        *(call(R(3, 4), R(4)), MIXED, kink(V([0.0, 1.0]), V([0.0, 2.0]))),
    ),
    *rows(
        [aten._foreach_maximum.Scalar, aten._foreach_minimum.Scalar],
        *(call([R(3, 4), R(2)], 0.3), kink([V([0.0, 1.0])], 1.0)),
        formula=False,
    ),
    *rows([aten._foreach_maximum.ScalarList, aten._foreach_minimum.ScalarList], LISTS, formula=False),
    *row(
        aten.native_dropout.default,
        *(call(R(3, 4), p, train) for p, train in ((0.4, True), (1.0, True), (0.0, True), (0.4, False))),
        strided=False,
    ),
    # losses
    *row(
        aten.binary_cross_entropy.default,
        *(call(PROBABILITY, PROBABILITY, R(4), r) for r in (0, 1, 2)),
        *(call(PROBABILITY, PROBABILITY), kink(V([0.0, 1.0]), V([0.3, 0.4]), None, 2)),
        formula=False,
        reverse=False,  # PyTorch gives the weight none
    ),
    *row(
        aten.nll_loss_forward.default,
        *(call(R(3, 4), Z(3, below=4), R(4, low=0.1), r, 2) for r in (0, 1, 2)),
        *(call(R(3, 4), Z(3, below=4), None, 1, -100), call(R(4), Z(below=4), R(4, low=0.1), 1, -100)),
        reverse=False,
    ),
    *row(
        aten.nll_loss2d_forward.default,
        *(call(R(2, 4, 3, 3), Z(2, 3, 3, below=4), R(4, low=0.1), r, 2) for r in (0, 1, 2)),
        *(call(R(2, 4, 3, 3), Z(2, 3, 3, below=4), None, 1, -100),),
        reverse=False,
    ),
    # complex numbers
    *rows([aten._conj.default, aten.view_as_real.default], call(C(3, 4))),
    *row(aten.view_as_complex.default, call(R(3, 4, 2)), strided=False),
    *row(aten.complex.default, call(R(3, 4), R(4))),
    *row(aten.view.dtype, call(R(3, 4), torch.complex128), call(C(3, 4), torch.float64), strided=False, reverse=False),
    *row(aten.polar.default, call(POSITIVE, R(4))),
]

REDUCE = [
    *row(aten.sum.default, call(R(3, 4)), call(C(3, 4)), coarse(R(3, 4), dtype=torch.float32)),
    *row(aten.sum.dim_IntList, call(R(3, 4, 2), [0, -1]), call(R(3, 4), [1], True), call(R(3, 4), None)),
    *row(aten.mean.default, call(R(3, 4)), call(C(3))),
    *row(aten.mean.dim, call(R(3, 4, 2), [0, -1]), call(R(3, 4), [-2], True), call(R(3, 4), None)),
    *row(aten.cumsum.default, call(R(3, 4), 0), call(R(3, 4), -1)),
    *row(aten._softmax.default, call(R(3, 4), 0, False), call(R(3, 4, 2), -1, False)),
    *row(aten._safe_softmax.default, call(R(3, 4), 1), call(V([[0.0, 1.0], [-float("inf")] * 2]), -1)),
    *row(aten._log_softmax.default, call(R(3, 4), 0, False), call(R(3, 4, 2), -1, False)),
    *row(aten.logsumexp.default, call(R(3, 4), [0]), call(R(3, 4, 2), [0, -1]), call(R(3, 4, 2), [1], True)),
    *row(
        aten.logcumsumexp.default,
        *(call(R(3, 4), 0), call(R(3, 4), -1), call(R(), 0), kink(V([-30.0, 0.0, 30.0]), 0), call(C(3, 4), 1)),
        formula=False,
    ),
    *rows(
        [aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction],
        *(call(R(3, 4)), call(R(3, 4, 2), [0, -1], correction=0), call(R(3, 4), [-1], keepdim=True)),
        *(call(R(3, 4, 2), [1], correction=2, keepdim=True),),
    ),
    *row(
        aten.linalg_vector_norm.default,
        *(call(R(3, 4)), call(R(3, 4), 2, [1]), call(R(3, 4, 2), 2, [0, -1], True), kink(V([0.0, 0.0]))),
    ),
    *row(
        aten._cdist_forward.default,
        *(call(R(5, 3), R(4, 3), p, None) for p in (2.0, 1.0, float("inf"), 3.0, 0.0)),
        *(call(R(2, 5, 3), R(2, 4, 3), 1.5, None), call(R(3, 1, 5, 3), R(2, 4, 3), 2.0, 2)),
        *(kink(V([[1.0, 2.0], [0.0, 0.0]]), V([[1.0, 2.0], [1.0, 0.0]]), p, None) for p in (2.0, 1.0, 3.0)),
    ),
    *row(aten._euclidean_dist.default, call(R(5, 3), R(4, 3)), call(R(2, 5, 3), R(2, 4, 3))),
    *rows(
        [aten.amax.default, aten.amin.default],
        *(
            call(R(3, 4)),
            call(R(3, 4, 2), [0, -1]),
            call(R(3, 4), [1], True),
            kink(V([[1.0, 1.0, 0.0]]), [1]),
        ),
    ),
    *rows([aten.max.default, aten.min.default], call(R(3, 4)), kink(V([1.0, 1.0, 0.0, 0.0]))),
    *rows([aten.max.dim, aten.min.dim], call(R(3, 4), 0), call(R(3, 4), -1, True), call(R(), 0)),
    *row(aten.topk.default, call(R(3, 4), 2), call(R(3, 4), 2, 0, False)),
    *row(aten.sort.default, call(R(3, 4)), call(R(3, 4), 0, True)),
    *row(aten.sort.stable, call(R(3, 4), stable=True), call(R(3, 4), stable=True, dim=0, descending=True)),
    *row(
        aten.max_pool2d_with_indices.default,
        *(call(IMAGE, [2, 2]), call(R(4, 6, 6), [3, 3], [2, 2], [1, 1], [1, 1], True)),
    ),
]

SHAPE = [
    # views
    *row(aten.view.default, call(R(3, 4), [2, 6]), call(R(3, 4), [-1]), strided=False),
    *row(aten._unsafe_view.default, call(R(3, 4), [2, 6]), strided=False),
    *row(aten._reshape_alias.default, call(R(3, 4), [2, 6], [6, 1]), strided=False),
    *row(aten.permute.default, call(R(2, 3, 4), [2, 0, -2])),
    *row(aten.transpose.int, call(R(2, 3, 4), 0, -1)),
    *row(aten.t.default, call(R(3, 4)), call(R(3))),
    *row(aten.expand.default, call(R(3, 1), [2, 3, 4]), call(R(3, 1), [-1, 4])),
    *row(aten.squeeze.default, call(R(1, 3, 1))),
    *row(aten.squeeze.dim, call(R(1, 3, 1), -1), call(R(3), 0)),
    *row(aten.squeeze.dims, call(R(1, 3, 1), [0, -1])),
    *row(aten.unsqueeze.default, call(R(3, 4), -1)),
    *row(aten.slice.Tensor, call(R(5, 4), 0, 1, 5, 2), call(R(5, 4), -1, -3)),
    *row(aten.select.int, call(R(3, 4), -1, 2)),
    *row(aten.diagonal.default, call(R(3, 4), 1), call(R(2, 3, 3), 0, -1, -2)),
    *row(aten.unfold.default, call(R(3, 7), -1, 3, 2)),
    *row(aten.unbind.int, call(R(3, 4), -1)),
    *row(aten.split.Tensor, call(R(5, 4), 2), call(R(3, 4), 3, -1)),
    *row(aten.split_with_sizes.default, call(R(5, 4), [2, 3])),
    *row(aten.as_strided.default, call(R(3, 4), [2, 2], [4, 2], 1), call(R(6), [2, 3], [2, 1]), strided=False),
    # copies
    *rows([aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default], call(R(3, 4))),
    *row(
        aten._to_copy.default,
        *(call(R(3, 4), dtype=torch.complex128), coarse(R(3, 4), dtype=torch.float32)),
    ),
    *row(aten.copy.default, call(R(2, 3), R(3)), coarse(R(2, 3, dtype=torch.float32), R(3)), reverse=False),
    *row(aten.fill.Tensor, call(R(2, 3), R())),
    # joining and repeating
    *row(aten.cat.default, call([R(3, 4), R(2, 4)]), coarse([R(3, 4), R(3, 1, dtype=torch.float32)], -1)),
    *row(aten.stack.default, call([R(3, 4), R(3, 4)], -1)),
    *row(aten.repeat.default, call(R(3, 1), [2, 1, 4])),
    *row(aten.roll.default, call(R(3, 4), [1, -1], [0, 1]), call(R(3, 4), [5])),
    *row(aten.flip.default, call(R(3, 4), [0, -1])),
    *rows([aten.tril.default, aten.triu.default], call(R(2, 3, 4)), call(R(3, 4), -1)),
    *row(aten.diag_embed.default, call(R(3, 4)), call(R(3), 1)),
    # reading by index
    *rows(
        [aten.index.Tensor, aten._unsafe_index.Tensor],
        *(call(R(3, 4), [None, Z(2, 5, below=4)]), call(R(3, 4), [Z(5, below=3), Z(5, below=4)])),
    ),
    *row(aten.index_select.default, call(R(3, 4), -1, Z(5, below=4))),
    *row(aten.gather.default, call(R(3, 4), 0, Z(5, 2, below=3))),
    *row(aten.embedding.default, call(R(5, 4), Z(2, 3, below=5))),
    # writing by index
    *row(aten.select_scatter.default, call(R(3, 4), R(3), 1, -1)),
    *row(aten.slice_scatter.default, call(R(5, 4), R(2, 4), 0, 1, 5, 2)),
    *row(aten.diagonal_scatter.default, call(R(3, 4), R(3), 1)),
    *row(aten.scatter.src, call(R(3, 4), 0, IN_3_4, R(3, 4)), reverse=False),
    *row(aten.scatter.value, call(R(3, 4), 0, IN_3_4, 7.0)),
    *row(aten.scatter_add.default, call(R(3, 4), 0, IN_3_4, R(3, 4))),
    *row(
        aten.scatter_reduce.two,
        *(call(R(3, 4), 0, IN_3_4, R(3, 4), "sum", include_self=s) for s in (True, False)),
    ),
    *rows(
        [aten.index_put.default, aten._unsafe_index_put.default],
        *(call(R(3, 4), [None, Z(4, distinct=True)], R(3, 4)), call(R(3, 4), [Z(5, below=3)], R(4), True)),
    ),
    *row(aten.index_add.default, call(R(3, 4), 0, Z(5, below=3), R(5, 4)), call(R(3), 0, Z(1), R(1), alpha=2)),
    *row(aten.index_copy.default, call(R(3, 4), 1, Z(4, distinct=True), R(3, 4))),
    *row(aten.index_fill.int_Scalar, call(R(3, 4), -1, Z(2, below=4), 7.0)),
    # padding
    *row(aten.constant_pad_nd.default, call(R(3, 4), [1, 2, 0, 1], 5.0), call(R(3, 4), [-1, 2])),
    *rows([aten.reflection_pad1d.default, aten.replication_pad1d.default], call(R(2, 3, 5), [2, 1])),
    *rows([aten.reflection_pad2d.default, aten.replication_pad2d.default], call(IMAGE, [2, 1, 0, 3])),
    *rows([aten.reflection_pad3d.default, aten.replication_pad3d.default], call(VIDEO, [2, 1, 0, 3, 1, 1])),
    # patches and resampling
    *rows([aten.pixel_shuffle.default, aten.pixel_unshuffle.default], call(IMAGE, 2)),
    *row(aten.im2col.default, call(IMAGE, [2, 3], [1, 1], [1, 0], [2, 1])),
    *row(aten.col2im.default, call(R(2, 8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])),
    *row(aten.avg_pool2d.default, call(IMAGE, [2, 2]), call(IMAGE, [3, 3], [2, 2], [1, 1], True, False)),
    *row(aten.avg_pool3d.default, call(VIDEO, [2, 2, 2])),
    *row(aten._adaptive_avg_pool2d.default, call(IMAGE, [2, 3])),
    *row(aten._adaptive_avg_pool3d.default, call(VIDEO, [2, 3, 1])),
    *row(
        aten.grid_sampler_2d.default,
        *(
            call(IMAGE, R(2, 3, 5, 2, low=-1.2, high=1.2), mode, padding, False)
            for mode in (0, 2)
            for padding in (0, 1)
        ),
        *(call(R(1, 3, 4, 5), R(1, 2, 3, 2), 0, 2, True), call(R(1, 3, 4, 5), R(1, 2, 3, 2), 1, 0, True)),
    ),
    *row(aten.grid_sampler_3d.default, call(VIDEO, R(1, 2, 3, 2, 3, low=-1.2, high=1.2), 0, 0, False)),
    *row(aten.upsample_nearest1d.default, call(R(2, 3, 4), [7])),
    *rows([aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default], call(IMAGE, [9, 8])),
    *rows([aten.upsample_nearest3d.default, aten._upsample_nearest_exact3d.default], call(VIDEO, [6, 8, 5])),
    *row(aten.upsample_linear1d.default, call(R(2, 3, 4), [7], False), call(R(2, 3, 4), [7], True)),
    *rows(
        [aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default],
        *(call(IMAGE, [9, 8], False), call(IMAGE, [9, 4], True), call(IMAGE, [9, 9], False, 1.6, 1.6)),
    ),
    *rows(
        [aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default],
        *(call(IMAGE, [3, 8], False),),
    ),
    *row(aten.upsample_trilinear3d.default, call(VIDEO, [6, 8, 5], False)),
    # Fourier
    *row(aten._fft_r2c.default, call(R(3, 4), [1], 0, True), call(R(3, 4), [0, 1], 1, False)),
    *row(aten._fft_c2c.default, call(C(3, 4), [0, 1], 1, True)),
    *row(aten._fft_c2r.default, call(C(3, 4), [1], 2, 6)),
]

FACTOR = R(3, 3, low=0.5)
CONV = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
MATMUL = [
    *row(aten.mm.default, call(R(2, 3), R(3, 4)), call(C(2, 3), C(3, 4))),
    *row(aten.bmm.default, call(R(2, 2, 3), R(2, 3, 4))),
    *row(
        aten._linalg_solve_ex.default,
        *(call(R(3, 3), R(3, 2)), call(R(3, 3), R(3)), call(R(2, 3, 3), R(2, 3)), call(C(3, 3), C(3, 2))),
        call(R(3, 3), R(2, 3), left=False),
        aside=(1,),
    ),
    *row(aten._linalg_det.default, call(R(3, 3)), call(R(2, 3, 3)), call(C(3, 3)), call(R(2, 0, 0)), aside=(1,)),
    *row(aten._linalg_slogdet.default, call(R(3, 3)), call(C(3, 3)), aside=(2,)),
    *row(aten.mv.default, call(R(2, 3), R(3))),
    *row(aten.dot.default, call(R(3), R(3))),
    *row(aten.addmm.default, call(R(4), R(2, 3), R(3, 4)), call(R(2, 4), R(2, 3), R(3, 4), beta=2, alpha=0.5)),
    *row(aten.addmv.default, call(R(2), R(2, 3), R(3)), call(R(2), R(2, 3), R(3), beta=2, alpha=0.5)),
    *row(
        aten.baddbmm.default,
        *(call(R(2, 4), R(2, 2, 3), R(2, 3, 4)), call(R(4), R(2, 2, 3), R(2, 3, 4), beta=2, alpha=0.5)),
    ),
    *row(
        aten.cholesky_inverse.default,
        *(call(FACTOR, upper) for upper in (False, True)),
        call(R(2, 3, 3, low=0.5)),
        formula=False,  # theirs is wrong, and their backward minds the other triangle
        reverse=False,
    ),
    *row(
        aten.cholesky_solve.default,
        *(call(R(3, 2), FACTOR, upper) for upper in (False, True)),
        call(R(2, 3, 2), R(2, 3, 3, low=0.5)),
        formula=False,  # theirs minds the other triangle
        reverse=False,
    ),
    *row(aten._linalg_eigh.default, call(R(4, 4)), call(R(2, 3, 3), "U"), formula=False, reverse=False),
    *row(aten.linalg_eig.default, kink(R(4, 4)), kink(R(2, 3, 3)), reverse=False),  # up to a phase
    *row(
        aten.convolution.default,
        *(call(IMAGE, R(3, 4, 3, 3), R(3), *CONV), call(IMAGE, R(3, 4, 2, 2), None, [2, 2], *CONV[1:])),
        *(call(R(1, 4, 5), R(6, 2, 3), R(6), [1], [1], [2], False, [0], 2),),
        *(call(IMAGE, R(4, 3, 2, 2), R(3), [2, 2], [1, 1], [1, 1], True, [1, 1], 1),),
        *(call(VIDEO, R(2, 2, 2, 2, 2), R(2), [2] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1),),
    ),
]

NORM = [
    *row(
        aten.native_layer_norm.default,
        *(call(R(2, 3, 4), [4], R(4), R(4), 1e-5), call(R(2, 3, 4), [3, 4], None, None, 1e-2)),
    ),
    *row(
        aten._fused_rms_norm.default,
        *(call(R(2, 3, 4), [4], R(4), 1e-5), call(R(2, 3, 4), [3, 4], None, 1e-2)),
    ),
    *row(
        aten.native_group_norm.default,
        *(call(R(2, 4, 3, 3), R(4), R(4), 2, 4, 9, 2, 1e-5), call(R(2, 4, 5), None, None, 2, 4, 5, 1, 1e-2)),
        strided=False,
    ),
    *row(
        aten._native_batch_norm_legit_no_training.default,
        *(call(R(2, 3, 4), w, b, R(3), R(3, low=0.5), 0.1, 1e-5) for w, b in ((R(3), R(3)), (None, None))),
        formula=False,  # none for the statistics
        reverse=False,
    ),
    *row(
        aten.native_batch_norm.default,
        call(R(2, 3, 4), R(3), R(3), None, None, True, 0.1, 1e-5),
        call(R(2, 3, 4), None, None, None, None, True, 0.1, 1e-5),
    ),
    *row(aten._native_batch_norm_legit.no_stats, call(R(2, 3, 4), R(3), R(3), True, 0.1, 1e-5)),
    *row(
        aten._native_batch_norm_legit_functional.default,
        *(call(R(2, 3, 4), R(3), R(3), R(3), R(3, low=0.5), training, 0.1, 1e-5) for training in (True, False)),
        formula=False,
        reverse=False,
    ),
]


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, causal: bool, scale: Any, more: int, keep: Any = lambda lse: lse
) -> tuple[Any, ...]:
    o, lse = torch.ops.jvpgraph.attention(q, k, v, bias, causal, scale)
    return o, keep(lse), *[None] * more


def padded(lse: Tensor) -> Tensor:
    return torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))


# ATen's fused attention takes float32 or less, or a GPU: ours stands in, with the same signature.
QKV = (R(2, 2, 3, 4), R(2, 2, 5, 4), R(2, 2, 5, 6))
SELF = (R(2, 2, 5, 4), R(2, 2, 5, 4), R(2, 2, 5, 4))
BIAS = R(2, 1, 3, 5)
ATTENTION = [
    *row(
        torch.ops.jvpgraph.attention.default,
        *(call(*QKV), call(*QKV, BIAS, False, 0.3), call(*QKV, M(3, 5), False), call(*SELF, None, True)),
        call(R(2, 4, 3, 4), R(2, 2, 5, 4), R(2, 2, 5, 4)),
    ),
    *row(
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        *(call(*QKV), call(*SELF, 0.0, True), call(*QKV, attn_mask=BIAS, scale=0.3)),
        primal=lambda q, k, v, p=0.0, causal=False, attn_mask=None, scale=None: attend(
            q, k, v, attn_mask, causal, scale, 0
        ),
    ),
    *row(
        aten._scaled_dot_product_flash_attention.default,
        *(call(*QKV), call(*SELF, 0.0, True, True, scale=0.3)),
        primal=lambda q, k, v, p=0.0, causal=False, debug=False, scale=None: attend(q, k, v, None, causal, scale, 7),
    ),
    *row(
        aten._scaled_dot_product_efficient_attention.default,
        *(call(*QKV, BIAS, True), call(*SELF, None, True, 0.0, True, scale=0.3)),
        primal=lambda q, k, v, bias, with_lse, p=0.0, causal=False, scale=None: attend(
            q, k, v, bias, causal, scale, 2, padded
        ),
    ),
    *row(
        aten._scaled_dot_product_cudnn_attention.default,
        *(call(*QKV, BIAS, True), call(*SELF, None, True, 0.0, True, True, scale=0.3)),
        primal=lambda q, k, v, bias, with_lse, p=0.0, causal=False, debug=False, scale=None: attend(
            q, k, v, bias, causal, scale, 7, lambda lse: lse.unsqueeze(-1)
        ),
    ),
    *row(
        aten._scaled_dot_product_fused_attention_overrideable.default,
        *(call(*QKV, BIAS), call(*SELF, None, 0.0, True, True, scale=0.3)),
        primal=lambda q, k, v, bias=None, p=0.0, causal=False, debug=False, scale=None: attend(
            q, k, v, bias, causal, scale, 7
        ),
        aside=(1,),
    ),
]

# Two processes in the world group, which is called "0"; both go through the rows in this order.
TWO = ([R(4, 3), R(2)],)
ON_TWO_RANKS = {"group": True, "reverse": False, "strided": False}
TIED = V([1.0, -2.0])  # the same on both ranks
COLLECTIVE = [
    *row(
        c10d.all_reduce.default,
        *(call(R(4, 3), reduce_op, "0") for reduce_op in ("sum", "max", "min")),
        kink(TIED, "max", "0"),
        **ON_TWO_RANKS,
    ),
    *row(
        c10d.all_reduce_coalesced.default,
        *(call(*TWO, reduce_op, "0") for reduce_op in ("sum", "max", "min")),
        **ON_TWO_RANKS,
    ),
    *rows(
        (c10d.reduce_scatter_tensor.default, with_backward.reduce_scatter_tensor.default),
        call(R(4, 3), "sum", 2, "0"),
        **ON_TWO_RANKS,
    ),
    *row(c10d.reduce_scatter_tensor_coalesced.default, call(*TWO, "sum", 2, "0"), **ON_TWO_RANKS),
    *rows(
        (c10d.all_gather_into_tensor.default, with_backward.all_gather_into_tensor.default),
        call(R(4, 3), 2, "0"),
        **ON_TWO_RANKS,
    ),
    *row(c10d.all_gather_into_tensor_coalesced.default, call(*TWO, 2, "0"), **ON_TWO_RANKS),
    *rows(
        (c10d.all_to_all_single.default, with_backward.all_to_all_single.default),
        call(R(4, 3), [2, 2], [2, 2], "0"),
        **ON_TWO_RANKS,
    ),
    *row(c10d.broadcast.default, call(R(4, 3), 1, "0"), **ON_TWO_RANKS),
    *rows((c10d.wait_tensor.default, c10d._wrap_tensor_autograd.default), call(R(4, 3)), **ON_TWO_RANKS),
    *row(torch.ops._dtensor.shard_dim_alltoall.default, call(R(4, 2), 0, 1, "0"), **ON_TWO_RANKS),
]

CASES = [*POINTWISE, *REDUCE, *SHAPE, *MATMUL, *NORM, *ATTENTION, *COLLECTIVE]
