"""Ops of other packages have rules: called directly, and op by op. Their Functions have our tangents there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.varlen

import jvpgraph
from jvpgraph.errors import UnsupportedOp
from jvpgraph.rules import tangents_of
from jvpgraph.rules.apply import bind
from tests.foreign.fake_flash_attn import each, math_attention
from tests.foreign.test_swaps import (
    FLASH,
    C,
    D,
    Net,
    causal,
    check,
    cu,
    importing,
)

of_flash_attn = importing("flash_attn")
EXACT = {"rtol": 1e-5, "atol": 1e-6}


# flash_attn gives its logsumexp no gradient, so that op by op ours is not theirs.
@pytest.mark.parametrize("form", [form for form in FLASH if form not in ("inside a checkpoint", "logsumexp")])
def test_functions_of_flash_attn_op_by_op(of_flash_attn, form):
    """Whose forward detaches its operands in part, which would stop the tangent."""
    flash = of_flash_attn("flash_attn")
    flash.flash_attn_interface = of_flash_attn("flash_attn.flash_attn_interface")
    call, reference, how = FLASH[form]
    check(lambda q, k, v: call(flash, q, k, v), reference, backend="op_by_op", **how)


def dense(q, k, v):
    return torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, D**-0.5, True, -1, -1, 0.0, None, False)[0]


def packed(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    ends = cu([12, 12])
    o = torch.ops.flash_attn._flash_attn_varlen_forward(q, k, v, ends, ends, 12, 12, 0.0, D**-0.5, True)[0]
    return o.unflatten(0, (2, 12))


@pytest.mark.parametrize("backend", ["eager", "op_by_op"])
@pytest.mark.parametrize(("call", "last"), [(dense, None), (dense, 5), (packed, None)])
def test_ops_that_are_called_directly(backend, call, last):
    net, exact = Net(call, last=last), Net(causal, last=last).double()
    x, t = torch.randn(2, 12, C), torch.rand(2)
    wanted = torch.func.jvp(exact, (x.double(), t.double()), (x.double(), torch.zeros(2).double()))
    with torch.no_grad():  # without a Function around them they have no backward
        got = jvpgraph.transform(net, backend=backend)(x, t, tangents={"x": x})
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, **EXACT)


@pytest.mark.parametrize("backend", ["eager", "op_by_op"])
def test_what_an_op_does_and_we_do_not_is_refused(backend):
    def capped(q, k, v):
        return torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 1.0, True, -1, -1, 3.0, None, False)[0]

    x, dual = torch.randn(1, 6, C), jvpgraph.transform(Net(capped), backend=backend)
    with torch.no_grad(), pytest.raises(UnsupportedOp, match="softcap: scores are capped by a tanh"):
        dual(x, torch.rand(1), tangents={"x": x})


def operands(*shape):
    torch.manual_seed(1)
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(6)]


def test_varlen_op_of_torch():
    """Which has a kernel on GPUs only: its rule."""
    op, ends = torch.ops.torch_attn._varlen_attn.default, cu([3, 5])
    q, k, v, *dots = operands(8, 2, D)

    def exact(*qkv):
        return each(*qkv, ends, ends, D**-0.5, True, -1, 0)

    (o, lse), (o_dot, lse_dot) = torch.func.jvp(exact, (q, k, v), tuple(dots))
    arguments = bind(op, (q, k, v, ends, ends, 5, 5, True, None, [-1, 0]), {})
    named = dict(zip(("query", "key", "value"), dots))
    got, _ = tangents_of(op, (o, lse, torch.zeros(2)), arguments, named)
    torch.testing.assert_close(got[0], o_dot)
    torch.testing.assert_close(got[1], lse_dot)


def test_flash_op_of_aten():
    op = torch.ops.aten._flash_attention_forward.default
    q, k, v, *dots = operands(2, 7, 2, D)
    (o, lse), (o_dot, lse_dot) = torch.func.jvp(
        lambda *qkv: math_attention(*qkv, 0.3, False, 2, 1), (q, k, v), tuple(dots)
    )
    how = {"scale": 0.3, "window_size_left": 2, "window_size_right": 1}
    arguments = bind(op, (q, k, v, None, None, 7, 7, 0.0, False, False), how)
    named = dict(zip(("query", "key", "value"), dots))
    got, _ = tangents_of(op, (o, lse, *[torch.zeros(1)] * 3), arguments, named)
    torch.testing.assert_close(got[0], o_dot)
    torch.testing.assert_close(got[1], lse_dot)
    assert got[2:] == [None] * 3


@pytest.mark.parametrize("backend", ["eager", "op_by_op"])
@pytest.mark.parametrize("active", ["a", "b", "both"])
def test_grouped_products(backend, active):
    a, b = torch.randn(16, 8, dtype=torch.bfloat16), torch.randn(2, 8, 16, dtype=torch.bfloat16)
    offsets = torch.tensor([5, 16], dtype=torch.int32)
    dots = a if active != "b" else None, 2 * b if active != "a" else None
    _, y_dot = jvpgraph.jvp(lambda a, b: torch._grouped_mm(a, b, offs=offsets), (a, b), dots, backend=backend)
    wanted = {"a": 1, "b": 2, "both": 3}[active] * torch.cat(
        [a[:5].float() @ b[0].float(), a[5:].float() @ b[1].float()]
    )
    torch.testing.assert_close(y_dot.float(), wanted, rtol=2e-2, atol=0.1)
