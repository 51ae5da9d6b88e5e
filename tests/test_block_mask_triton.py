"""Block masks in the Triton kernels, against the implementation in blocks of torch ops: on a GPU, or interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("triton")

from triton.runtime import interpreter

from jvpgraph.kernels import attention_blocked, attention_triton, backward_blocked, backward_triton
from jvpgraph.kernels.block_mask import HIDDEN, BlockMask
from jvpgraph.kernels.blocks import BackwardBlocks, Blocks, Sweeps
from jvpgraph.kernels.call import Call, Cotangents, Place, Wanted
from jvpgraph.kernels.choose import plan
from jvpgraph.kernels.window import CAUSAL
from tests.interpreter import (  # noqa: F401 - fixtures
    DEVICE,
    INTERPRETED,
    poisoned_memory,
    repaired_bfloat16,
    runs_kernels,
)
from tests.test_block_mask import MODS

pytestmark = pytest.mark.usefixtures("repaired_bfloat16", "poisoned_memory")
TILE = (64, 32)
SMALL = Blocks(32, 32, 4, 2)
SWEEP = BackwardBlocks(32, 32, 4, 1)


def make_call(mod: str, *, active: bool = True, bias: bool = False, tile: tuple[int, int] = TILE) -> Call:
    """130 queries, of which two see nothing, and 195 keys; the mask of_heads has one for each batch entry and head."""
    own = (2, 2) if mod == "of_heads" else (None, None)
    mask = BlockMask.of(MODS[mod], 130, 195, batch=own[0], heads=own[1], tile=tile)
    q, k, v = (torch.randn(2, heads, n, 32) for heads, n in ((2, 130), (1, 195), (1, 195)))
    dots = [torch.randn_like(x) if active else None for x in (q, k, v)]
    given = [x if x is None else x.to(DEVICE) for x in (q, k, v, *dots, torch.randn(1, 1, 130, 195) if bias else None)]
    mask = BlockMask(*(x.to(DEVICE) for x in mask))
    return Call(*given, scale=0.2, block_mask=mask, wanted=Wanted(True, active))


def assert_equal(got: tuple[Tensor | None, ...], want: tuple[Tensor | None, ...]) -> None:
    for x, y in zip(got, want, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert_close(x, y, rtol=0, atol=1e-5 * float(y.nan_to_num(neginf=0).abs().max()))


@runs_kernels
@pytest.mark.parametrize(
    ("mod", "options"), [("of_heads", {}), ("frames", {"active": False}), ("frames", {"bias": True})]
)
def test_forward(mod, options):
    call = make_call(mod, **options)
    assert_equal(attention_triton.attend(call, blocks=SMALL), attention_blocked.attend(call))


@runs_kernels
@pytest.mark.parametrize(("mod", "options"), [("of_heads", {"bias": True}), ("documents", {"active": False})])
def test_backward(mod, options):
    call = make_call(mod, **options)
    outs = attention_blocked.attend(call)
    grads = Cotangents(*(None if x is None else torch.randn_like(x) for x in outs))
    got = backward_triton.differentiate(call, outs, grads, sweeps=Sweeps(SWEEP, SWEEP, SWEEP))
    assert_equal(got[:6], backward_blocked.differentiate(call, outs, grads)[:6])


@runs_kernels
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter, which counts products: make test-kernels")
def test_as_many_tiles_are_visited_as_are_kept(monkeypatch):
    products: list[Any] = []
    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, *args: (products.append(1), dot(self, *args))[1]
    )
    call = make_call("of_heads", active=False, tile=(32, 32))
    assert call.block_mask is not None
    kept = int((call.block_mask.map != HIDDEN).sum())
    assert 0 < kept < call.block_mask.map.numel()
    outs = attention_triton.attend(call, blocks=SMALL)
    assert len(products) == 2 * kept  # s and p v
    products.clear()
    grads = Cotangents(torch.randn_like(outs.o))
    backward_triton.differentiate(call, outs, grads, sweeps=Sweeps(SWEEP, SWEEP, SWEEP))
    assert len(products) == 7 * kept  # s, do v' and dq by queries; s, do v', dk and dv by keys


def test_blocks_divide_tiles():
    for blocks, tile, want in (
        (Blocks(128, 128, 8, 3), (128, 128), (128, 128, 8)),
        (Blocks(128, 128, 8, 3), (128, 64), (128, 64, 8)),
        (Blocks(128, 64, 8, 2), (64, 64), (64, 64, 4)),
        (Blocks(128, 64, 8, 2), (1560, 48), (8, 16, 4)),
    ):
        assert attention_triton.blocks_within(blocks, tile)[:3] == want


@pytest.mark.parametrize(
    ("tile", "window", "forward", "backward"),
    [
        ((128, 128), None, None, None),
        ((128, 128), CAUSAL, "no window beside", "no window beside"),
        ((100, 128), None, "multiples of 16", "divide"),
        ((16, 16), None, None, "divide"),
    ],
    ids=str,
)
def test_what_takes_a_call_on_hopper(tile, window, forward, backward):
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = meta(1, 2, 1280, 128)
    mask = BlockMask(meta(1, 1, -(-1280 // tile[0]), -(-1280 // tile[1]), dtype=torch.int32), meta(3, *tile).bool())
    call = Call(q, q, q, q, q, q, block_mask=mask, place=Place("cuda", 90), **({"window": window} if window else {}))
    found = plan(call)
    assert found.forward.name == ("Triton" if forward is None else "blocks of torch ops")
    assert forward is None or forward in found.why["Triton"]
    assert found.why["Gluon"] == "Gluon's takes no block mask" or forward
    assert found.backward.name == ("Triton" if backward is None and forward is None else "blocks of torch ops")
    assert backward is None or any(text in found.why_backward["Triton"] for text in (backward, str(forward)))
