"""Block sizes of the attention kernel, as data.

An entry is a tile that jvpgraph.kernels.gate compiles without a spill in its loop, or with three words at most, with
Triton 3.9.0 and 3.6.0 (but for those of the backward for masks with rows, which need only fit the memory): for Hopper
the fastest of those that were tried on an H100 (`make gpu`, benchmarks/results), for the others, which have run on no
GPU yet, the largest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BF16, FP32 = torch.bfloat16, torch.float32
MAX_HEAD_DIM = 256
Parts = tuple[int, ...]  # columns of each part of a head dim


class Blocks(NamedTuple):
    """What one program of the kernel works on, and with what."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    halves: bool = False  # a head dim of 2^n columns is taken in two halves
    v_width: int = MAX_HEAD_DIM  # columns of v per program, at most

    def split(self, head_dim: int, head_dim_v: int, least: int = 16) -> tuple[Parts, Parts, int]:
        """(WIDTHS, WIDTHS_V, SHARES) of the kernel, in parts of at least so many columns."""
        widths, v_width = parts_of_head_dim(head_dim, self.halves, least), max(self.v_width, least)
        if head_dim_v > v_width:
            return widths, (v_width,), -(-head_dim_v // v_width)
        return widths, parts_of_head_dim(head_dim_v, self.halves, least), 1

    def cut_stages(self, *widths: int) -> int:
        """Stages of the loop over key blocks that are masked, for parts of so many columns. One saves registers, but
        where blocks lie at addresses that do not change in a loop and parts are swizzled differently, ptxas 12.8 loses
        descriptors of wgmma: see jvpgraph.kernels.sass."""
        return 1 if len({min(width, 64) for width in widths}) == 1 else self.num_stages


def parts_of_head_dim(dim: int, halves: bool = False, least: int = 16) -> Parts:
    """dim up to the next multiple of `least` as one power of two or as two, the larger first, for forward and backward.

    What two powers of two do not sum up to is rounded up: 72 -> 64 + 16, 112 -> 128.
    """
    padded = max(least, -(-dim // least) * least)
    lo = 1 << (padded.bit_length() - 1)
    hi = padded - lo
    if hi:
        hi = max(least, 1 << (hi - 1).bit_length())
        if hi < lo:
            return lo, hi
        lo *= 2
    return (lo // 2, lo // 2) if halves and lo >= 2 * least else (lo,)


def least_columns(capability: int, head_dims: tuple[int, int], dtype: torch.dtype, is_pipelined: bool) -> int:
    """Columns that parts of the head dims of q and v must have for all of them to be swizzled alike, where they have
    to be: on Hopper, if blocks of keys come through registers, as some do by pointer, and not in a pipeline. See
    Blocks.cut_stages."""
    if capability != 90 or dtype == FP32 or is_pipelined:
        return 16
    return min(64, max(16, *(1 << (dim - 1).bit_length() for dim in head_dims)))


class Entry(NamedTuple):
    """What blocks are for."""

    arch: int
    head_dim: int  # the largest that they are for
    dtype: torch.dtype  # bfloat16 stands for both half types
    variant: str  # "jvp"; "forward", without tangents; "bias", with or without


def variant(active: bool, has_bias: bool) -> str:
    """The variant of an entry."""
    return "bias" if has_bias else "jvp" if active else "forward"


# Bytes per program, of the GPUs that tiles are for. Others take the next lower one's: 87 those of 86, 103 those of 100.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
LIKE_AMPERE = (86, 89, 120)  # the same matrix instructions in less shared memory, which all tiles for 80 fit

TABLE: dict[Entry, Blocks] = {
    # Ampere: two accumulators and two query tiles leave little room in 255 registers per thread
    Entry(80, 64, BF16, "jvp"): Blocks(128, 64, 8, 2),
    Entry(80, 80, BF16, "jvp"): Blocks(128, 32, 8, 2),
    Entry(80, 96, BF16, "jvp"): Blocks(128, 32, 8, 2),
    Entry(80, 128, BF16, "jvp"): Blocks(128, 16, 8, 2, halves=True),
    Entry(80, 192, BF16, "jvp"): Blocks(64, 16, 4, 2, v_width=64),
    Entry(80, 256, BF16, "jvp"): Blocks(64, 16, 4, 2, halves=True, v_width=64),
    Entry(80, 64, BF16, "forward"): Blocks(128, 64, 8, 2),
    Entry(80, 128, BF16, "forward"): Blocks(128, 64, 8, 2),
    Entry(80, 256, BF16, "forward"): Blocks(64, 32, 4, 2, v_width=128),
    Entry(80, 64, BF16, "bias"): Blocks(128, 32, 8, 2),
    Entry(80, 128, BF16, "bias"): Blocks(128, 16, 8, 2, halves=True),
    Entry(80, 256, BF16, "bias"): Blocks(64, 16, 4, 2, halves=True, v_width=64),
    # Hopper, as measured on an H100: with tangents 128 query rows for two warpgroups, fewer would double the traffic
    # from L2; without, 64 rows leave room for a second program, which works while the first waits. 256 columns in
    # halves, which an H100 has not run: whole, they spill
    Entry(90, 64, BF16, "jvp"): Blocks(128, 128, 8, 3),
    Entry(90, 80, BF16, "jvp"): Blocks(128, 64, 8, 3),
    Entry(90, 96, BF16, "jvp"): Blocks(128, 64, 8, 3),
    Entry(90, 128, BF16, "jvp"): Blocks(128, 64, 8, 2),
    Entry(90, 192, BF16, "jvp"): Blocks(128, 32, 8, 2, v_width=64),
    Entry(90, 256, BF16, "jvp"): Blocks(64, 32, 4, 2, halves=True, v_width=128),
    Entry(90, 64, BF16, "forward"): Blocks(64, 128, 4, 3),
    Entry(90, 128, BF16, "forward"): Blocks(64, 64, 4, 3),
    Entry(90, 256, BF16, "forward"): Blocks(128, 64, 8, 2),
    Entry(90, 64, BF16, "bias"): Blocks(128, 64, 8, 2),
    Entry(90, 128, BF16, "bias"): Blocks(128, 32, 8, 2),
    Entry(90, 256, BF16, "bias"): Blocks(64, 32, 4, 2, v_width=64),
    # Blackwell: scores and accumulators share 512 columns of tensor memory, of which
    # Triton 3.6 needs more than 3.9 does
    Entry(100, 64, BF16, "jvp"): Blocks(128, 64, 8, 2),
    Entry(100, 80, BF16, "jvp"): Blocks(128, 32, 8, 2),
    Entry(100, 96, BF16, "jvp"): Blocks(128, 32, 8, 2),
    Entry(100, 128, BF16, "jvp"): Blocks(128, 32, 8, 2),
    Entry(100, 192, BF16, "jvp"): Blocks(128, 32, 8, 2, v_width=64),
    Entry(100, 256, BF16, "jvp"): Blocks(128, 32, 8, 1, v_width=128),
    Entry(100, 64, BF16, "forward"): Blocks(128, 128, 8, 2),
    Entry(100, 128, BF16, "forward"): Blocks(128, 128, 8, 2),
    Entry(100, 256, BF16, "forward"): Blocks(128, 64, 8, 2),
    Entry(100, 64, BF16, "bias"): Blocks(128, 64, 8, 2),
    Entry(100, 128, BF16, "bias"): Blocks(128, 32, 8, 2),
    Entry(100, 256, BF16, "bias"): Blocks(128, 32, 8, 1, v_width=64),
}
for _arch in LIKE_AMPERE:
    TABLE |= {entry._replace(arch=_arch): blocks for entry, blocks in TABLE.items() if entry.arch == 80}
# float32 has no matrix units: each thread holds whole rows of q and q_dot, and beyond 64 columns they spill. Other
# tiles than these abort the compiler of Triton 3.9.0 in one of the kernel's variants.
for _arch in SHARED_MEMORY:
    TABLE[Entry(_arch, 64, FP32, "jvp")] = Blocks(32, 32, 8, 1)
    TABLE[Entry(_arch, 64, FP32, "forward")] = Blocks(32, 32, 8, 1)
    TABLE[Entry(_arch, 64, FP32, "bias")] = Blocks(32, 32, 8, 1, v_width=32 if _arch == 100 else MAX_HEAD_DIM)


class GluonBlocks(NamedTuple):
    """What the warpgroups of jvpgraph.kernels.attention_gluon take at a time: 64 queries each, and these keys."""

    block_k: int
    stages: int  # places for a block of keys, and for one of values


class GluonEntry(NamedTuple):
    """What GluonBlocks are for."""

    head_dim: int  # the largest that they are for, to which others are padded
    streamed: int  # tensors read block by block: k, v, and those of k_dot and v_dot that there are
    active: bool = True  # there is some tangent


GLUON_TABLE: dict[GluonEntry, GluonBlocks] = {
    GluonEntry(64, 2, active=False): GluonBlocks(128, 2),
    GluonEntry(64, 2): GluonBlocks(128, 3),
    GluonEntry(64, 3): GluonBlocks(128, 2),
    GluonEntry(64, 4): GluonBlocks(128, 2),
    GluonEntry(128, 2, active=False): GluonBlocks(128, 2),
    GluonEntry(128, 2): GluonBlocks(64, 4),
    GluonEntry(128, 3): GluonBlocks(64, 2),
    GluonEntry(128, 4): GluonBlocks(64, 2),
}

# (compute capability, head dim, dtype) where a GPU showed Gluon to be faster than the kernel of TABLE: an H100 at 48,
# 64, 72, 96 and 128 columns in bfloat16, at 64 and 128 in float16 (benchmarks/results). At the others both kernels pad
# to what they pad one of these to. At 32 columns Gluon was slower.
GLUON_IS_FASTER: frozenset[tuple[int, int, torch.dtype]] = frozenset(
    (90, head_dim, dtype) for head_dim in range(40, 129, 8) for dtype in (torch.bfloat16, torch.float16)
)
# The same of the value alone: faster where both pad to 128 columns, slower at 64, and not measured in between.
GLUON_VALUE_FROM = 104

# The interpreter takes as long for a small tile as for a large one.
INTERPRETER = Blocks(64, 64, 4, 1)


def max_head_dim(dtype: torch.dtype) -> int:
    """The largest head dim that the table has for dtype."""
    dtype = FP32 if dtype == FP32 else BF16
    return max(entry.head_dim for entry in TABLE if entry.dtype == dtype)


def _table_arch(capability: int) -> int:
    return max(arch for arch in SHARED_MEMORY if arch <= capability)


def choose_blocks(
    capability: int, head_dims: tuple[int, int], dtype: torch.dtype, kind: str, by_descriptor: bool
) -> Blocks:
    """The entry of the next larger head dim, for a compute capability such as 90; 0 is the interpreter.

    head_dims are those of q and of v. Where tensors cannot be loaded by descriptor (TMA), Hopper and Blackwell take
    the entries of Ampere.
    """  # which fit 99 KiB, see LIKE_AMPERE
    if capability == 0:
        return INTERPRETER
    dtype = FP32 if dtype == FP32 else BF16
    arch = _table_arch(capability)
    if not by_descriptor and dtype != FP32:
        arch = 80
    dims = [entry.head_dim for entry in TABLE if entry[0] == arch and entry[2:] == (dtype, kind)]
    blocks = TABLE[Entry(arch, min(dim for dim in dims if dim >= max(head_dims)), dtype, kind)]
    if arch == 100 and head_dims[0] != head_dims[1] and kind != "forward":
        # Triton 3.6 rounds the parts of both up to more tensor memory than there is
        blocks = blocks._replace(v_width=min(blocks.v_width, 64))
    return blocks


def gluon_blocks(head_dim: int, streamed: int, active: bool = True) -> tuple[int, GluonBlocks]:
    """The head dim as padded, and the entry for it."""
    padded = min(entry.head_dim for entry in GLUON_TABLE if entry.head_dim >= head_dim)
    return padded, GLUON_TABLE[GluonEntry(padded, streamed, active)]


# ------------------------------------------------------------------------------------------------ the backward


class BackwardBlocks(NamedTuple):
    """What one program of queries_kernel or keys_kernel of jvpgraph.kernels.backward_kernel works on."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool]:
        """As a launch takes them."""
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "STAGES": self.num_stages,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # the default until Triton 3.10
        }


class Sweeps(NamedTuple):
    """The blocks of each launch of the backward."""

    sums: BackwardBlocks
    queries: BackwardBlocks
    keys: BackwardBlocks
    values: BackwardBlocks | None = None  # dv and dv_dot in a launch of their own; None: with dk and dk_dot


B = BackwardBlocks


class BackwardEntry(NamedTuple):
    """What Sweeps are for."""

    arch: int
    head_dim: int  # the largest that they are for
    active: bool  # there is a cotangent of the tangent
    row_bytes: int = (
        4  # of an element of the largest mask with rows, [.., Lq, Lkv], that they have room for; 0: of none
    )


# A tile with tangents holds four weights beside the accumulators, so tiles are narrow. Where all is active at 128
# columns, Ampere has room for none: backward_blocked takes over. A mask with rows is staged through shared memory as
# keys and values are, one of padded keys, [.., 1, Lkv], is not: where the former does not fit, it has an entry.
BACKWARD_TABLE: dict[BackwardEntry, Sweeps] = {
    BackwardEntry(80, 64, False, 2): Sweeps(B(128, 64, 8, 3), B(128, 64, 8, 3), B(64, 128, 8, 3)),
    BackwardEntry(80, 64, False): Sweeps(B(128, 64, 8, 2), B(128, 64, 8, 2), B(64, 64, 4, 2)),
    BackwardEntry(80, 128, False, 0): Sweeps(B(128, 32, 8, 3), B(128, 32, 8, 3), B(32, 128, 8, 3)),
    BackwardEntry(80, 128, False): Sweeps(B(64, 32, 4, 3), B(64, 32, 4, 3), B(32, 64, 4, 2)),
    BackwardEntry(80, 64, True, 0): Sweeps(B(128, 32, 8, 3), B(128, 32, 8, 3), B(32, 128, 8, 2), B(32, 128, 8, 3)),
    BackwardEntry(80, 64, True): Sweeps(B(128, 32, 8, 2), B(128, 32, 8, 2), B(32, 128, 8, 2), B(32, 128, 8, 3)),
    BackwardEntry(90, 64, False): Sweeps(B(128, 64, 8, 3), B(128, 64, 8, 3), B(64, 128, 8, 2)),
    BackwardEntry(90, 128, False): Sweeps(B(128, 64, 8, 3), B(128, 64, 8, 3), B(32, 128, 8, 3)),
    BackwardEntry(90, 64, True): Sweeps(B(128, 64, 8, 3), B(128, 32, 8, 3), B(32, 128, 8, 2), B(64, 128, 8, 2)),
    BackwardEntry(90, 128, True, 0): Sweeps(B(128, 32, 8, 3), B(128, 16, 8, 2), B(16, 128, 8, 2), B(32, 128, 8, 2)),
    BackwardEntry(90, 128, True): Sweeps(B(128, 32, 8, 2), B(128, 16, 8, 2), B(16, 128, 8, 2), B(32, 128, 8, 2)),
    BackwardEntry(100, 64, False): Sweeps(B(128, 64, 8, 3), B(128, 64, 8, 3), B(64, 128, 8, 2)),
    BackwardEntry(100, 128, False): Sweeps(B(128, 64, 8, 2), B(128, 64, 8, 2), B(64, 128, 8, 2)),
    BackwardEntry(100, 64, True): Sweeps(B(128, 64, 8, 2), B(128, 32, 8, 2), B(32, 128, 8, 1), B(64, 128, 8, 1)),
    BackwardEntry(100, 128, True): Sweeps(B(128, 32, 8, 2), B(128, 16, 8, 2), B(16, 128, 8, 1), B(32, 128, 8, 1)),
}
for _arch in LIKE_AMPERE:
    BACKWARD_TABLE |= {entry._replace(arch=_arch): x for entry, x in BACKWARD_TABLE.items() if entry.arch == 80}
# On sm_120 wider tiles of dk and dv spill.
for _entry, _keys in (
    (BackwardEntry(120, 64, False, 2), B(32, 128, 8, 3)),
    (BackwardEntry(120, 128, False, 0), B(32, 64, 4, 2)),
):
    BACKWARD_TABLE[_entry] = BACKWARD_TABLE[_entry]._replace(keys=_keys)


def backward_sweeps(capability: int, head_dim: int, active: bool, row_bytes: int = 0) -> Sweeps | None:
    """The entry of the next larger head dim, and of the next larger mask, None if there is none; for a compute
    capability of 0, the interpreter's."""
    if capability == 0:
        return Sweeps(*(B(64, 64, 4, 1),) * 3) if head_dim <= 128 else None
    wanted = BackwardEntry(_table_arch(capability), head_dim, active, row_bytes)
    found = [x for x in BACKWARD_TABLE if x[::2] == wanted[::2] and x[1] >= wanted[1] and x[3] >= wanted[3]]
    return BACKWARD_TABLE[min(found)] if found else None
