"""xformers' masks that are objects, with windows, gaps and padding, and those with a bias."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import jvpgraph
from jvpgraph.errors import UnsupportedOp
from tests.foreign import stand_ins
from tests.foreign.test_swaps import C, H, Net, band, blocks, both_ways, check, importing, lengths, plain

pytestmark = pytest.mark.slow
of_xformers = importing("xformers")
FEW = [2, 4, 1]  # queries of three sequences, no more than keys of any


def gappy(of_q, starts, of_k, n_k, block=lambda n, m: torch.ones(n, m, dtype=torch.bool)):
    """[Lq, Lk] of queries one after the other and keys with gaps."""
    seen, first = torch.zeros(sum(of_q), n_k, dtype=torch.bool), 0
    for n, start, m in zip(of_q, starts, of_k):
        seen[first : first + n, start : start + m] = block(n, m)
        first += n
    return seen


def in_blocks(block):
    return lambda n: blocks(FEW, lengths(n), block)


def padded(block):
    """Of used(n) keys in every third."""
    return lambda n: gappy(FEW, [0, n // 3, n // 3 * 2], used(n), n, block)


def with_gaps(block):
    return lambda n: gappy(FEW, starts(n)[:-1], [3, 4, 2], n, block)


def used(n):
    return [2, n // 3, 1]


def starts(n):
    return [1, 5, n - 3, n]


def everything(n, m):
    return torch.ones(n, m, dtype=torch.bool)


def window(left, right, from_the_end=True):
    return lambda n, m: band(n, m, left, right, from_the_end)


MASKS = {
    "causal window": (
        lambda masks, n: masks.LowerTriangularFromBottomRightMask().make_local_attention(4),
        lambda n: band(7, n, 3, 0),
    ),
    "causal window in blocks": (
        lambda masks, n: masks.BlockDiagonalMask.from_seqlens(FEW, lengths(n)).make_local_attention(2),
        in_blocks(window(1, 0, from_the_end=False)),
    ),
    "causal window in blocks, from the end": (
        lambda masks, n: masks.BlockDiagonalMask.from_seqlens(FEW, lengths(n)).make_local_attention_from_bottomright(2),
        in_blocks(window(1, 0)),
    ),
    "padded": (
        lambda masks, n: masks.BlockDiagonalPaddedKeysMask.from_seqlens(FEW, n // 3, used(n)),
        padded(everything),
    ),
    "padded, causal": (
        lambda masks, n: masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(FEW, n // 3, used(n)),
        padded(window(-1, 0)),
    ),
    "padded, window": (
        lambda masks, n: masks.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(FEW, n // 3, used(n), 2, 1),
        padded(window(2, 1)),
    ),
    "padded, causal window": (
        lambda masks, n: masks.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(
            FEW, n // 3, used(n), 2
        ),
        padded(window(1, 0)),
    ),
    "gappy": (
        lambda masks, n: masks.BlockDiagonalGappyKeysMask.from_seqlens(FEW, starts(n), [3, 4, 2]),
        with_gaps(everything),
    ),
    "gappy, causal": (
        lambda masks, n: masks.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(FEW, starts(n), [3, 4, 2]),
        with_gaps(window(-1, 0)),
    ),
    "gappy, window": (
        lambda masks, n: masks.BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask.from_seqlens_local(
            FEW, starts(n), [3, 4, 2], 1, 2
        ),
        with_gaps(window(1, 2)),
    ),
}


@pytest.mark.long
@both_ways
@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MASKS)
def test_masks_with_windows_and_gaps(of_xformers, name, backend):
    """Seven queries on keys whose number changes; the mask is an argument of the model."""
    ops, masks = of_xformers("xformers.ops"), of_xformers("xformers.ops.fmha.attn_bias")
    mask, wanted = MASKS[name]
    check(
        lambda q, k, v, bias: ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=0.3),
        lambda q, k, v, bias: plain(q, k, v, wanted(k.shape[1]), scale=0.3),
        sizes=((1, 15), (1, 21)),
        others=lambda n: {"bias": mask(masks, n)},
        last=7,
        backend=backend,
    )


def test_a_mask_in_bfloat16(of_xformers):
    ops, masks = of_xformers("xformers.ops"), of_xformers("xformers.ops.fmha.attn_bias")
    mask, wanted = MASKS["padded, causal window"]
    check(
        lambda q, k, v, bias: ops.memory_efficient_attention(q, k, v, attn_bias=bias),
        lambda q, k, v, bias: plain(q, k, v, wanted(k.shape[1])),
        sizes=((1, 15),),
        others=lambda n: {"bias": mask(masks, n)},
        last=7,
        dtype=torch.bfloat16,
    )


@pytest.fixture(params=["newer", "older"])
def masks(request, of_xformers, monkeypatch):
    """Where the mask with a bias is a wrapper of that tensor, and where it is an object that has it."""
    module = of_xformers("xformers.ops.fmha.attn_bias")
    if request.param == "older":
        for name in ("LowerTriangularMask", "LowerTriangularMaskWithTensorBias"):
            monkeypatch.setattr(module, name, getattr(stand_ins, f"Older{name}"))
    return module


def bias_of(q, n):
    """[B, H, Lq, n], with a tangent."""
    bias = (q[..., :1] * 2).transpose(1, 2).expand(-1, -1, -1, n)
    return bias * torch.arange(n).cos().to(q)


def causal_with_bias(q, k, v, **_):
    return plain(q, k, v, band(q.shape[1], k.shape[1], right=0, from_the_end=False), bias_of(q, k.shape[1]))


@pytest.mark.long
@both_ways
@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", ["add_bias", "class", "rank 5"])
def test_a_bias_under_a_causal_mask(of_xformers, masks, how, backend):
    """Made by the model, of a tensor with a tangent and gradients."""
    ops = of_xformers("xformers.ops")

    def call(q, k, v):
        bias = bias_of(q, k.shape[1])
        if how == "add_bias":
            return ops.memory_efficient_attention(q, k, v, masks.LowerTriangularMask().add_bias(bias))
        if how == "class":
            return ops.memory_efficient_attention(q, k, v, masks.LowerTriangularMaskWithTensorBias(bias))
        mask = masks.LowerTriangularMaskWithTensorBias(bias.unflatten(1, (2, 2)))
        return ops.memory_efficient_attention(*(x.unflatten(2, (2, 2)) for x in (q, k, v)), mask).flatten(2, 3)

    check(call, causal_with_bias, backend=backend)


@pytest.mark.long
@pytest.mark.parametrize("last", [None, 5])
def test_a_causal_mask_of_the_module(of_xformers, masks, last):
    """Made once, outside of the graph, with a bias that the model makes, and without."""
    ops, mask = of_xformers("xformers.ops"), masks.LowerTriangularMask()

    def call(q, k, v):
        o = ops.memory_efficient_attention(q, k, v, mask)
        return o + ops.memory_efficient_attention(q, k, v, mask.add_bias(bias_of(q, k.shape[1])))

    def reference(q, k, v):
        return causal_with_bias(q, k, v) + plain(q, k, v, band(q.shape[1], k.shape[1], right=0, from_the_end=False))

    check(call, reference, last=last)


def test_a_bias_of_the_caller_under_a_causal_mask(of_xformers, masks):
    ops = of_xformers("xformers.ops")
    check(
        lambda q, k, v, bias: ops.memory_efficient_attention(q, k, v, bias),
        lambda q, k, v, bias: plain(q, k, v, band(q.shape[1], k.shape[1], right=0), numbers(k.shape[1])),
        others=lambda n: {"bias": masks.LowerTriangularMaskWithTensorBias(numbers(n).float())},
    )


def numbers(n):
    return torch.linspace(-2, 2, H * n * n, dtype=torch.float64).reshape(1, H, n, n).cos()


@pytest.mark.long
def test_in_mslk(monkeypatch):
    """To where xformers' attention moved."""
    members = stand_ins.MASKS | {"_AddDenseBias": stand_ins._AddDenseBias}
    masks = stand_ins.put(monkeypatch, "mslk.attention.fmha.attn_bias", **members)
    fmha = sys.modules["mslk.attention.fmha"]
    monkeypatch.setattr(fmha, "memory_efficient_attention", stand_ins.memory_efficient_attention, raising=False)

    def call(q, k, v):
        return fmha.memory_efficient_attention(q, k, v, masks.LowerTriangularMask().add_bias(bias_of(q, k.shape[1])))

    dual = check(call, causal_with_bias)
    assert all(report.fused == 1 and len(report.swapped) == 1 for report in dual.reports)


def refused(masks, kind):
    if kind == "paged":
        seqinfos = masks.BlockDiagonalPaddedKeysMask.from_seqlens([6], 8, [6])
        return masks.PagedBlockDiagonalPaddedKeysMask(
            seqinfos.q_seqinfo, seqinfos.k_seqinfo, torch.zeros(1, 1).int(), 8
        )
    return nn.Identity() if kind == "unknown" else masks.BlockDiagonalMask.from_seqlens([6, 6])


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("paged", "PagedBlockDiagonalPaddedKeysMask is a mask that our version"),
        ("unknown", "Identity is a mask that our version"),
        ("batch", "a BlockDiagonalMask needs sequences one after the other, in a batch of 1"),
    ],
)
def test_masks_that_are_refused(of_xformers, kind, reason):
    ops, masks = of_xformers("xformers.ops"), of_xformers("xformers.ops.fmha.attn_bias")
    mask = refused(masks, kind)
    dual = jvpgraph.transform(Net(lambda q, k, v: ops.memory_efficient_attention(q, k, v, mask)), backend="eager")
    x = torch.randn(2, 6, C)
    with pytest.raises(UnsupportedOp, match=reason):
        dual(x, torch.rand(2), tangents={"x": x})
