"""A precision of tangents for each module and op."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import Block, Checkpointed
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import jvpgraph
from benchmarks.precision import error, exactly
from benchmarks.precision_cases import own
from jvpgraph import Config, Policy
from jvpgraph.precision import PRECISIONS, carried

aten = torch.ops.aten
WAYS = {
    "graph": {"backend": "eager"},
    "op by op": {"backend": "op_by_op"},
    "gradients": {"backend": "eager", "differentiable_tangent": True},
    "sizes": {"backend": "eager", "dynamic": True},
}


class Wave(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sin()


class Beside(nn.Module):
    """Equal modules beside each other, within another."""

    def __init__(self, *names: str, width: int = 16, checkpoints: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.checkpoints = checkpoints
        self.parts = nn.ModuleDict({name: Wave(width) for name in names})

    def forward(self, x: Tensor) -> list[Tensor]:
        parts = self.parts.values()
        return [checkpoint(part, x, use_reentrant=False) if self.checkpoints else part(x) for part in parts]


def given(rows: int = 3, width: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    x, x_dot = (torch.randn(rows, width, dtype=torch.bfloat16) for _ in range(2))
    return x, x_dot


def coarse(model: Beside, policy: Policy, rows: int = 3, **how) -> list[bool]:
    """Of which outputs the tangents are such that bfloat16 can hold them."""
    x, x_dot = given(rows)
    dual = how.pop("dual", None) or jvpgraph.transform(model, config=Config(tangent_precision=policy), **how)
    _, dots = dual(x.requires_grad_(model.checkpoints), tangents={"x": x_dot})
    assert {dot.dtype for dot in dots} == {torch.float32}
    return [torch.equal(dot, dot.bfloat16().float()) for dot in dots]


@pytest.mark.long
@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpoints"])
@pytest.mark.parametrize("how", [pytest.param(how, id=name) for name, how in WAYS.items()])
def test_modules_and_ops(how, checkpoints):
    model = Beside("a", "b", "c", checkpoints=checkpoints)
    assert coarse(model, Policy({"parts.b": "model"}), **how) == [False, True, False]
    assert coarse(model, Policy({"*": "model", "parts.[ab]": "float32"}, "model"), **how) == [False, False, True]
    assert coarse(model, Policy({"parts.c:aten.sin": "model", "*.linear": "model"}), **how) == [False, False, True]
    assert coarse(model, Policy({":aten.sin": "model", "parts.a": "float32_matmul"}), **how) == [False, True, True]
    policy = Policy({"parts.b": "model"})
    dual = jvpgraph.transform(model, config=Config(tangent_precision=policy), **how)
    for rows in (3, 5, 4):
        assert coarse(model, policy, rows, dual=dual) == [False, True, False]
    assert dual.reports[-1].precisions["model"] * 2 == dual.reports[-1].precisions["float32"] > 0


def test_regions_that_differ_share_no_graph():
    """Those that do not still do; what is op by op between them has its place in the model, too."""
    model = Beside("a", "b", "c")
    how = {"backend": "eager", "regions": Wave}
    config = Config(tangent_precision=Policy({"parts.b": "model"}))
    dual = jvpgraph.transform(model, config=config, **how)
    assert coarse(model, config.tangent_precision, dual=dual) == [False, True, False]
    assert [group.names for group in dual.regions.groups] == [["parts.a", "parts.c"], ["parts.b"]]
    assert [group.graphs for group in dual.regions.groups] == [1, 1]
    linears = {"backend": "eager", "regions": nn.Linear}
    assert coarse(model, Policy({"parts.b": "model"}), **linears) == [False, True, False]


class Flex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.view(1, 1, -1, 16)
        return flex_attention(q, q, q)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_graphs_within_what_is_op_by_op_have_their_place():
    """The tangent of attention is rounded where it comes out, unless it is computed in float32."""
    model = Beside("a", "b")
    model.parts = nn.ModuleDict({"a": Flex(), "b": Flex()})
    policy = Policy({"parts.a": "float32_matmul"})
    assert coarse(model, policy, 4, backend="op_by_op") == [False, True]
    assert coarse(model, policy, 4, backend="eager") == [False, True]


@pytest.mark.long
def test_inductor_and_its_cache_know_them():
    """The graphs of both models are the same; what is cached for one is not for the other."""
    policy = Policy({"parts.a": "model"})
    with fresh_cache():
        for names in (("a", "b"), ("b", "a")):
            torch._dynamo.reset()
            model = Beside(*names)
            exact = copy.deepcopy(model).float()
            dual = jvpgraph.transform(model, dynamic=True, config=Config(tangent_precision=policy))
            for rows in (3, 5):
                x, x_dot = given(rows)
                leaf, wide = x.clone().requires_grad_(), x.float().requires_grad_()
                y, dots = dual(leaf, tangents={"x": x_dot})
                for name, value, dot in zip(names, y, dots):
                    want, want_dot = torch.func.jvp(exact.parts[name], (x.float(),), (x_dot.float(),))
                    torch.testing.assert_close(value.float(), want, rtol=0, atol=2e-2)
                    torch.testing.assert_close(dot, want_dot, rtol=0, atol=5e-2)
                grads = torch.autograd.grad(sum(value.sum() for value in y), [*model.parameters(), leaf])
                wanted = torch.autograd.grad(sum(value.sum() for value in exact(wide)), [*exact.parameters(), wide])
                for grad, want in zip(grads, wanted):
                    torch.testing.assert_close(grad.float(), want, rtol=0, atol=2e-2 * float(want.abs().max()))
            counts = dual.reports[-1].precisions
            assert counts["model"] == counts["float32"] > 0, "the passes ran on it"


@pytest.mark.long
@pytest.mark.parametrize("how", [WAYS["graph"], WAYS["op by op"], {"backend": "eager", "regions": Block}])
def test_values_and_their_gradients_stay(how):
    torch.manual_seed(0)
    model = Checkpointed(width=32, depth=2).bfloat16()
    x, x_dot, t, t_dot = torch.randn(2, 2, 8, 4).bfloat16().unbind() + torch.rand(2, 2).bfloat16().unbind()
    policies = [Policy({"blocks.0": a, ":aten.add": b}, b) for a, b in pairwise(PRECISIONS)]
    seen = []
    for policy in ("model", *policies):
        dual = jvpgraph.transform(model, config=Config(tangent_precision=policy), **how)
        leaf = x.clone().requires_grad_()
        y, _ = dual(leaf, t, tangents={"x": x_dot, "t": t_dot})
        seen.append([y, *torch.autograd.grad(y.square().sum(), [*model.parameters(), leaf])])
    for got in seen[1:]:
        torch.testing.assert_close(got, seen[0], rtol=0, atol=0)


def test_the_last_pattern_that_matches_decides():
    policy = Policy({"blocks.*": "model", "blocks.1": "float32_matmul", "blocks.1.attn:aten.m*": "float32"}, "float32")
    assert policy.at("head", aten.mm.default) == "float32"
    assert policy.at("blocks.10.attn", aten.mm.default) == "model"
    assert policy.at("blocks.1.mlp.0", aten.mm.default) == "float32_matmul"
    assert policy.at("blocks.1._checkpoint_wrapped_module.attn.q", aten.mm.default) == "float32"
    assert policy.at("blocks.1.attn.q", aten.addmm.default) == "float32_matmul"
    assert policy.inside("blocks.1").at("attn.q", aten.mul.Tensor) == "float32"
    assert Policy({":aten.add.Tensor": "model"}).at("", aten.add.Scalar) == "float32"
    assert hash(policy) == hash(Policy(policy.patterns))
    assert [carried(Policy({"a": p}, "model")) for p in PRECISIONS] == ["model", "float32", "float32"]


def test_a_policy_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match=r"unknown precision 'half' of 'blocks': choose one of 'model'"):
        Policy({"blocks": "half"})
    model = Beside("a", "b")
    with pytest.raises(ValueError, match=r"no module is called 'part.a'; did you mean 'parts.a'"):
        jvpgraph.transform(model, config=Config(tangent_precision=Policy({"part.a": "model"})))
    with pytest.raises(ValueError, match=r"no module is called 'q:x'|no module is called 'q'"):
        jvpgraph.transform(model, config=Config(tangent_precision=Policy({"q:aten.mm": "model"})))


def test_an_explanation_says_what_they_come_to():
    dual = jvpgraph.transform(
        Beside("a", "b"), backend="eager", config=Config(tangent_precision=Policy({"parts.a": "model"}))
    )
    x, x_dot = given()
    explanation = dual.explain(x, tangents={"x": x_dot})
    assert explanation.precisions["model"] == explanation.precisions["float32"]
    assert "half precision   tangents: (" in str(explanation)


@pytest.fixture(scope="module")
def judged():
    """A DiT's diagnosis, and the error of its tangent with a setting."""
    case = own(2)
    with torch.no_grad():
        for block in case.net.blocks:
            block.modulation.weight *= 2
    tangents = dict(case.dots.values())

    def tangent(net: nn.Module, inputs: dict[str, Any], dots: dict[str, Tensor], setting: Any = "model") -> Tensor:
        config = Config(tangent_precision=setting)
        return jvpgraph.transform(net, backend="op_by_op", config=config)(**inputs, tangents=dots)[1]

    want = tangent(copy.deepcopy(case.net).double(), exactly(case.inputs), exactly(tangents))
    diagnosis = jvpgraph.diagnose(case.net, (), case.inputs, tangents, steps=())
    return diagnosis, lambda setting: error(tangent(case.net, case.inputs, tangents, setting), want)


def spent(diagnosis: jvpgraph.Diagnosis, setting: Policy | str) -> float:
    """Bytes of tangents, as a multiple of those in the model's precision."""
    active = [op for op in diagnosis.ops if op.active]
    own = [setting if isinstance(setting, str) else setting.at(op.module, op.op) for op in active]
    return sum(op.bytes_in[p] for op, p in zip(active, own)) / sum(op.bytes_in["model"] for op in active)


@pytest.mark.long
def test_the_cheapest_policy_reaches_the_error(judged):
    diagnosis, off = judged
    plain, wide = off("model"), off("float32")
    for wanted in (0.5 * (plain + wide), 0.8 * wide + 0.2 * plain):
        policy = Policy.auto(diagnosis, error=wanted)
        assert 0.98 * wide < off(policy) < min(1.25 * wanted, plain)
        assert 1 < spent(diagnosis, policy) < spent(diagnosis, "float32")
    with pytest.raises(ValueError, match=r"no precision of tangents brings the error to 1.0e-06: float32 everywhere"):
        Policy.auto(diagnosis, error=1e-6)


@pytest.mark.slow
def test_the_best_policy_for_a_budget_keeps_it_and_more_gives_less_error(judged):
    diagnosis, off = judged
    found = [Policy.auto(diagnosis, budget=budget) for budget in (1.0, 1.1, 1.25, 2.0)]
    assert all(spent(diagnosis, policy) <= budget for policy, budget in zip(found, (1.0, 1.1, 1.25, 2.0)))
    errors = [off(policy) for policy in found]
    assert errors[-1] < 0.75 * errors[0]
    assert all(later < 1.05 * earlier for earlier, later in pairwise(errors))
    assert Policy.auto(jvpgraph.Diagnosis(**vars(diagnosis)), budget=1.1) == found[1]
    for wrong in ({}, {"error": 0.1, "budget": 2}):
        with pytest.raises(ValueError, match="give either an error to be reached or a budget"):
            Policy.auto(diagnosis, **wrong)
    with pytest.raises(ValueError, match="the budget is a multiple"):
        Policy.auto(diagnosis, budget=0.5)
