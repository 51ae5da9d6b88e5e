"""The backward through the tangent of attention against torch's own derivatives of its float64 specification."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from jvpgraph.kernels import attention_blocked, backward_blocked, reference
from jvpgraph.kernels.window import CAUSAL, EVERYTHING, Window
from tests import calls
from tests.joint import joint
from tests.strategies import seeds
from tests.test_attention import peak_bytes

NAMES = ("q", "k", "v", "q_dot", "k_dot", "v_dot", "bias", "bias_dot")
OUTPUTS = ("o", "lse", "o_dot", "lse_dot")
DOTS = ("q_dot", "k_dot", "v_dot", "bias_dot")
# |got - want| / |want| over a whole gradient, in the Frobenius norm.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
WINDOWS = (EVERYTHING, CAUSAL, Window(4, 2), Window(2, 0))


@dataclass(frozen=True)
class Case:
    """The arguments of an attention_jvp, and a cotangent for each of its outputs."""

    inputs: dict[str, Tensor | None]  # by NAMES
    cotangents: dict[str, Tensor | None]  # by OUTPUTS
    window: Window = EVERYTHING
    scale: float = 0.3

    def without(self, *names: str) -> Case:
        return replace(
            self,
            inputs={name: None if name in names else x for name, x in self.inputs.items()},
            cotangents={name: None if name in names else x for name, x in self.cotangents.items()},
        )

    def to(self, dtype: torch.dtype) -> Case:
        """Rounded to dtype, what is of one number per query to the dtype inside."""
        inside = torch.promote_types(dtype, torch.float32)
        inputs = {n: x.to(dtype) if x is not None and x.dtype != torch.bool else x for n, x in self.inputs.items()}
        cotangents = {
            n: None if x is None else x.to(inside if n.startswith("lse") else dtype) for n, x in self.cotangents.items()
        }
        return replace(self, inputs=inputs, cotangents=cotangents)

    def visible(self) -> Tensor:
        """[B, H, Lq, Lkv]: which query sees which key."""
        q, k, bias = (self.inputs[name] for name in ("q", "k", "bias"))
        assert q is not None
        assert k is not None
        ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
        visible = ~self.window.hides(ahead).expand(*q.shape[:3], k.shape[2])
        if bias is not None:
            visible = visible & (bias if bias.dtype == torch.bool else bias > -math.inf)
        return visible


def make(
    b: int = 2,
    h: int = 4,
    n_q: int = 11,
    n_k: int = 13,
    d: int = 5,
    d_v: int | None = None,
    kv_heads: int | None = None,
    bias: Tensor | None = None,
    window: Window = EVERYTHING,
) -> Case:
    """Normal numbers in float64, in memory as B, L, H, D; every tangent that there can be."""

    def rows(heads: int, n: int, dim: int) -> Tensor:
        return torch.randn(b, n, heads, dim, dtype=torch.float64).transpose(1, 2)

    d_v, kv_heads = d_v or d, kv_heads or h
    shapes = ((h, n_q, d), (kv_heads, n_k, d), (kv_heads, n_k, d_v))
    bias_dot = torch.randn_like(bias) if bias is not None and bias.dtype != torch.bool else None
    inputs = dict(zip(NAMES, (*(rows(*s) for s in shapes * 2), bias, bias_dot)))
    o, lse = rows(h, n_q, d_v), torch.randn(b, h, n_q, dtype=torch.float64)
    cotangents = dict(zip(OUTPUTS, (o, lse, torch.randn_like(o), torch.randn_like(lse))))
    return Case(inputs, cotangents, window)


def additive(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def hidden(*shape: int) -> Tensor:
    """Zero or -inf; a whole row, too, where a row can be hidden."""
    x = additive(*shape).masked_fill_(torch.rand(shape) > 0.7, -math.inf)
    x[..., :1, :] = -math.inf if shape[-2] > 1 else 0
    return x


def computed(case: Case, **blocks: int | None) -> dict[str, Tensor | None]:
    """The gradients by name, from the forward in blocks."""
    q, k, v, q_dot, k_dot, v_dot, bias, bias_dot = (case.inputs[name] for name in NAMES)
    inputs: tuple[Any, ...] = (q, k, v, q_dot, k_dot, v_dot, bias, bias_dot)
    outputs = calls.attention_jvp(attention_blocked, *inputs, case.window, case.scale, **blocks)
    floating = bias is not None and bias.dtype != torch.bool
    cotangents = tuple(case.cotangents[name] for name in OUTPUTS)
    how, biases = (case.window, case.scale), (floating, bias_dot is not None)
    got = calls.attention_jvp_backward(backward_blocked, cotangents, inputs, outputs, how, biases, **blocks)
    return dict(zip(NAMES, got))


def expected(case: Case) -> dict[str, Tensor | None]:
    """The gradients of the specification by autograd, in float64.

    Rows that see no key would give NaN: they see everything here, and the loss does not see them.
    """
    case = case.to(torch.float64)
    visible = case.visible()
    blind = ~visible.any(-1, keepdim=True)
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in case.inputs.items()
        if x is not None and x.dtype != torch.bool
    }
    bias = leaves.get("bias", torch.zeros((), dtype=torch.float64))
    bias = bias.expand(visible.shape).masked_fill(~visible, -math.inf).masked_fill(blind, 0)
    outputs = reference.attention_jvp(
        *(leaves.get(name) for name in NAMES[:6]), bias, leaves.get("bias_dot"), scale=case.scale
    )
    loss = sum(
        (out * x.masked_fill(blind if x.dim() == 4 else blind[..., 0], 0)).sum()
        for out, x in zip(outputs, (case.cotangents[name] for name in OUTPUTS))
        if x is not None
    )
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return {name: torch.zeros_like(leaves[name]) if name in leaves else None for name in NAMES}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    found = dict(zip(leaves, grads))
    return {name: found.get(name) for name in NAMES}


def error(have: Tensor, want: Tensor) -> float:
    """Relative to |want|; a gradient that vanishes in exact arithmetic counts as one of size 0.1 per element."""
    size = max(want.double().norm().item(), 0.1 * math.sqrt(want.numel()))
    return (have.double() - want.double()).norm().item() / size if want.numel() else 0.0


def check(case: Case, tolerance: float | None = None, **blocks: int | None) -> None:
    q = case.inputs["q"]
    assert q is not None
    tolerance = TOLERANCE[q.dtype] if tolerance is None else tolerance
    got, want = computed(case, **blocks), expected(case)
    for name in NAMES:
        have, should = got[name], want[name]
        assert (have is None) == (should is None), name
        if have is None or should is None:
            continue
        assert have.shape == should.shape, name
        inside = torch.promote_types(q.dtype, torch.float32)
        assert have.dtype == (inside if name.startswith("bias") else q.dtype), name
        assert error(have, should) <= tolerance, f"{name}: {error(have, should):.1e}"


# --------------------------------------------------------------------------------- against the specification


@pytest.mark.parametrize("tangents", list(itertools.product((False, True), repeat=4)))
def test_every_subset_of_tangents_and_of_cotangents(tangents):
    case = make(b=2, h=4, kv_heads=2, d_v=3, bias=additive(2, 1, 11, 13), window=Window(6, 3))
    case = case.without(*(name for name, given in zip(DOTS, tangents) if not given))
    for missing in itertools.product((False, True), repeat=4):
        check(case.without(*itertools.compress(OUTPUTS, missing)), block_q=4, block_k=5)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "hidden"])
@pytest.mark.parametrize(
    "shape",
    [
        {"n_q": 11, "n_k": 13},
        {"n_q": 15, "n_k": 9, "kv_heads": 2, "d_v": 7},
        {"b": 1, "h": 6, "n_q": 1, "n_k": 20, "kv_heads": 1},
        {"b": 3, "h": 1, "n_q": 20, "n_k": 1},
    ],
    ids=lambda shape: "-".join(f"{key}{value}" for key, value in shape.items()),
)
def test_shapes_biases_and_windows(shape, kind, window):
    size = (shape.get("b", 2), shape.get("h", 4), shape["n_q"], shape["n_k"])
    bias = {
        "none": lambda: None,
        "bool": lambda: torch.rand(size) > 0.3,
        "additive": lambda: additive(*size),
        "hidden": lambda: hidden(*size),
    }[kind]()
    case = make(**shape, bias=bias, window=window)
    for block_q, block_k in ((None, None), (4, 3), (16, 5), (5, 16)):
        check(case, block_q=block_q, block_k=block_k)


@pytest.mark.parametrize("ones", list(itertools.product((False, True), repeat=4)))
def test_gradients_of_a_bias_are_summed_over_what_it_broadcasts(ones):
    shape = [1 if one else size for one, size in zip(ones, (2, 4, 11, 13))]
    for bias in (additive(*shape), torch.rand(shape) > 0.3):
        case = make(kv_heads=2, bias=bias, window=CAUSAL)
        check(case)
        check(case, block_q=3, block_k=4)


@pytest.mark.parametrize("kind", ["bool", "additive", "window"])
def test_rows_that_see_no_key_and_keys_that_no_row_sees_get_exact_zeros(kind):
    visible = torch.rand(2, 4, 11, 13) > 0.3
    visible[:, :, 3] = False
    visible[..., 12] = False
    bias = {
        "bool": visible,
        "additive": torch.zeros(visible.shape, dtype=torch.float64).masked_fill_(~visible, -math.inf),
        "window": None,
    }[kind]
    case = make(n_q=11, n_k=13, bias=bias) if bias is not None else make(n_q=20, n_k=13, window=Window(left=2))
    if kind == "window":
        blind, unseen = slice(15, None), slice(0, 0)
    else:
        blind, unseen = slice(3, 4), slice(12, None)
    for blocks in ({}, {"block_q": 3, "block_k": 4}):
        got = computed(case, **blocks)
        for name in ("q", "q_dot"):
            assert (got[name][:, :, blind] == 0).all()
        for name in ("k", "v", "k_dot", "v_dot"):
            assert (got[name][:, :, unseen] == 0).all()
        check(case, **blocks)


def test_a_tangent_that_no_cotangent_reaches_gets_zeros():
    case = make(kv_heads=2, bias=additive(1, 4, 1, 13)).without("o_dot", "lse_dot")
    got = computed(case)
    assert all((got[name] == 0).all() for name in DOTS)
    got = computed(make().without("o_dot"))
    assert (got["v_dot"] == 0).all()
    assert (got["q_dot"] != 0).all()


@pytest.mark.parametrize("size", [{"b": 0}, {"n_q": 0}, {"n_k": 0}], ids=str)
def test_empty_tensors(size):
    got = computed(make(**size))
    assert all(got[name].shape == make(**size).inputs[name].shape for name in NAMES[:6])
    assert all((got[name] == 0).all() for name in NAMES[:6])


def test_gradients_lie_in_memory_as_batch_length_head_dim():
    case = make(kv_heads=2)
    got = computed(replace(case, inputs={n: None if x is None else x.contiguous() for n, x in case.inputs.items()}))
    assert all(got[name].transpose(1, 2).is_contiguous() for name in NAMES[:6])


# ------------------------------------------------------------------------------ without the specification


def test_equals_differentiating_attention_twice():
    case = make(kv_heads=4, window=CAUSAL)
    primals, tangents = ([case.inputs[name] for name in names] for names in (NAMES[:3], NAMES[3:6]))
    for x in (*primals, *tangents):
        x.requires_grad_()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = (case.scale * q @ k.mT).masked_fill(~case.visible(), -math.inf)
        return s.softmax(-1) @ v, s.logsumexp(-1)

    # the tangent as the derivative of a vector-Jacobian product with respect to the vector
    outputs = attention(*primals)
    vectors = [torch.zeros_like(x).requires_grad_() for x in outputs]
    pulled = torch.autograd.grad(outputs, primals, vectors, create_graph=True)
    o_dot, lse_dot = torch.autograd.grad(pulled, vectors, tangents, create_graph=True)
    loss = sum((x * case.cotangents[n]).sum() for n, x in zip(OUTPUTS, (*outputs, o_dot, lse_dot)))
    want = torch.autograd.grad(loss, [*primals, *tangents])
    with torch.no_grad():
        got = computed(case, block_q=4, block_k=5)
    for name, should in zip(NAMES, want):
        assert error(got[name], should) <= 1e-12, name


class Tangent(torch.autograd.Function):
    """attention_jvp with its backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Any:
        outputs = calls.attention_jvp(attention_blocked, *inputs, Window(2, 1), 0.4, block_q=2, block_k=2)
        ctx.save_for_backward(*inputs, *outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        inputs, outputs = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        return calls.attention_jvp_backward(
            backward_blocked, cotangents, inputs, outputs, (Window(2, 1), 0.4), (True, True), block_q=3, block_k=2
        )


def test_central_differences():
    case = make(b=1, h=2, n_q=4, n_k=3, d=2, kv_heads=1, bias=additive(1, 2, 1, 3))
    assert gradcheck(Tangent.apply, [case.inputs[name].requires_grad_() for name in NAMES])


# --------------------------------------------------------------------------------- precision, memory, chance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_low_precision(dtype, kv_heads):
    case = make(h=2, n_q=100, n_k=130, d=32, kv_heads=kv_heads, bias=additive(1, 2, 100, 130), window=CAUSAL).to(dtype)
    check(case)
    check(case, block_q=32, block_k=48)


@pytest.mark.parametrize("name", ["k_dot", "v_dot", "v", "bias_dot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_all_keys_share_costs_no_precision(dtype, name):
    """The derivative with respect to time moves all keys alike; the gradient is that of what they do not share."""
    n_q, n_k = (100, 130) if dtype.itemsize > 2 else (520, 600)  # the latter would be two blocks of keys in float32
    case = make(h=2, n_q=n_q, n_k=n_k, d=32, bias=additive(1, 2, 1, n_k))
    x = case.inputs[name]
    x += 30 * torch.randn_like(x[:, :, :1, :1] if name == "bias_dot" else x[:, :, :1])
    check(case.to(dtype))
    if dtype.itemsize > 2:  # what the forward rounds to a half type would be too coarse for several blocks
        check(case.to(dtype), 3e-5 if dtype == torch.float32 else None, block_q=32, block_k=48)


def joint_case(text_first: bool, shift: float, attended: float = 0.0) -> Case:
    """See tests.joint, in bfloat16."""
    tensors = joint(text=77, image=300, text_first=text_first, shift=shift, attended=attended, h=1, d=64)
    case = make(b=1, h=1, n_q=64, n_k=377, d=64).to(torch.bfloat16)
    return replace(case, inputs=case.inputs | dict(zip(NAMES, tensors)), scale=64**-0.5)


@pytest.mark.parametrize("attended", [0.0, 4.0])
@pytest.mark.parametrize("text_first", [True, False])
def test_joint_attention_costs_no_precision(text_first, attended):
    check(joint_case(text_first, 30.0, attended), 2e-3)


def test_a_large_tangent_common_to_all_keys():
    """Beyond what the rounding of lse_dot would leave."""
    case = make(h=2, n_q=100, n_k=130, d=32)
    case.inputs["k_dot"] += 1000 * torch.randn_like(case.inputs["k_dot"][:, :, :1])
    check(case.to(torch.float32), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_linear_in_length(dtype):
    def backward(n: int) -> int:
        case = make(1, 1, n, n, d=32, bias=additive(1, 1, 1, n)).to(dtype)
        inputs = [case.inputs[name] for name in NAMES]
        outputs = calls.attention_jvp(attention_blocked, *inputs, CAUSAL, 0.2)
        cotangents = tuple(case.cotangents[name] for name in OUTPUTS)
        given = (cotangents, inputs, outputs, (CAUSAL, 0.2), (True, True))
        return peak_bytes(calls.attention_jvp_backward, backward_blocked, *given)

    small, large = backward(2048), backward(4096)
    assert large <= 2.3 * small
    assert large < 4096 * 4096 * 4 / 2  # half of one matrix of scores


@pytest.mark.fuzz
@given(st.data())
def test_any_case(data):
    torch.manual_seed(data.draw(seeds))
    lengths = st.integers(1, 9)
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    b, h, n_q, n_k = data.draw(st.integers(1, 3)), kv_heads * group, data.draw(lengths), data.draw(lengths)
    size = [data.draw(st.sampled_from((1, n))) for n in (b, h, n_q, n_k)]
    bias = data.draw(st.sampled_from((None, torch.rand(size) > 0.3, additive(*size), hidden(*size))))
    limit = st.none() | st.integers(0, 5)
    window = Window(data.draw(limit), data.draw(limit))
    d, d_v = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    missing = data.draw(st.sets(st.sampled_from((*DOTS, *OUTPUTS))))
    case = make(b, h, n_q, n_k, d, d_v, kv_heads, bias, window).without(*missing)
    check(case, block_q=data.draw(lengths), block_k=data.draw(lengths))
