"""The attention ops against their float64 specification, against torch's own derivatives, and under every
transform they meet."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import weakref
from itertools import accumulate, pairwise, product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jvpgraph.kernels import attention_blocked as blocked
from jvpgraph.kernels import backward_blocked, checks, choose, reference
from jvpgraph.kernels.attention import (
    attention,
    attention_backward,
    attention_jvp,
    merge_attention,
)
from jvpgraph.kernels.call import How
from jvpgraph.kernels.layout import bias_to_rank4
from jvpgraph.kernels.ops import OPS
from jvpgraph.kernels.window import CAUSAL, EVERYTHING, Window
from tests import calls
from tests.interpreter import share
from tests.joint import joint

# Against the float64 reference, in units of the largest value there: a few roundings of the dtype.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 4e-6, torch.float64: 1e-12}
# (is_causal, window) as callers give them, and as implementations take them
WINDOWS = {
    "all": (False, None, EVERYTHING),
    "causal": (True, None, CAUSAL),
    "left": (False, (3, -1), Window(left=3)),
    "right": (False, (-1, 6), Window(right=6)),
    "both": (False, (4, 2), Window(4, 2)),
    "diagonal": (False, (0, 0), Window(0, 0)),
    "causal_left": (True, (5, 9), Window(5, 0)),
}
BIASES = ("none", "bool", "bool_padding", "additive", "additive_padding", "keys", "per_head", "per_query")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_bias(kind: str, b: int, h: int, n_q: int, n_k: int, dtype: torch.dtype) -> Tensor | None:
    return {
        "none": lambda: None,
        "bool": lambda: torch.rand(b, h, n_q, n_k) > 0.3,
        "bool_padding": lambda: torch.rand(b, 1, 1, n_k) > 0.3,
        "additive": lambda: torch.randn(b, h, n_q, n_k, dtype=dtype),
        "additive_padding": lambda: torch.zeros(b, 1, 1, n_k, dtype=dtype).masked_fill_(
            torch.rand(b, 1, 1, n_k) > 0.7, -math.inf
        ),
        "keys": lambda: torch.randn(n_k, dtype=dtype),
        "per_head": lambda: torch.randn(h, n_q, n_k, dtype=dtype),
        "per_query": lambda: torch.randn(1, h, n_q, 1, dtype=dtype),
    }[kind]()


def make(
    b: int = 2,
    h: int = 4,
    n_q: int = 17,
    n_k: int = 23,
    d: int = 8,
    d_v: int | None = None,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float64,
    bias: str = "none",
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """(q, k, v), their tangents, bias, its tangent; in memory as B, L, H, D."""

    def rows(heads: int, n: int, dim: int) -> Tensor:
        return torch.randn(b, n, heads, dim).to(dtype).transpose(1, 2)

    shapes = ((h, n_q, d), (kv_heads or h, n_k, d), (kv_heads or h, n_k, d_v or d))
    bias_tensor = make_bias(bias, b, h, n_q, n_k, dtype)
    floating = bias_tensor is not None and bias_tensor.is_floating_point()
    return (
        [rows(*shape) for shape in shapes],
        [rows(*shape) for shape in shapes],
        bias_tensor,
        torch.randn_like(bias_tensor) if floating else None,
    )


def double(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


def assert_near(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    assert len(actual) == len(expected)
    for have, want in zip(actual, expected):
        assert have.shape == want.shape
        want = want.double()
        finite = want[want.isfinite()]
        size = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
        torch.testing.assert_close(have.double(), want, rtol=0, atol=TOLERANCE[dtype] * size)


def gradients(function, inputs: list[Tensor], o_grad: Tensor, lse_grad: Tensor | None) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o, lse = function(*leaves)
    total = (o * o_grad).sum()
    if lse_grad is not None:
        total = total + (lse.masked_fill(lse == -math.inf, 0) * lse_grad).sum()
    return list(torch.autograd.grad(total, leaves))


# --------------------------------------------------------------------------------- against the specification


SHAPES = [
    {"n_q": 17, "n_k": 23},
    {"n_q": 65, "n_k": 63, "kv_heads": 2, "d_v": 12},
    {"b": 1, "h": 6, "n_q": 1, "n_k": 130, "kv_heads": 1},
    {"b": 3, "h": 1, "n_q": 130, "n_k": 1},
]


@pytest.mark.parametrize(("window", "bias", "shape"), share(4, WINDOWS, BIASES, SHAPES), ids=str)
def test_blocks_agree_with_reference(window, bias, shape):
    is_causal, sides, window = WINDOWS[window]
    (q, k, v), dots, bias, bias_dot = make(**shape, bias=bias)
    scale = 0.3
    expected = reference.attention_jvp(q, k, v, *dots, bias, bias_dot, is_causal, scale, sides)
    o_grad, lse_grad = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    movable = [q, k, v] + ([bias] if bias_dot is not None else [])
    expected_grads = gradients(
        lambda q, k, v, b=bias: reference.attention(q, k, v, b, is_causal, scale, sides), movable, o_grad, lse_grad
    )
    bias4, bias_dot4 = bias_to_rank4(q, bias), bias_to_rank4(q, bias_dot)
    for block_q, block_k in ((None, None), (7, 5), (16, 64), (64, 16)):
        backend, blocks = (choose, {}) if block_q is None else (blocked, {"block_q": block_q, "block_k": block_k})
        got = calls.attention_jvp(backend, q, k, v, *dots, bias4, bias_dot4, window, scale, **blocks)
        assert_near(got, expected, q.dtype)
        o, lse = calls.attention(backend, q, k, v, bias4, window, scale, **blocks)
        assert_near((o, lse), expected[:2], q.dtype)
        backend = choose if block_q is None else backward_blocked
        inputs, how = (q, k, v, bias4), (window, scale)
        *grads, dbias = calls.attention_backward(
            backend, (o_grad, lse_grad), inputs, (o, lse), how, bias_dot is not None, **blocks
        )
        if dbias is not None:
            grads.append(dbias.view(bias.shape))
        if all(x.isfinite().all() for x in expected_grads):  # torch's are NaN where a row is fully masked
            assert_near(tuple(grads), tuple(expected_grads), q.dtype)
        assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("d", [72, 80, 96, 112, 192])
def test_head_dims_and_dtypes(d, dtype):
    (q, k, v), dots, bias, bias_dot = make(b=1, h=2, n_q=65, n_k=70, d=d, dtype=dtype, bias="additive")
    expected = reference.attention_jvp(*map(double, (q, k, v, *dots, bias, bias_dot)))
    assert_near(attention_jvp(q, k, v, *dots, bias, bias_dot), expected, dtype)
    assert_near(attention(q, k, v, bias), expected[:2], torch.bfloat16 if dtype.itemsize == 2 else dtype)
    o_grad = torch.randn_like(q)
    expected_grads = gradients(
        lambda *a: reference.attention(*a), [double(x) for x in (q, k, v, bias)], o_grad.double(), None
    )
    assert_near(tuple(gradients(attention, [q, k, v, bias], o_grad, None)), tuple(expected_grads), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_sum_in_float32(dtype):
    """With a tangent common to all keys the result is as good as without: s_dot is centred, sums are
    float32."""
    (q, k, v), (q_dot, k_dot, v_dot), _, _ = make(b=1, h=2, n_q=64, n_k=512, d=64, dtype=dtype)
    k_dot = k_dot + 30 * torch.randn(1, 2, 1, 64).to(dtype)
    expected = reference.attention_jvp(*map(double, (q, k, v, q_dot, k_dot, v_dot)))[2]
    error = attention_jvp(q, k, v, q_dot, k_dot, v_dot)[2].double() - expected
    assert error.norm() < 0.6 * torch.finfo(dtype).eps * expected.norm()  # one rounding, of the result


@pytest.mark.parametrize("attended", [0.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text_first", [True, False])
def test_joint_attention_costs_no_precision(text_first, dtype, attended):
    tensors = joint(text=77, image=700, text_first=text_first, shift=30.0, attended=attended, h=1, dtype=dtype)
    expected = reference.attention_jvp(*map(double, tensors))[2]
    error = attention_jvp(*tensors)[2].double() - expected
    assert error.norm() < 0.6 * torch.finfo(dtype).eps * expected.norm()  # one rounding, of the result


@pytest.mark.parametrize("bias", ["none", "bool_padding", "additive"])
def test_every_subset_of_tangents_equals_zeros(bias):
    (q, k, v), dots, bias, bias_dot = make(bias=bias, kv_heads=2)
    candidates = (*dots, bias_dot)
    for chosen in product(*((x, None) if x is not None else (None,) for x in candidates)):
        zeros = [None if x is None else torch.zeros_like(x) if y is None else y for x, y in zip(candidates, chosen)]
        q_dot, k_dot, v_dot, b_dot = chosen
        sparse = attention_jvp(q, k, v, q_dot, k_dot, v_dot, bias, b_dot)
        dense = attention_jvp(q, k, v, *zeros[:3], bias, zeros[3])
        assert_near(sparse, dense, q.dtype)


def test_inactive_operands_are_not_multiplied():
    """Four products instead of six when keys and values do not move; two for the primal alone."""
    (q, k, v), (q_dot, k_dot, v_dot), _, _ = make()

    def flops(*dots: Tensor | None) -> int:
        class Count(TorchDispatchMode):
            total = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                a, b = {"bmm": (0, 1), "baddbmm_": (1, 2), "baddbmm": (1, 2)}.get(func._opname, (None, None))
                if a is not None:
                    self.total += args[a].numel() * args[b].shape[-1]
                return func(*args, **(kwargs or {}))

        with Count() as count:
            calls.attention_jvp(blocked, q, k, v, *dots, None, None, EVERYTHING, 0.3)
        return count.total

    one = 2 * 4 * 17 * 23 * 8
    small = 2 * 4 * 17 * 8 * 2  # the mean of s_dot
    assert flops(None, None, None) == 2 * one
    assert flops(None, None, v_dot) == 3 * one
    assert flops(q_dot, None, None) == 4 * one + small // 2
    assert flops(q_dot, k_dot, v_dot) == 6 * one + small


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    b=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    n_q=st.integers(0, 40),
    n_k=st.integers(0, 40),
    d=st.integers(1, 12),
    d_v=st.integers(1, 12),
    bias=st.sampled_from(BIASES),
    window=st.sampled_from(sorted(WINDOWS)),
    block_q=st.integers(1, 50),
    block_k=st.integers(1, 50),
)
def test_any_shape(b, kv_heads, group, n_q, n_k, d, d_v, bias, window, block_q, block_k):
    is_causal, sides, window = WINDOWS[window]
    h = kv_heads * group
    (q, k, v), dots, bias, bias_dot = make(b, h, n_q, n_k, d, d_v, kv_heads, bias=bias)
    got = calls.attention_jvp(
        blocked,
        q,
        k,
        v,
        *dots,
        bias_to_rank4(q, bias),
        bias_to_rank4(q, bias_dot),
        window,
        1 / math.sqrt(d),
        block_q=block_q,
        block_k=block_k,
    )
    public = attention_jvp(q, k, v, *dots, bias, bias_dot, is_causal, window=sides)
    if b and n_q and n_k:
        expected = reference.attention_jvp(q, k, v, *dots, bias, bias_dot, is_causal, window=sides)
        assert_near(got, expected, q.dtype)
        assert_near(public, expected, q.dtype)
    o, lse = attention(q, k, v, bias, is_causal, window=sides)
    assert_near((o, lse), public[:2], q.dtype)
    grads = attention_backward(torch.randn_like(o), None, q, k, v, bias, o, lse, is_causal, window=sides)
    assert [x.shape for x in grads[:3]] == [q.shape, k.shape, v.shape]
    assert all(x.isfinite().all() for x in (*grads, *got[2:], *public[2:]))


# -------------------------------------------------------------------------------------- against torch itself


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [{}, {"kv_heads": 2}, {"n_q": 9, "n_k": 30, "d_v": 5}], ids=str)
def test_agrees_with_torch_func_jvp_and_autograd(shape, is_causal):
    (q, k, v), dots, _, _ = make(**shape)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    with sdpa_kernel(SDPBackend.MATH):
        expected_o, expected_o_dot = torch.func.jvp(sdpa, (q, k, v), tuple(dots))
        o_grad = torch.randn_like(expected_o)
        expected_grads = gradients(lambda *a: (sdpa(*a), None), [q, k, v], o_grad, None)
    o, _, o_dot, _ = attention_jvp(q, k, v, *dots, is_causal=is_causal)
    assert_near((o, o_dot), (expected_o, expected_o_dot), q.dtype)
    grads = gradients(lambda *a: attention(*a, is_causal=is_causal), [q, k, v], o_grad, None)
    assert_near(tuple(grads), tuple(expected_grads), q.dtype)


def test_plain_forward_is_bitwise_sdpa():
    (q, k, v), _, bias, _ = make(n_q=70, n_k=70, d=32, dtype=torch.bfloat16, bias="additive")
    for mask in (None, bias):
        assert torch.equal(attention(q, k, v, mask)[0], F.scaled_dot_product_attention(q, k, v, mask))


def test_lse_dot_is_the_derivative_of_lse():
    (q, k, v), dots, bias, bias_dot = make(bias="additive")
    h = 1e-6

    def lse(t: float) -> Tensor:
        return attention(q + t * dots[0], k + t * dots[1], v + t * dots[2], bias + t * bias_dot)[1]

    lse_dot = attention_jvp(q, k, v, *dots, bias, bias_dot)[3]
    torch.testing.assert_close(lse_dot, (lse(h) - lse(-h)) / (2 * h), rtol=1e-6, atol=1e-8)


# -------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [[(5, 5), (1, 9), (12, 4)], [(7, 0), (0, 3), (6, 6)], [(0, 0)], []], ids=str)
def test_packed_sequences(lengths, window):
    """Each sequence as if it were alone; what belongs to none is fully masked, its NaN included."""
    is_causal, window, _ = WINDOWS[window]
    ends = [torch.tensor([0, *pair]).cumsum(0).int() for pair in zip(*lengths)] or [torch.zeros(1).int()] * 2
    packed = {"cu_seqlens_q": ends[0], "cu_seqlens_kv": ends[1], "is_causal": is_causal, "window": window}
    (q, k, v), dots, _, _ = make(b=1, n_q=20, n_k=20, kv_heads=2, d_v=5)
    o_grad, lse_grad = torch.randn(2, 1, 4, 20, 5, dtype=q.dtype)
    expected = [torch.zeros(1, 4, 20, 5), torch.full((1, 4, 20), -math.inf), torch.zeros(1, 4, 20, 5)]
    expected = [x.double() for x in (*expected, torch.zeros(1, 4, 20))]
    expected_grads = [torch.zeros_like(x) for x in (q, k, v)]
    for (i, i_end), (j, j_end) in zip(*(pairwise(x.tolist()) for x in ends)):
        rows, keys = slice(i, i_end), slice(j, j_end)
        part = [x[:, :, at] for x, at in zip((q, k, v, *dots), (rows, keys, keys) * 2)]
        if i == i_end or j == j_end:
            continue
        for out, value in zip(expected, reference.attention_jvp(*part, is_causal=is_causal, window=window)):
            out[:, :, rows] = value
        grads = gradients(
            lambda *a: attention(*a, is_causal=is_causal, window=window),
            part[:3],
            o_grad[:, :, rows],
            lse_grad[:, :, rows, 0],
        )
        for out, at, value in zip(expected_grads, (rows, keys, keys), grads):
            out[:, :, at] = value
    for x, end in zip((q, k, v, *dots), (ends[0][-1], ends[1][-1], ends[1][-1]) * 2):
        x[:, :, end:] = math.nan
    assert_near(attention_jvp(q, k, v, *dots, **packed), tuple(expected), q.dtype)
    assert_near(attention(q, k, v, **packed), tuple(expected[:2]), q.dtype)
    q, k, v = (x.nan_to_num() for x in (q, k, v))  # gradients() sums o * o_grad over all rows
    got = gradients(lambda *a: attention(*a, **packed), [q, k, v], o_grad, lse_grad[..., 0])
    assert_near(tuple(got), tuple(expected_grads), q.dtype)


# ---------------------------------------------------------------------------------- masks, ranks and strides


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("blocks", [None, 3])
def test_fully_masked_rows(boolean, blocks):
    (q, k, v), dots, _, _ = make(n_q=6, n_k=7)
    keep = torch.rand(2, 4, 6, 7) > 0.4
    keep[0, 1, 2] = False
    keep[1, :, 5] = False
    empty = ~keep.any(-1)
    bias = keep if boolean else torch.zeros(keep.shape, dtype=q.dtype).masked_fill_(~keep, -math.inf)
    bias_dot = None if boolean else torch.randn_like(bias)
    sizes = {} if blocks is None else {"block_q": blocks, "block_k": blocks}
    forward, backward = (choose, choose) if blocks is None else (blocked, backward_blocked)
    o, lse, o_dot, lse_dot = calls.attention_jvp(forward, q, k, v, *dots, bias, bias_dot, EVERYTHING, 0.3, **sizes)
    plain = calls.attention(forward, q, k, v, bias, EVERYTHING, 0.3, **sizes)
    for x in (o, o_dot, lse_dot, plain[0]):
        assert x.isfinite().all()
        assert not x[empty].any()
    assert torch.equal(lse == -math.inf, empty)
    assert torch.equal(plain[1] == -math.inf, empty)
    for lse_grad in (None, torch.randn_like(lse)):
        of_outs, how = (torch.randn_like(o), lse_grad), (EVERYTHING, 0.3)
        *grads, dbias = calls.attention_backward(
            backward, of_outs, (q, k, v, bias), (o, lse), how, not boolean, **sizes
        )
        assert all(x.isfinite().all() for x in grads)
        assert not grads[0][empty].any()
        assert boolean or not dbias[empty].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fill", [-1e4, -1e9, -1e30, "min"])
@pytest.mark.parametrize("n_k", [9, 300])
def test_rows_hidden_by_a_finite_mask_are_torchs(n_k, fill, dtype):
    """Weights, tangent and gradients are those of softmax(s + mask): lse has no digits left that tell p."""
    fill = torch.finfo(dtype).min if fill == "min" else fill
    (q, k, v), dots, _, _ = make(n_q=12, n_k=n_k, dtype=dtype)
    mask = torch.zeros(2, 1, 12, n_k, dtype=dtype)
    mask[..., 5:] = mask[:, :, 2] = mask[1] = fill
    inside = torch.promote_types(dtype, torch.float32)

    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        s = 0.3 * (q.to(inside) @ k.to(inside).mT) + mask.to(inside)
        return s.softmax(-1) @ v.to(inside)

    inputs = [x.detach().requires_grad_() for x in (q, k, v, mask)]
    wanted, wanted_dot = torch.func.jvp(model, tuple(inputs), (*dots, torch.zeros_like(mask)))
    o_grad, o_dot_grad = torch.randn_like(wanted).to(dtype), torch.randn_like(wanted).to(dtype)
    plain = torch.autograd.grad(wanted, inputs, o_grad.to(inside), retain_graph=True)
    both = torch.autograd.grad((wanted, wanted_dot), inputs, (o_grad.to(inside), o_dot_grad.to(inside)))
    for trainable in (3, 4):  # ATen's kernel has no gradient of a mask
        given = [*inputs[:trainable], *(x.detach() for x in inputs[trainable:])]
        o, _ = attention(*given, scale=0.3)
        grads = torch.autograd.grad(o, given[:trainable], o_grad)
        assert_near((o, *grads), (wanted, *plain[:trainable]), dtype)
        outs = attention_jvp(*given[:3], *dots, given[3], scale=0.3, differentiable_tangent=True)
        grads = torch.autograd.grad(outs[::2], given[:trainable], (o_grad, o_dot_grad))
        assert_near((*outs[::2], *grads), (wanted, wanted_dot, *both[:trainable]), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [-0.4, 0.0, -0.0, -3.0])
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({}, {}),
        ({"n_q": 37, "n_k": 37}, {"is_causal": True}),
        ({"n_q": 300, "n_k": 300}, {"is_causal": True}),
        ({"n_q": 5, "n_k": 290, "bias": "additive_padding"}, {}),
        ({"bias": "bool", "kv_heads": 2}, {"is_causal": True}),
    ],
    ids=str,
)
def test_scales_of_zero_and_less(shape, how, scale, dtype):
    """ATen's kernels hide by -inf and then multiply by the scale: below 0 that shows, and at 0 it is NaN."""
    inputs, dots, bias, _ = make(**shape, dtype=dtype)
    if bias is not None:
        bias[..., :1] = 0 if bias.is_floating_point() else True  # torch has no gradient of a row that sees no key
    leaves = [x.detach().requires_grad_() for x in inputs]
    o, lse = attention(*leaves, bias, scale=scale, **how)
    o_grad = torch.randn_like(o)
    grads = torch.autograd.grad(o, leaves, o_grad)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    want = reference.attention(*doubles, double(bias), scale=scale, **how)
    want_grads = torch.autograd.grad(want[0], doubles, o_grad.double())
    assert_near((o, lse, *grads), (*want, *want_grads), dtype)
    o_dot = attention_jvp(*inputs, *dots, bias, scale=scale, **how)[2]
    want_dot = reference.attention_jvp(*map(double, (*inputs, *dots, bias)), None, scale=scale, **how)[2]
    assert_near((o_dot,), (want_dot,), dtype)


def test_merging_parts_that_a_finite_mask_hides_whole():
    """Padded keys on two ranks: each part says -1e30."""
    (q, k, v), dots, _, _ = make(n_q=5, n_k=8)
    mask = torch.full((5, 8), -1e30, dtype=torch.float64)
    mask[1:, :3] = 0
    parts = [
        attention_jvp(q, k[:, :, at], v[:, :, at], dots[0], *(x[:, :, at] for x in dots[1:]), mask[:, at])
        for at in (slice(0, 4), slice(4, 8))
    ]
    assert_near(merge_attention(*parts)[::2], attention_jvp(q, k, v, *dots, mask)[::2], torch.float64)


def test_nan_is_not_hidden():
    (q, k, v), dots, _, _ = make()
    q[0, 0, 3, 2] = math.nan
    o, lse, o_dot, _ = attention_jvp(q, k, v, *dots, torch.ones(23, dtype=torch.bool))
    assert o[0, 0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    assert o_dot[0, 0, 3].isnan().all()
    assert o[0, 0, 4].isfinite().all()


@pytest.mark.parametrize("lead", [(3,), (2, 3, 4), (2, 1, 3, 4)])
def test_other_ranks(lead):
    q, q_dot = torch.randn(2, *lead, 9, 8, dtype=torch.float64)
    k, k_dot = torch.randn(2, *lead, 11, 8, dtype=torch.float64)
    v, v_dot = torch.randn(2, *lead, 11, 5, dtype=torch.float64)
    shapes = [(), (11,), (9, 11), (*lead, 9, 11), (lead[0], *(1,) * (len(lead) - 1), 1, 11)]
    for shape in shapes:
        bias = torch.randn(shape, dtype=q.dtype) if shape else None
        expected = reference.attention_jvp(q, k, v, q_dot, k_dot, v_dot, bias)
        assert_near(attention_jvp(q, k, v, q_dot, k_dot, v_dot, bias), expected, q.dtype)
        inputs = [q, k, v] + ([bias] if shape else [])
        o_grad, lse_grad = torch.randn_like(expected[0]), torch.randn_like(expected[1])
        assert_near(
            tuple(gradients(attention, inputs, o_grad, lse_grad)),
            tuple(gradients(reference.attention, inputs, o_grad, lse_grad)),
            q.dtype,
        )


@pytest.mark.parametrize("form", ["contiguous", "transposed", "expanded", "sliced", "flipped_dims"])
def test_strides(form):
    (q, k, v), dots, _, _ = make(h=4, n_q=10, n_k=10, d=8)

    def lay_out(x: Tensor) -> Tensor:
        return {
            "contiguous": lambda: x.contiguous(),
            "transposed": lambda: x,
            "expanded": lambda: x[:1, :, :1].expand(x.shape),
            "sliced": lambda: torch.cat((x, x), dim=-1)[..., ::2],
            "flipped_dims": lambda: x.mT.contiguous().mT,
        }[form]()

    q, k, v = map(lay_out, (q, k, v))
    dots = [lay_out(x) for x in dots]
    expected = reference.attention_jvp(q, k, v, *dots)
    got = OPS.attention_jvp(q, k, v, *dots)
    assert_near(got, expected, q.dtype)
    assert got[0].transpose(1, 2).is_contiguous()
    o = expected[0]
    for grad_layout in (o.contiguous(), o.mT.contiguous().mT, o[..., :1].expand_as(v)):
        assert_near(
            tuple(gradients(OPS.attention, [q, k, v], grad_layout, None)),
            tuple(gradients(reference.attention, [q, k, v], grad_layout, None)),
            q.dtype,
        )


def test_bias_gradient_has_the_shape_of_bias():
    (q, k, v), _, _, _ = make(kv_heads=2)
    for shape in [(23,), (1,), (17, 1), (1, 23), (4, 1, 23), (2, 1, 1, 23), (2, 4, 17, 23), (1, 4, 1, 1)]:
        bias = torch.randn(shape, dtype=q.dtype)
        o_grad, lse_grad = torch.randn_like(q), torch.randn(q.shape[:-1], dtype=q.dtype)
        expected = gradients(reference.attention, [q, k, v, bias], o_grad, lse_grad)
        got = gradients(attention, [q, k, v, bias], o_grad, lse_grad)
        assert got[3].shape == shape
        assert_near(tuple(got), tuple(expected), q.dtype)


# ---------------------------------------------------------------------------------- reverse and forward mode


def test_attention_jvp_is_differentiable_in_the_primal_only():
    (q, k, v), dots, _, _ = make()
    q.requires_grad_()
    o, lse, o_dot, lse_dot = attention_jvp(q, k, v, *dots)
    o_grad = torch.randn_like(o)
    (expected,) = gradients(lambda q: reference.attention(q, k, v), [q], o_grad, None)
    (got,) = torch.autograd.grad(o, q, o_grad, retain_graph=True)
    assert_near((got,), (expected,), q.dtype)
    for x in (o_dot, lse_dot):
        with pytest.raises(RuntimeError, match="no gradient; detach"):
            torch.autograd.grad(x.sum(), q, retain_graph=True)
    (got,) = torch.autograd.grad(lse.sum(), q)
    assert got.isfinite().all()


@pytest.mark.parametrize("case", ["plain", "bias", "packed", "no_heads"])
def test_gradients_of_the_tangent(case):
    """Of o, lse, o_dot and lse_dot together, in everything, against autograd of the reference."""
    if case == "packed":
        (q, k, v), dots, bias, bias_dot = make(b=1, n_q=9, n_k=12, kv_heads=2, d_v=5)
        ends = [torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 9], [0, 7, 12])]
        how = {"cu_seqlens_q": ends[0], "cu_seqlens_kv": ends[1]}
        mask = torch.zeros(9, 12, dtype=torch.bool)
        mask[:4, :7] = mask[4:, 7:] = True
    else:
        (q, k, v), dots, bias, bias_dot = make(kv_heads=2, bias="per_head" if case == "bias" else "none")
        how, mask = {"window": (6, 3)}, bias
        if case == "no_heads":
            (q, k, v), dots = ([x[:, 0] for x in xs] for xs in ((q, k, v), dots))
    inputs = [x.clone().requires_grad_() for x in (q, k, v, *dots)]
    biases = [x.clone().requires_grad_() for x in (bias, bias_dot) if x is not None]
    outs = attention_jvp(*inputs, *biases, differentiable_tangent=True, **how)
    if case == "packed":
        expected = reference.attention_jvp(*inputs, mask)
    else:
        expected = reference.attention_jvp(*inputs, *biases, **({} if biases else {"bias": mask}), **how)
    assert_near(outs, expected, q.dtype)
    weights = [torch.randn_like(x) for x in outs]
    got, wanted = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(xs, weights)), [*inputs, *biases])
        for xs in (outs, expected)
    )
    assert_near(got, wanted, q.dtype)


def test_second_derivatives_are_refused():
    (q, k, v), _, _, _ = make()
    q.requires_grad_()
    (first,) = torch.autograd.grad(attention(q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        first.sum().backward()


def test_forward_mode_of_torch_is_refused():
    (q, k, v), (q_dot, _, _), bias, _ = make(bias="additive")
    calls = [
        lambda q: attention(q, k, v)[0],
        lambda q: attention(q, q, q)[1],
        lambda q: attention(k, q, q)[0],
        lambda q: attention_jvp(q, k, v, q_dot, None, None)[0],
        lambda q: attention_jvp(k, k, v, None, q[:, :, :1].expand_as(k), None)[2],
        lambda q: attention(k[:, :, :17], k, v, bias + q.sum())[0],
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"use jvpgraph\.transform"):
            torch.func.jvp(call, (q,), (q_dot,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"use jvpgraph\.transform"):
            call(forward_ad.make_dual(q, q_dot))
    with forward_ad.dual_level():  # nothing dual among the arguments: fine
        assert attention(q, k, v)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_torch_func_jvp_is_refused(backend):
    (q, k, v), (q_dot, _, _), _, _ = make()
    compiled = torch.compile(
        lambda q, q_dot: torch.func.jvp(lambda q: attention(q, k, v)[0], (q,), (q_dot,)), backend=backend
    )
    with pytest.raises(Exception, match="has no rule for"):
        compiled(q, q_dot)


# --------------------------------------------------------------------- fakes, tracing, compilation, autocast


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("bias", ["none", "bool_padding", "per_head"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(bias, requires_grad):
    (q, k, v), dots, bias, bias_dot = make(n_q=5, n_k=6, kv_heads=2, bias=bias)
    for x in (q, k, v):
        x.requires_grad_(requires_grad)
    ops = torch.ops.jvpgraph
    torch.library.opcheck(ops.attention.default, (q, k, v, bias, True))
    if requires_grad:
        return
    torch.library.opcheck(ops.attention_jvp.default, (q, k, v, *dots, bias, bias_dot, False, 0.5))
    torch.library.opcheck(ops.attention_jvp.default, (q, k, v, dots[0], None, None, bias))
    o, lse = attention(q, k, v, bias)
    o_grad, lse_grad = torch.randn_like(o), torch.randn_like(lse)
    args = (o_grad, lse_grad, q, k, v, bias, o, lse, *How(), bias_dot is not None)
    torch.library.opcheck(ops.attention_backward.default, args)


@pytest.mark.long
def test_opcheck_of_windows_packing_and_the_second_backward():
    (q, k, v), dots, bias, bias_dot = make(b=1, n_q=9, n_k=9, kv_heads=2, bias="per_head")
    packed = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 4, 9], [0, 6, 8])]
    how = How(False, None, [2, 3], *packed)
    for requires_grad in (False, True):
        inputs = [x.detach().requires_grad_(requires_grad) for x in (q, k, v)]
        torch.library.opcheck(OPS.attention.default, (*inputs, None, *how))
        torch.library.opcheck(OPS.attention_jvp.default, (*inputs, *dots, None, None, *how, True))
    o, lse, o_dot, lse_dot = attention_jvp(q, k, v, *dots, bias, bias_dot)
    cotangents = [torch.randn_like(x) for x in (o, lse, o_dot, lse_dot)]
    outs = (o, lse, o_dot, lse_dot)
    args = (*cotangents, q, k, v, *dots, bias, bias_dot, *outs, *How(True, 0.3), True, True)
    torch.library.opcheck(OPS.attention_jvp_backward.default, args)
    few = (None, None, cotangents[2], None, q, k, v, None, dots[1], None, None, None, *outs, *how)
    torch.library.opcheck(OPS.attention_jvp_backward.default, few)


@pytest.mark.parametrize(
    ("q_shape", "kv_heads"),
    [
        ((2, 4, 5, 8), 2),
        ((1, 1, 5, 8), 1),
        ((1, 4, 1, 8), 4),
        ((3, 5, 8), 0),
        ((1, 1, 8), 0),
        ((2, 1, 4, 5, 8), 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_fakes_have_the_real_strides(q_shape, kv_heads, dtype, with_bias):
    kv_shape = (*q_shape[:-3], kv_heads, 7) if kv_heads else (q_shape[0], 7)

    def run() -> list[tuple]:
        q = (
            torch.randn(*q_shape[:-1], 2 * q_shape[-1], dtype=dtype)[..., :8]
            .transpose(0, -2)
            .contiguous()
            .transpose(0, -2)
        )
        k, v = torch.randn(*kv_shape, 8, dtype=dtype), torch.randn(*kv_shape, 8, dtype=dtype)
        bias = torch.randn(q_shape[-2], 7, dtype=dtype) if with_bias else None
        o, lse = attention(q, k, v, bias)
        results = [o, lse, *attention_jvp(q, k, v, q, None, v, bias)]
        for lse_grad in (None, lse):
            results += attention_backward(o, lse_grad, q, k, v, bias, o, lse, bias_needs_grad=with_bias)
        return [(x.shape, x.stride(), x.dtype, x.storage_offset()) for x in results]

    with FakeTensorMode():
        fake = run()
    assert fake == run()


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_keeps_the_ops_whole(mode):
    (q, k, v), dots, _, _ = make(kv_heads=2)

    def call(q, k, v, q_dot, k_dot):
        o, lse = attention(q, k, v)
        return (o, lse, *attention_jvp(q, k, v, q_dot, k_dot, None))

    graph = make_fx(call, tracing_mode=mode)(q, k, v, *dots[:2])
    ops = [str(n.target) for n in graph.graph.nodes if "jvpgraph" in str(n.target)]
    assert ops == ["jvpgraph.attention.default", "jvpgraph.attention_jvp.default"]
    assert_near(graph(q, k, v, *dots[:2]), call(q, k, v, *dots[:2]), q.dtype)


class Attends(torch.nn.Module):
    def forward(self, q, k, v, q_dot, v_dot):
        o, lse, o_dot, lse_dot = attention_jvp(q, k, v, q_dot, None, v_dot, window=(5, -1))
        return o.sin() + lse.unsqueeze(-1), o_dot * lse_dot.unsqueeze(-1)


def test_compile_and_export_with_fake_cuda_tensors():
    """No GPU is needed to trace for one: shapes, strides, devices and dtypes come out as there."""
    op = "jvpgraph.attention_jvp.default"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = [torch.empty(2, 9, 4, 8, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(5)]
        graph = make_fx(Attends())(*made)
        out, out_dot = Attends()(*made)
        captured: list[torch.fx.GraphModule] = []
        compiled = torch.compile(Attends(), backend=lambda gm, _: captured.append(gm) or gm.forward, fullgraph=True)
        assert compiled(*made)[0].device.type == "cuda"
        o, lse = attention(*made[:3])
        grads = attention_backward(o, None, *made[:3], None, o, lse)
    assert out.device.type == out_dot.device.type == "cuda"
    assert out_dot.dtype == torch.float32  # lse_dot's
    assert out.stride() == (288, 8, 32, 1)
    assert [str(n.target) for n in graph.graph.nodes if "jvpgraph" in str(n.target)] == [op]
    assert [str(n.target) for n in captured[0].graph.nodes if "jvpgraph" in str(n.target)] == [op]
    assert [x.device.type for x in grads[:3]] == ["cuda"] * 3
    length = torch.export.Dim("length", min=2, max=1 << 20)
    shapes = tuple({2: length} for _ in made)
    with mode:
        exported = torch.export.export(Attends(), tuple(made), dynamic_shapes=shapes, strict=False)
    (node,) = [n for n in exported.graph.nodes if str(n.target) == op]
    o, lse = node.meta["val"][:2]
    assert o.device.type == lse.device.type == "cuda"
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert isinstance(o.shape[2], torch.SymInt)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_with_dynamic_shapes(backend):
    def model(q, k, v, q_dot, bias):
        o, lse = attention(q * 2, k, v, bias)
        o_dot = attention_jvp(q.detach(), k.detach(), v.detach(), q_dot, None, None, bias)[2]
        return o.sin() + lse.unsqueeze(-1).cos(), o_dot.exp()

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for n_q, n_k in ((17, 23), (31, 40)):
        (q, k, v), (q_dot, _, _), bias, _ = make(n_q=n_q, n_k=n_k, kv_heads=2, dtype=torch.float32, bias="bool_padding")
        results = []
        for function in (model, compiled):
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            out, out_dot = function(*leaves, q_dot, bias)
            results.append((out, out_dot, *torch.autograd.grad(out.sum(), leaves)))
        assert_near(results[1], results[0], torch.float32)
    torch._dynamo.reset()


@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("case", ["plain", "grouped", "lse", "bias", "packed", "tangent"])
def test_backward_within_autocast(case, n):
    """As that of a caller who writes loss.backward() there: the gradients are those outside of it."""
    (q, k, v), dots, bias, _ = make(
        b=1,
        n_q=n,
        n_k=n,
        dtype=torch.bfloat16,
        kv_heads=2 if case == "grouped" else None,
        bias="per_head" if case == "bias" else "none",
    )
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *([] if bias is None else [bias]))]
    cu = {}
    if case == "packed":
        ends = torch.tensor([0, 5, n], dtype=torch.int32)
        cu = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends}

    def loss() -> Tensor:
        if case == "tangent":
            o, lse, o_dot, _ = attention_jvp(*leaves[:3], *dots, differentiable_tangent=True)
            return (o.float() * o_dot.float()).sum() + lse.sum()
        o, lse = attention(*leaves, **cu)
        return o.float().square().sum() + (lse.sum() if case == "lse" else 0)

    want = torch.autograd.grad(loss(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        have = torch.autograd.grad(loss(), leaves)
    assert_near(have, want, torch.bfloat16)


def test_autocast_casts_as_for_sdpa():
    (q, k, v), dots, bias, _ = make(dtype=torch.float32, bias="per_query")
    q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, lse = attention(q, k, v, bias)
        expected = F.scaled_dot_product_attention(q, k, v, bias.expand(2, 4, 17, 23))
        o_dot = attention_jvp(q, k, v, *dots, bias)[2]
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)(q, k, v, bias)[0]
    assert o.dtype == o_dot.dtype == compiled.dtype == expected.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert_near((o,), (compiled,), torch.bfloat16)
    assert_near((o,), (expected,), torch.bfloat16)
    (grad,) = torch.autograd.grad(o.float().sum(), q)
    assert grad.dtype == torch.float32
    torch._dynamo.reset()


# --------------------------------------------------------------------------------- memory, merging, refusals


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes alive at once in storages made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.track(x.untyped_storage(), known)
        return out

    def track(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or key in known:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self.seen.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


def peak_bytes(function, *args) -> int:
    with PeakMemory() as memory:
        function(*args)
    return memory.peak


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def jvp(n: int) -> int:
        (q, k, v), dots, _, _ = make(b=1, h=1, n_q=n, n_k=n, d=64, dtype=torch.float32)
        return peak_bytes(calls.attention_jvp, blocked, q, k, v, *dots, None, None, EVERYTHING, 0.125)

    def quadratic(n: int) -> int:
        (q, k, v), dots, _, _ = make(b=1, h=1, n_q=n, n_k=n, d=64, dtype=torch.float32)
        return peak_bytes(reference.attention_jvp, q, k, v, *dots)

    assert quadratic(2048) > 3.5 * quadratic(1024)  # the measure sees what it should
    small, large = jvp(4096), jvp(8192)
    assert large <= 2.3 * small
    assert large < 8192 * 8192 * 4 / 4  # a quarter of one matrix of scores


def test_memory_of_backward_and_of_masks_is_linear():
    def backward(n: int) -> int:
        (q, k, v), _, bias, _ = make(1, 1, n, n, d=32, dtype=torch.float32, bias="additive_padding")
        o, lse = attention(q, k, v, bias)
        given = ((o, lse), (q, k, v, bias), (o, lse), (EVERYTHING, 0.2), True)
        return peak_bytes(calls.attention_backward, backward_blocked, *given)

    assert backward(4096) <= 2.3 * backward(2048)


@pytest.mark.parametrize("tangents", [False, True])
def test_merging_key_splits(tangents):
    (q, k, v), dots, bias, bias_dot = make(n_k=30, bias="additive_padding")
    bias[0, ..., 10:20] = -math.inf  # one part that some rows do not see at all
    bias[1] = -math.inf

    def run(keys: slice) -> tuple[Tensor, ...]:
        part = (q, k[:, :, keys], v[:, :, keys])
        if not tangents:
            return attention(*part, bias[..., keys])
        k_dot, v_dot = dots[1][:, :, keys], dots[2][:, :, keys]
        return attention_jvp(*part, dots[0], k_dot, v_dot, bias[..., keys], bias_dot[..., keys])

    parts = [run(slice(i, i + 10)) for i in (0, 10, 20)]
    assert_near(merge_attention(*parts), run(slice(None)), q.dtype)
    with pytest.raises(ValueError, match="merge_attention needs"):
        merge_attention()
    if not tangents:  # rows that no part sees, among them all of the second batch entry
        whole, merged = (
            gradients(call, [q, k, v], torch.randn_like(q), None)
            for call in (
                lambda q, k, v: attention(q, k, v, bias),
                lambda q, k, v: merge_attention(
                    *(
                        attention(q, k[:, :, i : i + 10], v[:, :, i : i + 10], bias[..., i : i + 10])
                        for i in (0, 10, 20)
                    )
                ),
            )
        )
        assert all(x.isfinite().all() for x in (*whole, *merged))


def elsewhere(**tensors: Tensor) -> list[tuple[str, list[Tensor | None]]]:
    """The tensors, one of them on another device, and its name."""
    return [(name, [x.to("meta") if other == name else x for other, x in tensors.items()]) for name in tensors]


WRONG_OFFSETS = [[1, 4, 9], [0, 5, 4, 9], [0, 4, 10], [0, -1, 9], [-1, 4, 9], [9, 0]]


@pytest.mark.parametrize("offsets", WRONG_OFFSETS, ids=str)
def test_wrong_offsets_of_packed_sequences_are_refused(offsets):
    """By every op, before anything is computed; on a GPU by an assertion that nobody waits for."""
    (q, k, v), dots, _, _ = make(b=1, n_q=9, n_k=9)
    wrong, right = (torch.tensor(x, dtype=torch.int32) for x in (offsets, [0, *[9] * (len(offsets) - 1)]))
    o, lse, o_dot, lse_dot = attention_jvp(q, k, v, *dots)
    for name, cu in (("cu_seqlens_q", (wrong, right)), ("cu_seqlens_kv", (right, wrong))):
        how = (False, None, None, *cu)
        for call in (
            lambda how=how: OPS.attention(q, k, v, None, *how),
            lambda how=how: OPS.attention_jvp(q, k, v, *dots, None, None, *how),
            lambda how=how: OPS.attention_backward(o, None, q, k, v, None, o, lse, *how),
            lambda how=how: OPS.attention_jvp_backward(
                *(o, None, o, None, q, k, v, *dots, None, None, o, lse, o_dot, lse_dot, *how)
            ),
        ):
            with pytest.raises(ValueError, match=f"{name} must ascend from 0"):
                call()


@pytest.mark.parametrize("offsets", WRONG_OFFSETS, ids=str)
def test_a_gpu_asserts_offsets(offsets, monkeypatch):
    """Without a wait: what is computed there is a single boolean."""
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, what: asserted.append((condition, what)))
    q = torch.empty(1, 2, 9, 4)
    cu = [torch.tensor(x, dtype=torch.int32) for x in (offsets, [0, 5, 9])]

    class OnGpu(Tensor):
        device = torch.device("cuda")

    checks.check_sequences(q, q, *(x.as_subclass(OnGpu) for x in cu))
    (wrong, what), (right, _) = asserted
    assert not wrong
    assert right
    assert what.startswith("cu_seqlens_q must ascend from 0")


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [[(5, 5), (1, 9), (12, 4)], [(7, 0), (0, 3), (6, 6)], [(0, 0)], []], ids=str)
def test_packed_backward_under_capture(lengths, window, monkeypatch):
    """It must not wait for the lengths: the sequences are a mask there, and the gradients the same."""
    cu_q, cu_kv = (
        torch.tensor([0, *accumulate(x)], dtype=torch.int32) for x in ([n for n, _ in lengths], [n for _, n in lengths])
    )
    (q, k, v), dots, _, _ = make(b=1, n_q=int(cu_q[-1]) + 2, n_k=int(cu_kv[-1]) + 3, kv_heads=2)
    is_causal, widths, _ = WINDOWS[window]
    how = (is_causal, 0.3, widths, cu_q, cu_kv)
    outs = OPS.attention_jvp(q, k, v, *dots, None, None, *how)
    cotangents = [torch.randn_like(x) for x in outs]

    def grads() -> list[Tensor]:
        plain = OPS.attention_backward(*cotangents[:2], q, k, v, None, *outs[:2], *how)
        return [*plain[:3], *OPS.attention_jvp_backward(*cotangents, q, k, v, *dots, None, None, *outs, *how)[:6]]

    want = grads()
    monkeypatch.setattr("jvpgraph.kernels.call.is_capturing", lambda q: True)
    monkeypatch.setattr(Tensor, "tolist", lambda x: pytest.fail("waits for the device"))
    assert_near(tuple(grads()), tuple(want), torch.float64)


# A package of this name on the path, or what is done to the real one: torch itself imports more of it.
FAKE_TRITONS = {
    "absent": "raise ModuleNotFoundError('No module named triton', name='triton')",
    "broken": "raise ImportError('DLL load failed while importing libtriton')",
}
LESSER_TRITONS = {"too old": "import sys; sys.modules['triton.tools.tensor_descriptor'] = None"}


@pytest.mark.long
@pytest.mark.parametrize("triton", [*FAKE_TRITONS, *LESSER_TRITONS])
def test_the_package_imports_without_a_triton_that_works(triton, tmp_path):
    if triton in FAKE_TRITONS:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text(FAKE_TRITONS[triton])
    else:
        pytest.importorskip("triton")
    code = (
        "import torch; from jvpgraph.kernels import choose; from jvpgraph.kernels.attention import attention\n"
        "assert choose.attention_triton is None, choose.attention_triton\n"
        "q = torch.ones(1, 1, 2, 4); assert attention(q, q, q)[0].allclose(q); print(choose.NO_TRITON)"
    )
    code = LESSER_TRITONS.get(triton, "") + "\n" + code
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Error" in run.stdout


def test_refusals_name_what_was_given():
    (q, k, v), (q_dot, k_dot, v_dot), bias, bias_dot = make(bias="additive")
    mask, cu = bias > 0, torch.tensor([0, 17], dtype=torch.int32)
    o, lse = attention(q, k, v)
    o_grad = torch.randn_like(o)
    refused = [
        ("one rank", lambda: attention(q[0], k, v)),
        ("one rank", lambda: attention(q[0, 0], k[0, 0], v[0, 0])),
        ("one dtype", lambda: attention(q.float(), k, v)),
        ("one dtype", lambda: attention(q.long(), k.long(), v.long())),
        ("one head dim", lambda: attention(q[..., :7], k, v)),
        ("one length", lambda: attention(q, k[:, :, 1:], v)),
        ("batch dims", lambda: attention(q, k[:1], v[:1])),
        ("divide that of q", lambda: attention(q, k[:, :3], v[:, :3])),
        ("as many heads in v", lambda: attention(q, k, v[:, :2])),
        ("broadcasts to \\(2, 4, 17, 23\\)", lambda: attention(q, k, v, bias[..., :22])),
        ("broadcasts to", lambda: attention(q, k, v, bias[None])),
        ("boolean bias", lambda: attention(q, k, v, bias.half())),
        ("boolean bias", lambda: attention(q, k, v, mask.long())),
        ("q_dot of the shape", lambda: attention_jvp(q, k, v, q_dot[:1], None, None)),
        ("k_dot of the shape", lambda: attention_jvp(q, k, v, None, k_dot.float(), None)),
        ("v_dot of the shape", lambda: attention_jvp(q, k, v, None, None, v_dot[0])),
        ("bias is absent", lambda: attention_jvp(q, k, v, None, None, None, None, bias_dot)),
        ("bias is boolean", lambda: attention_jvp(q, k, v, None, None, None, mask, bias_dot)),
        ("no dropout.*got 0.1", lambda: attention(q, k, v, dropout_p=0.1)),
        ("no dropout", lambda: attention_jvp(q, k, v, q_dot, None, None, dropout_p=0.1)),
        (r"got q \(2, 4, 17, 8\) with strides .*q\.contiguous", lambda: attention(q.mT.contiguous().mT, k, v)),
        ("k_dot .*contiguous", lambda: attention_jvp(q, k, v, None, k_dot.mT.contiguous().mT, None)),
        ("window \\(left, right\\)", lambda: attention(q, k, v, window=(3,))),
        ("window \\(left, right\\)", lambda: attention(q, k, v, window=(-2, 0))),
        ("both cu_seqlens", lambda: attention(q, k, v, cu_seqlens_q=cu)),
        ("takes no bias", lambda: attention(q, k, v, bias, cu_seqlens_q=cu, cu_seqlens_kv=cu)),
        ("of batch 1", lambda: attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_kv=cu)),
        ("int32", lambda: attention(q[:1], k[:1], v[:1], cu_seqlens_q=cu.long(), cu_seqlens_kv=cu)),
        ("of one length", lambda: attention(q[:1], k[:1], v[:1], cu_seqlens_q=cu, cu_seqlens_kv=cu[:1])),
        ("needs o_grad.*got o_grad", lambda: attention_backward(o_grad[..., :1], None, q, k, v, None, o, lse)),
        ("needs o \\(2, 4, 17, 8\\)", lambda: attention_backward(o_grad, None, q, k, v, None, o[:, :, :7], lse)),
        ("needs lse \\(2, 4, 17\\)", lambda: attention_backward(o_grad, None, q, k, v, None, o, lse.mT)),
        ("in torch.float64", lambda: attention_backward(o_grad, None, q, k, v, None, o, lse.float())),
        ("needs lse_grad", lambda: attention_backward(o_grad, lse[:, :1], q, k, v, None, o, lse)),
        *(
            (f"needs {name}.* on the device of", lambda dots=dots: attention_jvp(q, k, v, *dots[:3], bias, dots[3]))
            for name, dots in elsewhere(q_dot=q_dot, k_dot=k_dot, v_dot=v_dot, bias_dot=bias_dot)
        ),
        ("bias on cpu, not on meta", lambda: attention(q, k, v, bias.to("meta"))),
        ("one device", lambda: attention(q, k.to("meta"), v)),
        ("on cpu", lambda: attention_backward(o_grad.to("meta"), None, q, k, v, None, o, lse)),
        ("on cpu", lambda: attention_backward(o_grad, None, q, k, v, None, o, lse.to("meta"))),
        ("on cpu", lambda: attention_backward(o_grad, None, q, k, v, None, o.to("meta"), lse)),
        ("on cpu", lambda: attention_backward(o_grad, lse.to("meta"), q, k, v, None, o, lse)),
        ("int32.*on cpu", lambda: attention(q[:1], k[:1], v[:1], cu_seqlens_q=cu, cu_seqlens_kv=cu.to("meta"))),
        ("ascend.*17.*got", lambda: attention(q[:1], k[:1], v[:1], cu_seqlens_q=2 * cu, cu_seqlens_kv=cu)),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"got q \(2, 4, 17, 8\) torch\.float64, k .*bias \(2, 4, 17, 22\)"):
        attention(q, k, v, bias[..., :22])
