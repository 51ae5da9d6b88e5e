"""Rules that are derived from PyTorch's formulas, and those of the table that stand in for wrong or missing ones:
right against central differences, or refused with the user's line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops import map as map_of_torch
from torch._higher_order_ops import scan, while_loop

import jvpgraph
from jvpgraph import UnsupportedOp
from jvpgraph.rules import TABLE
from jvpgraph.rules.apply import Unknown, bind
from jvpgraph.rules.derived import derive

aten = torch.ops.aten

STEP = 1e-6
WAYS = ["eager", "op_by_op"]
INDEX = torch.tensor([0, 1, 0, 2])
Function = Callable[..., Any]


def R(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def C(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128)


def flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def check(fn: Function, *primals: Tensor, constants: tuple[Tensor, ...] = (), **how: Any) -> None:
    """The value is the function's own, the tangent the central difference."""
    tangents = tuple(torch.randn_like(x) for x in primals)
    out, out_dot = jvpgraph.jvp(fn, (*primals, *constants), (*tangents, *[None] * len(constants)), **how)
    ahead, behind = (
        flat(fn(*(x + h * x_dot for x, x_dot in zip(primals, tangents)), *constants)) for h in (STEP, -STEP)
    )
    for got, want in zip(flat(out), flat(fn(*primals, *constants)), strict=True):
        torch.testing.assert_close(got, want)
    for got, a, b in zip(flat(out_dot), ahead, behind, strict=True):
        want = (a - b) / (2 * STEP)
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * scale)


# ------------------------------------------------------------------------------------ undefined is not zero

UNDEFINED: dict[str, Function] = {
    "scatter_reduce": lambda x: torch.scatter_reduce(x, 0, INDEX, x.sin(), "prod"),
    "special_bessel_j0": lambda x: torch.special.bessel_j0(x),
    "special_scaled_modified_bessel_k1": lambda x: torch.special.scaled_modified_bessel_k1(x.exp()),
    "special_airy_ai": lambda x: torch.special.airy_ai(x),
    "special_chebyshev_polynomial_t": lambda x: torch.special.chebyshev_polynomial_t(x, 3),
    "special_hermite_polynomial_he": lambda x: torch.special.hermite_polynomial_he(x, 3),
    "index_reduce": lambda x: torch.index_reduce(x, 0, INDEX, x.detach(), "mean"),
    "heaviside": lambda x: torch.heaviside(x, x.detach()),
    "": lambda x: (x.view(torch.int64) + 1).view(torch.float64),  # bits
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("name", UNDEFINED)
def test_what_pytorch_calls_not_differentiable_is_refused(name: str, backend: str):
    with pytest.raises(UnsupportedOp, match=rf"{name}.* test_derived.py:\d+ in "):
        jvpgraph.jvp(UNDEFINED[name], (R(4),), (R(4),), backend=backend)


def test_every_refused_op_is_named_with_its_own_reason():
    def fn(x: Tensor) -> Any:
        return torch.heaviside(x, x.detach()), torch.sinc(x), torch.special.airy_ai(x), torch.linalg.qr(x)[1]

    with pytest.raises(UnsupportedOp) as error:
        jvpgraph.jvp(fn, (R(3, 3),), (R(3, 3),), backend="eager")
    assert [node.op for node in error.value.nodes] == ["aten.heaviside.default", "aten.special_airy_ai.default"]


@pytest.mark.parametrize("backend", WAYS)
def test_an_undefined_output_is_refused_only_where_it_is_used(backend: str):
    x = R(3, 3)
    check(lambda x: torch.linalg.det(x), x, backend=backend)
    check(lambda x: torch.linalg.lu(x), x, backend=backend)  # the permutation is constant
    with pytest.raises(UnsupportedOp, match="factors that it returns besides"):
        jvpgraph.jvp(lambda x: torch._C._VariableFunctions._linalg_det(x)[1] * 2, (x,), (x,), backend=backend)


def test_an_operand_that_the_formula_ignores_is_told_from_one_that_it_knows():
    arguments = bind(aten.nll_loss_forward.default, (R(4, 4), INDEX, R(4).exp(), 1, -100), {})
    out = aten.nll_loss_forward.default(**arguments)
    x_dot, weight_dot = R(4, 4), R(4)
    loss_dot, total_dot = derive(aten.nll_loss_forward.default, out, arguments, {"self": x_dot})
    assert isinstance(loss_dot, Tensor)
    assert isinstance(total_dot, Unknown)
    loss_dot, _ = derive(aten.nll_loss_forward.default, out, arguments, {"self": x_dot, "weight": weight_dot})
    assert loss_dot == Unknown("PyTorch's forward AD ignores weight in output 0")


def test_lists_of_which_each_output_has_its_own_inputs():
    xs, ys = [R(2), R(3)], [R(2), R(3)]
    op = aten._foreach_mul.List
    arguments, out = bind(op, (xs, ys), {}), op(xs, ys)
    dots = derive(op, out, arguments, {"self": [xs[0], None], "other": [None, ys[1]]})
    torch.testing.assert_close(dots, [xs[0] * ys[0], xs[1] * ys[1]])


# ------------------------------------------------------------- operands without a tangent, sizes, layouts


def square(x: Tensor) -> Tensor:
    return x @ x.mT + 4 * torch.eye(x.shape[-1], dtype=x.dtype)


def of_one_operand(x: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Formulas some of whose operands have no tangent, that write in place, or ask for sizes in C++."""
    n = x.shape[0]
    s, vectors = torch.linalg.eigh(square(x))
    return (
        torch.ldexp(w, torch.tensor(2)),
        torch.addr(x, c[0], w, alpha=0.5),
        torch.addbmm(x, c.expand(2, n, n), c.expand(2, n, n), alpha=0.5),
        torch.sgn(w) * w,
        F.group_norm(c[None], n, w),
        F.layer_norm(c, [n], w),
        *torch.native_layer_norm(x, [n], w, w, 1e-5),
        torch.linalg.lu_solve(*torch.linalg.lu_factor(square(c)), x),
        torch.cholesky_solve(x, torch.linalg.cholesky(square(c))),
        torch.linalg.qr(x)[1].abs(),
        torch.linalg.svdvals(x),
        s,
        vectors.square(),
        torch.linalg.eigvals(square(x)).real.sum(),
        torch.linalg.lu_factor(square(x))[0],
        torch.logdet(square(x)),
        F.huber_loss(x, c),
        F.batch_norm(x, None, None, w, w, training=True),
        F.instance_norm(x[None]),
        F.prelu(x, w),
        F.celu(x),
        F.glu(torch.cat([x, x.sin()], 1)),
        F.adaptive_avg_pool1d(x[None], 2),
        torch.sinc(x),
        torch.hypot(x, w),
    )


def layouts(n: int) -> list[Tensor]:
    return [R(n, n), R(n, n).mT, R(n, 2 * n)[:, ::2]]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:jvpgraph.jvp compiled the function:RuntimeWarning")  # for each layout
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", WAYS)
def test_formulas_at_other_sizes_and_layouts(backend: str, dynamic: bool | None):
    if backend == "op_by_op" and dynamic:
        return  # there are no sizes to compile for
    torch._dynamo.reset()
    for n in (4, 6):
        for x in layouts(n):
            check(of_one_operand, x, R(n), constants=(R(n, n),), backend=backend, dynamic=dynamic)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning")  # Inductor's lowering
def test_formulas_on_the_default_backend():
    for n in (4, 6):
        check(of_one_operand, R(n, n), R(n), constants=(R(n, n),), dynamic=True)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.norm = torch.nn.Parameter(torch.randn(6)), torch.nn.GroupNorm(2, 6)
        self.slope = torch.nn.PReLU(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.norm(x * self.scale))
        return F.celu(torch.ldexp(x, torch.tensor(1))) + torch.logcumsumexp(x, 1) + torch.sinc(x)


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("inductor", torch.float32), ("eager", torch.bfloat16), ("op_by_op", torch.float32)],
)
def test_gradients_beside_derived_tangents(backend: str, dtype: torch.dtype):
    torch.manual_seed(0)
    net, reference = Net().to(dtype), Net().double()
    reference.load_state_dict(net.state_dict())
    dual = jvpgraph.transform(net, backend=backend)
    eps = 1e-5 if dtype == torch.float32 else 0.05
    for n in (3, 5):
        x = torch.randn(n, 6, dtype=dtype).requires_grad_()
        x_dot = torch.randn_like(x)
        y, y_dot = dual(x, tangents={"x": x_dot})
        twin = x.detach().double().requires_grad_()
        value = reference(twin)
        ahead, behind = (reference(twin.detach() + h * x_dot.double()) for h in (STEP, -STEP))
        want = (ahead - behind).detach() / (2 * STEP)
        torch.testing.assert_close(y_dot.double(), want, rtol=0, atol=eps * want.abs().max().item())
        grads = torch.autograd.grad(y.sum(), [x, *net.parameters()])
        wanted = torch.autograd.grad(value.sum(), [twin, *reference.parameters()])
        largest = max(g.abs().max().item() for g in wanted)
        for got, g in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got.double(), g, rtol=0, atol=eps * largest)


# ----------------------------------------------------------------------------- formulas of PyTorch's that are wrong

WRONG_IN_PYTORCH: dict[str, tuple[Function, list[Tensor]]] = {
    "logcumsumexp": (lambda x: torch.logcumsumexp(10 * x, 0), [R(6)]),
    "silu of complex numbers": (F.silu, [C(4)]),
    "_foreach_maximum with a number": (lambda x: torch._foreach_maximum([x, 2 * x], 0.3), [R(8)]),
    "_foreach_minimum with numbers": (lambda x: torch._foreach_minimum([x, 2 * x], [0.3, -0.3]), [R(8)]),
    "real to the power of complex": (lambda x, n: x.exp() ** n, [R(4), C(4)]),
    "complex number to the power of real": (lambda n: (2 + 1j) ** n, [R(4)]),
    "complex to the power of complex": (lambda x, n: x**n, [C(4), C(4)]),
    "class weights": (lambda x, w: F.cross_entropy(x, INDEX, w.exp()), [R(4, 4), R(4)]),
    "class weights alone": (lambda w: F.nll_loss(R(4, 4) * 0 + 1, INDEX, w.exp(), reduction="sum"), [R(4)]),
    "weights of a binary cross entropy": (
        lambda x, t, w: F.binary_cross_entropy(x.sigmoid(), t.sigmoid(), w),
        [R(4), R(4), R(4)],
    ),
    "statistics of a norm": (lambda x, w: torch.native_group_norm(x, w, w, 2, 4, 3, 2, 1e-5), [R(2, 4, 3), R(4)]),
    "active running statistics": (lambda x, m, v: F.batch_norm(x, m, v.exp()), [R(3, 4), R(4), R(4)]),
    "complex numbers as pairs": (lambda x: x.view(torch.complex128) ** 2, [R(4, 4)]),
    "pairs as complex numbers": (lambda x: x.view(torch.float64).sin(), [C(4)]),
    "no samples": (lambda x, w: F.group_norm(x, 2, w, w), [R(0, 4, 3), R(4)]),
    "no channels": (lambda x, w: F.conv1d(x, w), [R(2, 0, 3), R(3, 0, 1)]),
    "addcmul_ with value": (lambda x: (x * 1).addcmul_(x * 2, x.cos(), value=0.5), [R(8)]),
    "sizes that depend on data": (
        lambda x: (x[INDEX > 0].sin(), torch.masked_select(x, INDEX > 0), torch.bincount(INDEX, x)),
        [R(4)],
    ),
    "parts at indices in a tensor": (
        lambda x: [part * 2 for part in torch.tensor_split(x, torch.tensor([1, 3]))],
        [R(4)],
    ),
    "index of a unique value": (lambda x: torch.unique(INDEX, return_inverse=True)[1] * x, [R(4)]),
    "in evaluation": (lambda x: F.rrelu(x) if torch.compiler.is_compiling() else F.leaky_relu(x, 11 / 48), [R(4)]),
}


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("name", WRONG_IN_PYTORCH)
def test_own_rules_are_right(name: str, backend: str):
    torch.manual_seed(0)
    fn, primals = WRONG_IN_PYTORCH[name]
    check(fn, *primals, backend=backend)


@pytest.mark.parametrize("backend", ["eager", "op_by_op"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.bfloat16])
@pytest.mark.parametrize("values", [[-50.0, 0.0, 50.0], [1e4, 1e4, 1e4]])
def test_weights_of_a_logsumexp_add_up_to_one(values: list[float], dtype: torch.dtype, backend: str):
    """Also where the largest is out of reach of the others, or its exponential of any number."""
    x = torch.tensor(values, dtype=dtype)
    for fn in (lambda x: torch.logcumsumexp(x, 0), lambda x: torch.logsumexp(x, 0, keepdim=True)):
        _, y_dot = jvpgraph.jvp(fn, (x,), (torch.ones_like(x),), backend=backend)
        torch.testing.assert_close(
            y_dot, torch.ones_like(y_dot), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
        )
    none = torch.empty(2, 0, dtype=dtype)
    assert jvpgraph.jvp(lambda x: torch.logcumsumexp(x, 1), (none,), (none,), backend=backend)[1].shape == none.shape


# ------------------------------------------------------------------------------------------- never a raw error


def fails_inside(x: Tensor) -> Tensor:
    return torch.hypot(x, 2 * x)


@pytest.mark.parametrize("backend", WAYS)
def test_what_a_formula_raises_is_told_with_the_line(backend: str, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("it INTERNAL ASSERT FAILED\nmore")

    monkeypatch.setattr("jvpgraph.rules.derived._forward_ad", broken)
    with pytest.raises(UnsupportedOp, match=r"test_derived.py:\d+ in fails_inside .*it INTERNAL"):
        jvpgraph.jvp(fails_inside, (R(4),), (R(4),), backend=backend)


@pytest.mark.parametrize("backend", WAYS)
def test_what_a_rule_of_the_table_raises_is_told_with_the_line(backend: str, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise TypeError("no such thing")

    rule = TABLE[aten.tan.default]
    monkeypatch.setitem(TABLE, rule.op, replace(rule, terms=[replace(rule.terms[0], fn=broken)]))
    with pytest.raises(UnsupportedOp, match=r"test_derived.py:\d+ .*TypeError: no such thing"):
        jvpgraph.jvp(lambda x: x.tan(), (R(4),), (R(4),), backend=backend)


def test_sparse_tensors_are_refused():
    for fn in (lambda x: torch.sparse.mm(x.to_sparse(), x), lambda x: (x.to_sparse() * 2).to_dense()):
        with pytest.raises(UnsupportedOp, match=r"test_derived\.py:"):
            jvpgraph.jvp(fn, (R(3, 3),), (R(3, 3),), backend="op_by_op")


HIGHER_ORDER: dict[str, Function] = {
    "cond": lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
    "while_loop": lambda x: while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin()), (torch.tensor(0), x))[1],
    "scan": lambda x: scan(lambda c, e: (c + e, c * e), torch.zeros((), dtype=x.dtype), x)[1],
    "map": lambda x: map_of_torch(torch.sin, x),
}


@pytest.mark.parametrize("backend", ["eager", "op_by_op"])
@pytest.mark.parametrize("name", HIGHER_ORDER)
def test_through_higher_order_ops(name: str, backend: str):
    check(HIGHER_ORDER[name], R(4), backend=backend)


@pytest.mark.parametrize("backend", ["op_by_op", "eager"])
def test_determinants_of_singular_matrices(backend):
    """PyTorch's formula gives 0 there, as it multiplies by the determinant."""
    rank_two = torch.randn(3, 3, dtype=torch.float64) @ torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    nilpotent = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    for a in (rank_two, torch.ones(2, 2, dtype=torch.float64), nilpotent, torch.zeros(3, 3, dtype=torch.float64)):
        v = torch.randn_like(a)
        ahead, behind = (torch.linalg.det(a + h * v) for h in (1e-5, -1e-5))
        got = jvpgraph.jvp(torch.linalg.det, (a,), (v,), backend=backend)[1]
        torch.testing.assert_close(got, (ahead - behind) / 2e-5, rtol=1e-7, atol=1e-9)
