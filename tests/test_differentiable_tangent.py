"""Gradients of the tangent: transform(..., differentiable_tangent=True).

The oracle is a difference quotient of torch.func.jvp's tangent along a random direction of everything that has a
gradient. Reverse mode over torch.func.jvp cannot serve: PyTorch gives the statistics of its norms no gradient, and so
differentiates the tangent of nn.LayerNorm wrongly, which is a test here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import jvpgraph
from jvpgraph.precision import widened
from tests.models import Checkpointed, CountOps, TinyDiT, inputs, oracle
from tests.zoo.base import QUIET
from tests.zoo.cases import CASES
from tests.zoo.oracle import AllDouble, random_tangents
from tests.zoo.run import DoubleBackend

BACKENDS = ("eager", "inductor")
STEP = 1e-5
pytestmark = [pytest.mark.filterwarnings(quiet) for quiet in QUIET]
NEAR = {"rtol": 2e-7, "atol": 1e-8}


def slope(functional, leaves: list[Tensor], directions: list[Tensor]) -> Tensor:
    """The derivative of functional() along directions in the leaves, by differences of fourth order."""
    values, at = {}, 0
    for step in (-2, -1, 1, 2, 0):
        with torch.no_grad():
            for x, direction in zip(leaves, directions):
                x += (step - at) * STEP * direction
        values[step], at = functional().detach() if step else None, step
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * STEP)


def check(dual, call, leaves: list[Tensor]) -> None:
    """Values, tangents and gradients of a random functional of both.

    Args:
        dual: () -> (y, y_dot), ours.
        call: () -> (y, y_dot), torch.func.jvp's.
        leaves: all that has a gradient.
    """
    y, d = dual()
    assert_close((y, d), call(), rtol=1e-9, atol=1e-11)
    on_y, on_d = torch.randn_like(y), torch.randn_like(d)
    grads = torch.autograd.grad((y * on_y).sum() + (d * on_d).sum(), leaves, allow_unused=True)
    directions = [torch.randn_like(x) for x in leaves]

    def functional() -> Tensor:
        y, d = call()
        return (y * on_y).sum() + (d * on_d).sum()

    total = sum((g * direction).sum() for g, direction in zip(grads, directions) if g is not None)
    assert_close(total, slope(functional, leaves, directions), **NEAR)


def check_module(model, primals, dots, names, backend="eager") -> None:
    primals, dots = (tuple(x.clone().requires_grad_() for x in xs) for xs in (primals, dots))
    dual = jvpgraph.transform(model, backend=backend, differentiable_tangent=True)
    check(
        lambda: dual(*primals, tangents=dict(zip(names, dots))),
        lambda: oracle(model, primals, dots),
        [*model.parameters(), *primals, *dots],
    )


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_diffusion_transformer(backend):
    x, t, x_dot, t_dot = inputs()
    depth = 1 if backend == "inductor" else 2  # a second block is compiled as the first is
    check_module(TinyDiT(depth=depth).double(), (x, t), (x_dot, t_dot), ("x", "t"), backend)


class Gated(nn.Module):
    """What else networks are made of; the gate is computed without gradients, the shift is a stop-gradient."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.rms, self.head, self.gate = nn.RMSNorm(5), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.conv(x)))
        with torch.no_grad():
            gate = torch.sigmoid(self.gate(h))
        h = self.rms(h)
        h[:, 0] += 1.5 * h[:, 1]
        return self.head(h).softmax(-1) * gate + x.detach().mean()


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_in_place_writes_and_stops(backend):
    """A value computed under no_grad is a constant to reverse mode, and moves with x in forward mode."""
    model = Gated().double()
    x, x_dot = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
    dual = jvpgraph.transform(model, backend=backend, differentiable_tangent=True)
    after_the_gate = [*model.rms.parameters(), *model.head.parameters()]
    check(lambda: dual(x, tangents={"x": x_dot}), lambda: oracle(model, (x,), (x_dot,)), after_the_gate)
    y, d = dual(x, tangents={"x": x_dot})
    grads = torch.autograd.grad((y + d).sum(), list(model.gate.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


@pytest.mark.slow
def test_layer_norm_where_torch_is_wrong():
    norm, x, x_dot = nn.LayerNorm(8).double(), torch.randn(3, 8).double(), torch.randn(3, 8).double()
    check_module(norm, (x,), (x_dot,), ("input",))
    x.requires_grad_()
    ours = jvpgraph.transform(norm, backend="eager", differentiable_tangent=True)(x, tangents={"input": x_dot})[1]
    torchs = torch.func.jvp(norm, (x,), (x_dot,))[1]
    gradients = [torch.autograd.grad(d.square().sum(), x)[0] for d in (ours, torchs)]
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm(), "torch.func.jvp has become right"


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend):
    x, t, x_dot, t_dot = inputs()
    depth = 1 if backend == "inductor" else 2
    check_module(Checkpointed(depth=depth).double(), (x, t), (x_dot, t_dot), ("x", "t"), backend)


@pytest.mark.long
def test_dynamic_shapes_compile_once():
    model = TinyDiT().double()
    dual = jvpgraph.transform(model, backend="eager", dynamic=True, differentiable_tangent=True)
    for batch, tokens in ((2, 6), (3, 8), (5, 10)):
        x, t, x_dot, t_dot = inputs(batch, tokens)
        y, d = dual(x, t, tangents={"x": x_dot, "t": t_dot})
        assert_close((y, d), oracle(model, (x, t), (x_dot, t_dot)), rtol=1e-9, atol=1e-11)
        grads = torch.autograd.grad(d.square().sum(), list(model.parameters()), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)
    assert len(dual.reports) == 1


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    """Casts are made once, by the model; half types lose what they lose in the primal."""
    model = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.LayerNorm(32), nn.Linear(32, 16))
    x, x_dot = torch.randn(2, 4, 6, 16)
    dual = jvpgraph.transform(model, backend=backend, differentiable_tangent=True)
    exact = jvpgraph.transform(model, backend="eager", differentiable_tangent=True)
    with torch.autocast("cpu", torch.bfloat16):
        d = dual(x, tangents={"input": x_dot})[1]
    (g,), (g0,) = (
        torch.autograd.grad(d.float().square().sum(), model[0].weight)
        for d in (d, exact(x, tangents={"input": x_dot})[1])
    )
    assert (g - g0).norm() / g0.norm() < 0.03


def test_hessian_vector_product():
    """The gradient of <grad f, v>, forward over reverse's mirror image, without a second-order graph of the caller."""
    model = TinyDiT().double()
    x, t, v, _ = inputs()
    x.requires_grad_()

    def energy(x: Tensor) -> Tensor:
        return model(x, t).square().sum()

    _, slope = jvpgraph.jvp(energy, (x,), (v,), backend="eager", differentiable_tangent=True)
    (product,) = torch.autograd.grad(slope, x)
    h = 1e-5
    up, down = (torch.autograd.grad(energy(x + s * v), x)[0] for s in (h, -h))
    assert_close(product, (up - down) / (2 * h), rtol=1e-6, atol=1e-8)


def test_the_backward_streams():
    """No matrix of scores: attention's gradients come from the blocked op."""
    model = TinyDiT().double()
    x, t, x_dot, t_dot = inputs()
    d = jvpgraph.transform(model, backend="eager", differentiable_tangent=True)(
        x, t, tangents={"x": x_dot, "t": t_dot}
    )[1]
    with CountOps() as backward:
        d.sum().backward()
    assert backward.ran["jvpgraph.attention_jvp_backward.default"] == 1
    assert backward.ran["jvpgraph.attention_jvp.default"] == 0


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


def test_refusals():
    x = torch.randn(3, 4).double().requires_grad_()
    with pytest.raises(ValueError, match="differentiable_tangent=True needs one graph, and so another backend"):
        jvpgraph.transform(nn.Linear(4, 4), backend="op_by_op", differentiable_tangent=True)
    with pytest.raises(jvpgraph.UnsupportedOp, match=r"autograd\.Function"):
        jvpgraph.jvp(Custom.apply, (x,), (x.detach(),), backend="eager", differentiable_tangent=True)


@pytest.mark.skipif(
    find_spec("torch._higher_order_ops.register_hook") is None,
    reason="in older torch, hooks of tensors are in no graph",
)
def test_hooks_of_tensors_are_refused() -> None:
    class Hooked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.sin()
            h.register_hook(lambda grad: 2 * grad)
            return h.cos()

    x, x_dot = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    y, _ = jvpgraph.transform(Hooked(), backend="eager")(x, tangents={"x": x_dot})
    assert_close(torch.autograd.grad(y.sum(), x)[0], -2 * x.cos() * x.sin().sin())
    with pytest.raises(jvpgraph.UnsupportedOp, match=r"register_hook.*test_differentiable_tangent\.py"):
        jvpgraph.transform(Hooked(), backend="eager", differentiable_tangent=True)(x, tangents={"x": x_dot})


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(x)
        return torch.cat([z.abs(), (z.abs() + 1).log(), z.angle().sin(), torch.fft.fft2(x).abs()], -1)


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(x, x.flip(0) + 0.5)
        parts = [z.tanh(), z.prod(0, keepdim=True), z.reciprocal(), torch.sgn(z), torch.polar(x, x.flip(1))]
        return torch.cat([torch.view_as_real(z).flatten(1) for z in parts])


class Solving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a = x @ x.mT + 3 * torch.eye(4, dtype=x.dtype)
        lower = torch.linalg.cholesky(a)
        parts = [torch.linalg.inv(a), torch.linalg.solve(a + x, x), lower, torch.cholesky_solve(x, lower)]
        parts += [torch.linalg.solve(a, x[0])[None], torch.linalg.matrix_exp(x), torch.linalg.pinv(a)]
        return torch.cat(parts) * torch.logdet(a) + torch.linalg.det(x)


class Eigenvectors(nn.Module):
    """In PyTorch's formulas 0 / 0 stands on the diagonal, under a zero that is written in place."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigh(x @ x.mT)[1].abs() + torch.linalg.eig(x)[1].abs()


class Quotient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(x @ x.mT + 3 * torch.eye(4, dtype=x.dtype), x).cumprod(1)


class Products(nn.Module):
    """At zeros, where PyTorch's tangent of cumprod has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.cumprod(0), x.cumprod(1), x.prod(1, keepdim=True).expand(4, 4)])


@pytest.mark.long
@pytest.mark.parametrize("model", [Fourier, Complex, Solving, Eigenvectors, Products])
def test_formulas_that_derive(model):
    x, x_dot = torch.randn(4, 4).double(), torch.randn(4, 4).double()
    if model is Products:
        x[0, 1] = x[1, 1] = x[1, 3] = 0
        x[3] = 0
    check_module(model(), (x,), (x_dot,), ("x",))


FINITE_AT_ZERO = {
    "normalize": lambda x: F.normalize(x, dim=-1),
    "norm": lambda x: x.norm(dim=-1),
    "std": lambda x: x.std(-1),
    "std_mean": lambda x: torch.stack(torch.std_mean(x, -1)),
    "exponents": lambda x: x[:, :1].abs() ** (x + 3),
    "powers": lambda x: x.abs() ** torch.tensor([0.0, 1, 2, 3]).to(x),
}


WAYS = [("eager", torch.float64, 1e-7), ("inductor", torch.float32, 1e-5), ("inductor", torch.bfloat16, 5e-2)]


@pytest.mark.parametrize(("backend", "dtype", "eps"), WAYS)
@pytest.mark.parametrize("name", FINITE_AT_ZERO)
def test_rows_of_zeros_have_finite_gradients(name, backend, dtype, eps):
    """As padding has them; where reverse mode over torch.func.jvp makes NaN."""
    fn, (x, x_dot) = FINITE_AT_ZERO[name], torch.randn(2, 3, 4).to(dtype)
    x[1] = 0
    rest, rest_dot = (y[::2].double().requires_grad_() for y in (x, x_dot))
    x, x_dot = (y.clone().requires_grad_() for y in (x, x_dot))
    y_dot = jvpgraph.jvp(fn, (x,), (x_dot,), backend=backend, differentiable_tangent=True)[1]
    want_dot = torch.func.jvp(fn, (rest,), (rest_dot,))[1]
    got = torch.autograd.grad(y_dot.square().sum(), [x, x_dot])
    want = torch.autograd.grad(want_dot.square().sum(), [rest, rest_dot])
    for g, w in zip(got, want, strict=True):
        assert_close(g[::2].double(), w, rtol=eps, atol=eps * w.abs().max().item())
        assert g[1].isfinite().all()


class Resized(nn.Module):
    """Ops whose meta kernels in C++ know no symbolic sizes."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[-1]
        wide = F.pad(x, (0, n))[None, None]
        parts = [F.interpolate(wide, size=(2 * n, n), mode=mode)[0, 0] for mode in ("bilinear", "bicubic")]
        return torch.cat([*parts, torch.fft.rfft(x, n=2 * n).abs()[:, :n]]).sin()


@pytest.mark.long
def test_formulas_at_symbolic_sizes():
    dual = jvpgraph.transform(Resized(), backend="eager", dynamic=True, differentiable_tangent=True)
    for n in (4, 6):
        x, x_dot = (torch.randn(n, n).double().requires_grad_() for _ in range(2))
        check(
            lambda x=x, x_dot=x_dot: dual(x, tangents={"x": x_dot}),
            lambda x=x, x_dot=x_dot: oracle(Resized(), (x,), (x_dot,)),
            [x, x_dot],
        )
    assert len(dual.reports) == 1


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning")  # Inductor's own
def test_formulas_that_derive_with_inductor():
    x, x_dot = torch.randn(4, 4).double(), torch.randn(4, 4).double()
    check_module(Quotient(), (x,), (x_dot,), ("x",), "inductor")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_singular_matrix_is_still_an_error(backend):
    x = torch.ones(4, 4).double()
    with pytest.raises(RuntimeError, match="singular"):
        jvpgraph.jvp(torch.linalg.inv, (x,), (x,), backend=backend, differentiable_tangent=True)


def test_factors_without_a_gradient_are_refused():
    """Of a formula that computes them anew, too."""
    x = torch.randn(4, 4).double()
    with pytest.raises(jvpgraph.UnsupportedOp, match="does not differentiate"):
        jvpgraph.jvp(lambda x: torch.linalg.lu(x)[2], (x,), (x,), backend="eager", differentiable_tangent=True)


class Normalising(nn.Linear):
    """EDM2's forced weight normalisation."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(self.weight / self.weight.norm())
        return super().forward(input)


def test_writes_without_gradients_are_refused():
    x = torch.randn(3, 4).double()
    dual = jvpgraph.transform(Normalising(4, 4).double(), backend="eager", differentiable_tangent=True)
    with pytest.raises(jvpgraph.UnsupportedOp, match="in place without gradients"):
        dual(x, tangents={"input": x})


@pytest.fixture
def _rule_of_normed() -> Iterator[None]:
    """For one test only: test_rules asks a row for every rule that is left in the table."""
    jvpgraph.rules.jvp(NORMED)(_rule)
    yield
    del jvpgraph.rules.TABLE[NORMED]


@pytest.mark.usefixtures("_rule_of_normed")
def test_statistics_without_a_gradient_are_refused():
    """An op whose rule uses such an output, and that is not taken apart, may not pass silently."""
    x, x_dot = torch.randn(3, 8).double(), torch.randn(3, 8).double()
    with pytest.raises(jvpgraph.UnsupportedOp, match="does not differentiate"):
        jvpgraph.jvp(_flash, (x,), (x_dot,), backend="eager", differentiable_tangent=True)


def _flash(x: Tensor) -> Tensor:
    return NORMED(x)[0]


library = torch.library.Library("tests_differentiable", "DEF")
library.define("normed(Tensor x) -> (Tensor, Tensor)")


def _normed(x: Tensor) -> tuple[Tensor, Tensor]:
    size = x.norm(dim=-1, keepdim=True)
    return x / size, size


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)


def _backward(ctx, g, _):
    y, size = ctx.saved_tensors
    return (g - y * (g * y).sum(-1, keepdim=True)) / size


library.impl("normed", _normed, "CompositeExplicitAutograd")
torch.library.register_fake("tests_differentiable::normed", _normed, lib=library)
torch.library.register_autograd("tests_differentiable::normed", _backward, setup_context=_save, lib=library)
NORMED = torch.ops.tests_differentiable.normed.default


def _rule(outs, x, *, x_dot):
    y, size = outs
    size_dot = (y * x_dot).sum(-1, keepdim=True)
    return (x_dot - y * size_dot) / size, size_dot


@pytest.mark.long
@pytest.mark.parametrize("name", ["WanTransformer3DModel"])
def test_diffusers(name):
    case = CASES[name]
    model, inputs = case.build(), case.inputs()
    dots = random_tangents(inputs, case.tangents)
    primals = {path: inputs.pop(path).requires_grad_() for path in case.tangents}
    dual = jvpgraph.transform(model, backend=DoubleBackend("eager"), differentiable_tangent=True)

    def call() -> tuple[Tensor, Tensor]:
        def fn(*xs: Tensor) -> Tensor:
            return model(**inputs, **dict(zip(primals, xs)))[0]

        with AllDouble():
            return oracle(fn, tuple(primals.values()), tuple(dots.values()))

    check(
        lambda: tuple(out[0] for out in dual(**inputs, **primals, tangents=dots)),
        call,
        [*model.parameters(), *primals.values()],
    )


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.sin() * torch.randint_like(x, 2, 10) + x * torch.randint_like(x.mT, 5).mT,
        lambda x: F.hardsigmoid(4 * x) * x,
        lambda x: torch.logit(x.sigmoid()) * x,
        lambda x: torch.logit(x, eps=0.2) * x,
    ],
    ids=["randint_like", "hardsigmoid", "logit", "logit with eps"],
)
def test_ops_whose_own_backward_has_no_derivative(fn):
    x, v = torch.rand(2, 3, 4).double().unbind()
    x.requires_grad_()

    def slope(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return jvpgraph.jvp(fn, (x,), (v,), backend="eager", differentiable_tangent=True)[1]

    (g,) = torch.autograd.grad(slope(x).sum(), x)
    step = 1e-6
    ahead, behind = (slope(x.detach() + sign * step * v).sum() for sign in (1, -1))
    assert_close((g * v).sum(), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


def test_weights_of_several_tensors_are_refused_by_name():
    """Such as those of torchao, and DTensors: the graph has an input for each of their parts."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(TwoTensor(torch.randn(3, 3), torch.randn(3, 3)))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).sin()

    dual = jvpgraph.transform(Net(), backend="eager", differentiable_tangent=True)
    with pytest.raises(jvpgraph.CaptureError, match="takes plain tensors, and the model has a TwoTensor"):
        dual(torch.randn(3, 3), tangents={"x": torch.randn(3, 3)})


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float32, 1e-5)])
def test_ops_whose_own_backward_has_no_derivative_on_the_default_backend(dtype, tolerance):
    """Gradients of value and tangent in the input and in its tangent, at two sizes, compared with float64."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (F.hardsigmoid(4 * x) + torch.logit(x) + torch.logit(x, eps=0.25)) * x

    settings = {"differentiable_tangent": True, "dynamic": True}
    duals = {b: jvpgraph.transform(Net(), backend=b, **settings) for b in ("inductor", "eager")}

    def gradients(x: Tensor, v: Tensor, backend: str) -> list[Tensor]:
        x, v = x.clone().requires_grad_(), v.clone().requires_grad_()
        y, y_dot = duals[backend](x, tangents={"x": v})
        return [y, y_dot, *torch.autograd.grad(y.sum() + y_dot.square().sum(), (x, v))]

    for size in ((3, 4), (5, 6)):
        x, v = (0.3 + 0.4 * torch.rand(size)).to(dtype), torch.randn(size).to(dtype)
        wanted = gradients(x.double(), v.double(), "eager")
        for i, (got, want) in enumerate(zip(gradients(x, v, "inductor"), wanted, strict=True)):
            assert got.dtype == (widened(dtype) if i == 1 else dtype)
            assert (got.double() - want).abs().max() <= tolerance * want.abs().max()
