"""Block masks of windows and neighbourhoods: against masks written out token by token, and attention with these by
plain math in float64; what is visited, and how much memory they take."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import jvpgraph
from jvpgraph.foreign.attend import attend, attend_packed, tiles_of_sequences
from jvpgraph.foreign.natten import neighborhood_attention
from jvpgraph.kernels.attention import attention, attention_jvp
from jvpgraph.kernels.block_mask import HIDDEN, BlockMask
from jvpgraph.kernels.ops import OPS
from jvpgraph.kernels.window import Window
from jvpgraph.kernels.window_masks import cut_by_intervals, intervals_from_the_end, mask_of_intervals
from tests.foreign.plain import band, neighbourhoods
from tests.test_attention import peak_bytes
from tests.test_block_mask import assert_equal, count_tiles

CPU = torch.device("cpu")
GRIDS = [  # two or three tiles of 128 tokens each, or more
    ((300,), {"kernel_size": 31}),
    ((300,), {"kernel_size": 41, "dilation": 3}),
    ((300,), {"kernel_size": 40, "stride": 8, "is_causal": True}),
    ((16, 24), {"kernel_size": (5, 7)}),
    ((31, 10), {"kernel_size": (7, 4), "dilation": (2, 1), "is_causal": (True, False)}),
    (
        (6, 8, 7),
        {"kernel_size": (3, 3, 5), "dilation": (1, 2, 1), "stride": (1, 1, 2), "is_causal": (True, False, False)},
    ),
]
BANDS = [(-1, 0), (3, 0), (200, 7), (-1, 40), (0, -1), (900, 900)]
SEQUENCES = {  # lengths of queries and of keys, and how many are not used behind each
    "of one length": ([130, 7, 200], [130, 7, 200], 0, 0),
    "more keys": ([100, 1, 60], [300, 9, 128], 0, 0),
    "more queries": ([300, 129, 5], [40, 200, 2], 0, 0),
    "no keys, and no queries": ([40, 300, 0, 10], [200, 0, 30, 10], 0, 0),
    "gaps": ([120, 30, 150], [90, 200, 40], 17, 60),
}


def grid_mask(space: tuple[int, ...], options: dict, others: int = 0) -> BlockMask:
    given = (options.get(name, plain) for name, plain in (("kernel_size", 0), ("stride", 1), ("dilation", 1)))
    of_dims = [list(x) if isinstance(x, tuple) else [x] * len(space) for x in (*given, options.get("is_causal", False))]
    return BlockMask(*OPS.grid_mask(list(space), *of_dims, others, CPU))


def assert_same_mask(mask: BlockMask, dense: Tensor) -> None:
    """Tile by tile: what is hidden, what is whole, and the bytes of what is cut."""
    assert torch.equal(mask.dense(*dense.shape)[0, 0], dense)
    assert torch.equal(mask.map.sign(), BlockMask.of_dense(dense[None, None]).map.sign())
    assert int(mask.map.max()) <= len(mask.partial)


@pytest.mark.parametrize("sizes", [(300, 500), (500, 300), (128, 256), (1, 700), (700, 1), (5, 6)], ids=str)
@pytest.mark.parametrize("window", BANDS, ids=str)
def test_windows_from_the_end(sizes, window):
    intervals = intervals_from_the_end(*sizes, Window.of(*window), CPU)
    assert_same_mask(BlockMask(*OPS.interval_mask(*intervals, sizes[1])), band(*sizes, *window))


def ends_of(lengths: list[int], gap: int) -> tuple[Tensor, Tensor]:
    ends = (torch.tensor(lengths) + gap).cumsum(0)
    return ends - torch.tensor(lengths) - gap, ends - gap


@pytest.mark.parametrize("form", SEQUENCES)
@pytest.mark.parametrize("window", [(-1, -1), *BANDS], ids=str)
def test_windows_within_sequences(form, window):
    of_q, of_k, gap_q, gap_k = SEQUENCES[form]
    starts, ends = zip(*(ends_of(of, gap) for of, gap in ((of_q, gap_q), (of_k, gap_k))))
    n_q, n_k = sum(of_q) + gap_q * len(of_q), sum(of_k) + gap_k * len(of_k)
    dense = torch.zeros(n_q, n_k, dtype=torch.bool)
    for first, end, first_k, end_k in zip(starts[0], ends[0], starts[1], ends[1]):
        dense[first:end, first_k:end_k] = band(int(end - first), int(end_k - first_k), *window)
    assert_same_mask(BlockMask(*tiles_of_sequences(starts, ends, n_q, n_k, window)), dense)


def test_no_more_tiles_are_cut_than_bytes_are_made():
    """Of staircases at random, of few steps and of many; some queries see nothing."""
    generator = torch.Generator().manual_seed(0)
    most = 0.0
    for _ in range(200):
        n_q, n_k, steps = (int(torch.randint(1, top, (), generator=generator)) for top in (1500, 1500, 6))
        first, last = (
            (torch.rand(n_q, generator=generator) ** steps * (n_k + 1)).long().sort().values - less for less in (0, 1)
        )
        mask = mask_of_intervals(first, last, n_k)
        keys = torch.arange(n_k)
        dense = (first[:, None] <= keys) & (keys <= last[:, None])
        assert_same_mask(mask, dense)
        assert len(mask.partial) == cut_by_intervals(*mask.map.shape[2:])
        most = max(most, int((mask.map > 0).sum()) / len(mask.partial))
    assert most > 0.25


@pytest.mark.parametrize(("space", "options"), GRIDS, ids=str)
@pytest.mark.parametrize("others", [0, 77])
def test_neighbourhoods(space, options, others):
    dense = neighbourhoods(space, **options)
    mask = grid_mask(space, options, others)
    assert_same_mask(mask, torch.cat([dense, torch.ones(len(dense), others, dtype=torch.bool)], 1))
    assert int((mask.map > 0).sum()) == len(mask.partial)


def test_as_ops():
    for args in (
        (*intervals_from_the_end(300, 200, Window(50, 0), CPU), 200),
        ([12, 13], [3, 5], [1, 1], [1, 2], [False, True], 3, CPU),
    ):
        op = OPS.interval_mask if isinstance(args[0], Tensor) else OPS.grid_mask
        torch.library.opcheck(op.default, args)


# ---------------------------------------------------------------------------------------------- what is computed


def inputs(n_q: int, n_k: int, heads: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    shapes = ((2, heads, n_q, 16), (2, heads, n_k, 16), (2, heads, n_k, 24))
    return [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]


def by_hand(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Value and logsumexp; 0 and -1e30 of queries that see nothing."""
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -1e30)
    return s.softmax(-1) * seen.any(-1, keepdim=True) @ v, s.logsumexp(-1)


def everything(both, xs: list[Tensor], dots: list[Tensor]) -> list[Tensor]:
    """Outputs, and their gradients by all inputs, of the value and then of the tangent."""
    generator = torch.Generator().manual_seed(0)
    xs, dots = ([x.detach().requires_grad_() for x in of] for of in (xs, dots))
    outs = both(xs, dots)
    # of queries that see nothing the logsumexp is a constant
    outs = [x.masked_fill(x < -1e20, 0) for x in outs]
    found = list(outs)
    for some in (outs[:2], outs[2:]):
        loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in some)
        grads = torch.autograd.grad(loss, [*xs, *dots], retain_graph=True, allow_unused=True)
        found += [torch.zeros_like(x) if grad is None else grad for x, grad in zip((*xs, *dots), grads)]
    return found


def assert_right(mask: BlockMask, dense: Tensor) -> None:
    """To 1e-6 of the largest number, in float32."""
    xs, dots = inputs(*dense.shape)
    got = everything(lambda xs, dots: attention_jvp(*xs, *dots, block_mask=mask, differentiable_tangent=True), xs, dots)

    def exact(xs: list[Tensor], dots: list[Tensor]) -> tuple[Tensor, ...]:
        outs, out_dots = torch.func.jvp(lambda *xs: by_hand(*xs, dense), tuple(xs), tuple(dots))
        return *outs, *out_dots

    want = everything(exact, [x.double() for x in xs], [x.double() for x in dots])
    assert_equal([x.double() for x in got], want, 1e-6)


@pytest.mark.parametrize(("space", "options"), GRIDS, ids=str)
def test_attention_of_neighbourhoods(space, options):
    assert_right(grid_mask(space, options), neighbourhoods(space, **options))


@pytest.mark.parametrize("sizes", [(200, 300), (300, 200)], ids=str)
@pytest.mark.parametrize("window", BANDS[1:3], ids=str)
def test_attention_of_windows_from_the_end(sizes, window):
    intervals = intervals_from_the_end(*sizes, Window.of(*window), CPU)
    assert_right(mask_of_intervals(*intervals, sizes[1]), band(*sizes, *window))


def test_as_many_tiles_are_visited_as_are_kept(monkeypatch):
    """By functions as other packages have them."""
    counts = count_tiles(monkeypatch)
    q, k, v = (torch.randn(1, n, 1, 16) for n in (400, 900, 900))
    attend(q, k, v, window=(100, 0))
    assert sum(counts) == int((BlockMask.of_dense(band(400, 900, 100, 0)[None, None]).map != HIDDEN).sum()) < 28
    counts.clear()
    neighborhood_attention(*(x.unflatten(1, (30, 30)) for x in (k, k, v)), 5)
    kept = int((grid_mask((30, 30), {"kernel_size": 5}).map != HIDDEN).sum())
    assert sum(counts) == kept < 64
    counts.clear()
    cu_q, cu_k = torch.tensor([0, 100, 400]), torch.tensor([0, 600, 900])
    attend_packed(q[0], k[0], v[0], cu_q, cu_k, causal=True, window=(100, -1))
    dense = torch.block_diag(band(100, 600, 100, 0), band(300, 300, 100, 0)).bool()
    assert sum(counts) == int((BlockMask.of_dense(dense[None, None]).map != HIDDEN).sum()) < 28


class OfAGrid(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1, 2)
        return neighborhood_attention(x, x, x, 5).flatten(1, 2) + attend(flat, *[flat[:, :-2]] * 2, window=(100, 0))[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_flops_are_of_what_is_kept_in_this_call(dynamic):
    x = torch.randn(2, 30, 32, 1, 8)
    found = jvpgraph.transform(OfAGrid(), backend="eager").explain(x, tangents={"x": x}, dynamic=dynamic)
    kept = 0
    for dense in (neighbourhoods((30, 32), 5), band(960, 958, 100, 0)):
        tiles = BlockMask.of_dense(dense[None, None])
        every = tiles._replace(map=-(tiles.map != HIDDEN).int(), partial=tiles.partial[:0])
        kept += int(every.dense(*dense.shape).sum())
    assert found.flops() == (2 * kept * 2 * (8 + 8), 2 * 2 * kept * 2 * (8 + 8))
    assert found.upper_bounds == 0
    assert sum("a block mask keeps" in meaning for meaning, _ in found.sizes.values()) == (2 if dynamic else 0)


@pytest.mark.parametrize("what", ["neighbourhoods", "a window"])
def test_memory(what):
    """Of masks, and of attention with them: no number of 16,384 x 16,384, which takes 268 MB as bytes."""
    n = 16_384
    x = torch.randn(1, n, 1, 8)
    if what == "a window":
        call, most = lambda: attend(x, x[:, :-1], x[:, :-1], window=(500, 0)), 0.25
    else:
        grid = x.unflatten(1, (16, 32, 32))
        call, most = lambda: neighborhood_attention(grid, grid, grid, (3, 5, 5)), 0.4
    assert peak_bytes(call) < most * n * n


def test_a_value_is_attention_itself():
    """Which has other kernels than its tangent: those of ATen do not take block masks."""
    options = {"kernel_size": 5}
    q = torch.randn(1, 2, 144, 16)
    got = attention(q, q, q, block_mask=grid_mask((12, 12), options))
    want = by_hand(*[q.double()] * 3, neighbourhoods((12, 12), **options))
    assert_equal([x.double() for x in got], list(want), 1e-6)
    assert math.isfinite(got[1].sum())
