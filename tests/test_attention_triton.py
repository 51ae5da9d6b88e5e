"""The Triton kernel against its float64 specification: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from jvpgraph.kernels import (
    aten_cuda,
    attention_triton,
    backward_blocked,
    backward_triton,
    choose,
    gate_launches,
    launch,
    reference,
)
from jvpgraph.kernels.attention import merge_attention
from jvpgraph.kernels.blocks import Blocks, choose_blocks, least_columns, parts_of_head_dim
from jvpgraph.kernels.call import Call, Cotangents, Outputs, Place, Wanted
from jvpgraph.kernels.layout import for_aten
from jvpgraph.kernels.window import CAUSAL, EVERYTHING, Window
from tests import calls
from tests.interpreter import (  # noqa: F401 - fixtures
    DEVICE,
    INTERPRETED,
    compile_only,
    poisoned_memory,
    repaired_bfloat16,
    runs_kernels,
    share,
)
from tests.joint import ERROR, SHIFTS, joint

# Errors relative to the norm of the reference.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF, FULL = (torch.float16, torch.bfloat16), torch.float32


pytestmark = pytest.mark.usefixtures("repaired_bfloat16", "poisoned_memory")


def make(
    *, b=1, h=2, kv_heads=None, n_q=65, n_k=70, d=64, d_v=None, dtype=FULL, bias="none"
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """(q, k, v), their tangents, bias, its tangent; in memory as B, L, H, D."""

    def rows(heads: int, n: int, dim: int) -> Tensor:
        return torch.randn(b, n, heads, dim).to(DEVICE, dtype).transpose(1, 2)

    shapes = ((h, n_q, d), (kv_heads or h, n_k, d), (kv_heads or h, n_k, d_v or d))
    full = torch.randn(b, h, n_q, n_k)
    made = {
        "none": None,
        "padding": full[:, :1, :1] > -0.5,
        "boolean": full > 0,
        "additive": full,
        "additive_padding": torch.zeros(b, 1, 1, n_k).masked_fill_(full[:, :1, :1] > 0.5, -math.inf).to(dtype),
        "per_head": full[:1].to(dtype),
        "per_query": full[:1, :, :, :1],
    }[bias]
    made = made if made is None else made.to(DEVICE)
    has_dot = made is not None and made.is_floating_point()
    return (
        [rows(*shape) for shape in shapes],
        [rows(*shape) for shape in shapes],
        made,
        torch.randn_like(made) if has_dot else None,
    )


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def errors(have: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    """Norm of the difference over the norm of what is wanted; infinities must be at the same places."""
    result = []
    for a, b in zip(have, want, strict=True):
        assert a.shape == b.shape
        a = a.double()
        assert torch.equal(a == -math.inf, b == -math.inf)
        a, b = (x.masked_fill(x == -math.inf, 0) for x in (a, b))
        assert a.isfinite().all()  # max() of the errors would pass over a NaN
        result.append((a - b).norm().item() / max(b.norm().item(), 1e-9))
    return result


def widths(window: Window) -> tuple[int, int]:
    """window as the reference and the ops take it."""
    left, right = (-1 if x is None else x for x in window)
    return left, right


def check(inputs, dots, bias, bias_dot, window=EVERYTHING, scale=0.2, by_descriptor=None, blocks=None) -> None:
    q, k, v = inputs
    tensors = (q, k, v, *dots, bias, bias_dot)
    want = reference.attention_jvp(*map(double, tensors), False, scale, widths(window))
    options = {"by_descriptor": by_descriptor, "blocks": blocks}
    have = calls.attention_jvp(attention_triton, *tensors, window, scale, **options)
    assert max(errors(have, want)) < TOLERANCE[q.dtype]
    primal = calls.attention(attention_triton, q, k, v, bias, window, scale, **options)
    assert max(errors(primal, want[:2])) < TOLERANCE[q.dtype]
    for o in (have[0], have[2], primal[0]):
        assert o.dtype == q.dtype
        assert o.transpose(1, 2).is_contiguous()
    assert have[1].dtype == have[3].dtype == torch.float32


# -------------------------------------------------------------------------------------- against the reference


@runs_kernels
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    share(3, [(1, 1), (1, 65), (63, 65), (65, 63), (64, 128), (130, 1)], [FULL, *HALF]),
    ids=str,
)
def test_lengths(lengths, dtype):
    n_q, n_k = lengths
    check(*make(n_q=n_q, n_k=n_k, dtype=dtype))


@runs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(("window", "dtype"), share(2, [EVERYTHING, CAUSAL], [FULL, *HALF]), ids=str)
def test_longer(window, dtype):
    check(*make(h=1, n_q=190, n_k=999, dtype=dtype), window=window)
    check(*make(h=1, n_q=999, n_k=190, dtype=dtype), window=window)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grouped heads": ({"h": 2, "kv_heads": 1}, {}),
    "causal": ({}, {"window": CAUSAL}),
    "window": ({}, {"window": Window(300, 50)}),
    "padding": ({"bias": "padding"}, {}),
    "boolean and causal": ({"bias": "boolean"}, {"window": CAUSAL}),
    "additive": ({"bias": "additive"}, {}),
    "additive and window": ({"bias": "additive"}, {"window": Window(40, 400)}),
    "head dims": ({"d": 72 if INTERPRETED else 56, "d_v": 40}, {}),  # of those that a GPU has room for in float32
    "by descriptor": ({"d": 40, "d_v": 24}, {"by_descriptor": True, "window": CAUSAL}),
    "batch and scale": ({"b": 2}, {"scale": -0.1}),
}


@runs_kernels
@pytest.mark.parametrize(("option", "dtype"), share(2, OPTIONS, [FULL, *HALF]), ids=str)
def test_every_option_at_odd_lengths(option, dtype):
    shape, how = OPTIONS[option]
    if dtype == FULL and not INTERPRETED:
        how = how | {"by_descriptor": None}  # which gains nothing there, and which one Triton's compiler dies of
    blocks = Blocks(128, 128, 4, 1) if INTERPRETED else None  # as fast as a small tile there; not to a compiler
    lengths = [(1, 63), (63, 1), (65, 999), (999, 65)]
    for n_q, n_k in lengths if dtype == FULL else lengths[HALF.index(dtype) :: 2]:
        check(*make(n_q=n_q, n_k=n_k, dtype=dtype, **{"h": 1, "d": 16} | shape), blocks=blocks, **how)


@runs_kernels
@pytest.mark.parametrize(
    ("head_dims", "by_descriptor"),
    share(
        2,
        [(8, 24), (40, 40), (72, 72), (80, 48), (96, 96), (112, 64), (128, 128), (192, 136), (256, 256)],
        [False, True],
    ),
    ids=str,
)
def test_head_dims(head_dims, by_descriptor):
    (d, d_v), dtype = head_dims, torch.float16
    for blocks in (Blocks(32, 64, 4, 1), Blocks(64, 32, 4, 1, halves=True), Blocks(64, 64, 4, 1, v_width=32)):
        check(*make(h=1, d=d, d_v=d_v, dtype=dtype), by_descriptor=by_descriptor, blocks=blocks)


@runs_kernels
@pytest.mark.parametrize(
    ("bias", "window", "dtype"),
    share(
        2,
        ["none", "padding", "boolean", "additive", "additive_padding", "per_head", "per_query"],
        [EVERYTHING, CAUSAL],
        [FULL, *HALF],
    ),
    ids=str,
)
def test_masks(bias, window, dtype):
    check(*make(b=2, kv_heads=1, n_q=70, n_k=130, d=16, bias=bias, dtype=dtype), window=window)
    if dtype == FULL:
        check(*make(b=2, h=4, kv_heads=2, n_q=70, n_k=40, d=16, bias=bias), window=window)


@runs_kernels
@pytest.mark.parametrize(
    ("bias", "window", "dtype"),
    share(2, ["padding", "boolean", "additive"], [EVERYTHING, CAUSAL], [FULL, *HALF]),
    ids=str,
)
def test_fully_masked_rows_are_zero(bias, window, dtype):
    inputs, dots, mask, mask_dot = make(b=2, n_q=70, n_k=130, d=16, bias=bias, dtype=dtype)
    nothing = False if mask.dtype == torch.bool else -math.inf
    mask[0] = nothing
    mask[1, ..., :100] = nothing  # the first block has none of the keys of this one
    check(inputs, dots, mask, mask_dot, window=window)
    o, lse, o_dot, lse_dot = calls.attention_jvp(attention_triton, *inputs, *dots, mask, mask_dot, window, 0.2)
    assert not o[0].any()
    assert (lse[0] == -math.inf).all()
    assert not o_dot[0].any()
    assert not lse_dot[0].any()


@runs_kernels
@pytest.mark.parametrize("dtype", [FULL, torch.bfloat16], ids=str)
def test_the_most_negative_finite_bias_hides_as_in_torch(dtype):
    """Models mask by it; a row with nothing else attends to all keys alike, instead of to none."""
    (q, k, v), dots, _, _ = make(n_q=40, n_k=70, d=16, dtype=dtype)
    mask = torch.zeros(1, 1, 40, 70, dtype=dtype, device=DEVICE)
    mask[..., 30:] = mask[:, :, 7] = torch.finfo(dtype).min
    o, lse, o_dot, lse_dot = calls.attention_jvp(attention_triton, q, k, v, *dots, mask, None, EVERYTHING, 0.2)
    want = torch.nn.functional.scaled_dot_product_attention(*map(double, (q, k, v)), mask.double(), scale=0.2)
    want[:, :, 7] = v.double().mean(2)
    assert max(errors((o,), (want,))) < TOLERANCE[dtype]
    assert all(x.isfinite().all() for x in (lse, o_dot, lse_dot))
    lse_grad = torch.randn_like(lse)
    backward = backward_blocked if dtype == FULL else backward_triton
    grads = calls.attention_backward(backward, (o, lse_grad), (q, k, v, mask), (o, lse), (EVERYTHING, 0.2))[:3]
    assert all(x.isfinite().all() for x in grads)


@runs_kernels
@pytest.mark.parametrize(
    ("fill", "window"), [(-1e4, EVERYTHING), (-1e9, CAUSAL), (-1e30, EVERYTHING), (-math.inf, CAUSAL)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_hidden_by_a_finite_bias_have_gradients(dtype, fill, window):
    """Of the value and through the tangent, as torch's softmax gives them: lse has no digits left for p."""
    inputs, dots, _, _ = make(n_q=40, n_k=70, d=16, dtype=dtype)
    mask = torch.zeros(1, 1, 40, 70, device=DEVICE)
    mask[..., 30:] = mask[:, :, 7] = fill
    outs = calls.attention_jvp(attention_triton, *inputs, *dots, mask, None, window, 0.2)
    o_grad, o_dot_grad = torch.randn_like(outs[0]), torch.randn_like(outs[0])
    for G in (None, o_dot_grad):
        grads = (o_grad, None, G, None)
        got = calls.attention_jvp_backward(backward_triton, grads, (*inputs, *dots, mask), outs, (window, 0.2))[:6]
        q, k, v, *dots_64 = leaves = [double(x).requires_grad_() for x in (*inputs, *dots)]
        ahead = torch.arange(70, device=DEVICE) - torch.arange(40, device=DEVICE)[:, None]
        # in float32, as far as the mask goes: what it takes from the scores there is part of what is wanted
        bias = (0.2 * (q @ k.mT).detach().float() + mask).double() - 0.2 * (q @ k.mT).detach()
        bias = bias.masked_fill(window.hides(ahead), -math.inf)
        blind = (bias == -math.inf).all(-1, keepdim=True)
        o, _, o_dot, _ = reference.attention_jvp(q, k, v, *dots_64, bias.masked_fill(blind, 0), None, False, 0.2)
        loss = (o * o_grad).masked_fill(blind, 0).sum()
        loss = loss if G is None else loss + (o_dot * G).masked_fill(blind, 0).sum()
        want = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        assert max(errors(got, want)) < 2 * TOLERANCE[dtype]


@runs_kernels
@pytest.mark.parametrize("dtype", [FULL, torch.bfloat16], ids=str)
def test_a_nan_in_an_additive_bias_is_not_hidden(dtype):
    (q, k, v), dots, _, _ = make(n_q=40, n_k=70, d=16, dtype=dtype)
    mask = torch.zeros(1, 1, 40, 70, device=DEVICE)
    mask[:, :, 3, 5] = math.nan
    outs = calls.attention_jvp(attention_triton, q, k, v, *dots, mask, None, EVERYTHING, 0.2)
    for x in outs:
        assert x[:, :, 3].isnan().all()
        assert x[:, :, 4:].isfinite().all()
    if dtype == torch.bfloat16:
        tensors, grads = (q, k, v, *dots, mask), (q, None, q, None)
        got = calls.attention_jvp_backward(backward_triton, grads, tensors, outs, (EVERYTHING, 0.2))
        assert got[0][:, :, 3].isnan().all()
        assert got[0][:, :, 4:].isfinite().all()


WINDOWS = [
    Window(left=20),
    Window(right=20),
    Window(30, 10),
    Window(40, 0),
    Window(0, 0),  # each query sees one key
    Window(left=0),
    Window(100, 110),  # wide enough for blocks of keys that all queries of a block see
    Window(left=150),
    Window(1 << 40, 1 << 40),
]


@runs_kernels
@pytest.mark.parametrize(("lengths", "window"), share(2, [(130, 130), (65, 230), (200, 63)], WINDOWS), ids=str)
def test_windows(lengths, window):
    """On either side of the queries, as narrow as one key and wider than the keys; with rows that see no key."""
    (n_q, n_k), blocks = lengths, Blocks(64, 32, 4, 1)
    check(*make(h=1, n_q=n_q, n_k=n_k, d=16), window=window, blocks=blocks)
    inputs = make(kv_heads=1, n_q=n_q, n_k=n_k, d=16, bias="padding", dtype=torch.float16)
    check(*inputs, window=window, by_descriptor=True)


@runs_kernels
@pytest.mark.parametrize("window", [Window(left=10), Window(10, 10)], ids=str)
def test_queries_whose_window_lies_behind_the_keys_see_nothing(window):
    inputs, dots, _, _ = make(n_q=200, n_k=30, d=16)
    o, lse, o_dot, lse_dot = calls.attention_jvp(attention_triton, *inputs, *dots, None, None, window, 0.2)
    assert (lse[:, :, :40] > -math.inf).all()
    assert (lse[:, :, 40:] == -math.inf).all()
    assert not any(x[:, :, 40:].any() for x in (o, o_dot, lse_dot))


@runs_kernels
@pytest.mark.parametrize(
    ("active", "bias", "window"),
    share(2, range(16), ["none", "additive_padding"], [EVERYTHING, Window(20, 5)]),
    ids=str,
)
def test_absent_tangents_are_zeros(active, bias, window):
    inputs, dots, mask, mask_dot = make(h=1, n_q=33, n_k=70, d=16, bias=bias)
    chosen = [x if active >> i & 1 else None for i, x in enumerate((*dots, mask_dot))]
    check(inputs, chosen[:3], mask, chosen[3], window=window)


# -------------------------------------------------------------------------------------------- packed sequences

LENGTHS = [(1, 65), (63, 1), (0, 20), (65, 0), (0, 0), (64, 63), (200, 130)]  # of queries and of keys


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)


def check_packed(lengths, poisoned, window, by_descriptor=None, blocks=None, active=7, **shape) -> None:
    """Each sequence as if it were alone, with NaN in the sequences `poisoned` and in what follows the last one."""
    lengths_q, lengths_kv = ([n[i] for n in lengths] for i in range(2))
    inputs, dots, _, _ = make(n_q=sum(lengths_q) + 7, n_k=sum(lengths_kv) + 9, **shape)
    cu = offsets(lengths_q), offsets(lengths_kv)
    q, _, v = inputs
    want = [torch.zeros(*q.shape[:3], n, device=DEVICE, dtype=torch.float64) for n in (v.shape[3], 1, v.shape[3], 1)]
    want[1].fill_(-math.inf)
    want[1], want[3] = want[1][..., 0], want[3][..., 0]
    dots = [x if active >> i & 1 else None for i, x in enumerate(dots)]
    rows, spoiled = torch.ones(q.shape[2], dtype=torch.bool, device=DEVICE), []
    for n in range(len(lengths) + 1):
        at_q, at_kv = (slice(int(x[n]), int(x[n + 1]) if n < len(lengths) else None) for x in cu)
        mine = [None if x is None else x[:, :, at] for x, at in zip((*inputs, *dots), (at_q, at_kv, at_kv) * 2)]
        if n in poisoned or n == len(lengths):
            spoiled += [x for x in mine if x is not None]
            rows[at_q] = n == len(lengths)  # rows of no sequence are zeros all the same
        else:
            for whole, part in zip(
                want, reference.attention_jvp(*map(double, mine), None, None, False, 0.2, widths(window))
            ):
                whole[:, :, at_q] = part
    for x in spoiled:
        x.fill_(math.nan)
    options = {"packing": cu, "by_descriptor": by_descriptor, "blocks": blocks}
    have = calls.attention_jvp(attention_triton, *inputs, *dots, None, None, window, 0.2, **options)
    primal = calls.attention(attention_triton, *inputs, None, window, 0.2, **options)
    for some in (have, primal):
        right = errors([x[:, :, rows] for x in some], [x[:, :, rows] for x in want[: len(some)]])
        assert max(right) < TOLERANCE[q.dtype]


@runs_kernels
@pytest.mark.parametrize(
    ("window", "dtype"), share(2, [EVERYTHING, CAUSAL, Window(30, 10), Window(left=70)], [FULL, *HALF]), ids=str
)
def test_packed_sequences(window, dtype):
    by_descriptor = dtype == torch.float16
    check_packed(LENGTHS, (), window, by_descriptor, h=2, kv_heads=1, d=16, dtype=dtype)


@runs_kernels
@pytest.mark.parametrize(
    ("window", "by_descriptor"), share(2, [EVERYTHING, CAUSAL, Window(30, 10)], [False, True]), ids=str
)
def test_nan_stays_in_its_sequence(window, by_descriptor):
    """Blocks of keys reach into the next sequence."""
    for blocks in (Blocks(64, 32, 4, 1, halves=True), Blocks(32, 64, 4, 1, v_width=16)):
        check_packed(LENGTHS[:6], (1, 2, 3), window, by_descriptor, blocks, h=1, d=32, dtype=torch.float16)


@runs_kernels
@pytest.mark.parametrize("active", range(8))
def test_packed_sequences_with_some_tangents(active):
    check_packed(LENGTHS[:4], (), CAUSAL, active=active, h=1, d=24, d_v=40)


@runs_kernels
@pytest.mark.slow
def test_long_and_many_packed_sequences():
    check_packed([(999, 65), (65, 999)], (), Window(300, 100), h=1, d=32)
    check_packed([(1, 2)] * 70, (), EVERYTHING, h=1, d=16)
    check_packed([(70, 3)], (), EVERYTHING, h=1, d=16)
    check_packed([], (), EVERYTHING, h=1, d=16)


@runs_kernels
def test_offsets_beyond_the_tensors_touch_nothing_outside():
    (q, k, v), dots, _, _ = make(n_q=65, n_k=70, d=16)
    wrong = offsets([100]), offsets([5000])
    have = calls.attention_jvp(attention_triton, q, k, v, *dots, None, None, EVERYTHING, 0.2, packing=wrong)
    want = calls.attention_jvp(attention_triton, q, k, v, *dots, None, None, EVERYTHING, 0.2)
    assert max(errors(have, tuple(map(double, want)))) < 1e-5


@runs_kernels
@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
def test_any_scale(scale):
    check(*make(n_q=20, n_k=130, d=16), scale=scale)


@runs_kernels
def test_any_strides():
    inputs, dots, _, _ = make(b=2, n_q=40, n_k=70, d=16)
    heads_first = [x.contiguous() for x in inputs]
    sliced = [torch.cat((x, x), -1)[..., 16:] for x in dots]
    check(heads_first, sliced, None, None)
    check([x.half() for x in heads_first], [x.half() for x in sliced], None, None, by_descriptor=True)
    columns_first = [x.mT.contiguous().mT for x in inputs]
    check(columns_first, dots, None, None)
    shared = [x[:1].expand_as(x) for x in inputs]
    check(shared, dots, None, None)
    unaligned = [torch.cat((x, x), -1)[..., 1:17] for x in inputs]
    check(unaligned, dots, None, None)
    half = shared[1].half()
    assert not launch.fits_descriptor(shared[1][..., :8].half().expand(2, -1, -1, -1)[:, :, :, 1:])
    assert launch.fits_descriptor(half[:1])


def test_no_rows_and_no_keys():
    (q, k, v), (q_dot, _, _), _, _ = make(n_q=3, n_k=5, d=16)
    call = Call(q, k[:, :, :0], v[:, :, :0], q_dot, place=Place("cuda", 90))
    found = choose.plan(call)
    assert (found.forward, found.backward) == (choose.BLOCKED, choose.BLOCKED_BACKWARD)
    assert found.why["Triton"] == "there is nothing to compute"
    o, lse, o_dot, lse_dot = choose.attend(call)
    assert (lse == -math.inf).all()
    assert not any(x.any() for x in (o, o_dot, lse_dot))


# -------------------------------------------------------------------------------------------------- precision


@runs_kernels
@pytest.mark.parametrize("window", [EVERYTHING, Window(200, 200)], ids=str)
def test_a_tangent_common_to_all_keys_costs_no_precision(window):
    """What the embedding of a time step does: 30 standard deviations, the same for every key."""
    inputs, dots, _, _ = make(h=2, n_q=64, n_k=512, d=128, dtype=torch.bfloat16)
    q, k, v = inputs
    q_dot, k_dot, v_dot = dots
    k_dot = (k_dot.float() + 30 * torch.randn(1, 2, 1, 128, device=DEVICE)).bfloat16()
    scale = 128**-0.5
    tensors = (q, k, v, q_dot, k_dot, v_dot)
    want = reference.attention_jvp(*map(double, tensors), None, None, False, scale, widths(window))
    have = calls.attention_jvp(attention_triton, *tensors, None, None, window, scale)

    # the same roundings without centring, in torch
    q, k, v, q_dot, k_dot, v_dot = (x.float() for x in tensors)
    ahead = torch.arange(512, device=DEVICE) - torch.arange(64, device=DEVICE)[:, None]
    s, s_dot = (scale * (q @ k.mT)).masked_fill(window.hides(ahead), -math.inf), scale * (q_dot @ k.mT + q @ k_dot.mT)
    p = s.softmax(-1)
    h = p * s_dot
    rounded = h.bfloat16().float() @ v + p.bfloat16().float() @ v_dot
    uncentred = rounded - h.sum(-1, keepdim=True) * (p @ v)
    centred, plain = errors((have[2], uncentred.bfloat16()), (want[2], want[2]))
    print(f"relative error of o_dot: centred {centred:.1e}, uncentred {plain:.1e}")
    assert centred < 4e-3
    assert plain > 2 * centred
    assert errors((have[3],), (want[3],))[0] < 1e-3


def joint_errors(tensors: list[Tensor], bias: Tensor | None = None, **options: Any) -> tuple[float, float]:
    """Of o_dot and of lse_dot, relative in norm."""
    scale = tensors[0].shape[-1] ** -0.5
    window = options.pop("window", EVERYTHING)
    want = reference.attention_jvp(*map(double, tensors), bias, None, False, scale, widths(window))
    have = calls.attention_jvp(attention_triton, *tensors, bias, None, window, scale, **options)
    of_o_dot, of_lse_dot = errors(have[2:], want[2:])
    return of_o_dot, of_lse_dot


@runs_kernels
@pytest.mark.parametrize("attended", [0.0, 4.0])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("text_first", [True, False])
def test_joint_attention_costs_no_precision(text_first, shift, attended):
    """A tangent common to the keys of an image that those of the text do not have, whichever come first, and also of
    queries that attend to the text, with nine tenths of their weight, though it is a tenth of the keys."""
    tensors = joint(text=77, image=700, text_first=text_first, shift=shift, attended=attended, h=1, device=DEVICE)
    of_o_dot, of_lse_dot = joint_errors(tensors)
    assert of_o_dot < ERROR
    assert of_lse_dot < 1e-5


@runs_kernels
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("kind", ["half", "narrow", "window", "padding", "float32"])
def test_joint_attention_in_other_ways(kind, text_first):
    given = {"text": 77, "image": 300, "text_first": text_first, "shift": 30.0, "attended": 2.0, "h": 1, "d": 64}
    if kind in ("half", "float32"):
        tensors = joint(**given, dtype=torch.float16 if kind == "half" else FULL, device=DEVICE)
        assert joint_errors(tensors)[0] < (ERROR / 8 if kind == "half" else 3e-6)
        return
    tensors = joint(**given, device=DEVICE)
    if kind == "narrow":  # as on Ampere at 128 columns
        assert joint_errors(tensors, blocks=Blocks(64, 16, 4, 1))[0] < ERROR
    elif kind == "window":
        assert joint_errors(tensors, window=Window(250, 90))[0] < ERROR
    else:  # most of the text is padding, with anything in it
        seen = torch.ones(1, 1, 1, 377, dtype=torch.bool, device=DEVICE)
        text = slice(20, 77) if text_first else slice(320, 377)
        seen[..., text] = False
        for x in tensors[1:3] + tensors[4:]:
            x[:, :, text] = 100.0
        assert joint_errors(tensors, bias=seen)[0] < ERROR


@runs_kernels
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_keys_that_weigh_next_to_nothing_do_no_harm(dtype):
    """Blocks of keys that underflow, in part to denormal numbers, behind others and before them."""
    inputs, dots, _, _ = make(h=1, n_q=20, n_k=64 * 9, d=16, dtype=dtype)
    levels = torch.tensor([-100.0, -300.0, -88.0, 0.0, -60.0, -87.5, -95.0, -103.0, -math.inf], device=DEVICE)
    bias = levels.repeat_interleave(64).view(1, 1, 1, -1)
    check(inputs, dots, bias, torch.randn_like(bias))


@runs_kernels
def test_two_halves_merge_to_the_whole():
    inputs, dots, mask, mask_dot = make(n_q=40, n_k=130, d=32, bias="additive")
    (q, k, v), (q_dot, k_dot, v_dot) = inputs, dots

    def run(keys: slice) -> tuple[Tensor, ...]:
        moved = (k_dot[:, :, keys], v_dot[:, :, keys], mask[..., keys], mask_dot[..., keys])
        return calls.attention_jvp(attention_triton, q, k[:, :, keys], v[:, :, keys], q_dot, *moved, EVERYTHING, 0.2)

    whole = run(slice(None))
    merged = merge_attention(run(slice(0, 61)), run(slice(61, None)))
    assert max(errors(merged, tuple(x.double() for x in whole))) < 1e-6


# ----------------------------------------------------------------------------------------- choices, on no device


@pytest.mark.parametrize(
    ("dim", "parts"),
    [(1, (16,)), (48, (32, 16)), (72, (64, 16)), (96, (64, 32)), (112, (128,)), (192, (128, 64)), (256, (256,))],
)
def test_head_dims_are_cut_in_two(dim, parts):
    assert parts_of_head_dim(dim) == parts
    assert all(d <= sum(parts_of_head_dim(d)) < 1.34 * d + 16 for d in range(1, 257))
    assert parts_of_head_dim(128, halves=True) == (64, 64)


@pytest.mark.parametrize("blocks", [Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2, halves=True, v_width=64)])
def test_parts_are_swizzled_alike_where_blocks_are_in_no_pipeline(blocks):
    for dims in itertools.product([1, 8, 24, 40, 64, 72, 96, 136, 192, 256], repeat=2):
        least = least_columns(90, dims, torch.bfloat16, False)
        widths, widths_v, shares = blocks.split(*dims, least)
        assert blocks.cut_stages(*widths, *widths_v) == 1
        assert sum(widths) >= dims[0]
        assert shares * sum(widths_v) >= dims[1]
        assert least_columns(90, dims, torch.bfloat16, True) == least_columns(80, dims, torch.bfloat16, False) == 16
    assert Blocks(128, 64, 8, 3).cut_stages(64, 16, 64, 16) == 3


def test_common_layouts_are_taken_without_copies():
    """B,L,H,D and B,H,L,D, slices of a fused projection, and what broadcasts."""
    rows = torch.empty(2, 65, 3, 4, 72, dtype=torch.bfloat16)
    for x in (*rows.unbind(2), rows[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2), rows[:, :, 0, :1]):
        x = x.expand(-1, -1, 4, -1).transpose(1, 2)
        assert launch.addressable(x) is x
        assert for_aten(x, aligned=True) is x


def test_what_atens_kernels_would_misread_is_copied():
    """Flash loads 16 bytes at a time, and does not look whether they are aligned."""
    x = torch.randn(2, 3, 7, 72, dtype=torch.bfloat16)
    for wrong in (x[..., 1:65], x.mT.contiguous().mT, torch.randn(2, 3, 7, 65).bfloat16()[..., :64], x[:, :, :, ::2]):
        copy = for_aten(wrong, aligned=True)
        assert torch.equal(copy, wrong)
        assert copy.is_contiguous()


def test_blocks_of_the_next_larger_head_dim():
    bf16 = torch.bfloat16
    assert choose_blocks(90, (72, 72), bf16, "jvp", True) == choose_blocks(90, (80, 80), torch.float16, "jvp", True)
    assert choose_blocks(103, (128, 128), bf16, "jvp", True) == choose_blocks(100, (128, 128), bf16, "jvp", True)
    for other in (86, 89, 120):
        assert choose_blocks(other, (128, 128), bf16, "jvp", False) == choose_blocks(80, (128, 128), bf16, "jvp", False)
    assert choose_blocks(90, (128, 128), bf16, "jvp", False) == choose_blocks(80, (128, 128), bf16, "jvp", False)
    for capability in (80, 86, 89, 90, 100, 103, 120):
        for kind in ("jvp", "forward", "bias"):
            for dim in (1, 64, 65, 100, 256):
                for by_descriptor in (False, True):
                    choose_blocks(capability, (dim, dim), bf16, kind, by_descriptor)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="pretends a GPU to Triton's compiler")
@pytest.mark.parametrize(
    ("limits", "packed", "bias"),
    [
        ((None, None), False, "none"),
        ((16, 1), False, "none"),
        ((None, 16), True, "none"),
        ((None, None), False, "padding"),
        ((None, None), False, "additive"),
    ],
    ids=str,
)
def test_a_new_length_compiles_nothing(limits, packed, bias, monkeypatch, tmp_path):
    """What the host function launches is what the gate compiles, once for all lengths, widths of a window and numbers
    of sequences: on a GPU that is pretended."""
    blocks = choose_blocks(90, (32, 32), torch.bfloat16, "jvp" if bias == "none" else "bias", True)
    if packed:
        blocks = attention_triton.packed_blocks(blocks)
    flags = gate_launches.VARIANTS["jvp" if bias == "none" else "bias"]
    if bias == "additive":
        flags = gate_launches.FULL_BIAS
    flags = flags._replace(has_left=limits[0] is not None, has_right=limits[1] is not None, packed=packed)
    gated = gate_launches.forward_launch(90, (32, 32), torch.bfloat16, blocks, flags, True).source
    compiled = compile_only(monkeypatch, attention_triton, "attention_kernel", tmp_path)
    packing = torch.tensor([0, 5, 5, 20, 64, 65], dtype=torch.int32)
    for n, (n_q, n_k, b) in enumerate(((100, 65, 1), (999, 1999, 2), (128, 160, 3), (65, 165, 1))):
        size = {"b": 1 if packed else b, "n_q": n_q, "n_k": n_k, "d": 32}
        (q, k, v), dots, mask, mask_dot = make(**size, dtype=torch.bfloat16, bias=bias)
        window = Window(*(None if x is None else x * n for x in limits))
        cu_seqlens = (packing[: n + 1], packing[1 : n + 2]) if packed else None
        place = Place("cuda", 90)
        attention_triton.attend(Call(q, k, v, *dots, mask, mask_dot, window, 0.1, cu_seqlens, place=place))
    assert len({id(x) for x in compiled}) == 1
    source = compiled[0].src
    assert source.signature == gated.signature
    assert source.constants == gated.constants
    assert source.attrs == gated.attrs


def fake(b=2, h=8, kv_heads=None, n_q=100, n_k=100, d=64, d_v=None, dtype=torch.bfloat16):
    def rows(heads: int, n: int, dim: int) -> Tensor:
        return torch.empty(b, n, heads, dim, dtype=dtype, device="cuda").transpose(1, 2)

    return rows(h, n_q, d), rows(kv_heads or h, n_k, d), rows(kv_heads or h, n_k, d_v or d)


PATHS = [
    ("flash", {}, {}),
    ("flash", {"n_k": 90, "kv_heads": 2}, {}),
    ("flash", {"d": 72, "dtype": torch.float16}, {"window": CAUSAL}),
    ("flash", {"kv_heads": 2}, {"window": Window(30, 5)}),
    ("flash", {}, {"window": Window(left=30)}),
    ("flash", {}, {"window": Window(right=5)}),
    ("flash", {}, {"window": Window(1 << 40, 5)}),
    ("efficient", {"n_k": 90}, {"window": CAUSAL}),  # flash aligns its window at the bottom right
    ("triton", {"n_k": 90}, {"window": Window(30, 5)}),
    ("blocked", {"d": 256}, {"window": Window(30, 5)}),
    ("efficient", {"dtype": torch.float32}, {}),
    ("efficient", {"d_v": 128}, {}),
    ("efficient", {"d": 256}, {}),
    ("efficient", {"n_k": 90}, {"bias": torch.bool}),
    ("triton", {}, {"bias": torch.bfloat16}),  # which may hide whole rows
    ("triton", {}, {"scale": 0.0}),
    ("triton", {}, {"scale": -0.1, "window": CAUSAL}),
    ("blocked", {"dtype": torch.float32}, {"scale": -0.1}),
    ("triton", {}, {"bias": torch.float32}),
    ("blocked", {"dtype": torch.float32, "kv_heads": 2}, {}),
    ("triton", {"d_v": 128, "kv_heads": 2}, {}),
    ("triton", {}, {"bias": torch.bool, "window": CAUSAL}),
    ("triton", {"d": 63}, {}),
    ("blocked", {"n_k": 0}, {}),
    ("triton", {}, {"has_lse_grad": True}),
    ("blocked", {"dtype": torch.float32}, {"has_lse_grad": True}),
    ("blocked", {}, {"bias": torch.bfloat16, "bias_needs_grad": True}),
]


BACKWARDS = {
    "flash": choose.FLASH,
    "efficient": choose.EFFICIENT,
    "triton": choose.TRITON_BACKWARD,
    "blocked": choose.BLOCKED_BACKWARD,
}


def backward_call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: dict[str, Any], arch: int) -> Call:
    wanted = Wanted(from_lse=options.get("has_lse_grad", False), bias=options.get("bias_needs_grad", False))
    window, scale = options.get("window", EVERYTHING), options.get("scale", 0.1)
    return Call(q, k, v, bias=bias, window=window, scale=scale, wanted=wanted, place=Place("cuda", arch))


@pytest.mark.parametrize(("path", "shape", "options"), PATHS, ids=str)
@pytest.mark.parametrize("bias_rows", [False, True])
def test_backward_paths(path, shape, options, bias_rows, monkeypatch):
    """What is chosen, and that ATen's schema and shapes take it: its kernels themselves need a GPU."""
    # a torch without CUDA does not fake all that this calls
    monkeypatch.setattr(aten_cuda, "_additive_aligned", lambda q, k, bias: bias.expand(*q.shape[:3], -1))
    with FakeTensorMode():
        q, k, v = fake(**shape)
        bias = None
        if "bias" in options:
            size = (2, 8, q.shape[2], k.shape[2]) if bias_rows else (2, 1, 1, k.shape[2])
            bias = torch.empty(size, dtype=options["bias"], device="cuda")
        call = backward_call(q, k, v, bias, options, 90)
        found = choose.plan(call)
        assert found.backward is BACKWARDS[path]
        assert (": " in found.backward_and_why()) == (path in ("triton", "blocked"))
        if path in ("triton", "blocked"):
            return
        o = torch.empty(2, q.shape[2], 8, v.shape[3], dtype=q.dtype, device="cuda").transpose(1, 2)
        lse = torch.empty(q.shape[:3], device="cuda")
        grads = choose.differentiate(call, Outputs(o, lse), Cotangents(o))
        assert [x.shape for x in grads[:3]] == [q.shape, k.shape, v.shape]
        assert all(x.device.type == "cuda" and x.dtype == q.dtype for x in grads[:3])
        assert grads[3:] == (None,) * 5


def test_what_the_efficient_backward_is_given():
    lse = torch.randn(1, 2, 40)
    lse[0, 0, 3] = -math.inf
    padded = aten_cuda._padded_lse(lse)
    assert padded.shape == (1, 2, 64)
    assert (padded[..., 40:] == math.inf).all()
    assert padded[0, 0, 3] == math.inf
    assert torch.equal(padded[0, 1, :40], lse[0, 1])

    q, k, _ = (x.to("cpu") for x in (torch.empty(2, 3, 7, 8), torch.empty(2, 3, 21, 8), torch.empty(0)))
    keys = torch.rand(2, 1, 1, 21) > 0.5
    bias = aten_cuda._additive_aligned(q, k, keys)
    assert bias.shape == (2, 3, 7, 21)
    assert bias.stride()[1:3] == (0, 0)  # broadcast, not repeated
    assert torch.equal(bias == 0, keys.expand(2, 3, 7, 21))
    full = torch.randn(2, 3, 7, 21)
    bias = aten_cuda._additive_aligned(q, k, full)
    assert torch.equal(bias, full)
    assert all(stride % 8 == 0 for stride in bias.stride()[:3])


@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize(("path", "shape", "options"), [x for x in PATHS if x[0] != "blocked"], ids=str)
def test_backward_on_a_gpu(path, shape, options):
    dtype = shape.get("dtype", torch.bfloat16)
    inputs, _, _, _ = make(b=2, h=8, **{"n_q": 100, "n_k": 100, "dtype": dtype} | shape)
    bias, window, scale = None, options.get("window", EVERYTHING), options.get("scale", 0.2)
    if "bias" in options:
        seen = torch.rand(2, 1, 1, inputs[1].shape[2], device=DEVICE) > 0.3
        seen[0] = False
        bias = seen if options["bias"] == torch.bool else torch.where(seen, 0.0, -math.inf).to(dtype)
    o, lse = calls.attention(attention_triton, *inputs, bias, window, scale)
    o_grad = torch.randn_like(o)
    lse_grad = torch.randn_like(lse) if options.get("has_lse_grad") else None
    call = Call(*inputs, bias=bias, window=window, scale=scale, wanted=Wanted(from_lse=lse_grad is not None))
    assert choose.plan(call).backward is BACKWARDS[path]
    have = choose.differentiate(call, Outputs(o, lse), Cotangents(o_grad, lse_grad))[:3]
    exact = [double(x) for x in (o_grad, lse_grad, *inputs, bias, o, lse)]
    want = calls.attention_backward(backward_blocked, exact[:2], exact[2:6], exact[6:], (window, scale))[:3]
    assert max(errors(have, want)) < 2 * TOLERANCE[dtype]
