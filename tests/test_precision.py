"""Tangents of half-precision models in float32: nearer to the truth wherever they are computed, and no value moves."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Block, Checkpointed, TinyDiT
from torch import Tensor, nn

import jvpgraph
from jvpgraph import Config
from jvpgraph.precision import PRECISIONS

WIDE = Config(tangent_precision="float32")
HALVES = (torch.bfloat16, torch.float16)
WAYS = {
    "graph": {"backend": "eager"},
    "sizes": {"backend": "eager", "dynamic": True},
    "op by op": {"backend": "op_by_op"},
    "regions": {"backend": "eager", "regions": Block},
}
LONGER = {
    "gradients": {"backend": "eager", "differentiable_tangent": True},
    "Inductor": {"backend": "inductor"},
    "Inductor, sizes": {"backend": "inductor", "dynamic": True},
    "Inductor, regions": {"backend": "inductor", "regions": Block},
}
CASES = [
    *(pytest.param(dtype, TinyDiT, how, id=f"{name}-{dtype}") for name, how in WAYS.items() for dtype in HALVES),
    pytest.param(torch.bfloat16, Checkpointed, WAYS["graph"], id="checkpoints"),
    *(pytest.param(torch.bfloat16, Checkpointed, how, id=name, marks=pytest.mark.slow) for name, how in LONGER.items()),
]


def deep(dtype: torch.dtype = torch.bfloat16, kind: type[nn.Module] = TinyDiT) -> nn.Module:
    torch.manual_seed(0)
    return kind(width=32, depth=2).to(dtype)


def drawn(dtype: torch.dtype, tokens: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(tokens)
    x, x_dot = torch.randn(2, 2, tokens, 4, dtype=dtype)
    t, t_dot = torch.rand(2, 2, dtype=dtype)
    return {"x": x, "t": t, "x_dot": x_dot, "t_dot": t_dot}


def called(
    model: nn.Module, given: dict[str, Tensor], dtype: torch.dtype | None = None, **how
) -> tuple[Tensor, Tensor]:
    given = {name: x if dtype is None else x.to(dtype) for name, x in given.items()}
    dual = jvpgraph.transform(model, **how)
    return dual(given["x"], given["t"], tangents={"x": given["x_dot"], "t": given["t_dot"]})


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("dtype", "kind", "how"), CASES)
def test_it_is_nearer_to_the_truth_and_values_stay(dtype, kind, how):
    """At two sizes, with the gradients of the values."""
    model = deep(dtype, kind)
    exact = copy.deepcopy(model).double()
    plain, wide = jvpgraph.transform(model, **how), jvpgraph.transform(model, **how, config=WIDE)
    for tokens in (8, 12):
        given = drawn(dtype, tokens)
        want, want_dot = called(exact, given, torch.float64, backend="eager")
        found = []
        for dual in (plain, wide):
            model.zero_grad()
            y, y_dot = dual(given["x"], given["t"], tangents={"x": given["x_dot"], "t": given["t_dot"]})
            y.float().square().sum().backward()
            found.append((y.detach(), y_dot.detach(), [p.grad.clone() for p in model.parameters()]))
        (y, y_dot, grads), (y_wide, wide_dot, grads_wide) = found
        assert (y_dot.dtype, wide_dot.dtype, y_wide.dtype) == (dtype, torch.float32, dtype)
        assert error(wide_dot, want_dot) < 0.8 * error(y_dot, want_dot)
        if how["backend"] == "inductor":  # which rounds where kernels end
            assert error(y_wide, want) < 1.5 * error(y, want) + 1e-4
        else:
            torch.testing.assert_close([y_wide, *grads_wide], [y, *grads], rtol=0, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_what_they_were(dtype, precision):
    model, given = deep(dtype), drawn(dtype)
    plain = jvpgraph.transform(model, backend="eager", config=Config(keep_graphs=True))
    other = jvpgraph.transform(model, backend="eager", config=Config(keep_graphs=True, tangent_precision=precision))
    tangents = {"x": given["x_dot"], "t": given["t_dot"]}
    torch.testing.assert_close(
        other(given["x"], given["t"], tangents=tangents),
        plain(given["x"], given["t"], tangents=tangents),
        rtol=0,
        atol=0,
    )
    last = [dual.reports[-1].graphs[-1] for dual in (plain, other)]
    assert last[0].nodes == last[1].nodes


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="unknown tangent_precision 'half': choose one of 'model', 'float32'"):
        Config(tangent_precision="half")


@pytest.mark.parametrize("how", [pytest.param(how, id=name) for name, how in WAYS.items()])
def test_tangents_of_inputs_may_be_float32(how):
    """What half precision cannot hold of them arrives."""
    model, given = nn.Sequential(nn.Identity()), torch.zeros(3, dtype=torch.bfloat16)
    model, given = nn.Sequential(nn.Identity()), torch.zeros(3, dtype=torch.bfloat16)
    how = {**how, **({"regions": nn.Identity} if "regions" in how else {})}
    fine = torch.tensor([1 + 2**-12, 3.0, -1 - 2**-14])
    dual = jvpgraph.transform(model, **how, config=WIDE)
    torch.testing.assert_close(dual(given, tangents={"input": fine})[1], fine, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"dtype torch.float32, the input has torch.bfloat16"):
        jvpgraph.transform(model, **how)(given, tangents={"input": fine})
