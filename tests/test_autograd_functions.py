"""An autograd.Function's own jvp is what its tangent is, in graphs and op by op; without one, its forward is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import jvpgraph
from jvpgraph.precision import widened
from tests.kinds.programs import InPlace, WithJvp

BACKENDS = ("op_by_op", "eager", "inductor")
EXACT = {"rtol": 1e-9, "atol": 1e-11}


class Product(torch.autograd.Function):
    """x w n, its derivatives 7 times too large so that they cannot be mistaken; opaque in between, as a kernel is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, n=3):
        return torch.ops.jvpgraph_functions.product(x, w) * n, x > 0

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, ctx.n = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, w)
        ctx.save_for_forward(x, w)

    @staticmethod
    def backward(ctx, g, _):
        x, w = ctx.saved_tensors
        on_x, on_w, _ = ctx.needs_input_grad
        return 7 * g * w * ctx.n if on_x else None, 7 * g * x * ctx.n if on_w else None, None

    @staticmethod
    def jvp(ctx, x_dot, w_dot, _):
        x, w = ctx.saved_tensors
        return 7 * (x_dot * w + x * w_dot) * ctx.n, None


class Reversed(torch.autograd.Function):
    """The argument itself, with another derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = x.mean()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g

    @staticmethod
    def jvp(ctx, x_dot):
        return -x_dot * ctx.factor


library = torch.library.Library("jvpgraph_functions", "DEF")
library.define("product(Tensor x, Tensor w) -> Tensor")
library.impl("product", lambda x, w: x * w, "CompositeExplicitAutograd")
torch.library.register_fake("jvpgraph_functions::product", lambda x, w: x * w, lib=library)
round_ = WithJvp.apply  # taken once, as modules do


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 2, 4).double())

    def forward(self, x: Tensor, part: str) -> Tensor:
        w, before = self.w, x.sin()
        match part:
            case "straight through":
                return round_(3 * before * w) * w
            case "as it is":
                return WithJvp.apply(x)
            case "saved, with a default":
                return Product.apply(before, w)[0] + Product.apply(w, before, 2)[0]
            case "an inactive argument":
                return Product.apply(before, w.detach())[0] * round_(w)
            case "in place":
                return InPlace.apply(before * w) + x
            case "the argument back":
                return Reversed.apply(before) * w + before
            case "in a checkpoint":
                return checkpoint(lambda x: Product.apply(x.cos(), w)[0].exp(), before, use_reentrant=False)
        raise AssertionError(part)

    def tangent(self, x: Tensor, v: Tensor, part: str) -> Tensor:
        w, before, dot = self.w.detach(), x.sin(), x.cos() * v
        match part:
            case "straight through":
                return 3 * dot * w * w
            case "as it is":
                return v
            case "saved, with a default":
                return 7 * (3 + 2) * w * dot
            case "an inactive argument":
                return 7 * 3 * w * dot * w.round()
            case "in place":
                return 2 * dot * w + v
            case "the argument back":
                return -dot * before.mean() * w + dot
            case "in a checkpoint":
                return (3 * before.cos() * w).exp() * 7 * 3 * w * -before.sin() * dot
        raise AssertionError(part)


PARTS = (
    *("straight through", "as it is", "saved, with a default", "an inactive argument"),
    *("in place", "the argument back", "in a checkpoint"),
)


def _check(model: Net, dual, part: str, size: int, requires_grad: bool, dtype=torch.float64) -> None:
    near = EXACT if dtype is torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    x, v = (torch.randn(size, 4).to(dtype) for _ in range(2))
    x.requires_grad_(requires_grad)
    y, d = dual(x, part, tangents={"x": v})
    expected = model(x, part)
    assert_close(y, expected, **near)
    assert_close(d, model.tangent(x.detach(), v, part).to(widened(dtype)), **near)
    assert not d.requires_grad
    leaves = [a for a in (x, model.w) if a.requires_grad]
    grads, grads0 = (
        torch.autograd.grad(out.sum(), leaves, allow_unused=True) if out.requires_grad else () for out in (y, expected)
    )
    assert_close(grads, grads0, **near)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("backend", ["op_by_op", "eager"])
def test_own_jvp(backend, part):
    model = Net()
    for trains in (True, False):
        model.requires_grad_(trains)
        dual = jvpgraph.transform(model, backend=backend)
        for requires_grad in (True, False):
            for size in (3, 5):
                _check(model, dual, part, size, requires_grad)


@pytest.mark.long
def test_own_jvp_compiled():
    model = Net()
    dual = jvpgraph.transform(model)
    for part in ("saved, with a default", "the argument back"):
        _check(model, dual, part, 3, True)
    _check(model, dual, "the argument back", 5, True)


def test_half_precision():
    model = Net().bfloat16()
    for backend in ("op_by_op", "eager"):
        _check(model, jvpgraph.transform(model, backend=backend), "straight through", 3, True, torch.bfloat16)


class Blocks(nn.Module):
    """Data-dependent code around blocks: op by op outside, graphs inside."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = round_(x)
        if x.detach().sum() > 1e9:
            return x
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return round_(self.linear(x) * 8) / 8


def test_between_regions_and_in_them():
    model = Blocks()
    x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    _, d = jvpgraph.transform(model, regions=Block, backend="eager")(x, tangents={"x": v})
    first, second = (block.linear.weight for block in model.blocks)
    assert_close(d, v @ first.mT @ second.mT, **EXACT)


def test_plain_calls_and_other_compiled_code_stay():
    """Nothing is left behind on the Functions, and the Dynamo of others is what it was."""
    forward = WithJvp.forward
    x = torch.randn(3, 4).double()
    jvpgraph.transform(Net(), backend="op_by_op")(x, "as it is", tangents={"x": x})
    assert WithJvp.forward is forward
    with pytest.raises(torch._dynamo.exc.Unsupported, match="jvp"):
        torch.compile(round_, backend="eager", fullgraph=True)(x.clone().requires_grad_())


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradients_of_the_tangent_are_refused(backend):
    x = torch.randn(3, 4).double()
    dual = jvpgraph.transform(Net(), backend=backend, differentiable_tangent=True)
    with pytest.raises(jvpgraph.UnsupportedOp, match=r"autograd.Function .*test_autograd_functions.py:\d+"):
        dual(x, "straight through", tangents={"x": x})


class WrongNumber(WithJvp):
    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot, x_dot


@pytest.mark.parametrize("backend", ["op_by_op", "eager"])
def test_a_jvp_with_too_many_tangents(backend):
    x = torch.randn(3).double()
    with pytest.raises(Exception, match=r"WrongNumber.jvp returned 2 tangents for 1 output"):
        jvpgraph.jvp(WrongNumber.apply, (x,), (x,), backend=backend)


class Straight(torch.autograd.Function):
    """Straight through by its backward alone."""

    @staticmethod
    def forward(ctx, x, several=False):
        return (x.round(), x.sign(), x > 0) if several else x.round()

    @staticmethod
    def backward(ctx, g, *_):
        return g, None


class Shifted(Straight):
    """Of its outputs one has a tangent, the others have none; or it returns what it was given."""

    @staticmethod
    def forward(ctx, x, several=False):
        return (x.round(), 2 * x, x > 0) if several else x.view_as(x)


class Calling(nn.Module):
    def __init__(self, function, several):
        super().__init__()
        self.function, self.several, self.w = function, several, nn.Parameter(torch.rand(3, dtype=torch.float64))

    def forward(self, x):
        out = self.function.apply(x * self.w, self.several)
        return out[0] * self.w + out[1] if self.several else out * self.w


class Scaled(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x)

    def forward(self, z):
        return Straight.apply(self.x) * z


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_without_a_jvp_something_has_to_arrive(backend, grad, several):
    """A straight-through estimator's zero would contradict its backward."""
    x, x_dot = torch.randn(2, 4, 3, dtype=torch.float64)
    dual = jvpgraph.transform(Calling(Straight, several).requires_grad_(grad), backend=backend)
    for n in (4, 2):
        with pytest.raises(jvpgraph.UnsupportedOp, match=r"Straight.*functions.py:\d+ in .*give it a jvp"):
            dual(x[:n].clone().requires_grad_(grad), tangents={"x": x_dot[:n]})
    fixed = jvpgraph.transform(Scaled(x), backend=backend)
    other = torch.randn_like(x)
    right = x.round() * other, x.round() * x_dot
    assert_close(fixed(other, tangents={"z": x_dot}), right, **EXACT)  # of what is not active nothing is asked


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("several", [False, True])
def test_without_a_jvp_the_forward_is_differentiated(backend, several):
    model = Calling(Shifted, several)
    dual = jvpgraph.transform(model, backend=backend)
    for n in (4, 2, 3):
        x, x_dot = torch.randn(2, n, 3, dtype=torch.float64)
        x.requires_grad_()
        y, y_dot = dual(x, tangents={"x": x_dot})
        assert_close(y, model(x), **EXACT)
        assert_close(y_dot, (2 if several else model.w) * model.w * x_dot, **EXACT)
        wanted = torch.autograd.grad(model(x).sum(), (x, model.w))
        assert_close(torch.autograd.grad(y.sum(), (x, model.w)), wanted, **EXACT)
