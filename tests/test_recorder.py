"""The recorder on graphs of a few nodes: where the ops that run under it end up."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from jvpgraph.graph.recorder import Recorder, value_of
from tests.graphs import Dynamic, R, evaluate, graph, insert, lines, names, node, written

aten = torch.ops.aten
TWO = """
y = aten.sin(x)
z = aten.neg(y)
return z
"""
SEVERAL = """
top = aten.topk(x, 2)
other = aten.neg(x)
index = top[1]
return other, index
"""


def after(gm: fx.GraphModule, text: str) -> None:
    gm.graph.lint()
    assert written(gm) == lines(text)


def test_what_runs_stands_behind_the_node_in_order():
    gm = graph(TWO, x=R(3))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        x, y = recorder.stand_in(node(gm, "x")), recorder.stand_in(node(gm, "y"))
        new = torch.cos(x) * y
    after(
        gm,
        """
        y = aten.sin(x)
        cos_default = aten.cos(x)
        mul_tensor = aten.mul.Tensor(cos_default, y)
        z = aten.neg(y)
        return z
        """,
    )
    assert names(recorder.inserted) == ["cos_default", "mul_tensor"]
    for n in recorder.inserted:
        assert (n.meta["val"].shape, n.meta["val"].dtype) == ((3,), torch.float64)
        assert n.meta["tensor_meta"].shape == (3,)
    assert value_of(recorder.inserted[-1]) is new


def test_nothing_is_known_once_the_context_is_left():
    gm = graph(TWO, x=R(3))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        y = recorder.stand_in(node(gm, "y"))
        assert recorder.node_of(y) is node(gm, "y")
    with pytest.raises(KeyError):
        recorder.node_of(y)
    with recorder.behind(node(gm, "z")), pytest.raises(NotImplementedError, match="a tensor from outside its arg"):
        torch.neg(y)
    with recorder.behind(node(gm, "z")):
        torch.neg(recorder.stand_in(node(gm, "z")))
    assert names(recorder.inserted) == ["neg_default"]
    assert recorder.inserted[0].prev is node(gm, "z")


def test_source_lines_are_inherited_or_given():
    gm = graph(TWO, x=R(3))
    y = node(gm, "y")
    y.meta.update(stack_trace="here", nn_module_stack={}, seq_nr=2, recompute=1)
    recorder = Recorder(gm.graph)
    with recorder.behind(y):
        torch.cos(recorder.stand_in(y))
    with recorder.behind(y, {"mine": 1}):
        torch.exp(recorder.stand_in(y))
    inherited, given = (n.meta.keys() - {"val", "tensor_meta"} for n in recorder.inserted)
    assert inherited == {"stack_trace", "nn_module_stack", "seq_nr"}
    assert given == {"mine"}


@pytest.mark.parametrize("reuse", [True, False])
def test_the_call_of_the_node_itself_is_reused(reuse: bool):
    gm = graph(TWO, x=R(3))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y"), reuse=reuse):
        x = recorder.stand_in(node(gm, "x"))
        again = recorder.node_of(torch.sin(x))
        other = recorder.node_of(torch.sin(recorder.stand_in(node(gm, "y"))))
    assert (again is node(gm, "y")) == reuse
    assert other.all_input_nodes == [node(gm, "y")]


def test_a_node_of_several_outputs():
    """Its getitem nodes come directly behind it, those that are missing too, and what runs comes behind them."""
    gm = graph(SEVERAL, x=R(3, 4))
    node(gm, "top").meta["stack_trace"] = "here"
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "top")):
        value, index = recorder.stand_in(node(gm, "top"))
        torch.add(value, index)
        again = recorder.stand_in(node(gm, "top"))
    after(
        gm,
        """
        top = aten.topk(x, 2)
        getitem = top[0]
        index = top[1]
        add_tensor = aten.add.Tensor(getitem, index)
        other = aten.neg(x)
        return other, index
        """,
    )
    assert isinstance(again, tuple)
    assert (value.dtype, index.dtype) == (torch.float64, torch.int64)
    assert node(gm, "getitem").meta["stack_trace"] == "here"
    assert names(recorder.inserted) == ["getitem", "add_tensor"]


def test_a_missing_item_is_behind_the_cursor_of_its_own_node_only():
    gm = graph("top = aten.topk(x, 2)\nother = aten.neg(x)\nreturn other, top", x=R(3, 4))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "top")):
        value, _ = recorder.stand_in(node(gm, "top"))
        torch.neg(value)
    with recorder.behind(node(gm, "other")):
        value, _ = recorder.stand_in(node(gm, "top"))
        torch.exp(value)
    found = [line.split(" = ")[0] for line in written(gm)[:-1]]
    assert found in (
        ["top", "getitem", "getitem_1", "neg_default", "other", "exp_default"],
        ["top", "getitem_1", "getitem", "neg_default", "other", "exp_default"],
    )


def test_lists_numbers_and_what_is_none():
    gm = graph("parts = aten.split.Tensor(x, 2)\nreturn parts", x=R(4))
    gm.graph.output_node().prepend(new := gm.graph.call_function(aten.neg.default, (node(gm, "x"),)))
    new.meta["val"] = (None, 3, node(gm, "x").meta["val"])
    recorder = Recorder(gm.graph)
    with recorder.behind(new):
        parts = recorder.stand_in(node(gm, "parts"))
        assert isinstance(parts, list)
        assert len(parts) == 2
        nothing, number, tensor = recorder.stand_in(new)
        assert (nothing, number, tensor.shape) == (None, 3, (4,))
        args, kwargs = recorder.stand_ins(((new, [node(gm, "x")]), {"n": 3}))
        assert isinstance(args[1][0], Tensor)
        assert kwargs == {"n": 3}


def test_several_outputs_of_what_runs():
    gm = graph("y = aten.neg(x)\nreturn y", x=R(3, 4))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        value, index = torch.topk(recorder.stand_in(node(gm, "x")), 2)
        torch.add(value, index)
    after(
        gm,
        """
        y = aten.neg(x)
        topk_default = aten.topk(x, 2)
        getitem = topk_default[0]
        getitem_1 = topk_default[1]
        add_tensor = aten.add.Tensor(getitem, getitem_1)
        return y
        """,
    )


def test_writes_in_place_become_new_values():
    gm = graph("y = aten.neg(x)\nreturn y", x=R(3))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        fresh = torch.cos(recorder.stand_in(node(gm, "x")))
        same = fresh.mul_(2)
        assert same is fresh
        torch.neg(fresh)
    after(
        gm,
        """
        y = aten.neg(x)
        cos_default = aten.cos(x)
        mul_tensor = aten.mul.Tensor(cos_default, 2)
        neg_default = aten.neg(mul_tensor)
        return y
        """,
    )


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.clone().view(-1).mul_(2),  # a view
        lambda x: torch.neg(x, out=x.clone()),
        lambda x: torch._foreach_add_([x.clone()], 1),
    ],
)
def test_other_writes_are_refused(write: Any):
    gm = graph("y = aten.neg(x)\nreturn y", x=R(3))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        x = recorder.stand_in(node(gm, "x"))
        with pytest.raises(NotImplementedError, match="writes in place and has no functional form"):
            write(x)


def test_random_numbers_are_not_drawn_again():
    gm = graph("y = aten.bernoulli.p(x, 0.5)\nreturn y", x=R(3))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        assert recorder.node_of(torch.bernoulli(recorder.stand_in(node(gm, "x")), p=0.5)) is node(gm, "y")
        with pytest.raises(NotImplementedError, match="draws random numbers again"):
            torch.bernoulli(recorder.stand_in(node(gm, "x")), p=0.25)
    with recorder.behind(node(gm, "y"), reuse=False):
        torch.bernoulli(recorder.stand_in(node(gm, "x")), p=0.25)
    assert len(recorder.inserted) == 1


def test_decompositions_and_composites_are_written_out():
    gm = graph("y = aten.neg(x)\nreturn y", x=R(3, 4))
    calls = []

    def silu(x: Tensor) -> Tensor:
        calls.append(x)
        return x * torch.sigmoid(x)

    recorder = Recorder(gm.graph, {aten.silu.default: silu, aten.exp.default: lambda x: NotImplemented})
    with recorder.behind(node(gm, "y")):
        x = recorder.stand_in(node(gm, "x"))
        torch.nn.functional.silu(x)
        torch.exp(x)
        aten.adaptive_avg_pool1d.default(x, [1])
    assert calls == [x]
    found = [str(n.target) for n in recorder.inserted]
    assert found[:3] == ["aten.sigmoid.default", "aten.mul.Tensor", "aten.exp.default"]
    assert "aten.adaptive_avg_pool1d.default" not in found[3:]


def test_symbolic_zeros_become_zeros():
    gm = graph("y = aten.neg(x)\nreturn y", x=R(3, 4))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        x = recorder.stand_in(node(gm, "x"))
        torch._efficientzerotensor([2], dtype=torch.float64)
        aten._new_zeros_with_same_feature_meta.default(x, x)
    found = [str(n.target) for n in recorder.inserted]
    assert [op for op in found if "zeros" in op] == ["aten.zeros.default", "aten.zeros_like.default"]
    assert node(gm, "zeros_default").kwargs["dtype"] is torch.float64


def test_an_op_that_returns_what_it_is_given_makes_no_node():
    gm = graph("y = aten.neg(x)\nreturn y", x=R(3, 4))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        x = recorder.stand_in(node(gm, "x"))
        assert aten.sym_size.int(x, 0) == 3
        assert aten.is_same_size.default(x, x)
        assert recorder.node_of(x.contiguous()) is node(gm, "x")
    assert not recorder.inserted


def test_probes_are_taken_out_again(monkeypatch: pytest.MonkeyPatch):
    """What a derived rule only tries is not in the graph when it is done."""
    gm = graph("y = aten.neg(x)\nreturn y", x=R(3, 4))
    before = written(gm)
    recorder = Recorder(gm.graph)
    monkeypatch.setattr("jvpgraph.graph.recorder.probing", lambda: True)
    with recorder.behind(node(gm, "y")):
        torch.neg(torch.exp(recorder.stand_in(node(gm, "x"))))
        assert len(written(gm)) == len(before) + 2
    assert written(gm) == before
    monkeypatch.undo()
    with recorder.behind(node(gm, "y"), reuse=False):
        torch.neg(recorder.stand_in(node(gm, "x")))
    assert [n.target for n in recorder.inserted] == [aten.neg.default]


def test_stand_ins_are_fresh_and_alike():
    gm = graph("y = aten.t(x)\nreturn y", x=R(3, 4))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        one, two = recorder.stand_in(node(gm, "y")), recorder.stand_in(node(gm, "y"))
        assert one is not two
        assert one is not node(gm, "y").meta["val"]
        assert (one.shape, one.stride(), one.dtype) == ((4, 3), (1, 4), torch.float64)
        assert not one.requires_grad
    assert written(gm) == lines("y = aten.t(x)\nreturn y"), "making them is not recorded"


# -------------------------------------------------------------------------------------------- symbolic sizes


def test_a_size_is_the_node_that_has_it():
    gm = graph(
        "n = aten.sym_size.int(x, 0)\ny = aten.neg(x)\nreturn y, n", x=Dynamic(R(3, 4), (0, 1)), m=Dynamic(R(5), (0,))
    )
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        y = recorder.stand_in(node(gm, "y"))
        y.new_zeros(y.shape[0], y.shape[1], 2)
        y.new_zeros(y.shape[0] * y.shape[1])
    gm.graph.lint()
    text = written(gm)
    assert text[0] == "sym_size_int_1 = aten.sym_size.int(m, 0)"
    assert text[1] == "sym_size_int = aten.sym_size.int(x, 1)"
    assert text[2] == "n = aten.sym_size.int(x, 0)"
    zeros = [line for line in text if "new_zeros" in line]
    assert "[n, sym_size_int, 2]" in zeros[0]
    assert text.index("mul = operator.mul(n, sym_size_int)") < text.index(zeros[1])
    assert "[mul]" in zeros[1]
    assert str(node(gm, "mul").meta["val"]) == str(y.shape[0] * y.shape[1])


def test_a_product_of_inputs_is_made_once_behind_the_inputs():
    gm = graph("y = aten.neg(x)\nz = aten.exp(y)\nreturn z", x=Dynamic(R(3, 4), (0, 1)))
    n, m = node(gm, "x").meta["val"].shape
    with gm.graph.inserting_before(node(gm, "y")):
        for name, value in (("n", n), ("m", m)):
            gm.graph.placeholder(name).meta["val"] = value
    recorder = Recorder(gm.graph)
    for name in ("y", "z"):
        with recorder.behind(node(gm, name)):
            y = recorder.stand_in(node(gm, name))
            y.new_zeros(y.shape[0] * y.shape[1] + 1)
    gm.graph.lint()
    made = [line for line in written(gm) if "operator." in line]
    assert len(made) == 2
    assert written(gm)[:2] == made
    assert [line for line in written(gm) if "[add]" in line] == [written(gm)[3], written(gm)[5]]


def test_a_constant_size_is_a_number():
    gm = graph("y = aten.neg(x)\nreturn y", x=Dynamic(R(3, 4), (0,)))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        y = recorder.stand_in(node(gm, "y"))
        y.new_zeros(y.shape[0] - y.shape[0] + 2)
    assert "[2]" in written(gm)[-2]


def test_rounded_sizes():
    gm = graph("y = aten.neg(x)\nreturn y", x=Dynamic(R(30, 4), (0,)))
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        y = recorder.stand_in(node(gm, "y"))
        n = y.shape[0]
        sizes = (torch.sym_int(n * 0.5), torch.sym_int(n / 3), -((-n) // 4), round(n * 0.4), n % 7)
        sizes += (math.ceil(n * 0.35), math.floor(n * 0.35))
        for size in sizes:
            y.new_zeros(size)
    gm.graph.lint()
    made = [node.args[1][0] for node in recorder.inserted]
    for found, size in zip(made, sizes, strict=True):
        assert found.meta["val"].node.hint == size.node.hint
        assert evaluate(fx.GraphModule({}, _until(gm.graph, found)), torch.zeros(30, 4)) == size.node.hint


def _until(graph: fx.Graph, last: fx.Node) -> fx.Graph:
    """The part of a graph that computes a node, which it returns."""
    part, copies = fx.Graph(), {}
    for n in graph.nodes:
        copies[n] = part.node_copy(n, copies.__getitem__)
        if n is last:
            part.output(copies[n])
            return part
    raise AssertionError


def test_a_view_is_made_again_in_the_memory_of_what_it_views():
    gm = graph("a = aten.neg(x)\nv = aten.view(a, [12])\ns = aten.select.int(a, 0, 1)\nreturn v, s", x=R(3, 4))
    recorder = Recorder(gm.graph)
    memory = node(gm, "a").meta["val"].untyped_storage()._cdata
    for name in ("v", "s"):
        old = node(gm, name).meta["val"]
        new = recorder.value_again(node(gm, name))
        assert new is not old
        assert new.untyped_storage()._cdata == memory
        assert (new.shape, new.stride(), new.storage_offset()) == (old.shape, old.stride(), old.storage_offset())
    node(gm, "a").meta["val"] = node(gm, "a").meta["val"].t().contiguous().t()  # a view would not be one now
    assert recorder.value_again(node(gm, "v")).shape == (12,)


def test_sizes_that_depend_on_data_are_those_of_the_primal():
    gm = graph("i = aten.nonzero(x)\nreturn i", x=R(3, 4))
    size = node(gm, "i").meta["val"].shape[0]
    env = size.node.shape_env
    pending = list(env.pending_fresh_unbacked_symbols)
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "i")):
        again = torch.nonzero(recorder.stand_in(node(gm, "x")) * 2)
    assert again.shape[0].node._expr != size.node._expr, "drawn anew"
    assert again.shape[0].node.expr == size.node.expr
    assert env.pending_fresh_unbacked_symbols == pending
    gm.graph.lint()


def test_an_unused_insert_is_an_item():
    gm = graph("y = aten.topk(x, 2)\nreturn y", x=R(3, 4))
    item = insert(gm, operator.getitem, node(gm, "y"), 1, value=node(gm, "y").meta["val"][1])
    recorder = Recorder(gm.graph)
    with recorder.behind(node(gm, "y")):
        recorder.stand_in(node(gm, "y"))
    assert item.prev.name == "getitem_1" or item.prev is node(gm, "y")
