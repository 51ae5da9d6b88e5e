"""Tangents of half-precision models in float32: nearer to the truth wherever they are computed, and no value moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import Block, Checkpointed, TinyDiT
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

import jvpgraph
from benchmarks.precision import error
from jvpgraph import Config
from jvpgraph.kernels.products import mm_float32
from jvpgraph.precision import PRECISIONS
from jvpgraph.testing import check_jvp

PLAIN, WIDE = Config(tangent_precision="model"), Config(tangent_precision="float32")
WAYS = {
    "graph": {"backend": "eager"},
    "op by op": {"backend": "op_by_op"},
    "regions": {"backend": "eager", "regions": Block},
}
LONGER = {
    "sizes": {"backend": "eager", "dynamic": True},
    "gradients": {"backend": "eager", "differentiable_tangent": True},
    "Inductor, sizes": {"backend": "inductor", "dynamic": True},
    "Inductor": {"backend": "inductor"},
    "Inductor, regions": {"backend": "inductor", "regions": Block},
}
CASES = [
    *(pytest.param(torch.bfloat16, TinyDiT, how, id=name) for name, how in WAYS.items()),
    pytest.param(torch.float16, TinyDiT, WAYS["op by op"], id="float16"),
    *(pytest.param(torch.bfloat16, Checkpointed, how, id=name, marks=pytest.mark.long) for name, how in LONGER.items()),
]


def deep(dtype: torch.dtype = torch.bfloat16, kind: type[nn.Module] = TinyDiT) -> nn.Module:
    torch.manual_seed(0)
    return kind(width=32, depth=2).to(dtype)


def drawn(dtype: torch.dtype, tokens: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(tokens)
    x, x_dot = torch.randn(2, 2, tokens, 4, dtype=dtype)
    t, t_dot = torch.rand(2, 2, dtype=dtype)
    return {"x": x, "t": t, "x_dot": x_dot, "t_dot": t_dot}


def step(dual: jvpgraph.DualModule, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Value, tangent, and the gradients of the value in parameters and input, one behind the other."""
    x = given["x"].clone().requires_grad_()
    y, y_dot = dual(x, given["t"], tangents={"x": given["x_dot"], "t": given["t_dot"]})
    grads = torch.autograd.grad(
        y.to(torch.promote_types(y.dtype, torch.float32)).square().sum(), [*dual.parameters(), x]
    )
    return y.detach(), y_dot.detach(), torch.cat([grad.flatten() for grad in grads])


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "kind", "how"), CASES)
def test_it_is_nearer_to_the_truth_and_values_stay(dtype, kind, how):
    """At two sizes, with the gradients of the values."""
    model = deep(dtype, kind)
    exact = jvpgraph.transform(copy.deepcopy(model).double(), backend="eager")
    plain, wide = (jvpgraph.transform(model, **how, config=config) for config in (PLAIN, WIDE))
    for tokens in (8, 12):
        given = drawn(dtype, tokens)
        want, want_dot, want_grads = step(exact, {name: x.double() for name, x in given.items()})
        (y, y_dot, grads), (y_wide, wide_dot, grads_wide) = step(plain, given), step(wide, given)
        assert (y_dot.dtype, wide_dot.dtype, y_wide.dtype) == (dtype, torch.float32, dtype)
        assert error(wide_dot, want_dot) < 0.8 * error(y_dot, want_dot)
        if how["backend"] == "inductor":  # which rounds where kernels end
            assert error(y_wide, want) < 1.5 * error(y, want) + 1e-4
            assert error(grads_wide, want_grads) < 1.5 * error(grads, want_grads) + 1e-4
        else:
            torch.testing.assert_close([y_wide, grads_wide], [y, grads], rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "float32"), (torch.float64, "float32_matmul")], ids=str
)
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
        jvpgraph.transform(model, **how, config=PLAIN)(given, tangents={"input": fine})


@pytest.mark.parametrize("dynamic", [False, True])
def test_products_round_where_it_costs_nothing_and_take_two_parts_where_that_does(dynamic):
    """Queries, keys and values, and the hidden layer; the time, its modulation, the input and the output."""
    torch.manual_seed(0)
    model = TinyDiT(width=256, depth=1).bfloat16()
    dual = jvpgraph.transform(model, backend="eager", dynamic=dynamic, config=Config(keep_graphs=True))
    given = {name: x if name.startswith("t") else x.repeat(2, 20, 1) for name, x in drawn(torch.bfloat16).items()}
    given |= {name: given[name].repeat(2) for name in ("t", "t_dot")}
    with torch.no_grad():
        dual(given["x"], given["t"], tangents={"x": given["x_dot"], "t": given["t_dot"]})
    text = dual.reports[-1].graphs[-1].text
    assert text.count("aten.mm.default(") == 2
    assert text.count("jvpgraph.mm_float32.default(") == 6
    assert text.count("aten.cat.default(") == 3, "the input's tangent is given in half precision"


@pytest.mark.long
def test_more_rows_than_a_thin_product_has_on_the_default_backend():
    """Where most products take half precision, and some give it; with gradients, at two sizes."""
    torch.manual_seed(0)
    model = TinyDiT(width=256, depth=1).bfloat16()
    exact = jvpgraph.transform(copy.deepcopy(model).double(), backend="eager")
    kept = Config(tangent_precision="float32", skip_passes=("round_products",))
    plain, wide, late = (jvpgraph.transform(model, dynamic=True, config=config) for config in (PLAIN, WIDE, kept))
    for tokens in (80, 96):
        given = drawn(torch.bfloat16, tokens)
        want, want_dot, want_grads = step(exact, {name: x.double() for name, x in given.items()})
        (y, y_dot, grads), (y_wide, wide_dot, grads_wide) = step(plain, given), step(wide, given)
        assert error(wide_dot, want_dot) < 0.8 * error(y_dot, want_dot)
        # 1.01 to 1.16 where it is right, 2 where every product rounds.
        assert error(wide_dot, want_dot) < 1.3 * error(step(late, given)[1], want_dot)
        assert error(y_wide, want) < 1.5 * error(y, want) + 1e-4
        assert error(grads_wide, want_grads) < 1.5 * error(grads, want_grads) + 1e-4


def each(names: str, call: Callable[..., Tensor] = lambda op, x: op(x), where: Any = torch) -> dict[str, Any]:
    """Functions of one tensor by the names of ops."""
    return {name: partial(call, getattr(where, name)) for name in names.split()}


OPS = {
    **each("tanh sigmoid erf atan asinh sinc logit exp expm1"),
    **each("gelu silu mish softplus logsigmoid elu hardswish", where=F),
    **each("sqrt rsqrt log log1p lgamma", lambda op, x: op(x.abs())),
    **each("div hypot atan2 logaddexp", lambda op, x: op(x, x.flip(0))),
    **each("logsumexp logcumsumexp softmax log_softmax prod cumprod var std mean", lambda op, x: op(x, -1)),
    "norm": lambda x: x.norm(dim=-1),
    "p-norm": lambda x: torch.linalg.vector_norm(x, 3, dim=-1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "layer_norm": lambda x: F.layer_norm(x, (5,)),
    "rms_norm": lambda x: F.rms_norm(x, (5,)),
    "group_norm": lambda x: F.group_norm(x[None], 2),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.zeros(6, dtype=torch.long)),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(0)),
    "pow": lambda x: x.abs() ** 1.7,
    "huber": lambda x: F.huber_loss(x, x.flip(0)),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1, 1e3), (500, 0), (1e-3, 0), (0.1, 30)])
def test_no_op_is_further_from_the_truth_wherever_its_values_are(name, scale, offset):
    x, x_dot = (scale * torch.randn(6, 5) + offset).bfloat16(), torch.randn(6, 5).bfloat16()
    want = torch.func.jvp(OPS[name], (x.double(),), (x_dot.double(),))[1]
    plain, wide = (
        jvpgraph.jvp(OPS[name], (x,), (x_dot,), backend="op_by_op", config=config)[1] for config in (PLAIN, WIDE)
    )
    found, before = ((dot.double() - want).nan_to_num(0).norm() for dot in (wide, plain))
    assert torch.equal(wide.isfinite(), want.isfinite()) or not plain.isfinite().all()
    assert found <= max(1.5 * before, 4e-3 * want.nan_to_num(0).norm())


class Looped(nn.Module):
    """The same layer again and again, by a loop that is one op; and a branch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Parameter(torch.randn(6, 8, 8) / 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        def step(carry: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            new = carry + F.silu(self.norm(carry) @ weight)
            return new, new.clone()

        last, _ = scan(step, x, self.layers)
        return torch.cond(x.sum() > 0, lambda y: y * 3, lambda y: y.sin() + y, (last,))


class Cast(nn.Module):
    """Half precision under autocast, views of parts, a write in place, a Function with a tangent of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers:
                y = layer(x)
                y[:, 1:3] = y[:, 1:3] * 0.5
                a, b = y.chunk(2, -1)
                x = x + torch.cat([torch.complex(a.float(), b.float()).abs(), Doubled.apply(b)], -1).bfloat16()
        return x.bfloat16()


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, x_dot):
        return 2 * x_dot

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.mark.parametrize(
    ("model", "dtype", "share"), [(Looped, torch.bfloat16, 0.9), (Cast, torch.float32, 1.1)], ids=["loops", "autocast"]
)
@pytest.mark.parametrize("backend", ["eager", "op_by_op", pytest.param("inductor", marks=pytest.mark.long)])
def test_what_models_are_made_of(model, dtype, share, backend):
    """Tangents are handed on in float32 by loops and branches, in the dtype of the primal to others' functions."""
    torch.manual_seed(0)
    model = model().to(dtype)
    given, dot = torch.randn(2, 3, 8).to(dtype)
    exact = copy.deepcopy(model).double()
    want = jvpgraph.transform(exact, backend="eager")(given.double(), tangents={"x": dot.double()})[1]
    found = [
        jvpgraph.transform(model, backend=backend, config=Config(tangent_precision=precision))(
            given, tangents={"x": dot}
        )
        for precision in PRECISIONS
    ]
    errors = [error(y_dot, want) for _, y_dot in found]
    assert [y_dot.dtype for _, y_dot in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert max(errors[1:]) < share * errors[0], errors


@pytest.mark.parametrize("how", [pytest.param(how, id=name) for name, how in WAYS.items()])
def test_they_pass_the_check(how):
    model, given = deep(), drawn(torch.bfloat16)
    dual = jvpgraph.transform(model, **how, config=WIDE)
    tangents = {"x": given["x_dot"].float(), "t": given["t_dot"]}
    assert check_jvp(dual, (given["x"], given["t"]), tangents=tangents).passed


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_several_tangents_are_calls_of_their_own(precision):
    model, given = deep(), drawn(torch.bfloat16)
    config = Config(tangent_precision=precision)
    one = jvpgraph.transform(model, backend="eager", config=config)
    many = jvpgraph.transform(model, backend="eager", config=config, tangents_batched=True)
    dots = torch.randn(3, *given["x"].shape).bfloat16()
    _, y_dots = many(given["x"], given["t"], tangents={"x": dots})
    alone = torch.stack([one(given["x"], given["t"], tangents={"x": dot})[1] for dot in dots])
    assert y_dots.dtype == alone.dtype
    assert error(y_dots, alone.double()) < 0.02


@pytest.mark.parametrize("shapes", [((3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5))], ids=["matrices", "stacks"])
def test_products_in_float32(shapes):
    a, b = (torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    y = mm_float32(a, b)
    torch.testing.assert_close(y, (a.double() @ b.double()).float())
    want = torch.autograd.grad((a.double() @ b.double()).sum(), (a, b))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (a, b)), want, rtol=2**-7, atol=2**-7)
    torch.library.opcheck(torch.ops.jvpgraph.mm_float32.default, (a, b))
    for dims in ((0, None), (None, 0), (0, 0)):
        given = [x if d is None else torch.stack([x, 2 * x]) for x, d in zip((a, b), dims)]
        several = torch.func.vmap(mm_float32, dims)(*given)
        alone = [mm_float32(*(x if d is None else x[i] for x, d in zip(given, dims))) for i in range(2)]
        torch.testing.assert_close(several, torch.stack(alone))
