"""Python numbers read from tensors: refused where one has a tangent, unless PyTorch makes a tensor of it again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import jvpgraph
from tests.models import oracle

EXACT = {"rtol": 1e-9, "atol": 1e-11}
NUMBERS_IN_FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}  # as Inductor may compute with them
GRAPHS = ("eager", "inductor")


def _filled(x: Tensor, number: float) -> Tensor:
    return torch.empty(4, dtype=x.dtype).fill_(number)


def _set(x: Tensor, number: float) -> Tensor:
    y = torch.zeros_like(x)
    y[1] = number
    return y


USES = {
    "full": lambda x, n: x * torch.full((4,), n, dtype=x.dtype),
    "full of an expression": lambda x, n: x * torch.full((4,), 2 * n + 1, dtype=x.dtype),
    "fill_": lambda x, n: x * _filled(x, n),
    "new_full": lambda x, n: x * x.new_full((4,), n),
    "setitem": lambda x, n: x + _set(x, n),
    "where": lambda x, n: torch.where(x > 1, x, n),
    "masked_fill": lambda x, n: x.masked_fill(x > 1, n),
    "tensor": lambda x, n: x * torch.tensor([n]),
    "leaky_relu": lambda x, n: F.leaky_relu(-x, n),
    "value=": lambda x, n: torch.addcmul(x, x, x, value=n),
    "the number in front": lambda x, n: n - x,
    "int": lambda x, n: x * int(n * 10),
    "a size": lambda x, n: x * torch.ones(int(n), dtype=x.dtype).sum(),
}
WITHOUT_GRADIENTS = {  # PyTorch's backward asks for the value of the number
    "lerp": lambda x, n: torch.lerp(x, x * x, n),
    "alpha=": lambda x, n: torch.add(x, x.sin(), alpha=n),
    "exponent": lambda x, n: x**n,
}


def _inputs(requires_grad: bool = True) -> tuple[Tensor, Tensor]:
    return (torch.rand(4).double() + 0.5).requires_grad_(requires_grad), torch.randn(4).double()


@pytest.mark.parametrize(
    ("use", "requires_grad"),
    [*((use, True) for use in USES | WITHOUT_GRADIENTS), *((use, False) for use in WITHOUT_GRADIENTS)],
)
def test_refused_with_the_line(use, requires_grad):
    x, v = _inputs(requires_grad)
    fn = (USES | WITHOUT_GRADIENTS)[use]
    for backend in ("eager", "op_by_op"):
        with pytest.raises(jvpgraph.UnsupportedOp, match=r"test_python_numbers.py:\d+ .*becomes a Python number"):
            jvpgraph.jvp(lambda x: fn(x, x.sum().item()), (x,), (v,), backend=backend)


def test_all_of_them_at_once():
    x, v = _inputs()
    with pytest.raises(jvpgraph.UnsupportedOp, match="2 ops") as error:
        jvpgraph.jvp(_two_numbers, (x,), (v,))
    assert str(error.value).count("becomes a Python number") == 2


def _two_numbers(x):
    return x * torch.full((4,), x.sum().item()) + x.masked_fill(x > 1, float(x.mean()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", GRAPHS)
def test_what_becomes_a_tensor_again_is_right(backend, dtype):
    """Dynamo's x * t.item(): the tangent of the number counts, the gradient, as in PyTorch, does not."""

    def fn(x, number):
        return x * number(x) + x / (2 * number(x) + 1), x > number(x) / 4

    x, v = (a.to(dtype) for a in _inputs(False))
    x.requires_grad_()
    (y, mask), (d, _) = jvpgraph.jvp(lambda x: fn(x, lambda x: x.sum().item()), (x,), (v,), backend=backend)
    y0, d0 = oracle(lambda x: fn(x, torch.sum)[0], (x.detach(),), (v,))
    near = EXACT if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    assert_close((y.detach(), d), (y0, d0), **near)
    assert torch.equal(mask, x > x.sum() / 4)
    (g,), (g0,) = (torch.autograd.grad(out.sum(), x) for out in (y, fn(x, lambda x: x.sum().item())[0]))
    assert_close(g, g0, **near)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:jvpgraph.jvp compiled the function:RuntimeWarning")  # for each use anew
@pytest.mark.parametrize(
    ("backend", "uses"), [("op_by_op", USES | WITHOUT_GRADIENTS), ("eager", USES | WITHOUT_GRADIENTS)]
)
def test_a_detached_number_is_a_constant(backend, uses):
    for use, fn in uses.items():
        torch._dynamo.reset()
        _check_constant(fn, backend, use)


@pytest.mark.long
def test_detached_numbers_with_inductor():
    """But for a size and lerp, of which PyTorch's compiler asks for the value of the number."""
    uses = [fn for use, fn in USES.items() if use != "a size"]
    _check_constant(lambda x, n: torch.stack([fn(x, n) for fn in uses]), "inductor", "leaky_relu")
    uses = [fn for use, fn in WITHOUT_GRADIENTS.items() if use != "lerp"]
    _check_constant(lambda x, n: torch.stack([fn(x, n) for fn in uses]), "inductor", "alpha=")


def _check_constant(fn, backend, use):
    x, v = _inputs(use in USES)
    for values in (x, x.detach().flip(0).requires_grad_(x.requires_grad), x.detach() * 2 + 1):  # another number
        y, d = jvpgraph.jvp(lambda x: fn(x, x.sum().detach().item()), (values,), (v,), backend=backend)
        number = values.sum().item()
        y0, d0 = oracle(lambda x, number=number: fn(x, number), (values.detach(),), (v,))
        near = NUMBERS_IN_FLOAT32 if backend == "inductor" else EXACT
        assert_close((y.detach(), d), (y0, d0), **near)
        if values.requires_grad:
            (g,), (g0,) = (torch.autograd.grad(out.sum(), values) for out in (y, fn(values, number)))
            assert_close(g, g0, **near)


@pytest.mark.parametrize("backend", GRAPHS)
def test_gradients_of_the_tangent(backend):
    x, v = _inputs()
    for fn in (USES["full"], USES["where"]):
        with pytest.raises(jvpgraph.UnsupportedOp, match="becomes a Python number"):
            jvpgraph.jvp(
                lambda x, fn=fn: fn(x, x.sum().item()), (x,), (v,), backend=backend, differentiable_tangent=True
            )


@pytest.mark.parametrize("make", [torch.tensor, lambda data: torch.ones(1).new_tensor(data)])
def test_a_tensor_of_a_list_of_tensors(make):
    x, v = _inputs(False)
    with pytest.raises(jvpgraph.UnsupportedOp, match=r"test_python_numbers.*torch.stack keeps it"):
        jvpgraph.jvp(lambda x: x.sum() * make([x[0], x[1]]), (x,), (v,), backend="eager")
    _, d = jvpgraph.jvp(lambda x: x * torch.tensor([x.numel(), 2.0, x.dim(), 1.0]), (x,), (v,), backend="eager")
    assert_close(d, v * torch.tensor([4.0, 2.0, 1.0, 1.0]).double())


@pytest.mark.long
@pytest.mark.parametrize("backend", GRAPHS)
def test_a_row_that_data_chose(backend):
    """Where it starts in memory, nobody knows before it runs: each such op says so, those of the tangent too."""
    fn = lambda x: x[int(x[:, 0].argmax())] * x  # noqa: E731
    for n in (3, 5):
        x, v = torch.randn(2, n, 4)
        x.requires_grad_()
        y, d = jvpgraph.jvp(fn, (x,), (v,), backend=backend)
        assert_close((y.detach(), d), oracle(fn, (x.detach(),), (v,)))
        assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(fn(x).sum(), x))
