"""Block sizes of the attention kernel, as data."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_HEAD_DIM = 256


class Blocks(NamedTuple):
    """What one program of the kernel works on, and with what."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    halves: bool = False  # a head dim of 2^n columns is taken in two halves
    v_width: int = MAX_HEAD_DIM  # columns of v per program, at most

    def split(self, head_dim: int, head_dim_v: int) -> tuple[int, int, int, int, int]:
        """(D_LO, D_HI, V_LO, V_HI, V_PARTS) of the kernel."""
        d_lo, d_hi = split_head_dim(head_dim, self.halves)
        if head_dim_v > self.v_width:
            return d_lo, d_hi, self.v_width, 0, -(-head_dim_v // self.v_width)
        return d_lo, d_hi, *split_head_dim(head_dim_v, self.halves), 1


def split_head_dim(dim: int, halves: bool = False) -> tuple[int, int]:
    """dim up to the next multiple of 16 as two powers of two, the larger first; the second may be 0.

    What two powers of two do not sum up to is rounded up: 72 -> 64 + 16, 112 -> 128.
    """
    padded = max(16, -(-dim // 16) * 16)
    lo = 1 << (padded.bit_length() - 1)
    hi = padded - lo
    if hi:
        hi = max(16, 1 << (hi - 1).bit_length())
        if hi < lo:
            return lo, hi
        lo *= 2
    return (lo // 2, lo // 2) if halves and lo >= 32 else (lo, 0)


def choose_blocks(arch: int, head_dim: int, dtype: torch.dtype, moves: bool, by_descriptor: bool) -> Blocks:
    return Blocks(64, 64, 4, 1)
