"""The checker is checked: a violation of each invariant is planted, and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import fx

from jvpgraph.config import Config
from jvpgraph.errors import VerifyError
from jvpgraph.graph.meta import TANGENT_META
from jvpgraph.markers import ARRIVED, MAKE_DUAL, TANGENT_OF
from jvpgraph.passes.context import Context
from jvpgraph.passes.pipeline import Pipeline, Stage
from jvpgraph.verify import ATEN, LOWERED, TORCH_LEVEL, no_marker_is_left, verify
from tests.graphs import R, graph, insert, node

aten = torch.ops.aten


def legal() -> fx.GraphModule:
    """sin and its tangent, both results of a topk, a check that returns nothing, and a tangent whose primal is gone."""
    text = """
    sin = aten.sin(x)
    cos = aten.cos(x)
    mul = aten.mul.Tensor(x_dot, cos)
    topk = aten.topk(sin, 1)
    value = topk[0]
    index = topk[1]
    return sin, mul, value, index
    """
    gm = graph(text, x=R(3, 4), x_dot=R(3, 4))
    node(gm, "mul").meta[TANGENT_META] = "sin"
    node(gm, "value").meta[TANGENT_META] = "gone"
    node(gm, "index").meta[TANGENT_META] = "topk"  # several outputs: not one that it has to fit
    del node(gm, "value").meta["val"]  # of what is not an op
    del insert(gm, aten._assert_async.default, node(gm, "index")).meta["val"]  # returns nothing
    return gm


def without_a_value(gm: fx.GraphModule) -> None:
    del node(gm, "cos").meta["val"]


def of_another_dtype(gm: fx.GraphModule) -> None:
    node(gm, "mul").meta["val"] = node(gm, "mul").meta["val"].float()


def of_other_dims(gm: fx.GraphModule) -> None:
    node(gm, "mul").meta["val"] = node(gm, "mul").meta["val"].unsqueeze(0)


def with_a_mark(gm: fx.GraphModule) -> None:
    insert(gm, MAKE_DUAL, node(gm, "x"), node(gm, "x_dot"), value=1)


def with_a_question(gm: fx.GraphModule) -> None:
    insert(gm, TANGENT_OF, node(gm, "sin"), value=1)


def with_an_assertion(gm: fx.GraphModule) -> None:
    insert(gm, ARRIVED, node(gm, "sin"), [], [node(gm, "x")], "Function", value=1)


def with_a_written_tangent(gm: fx.GraphModule) -> None:
    insert(gm, aten.copy_.default, node(gm, "mul"), node(gm, "x_dot"), value=1)


def out_of_order(gm: fx.GraphModule) -> None:
    node(gm, "x").append(node(gm, "mul"))


MARKER = "is a marker that was not linearised"
PLANTED = [  # what, the node that is named, and the message
    (without_a_value, "cos (aten.cos.default)", "has no fake value"),
    (
        of_another_dtype,
        "mul (aten.mul.Tensor)",
        "is torch.float32 of 2 dims, its primal torch.float64 of 2 dims",
    ),
    (of_other_dims, "mul (aten.mul.Tensor)", "is torch.float64 of 3 dims, its primal torch.float64 of 2 dims"),
    (with_a_mark, "make_dual_default (jvpgraph.make_dual.default)", MARKER),
    (with_a_question, "tangent_of_default (jvpgraph.tangent_of.default)", MARKER),
    (with_an_assertion, "arrived_default (jvpgraph.arrived.default)", MARKER),
    (with_a_written_tangent, "copy__default (aten.copy_.default)", "writes into a tangent"),
    (out_of_order, "Argument 'x_dot' of Node 'mul'", "was used before it has been defined"),  # fx's own lint
]


def test_a_legal_graph_is_let_through():
    gm = legal()
    verify(gm, ATEN, after="nothing")
    insert(gm, aten.copy_.default, node(gm, "sin"), node(gm, "x"), value=1)  # the primal may be written
    verify(gm, ATEN, after="nothing")


@pytest.mark.parametrize(("plant", "where", "message"), PLANTED)
def test_each_violation_is_named_with_its_pass_and_node(plant: Callable[..., None], where: str, message: str):
    gm = legal()
    plant(gm)
    with pytest.raises(VerifyError, match=f"^after pass planted: {re.escape(f'{where} {message}')}"):
        verify(gm, ATEN, after="planted")


def test_every_invariant_is_planted_against():
    """Exactly one of them objects to each violation; to the order none does, which fx's lint sees to."""
    objecting = {}
    for plant, *_ in PLANTED:
        gm = legal()
        plant(gm)
        objecting[plant] = [invariant for invariant in ATEN if any(invariant(gm.graph))]
    assert all(len(found) == (plant is not out_of_order) for plant, found in objecting.items())
    assert {invariant for found in objecting.values() for invariant in found} == set(ATEN)


@pytest.mark.parametrize("is_checked", [True, False])
def test_the_graph_is_verified_after_every_pass(is_checked: bool):
    def spoil(gm: fx.GraphModule, context: Context) -> None:
        """As a pass with a fault would."""
        del node(gm, "cos").meta["val"]

    def mend(gm: fx.GraphModule, context: Context) -> None:
        """Too late."""
        for n in gm.graph.nodes:
            n.meta.setdefault("val", None)

    context = Context(Config(verify=is_checked))
    stage, gm = Stage("ATen", (spoil, mend), ATEN, "traced"), legal()
    with nullcontext() if not is_checked else pytest.raises(VerifyError, match="after pass spoil: cos"):
        Pipeline(context)(stage, gm)
    assert [step.name for step in context.report.graphs] == (["traced"] if is_checked else ["traced", "spoil", "mend"])


def on_torch_level() -> fx.GraphModule:
    text = """
    dual = jvpgraph.make_dual(x, x_dot)
    y = torch.sin(dual)
    y_dot = jvpgraph.tangent_of(y)
    return y, y_dot
    """
    return graph(text, key="example_value", x=R(3, 4), x_dot=R(3, 4))


def of_a_marker(gm: fx.GraphModule) -> None:
    del node(gm, "y_dot").meta["example_value"]


def of_an_input(gm: fx.GraphModule) -> None:
    node(gm, "x_dot").meta["example_value"] = node(gm, "x_dot").meta["example_value"].float()


PLANTED_EARLY = [
    (of_a_marker, "y_dot (jvpgraph.tangent_of.default)", "has no example value"),
    (
        of_an_input,
        "dual (jvpgraph.make_dual.default)",
        "marks torch.float64 of 2 dims with a tangent that is torch.float32 of 2 dims",
    ),
]


@pytest.mark.parametrize(("plant", "where", "message"), PLANTED_EARLY)
def test_graphs_of_dynamos_are_verified_by_what_is_legal_there(plant: Callable[..., None], where: str, message: str):
    gm = on_torch_level()
    verify(gm, TORCH_LEVEL, after="nothing")
    plant(gm)
    with pytest.raises(VerifyError, match=f"^after pass planted: {re.escape(f'{where} {message}')}"):
        verify(gm, TORCH_LEVEL, after="planted")
    assert sum(any(invariant(gm.graph)) for invariant in TORCH_LEVEL) == 1


def test_markers_are_legal_until_linearize_has_run():
    gm = legal()
    with_a_mark(gm)
    verify(gm, LOWERED, after="lower")
    assert {*ATEN} - {*LOWERED} == {no_marker_is_left}
