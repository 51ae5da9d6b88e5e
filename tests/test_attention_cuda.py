"""The attention ops on a CUDA device against float64, through the public functions: every option, on fresh random data.

JVPGRAPH_DRY_RUN=1 runs what can be run on a processor, so that a mistake in here shows without a GPU.
"""

from __future__ import annotations

import math
import os
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from jvpgraph.kernels import reference
from jvpgraph.kernels.attention import attention, attention_backward, attention_jvp
from tests.joint import ERROR, joint

CUDA = torch.cuda.is_available()
DRY_RUN = os.environ.get("JVPGRAPH_DRY_RUN") == "1"
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(not CUDA and not DRY_RUN, reason="needs a CUDA GPU")
on_a_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")

WIDTHS = [64, 128] if CUDA else [64]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Errors relative to the norm of the reference.
TOLERANCE = {FP32: 1e-5, FP16: 2e-3, BF16: 1e-2}


@pytest.fixture(autouse=True)
def _fresh(_seed: None, one_thread: None) -> None:
    """Other data in every run: the seed is printed where a test fails."""
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not written is NaN."""

    def poison(owner: object, name: str) -> None:
        empty = getattr(owner, name)

        def poisoned(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        monkeypatch.setattr(owner, name, poisoned)

    for owner, name in ((Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        poison(owner, name)
    if CUDA:  # what ATen allocates comes from the same pieces of cached memory
        junk = [torch.full((1 << n,), math.nan, device="cuda") for n in range(7, 25) for _ in range(3)]
        del junk


@pytest.fixture(params=["triton", "gluon"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels, whichever of them is the default."""
    monkeypatch.setenv("JVPGRAPH_ATTENTION", request.param)
    if request.param == "gluon":
        if not CUDA:
            pytest.skip("needs a CUDA GPU")
        x = torch.zeros(1, 1, 16, 64, device="cuda", dtype=BF16)
        try:
            attention(x, x, x)
        except ValueError as refused:
            pytest.skip(str(refused))


def rows(b: int, h: int, n: int, d: int, dtype: torch.dtype) -> Tensor:
    """[B, H, N, D], in memory as B, N, H, D."""
    return torch.randn(b, n, h, d, device=DEVICE, dtype=dtype).transpose(1, 2)


def make(*, b=2, h=4, kv_heads=None, n_q=65, n_k=130, d=64, d_v=None, dtype=BF16) -> list[Tensor]:
    """q, k, v and their tangents."""
    shapes = ((b, h, n_q, d), (b, kv_heads or h, n_k, d), (b, kv_heads or h, n_k, d_v or d))
    return [rows(*shape, dtype) for shape in shapes * 2]


def double(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


def may_see(n_q: int, n_k: int, is_causal: bool, window: tuple[int, int], packed: tuple[list[int], list[int]] | None):
    """[Lq, Lkv]: which keys a query sees by position. Written anew, for nothing of the kernels' is to be trusted."""
    spans = [(0, n_q, 0, n_k)]
    if packed is not None:
        cu_q, cu_kv = packed
        spans = [(*a, *b) for a, b in zip(pairwise(cu_q), pairwise(cu_kv))]
    seen = torch.zeros(n_q, n_k, dtype=torch.bool)
    left, right = window
    for q_start, q_end, k_start, k_end in spans:
        ahead = torch.arange(k_end - k_start)[None, :] - torch.arange(q_end - q_start)[:, None]
        inside = torch.ones_like(ahead, dtype=torch.bool)
        if is_causal:
            inside &= ahead <= 0
        if left >= 0:
            inside &= ahead >= -left
        if right >= 0:
            inside &= ahead <= right
        seen[q_start:q_end, k_start:k_end] = inside
    return seen.to(DEVICE)


def truth(tensors, bias, bias_dot, seen: Tensor | None, scale, block: int = 512) -> tuple[Tensor, ...]:
    """(o, lse, o_dot, lse_dot) in float64, a slice of queries at a time."""
    q, k, v, q_dot, k_dot, v_dot = map(double, tensors)
    slices = []
    for i in range(0, q.shape[2], block):
        at = slice(i, i + block)
        b, b_dot = (x if x is None or x.shape[2] == 1 else x[:, :, at] for x in (double(bias), double(bias_dot)))
        if seen is not None:
            if b is None:
                b = seen[None, None, at]
            elif b.dtype == torch.bool:
                b = b & seen[at]
            else:
                b = b.masked_fill(~seen[at], -math.inf)
        moved = None if q_dot is None else q_dot[:, :, at]
        slices.append(reference.attention_jvp(q[:, :, at], k, v, moved, k_dot, v_dot, b, b_dot, scale=scale))
    return tuple(torch.cat(x, 2) for x in zip(*slices))


def errors(have: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    """Norm of the difference over the norm of what is wanted; infinities must be at the same places."""
    found = []
    for a, b in zip(have, want, strict=True):
        assert a.shape == b.shape
        a = a.double()
        assert torch.equal(a == -math.inf, b == -math.inf)
        a, b = (x.masked_fill(x == -math.inf, 0) for x in (a, b))
        assert a.isfinite().all()  # max() passes over a NaN that is not the first
        found.append((a - b).norm().item() / max(b.norm().item(), 1e-9))
    return found


def check(tensors, bias=None, bias_dot=None, *, is_causal=False, window=None, packed=None, scale=None, limit=None):
    """Value and tangent against float64, and the value alone; returns what the op gave."""
    q, k, _ = tensors[:3]
    options = {"is_causal": is_causal, "scale": scale, "window": window}
    if packed is not None:
        names = ("cu_seqlens_q", "cu_seqlens_kv")
        options |= {n: torch.tensor(x, dtype=torch.int32, device=DEVICE) for n, x in zip(names, packed)}
    seen = None
    if is_causal or window is not None or packed is not None:
        seen = may_see(q.shape[2], k.shape[2], is_causal, window or (-1, -1), packed)
    want = truth(tensors, bias, bias_dot, seen, scale)
    have = attention_jvp(*tensors, bias, bias_dot, **options)
    limit = limit or TOLERANCE[q.dtype]
    assert max(errors(have, want)) < limit
    assert max(errors(attention(*tensors[:3], bias, **options), want[:2])) < limit
    for o in (have[0], have[2]):
        assert o.dtype == q.dtype
        assert o.transpose(1, 2).is_contiguous()
    assert have[1].dtype == have[3].dtype == torch.float32
    return have


# --------------------------------------------------------------------------------------------- shapes and types


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("d", [64, 72, 80, 96, 112, 128, 192, 256])
def test_head_dims(d, dtype, kernel):
    check(make(d=d, dtype=dtype, n_q=129, n_k=200))


@pytest.mark.parametrize(("d", "d_v"), [(64, 128), (128, 64), (72, 40), (192, 128), (40, 256)])
def test_values_of_another_width(d, d_v):
    check(make(d=d, d_v=d_v))


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize(
    ("n_q", "n_k"), [(1, 1), (1, 63), (63, 65), (65, 63), (65, 999), (999, 65), (999, 999), (128, 256), (3000, 1)]
)
def test_lengths(n_q, n_k, d, kernel):
    check(make(n_q=n_q, n_k=n_k, d=d))


@pytest.mark.parametrize("active", range(1, 8))
def test_inputs_that_do_not_move(active, kernel):
    tensors = make(d=128)
    check([*tensors[:3], *(x if active >> i & 1 else None for i, x in enumerate(tensors[3:]))])


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads(kv_heads, is_causal, kernel):
    check(make(kv_heads=kv_heads, n_q=200), is_causal=is_causal)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_any_scale(scale):
    check(make(d=64), scale=scale)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_any_strides(dtype, kernel):
    tensors = make(dtype=dtype)
    check([x.contiguous() for x in tensors])
    packed = torch.randn(2, 130, 3, 4, 64, device=DEVICE, dtype=dtype)  # B, N, qkv, H, D, as one projection gives it
    check([*(x.transpose(1, 2) for x in packed.unbind(2)), *make(n_q=130, dtype=dtype)[3:]])
    check([torch.cat((x, x), -1)[..., :64] for x in tensors])
    check([torch.cat((x, x), -1)[..., 1:65] for x in tensors])  # no 16 bytes begin where a row does
    check([x[:1].expand_as(x) for x in tensors])
    check([x[:, :1].expand_as(x) for x in tensors])


# --------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("d", [*WIDTHS, 72])
@pytest.mark.parametrize(("n_q", "n_k"), [(200, 200), (65, 999), (999, 65)])
def test_causal(n_q, n_k, d):
    check(make(n_q=n_q, n_k=n_k, d=d), is_causal=True)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("window", [(0, 0), (100, 0), (-1, 70), (30, -1), (200, 130), (1000, 1000)])
@pytest.mark.parametrize(("n_q", "n_k"), [(300, 300), (65, 999), (999, 65)])
def test_windows(n_q, n_k, window, d):
    check(make(n_q=n_q, n_k=n_k, d=d), window=window)
    check(make(n_q=n_q, n_k=n_k, d=d), window=window, is_causal=True)


@pytest.mark.parametrize("d", [*WIDTHS, 72])
@pytest.mark.parametrize(("is_causal", "window"), [(False, None), (True, None), (False, (50, 20))])
def test_packed_sequences(is_causal, window, d):
    packed = ([0, 1, 64, 64, 300, 430], [0, 7, 72, 80, 80, 400])  # one without queries, one without keys, a rest
    check(make(b=1, h=4, kv_heads=2, n_q=450, n_k=420, d=d), packed=packed, is_causal=is_causal, window=window)


def biased(kind: str, b: int, h: int, n_q: int, n_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    full = torch.randn(b, h, n_q, n_k, device=DEVICE)
    bias = {
        "padding": full[:, :1, :1] > -0.5,
        "boolean": full > 0,
        "additive": full.to(dtype),
        "float32": full,
        "per_head": full[:1],
        "per_query": full[:1, :, :, :1],
        "additive_padding": torch.zeros_like(full[:, :1, :1]).masked_fill_(full[:, :1, :1] > 0.5, -math.inf).to(dtype),
    }[kind]
    return bias, None if bias.dtype == torch.bool else torch.randn_like(bias)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "kind", ["padding", "boolean", "additive", "float32", "per_head", "per_query", "additive_padding"]
)
def test_masks(kind, is_causal, d):
    tensors = make(kv_heads=2, n_q=150, n_k=200, d=d)
    check(tensors, *biased(kind, 2, 4, 150, 200, BF16), is_causal=is_causal)
    check(tensors, *biased(kind, 2, 4, 150, 200, BF16), window=(90, 20))


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("kind", ["padding", "boolean", "float32"])
def test_fully_masked_rows_are_zero(kind, d):
    tensors = make(n_q=150, n_k=200, d=d)
    bias, bias_dot = biased(kind, 2, 4, 150, 200, BF16)
    nothing = False if bias.dtype == torch.bool else -math.inf
    bias[0] = nothing
    bias[1, ..., :130] = nothing  # the first blocks have none of the keys of this one
    o, lse, o_dot, lse_dot = check(tensors, bias, bias_dot)
    assert not o[0].any()
    assert (lse[0] == -math.inf).all()
    assert not o_dot[0].any()
    assert not lse_dot[0].any()
    # without a bias: the window of the last queries lies behind the last key
    o, lse, o_dot, lse_dot = check(make(n_q=400, n_k=100, d=d), window=(50, 0))
    assert not o[:, :, 150:].any()
    assert not o_dot[:, :, 150:].any()
    assert not lse_dot[:, :, 150:].any()


# ----------------------------------------------------------------------------------------------- far addresses


@on_a_gpu
def test_offsets_beyond_int32_between_batches(kernel):
    """Elements 2^31 and more apart: six tensors side by side in one storage."""
    size = 4 * 130 * 64
    storage = torch.empty((1 << 31) + 6 * size, device=DEVICE, dtype=BF16)
    tensors = [
        storage.as_strided((2, 4, 130, 64), (1 << 31, 130 * 64, 64, 1), i * size).copy_(torch.randn(2, 4, 130, 64))
        for i in range(6)
    ]
    check(tensors)
    check(tensors, is_causal=True)


@on_a_gpu
def test_offsets_beyond_int32_within_a_head():
    """Rows so far apart that the last ones of a head lie beyond 2^31 elements."""
    step, n, d = (1 << 23) - 64, 300, 64
    storage = torch.empty(step * n, device=DEVICE, dtype=BF16)
    tensors = [
        storage.as_strided((1, 1, n, d), (0, d, step, 1), i * d).copy_(torch.randn(1, 1, n, d)) for i in range(6)
    ]
    check(tensors)


@on_a_gpu
def test_outputs_beyond_int32(kernel):
    n = (1 << 22) + 65
    tensors = make(b=1, h=8, n_q=n, n_k=16, d=64)
    have = attention_jvp(*tensors)
    for at in (slice(0, 200), slice(n - 300, n)):
        q, k, v, q_dot, k_dot, v_dot = tensors
        want = truth((q[:, :, at], k, v, q_dot[:, :, at], k_dot, v_dot), None, None, None, None)
        assert max(errors([x[:, :, at] for x in have], want)) < TOLERANCE[BF16]
    assert all(x.isfinite().all() for x in have)


@on_a_gpu
@pytest.mark.parametrize("d", WIDTHS)
def test_as_many_tokens_as_a_video_has(d, kernel):
    q, k, v, q_dot, k_dot, v_dot = make(b=1, h=2, n_q=32760, n_k=32760, d=d)
    have = attention_jvp(q, k, v, q_dot, k_dot, v_dot)
    for at in (slice(0, 200), slice(32560, 32760)):
        want = truth((q[:, :, at], k, v, q_dot[:, :, at], k_dot, v_dot), None, None, None, None)
        assert max(errors([x[:, :, at] for x in have], want)) < TOLERANCE[BF16]
    assert all(x.isfinite().all() for x in have)


# ---------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("n", [512, 999])
def test_a_tangent_common_to_all_keys_costs_no_precision(n, d, kernel):
    """What the embedding of a time step does: 30 standard deviations, the same for every key."""
    q, k, v, q_dot, k_dot, v_dot = make(n_q=n, n_k=n, d=d)
    k_dot = (k_dot.float() + 30 * torch.randn(2, 4, 1, d, device=DEVICE)).bfloat16()
    tensors = q, k, v, q_dot, k_dot, v_dot
    want = truth(tensors, None, None, None, None)
    have = attention_jvp(*tensors)
    assert errors(have[2:3], want[2:3])[0] < 4e-3
    assert errors(have[3:], want[3:])[0] < 1e-3


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("attended", [0.0, 4.0])
@pytest.mark.parametrize("text_first", [True, False])
def test_joint_attention_costs_no_precision(text_first, attended, d, kernel):
    tensors = joint(text=77, image=2000, text_first=text_first, shift=30.0, attended=attended, d=d, device=DEVICE)
    have, want = attention_jvp(*tensors), truth(tensors, None, None, None, None)
    assert errors(have[2:3], want[2:3])[0] < ERROR
    assert errors(have[3:], want[3:])[0] < 1e-5


@on_a_gpu
def test_twice_the_same_is_the_same(kernel):
    """An error that moves between runs is a race."""
    tensors = make(b=2, h=8, n_q=2000, n_k=1999, d=128)
    first = attention_jvp(*tensors)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(attention_jvp(*tensors), first))


# ----------------------------------------------------------------------------------------------------- backward


# What ATen's flash and efficient kernels are there for, and what neither takes.
BACKWARDS = [
    ("flash", {}, {}),
    ("flash", {"n_k": 90, "kv_heads": 2}, {}),
    ("flash", {"d": 72, "dtype": FP16}, {"is_causal": True, "square": True}),
    ("flash", {"d": 128, "n_q": 999, "n_k": 65}, {}),
    ("efficient", {"n_k": 90}, {"is_causal": True}),
    ("efficient", {"dtype": FP32}, {}),
    ("efficient", {"d_v": 128}, {}),
    ("efficient", {"d": 256}, {}),
    ("efficient", {}, {"kind": "padding"}),
    ("efficient", {}, {"kind": "additive"}),
    ("blocked", {}, {"kind": "float32"}),
    ("blocked", {"d_v": 128, "kv_heads": 2}, {}),
    ("blocked", {}, {"kind": "boolean", "is_causal": True}),
    ("blocked", {}, {"window": (40, 30)}),
    ("blocked", {"d": 63}, {}),
]


@pytest.mark.parametrize(("path", "shape", "options"), BACKWARDS, ids=str)
def test_backward(path, shape, options):
    options = dict(options)
    if options.pop("square", False):
        shape = shape | {"n_q": 130}
    tensors = make(**shape)
    q, k, v = tensors[:3]
    kind = options.pop("kind", None)
    bias = None if kind is None else biased(kind, 2, 4, q.shape[2], k.shape[2], q.dtype)[0]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o_exact, _ = reference.attention(*exact, double(bias), **options)
    weight = torch.randn_like(o_exact)
    want = torch.autograd.grad((o_exact * weight).sum(), exact)

    moving = [x.detach().requires_grad_() for x in (q, k, v)]
    o, *_ = attention_jvp(*moving, *tensors[3:], bias, **options)
    have = torch.autograd.grad((o * weight.to(o.dtype)).sum(), moving)
    assert max(errors(have, want)) < 2 * TOLERANCE[q.dtype]


def test_gradients_of_an_additive_bias_and_of_lse():
    tensors = make(n_q=70, n_k=90)[:3]
    bias = torch.randn(1, 4, 1, 90, device=DEVICE)
    exact = [x.double().requires_grad_() for x in (*tensors, bias)]
    o, lse = reference.attention(*exact)
    weights = torch.randn_like(o), torch.randn_like(lse)
    want = torch.autograd.grad((o * weights[0]).sum() + (lse * weights[1]).sum(), exact)
    moving = [x.detach().requires_grad_() for x in (*tensors, bias)]
    o, lse = attention(*moving)
    have = torch.autograd.grad((o * weights[0].to(BF16)).sum() + (lse * weights[1].float()).sum(), moving)
    assert max(errors(have, want)) < 2 * TOLERANCE[BF16]


def test_backward_of_packed_sequences():
    packed = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 40, 40, 130], [0, 65, 70, 150])]
    tensors = make(b=1, n_q=130, n_k=150)[:3]
    seen = may_see(130, 150, True, (-1, -1), tuple(x.tolist() for x in packed))
    exact = [x.double().requires_grad_() for x in tensors]
    o_exact, _ = reference.attention(*exact, seen)
    weight = torch.randn_like(o_exact)
    want = torch.autograd.grad((o_exact * weight).sum(), exact)
    moving = [x.detach().requires_grad_() for x in tensors]
    o, _ = attention(*moving, is_causal=True, cu_seqlens_q=packed[0], cu_seqlens_kv=packed[1])
    have = torch.autograd.grad((o * weight.to(BF16)).sum(), moving)
    assert max(errors(have, want)) < 2 * TOLERANCE[BF16]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("d", [*WIDTHS, 72])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradients_through_the_tangent(kv_heads, d, is_causal):
    tensors = make(n_q=170, n_k=190, d=d, kv_heads=kv_heads)
    exact = [x.double().requires_grad_() for x in tensors]
    _, _, o_dot, lse_dot = reference.attention_jvp(*exact, is_causal=is_causal)
    weights = torch.randn_like(o_dot), torch.randn_like(lse_dot)
    want = torch.autograd.grad((o_dot * weights[0]).sum() + (lse_dot * weights[1]).sum(), exact)
    moving = [x.detach().requires_grad_() for x in tensors]
    _, _, o_dot, lse_dot = attention_jvp(*moving, is_causal=is_causal, differentiable_tangent=True)
    have = torch.autograd.grad((o_dot * weights[0].to(BF16)).sum() + (lse_dot * weights[1].float()).sum(), moving)
    assert max(errors(have, want)) < 2 * TOLERANCE[BF16]


def test_backward_of_rows_that_begin_at_no_16_bytes():
    tensors = [torch.cat((x, x), -1)[..., 1:65] for x in make(n_q=70, n_k=90)[:3]]
    exact = [x.double().requires_grad_() for x in tensors]
    o_exact, _ = reference.attention(*exact)
    weight = torch.randn_like(o_exact)
    want = torch.autograd.grad((o_exact * weight).sum(), exact)
    moving = [x.detach().requires_grad_() for x in tensors]
    have = torch.autograd.grad((attention(*moving)[0] * weight.to(BF16)).sum(), moving)
    assert max(errors(have, want)) < 2 * TOLERANCE[BF16]


def test_attention_backward_from_the_forward_s_own_sums():
    """The op by itself: a logarithm of another base would pass without an exception."""
    tensors = make(n_q=70, n_k=90, d=128)[:3]
    o, lse = attention(*tensors)
    o_grad = torch.randn_like(o)
    dq, dk, dv, _ = attention_backward(o_grad, None, *tensors, None, o, lse)
    exact = [x.double().requires_grad_() for x in tensors]
    want = torch.autograd.grad((reference.attention(*exact)[0] * o_grad.double()).sum(), exact)
    assert max(errors((dq, dk, dv), want)) < 2 * TOLERANCE[BF16]


# -------------------------------------------------------------------------------------------------- compilation


@on_a_gpu
def test_new_lengths_compile_nothing():
    knobs = pytest.importorskip("triton").knobs
    compiled = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda *_, **__: compiled.append(1)
    try:
        for b, n_q, n_k in ((2, 100, 65), (1, 999, 1000), (3, 128, 16), (1, 1, 1), (2, 64, 4097), (16, 16, 16)):
            attention_jvp(*make(b=b, n_q=n_q, n_k=n_k, d=48))
            if n_q == 100:
                assert compiled
                compiled.clear()
        assert not compiled
    finally:
        knobs.runtime.jit_post_compile_hook = before
