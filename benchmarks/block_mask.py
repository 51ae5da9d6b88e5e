"""Attention and its JVP with a block mask, next to the same mask in bytes and to none: time follows the tiles kept.

python -m benchmarks.block_mask --length 8192 --kept 0.125
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Clock, Run, interleaved
from jvpgraph.kernels import block_mask
from jvpgraph.kernels.attention import attention_jvp
from jvpgraph.kernels.block_mask import BlockMask

TILE = 128


def masks(length: int, kept: float) -> dict[str, BlockMask]:
    """Of one kept share: tiles at random, tiles near the diagonal, and random ones of which each is cut."""
    n = length // TILE
    at = torch.arange(n)
    scattered = torch.rand(n, n, generator=torch.Generator().manual_seed(0)) < kept
    near = ((at[:, None] - at).abs() * 2 < kept * n)[None, None]
    nothing, some = torch.zeros(0, TILE, TILE, dtype=torch.bool), torch.rand(1, TILE, TILE) > 0.5
    scattered = scattered[None, None]
    return {
        "scattered": BlockMask(-scattered.int(), nothing),
        "near": BlockMask(-near.int(), nothing),
        "cut": BlockMask(scattered.int(), some),
    }


def runs_of(inputs: list[Tensor], dots: list[Tensor], **mask: Any) -> dict[str, Run]:
    """Forward with tangents, and the backward of its value and through its tangent."""
    xs = [x.clone().requires_grad_() for x in inputs]
    o, _, o_dot, _ = attention_jvp(*xs, *dots, **mask, differentiable_tangent=True)
    return {
        "jvp": lambda: attention_jvp(*inputs, *dots, **mask),
        "backward": lambda: torch.autograd.grad(o, xs, torch.ones_like(o), retain_graph=True),
        "through tangent": lambda: torch.autograd.grad(o_dot, xs, torch.ones_like(o), retain_graph=True),
    }


def main() -> None:
    """Print a line for each mask and each call, with its time as a share of that of the dense mask and of no mask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kept", type=float, default=1 / 8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    shape, dtype = (1, options.heads, options.length, 64), getattr(torch, options.dtype)
    inputs, dots = ([torch.randn(shape).to(options.device, dtype) for _ in range(3)] for _ in range(2))
    block_mask.PAIRS_TO_SUMMARIZE = math.inf  # bytes are what a dense mask is without its tiles
    none = runs_of(inputs, dots)
    for name, mask in masks(options.length, options.kept).items():
        mask = BlockMask(*(x.to(options.device) for x in mask))
        tiles = runs_of(inputs, dots, block_mask=mask)
        dense = runs_of(inputs, dots, bias=mask.dense(options.length, options.length))
        for call in tiles:
            runs = {"none": none[call], "dense": dense[call], "tiles": tiles[call]}
            times = interleaved(Clock(options.device), runs, least=3, most=5, warm_up=1)
            of_none, of_dense, of_tiles = (statistics.median(times[which]) for which in runs)
            print(
                f"{name:10s} {mask.kept():.3f} kept  {call:16s} none {of_none:7.3f} s  dense {of_dense:7.3f} s  "
                f"tiles {of_tiles:7.3f} s  {of_tiles / of_dense:.3f} of dense  {of_tiles / of_none:.3f} of none"
            )


if __name__ == "__main__":
    main()
