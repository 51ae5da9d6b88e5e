"""The engine of the rules by itself: arguments, functional forms, sums, and what is raised where a rule fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from jvpgraph.errors import CaptureError
from jvpgraph.rules import TABLE, NoRule, tangents_of
from jvpgraph.rules.apply import (
    Unknown,
    any_has_tangent,
    apply_rule,
    argument_tangent,
    bind,
    functional_form,
    has_tangent,
)
from jvpgraph.rules.registry import Rule, Term

aten = torch.ops.aten
X = torch.tensor([1.0, 2.0])
INTEGERS = torch.tensor([1, 2])


def test_what_can_carry_a_tangent():
    assert [has_tangent(x) for x in (X, X.bfloat16(), X.cfloat(), INTEGERS, X > 0, 1.0, None)] == [True] * 3 + [
        False
    ] * 4
    assert any_has_tangent(aten.sort.default, (INTEGERS, X))
    assert not any_has_tangent(aten.sort.default, [INTEGERS, INTEGERS])
    assert any_has_tangent(aten.neg.default, X)
    assert not any_has_tangent(aten.neg.default, INTEGERS)
    assert any_has_tangent(aten.view.dtype, INTEGERS)


def test_tangents_of_lists():
    dots = {1: "a", 2: "b"}
    assert argument_tangent([1, 3, (2, 3)], dots.get) == ["a", None, ["b", None]]
    assert argument_tangent([3, (4, 5)], dots.get) is None
    assert argument_tangent(2, dots.get) == "b"


@pytest.mark.parametrize(
    ("op", "form"),
    [
        (aten.mul_.Tensor, aten.mul.Tensor),
        (aten.mul.out, aten.mul.Tensor),
        (aten.mul.Scalar_out, aten.mul.Scalar),
        (aten.sort.values, aten.sort.default),
        (aten._foreach_add_.Scalar, aten._foreach_add.Scalar),
        (aten.mul.Tensor, aten.mul.Tensor),
        (aten.normal_.default, None),
        (aten.set_.source_Tensor, aten.set.source_Tensor),
        (torch.ops.c10d.broadcast_.default, None),
    ],
    ids=str,
)
def test_the_functional_form_of_a_write(op, form):
    assert functional_form(op) is form


def test_arguments_by_name():
    bound = bind(aten.add.Tensor, (1, 2), {"alpha": 3})
    assert list(bound.items()) == [("self", 1), ("other", 2), ("alpha", 3)]
    assert bind(aten.add.Tensor, (1,), {"other": 2}) == {"self": 1, "other": 2, "alpha": 1}
    assert bind(aten.sum.dim_IntList, (1, [0], True), {}) == {"self": 1, "dim": [0], "keepdim": True, "dtype": None}


@contextmanager
def rule_of(fn: Callable[..., Any], when: Any = None, op: Any = aten.neg.default) -> Iterator[Rule]:
    before = TABLE[op]
    TABLE[op] = Rule(op, [Term(fn, ("self",), ("x_dot",), takes=None, joint=False)], when)
    try:
        yield TABLE[op]
    finally:
        TABLE[op] = before


def raising(error: Exception) -> Callable[..., Any]:
    def rule(*_: Any, **__: Any) -> Any:
        raise error

    return rule


def ask(op: Any = aten.neg.default, *args: Any, **dots: Any) -> Any:
    args = args or (X,)
    return tangents_of(op, op(*args), bind(op, args, {}), dots or {"self": X})


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError("no such\nthing"), "no such"),
        (NotImplementedError(" "), "not implemented"),
        (ValueError("bad\nluck"), "its derivative failed: ValueError: bad"),
        (KeyError(), "its derivative failed: KeyError: without a message"),
    ],
    ids=str,
)
def test_what_a_rule_raises_is_the_reason(error, reason):
    with rule_of(raising(error)), pytest.raises(NoRule) as raised:
        ask()
    assert str(raised.value) == reason


@pytest.mark.parametrize("error", [NoRule("so"), CaptureError("so"), torch.OutOfMemoryError("so")], ids=repr)
def test_what_is_not_the_rules_matter_is_raised_as_it_is(error):
    with rule_of(raising(error)), pytest.raises(type(error)) as raised:
        ask()
    assert raised.value is error


def test_where_a_rule_does_not_hold_the_op_is_derived():
    wrong = raising(AssertionError("asked"))
    with rule_of(wrong, when=lambda *_: False):
        out_dot, source = ask()
        assert source == "derived"
        assert_close(out_dot, -X)
    with rule_of(wrong, when=lambda *_: "it is odd", op=aten.bernoulli.default), pytest.raises(NoRule) as raised:
        ask(aten.bernoulli.default, X / 2)
    assert str(raised.value) == "it is odd, and it draws random numbers, and deriving would draw them again"
    with pytest.raises(NoRule, match=r"^it draws random numbers"):
        ask(aten.poisson.default)


def test_a_tangent_that_nobody_defines_is_no_rule():
    with pytest.raises(NoRule, match="leaves the tangent of output 0 undefined"):
        ask(aten.special_bessel_j0.default)


def summed(op: Any, terms: list[Term], out: Any, arguments: dict[str, Any], dots: dict[str, Any]) -> Any:
    return apply_rule(Rule(op, terms), out, arguments, dots)


def test_terms_of_what_is_active_are_added():
    def term(name: str, value: Any) -> Term:
        return Term(lambda *_, x_dot: value, (name,), ("x_dot",), takes=1, joint=False)

    terms = [term("self", X), term("other", 10 * X)]
    arguments = {"self": X, "other": X}
    for dots, expected in (({"self": X}, X), ({"other": X}, 10 * X), ({"self": X, "other": X}, 11 * X)):
        assert_close(summed(aten.add.Tensor, terms, X, arguments, dots), expected)
    assert summed(aten.add.Tensor, terms, X, arguments, {"self": None}) is None
    lists = [term("self", (X, None, None)), term("other", (X, X, None))]
    found = summed(aten.add.Tensor, lists, (X, X, X), arguments, {"self": X, "other": X})
    assert_close(found[:2], [2 * X, X])
    assert found[2] is None
    assert summed(aten.add.Tensor, [term("self", None), term("other", X)], X, arguments, dots) is X


def conform(out: Any, out_dot: Any) -> Any:
    with rule_of(lambda *_, x_dot: out_dot) as rule:
        return apply_rule(rule, out, {"self": X}, {"self": X})


def test_a_tangent_has_the_shape_and_dtype_of_its_primal():
    for out_dot in (X.double(), X[1].double(), X[1:].double(), X[None][:, 1:].double()[0]):
        found = conform(X, out_dot)
        assert (found.dtype, found.shape) == (X.dtype, X.shape)
        assert_close(found, out_dot.float().expand(2))
    assert conform(X, X) is X
    assert_close(conform(X.cfloat(), X), X.cfloat())
    unknown = Unknown("so")
    found = conform((X, INTEGERS, X, X), [None, X, unknown, X])
    assert found[:2] == [None, None]
    assert found[2] is unknown
    assert found[3] is X


@pytest.mark.parametrize(
    ("out", "out_dot", "message"),
    [
        ((X, X), [X], r"gave 1 tangents for 2 outputs"),
        (X, X.cfloat(), r"gave a complex tangent for a torch.float32 output"),
        (X, torch.ones(3), r"gave a tangent of shape \(3,\) for an output of shape \(2,\)"),
        (X, torch.ones(1, 1, 2), r"gave a tangent of shape \(1, 1, 2\) for an output of shape \(2,\)"),
    ],
)
def test_one_that_cannot_is_a_fault_of_the_rule(out: Any, out_dot: Tensor, message: str):
    with pytest.raises(AssertionError, match=f"the rule of aten.neg.default {message}"):
        conform(out, out_dot)
