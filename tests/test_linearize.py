"""Linearize on graphs of a few nodes: the graph before, and the graph after."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from jvpgraph.errors import UnsupportedOp
from jvpgraph.graph.meta import INSERTED_META, TANGENT_META, source_line
from jvpgraph.graph.strides import in_layout
from jvpgraph.markers import ARRIVED, MAKE_DUAL, TANGENT_OF
from jvpgraph.passes.context import Report
from jvpgraph.passes.linearize import linearize
from tests.graphs import Dynamic, R, check_step, evaluate, graph, names, node, run, written

aten = torch.ops.aten
X = {"x": R(3, 4), "x_dot": R(3, 4)}
MARKERS = (MAKE_DUAL, TANGENT_OF, ARRIVED)
XW = {**X, "w": R(3, 4)}

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a chain: every tangent right behind its primal, named after it": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        sin = aten.sin(a)
        y = aten.mul.Tensor(sin, w)
        q = jvpgraph.tangent_of(y)
        return y, q
        """,
        XW,
        """
        sin = aten.sin(x)
        cos_default = aten.cos(x)
        sin_dot = aten.mul.Tensor(x_dot, cos_default)
        y = aten.mul.Tensor(sin, w)
        y_dot = aten.mul.Tensor(sin_dot, w)
        return y, y_dot
        """,
    ),
    "two terms are added": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        y = aten.mul.Tensor(a, a)
        q = jvpgraph.tangent_of(y)
        return y, q
        """,
        X,
        """
        y = aten.mul.Tensor(x, x)
        mul_tensor = aten.mul.Tensor(x_dot, x)
        mul_tensor_1 = aten.mul.Tensor(x, x_dot)
        y_dot = aten.add.Tensor(mul_tensor, mul_tensor_1)
        return y, y_dot
        """,
    ),
    "only what lies between a mark and a question": (
        """
        before = aten.cos(x)
        a = jvpgraph.make_dual(x, x_dot)
        aside = aten.cos(w)
        unasked = aten.exp(a)
        y = aten.mul.Tensor(a, aside)
        q = jvpgraph.tangent_of(y)
        behind = aten.cos(y)
        return before, unasked, behind, q
        """,
        XW,
        """
        before = aten.cos(x)
        aside = aten.cos(w)
        unasked = aten.exp(x)
        y = aten.mul.Tensor(x, aside)
        y_dot = aten.mul.Tensor(x_dot, aside)
        behind = aten.cos(y)
        return before, unasked, behind, y_dot
        """,
    ),
    "what is marked anew needs no tangent from before": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        none = aten.heaviside(a, w)
        b = jvpgraph.make_dual(none, w)
        y = aten.neg(b)
        q = jvpgraph.tangent_of(y)
        return y, q
        """,
        XW,
        """
        none = aten.heaviside(x, w)
        y = aten.neg(none)
        y_dot = aten.neg(w)
        return y, y_dot
        """,
    ),
    "nothing is marked: zeros, of their own": (
        """
        y = aten.neg(x)
        q = jvpgraph.tangent_of(y)
        return y, q
        """,
        X,
        "",
    ),
    "nothing is asked": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        y = aten.neg(a)
        return y
        """,
        X,
        """
        y = aten.neg(x)
        return y
        """,
    ),
    "several outputs, of which one is read": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        halves = aten.split.Tensor(a, 2, 1)
        left = halves[0]
        right = halves[1]
        y = aten.neg(right)
        q = jvpgraph.tangent_of(y)
        return y, q
        """,
        X,
        """
        halves = aten.split.Tensor(x, 2, 1)
        left = halves[0]
        right = halves[1]
        split_tensor = aten.split.Tensor(x_dot, 2, 1)
        halves_dot = split_tensor[0]
        halves_dot_1 = split_tensor[1]
        y = aten.neg(right)
        y_dot = aten.neg(halves_dot_1)
        return y, y_dot
        """,
    ),
    "integers have none": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        top = aten.topk(a, 2)
        value = top[0]
        index = top[1]
        large = aten.gt.Scalar(a, 0)
        taken = aten.gather(w, 1, index)
        sum = aten.add.Tensor(value, taken)
        kept = aten.where.self(large, a, w)
        q = jvpgraph.tangent_of(sum)
        p = jvpgraph.tangent_of(kept)
        return sum, q, p
        """,
        XW,
        "",
    ),
    "lists of tensors": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        y = aten.cat([a, w], 1)
        q = jvpgraph.tangent_of(y)
        return y, q
        """,
        XW,
        "",
    ),
    "a derived rule": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        y = aten.sinc(a)
        z = aten.trace(y)
        q = jvpgraph.tangent_of(z)
        return z, q
        """,
        {"x": R(3, 3), "x_dot": R(3, 3)},
        "",
    ),
    "a stop-gradient": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        d = aten.detach(a)
        stop = aten.expand(d, [-1, -1], implicit=True)
        y = aten.mul.Tensor(stop, a)
        q = jvpgraph.tangent_of(y)
        return y, q
        """,
        X,
        """
        d = aten.detach(x)
        d_dot = aten.detach(x_dot)
        y = aten.mul.Tensor(d, x)
        y_dot = aten.mul.Tensor(d, x_dot)
        return y, y_dot
        """,
    ),
    "another expand is none": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        wide = aten.expand(a, [2, -1, -1], implicit=True)
        same = aten.expand(wide, [-1, -1, -1])
        y = aten.neg(same)
        q = jvpgraph.tangent_of(y)
        return y, q
        """,
        X,
        """
        wide = aten.expand(x, [2, -1, -1], implicit=True)
        wide_dot = aten.expand(x_dot, [2, -1, -1])
        same = aten.expand(wide, [-1, -1, -1])
        same_dot = aten.expand(wide_dot, [-1, -1, -1])
        y = aten.neg(same)
        y_dot = aten.neg(same_dot)
        return y, y_dot
        """,
    ),
    "tangents that are an input, an output already, or each other, are copied": (
        """
        made = aten.neg(w)
        a = jvpgraph.make_dual(x, x_dot)
        b = jvpgraph.make_dual(w, made)
        c = aten.mul.Tensor(a, 2)
        flat = aten.view(c, [12])
        p = jvpgraph.tangent_of(a)
        q = jvpgraph.tangent_of(b)
        r = jvpgraph.tangent_of(c)
        s = jvpgraph.tangent_of(flat)
        return made, c, p, q, r, s
        """,
        XW,
        """
        made = aten.neg(w)
        c = aten.mul.Tensor(x, 2)
        c_dot = aten.mul.Tensor(x_dot, 2)
        flat = aten.view(c, [12])
        flat_dot = aten.view(c_dot, [12])
        clone_default = aten.clone(x_dot)
        clone_default_1 = aten.clone(made)
        clone_default_2 = aten.clone(flat_dot)
        return made, c, clone_default, clone_default_1, c_dot, clone_default_2
        """,
    ),
    "parts of one tangent share its memory": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        y = aten.neg(a)
        halves = aten.split.Tensor(y, 2)
        left = halves[0]
        right = halves[1]
        p = jvpgraph.tangent_of(left)
        q = jvpgraph.tangent_of(right)
        return left, right, p, q
        """,
        {"x": R(4), "x_dot": R(4)},
        """
        y = aten.neg(x)
        y_dot = aten.neg(x_dot)
        halves = aten.split.Tensor(y, 2)
        left = halves[0]
        right = halves[1]
        split_tensor = aten.split.Tensor(y_dot, 2)
        halves_dot = split_tensor[0]
        halves_dot_1 = split_tensor[1]
        clone_default = aten.clone(halves_dot_1)
        return left, right, halves_dot, clone_default
        """,
    ),
    "a view of an input that is returned is one of a copy": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        flat = aten.view(a, [12])
        d = aten.detach(flat)
        n = aten.neg(a)
        q = jvpgraph.tangent_of(n)
        return d, q
        """,
        X,
        """
        clone_default = aten.clone(x)
        flat = aten.view(clone_default, [12])
        d = aten.detach(flat)
        n = aten.neg(clone_default)
        n_dot = aten.neg(x_dot)
        return d, n_dot
        """,
    ),
    "a view of an input with holes that is returned": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        turned = aten.t(a)
        n = aten.neg(a)
        q = jvpgraph.tangent_of(n)
        return turned, q
        """,
        {"x": R(3, 8)[:, ::2], "x_dot": R(3, 4)},
        """
        clone_default = aten.clone(x)
        turned = aten.t(clone_default)
        n = aten.neg(clone_default)
        n_dot = aten.neg(x_dot)
        return turned, n_dot
        """,
    ),
    "an answer in the strides that were promised": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        t = aten.t(a)
        y = aten.abs(t)
        q = jvpgraph.tangent_of(y)
        return y, q
        """,
        {"x": R(3, 4), "x_dot": R(4, 3).t()},
        """
        t = aten.t(x)
        t_dot = aten.t(x_dot)
        y = aten.abs(t)
        sign_default = aten.sign(t)
        y_dot = aten.mul.Tensor(t_dot, sign_default)
        permute_default = aten.permute(y_dot, [1, 0])
        clone_default = aten.clone(permute_default, memory_format=torch.contiguous_format)
        permute_default_1 = aten.permute(clone_default, [1, 0])
        return y, permute_default_1
        """,
    ),
    "what an autograd.Function returns, of which something arrives": (
        """
        a = jvpgraph.make_dual(x, x_dot)
        y = aten.neg(a)
        z = aten.round(a)
        s = jvpgraph.arrived(y, [z], [a], "Function")
        t = jvpgraph.arrived(z, [y], [a], "Function")
        c = jvpgraph.arrived(w, [], [w], "Function")
        sum = aten.add.Tensor(s, c)
        q = jvpgraph.tangent_of(sum)
        return sum, t, q
        """,
        XW,
        """
        y = aten.neg(x)
        y_dot = aten.neg(x_dot)
        z = aten.round(x)
        clone_default = aten.clone(z)
        sum_1 = aten.add.Tensor(y, w)
        return sum_1, clone_default, y_dot
        """,
    ),
}
AS_TEXT = (  # forward AD has no stop-gradients of its own, nor marks anew; a copy of what has holes has none
    "a stop-gradient",
    "what is marked anew needs no tangent from before",
    "a view of an input with holes that is returned",
)


class ForwardAD(fx.Interpreter):
    """What a graph with markers gives, by PyTorch's own forward AD."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is MAKE_DUAL:
            return forward_ad.make_dual(*args)
        if target is TANGENT_OF:
            dot = forward_ad.unpack_dual(args[0]).tangent
            return torch.zeros_like(args[0]) if dot is None else dot
        return args[0] if target is ARRIVED else super().call_function(target, args, kwargs)


@pytest.mark.parametrize("name", CASES)
def test_before_and_after(name: str):
    """As text, except where that is a matter of PyTorch's version."""
    before, inputs, after = CASES[name]
    gm = graph(before, **inputs)
    if after:
        check_step(linearize, gm, after)
    else:
        run(linearize, gm)
    assert not set(MARKERS).intersection(n.target for n in gm.graph.nodes)


@pytest.mark.parametrize("name", sorted(set(CASES) - set(AS_TEXT)))
def test_the_numbers_are_those_of_forward_ad(name: str):
    before, inputs, _ = CASES[name]
    gm = graph(before, **inputs)
    with forward_ad.dual_level():
        wanted = [forward_ad.unpack_dual(x).primal for x in ForwardAD(gm).run(*inputs.values())]
    run(linearize, gm)
    found = evaluate(gm, *inputs.values())
    torch.testing.assert_close(list(found), wanted)
    assert [x.stride() for x in found] == [n.meta["val"].stride() for n in gm.graph.output_node().all_input_nodes]
    memory = [x.untyped_storage()._cdata for x in (*inputs.values(), *found[len(found) - before.count("tangent_of") :])]
    assert len(set(memory)) == len(memory), "tangents share memory"


def test_without_markers_nothing_happens():
    gm = graph("y = aten.expand(x, [-1, -1], implicit=True)\nreturn y", x=R(3, 4))
    before = written(gm)
    assert run(linearize, gm) == Report()
    assert written(gm) == before, "marks of stop-gradients included"


def test_what_is_reported():
    text = """
    a = jvpgraph.make_dual(x, x_dot)
    b = aten.sin(a)
    c = aten.sinc(b)
    d = aten.cos(w)
    e = aten.mul.Tensor(c, d)
    none = aten.sign(e)
    behind = aten.neg(w)
    q = jvpgraph.tangent_of(e)
    return q, none, behind
    """
    report = run(linearize, graph(text, **XW))
    table = Counter({"aten.sin.default": 1, "aten.mul.Tensor": 1})
    assert report.rules == {"table": table, "derived": Counter({"aten.sinc.default": 1})}
    assert (report.active, report.inactive) == (4, 1), "a, b, c, e; d"


def test_new_nodes_are_marked_and_inherit_where_they_come_from():
    gm = graph(CASES["a chain: every tangent right behind its primal, named after it"][0], **XW)
    stack = {"": ("", "Model")}
    node(gm, "sin").meta.update(stack_trace="here", nn_module_stack=stack, seq_nr=3, recompute=1)
    run(linearize, gm)
    inserted = [n for n in gm.graph.nodes if INSERTED_META in n.meta]
    assert names(inserted) == ["cos_default", "sin_dot", "y_dot"]
    assert [n.meta.get(TANGENT_META) for n in inserted] == [None, "sin", "y"]
    for n in inserted[:2]:
        assert (n.meta["stack_trace"], n.meta["nn_module_stack"], n.meta["seq_nr"]) == ("here", stack, 3)
        assert "recompute" not in n.meta
    for n in inserted:
        assert (n.meta["val"].shape, n.meta["val"].dtype) == ((3, 4), torch.float64)


# ------------------------------------------------------------------------------------------------- refusals


def refused(gm: fx.GraphModule) -> list[tuple[str, str, tuple[str, ...], str]]:
    with pytest.raises(UnsupportedOp) as error:
        run(linearize, gm)
    return [(n.op, n.name, n.inputs, n.reason) for n in error.value.nodes]


def test_all_refusals_at_once_with_the_users_lines():
    text = """
    a = jvpgraph.make_dual(x, x_dot)
    sin = aten.sin(a)
    h = aten.heaviside(w, sin)
    lu = aten._linalg_det(h)
    pivots = lu[1]
    m = function(h)
    y = aten.mul.Tensor(pivots, m)
    q = jvpgraph.tangent_of(y)
    return y, q
    """
    square = {"x": R(4, 4), "x_dot": R(4, 4), "w": R(4, 4)}
    gm = graph(text, given={"function": lambda x: x * 2}, **square)
    node(gm, "h").meta["stack_trace"] = 'File "/home/model.py", line 88, in forward\n  code'
    with pytest.raises(UnsupportedOp) as error:
        run(linearize, gm)
    first, second, third = error.value.nodes
    assert (first.op, first.name, first.inputs) == ("aten.heaviside.default", "h", ("values",))
    assert first.where == "model.py:88 in forward"
    assert "no forward formula" in first.reason
    assert (second.op, second.name, second.inputs) == ("aten._linalg_det.default", "lu", ("A",))
    assert "factors that it returns" in second.reason
    assert (third.name, third.inputs, third.reason, third.where) == ("m", ("m",), "not an op", "(no source line)")


def test_what_follows_a_refusal_is_refused_as_well():
    """Both outputs of an op without a rule, and what is made of a number, are taken to have tangents."""
    text = """
    a = jvpgraph.make_dual(x, x_dot)
    qr = aten.geqrf(a)
    r = qr[0]
    tau = qr[1]
    h = aten.heaviside(r, w)
    i = aten.heaviside(tau, tau)
    n = aten._local_scalar_dense(one)
    full = aten.full([4], n, dtype=torch.float64)
    j = aten.heaviside(full, full)
    sum = aten.add.Tensor(i, j)
    y = aten.add.Tensor(h, sum)
    q = jvpgraph.tangent_of(y)
    return y, q
    """.replace("n = ", "one = aten.sum(a)\n    n = ")
    gm = graph(text, x=R(4, 4), x_dot=R(4, 4), w=R(4, 4))
    assert [name for _, name, _, _ in refused(gm)] == ["qr", "h", "i", "j", "n"]


def test_other_higher_order_ops_are_refused_with_a_remedy():
    gm = graph("a = jvpgraph.make_dual(x, x_dot)\nn = aten.neg(a)\nq = jvpgraph.tangent_of(n)\nreturn q", **X)
    node(gm, "n").target = torch.ops.higher_order.associative_scan
    ((_, name, _, reason),) = refused(gm)
    assert name == "n"
    assert reason.startswith("a higher-order op: its body is a graph of its own")
    assert "write it in plain Python" in reason


def test_an_own_error_of_a_rule_is_its_reason(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsupportedOp([])

    monkeypatch.setattr("jvpgraph.rules.apply.apply_rule", refuse)
    gm = graph("a = jvpgraph.make_dual(x, x_dot)\nn = aten.neg(a)\nq = jvpgraph.tangent_of(n)\nreturn q", **X)
    ((op, _, _, reason),) = refused(gm)
    assert op == "aten.neg.default"
    assert reason.startswith("0 ops on the tangent path")


def test_a_function_of_which_nothing_arrives_is_refused():
    text = """
    a = jvpgraph.make_dual(x, x_dot)
    y = aten.round(a)
    z = aten.floor(a)
    s = jvpgraph.arrived(y, [z], [w, a], "Rounding")
    q = jvpgraph.tangent_of(s)
    return q, s
    """
    ((op, name, _, reason),) = refused(graph(text, **XW))
    assert (op, name) == ("Rounding", "s")
    assert "has no tangent, whatever its backward says" in reason


ITEM = "a tensor with a tangent becomes a Python number"
NUMBERS = {
    "a tensor is made of it": (
        "n = aten._local_scalar_dense(one)\nm = operator.mul(n, 2.0)\nf = aten.full([3, 4], m)",
        "n",
    ),
    "a list of tensors is": ("n = aten._local_scalar_dense(one)\nf = aten.full([3, 4], n)", "n"),
    "an integer is": ("n = aten._local_scalar_dense(one)\nf = aten.full([3, 4], n, dtype=torch.int64)", None),
    "of what has no tangent": ("n = aten._local_scalar_dense(other)\nf = aten.full([3, 4], n)", None),
    "a size": ("n = aten.sym_size.int(b, 0)\nf = aten.full([3, 4], n, dtype=torch.float64)", None),
    "a stride": ("n = aten.sym_stride.int(b, 0)\nf = aten.full([3, 4], n, dtype=torch.float64)", None),
    "how many": ("n = aten.sym_numel(b)\nf = aten.full([3, 4], n, dtype=torch.float64)", None),
    "where it begins": ("n = aten.sym_storage_offset(b)\nf = aten.full([3, 4], n, dtype=torch.float64)", None),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_read_from_tangents(name: str):
    made, culprit = NUMBERS[name]
    text = f"""
a = jvpgraph.make_dual(x, x_dot)
b = aten.neg(a)
one = aten.sum(b)
other = aten.sum(w)
{made}
y = aten.mul.Tensor(b, f)
q = jvpgraph.tangent_of(y)
return y, q
"""
    gm = graph(text, x=Dynamic(R(3, 4), (0,)), x_dot=R(3, 4), w=R(3, 4))
    if culprit is None:
        run(linearize, gm)
    else:
        ((op, found, inputs, reason),) = refused(gm)
        assert (op, found, inputs) == ("aten._local_scalar_dense.default", culprit, ("self",))
        assert reason.startswith(ITEM)


# ------------------------------------------------------------------------------------------- memory and layout


def strided(x: Any, how: str, before: str = "b = aten.neg(a)") -> fx.GraphModule:
    text = f"""
a = jvpgraph.make_dual(x, x_dot)
{before}
y = aten.as_strided(b, {how})
q = jvpgraph.tangent_of(y)
return y, q
"""
    return graph(text, x=x, x_dot=torch.randn_like(x.value if isinstance(x, Dynamic) else x))


STRIDED = {  # input, what is before, and how it is read
    "of a whole": (R(3, 4), "b = aten.neg(a)", "[2, 3], [4, 1]"),
    "from an offset": (R(3, 4), "b = aten.neg(a)", "[2, 3], [4, 1], 2"),
    "elements that overlap": (R(12), "b = aten.neg(a)", "[5, 3], [2, 1]"),
    "of a view, in its owner": (R(3, 4), "c = aten.neg(a)\nb = aten.select.int(c, 0, 1)", "[2, 2], [2, 1]"),
    "of a view, absolutely": (R(3, 4), "c = aten.neg(a)\nb = aten.select.int(c, 0, 1)", "[6], [2], 1"),
    "of a transposed input": (R(4, 3).t(), "b = aten.t(a)", "[5], [2]"),
    "of one with holes": (R(3, 8)[:, ::2], "b = aten.detach(a)", "[2, 3], [8, 2]"),
    "of an input": (R(3, 4), "b = aten.alias(a)", "[2, 3], [4, 1], 1"),
    "of part of an input, relative": (R(5, 4)[1:4], "b = aten.alias(a)", "[2, 3], [4, 1]"),
}


@pytest.mark.parametrize("name", STRIDED)
def test_as_strided_reads_the_memory_of_the_tangent(name: str):
    """That of its owner, laid out alike: what as_strided reads of ``x + h x_dot``."""
    x, before, how = STRIDED[name]
    gm = strided(x, how, before)
    x_dot = torch.randn_like(x)
    holes = torch.zeros(x.untyped_storage().nbytes() // 8, dtype=x.dtype)
    same = holes.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x_dot)  # of what lies between, no tangent
    steps = [
        evaluate(graph(f"{before}\ny = aten.as_strided(b, {how})\nreturn y", a=x), moved)[0]
        for moved in (x, torch.as_strided(_storage(x) + _storage(same), x.shape, x.stride(), x.storage_offset()))
    ]
    run(linearize, gm)
    y, y_dot = evaluate(gm, x, x_dot)
    torch.testing.assert_close(y, steps[0])
    torch.testing.assert_close(y_dot, steps[1] - steps[0])


def _storage(x: Tensor) -> Tensor:
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


OUTSIDE = "it reads beyond what has a tangent, or as another dtype"
BAD_STRIDES = {
    "outside": (R(3, 4), "b = aten.neg(a)", "[13], [1]", OUTSIDE),
    "at its end": (R(3, 4), "b = aten.neg(a)", "[2], [1], 11", OUTSIDE),
    "an input that may begin later": (R(5, 4)[1:4], "b = aten.alias(a)", "[4], [1], 0", "as_strided with an offset"),
    "an input that overlaps": (
        R(6).as_strided((2, 3), (2, 1)),
        "b = aten.alias(a)",
        "[2], [1]",
        "one element of memory",
    ),
}


@pytest.mark.parametrize("name", BAD_STRIDES)
def test_as_strided_that_cannot_be_followed_is_refused(name: str):
    x, before, how, reason = BAD_STRIDES[name]
    ((op, found, _, why),) = refused(strided(x, how, before))
    assert (op, found) == ("aten.as_strided.default", "y")
    assert why.startswith(reason)


def test_a_strided_view_of_an_input_with_holes_sees_a_copy_with_holes():
    x = R(3, 8)[:, ::2]
    gm = graph(
        """
        a = jvpgraph.make_dual(x, x_dot)
        y = aten.as_strided(a, [2, 9], [1, 2])
        n = aten.neg(a)
        q = jvpgraph.tangent_of(n)
        return y, q
        """,
        x=x,
        x_dot=R(3, 4),
    )
    run(linearize, gm)
    y, _ = evaluate(gm, x, R(3, 4))
    torch.testing.assert_close(y, x.as_strided((2, 9), (1, 2)))
    assert y.untyped_storage()._cdata != x.untyped_storage()._cdata


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 1, 5), (1, 1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_in_layout(order: tuple[int, ...], shape: tuple[int, ...]):
    like = R(*(shape[d] for d in order)).permute(*(order.index(d) for d in range(3)))
    x = R(*shape)
    y = in_layout(x, like)
    torch.testing.assert_close(y, x)
    alike = [(s, t) for s, t, n in zip(y.stride(), like.stride(), shape) if n != 1]
    assert all(s == t for s, t in alike)
    assert (y is x) == all(s == t for s, t, n in zip(x.stride(), like.stride(), shape) if n != 1)


@pytest.mark.parametrize("is_hinted", [True, False])
def test_in_layout_of_symbolic_sizes(is_hinted: bool):
    """Without a guard; sizes that depend on data are taken to be large."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    if is_hinted:
        gm = graph("return x", x=Dynamic(R(3, 4, 5), (0, 1, 2)))
        n, m, _ = node(gm, "x").meta["val"].shape
        mode = gm.meta["fake_mode"]
    else:
        n, m = mode.shape_env.create_unbacked_symint(), mode.shape_env.create_unbacked_symint()
    with mode:
        like = torch.empty(n, 2, m).transpose(1, 2)
        y = in_layout(torch.empty(n, m, 2), like)
        assert [str(s) for s in y.stride()] == [str(s) for s in like.stride()]
    assert not mode.shape_env.guards


# ------------------------------------------------------------------------------------------------ source lines

FRAMES = """
  File "/home/me/train.py", line 12, in main
    loss = model(x)
  File "/home/me/model.py", line 88, in forward
    return torch.sin(x)
"""
TORCHS = f'  File "{torch.__file__.rsplit("/", 1)[0]}/nn/functional.py", line 7, in sin\n    return x'


@pytest.mark.parametrize(
    ("trace", "stack", "line"),
    [
        (None, None, "(no source line)"),
        ("", None, "(no source line)"),
        ("nothing that is a frame", None, "(no source line)"),
        (FRAMES, None, "model.py:88 in forward"),
        (FRAMES, {"a": ("", dict), "b": ("", Counter)}, "model.py:88 in Counter.forward"),
        (FRAMES, {"a": ("", "models.Block")}, "model.py:88 in Block.forward"),
        (FRAMES + TORCHS, None, "model.py:88 in forward"),
        (TORCHS, None, "functional.py:7 in sin"),
    ],
)
def test_source_lines(trace: str | None, stack: Any, line: str):
    gm = graph("y = aten.neg(x)\nreturn y", x=R(3))
    node(gm, "y").meta.update(stack_trace=trace, nn_module_stack=stack)
    assert source_line(node(gm, "y")) == line
