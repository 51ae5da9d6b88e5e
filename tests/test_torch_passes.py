"""The passes on Dynamo's graphs: a graph of a few nodes before, and after; twice is once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from jvpgraph.autograd_function import OWN_JVP, _call
from jvpgraph.errors import UnsupportedOp
from jvpgraph.markers import MAKE_DUAL
from jvpgraph.passes.call_own_jvps import call_own_jvps
from jvpgraph.passes.copy_overlapping_outputs import copy_overlapping_outputs
from jvpgraph.passes.detach_outputs import detach_outputs
from jvpgraph.passes.mark_stop_gradients import mark_stop_gradients
from jvpgraph.passes.recognize_attention import recognize_attention
from jvpgraph.passes.swap_attention import swap_attention
from tests.graphs import Dynamic, R, check_step, graph, node, run, written

aten = torch.ops.aten
MARK = "a = jvpgraph.make_dual(x, x_dot)\n"
X = {"x": R(3, 4), "x_dot": R(3, 4)}
HEADS = {"x": R(2, 3, 5, 8), "x_dot": R(2, 3, 5, 8), "k": R(2, 3, 6, 8), "v": R(2, 3, 6, 4)}


def dynamo(text: str, **how: Any) -> fx.GraphModule:
    """A graph as Dynamo gives it out."""
    return graph(text, key="example_value", **how)


def stays(step: Any, gm: fx.GraphModule) -> Any:
    before = "\n".join(written(gm))
    return check_step(step, gm, before)


# -------------------------------------------------------------------------------------------- swap_attention

SDPA = MARK + "o = F.scaled_dot_product_attention(a, k, v{})\ny = o.sum()\nreturn y"


@pytest.mark.parametrize(
    ("how", "ours", "form"),
    [
        ("", "None, False, None", ""),
        (", is_causal=True", "None, True, None", " causal"),
        (", None, 0.0, True, scale=2", "None, True, 2.0", " causal"),
        (", mask", "mask, False, None", " mask"),
        (", attn_mask=mask, scale=0.5", "mask, False, 0.5", " mask"),
    ],
)
def test_attention_of_torch_becomes_ours(how: str, ours: str, form: str):
    gm = dynamo(SDPA.format(how), **HEADS, mask=R(5, 6))
    node(gm, "o").meta.update(stack_trace='File "/m.py", line 3, in forward')
    report = check_step(
        swap_attention,
        gm,
        f"""
        a = jvpgraph.make_dual(x, x_dot)
        attention_default = jvpgraph.attention(a, k, v, {ours})
        getitem = attention_default[0]
        y = getitem.sum()
        return y
        """,
    )
    assert report.swapped == [("o", "m.py:3 in forward", f"scaled_dot_product_attention{form}")]
    assert report.left == []
    for name in ("attention_default", "getitem"):
        assert node(gm, name).meta["stack_trace"] == 'File "/m.py", line 3, in forward'
    assert node(gm, "getitem").meta["example_value"].shape == (2, 3, 5, 4)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (", dropout_p=0.5", "dropout_p is 0.5"),
        (", None, rate", "dropout_p is rate"),
        (", scale=factor", "scale is not a number"),
        (", is_causal=flag", "is_causal is not known"),
    ],
)
def test_other_attention_is_left_with_a_reason(how: str, reason: str):
    gm = dynamo(SDPA.format(""), **HEADS, rate=0.5, factor=0.5, flag=True)
    call = node(gm, "o")
    settings = {part.split("=")[0]: part.split("=")[1] for part in how.split(", ") if "=" in part}
    call.kwargs = {
        key: node(gm, value) if value in ("factor", "flag") else float(value) for key, value in settings.items()
    }
    if "rate" in how:
        call.args = (*call.args, None, node(gm, "rate"))
    report = stays(swap_attention, gm)
    assert report.left == [("o", "(no source line)", reason)]
    assert report.swapped == []


def test_causal_beside_a_mask_and_dims_that_broadcast_are_left():
    gm = dynamo(SDPA.format(""), **HEADS, mask=R(5, 6))
    node(gm, "o").kwargs = {"is_causal": True, "attn_mask": node(gm, "mask")}
    report = stays(swap_attention, gm)
    assert report.left[0][2].startswith("is_causal together with attn_mask")
    gm = dynamo(SDPA.format(""), **HEADS | {"k": R(1, 3, 6, 8), "v": R(1, 3, 6, 4)})
    report = stays(swap_attention, gm)
    assert "broadcast" in report.left[0][2]
    gm = dynamo(SDPA.format(""), **HEADS)
    del node(gm, "o").meta["example_value"]
    report = stays(swap_attention, gm)
    assert report.left[0][2] == "its shape is not known"


def test_attention_that_no_mark_reaches_stays():
    text = MARK + "o = F.scaled_dot_product_attention(k, k, v)\ny = o + a.sum()\nreturn y"
    gm = dynamo(text.replace("o + a.sum()", "operator.add(o, 1)"), **HEADS)
    report = stays(swap_attention, gm)
    assert (report.swapped, report.left) == ([], [])


def test_a_mask_is_taken_before_it_was_expanded_and_views_get_what_they_need():
    x = R(2, 5, 3, 8).transpose(1, 2)
    text = (
        MARK
        + "m = mask.expand(2, 3, 5, 6)\no = F.scaled_dot_product_attention(a, k, v, m)\ny = o.view(2, 15, 4)\nreturn y"
    )
    gm = dynamo(text, **HEADS | {"x": x}, mask=R(5, 6))
    value = node(gm, "o").meta["example_value"]
    report = run(swap_attention, gm)
    assert len(report.swapped) == 1
    (attention,) = (n for n in gm.graph.nodes if str(n.target) == "jvpgraph.attention.default")
    assert attention.args[3] is node(gm, "mask")
    made = node(gm, "y").all_input_nodes[0]
    ours = next(n for n in attention.users).meta["example_value"]
    assert (made.target == "contiguous") == (value.is_contiguous() and not ours.is_contiguous())


def test_attention_in_the_body_of_a_checkpoint():
    body = dynamo(
        "o = F.scaled_dot_product_attention(q, k, v)\nreturn o", q=R(2, 3, 5, 8), k=R(2, 3, 6, 8), v=R(2, 3, 6, 4)
    )
    gm = dynamo(MARK + "y = neg(x)\nreturn y", given={"neg": torch.neg}, **HEADS)
    gm.body = body
    with gm.graph.inserting_before(node(gm, "y")):
        inside = gm.graph.get_attr("body")
    node(gm, "y").target = torch.ops.higher_order.tag_activation_checkpoint
    node(gm, "y").args = (inside, node(gm, "a"), node(gm, "k"), node(gm, "v"))
    report = run(swap_attention, gm)
    assert len(report.swapped) == 1
    assert written(body)[0] == "attention_default = jvpgraph.attention(q, k, v, None, False, None)"


# --------------------------------------------------------------------------------------- recognize_attention

PRODUCT = "kt = k.transpose(-1, -2)\ns = torch.matmul(a, kt)\n"
BY_HAND = {  # how, the arguments of ours, and the form that is reported
    "matmul": (
        PRODUCT + "z = operator.mul(s, 0.5)\np = F.softmax(z, dim=-1)\no = torch.matmul(p, v)",
        "a, k, v, None, False, 0.5",
        "matmul softmax matmul",
    ),
    "divided, with a mask": (
        PRODUCT + "z = operator.truediv(s, 4)\nm = operator.add(z, mask)\np = m.softmax(-1)\no = operator.matmul(p, v)",
        "a, k, v, mask, False, 0.25",
        "matmul softmax matmul",
    ),
    "einsum": (
        "s = torch.einsum('bhqd,bhkd->bhqk', a, k)\np = torch.softmax(s, 3)\no = torch.einsum('bhqk,bhkd->bhqd', p, v)",
        "a, k, v, None, False, 1.0",
        "einsum softmax einsum",
    ),
    "casts and dropout that is off": (
        PRODUCT + "f = s.float()\np = F.softmax(f, dim=-1)\nd = F.dropout(p, 0.5, False)\n"
        "t = d.to(torch.float64)\no = torch.matmul(t, v)",
        "a, k, v, None, False, 1.0",
        "matmul softmax matmul",
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_attention_by_hand_becomes_ours(name: str):
    how, ours, form = BY_HAND[name]
    gm = dynamo(MARK + how + "\nreturn o", **HEADS, mask=R(5, 6))
    report = run(recognize_attention, gm)
    assert [row[2] for row in report.swapped] == [form]
    gm.graph.eliminate_dead_code()
    assert f"attention_default = jvpgraph.attention({ours})" in written(gm)
    assert written(gm)[-1] == "return getitem"
    before = written(gm)
    report = run(recognize_attention, gm)
    assert (report.swapped, report.left) == ([], [])
    assert written(gm) == before


SOFTMAX = "p = F.softmax(s, dim=-1)\n"
PRODUCT_2 = "o = torch.matmul(p, v)"
NOT_ATTENTION = {
    "another dim": ("p = F.softmax(s, dim=2)\n" + PRODUCT_2, "the softmax is over dim 2 of 4"),
    "read elsewhere": (SOFTMAX + "r = p.sum()\n" + PRODUCT_2, "the probabilities (p) have another user"),
    "scores read elsewhere": (SOFTMAX + "r = s.sum()\n" + PRODUCT_2, "the scores (s) have another user"),
    "dropped out": (SOFTMAX + "d = F.dropout(p, 0.5)\no = torch.matmul(d, v)", "the probabilities are dropped out"),
    "no second product": (SOFTMAX + "o = torch.exp(p)", "the probabilities are used by exp"),
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_what_is_not_surely_attention_stays(name: str):
    how, reason = NOT_ATTENTION[name]
    gm = dynamo(MARK + PRODUCT + how + "\nreturn o", **HEADS)
    report = stays(recognize_attention, gm)
    assert [row[2] for row in report.left] == [reason]
    assert report.swapped == []


# --------------------------------------------------------------------------------------- mark_stop_gradients

STOPPED = {
    "a method": "d = a.detach()",
    "a function": "d = torch.detach(a)",
    "data": "d = data(a)",
    "a copy": "d = a.new_tensor(a)",
}


@pytest.mark.parametrize("name", ["a method", "a function", "data"])
def test_stop_gradients_are_marked(name: str):
    gm = dynamo(
        MARK + STOPPED[name] + "\ny = torch.mul(d, a)\nreturn y, d",
        given={"data": torch._C._autograd._get_data_attr},
        **X,
    )
    node(gm, "d").meta["stack_trace"] = "here"
    before = written(gm)
    check_step(
        mark_stop_gradients,
        gm,
        f"""
        a = jvpgraph.make_dual(x, x_dot)
        {before[1]}
        expand_default = aten.expand(d, [-1, -1], implicit=True)
        y = torch.mul(expand_default, a)
        return y, expand_default
        """,
    )
    assert node(gm, "expand_default").meta["stack_trace"] == "here"


def test_a_stop_in_place_holds_from_there_on():
    gm = dynamo(MARK + "b = torch.neg(a)\nc = torch.cos(b)\nd = b.detach_()\ny = torch.mul(b, c)\nreturn y, d", **X)
    check_step(
        mark_stop_gradients,
        gm,
        """
        a = jvpgraph.make_dual(x, x_dot)
        b = torch.neg(a)
        c = torch.cos(b)
        d = b.detach()
        expand_default = aten.expand(d, [-1, -1], implicit=True)
        y = torch.mul(expand_default, c)
        return y, expand_default
        """,
    )


def test_what_has_no_tangent_needs_no_mark_and_an_unmarked_graph_none_at_all():
    stays(mark_stop_gradients, dynamo(MARK + "i = torch.argmax(a)\nd = i.detach()\nreturn d", **X))
    stays(mark_stop_gradients, dynamo("d = x.detach()\nreturn d", **X))


def test_stop_gradients_inside_functions_are_marked_when_they_run():
    def straight_through(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    gm = dynamo(MARK + "y = f(a)\nz = g(y)\nreturn z", given={"f": straight_through, "g": F.gelu}, **X)
    run(mark_stop_gradients, gm)
    target = node(gm, "y").target
    assert target is not straight_through
    assert node(gm, "z").target is F.gelu
    made = torch.fx.experimental.proxy_tensor.make_fx(target, tracing_mode="fake")(torch.randn(3))
    assert [n.kwargs for n in made.graph.find_nodes(op="call_function", target=aten.expand.default)] == [
        {"implicit": True}
    ]
    torch.testing.assert_close(target(torch.tensor([0.4, 1.6])), torch.tensor([0.0, 2.0]))
    run(mark_stop_gradients, gm)
    assert node(gm, "y").target is target, "run twice"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("d = a.detach()\nw = d.add_(1)", "writes through a detached alias"),
        ("d = a.detach()\nv = d.view(12)\nw = v.zero_()", "writes through a detached alias"),
        ("d = a.detach()\nw = torch.neg(x, out=d)", "writes through a detached alias"),
    ],
)
def test_writes_through_a_stop_gradient_are_refused(how: str, reason: str):
    gm = dynamo(MARK + how + "\nreturn d", **X, i=torch.tensor([0]), table=R(3, 4))
    with pytest.raises(UnsupportedOp, match=reason):
        run(mark_stop_gradients, gm)


def test_what_may_be_written_and_what_may_not():
    stays_but_marks = dynamo(MARK + "d = a.detach()\nc = d.clone()\nw = c.add_(1)\nreturn w", **X)
    run(mark_stop_gradients, stays_but_marks)
    table = dynamo(MARK + "d = a.detach()\ny = F.embedding(i, d, None, 1.0)\nreturn y", **X, i=torch.tensor([0]))
    with pytest.raises(UnsupportedOp, match=r"embedding.*writes through a detached alias"):
        run(mark_stop_gradients, table)
    lists = dynamo(MARK + "s = a.sum()\nreturn s", **X)
    with lists.graph.inserting_before(lists.graph.output_node()):
        made = lists.graph.call_function(torch.tensor, ([node(lists, "s"), 1.0],))
    made.meta["example_value"] = node(lists, "s").meta["example_value"]
    with pytest.raises(UnsupportedOp, match=r"torch.stack keeps it"):
        run(mark_stop_gradients, lists)


# ------------------------------------------------------------------------ detach_outputs, copy_overlapping_outputs


def grad(*shape: int) -> Tensor:
    return R(*shape).requires_grad_()


def test_an_output_without_gradients_beside_one_with_is_copied():
    gm = dynamo(
        MARK + "y = torch.sin(a)\nd = y.detach()\nv = y.view(-1)\nn = torch.neg(y)\nreturn d, v, n",
        x=grad(3, 4),
        x_dot=R(3, 4),
    )
    check_step(
        detach_outputs,
        gm,
        """
        a = jvpgraph.make_dual(x, x_dot)
        y = torch.sin(a)
        d = y.detach()
        v = y.view(-1)
        n = torch.neg(y)
        clone = torch.clone(d)
        return clone, v, n
        """,
    )


def test_a_view_made_without_gradients_is_detached():
    gm = dynamo(
        MARK + "y = torch.sin(a)\noff = switch(False)\nv = y.view(-1)\non = switch(True)\nreturn v",
        given={"switch": torch._C._set_grad_enabled},
        x=grad(3, 4),
        x_dot=R(3, 4),
    )
    check_step(
        detach_outputs,
        gm,
        """
        a = jvpgraph.make_dual(x, x_dot)
        y = torch.sin(a)
        off = _set_grad_enabled(False)
        v = y.view(-1)
        on = _set_grad_enabled(True)
        detach = torch.detach(v)
        return detach
        """,
    )


def test_outputs_that_share_nothing_and_graphs_without_marks_stay():
    stays(
        detach_outputs, dynamo(MARK + "y = torch.sin(a)\nd = x.detach()\nreturn y, d, x", x=grad(3, 4), x_dot=R(3, 4))
    )
    stays(detach_outputs, dynamo("y = torch.sin(x)\nd = y.detach()\nreturn y, d", x=grad(3, 4)))
    stays(copy_overlapping_outputs, dynamo("y = torch.sin(x)\nu = y.unfold(0, 2, 1)\nreturn u", x=grad(4)))
    empty = dynamo(MARK + "y = torch.sin(a)\nu = y.expand(0, 4)\nreturn u", x=grad(4), x_dot=R(4))
    stays(copy_overlapping_outputs, empty)


def test_outputs_whose_elements_share_memory_are_copied():
    gm = dynamo(
        MARK + "y = torch.sin(a)\nu = y.unfold(0, 2, 1)\ne = y.expand(3, 4)\nreturn u, y, e", x=grad(4), x_dot=R(4)
    )
    check_step(
        copy_overlapping_outputs,
        gm,
        """
        a = jvpgraph.make_dual(x, x_dot)
        y = torch.sin(a)
        u = y.unfold(0, 2, 1)
        e = y.expand(3, 4)
        clone = torch.clone(u, memory_format=torch.contiguous_format)
        clone_1 = torch.clone(e, memory_format=torch.contiguous_format)
        return clone, y, clone_1
        """,
    )


@pytest.mark.parametrize(
    "how",
    [
        "u = y.unfold(0, 2, 2)",  # side by side
        "u = y.expand(1, 4)",
        "u = w.unfold(0, 2, 1)",  # of an input that is not marked
        "d = y.detach()\nu = d.unfold(0, 2, 1)",  # without gradients
    ],
)
def test_other_outputs_are_not_copied(how: str):
    stays(
        copy_overlapping_outputs,
        dynamo(MARK + "y = torch.sin(a)\n" + how + "\nreturn u", x=grad(4), x_dot=R(4), w=grad(4)),
    )


@pytest.mark.parametrize("how", ["n = y.unfold(0, 2, 1)", "n = y.expand(3, -1)"])
def test_outputs_of_symbolic_sizes_are_aotautograds(how: str):
    text = MARK + "y = torch.sin(a)\n" + how + "\nreturn n"
    stays(copy_overlapping_outputs, dynamo(text, x=Dynamic(grad(4), (0,)), x_dot=Dynamic(R(4), (0,))))


# --------------------------------------------------------------------------------------------- call_own_jvps


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor) -> Tensor:
        return x_dot * 3  # as only the Function's own jvp would have it


def test_active_calls_bring_their_own_tangents():
    gm = dynamo(MARK + "y = f(a)\nz = f(x)\nreturn y, z", given={"f": _call(Twice)}, **X)
    kept = node(gm, "z").target
    run(call_own_jvps, gm)
    assert node(gm, "z").target is kept
    new = node(gm, "y").target
    assert new is not kept
    assert getattr(new, OWN_JVP) is Twice
    made = torch.fx.experimental.proxy_tensor.make_fx(new, tracing_mode="fake")(torch.randn(3))
    assert len(made.graph.find_nodes(op="call_function", target=MAKE_DUAL)) == 1
    run(call_own_jvps, gm)
    assert node(gm, "y").target is new, "run twice"
    assert new.__name__ in gm.code


def test_gradients_of_their_tangents_are_refused():
    gm = dynamo(MARK + "y = f(a)\nq = jvpgraph.tangent_of(y, True)\nreturn q", given={"f": _call(Twice)}, **X)
    with pytest.raises(UnsupportedOp, match=r"autograd.Function \(y\).*would need a backward"):
        run(call_own_jvps, gm)
    run(call_own_jvps, dynamo(MARK + "y = torch.neg(a)\nq = jvpgraph.tangent_of(y, True)\nreturn q", **X))
