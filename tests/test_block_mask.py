"""Block masks against the same mask made dense: values, tangents, gradients, and what is visited."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.testing import assert_close

from jvpgraph.kernels import visits
from jvpgraph.kernels.attention import attention, attention_jvp
from jvpgraph.kernels.block_mask import HIDDEN, WHOLE, BlockMask, list_blocks, positions_of, summary_of
from jvpgraph.kernels.blocked_parts import exp_
from jvpgraph.kernels.call import Call, How
from jvpgraph.kernels.choose import plan
from jvpgraph.kernels.ops import OPS
from tests.test_attention import peak_bytes

TILE = (32, 16)


def frames(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Causal by frames of 15 tokens; two queries see nothing."""
    return (q // 15 >= k // 15) & (q > 1)


def of_heads(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return frames(b, h, q, k) & (q + 3 * h != k) & (k > 20 * h - 10 * b)


def neighbours(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A neighbourhood of 5 x 5 in an image 10 wide, as NATTEN's, and what is not whole anywhere."""
    return ((q // 10 - k // 10).abs() <= 2) & ((q % 10 - k % 10).abs() <= 2)


def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Sequences, each of a clean half and a noisy one that sees what is clean before it, as in teacher forcing."""
    clean = (k < 75) & (k // 25 < q % 75 // 25)
    return clean | ((q // 75 == k // 75) & (q % 75 // 25 == k % 75 // 25))


MODS = {"frames": frames, "of_heads": of_heads, "neighbours": neighbours, "documents": documents}


def inputs(
    n_q: int = 150, n_k: int = 150, heads: int = 2, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    shapes = ((2, heads, n_q, 16), (2, kv_heads, n_k, 16), (2, kv_heads, n_k, 24))
    return [torch.randn(s, dtype=dtype) for s in shapes], [torch.randn(s, dtype=dtype) for s in shapes]


def everything(xs: list[Tensor], dots: list[Tensor], bias: Tensor | None, **options: Any) -> list[Tensor]:
    """All outputs and gradients, of the value and through the tangent."""
    generator = torch.Generator().manual_seed(0)
    xs, dots = ([x.clone().requires_grad_() for x in of] for of in (xs, dots))
    both = attention_jvp(*xs, *dots, bias, differentiable_tangent=True, **options)
    value = attention(*xs, bias, **options)
    found = [*both, *value]
    for outs, wrt in ((both, xs + dots), (value, xs)):
        cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outs]
        loss = sum((x.nan_to_num(neginf=0) * y).sum() for x, y in zip(outs, cotangents))
        found += torch.autograd.grad(loss, wrt)
    return found


def assert_equal(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    """Up to tolerance times the largest number."""
    for x, y in zip(got, want):
        finite = y.detach().nan_to_num(neginf=0)
        assert_close(x, y, rtol=0, atol=tolerance * max(1.0, float(finite.abs().max())))


def both_masks(mod: str, n_q: int, n_k: int, batch: int | None, heads: int | None) -> tuple[BlockMask, Tensor]:
    mask = BlockMask.of(MODS[mod], n_q, n_k, batch=batch, heads=heads, tile=TILE)
    return mask, create_mask(MODS[mod], batch, heads, n_q, n_k, device="cpu")


@pytest.mark.parametrize("mod", MODS)
@pytest.mark.parametrize("sizes", [(150, 150), (130, 195)], ids=str)
def test_as_a_dense_mask(mod, sizes):
    own = (2, 2) if mod == "of_heads" else (None, None)
    mask, dense = both_masks(mod, *sizes, *own)
    assert torch.equal(mask.dense(*sizes), dense)
    xs, dots = inputs(*sizes)
    assert_equal(everything(xs, dots, None, block_mask=mask), everything(xs, dots, dense), 1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "own"), [(4, 2, None), (4, 2, 4), (4, 1, 4), (4, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_heads(heads, kv_heads, own, dtype):
    mask, dense = both_masks("of_heads" if own else "frames", 150, 150, None, own)
    xs, dots = inputs(heads=heads, kv_heads=kv_heads, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert_equal(everything(xs, dots, None, block_mask=mask), everything(xs, dots, dense), tolerance)


@pytest.mark.parametrize("window", [None, (35, 10)], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive", "row"])
def test_with_a_bias_and_a_window(kind, window):
    mask, dense = both_masks("frames", 150, 150, None, None)
    xs, dots = inputs()
    bias = torch.randn(2, 1 if kind == "row" else 150, 150)
    bias = bias > -1 if kind == "boolean" else bias
    whole = dense & bias if kind == "boolean" else torch.where(dense, bias, -math.inf)
    got = everything(xs, dots, bias, block_mask=mask, window=window)
    assert_equal(got, everything(xs, dots, whole, window=window), 1e-6)


def test_gradients_of_a_bias():
    mask, dense = both_masks("frames", 150, 150, None, None)
    xs, dots = inputs()
    found = []
    for shape in ((150, 150), (1, 150), (150, 1), (2, 2, 150, 150)):
        bias = torch.randn(shape, requires_grad=True)
        for how in ({"block_mask": mask}, {}):
            b = bias if how else torch.where(dense, bias, -math.inf)
            o, _, o_dot, _ = attention_jvp(*xs, *dots, b, differentiable_tangent=True, **how)
            found.append(torch.autograd.grad((o.sin() + o_dot.cos()).sum(), bias)[0])
    *others, (got, want) = [found[i : i + 2] for i in (0, 2, 6, 4)]
    assert_equal(*zip(*others), 1e-6)
    # one number for all keys of a query changes nothing: its gradient is a sum that cancels, of 600 as large as others
    assert_close(got, want, rtol=0, atol=1e-6 * float(others[0][1].abs().max()))


def test_every_row_and_no_row_sees_a_key():
    xs, dots = inputs()
    size = [-(-150 // n) for n in TILE]
    for kind in (HIDDEN, WHOLE):
        mask = BlockMask(torch.full((1, 1, *size), kind, dtype=torch.int32), torch.zeros(0, *TILE, dtype=torch.bool))
        dense = torch.full((150, 150), kind == WHOLE)
        assert_equal(everything(xs, dots, None, block_mask=mask), everything(xs, dots, dense), 1e-6)


# ---------------------------------------------------------------------------------------------- what is visited


def count_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tiles each block of queries of each chunk visits from now on."""
    counts: list[int] = []
    keys = visits.TiledVisits.keys

    def counted(self, *at):
        for some in keys(self, *at):
            counts.append(sum(-(-n // self.mask.tile[1]) for _, n in some.runs))
            yield some

    monkeypatch.setattr(visits.TiledVisits, "keys", counted)
    return counts


def test_as_many_tiles_are_visited_as_are_kept(monkeypatch):
    mask, _ = both_masks("of_heads", 150, 195, 2, 2)
    kept = int((mask.map != HIDDEN).sum())
    assert 0 < kept < mask.map.numel()
    counts = count_tiles(monkeypatch)
    xs, dots = inputs(150, 195)
    xs = [x.requires_grad_() for x in xs]
    o, _, o_dot, _ = attention_jvp(*xs, *dots, block_mask=mask, differentiable_tangent=True)
    assert sum(counts) == kept
    counts.clear()
    torch.autograd.grad(o.sum(), xs, retain_graph=True)
    assert sum(counts) == kept
    counts.clear()
    torch.autograd.grad(o_dot.sum(), xs)
    assert sum(counts) == kept


def test_a_mask_is_read_in_cut_tiles_alone(monkeypatch):
    mask, _ = both_masks("frames", 150, 150, None, None)
    read: list[int] = []
    hidden = visits.TiledVisits._hidden
    monkeypatch.setattr(
        visits.TiledVisits, "_hidden", lambda self, *at: (read.append(len(at[-1])), hidden(self, *at))[1]
    )
    xs, dots = inputs()
    attention_jvp(*xs, *dots, block_mask=mask)
    assert sum(read) == int((mask.map > 0).sum()) < int((mask.map != HIDDEN).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_mask_is_skipped_where_it_hides(monkeypatch, dtype):
    n = 1100
    dense = create_mask(lambda b, h, q, k: q // 300 == k // 300, None, None, n, n, device="cpu")
    xs, dots = inputs(n, n, heads=1, kv_heads=1, dtype=dtype)
    counts = count_tiles(monkeypatch)
    got = everything(xs, dots, dense)
    each = int((BlockMask.of_dense(dense).map != HIDDEN).sum())
    assert sum(counts) >= each  # that of the value is ATen's
    assert sum(counts) % each == 0
    monkeypatch.setattr(Call, "summary", None)
    counts.clear()
    assert_equal(got, everything(xs, dots, dense), 1e-6 if dtype == torch.float32 else 2e-2)
    assert not counts


def test_a_dense_mask_is_looked_through_once_in_each_pass(monkeypatch):
    n, looked = 1100, []
    monkeypatch.setattr(
        "jvpgraph.kernels.call.summary_of", lambda bias: (looked.append(bias.shape), summary_of(bias))[1]
    )
    dense = create_mask(lambda b, h, q, k: q // 300 == k // 300, None, None, n, n, device="cpu")
    (q, k, v), dots = inputs(n, n)
    q.requires_grad_()
    o, _, o_dot, _ = attention_jvp(q, k, v, *dots, dense, differentiable_tangent=True)
    assert len(looked) == 1
    torch.autograd.grad(o.sum(), q, retain_graph=True)
    assert len(looked) == 2
    torch.autograd.grad(o_dot.sum(), q)
    assert len(looked) == 3


def test_a_dense_mask_without_structure_is_left_alone():
    assert summary_of(torch.rand(1, 1, 1100, 1100) > 0.5) is None
    assert summary_of(torch.ones(1, 1, 150, 150, dtype=torch.bool)) is None
    assert summary_of(torch.randn(1, 1, 1100, 1100)) is None
    assert summary_of(torch.ones(1, 1, 1100, 1100, dtype=torch.bool)) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_scores_are_hidden_whatever_they_are(dtype):
    """In part of a block, by a mask that its heads share; scores may have overflowed, or come of padding."""
    s = torch.randn(3, 2, 8, 50, dtype=dtype)
    s[:, 0, 0, ::3], s[:, 0, 1, ::3], s[:, 0, 2, ::3] = math.nan, math.inf, -math.inf
    hidden = torch.rand(1, 2, 8, 30) > 0.5
    want = s.clone()
    want[..., 20:].masked_fill_(hidden, -math.inf)
    visits._hide(s[..., 20:], hidden)
    assert_close(s, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exp_in_place(dtype):
    x = torch.cat([torch.linspace(-700, 5, 4001, dtype=dtype), torch.tensor([0, -math.inf, math.nan], dtype=dtype)])
    want, eps = x.double().exp(), torch.finfo(dtype).eps
    # what x and log2(e) are rounded by counts as often as x is large; less than the least normal number is 0 at times
    bound = want * eps * (2 + x.double().abs().clamp(max=1000)) + torch.finfo(dtype).tiny
    got = exp_(x.clone()).double()
    assert ((got - want).abs() <= bound)[:-1].all()
    assert got[-2] == 0
    assert got[-1].isnan()


# ----------------------------------------------------------------------------------------------- how masks are made


@pytest.mark.parametrize("mod", MODS)
def test_a_block_mask_of_flex_attention(mod):
    own = (2, 2) if mod == "of_heads" else (None, None)
    flex = create_block_mask(MODS[mod], *own, 130, 195, device="cpu", BLOCK_SIZE=TILE)
    mask, dense = both_masks(mod, 130, 195, *own)
    of_flex = BlockMask.of_flex(flex, 2, 2)
    assert of_flex.map.shape == mask.map.shape
    assert torch.equal(of_flex.dense(130, 195), dense)
    assert torch.equal(BlockMask.of_dense(dense, TILE).map, mask.map)
    xs, dots = inputs(130, 195)
    got = attention_jvp(*xs, *dots, block_mask=flex)
    assert_equal([*got], [*attention_jvp(*xs, *dots, block_mask=of_flex)], 0)


def test_lists_for_all_heads_with_a_mask_mod_of_each():
    """flex_attention asks mask_mod for each head, whether or not the lists do."""
    flex = create_block_mask(frames, None, None, 150, 150, device="cpu", BLOCK_SIZE=TILE)
    flex.mask_mod = lambda b, h, q, k: frames(b, h, q, k) & (k != h)
    mask = BlockMask.of_flex(flex, 1, 2)
    assert mask.map.shape[:2] == (1, 2)
    cut = (mask.map > 0).repeat_interleave(TILE[0], 2).repeat_interleave(TILE[1], 3)[:, :, :150, :150]
    want = create_mask(flex.mask_mod, None, 2, 150, 150, device="cpu")
    assert torch.equal(mask.dense(150, 150) & cut, want & cut)


def test_lists_in_any_order_with_places_that_are_not_used():
    count = torch.tensor([[[2, 1, 0]]], dtype=torch.int32)
    index = torch.tensor([[[[2, 0, 9], [1, -7, 2], [0, 2, 1]]]], dtype=torch.int32)
    kinds, places = list_blocks(count, index, None, None, 1, 1, 3, 3)
    assert kinds.tolist() == [[[[1, 0, 2], [0, 3, 0], [0, 0, 0]]]]
    assert places.tolist() == [[0, 0, 0, 0], [0, 0, 0, 2], [0, 0, 1, 1]]
    kinds, places = list_blocks(count, index, None, None, 1, 1, 3, 2, all_whole=True)
    assert kinds.tolist() == [[[[-1, 0], [0, -1], [0, 0]]]]
    assert places.shape == (0, 4)


def test_memory_of_causal_frames():
    """42 frames of 1,560 tokens, as of a video of 480p: map, bytes, and all that is alive while they are made."""
    n, tile = 65_520, 128

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q // 1560 >= k // 1560

    first = torch.arange(0, n, tile)
    last = (first + tile - 1).clamp(max=n - 1)
    whole = first[:, None] // 1560 >= last // 1560
    cut = (last[:, None] // 1560 >= first // 1560) & ~whole
    lists = [x[None, None].int() for of in (cut, whole) for x in (of.sum(-1), of.int().argsort(descending=True))]
    flex = FlexBlockMask.from_kv_blocks(*lists, BLOCK_SIZE=tile, mask_mod=causal, seq_lengths=(n, n))

    def in_graph() -> tuple[Tensor, Tensor]:
        kinds, places = list_blocks(*lists, 1, 1, len(first), len(first))
        b, h, q, k, inside = positions_of(places, tile, tile, n, n)
        return kinds, torch.logical_and(inside, causal(b, h, q, k))

    for make in (lambda: BlockMask.of_flex(flex, 1, 1), in_graph):
        assert peak_bytes(make) < 0.02 * n * n
    assert all(torch.equal(x, y) for x, y in zip(in_graph(), BlockMask.of_flex(flex, 1, 1)))


# ------------------------------------------------------------------------------------------------------ as ops


@pytest.mark.slow
def test_opcheck():
    mask, _ = both_masks("frames", 70, 70, None, None)
    xs, dots = inputs(70, 70)
    how = How(False, None, None, None, None, *mask)
    for requires_grad in (False, True):
        given = [x.detach().requires_grad_(requires_grad) for x in xs]
        torch.library.opcheck(OPS.attention.default, (*given, None, *how))
        torch.library.opcheck(OPS.attention_jvp.default, (*given, *dots, None, None, *how, True))


def test_what_is_refused():
    (q, k, v), _ = inputs()
    mask, _ = both_masks("frames", 150, 150, None, None)
    cu = torch.tensor([0, 150], dtype=torch.int32)
    for message, wrong, options in (
        ("both block_map", (mask.map, None), {}),
        ("int32", (mask.map.long(), mask.partial), {}),
        ("bool", (mask.map, mask.partial.float()), {}),
        ("cover q and k", (mask.map[:, :, :-1], mask.partial), {}),
        ("one batch entry and head, or for all", (mask.map.expand(1, 3, -1, -1), mask.partial), {}),
        ("on cpu", (mask.map.to("meta"), mask.partial), {}),
        ("from 1 on", (mask.map + 1000, mask.partial), {}),
        ("packed", mask, {"cu_seqlens_q": cu, "cu_seqlens_kv": cu}),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.attention(q, k, v, block_map=wrong[0], partial_blocks=wrong[1], **options)
    with pytest.raises(ValueError, match="rank 4"):
        attention(q[0], k[0], v[0], block_mask=mask)


def test_the_plan_says_who_takes_it_and_why_not():
    (q, k, v), dots = inputs()
    mask, _ = both_masks("frames", 150, 150, None, None)
    chosen = plan(Call.of(q, k, v, tuple(dots), how=How(False, None, None, None, None, *mask)))
    assert str(chosen) == "blocks of torch ops"
    assert plan(Call.of(q, k, v, how=How(False, None, None, None, None, *mask))).why == {
        "ATen's flash for CPUs": "a block mask"
    }
