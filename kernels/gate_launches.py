"""The launches that the gate looks at: of the entries of the block tables, and of calls with masks of all kinds.

What is recorded is what the host functions launch on meta tensors: see jvpgraph.kernels.recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from jvpgraph.kernels import attention_gluon, attention_triton, backward_triton, ops
from jvpgraph.kernels.blocks import (
    SHARED_MEMORY,
    BackwardBlocks,
    BackwardEntry,
    Blocks,
    GluonBlocks,
    Sweeps,
)
from jvpgraph.kernels.call import Call, Cotangents, How, Outputs, Wanted
from jvpgraph.kernels.recorded import Launch, memory, recording
from jvpgraph.kernels.tiles import ADDITIVE_BIAS, BOOLEAN_BIAS, NO_BIAS
from jvpgraph.kernels.window import Window

__all__ = [
    "CASES",
    "FULL_BIAS",
    "TENSOR_MEMORY",
    "VARIANTS",
    "Case",
    "Flags",
    "backward_launch",
    "forward_launch",
    "gluon_launch",
    "sweep_of",
    "sweeps_of",
    "too_large",
]

TENSOR_MEMORY = 512  # columns
HEADS, LENGTH_Q, LENGTH_KV = 4, 160, 192  # of which no launch depends
TILE = 128  # queries and keys of a tile of a block mask


class Flags(NamedTuple):
    """The variant of the kernel: which arguments there are."""

    has_q_dot: bool = True
    has_k_dot: bool = True
    has_v_dot: bool = True
    bias: int = NO_BIAS
    bias_has_rows: bool = False
    has_bias_dot: bool = False
    has_left: bool = False
    has_right: bool = False
    packed: bool = False


VARIANTS = {"jvp": Flags(), "forward": Flags(False, False, False), "bias": Flags(bias=BOOLEAN_BIAS)}
FULL_BIAS = Flags(bias=ADDITIVE_BIAS, bias_has_rows=True, has_bias_dot=True)


def meta_rows(dim: int, dtype: torch.dtype, length: int = LENGTH_Q, heads: int = HEADS, batch: int = 2) -> Tensor:
    """[batch, heads, length, dim] on meta, in memory as B, L, H, D."""
    return torch.empty(batch, length, heads, dim, dtype=dtype, device="meta").transpose(1, 2)


def _dots(flags: Flags, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return q if flags.has_q_dot else None, k if flags.has_k_dot else None, v if flags.has_v_dot else None


def forward_launch(
    arch: int,
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    blocks: Blocks,
    flags: Flags,
    by_descriptor: bool,
) -> Launch:
    """What attention_triton launches for a call of this variant, with these blocks. head_dims are those of q and v."""
    batch = 1 if flags.packed else 2
    q = meta_rows(head_dims[0], dtype, batch=batch)
    k, v = (meta_rows(dim, dtype, LENGTH_KV, batch=batch) for dim in head_dims)
    shape = (batch, HEADS, LENGTH_Q, LENGTH_KV) if flags.bias_has_rows else (batch, 1, 1, LENGTH_KV)
    of_bias = {NO_BIAS: None, BOOLEAN_BIAS: torch.bool, ADDITIVE_BIAS: torch.float32}[flags.bias]
    bias = None if of_bias is None else torch.empty(shape, dtype=of_bias, device="meta")
    window = Window(5 if flags.has_left else None, 0 if flags.has_right else None)
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    with recording(arch) as launches:
        dots, bias_dot = _dots(flags, q, k, v), bias if flags.has_bias_dot else None
        call = Call(q, k, v, *dots, bias, bias_dot, window, packing=(cu, cu) if flags.packed else None)
        attention_triton.attend(call, blocks=blocks, by_descriptor=by_descriptor)
    (launch,) = launches
    return launch


def gluon_launch(head_dim: int, dtype: torch.dtype, blocks: GluonBlocks, flags: Flags) -> Launch:
    """What attention_gluon launches on Hopper for a call of this variant, with these blocks."""
    q, k, v = (meta_rows(head_dim, dtype) for _ in range(3))
    with recording(90) as launches:
        attention_gluon.attend(Call(q, k, v, *_dots(flags, q, k, v)), blocks=blocks)
    (launch,) = launches
    return launch


def backward_launch(entry: BackwardEntry, sweep: str, blocks: BackwardBlocks) -> Launch:
    """What backward_triton launches as this sweep, without a mask."""
    q, lse = meta_rows(entry.head_dim, torch.bfloat16), torch.empty(2, HEADS, LENGTH_Q, device="meta")
    k = meta_rows(entry.head_dim, torch.bfloat16, LENGTH_KV)
    sweeps = Sweeps(blocks, blocks, blocks, blocks if sweep in ("keys", "values") else None)
    with recording(entry.arch) as launches:
        if entry.active:
            call = Call(q, k, k, q, k, k, wanted=Wanted(True, True))
            grads, outs = Cotangents(q, lse, q, lse), Outputs(q, lse, q, lse)
        else:
            call = Call(q, k, k, wanted=Wanted(True))
            grads, outs = Cotangents(q, lse), Outputs(q, lse)
        backward_triton.differentiate(call, outs, grads, sweeps=sweeps)
    return next(launch for launch in launches if sweep_of(launch) == sweep)


def sweep_of(launch: Launch) -> str:
    """What a launch of the backward gives."""
    flags = launch.constants
    if launch.name == "queries_kernel":
        return "sums" if flags["SUMS"] else "queries"
    return " and ".join(name for name, flag in (("keys", "HAS_DK"), ("values", "HAS_DV")) if flags[flag])


def sweeps_of(entry: BackwardEntry, sweeps: Sweeps) -> dict[str, BackwardBlocks]:
    """The launches of an entry that have a loop, by name."""
    found = {"sums": sweeps.sums} if entry.active else {}
    found |= {"queries": sweeps.queries, "keys" if sweeps.values else "keys and values": sweeps.keys}
    return found | ({"values": sweeps.values} if sweeps.values else {})


# ---------------------------------------------------------------------------------------------------- calls of the ops

MASKS: dict[str, tuple[torch.dtype, int] | None] = {  # dtype and length
    "no mask": None,
    "tiles": None,
    "padding": (torch.bool, 1),
    "fp32 padding": (torch.float32, 1),
    "bool rows": (torch.bool, LENGTH_Q),
    "half rows": (torch.bfloat16, LENGTH_Q),
    "fp32 rows": (torch.float32, LENGTH_Q),
}


class Case(NamedTuple):
    """A call of an op of ours whose launches must fit."""

    way: str  # "value" and "tangent", forward or "d value" and "d tangent", backward
    head_dim: int
    mask: str
    is_causal: bool = False
    dtype: torch.dtype = torch.bfloat16
    is_expanded: bool = False  # keys and values without a batch of their own, which no descriptor takes

    def launches(self, arch: int) -> list[Launch]:
        """Of the call with heads grouped or not, and with a gradient of the logsumexp or not, each once."""
        with recording(arch) as launches:
            for kv_heads, has_lse_grad in itertools.product((HEADS, HEADS // 2), (False, True)):
                self._run(kv_heads, has_lse_grad)
        return list({launch.key: launch for launch in launches}.values())

    def _run(self, kv_heads: int, has_lse_grad: bool) -> None:
        q = meta_rows(self.head_dim, self.dtype)
        k = meta_rows(self.head_dim, self.dtype, LENGTH_KV, kv_heads)
        if self.is_expanded:
            k = k[:1].expand_as(k)
        lse, bias, of_mask = torch.empty(2, HEADS, LENGTH_Q, device="meta"), None, MASKS[self.mask]
        if of_mask is not None:
            shape = (2, 1, 1, LENGTH_KV) if of_mask[1] == 1 else (2, HEADS, LENGTH_Q, LENGTH_KV)
            bias = torch.empty(shape, dtype=of_mask[0], device="meta")
        bias_dot = bias if bias is not None and bias.is_floating_point() else None
        dots, biases = (q, k, k), (bias, bias_dot)
        lse_grad = lse if has_lse_grad else None
        args = {
            "value": ("attention", (q, k, k, bias)),
            "tangent": ("attention_jvp", (q, k, k, *dots, *biases)),
            "d value": ("attention_backward", (q, lse_grad, q, k, k, bias, q, lse)),
            "d tangent": (
                "attention_jvp_backward",
                (q, lse_grad, q, lse, q, k, k, *dots, bias, None, q, lse, q, lse),
            ),
        }
        op, tensors = args[self.way]
        blocks: tuple[Tensor | None, Tensor | None] = None, None
        if self.mask == "tiles":
            rows, columns = (-(-length // TILE) for length in (LENGTH_Q, LENGTH_KV))
            block_map = torch.empty(1, HEADS, rows, columns, dtype=torch.int32, device="meta")
            blocks = block_map, torch.empty(3, TILE, TILE, dtype=torch.bool, device="meta")
        ops.REAL[op](*tensors, *How(self.is_causal, None, None, None, None, *blocks))

    def __str__(self) -> str:
        notes = ("causal" * self.is_causal, "expanded" * self.is_expanded, "fp32" * (self.dtype == torch.float32))
        return ", ".join((f"{self.way} {self.head_dim}", self.mask, *filter(None, notes)))


def _cases() -> Iterator[Case]:
    head_dims = {"d value": (64, 128), "d tangent": (64, 128), "value": (64, 128), "tangent": (64, 128, 256)}
    for (way, of_way), mask in itertools.product(head_dims.items(), MASKS):
        for head_dim in of_way:
            yield Case(way, head_dim, mask)
            if mask == "bool rows":  # a window takes no memory
                yield Case(way, head_dim, mask, is_causal=True)
    parts = {"d value": (72, 96), "d tangent": (72, 96), "value": (256,), "tangent": (96, 192)}
    for way, of_way in parts.items():  # several parts of the head dim, or of v
        for head_dim in of_way:
            yield Case(way, head_dim, "fp32 rows")
    for head_dim, mask in itertools.product((64, 128), ("no mask", "fp32 rows")):
        yield Case("tangent", head_dim, mask, is_expanded=True)
    for mask in ("no mask", "fp32 rows"):
        yield Case("tangent", 64, mask, dtype=torch.float32)


CASES = tuple(_cases())


def too_large(case: Case, archs: tuple[int, ...]) -> tuple[dict[int, dict[str, int]], list[str]]:
    """The bytes of shared memory that each launch of the case takes, by architecture, and what does not fit."""
    sizes: dict[int, dict[str, int]] = {}
    violations, known = [], {}
    for arch in archs:
        sizes[arch] = {}
        for launch in case.launches(arch):
            key = launch.key
            if key not in known:
                known[key] = memory(launch)
            shared, tensor_memory = known[key]
            name = sweep_of(launch) if "backward" in launch.source.fn.__module__ else "forward"
            sizes[arch][name] = max(shared, sizes[arch].get(name, 0))
            if shared > SHARED_MEMORY[arch]:
                violations.append(f"sm_{arch}, {name}: shared memory {shared} of {SHARED_MEMORY[arch]} bytes")
            if tensor_memory > TENSOR_MEMORY:
                violations.append(f"sm_{arch}, {name}: tensor memory {tensor_memory} of {TENSOR_MEMORY} columns")
    return sizes, violations
