"""The kernels of SageAttention by their names, SageAttention 3, and NATTEN's attention and additional keys."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import jvpgraph
from jvpgraph.errors import UnsupportedOp
from tests.foreign.plain import band, blocks, neighbourhoods, plain
from tests.foreign.test_swaps import C, H, Net, both_ways, check, cu, importing, lengths

pytestmark = pytest.mark.slow
of_sage, of_natten = importing("sageattention"), importing("natten")
KERNELS = {
    "sageattn_qk_int8_pv_fp16_triton": {"quantization_backend": "cuda"},
    "sageattn_qk_int8_pv_fp16_cuda": {"qk_quant_gran": "per_warp", "pv_accum_dtype": "fp16+fp32"},
    "sageattn_qk_int8_pv_fp8_cuda": {"smooth_k": False, "smooth_v": True},
    "sageattn_qk_int8_pv_fp8_cuda_sm90": {"pv_accum_dtype": "fp32"},
}


def causal(q, k, v, scale=None):
    return plain(q, k, v, band(q.shape[1], k.shape[1], right=0, from_the_end=False), scale=scale)


def times_lse(o, lse):
    """Of [B, H, L]."""
    return o * lse.mT[..., None]


def with_lse(q, k, v, scale):
    k_all = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = q.transpose(1, 2) @ k_all.transpose(1, 2).mT * scale
    return times_lse(plain(q, k, v, scale=scale), s.logsumexp(-1))


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


@both_ways
@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_sage_attention(of_sage, name, backend):
    kernel, of_quantization = getattr(of_sage("sageattention"), name), KERNELS[name]

    def call(q, k, v):
        return kernel(q, k, v, "NHD", is_causal=True, sm_scale=0.3, **of_quantization)

    def call_with_lse(q, k, v):
        o, lse = kernel(*heads_first(q, k, v), sm_scale=0.3, return_lse=True, **of_quantization)
        return times_lse(o.transpose(1, 2), lse)

    check(call, lambda q, k, v: causal(q, k, v, 0.3), kv_heads=2, backend=backend)
    check(call_with_lse, lambda q, k, v: with_lse(q, k, v, 0.3), last=5, backend=backend)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sage_attention_3(of_sage, dtype):
    sage = of_sage("sageattn3")

    def call(q, k, v):
        q, k, v = heads_first(q, k, v)
        return sage.sageattn3_blackwell(q, k, v, None, True, per_block_mean=False).transpose(1, 2)

    check(call, causal, dtype=dtype)
    check(lambda q, k, v: sage.sageattn3_blackwell(*heads_first(q, k, v)).transpose(1, 2), plain, dtype=dtype)


@pytest.mark.long
def test_sage_attention_3_with_inductor(of_sage):
    sage = of_sage("sageattn3")
    check(lambda q, k, v: sage.sageattn3_blackwell(*heads_first(q, k, v)).transpose(1, 2), plain, backend="inductor")


def test_a_mask_that_triton_takes(of_sage):
    """The one kernel that does not ignore it."""
    kernel = of_sage("sageattention").sageattn_qk_int8_pv_fp16_triton
    seen = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.7
    check(
        lambda q, k, v: kernel(q, k, v, tensor_layout="NHD", attn_mask=seen),
        lambda q, k, v: plain(q, k, v, seen),
        sizes=((2, 12), (3, 12)),
    )


def refused(call, reason):
    x = torch.randn(1, 6, C)
    with pytest.raises(UnsupportedOp, match=reason) as told:
        jvpgraph.transform(Net(call), backend="eager")(x, torch.rand(1), tangents={"x": x})
    assert "test_sage_natten.py:" in str(told.value)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", [name for name in KERNELS if not name.endswith("triton")])
def test_masks_that_kernels_ignore_are_refused(of_sage, name):
    kernel = getattr(of_sage("sageattention"), name)
    refused(lambda q, k, v: kernel(q, k, v, attn_mask=q > 0), "attn_mask.*SageAttention ignores it")


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tensor_layout": "NHD"}, "tensor_layout.*SageAttention 3 ignores it"),
        ({"sm_scale": 0.3}, "sm_scale.*SageAttention 3 ignores it"),
        ({"return_lse": True}, "return_lse.*SageAttention 3 ignores it"),
        ({"attn_mask": torch.ones(6, 6)}, "attn_mask.*SageAttention ignores it"),
        ({"window": 3}, "window.*newer than our version"),
    ],
    ids=str,
)
def test_what_sage_attention_3_ignores_is_refused(of_sage, options, reason):
    sage = of_sage("sageattn3")
    refused(lambda q, k, v: sage.sageattn3_blackwell(q, k, v, **options), reason)


# --------------------------------------------------------------------------------------------------------- NATTEN


ATTENTION = {
    "plain": ({}, plain, {"kv_heads": 2, "last": 5}),
    "causal": ({"is_causal": True, "q_tile_size": 64, "backend": "cutlass-fmha"}, causal, {}),
    "scale": ({"scale": 0.3, "run_persistent_kernel": False}, lambda q, k, v: plain(q, k, v, scale=0.3), {}),
    "logsumexp": (
        {"scale": 0.3, "return_lse": True},
        lambda q, k, v: with_lse(q, k, v, 0.3),
        {"kv_heads": 2},
    ),
}


@pytest.mark.long
@both_ways
@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", ATTENTION)
def test_attention_of_natten(of_natten, form, backend):
    natten = of_natten("natten")
    options, reference, how = ATTENTION[form]

    def call(q, k, v):
        result = natten.attention(q, k, v, **options)
        return times_lse(result[0], result[1].mT) if options.get("return_lse") else result

    check(call, reference, backend=backend, **how)


@pytest.mark.long
@pytest.mark.parametrize(
    ("space", "options", "dtype"),
    [
        ((12,), {"kernel_size": 5}, torch.float32),
        ((3, 4), {"kernel_size": (3, 2), "dilation": (1, 2), "is_causal": (False, True)}, torch.float32),
        ((2, 2, 3), {"kernel_size": (2, 1, 3)}, torch.bfloat16),
    ],
    ids=str,
)
def test_additional_keys_of_natten(of_natten, space, options, dtype):
    """Of a context, which all tokens see: the first rows, which have tangents and gradients as well."""
    attention = getattr(of_natten("natten"), f"na{len(space)}d")
    n = math.prod(space)
    seen = torch.cat([neighbourhoods(space, **options), torch.ones(n, 3, dtype=torch.bool)], 1)

    def call(q, k, v):
        own = [x[:, 3:].unflatten(1, space) for x in (q, k, v)]
        more = {
            "additional_keys": k[:, :3],
            "additional_values": v[:, :3],
            "attention_kwargs": {"backend": "flex-fmha"},
        }
        o, lse = attention(*own, **options, **more, return_lse=True)
        assert lse.shape == own[0].shape[:-1]
        return torch.cat([q[:, :3], (o * lse[..., None].to(o)).flatten(1, -3)], 1)

    def reference(q, k, v):
        q_own, k, v = q[:, 3:], *(torch.cat([x[:, 3:], x[:, :3]], 1) for x in (k, v))
        s = q_own.transpose(1, 2) @ k.repeat_interleave(2, 2).transpose(1, 2).mT * q.shape[-1] ** -0.5
        lse = s.masked_fill(~seen, -1e300).logsumexp(-1)
        return torch.cat([q[:, :3], times_lse(plain(q_own, k, v, seen), lse)], 1)

    check(call, reference, sizes=((2, n + 3), (3, n + 3)), kv_heads=2, dtype=dtype)


@pytest.mark.long
def test_neighbourhoods_of_any_rank(of_natten):
    attention = of_natten("natten").neighborhood_attention_generic
    check(
        lambda q, k, v: attention(*(x.unflatten(1, (3, 4)) for x in (q, k, v)), kernel_size=3, scale=0.3).flatten(1, 2),
        lambda q, k, v: plain(q, k, v, neighbourhoods((3, 4), 3), scale=0.3),
        sizes=((2, 12), (3, 12)),
    )


@pytest.mark.slow
def test_neighbourhoods_with_inductor(of_natten):
    attention = of_natten("natten").na2d
    check(
        lambda q, k, v: attention(*(x.unflatten(1, (3, 4)) for x in (q, k, v)), kernel_size=3).flatten(1, 2),
        lambda q, k, v: plain(q, k, v, neighbourhoods((3, 4), 3)),
        sizes=((2, 12), (3, 12)),
        backend="inductor",
    )


class OfAGrid(torch.nn.Module):
    """On x [B, rows, columns, C]."""

    def __init__(self, attention):
        super().__init__()
        self.qkv, self.attention = torch.nn.Linear(8, 24), attention

    def forward(self, x):
        return self.attention(*self.qkv(x).unflatten(-1, (2, 12)).split(4, -1))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_neighbourhoods_in_a_grid_of_any_size(of_natten, backend):
    """One graph, from two tiles on: how many are cut follows from sizes that are symbols in it."""
    attention = of_natten("natten").na2d
    torch.manual_seed(0)
    net = OfAGrid(lambda q, k, v: attention(q, k, v, kernel_size=(3, 5), dilation=(1, 2)))
    dual = jvpgraph.transform(net, backend=backend, dynamic=True)
    exact = copy.deepcopy(net).double()
    for space in ((12, 20), (15, 20), (10, 31)):
        seen = neighbourhoods(space, (3, 5), 1, (1, 2))
        exact.attention = lambda q, k, v: plain(*(x.flatten(1, 2) for x in (q, k, v)), seen).unflatten(1, space)  # noqa: B023
        x, x_dot = torch.randn(2, 1, *space, 8)
        want = torch.func.jvp(exact, (x.double(),), (x_dot.double(),))
        grads = torch.autograd.grad(exact(x.double()).square().sum(), list(exact.parameters()))
        y, y_dot = dual(x, tangents={"x": x_dot})
        got = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        for a, b in zip((y, y_dot, *got), (*want, *grads), strict=True):
            assert (a - b).abs().max() <= 2e-6 * max(1, b.abs().max())
    assert len(dual.reports) == 1


def offsets(cu_q, cu_k):
    return {"cumulative_seqlen_Q": cu_q, "cumulative_seqlen_KV": cu_k, "max_seqlen_Q": 9, "max_seqlen_KV": 11}


def of_lengths(cu_q, cu_k):
    return {"seqlens_Q": cu_q.diff(), "seqlens_KV": cu_k.diff()}


@both_ways
@pytest.mark.parametrize("given", [offsets, of_lengths])
def test_packed_sequences(of_natten, given, backend):
    """Of several lengths, those of keys others than those of queries; with grouped heads and the logsumexp."""
    natten = of_natten("natten")

    def call(q, k, v, cu_q, cu_k):
        o, lse = natten.attention(q, k, v, scale=0.3, return_lse=True, **given(cu_q, cu_k))
        return times_lse(o, lse.mT)

    def reference(q, k, v, cu_q, cu_k):
        seen = blocks(cu_q.diff().tolist(), cu_k.diff().tolist())
        s = 0.3 * q.transpose(1, 2) @ k.repeat_interleave(2, 2).transpose(1, 2).mT
        return times_lse(plain(q, k, v, seen, scale=0.3), s.masked_fill(~seen, -1e300).logsumexp(-1))

    check(
        call,
        reference,
        sizes=((1, 12), (1, 20)),
        others=lambda n: {"cu_q": cu([2, 4, 1]), "cu_k": cu(lengths(n))},
        kv_heads=2,
        last=7,
        backend=backend,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_ways
@pytest.mark.parametrize("given", [offsets, lambda a, b: dict.fromkeys(("seqlens_Q", "seqlens_KV"), a.diff())])
def test_causal_packed_sequences(of_natten, given, backend, dtype):
    natten = of_natten("natten")

    def reference(q, k, v, ends):
        of = ends.diff().tolist()
        return plain(q, k, v, blocks(of, of, lambda n, m: band(n, m, right=0)))

    check(
        lambda q, k, v, ends: natten.attention(q, k, v, True, **given(ends, ends)),
        reference,
        sizes=((1, 12), (1, 20)),
        others=lambda n: {"ends": cu(lengths(n))},
        backend=backend,
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"cumulative_seqlen_Q": cu([6])}, "those of queries or of keys are missing"),
        ({"is_causal": True} | offsets(cu([6]), cu([6])), "pass the same tensor for both"),
    ],
)
def test_sequences_that_are_refused(of_natten, given, reason):
    natten = of_natten("natten")
    refused(lambda q, k, v: natten.attention(q, k, v, **given), rf"natten.attention .*{reason}")


def test_causal_with_fewer_queries_is_refused(of_natten):
    natten = of_natten("natten")
    refused(
        lambda q, k, v: natten.attention(q[:, 3:], k, v, True).repeat(1, 2, 1, 1),
        r"natten.attention \(is_causal\).*not as many keys as queries",
    )


def test_a_positional_bias_is_refused(of_natten, monkeypatch):
    """Which na2d took in older versions."""

    def na2d(query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None):
        raise AssertionError

    module = of_natten("natten.functional")
    monkeypatch.setattr(module, "na2d", na2d)
    rpb = torch.zeros(H, 5, 5)
    refused(
        lambda q, k, v: module.na2d(*(x.unflatten(1, (2, 3)) for x in (q, k, v)), 2, rpb=rpb).flatten(1, 2),
        r"natten \(rpb\).*positional biases",
    )


@both_ways
def test_packed_grids_are_refused(of_natten, monkeypatch, backend):
    """Which newer versions take."""

    def na2d_varlen(query, key, value, layout, kernel_size, **_):
        raise AssertionError

    module = of_natten("natten.functional")
    monkeypatch.setattr(module, "na2d_varlen", na2d_varlen, raising=False)
    dual = jvpgraph.transform(Net(lambda q, k, v: module.na2d_varlen(q, k, v, None, 3)), backend=backend)
    x = torch.randn(1, 6, C)
    with pytest.raises(UnsupportedOp, match=r"natten \(layout\).*call na1d, na2d or na3d for each") as told:
        dual(x, torch.rand(1), tangents={"x": x})
    assert "test_sage_natten.py:" in str(told.value)
