"""Swapping and recognising attention on Dynamo's graphs: numerics with and without, reports, and what must be left."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import jvpgraph
from jvpgraph.graph.torch_level import active_graphs, active_nodes, graphs_in
from jvpgraph.kernels import reference
from jvpgraph.kernels.attention import attention
from jvpgraph.kernels.ops import OPS
from jvpgraph.passes.context import Context, Report
from jvpgraph.passes.recognize_attention import recognize_attention
from jvpgraph.passes.swap_attention import swap_attention

ACTIVE = "L_x_"  # the placeholder that stands for a marked input


def _as_if_marked(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, set[fx.Node]]]:
    return active_graphs(gm, active_nodes(gm, {n for n in gm.graph.find_nodes(op="placeholder") if n.target == ACTIVE}))


class Passes:
    """A backend that runs both passes as if the argument `x` were marked, and then the graph as it is."""

    def __init__(self) -> None:
        self.swap, self.recognize = Report(), Report()
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, _inputs: list[Tensor]) -> Callable:
        self.swap, self.recognize = Report(), Report()
        with pytest.MonkeyPatch.context() as patch:
            for step, report in ((swap_attention, self.swap), (recognize_attention, self.recognize)):
                patch.setattr(importlib.import_module(step.__module__), "active_graphs", _as_if_marked)
                step(gm, Context(jvpgraph.Config(), report))
        for module in graphs_in(gm):
            module.graph.lint()
            module.recompile()
            self.graphs.append(module)
        return gm.forward

    def count(self, target: object) -> int:
        return sum(n.target is target for gm in self.graphs for n in gm.graph.nodes)

    @property
    def attentions(self) -> int:
        return self.count(OPS.attention.default)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def run(model: Callable, *args: Tensor, tolerance: float = 1e-5, **options) -> Passes:
    """Compile with the passes, compare results and gradients of x with the untouched model, return what was
    done."""
    passes = Passes()
    compiled = torch.compile(model, backend=passes, fullgraph=True, **options)
    results = []
    for function in (model, compiled):
        leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in args]
        out = function(*leaves)
        wanted = [a for a in leaves if a.requires_grad]
        grads = torch.autograd.grad(out.float().square().sum(), wanted, allow_unused=True)
        results.append([out, *(g for g in grads if g is not None)])
    for have, want in zip(results[1], results[0], strict=True):
        assert have.dtype == want.dtype
        assert have.shape == want.shape
        size = max(1.0, want.abs().max().item())
        torch.testing.assert_close(have.float(), want.float(), rtol=0, atol=tolerance * size)
    return passes


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def qkv(dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = (2, 3)) -> tuple[Tensor, Tensor, Tensor]:
    return rows(*lead, 7, 8, dtype=dtype), rows(*lead, 9, 8, dtype=dtype), rows(*lead, 9, 5, dtype=dtype)


# ------------------------------------------------------------------------------------- swap: what is swapped

MASK = torch.rand(2, 1, 1, 9) > 0.3
SDPA = {
    "plain": lambda x, k, v: F.scaled_dot_product_attention(x, k, v),
    "causal": lambda x, k, v: F.scaled_dot_product_attention(x, k, v, None, 0.0, True),
    "scale": lambda x, k, v: F.scaled_dot_product_attention(x, k, v, scale=0.2),
    "bool_mask": lambda x, k, v: F.scaled_dot_product_attention(x, k, v, MASK),
    "float_mask": lambda x, k, v: F.scaled_dot_product_attention(
        x, k, v, attn_mask=x.mean(-1, keepdim=True) * v.sum(-1).unsqueeze(-2)
    ),
    "by_name": lambda x, k, v: F.scaled_dot_product_attention(key=k, value=v, query=x, dropout_p=0.0),
    "gqa": lambda x, k, v: F.scaled_dot_product_attention(x, k[:, :1], v[:, :1], enable_gqa=True),
    "one_key_head": lambda x, k, v: F.scaled_dot_product_attention(x, k[:, :1], v[:, :1]),
    "rank_3": lambda x, k, v: F.scaled_dot_product_attention(x[:, 0], k[:, 0], v[:, 0]),
    "rank_5": lambda x, k, v: F.scaled_dot_product_attention(x[None], k[None], v[None]),
    "values_active": lambda x, k, v: F.scaled_dot_product_attention(k, k, x.mean(2, keepdim=True).expand_as(k)),
    "module_view": lambda x, k, v: F.scaled_dot_product_attention(x, k, v).transpose(1, 2).reshape(2, 7, -1),
    "view": lambda x, k, v: F.scaled_dot_product_attention(x[:, 0], k[:, 0], v[:, 0]).view(2, -1),
}


@pytest.mark.parametrize("form", SDPA)
def test_sdpa_is_swapped(form):
    passes = run(SDPA[form], *qkv())
    assert passes.attentions == 1
    assert passes.count(F.scaled_dot_product_attention) == 0
    assert not passes.swap.left
    ((_, line, described),) = passes.swap.swapped
    assert line.startswith("test_swap_attention.py:")
    assert described.startswith("scaled_dot_product_attention")
    assert ("causal" in described) == (form == "causal")


def test_expanded_masks_stay_small():
    def model(x, k, v):
        mask = MASK.expand(2, 3, 7, 9)
        return F.scaled_dot_product_attention(x, k, v, mask) + torch.where(mask, x @ k.mT, -math.inf).softmax(-1) @ v

    passes = run(model, *qkv())
    (gm,) = passes.graphs
    nodes = gm.graph.find_nodes(op="call_function", target=OPS.attention.default)
    assert [node.args[3].meta["example_value"].shape for node in nodes] == [MASK.shape] * 2


def test_new_nodes_say_where_they_come_from():
    passes = run(SDPA["plain"], *qkv())
    (gm,) = passes.graphs
    (node,) = gm.graph.find_nodes(op="call_function", target=OPS.attention.default)
    (o,) = node.users
    assert "test_swap_attention.py" in node.meta["stack_trace"]
    assert o.meta["stack_trace"] == node.meta["stack_trace"]
    assert o.meta["example_value"].shape == (2, 3, 7, 5)
    assert node.meta["example_value"][1].shape == (2, 3, 7)


def test_only_active_attention_is_swapped():
    def model(x, k, v):
        inactive = F.scaled_dot_product_attention(k, k, v)
        return F.scaled_dot_product_attention(x, k, inactive)

    passes = run(model, *qkv())
    assert passes.attentions == 1
    assert passes.count(F.scaled_dot_product_attention) == 1


def test_mutation_makes_active():
    def model(x, k, v):
        buffer = torch.zeros_like(k)
        buffer[:, :, :7].copy_(x)
        return F.scaled_dot_product_attention(buffer, k, v)

    assert run(model, *qkv()).attentions == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    def model(x, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o = F.scaled_dot_product_attention(x, k, v)
            p = torch.softmax(x @ k.mT * 0.3, dim=-1)
            return o + p @ v

    passes = run(model, *qkv(dtype), tolerance=3e-2)
    assert passes.attentions == 2


def test_dynamic_shapes():
    passes = Passes()
    model = torch.compile(
        lambda x, k, v: SDPA["plain"](x, k, v) + torch.softmax(x @ k.mT * 0.2, -1) @ v,
        backend=passes,
        fullgraph=True,
        dynamic=True,
    )
    for n in (10, 11, 30):
        x, k, v = rows(2, 3, n, 8), rows(2, 3, n + 1, 8), rows(2, 3, n + 1, 5)
        expected = SDPA["plain"](x, k, v) + torch.softmax(x @ k.mT * 0.2, -1) @ v
        torch.testing.assert_close(model(x, k, v), expected)
    assert passes.attentions == 2
    assert len(passes.graphs) == 1  # no guard on the sizes: compiled once


# -------------------------------------------------------------------------------- bodies of higher-order ops


def test_checkpointed_attention_is_swapped():
    def block(x, k, v):
        return F.scaled_dot_product_attention(x, k, v) + torch.softmax(x @ k.mT * 0.3, -1) @ v

    def nested(x, k, v):
        return checkpoint(block, x, k, v, use_reentrant=False) * 2

    def model(x, k, v):
        inactive = checkpoint(block, k, k, v, use_reentrant=False)
        return checkpoint(nested, x, k, inactive, use_reentrant=False)

    passes = run(model, *qkv())
    assert passes.attentions == 2
    assert len(passes.swap.swapped) == len(passes.recognize.swapped) == 1
    assert passes.count(F.scaled_dot_product_attention) == 1


def test_activity_is_traced_into_bodies():
    def block(x, k, v):
        return F.scaled_dot_product_attention(k, k, v) * x.mean()

    passes = run(lambda x, k, v: checkpoint(block, x, k, v, use_reentrant=False), *qkv())
    assert passes.attentions == 0


def test_compiled_regions():
    @torch.compiler.nested_compile_region
    def block(x):
        return F.scaled_dot_product_attention(x, x, x)

    passes = Passes()
    model = torch.compile(lambda x: block(block(x)), backend=passes, fullgraph=True)
    x = rows(2, 3, 7, 8)
    torch.testing.assert_close(model(x), block(block(x)))
    assert passes.attentions == 1  # one body, called twice
    assert len(passes.swap.swapped) == 1


def test_marker_in_a_body_is_found():
    graph = fx.Graph()
    x = graph.placeholder("x")
    dual = graph.call_function(torch.ops.jvpgraph.make_dual.default, (x, x))
    graph.output((graph.call_method("sin", (dual,)),))
    body = fx.GraphModule({}, graph)
    outer = fx.Graph()
    y, z = outer.placeholder("y"), outer.placeholder("z")
    called = outer.call_function(torch.ops.higher_order.wrap, (outer.get_attr("body"), y))
    item = outer.call_function(fx.wrap, (called,))
    outer.output((item, outer.call_method("cos", (z,))))
    active = active_nodes(fx.GraphModule({"body": body}, outer))
    assert {n.name for n in active} == {called.name, item.name, "output"}


# ---------------------------------------------------------------------------------------- swap: what is left

LEFT = {
    "dropout": (lambda x, k, v: F.scaled_dot_product_attention(x, k, v, dropout_p=0.5), "dropout_p is 0.5"),
    "batch": (lambda x, k, v: F.scaled_dot_product_attention(x, k[:1], v[:1]), "batch dims"),
    "query_heads": (lambda x, k, v: F.scaled_dot_product_attention(x[:, :1], k, v), "divide that of q"),
    "rank_2": (lambda x, k, v: F.scaled_dot_product_attention(x[0, 0], k[0, 0], v[0, 0]), "one rank"),
    "ranks": (lambda x, k, v: F.scaled_dot_product_attention(x, k[0], v[0]), "one rank"),
}


@pytest.mark.parametrize("case", LEFT)
def test_sdpa_that_is_left(case):
    model, reason = LEFT[case]
    passes = Passes()
    torch.compile(model, backend=passes, fullgraph=True)(*qkv())
    assert passes.attentions == 0
    ((_, line, said),) = passes.swap.left
    assert reason in said
    assert line.startswith("test_swap_attention.py:")


# ---------------------------------------------------------------------------------------- recognised by hand


def upcast_scores(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As diffusers' get_attention_scores with upcast_attention and upcast_softmax."""
    q, k = x.float(), k.float()
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.3)
    return torch.bmm(scores.float().softmax(dim=-1).to(x.dtype), v)


def pooled(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As diffusers' attention pooling: channels before length, both operands scaled."""
    scale = 1 / math.sqrt(math.sqrt(8))
    q, k, v = x.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v)


def audio_vae(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As diffusers' LTX-2 audio autoencoder: the values from the left, the probabilities transposed."""
    scores = torch.bmm(x, k.permute(0, 2, 1).contiguous()) * 8**-0.5
    p = F.softmax(scores, dim=2).permute(0, 2, 1).contiguous()
    return torch.bmm(v.permute(0, 2, 1), p)


def t5(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(x, k.transpose(3, 2))
    scores += x.mean() + torch.ones(1, 3, 7, 9, dtype=x.dtype)
    p = F.softmax(scores.float(), dim=-1).type_as(scores)
    return torch.matmul(F.dropout(p, p=0.1, training=False), v)


def two_masks(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (x @ k.mT) / 3.0 + torch.linspace(0, 1, 63, dtype=x.dtype).view(7, 9)
    return s.masked_fill(~MASK, -math.inf).masked_fill(~MASK[:, :1], -math.inf).softmax(-1) @ v


def decomposed_position_bias(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = x.sum(-1, keepdim=True) * torch.linspace(0, 1, 9, dtype=x.dtype)
    return torch.softmax(0.3 * (x @ k.mT) + bias, -1) @ v


HAND = {
    "operators": (lambda x, k, v: torch.softmax(x @ k.transpose(-2, -1) * 0.3, dim=-1) @ v, 4),
    "no_scale": (lambda x, k, v: (x @ k.mT).softmax(-1) @ v, 4),
    "divided": (lambda x, k, v: torch.matmul(F.softmax(torch.matmul(x, k.mT) / 2.8, dim=3), v), 4),
    "in_place": (lambda x, k, v: (x @ k.mT).mul_(0.3).softmax(-1).matmul(v), 4),
    "scaled_operands": (lambda x, k, v: torch.softmax((x * 0.5) @ (k * 0.5).transpose(-2, -1), -1) @ v, 4),
    "scaled_key_after": (lambda x, k, v: torch.softmax((x * 0.5) @ (k.mT * 0.5), -1) @ v, 4),
    "module": (lambda x, k, v: nn.Softmax(dim=-1)(x @ k.mT * 0.3) @ v, 4),
    "softmax_dtype": (
        lambda x, k, v: F.softmax(x @ k.mT, dim=-1, dtype=torch.float32).to(x.dtype) @ v,
        4,
    ),
    "bmm": (lambda x, k, v: torch.bmm(torch.softmax(torch.bmm(x, k.mT) * 0.3, -1), v), 3),
    "baddbmm": (upcast_scores, 3),
    "baddbmm_mask": (
        lambda x, k, v: torch.baddbmm(v[:, None, :, 0], x, k.mT, beta=1, alpha=0.3).softmax(-1).bmm(v),
        3,
    ),
    "pooled": (pooled, 3),
    "audio_vae": (audio_vae, 3),
    "t5": (t5, 4),
    "einsum": (
        lambda x, k, v: torch.einsum(
            "b h i j, b h j d -> b h i d", torch.einsum("b h i d, b h j d -> b h i j", x, k).softmax(-1), v
        ),
        4,
    ),
    "einsum_lengths_first": (
        lambda x, k, v: torch.einsum(
            "bhqk,bkhd->bqhd",
            torch.softmax(torch.einsum("bkhd,bqhd->bhqk", k.transpose(1, 2), x.transpose(1, 2)) * 0.3, dim=-1),
            v.transpose(1, 2),
        ),
        4,
    ),
    "additive_mask": (lambda x, k, v: torch.softmax(x @ k.mT * 0.3 + v.mean(-1).unsqueeze(2), -1) @ v, 4),
    "mask_first": (lambda x, k, v: torch.softmax(v.mean(-1).unsqueeze(2) + 0.3 * (x @ k.mT), -1) @ v, 4),
    "masked_fill": (lambda x, k, v: (x @ k.mT * 0.3).masked_fill(~MASK, -math.inf).softmax(-1) @ v, 4),
    "masked_before_scale": (
        lambda x, k, v: ((x @ k.mT).masked_fill(~MASK, -math.inf) * 0.3).softmax(-1) @ v,
        4,
    ),
    "masked_large": (
        lambda x, k, v: (x @ k.mT).masked_fill(~MASK, torch.finfo(x.dtype).min).softmax(-1) @ v,
        4,
    ),
    "where": (lambda x, k, v: torch.where(MASK, x @ k.mT * 0.3, -math.inf).softmax(-1) @ v, 4),
    "where_hides": (lambda x, k, v: torch.where(~MASK, -1e9, x @ k.mT * 0.3).softmax(-1) @ v, 4),
    "two_masks": (two_masks, 4),
    "bias_of_queries": (decomposed_position_bias, 4),
    "viewed": (lambda x, k, v: ((x @ k.mT).softmax(-1) @ v).view(6, -1), 4),
    "mixed_precision": (
        lambda x, k, v: (torch.softmax(x.float() @ k.float().mT * 0.3, -1) @ v.float()).to(x.dtype),
        4,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", HAND)
def test_attention_by_hand_is_recognised(form, dtype):
    model, rank = HAND[form]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float64: 1e-5}[dtype]
    passes = run(model, *qkv(dtype, (2, 3)[: rank - 2]), tolerance=tolerance)
    described = [entry[2] for entry in passes.recognize.swapped]
    assert passes.attentions == 1, passes.recognize.left
    assert not passes.recognize.left
    assert "softmax" in described[0]
    assert passes.count(torch.empty) == 0


def test_upcast_is_undone():
    """Operands cast to float32 for the scores alone go into the op as they were."""
    passes = run(upcast_scores, *qkv(torch.bfloat16, (2,)), tolerance=5e-2)
    (gm,) = passes.graphs
    (node,) = gm.graph.find_nodes(op="call_function", target=OPS.attention.default)
    assert [x.meta["example_value"].dtype for x in node.args[:3]] == [torch.bfloat16] * 3
    assert node.args[5] == 0.3


HIDDEN = torch.zeros(4, 4, dtype=torch.bool)
HIDDEN[0] = HIDDEN[2, 3] = True
PADDED = torch.zeros(2, 1, 1, 4, dtype=torch.bool)
PADDED[0] = PADDED[1, ..., 2:] = True


WIDER = {torch.float64: torch.float64, torch.float32: torch.float64, torch.bfloat16: torch.float32}


def added(mask: Tensor, n: float, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, n)


HIDDEN_WHOLE: dict[str, Callable[[float], Callable[..., Tensor]]] = {
    "fill": lambda n: lambda q, k, v: (q @ k.mT).masked_fill(HIDDEN, n).softmax(-1) @ v,
    "fill_padding": lambda n: (
        lambda q, k, v: (q @ k.mT * 0.3).masked_fill(PADDED.expand(2, 3, 4, 4), n).softmax(-1) @ v
    ),
    "where": lambda n: lambda q, k, v: torch.where(~HIDDEN, q @ k.mT * 0.3, n).softmax(-1) @ v,
    "fill_twice": lambda n: lambda q, k, v: (q @ k.mT).masked_fill(HIDDEN, n).masked_fill(PADDED, n).softmax(-1) @ v,
    "infinite_first": lambda n: (
        lambda q, k, v: (q @ k.mT).masked_fill(HIDDEN, -math.inf).masked_fill(PADDED | HIDDEN[:, :1], n).softmax(-1) @ v
    ),
    "finite_first": lambda n: (
        lambda q, k, v: (q @ k.mT).masked_fill(HIDDEN, n).masked_fill(HIDDEN[2:3], -math.inf).softmax(-1) @ v
    ),
    "add": lambda n: lambda q, k, v: (q @ k.mT + added(HIDDEN, n, q.dtype)).softmax(-1) @ v,
    "add_padding": lambda n: lambda q, k, v: (q @ k.mT + added(PADDED, n, q.dtype)).softmax(-1) @ v,
    "add_upcast": lambda n: (
        lambda q, k, v: (q @ k.mT + added(PADDED, n, q.dtype)).softmax(-1, dtype=WIDER[q.dtype]).to(q.dtype) @ v
    ),
    "einsum": lambda n: (
        lambda q, k, v: torch.einsum(
            "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(PADDED, n).softmax(-1), v
        )
    ),
}


def assert_as_the_model(model: Callable[..., Tensor], dtype: torch.dtype, backend: str, tolerance: float) -> None:
    inputs = [torch.randn(2, 3, 4, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    dots = [torch.randn_like(x).detach() for x in inputs]
    want, want_dot = torch.func.jvp(model, tuple(inputs), tuple(dots))
    y_grad = torch.randn_like(want)
    wanted = (want, want_dot, *torch.autograd.grad(model(*inputs), inputs, y_grad))
    y, y_dot = jvpgraph.jvp(model, tuple(inputs), tuple(dots), backend=backend)
    for have, should in zip((y, y_dot, *torch.autograd.grad(y, inputs, y_grad)), wanted):
        assert (have - should).norm() <= tolerance * should.norm()


@pytest.mark.filterwarnings("ignore:jvpgraph.jvp compiled the function:RuntimeWarning")  # for each number anew
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", HIDDEN_WHOLE)
def test_rows_hidden_whole_by_a_finite_number_are_the_models(form, dtype):
    """Their weights are uniform, where scores are filled they have neither tangent nor gradient, where the number is
    added they have both."""
    tolerance = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 5e-2}[dtype]
    numbers = {torch.float64: [-1e9], torch.float32: [-1e4, torch.finfo(dtype).min], torch.bfloat16: [-1e4]}
    for number in numbers[dtype]:
        assert_as_the_model(HIDDEN_WHOLE[form](number), dtype, "eager", tolerance)
        torch._dynamo.reset()


@pytest.mark.parametrize("form", HIDDEN_WHOLE)
def test_rows_hidden_whole_are_recognised(form):
    passes, model = Passes(), HIDDEN_WHOLE[form](-1e9)
    torch.compile(lambda x, k, v: model(x, k, v), backend=passes)(*(torch.randn(2, 3, 4, 8) for _ in range(3)))
    assert passes.attentions == 1, passes.recognize.left


@pytest.mark.slow
def test_rows_hidden_whole_through_inductor():
    assert_as_the_model(HIDDEN_WHOLE["fill"](-1e30), torch.float32, "inductor", 1e-5)


BLIND = {
    "probabilities": lambda q, k, v: (q @ k.mT).masked_fill(HIDDEN, -math.inf).softmax(-1).nan_to_num() @ v,
    "output": lambda q, k, v: ((q @ k.mT).masked_fill(HIDDEN, -math.inf).softmax(-1) @ v).nan_to_num(0.0),
    "added": lambda q, k, v: ((q @ k.mT + added(HIDDEN, -math.inf, q.dtype)).softmax(-1) @ v).nan_to_num(),
}


@pytest.mark.parametrize(
    ("form", "backend"),
    [*product(BLIND, ("op_by_op", "eager")), ("probabilities", "inductor"), ("output", "inductor")],
)
def test_what_nan_to_num_makes_of_rows_that_see_no_key_has_no_tangent(form, backend):
    inputs, dots = ([torch.randn(2, 3, 4, 8) for _ in range(3)] for _ in range(2))
    y, y_dot = jvpgraph.jvp(BLIND[form], tuple(inputs), tuple(dots), backend=backend)
    assert not y[:, :, 0].any()
    assert not y_dot[:, :, 0].any()
    shown = HIDDEN.clone()
    shown[0] = False  # as if they saw everything: the other rows are the same
    want = torch.func.jvp(
        lambda q, k, v: (q @ k.mT).masked_fill(shown, -math.inf).softmax(-1) @ v, tuple(inputs), tuple(dots)
    )
    for have, should in zip((y, y_dot), want):
        torch.testing.assert_close(have[:, :, 1:], should[:, :, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_eager_llama_with_left_padding():
    """transformers masks by the most negative number, added; rows of padding see nothing else."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    net = transformers.LlamaModel(config)
    seen = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def model(x: Tensor) -> Tensor:
        return net(inputs_embeds=x, attention_mask=seen, use_cache=False).last_hidden_state

    x, x_dot = (torch.randn(2, 5, 16) for _ in range(2))
    x.requires_grad_()
    parameters = [p for p in net.parameters() if p.dim() > 1][1:]
    want, want_dot = torch.func.jvp(model, (x,), (x_dot,))
    y_grad = torch.randn_like(want)
    wanted = torch.autograd.grad(model(x), (x, *parameters), y_grad)
    y, y_dot = jvpgraph.jvp(model, (x,), (x_dot,), backend="eager")
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y_dot, want_dot, rtol=1e-4, atol=1e-5)
    for have, should in zip(torch.autograd.grad(y, (x, *parameters), y_grad), wanted):
        assert (have - should).norm() <= 1e-5 * should.norm()


# ------------------------------------------------------------------------------------- hand-written and left


def write_between(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = x @ k.mT
    v = v.clone()
    v.mul_(2)
    return s.softmax(-1) @ v


def autocast_between(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = x @ k.mT
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return s.softmax(-1) @ v


def probabilities_too(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.softmax(x @ k.mT, -1)
    return (p @ v).sum(-1, keepdim=True) + p


def scores_too(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = x @ k.mT
    return (s.softmax(-1) @ v).sum(-1, keepdim=True) + s


def written_scores(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = x @ k.mT
    s.mul_(2)
    return s.softmax(-1) @ v


def written_mask(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(2, 3, 7, 9)
    mask += x @ k.mT
    return mask.softmax(-1) @ v + mask.sum()


def _batched(scores: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """softmax(scores) v with the heads in the batch."""
    x, k, v = (t.flatten(0, 1) for t in operands)
    return scores(x, k, v).softmax(-1).bmm(v).unflatten(0, operands[0].shape[:2])


NOT_ATTENTION = {
    "queries_dim": (lambda x, k, v: torch.softmax(x @ k.mT, dim=-2) @ v, "over dim -2"),
    "probabilities_returned": (probabilities_too, "another user"),
    "scores_returned": (scores_too, "another user"),
    "scores_written": (written_scores, "another user"),
    "mask_written": (written_mask, ""),
    "dropout": (lambda x, k, v: F.dropout(torch.softmax(x @ k.mT, -1), 0.5) @ v, "dropped out"),
    "tensor_scale": (lambda x, k, v: torch.softmax(x @ k.mT * v.mean(), -1) @ v, "pass through mul"),
    "baddbmm_scaled": (
        lambda x, k, v: _batched(lambda x, k, v: torch.baddbmm(v[:, None, :, 0], x, k.mT) * 0.3, x, k, v),
        "before the scores are scaled",
    ),
    "mask_scaled": (
        lambda x, k, v: torch.softmax((x @ k.mT + v.mean(-1).unsqueeze(2)) * 0.3, -1) @ v,
        "scaled",
    ),
    "finite_fills": (
        lambda x, k, v: (x @ k.mT).masked_fill(~MASK, -1e9).masked_fill(MASK[:1], -1e4).softmax(-1) @ v,
        "two finite numbers",
    ),
    "bias_and_finite_fill": (
        lambda x, k, v: (x @ k.mT + v.mean(-1).unsqueeze(2)).masked_fill(~MASK, -1e9).softmax(-1) @ v,
        "filled with a finite number",
    ),
    "finite_fill_and_bias": (
        lambda x, k, v: ((x @ k.mT).masked_fill(~MASK, -1e9) + v.mean(-1).unsqueeze(2)).softmax(-1) @ v,
        "filled with a finite number",
    ),
    "finite_fill": (lambda x, k, v: (x @ k.mT).masked_fill(~MASK, -5.0).softmax(-1) @ v, "set to -5.0"),
    "activation": (lambda x, k, v: torch.softmax((x @ k.mT).tanh(), -1) @ v, "pass through tanh"),
    "write_between": (write_between, "writes in place between"),
    "autocast_between": (autocast_between, "between the two products"),
    "sorted": (lambda x, k, v: torch.softmax(x @ k.mT, -1).sort(-1).values, "used by sort"),
    "gradient": (lambda x, k, v: v.mT @ torch.softmax(x @ k.mT, -1).mT.relu(), "used by relu"),
    "keys_broadcast": (lambda x, k, v: torch.softmax(x @ k[0, 0].mT, -1) @ v, "broadcasts"),
    "values_broadcast": (lambda x, k, v: torch.softmax(x @ k.mT, -1) @ v[0, 0], "used by matmul"),
    "one_key_head": (lambda x, k, v: torch.softmax(x @ k[:1].mT, -1) @ v, "batch dims"),
    "summed_operand": (lambda x, k, v: torch.softmax(x @ k.mT + 1.0, -1) @ v, "pass through add"),
}


@pytest.mark.parametrize("case", NOT_ATTENTION)
def test_what_is_not_surely_attention_is_left(case):
    model, reason = NOT_ATTENTION[case]
    passes = Passes()
    x, k, v = qkv()
    torch.compile(model, backend=passes, fullgraph=True)(x, k, v)
    assert passes.attentions == 0
    assert not passes.recognize.swapped
    assert len(passes.recognize.left) == 1
    assert reason in passes.recognize.left[0][2]


def test_softmax_of_a_router_is_not_mentioned():
    weight = rows(4, 8)
    passes = run(lambda x: F.softmax(F.linear(x, weight), -1), rows(2, 7, 8))
    assert not passes.recognize.left
    assert not passes.recognize.swapped


def test_inactive_attention_by_hand_is_left_silently():
    passes = run(lambda x, k, v: (torch.softmax(k @ k.mT, -1) @ v).mean() + x, *qkv())
    assert passes.attentions == 0
    assert not passes.recognize.left


def test_passes_do_nothing_twice():
    class Twice(Passes):
        def __call__(self, gm, inputs):
            forward = super().__call__(gm, inputs)
            first, code = (self.swap, self.recognize), gm.code
            super().__call__(gm, inputs)
            assert not self.swap.swapped
            assert not self.recognize.swapped
            assert gm.code == code
            self.swap, self.recognize = first
            return forward

    passes = Twice()
    torch.compile(lambda x, k, v: SDPA["plain"](x, k, v) + two_masks(x, k, v), backend=passes)(*qkv())
    assert len(passes.swap.swapped) == len(passes.recognize.swapped) == 1


@pytest.mark.parametrize("backend", ["op_by_op", "eager"])
def test_models_that_call_the_op_themselves(backend):
    """Sliding windows and packed sequences, which scaled_dot_product_attention does not have."""
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    mask = (torch.arange(12)[:, None] - torch.arange(12)).abs() <= 3
    mask[:5, 5:] = mask[5:, :5] = False

    def ours(x: Tensor) -> Tensor:
        packed = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends}
        return attention(x.sin(), x.cos(), x, window=(3, 3), **packed)[0]

    x, x_dot = torch.randn(1, 2, 12, 4).double(), torch.randn(1, 2, 12, 4).double()
    got = jvpgraph.jvp(ours, (x,), (x_dot,), backend=backend)
    wanted = torch.func.jvp(lambda x: reference.attention(x.sin(), x.cos(), x, mask)[0], (x,), (x_dot,))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
