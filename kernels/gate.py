"""What the attention kernels become on GPUs that are not here: compiled ahead of time, read off the binary.

    python -m jvpgraph.kernels.gate [--arch 90] [--table forward | backward | launches] [--jobs 2]

What is compiled is what the host functions launch: jvpgraph.kernels.recorded runs them on meta tensors. Every entry of
the block tables is compiled by Triton for its architecture and must
    keep its registers: no load from or store to local memory in the loop over whole key blocks (but for RELOADS),
    run its wgmma asynchronously: ptxas says so (C7510 to C7515) where it does not,
    find all operands of wgmma: some versions of ptxas lose descriptors (jvpgraph.kernels.sass),
    fit the shared memory, and on Blackwell the tensor memory,
    issue as many matrix instructions per key block as the products need: none replicated, none on other units.
The entries for a bias are compiled for the mask of padded keys. The masked loop over the last key blocks runs once per
program and may spill. The same holds for the table of the Gluon kernel, for the loops of both warpgroups, and for that
of the backward, whose launches are named after what they give (a dot: with the gradients of tangents).

Every launch of the calls of CALLS, forward and backward with masks of all kinds, must fit the shared and the tensor
memory: for that it is compiled as far as it has any. With masks that have rows, some spill.

Registers and spills depend on the version of ptxas that Triton brings, so this is to be run with the version that will
run the kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from jvpgraph.kernels import attention_gluon, attention_triton, backward_triton, ops
from jvpgraph.kernels.attention_kernel import ADDITIVE_BIAS, BOOLEAN_BIAS, NO_BIAS
from jvpgraph.kernels.blocks import (
    BACKWARD_TABLE,
    GLUON_TABLE,
    SHARED_MEMORY,
    TABLE,
    BackwardBlocks,
    BackwardEntry,
    Blocks,
    Entry,
    GluonBlocks,
    GluonEntry,
    Sweeps,
    backward_sweeps,
    parts_of_head_dim,
)
from jvpgraph.kernels.recorded import Launch, memory, recording
from jvpgraph.kernels.sass import Instruction, disassemble, inner_loops, is_product, main_loop, wrong_descriptors
from jvpgraph.kernels.window import EVERYTHING, Window

__all__ = [
    "CALLS",
    "Call",
    "Report",
    "check",
    "check_backward",
    "check_gluon",
    "compile_ahead",
    "compile_gluon",
    "main",
    "too_large",
]

TENSOR_MEMORY = 512  # columns
RELOADS = 2  # words that a loop of float32, on ordinary units, or of the backward may load again: some have one
GLUON_REGISTERS = 240  # per thread of the two warpgroups that multiply
TYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Report(NamedTuple):
    """One compiled variant of the kernel, and what is wrong with it."""

    registers: int
    spilled: int  # bytes stored, in the whole kernel
    local: int  # instructions on local memory in the loop over whole key blocks
    products: int  # matrix instructions in that loop
    expected: int
    instructions: int
    shared: int
    tensor_memory: int
    seconds: float
    violations: tuple[str, ...]


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


def compile_ahead(
    arch: int,
    head_dim: int,
    head_dim_v: int,
    dtype: torch.dtype,
    blocks: Blocks,
    flags: Flags,
    by_descriptor: bool,
) -> tuple[Any, str]:
    """The compiled kernel, and what ptxas said."""
    return _compile(forward_launch(arch, head_dim, head_dim_v, dtype, blocks, flags, by_descriptor))


def compile_gluon(head_dim: int, dtype: torch.dtype, blocks: GluonBlocks, flags: Flags) -> tuple[Any, str]:
    """The compiled Gluon kernel, for Hopper, and what ptxas said."""
    q, k, v = (meta_rows(head_dim, dtype) for _ in range(3))
    dots = _dots(flags, q, k, v)
    with recording(90) as launches:
        if any(x is not None for x in dots):
            attention_gluon.attention_jvp(q, k, v, *dots, None, None, EVERYTHING, 1.0, blocks=blocks)
        else:
            attention_gluon.attention(q, k, v, None, EVERYTHING, 1.0, blocks=blocks)
    (launch,) = launches
    assert launch.name == "attention_jvp_kernel", launch.name
    return _compile(launch)


def _compile(launch: Launch) -> tuple[Any, str]:
    log = io.StringIO()
    with (
        _knob(triton.knobs.nvidia, "dump_ptxas_log"),
        _knob(triton.knobs.compilation, "always_compile"),
        contextlib.redirect_stdout(log),
    ):
        compiled = triton.compile(launch.source, target=launch.target, options=launch.options)
    return compiled, log.getvalue()


def check(entry: Entry, blocks: Blocks, flags: Flags | None = None) -> Report:
    """Compile one entry of the block table, or another variant with its blocks, and say what is wrong with it."""
    started = time.time()
    flags = VARIANTS[entry.variant] if flags is None else flags
    by_descriptor = entry.arch >= 90 and entry.dtype != torch.float32
    compiled, log = compile_ahead(entry.arch, entry.head_dim, entry.head_dim, entry.dtype, blocks, flags, by_descriptor)
    code = disassemble(compiled.asm["cubin"])
    loop = main_loop(code)
    local = sum(x.opcode.startswith(("LDL", "STL")) for x in loop)
    products = sum(map(is_product, loop))
    expected = expected_products(entry, blocks, flags)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    registers = _number(r"Used (\d+) registers", log)
    shared = compiled.metadata.shared
    few = entry.dtype == torch.float32 and local <= RELOADS
    violations = _violations(code, loop, 0 if few else local, log, shared, entry.arch, tensor_memory)
    if products != expected:
        violations.append(f"{products} matrix instructions per key block instead of {expected}")
    return Report(
        registers,
        _number(r"(\d+) bytes spill stores", log),
        local,
        products,
        expected,
        len(loop),
        shared,
        tensor_memory,
        time.time() - started,
        tuple(violations),
    )


def check_gluon(entry: GluonEntry, blocks: GluonBlocks) -> Report:
    """As check, of the Gluon kernel: registers are those that its loops use, of the 240 that a warpgroup has."""
    started = time.time()
    flags = Flags(entry.moves, has_k_dot=entry.streamed > 3, has_v_dot=entry.streamed > 2)
    compiled, log = compile_gluon(entry.head_dim, torch.bfloat16, blocks, flags)
    code = disassemble(compiled.asm["cubin"])
    loops = inner_loops(code)
    local = sum(x.opcode.startswith(("LDL", "STL")) for loop in loops for x in loop)
    products = [sum(map(is_product, loop)) for loop in loops]
    on_keys, on_values = 1 + entry.moves + flags.has_k_dot, 1 + entry.moves + flags.has_v_dot
    expected = entry.head_dim // 16 * on_keys + blocks.block_k // 16 * on_values  # m64, n as wide as the tile, k16
    operands = " ".join(operand for loop in loops for x in loop for operand in x.operands)
    used = [int(number) + 1 for number in re.findall(r"\bR(\d+)", operands)]
    registers = max(used, default=0)
    granted = [int(x.operands[-1], 16) for x in code if x.opcode.startswith("USETMAXREG")]
    shared = compiled.metadata.shared
    violations = []
    if len(loops) != 2:
        violations.append(f"{len(loops)} loops over keys in the binary instead of one for each warpgroup")
    if local:
        violations.append(f"{local} spills in the loops")
    if notes := sorted(set(re.findall(r"\((C75\d\d)\)", log))):
        violations.append(f"wgmma is serialised, or setmaxnreg ignored: {', '.join(notes)}")
    if granted.count(GLUON_REGISTERS) < 2 or registers > GLUON_REGISTERS:
        violations.append(f"{registers} registers used, and {granted} granted")
    violations += _lost_operands(code)
    if shared > SHARED_MEMORY[90]:
        violations.append(f"shared memory {shared} of {SHARED_MEMORY[90]} bytes")
    if any(found != expected for found in products):
        violations.append(f"{products} matrix instructions per key block instead of {expected}")
    return Report(
        registers,
        _number(r"(\d+) bytes spill stores", log),
        local,
        max(products, default=0),
        expected,
        max(map(len, loops), default=0),
        shared,
        0,
        time.time() - started,
        tuple(violations),
    )


def check_backward(entry: BackwardEntry, sweep: str, blocks: BackwardBlocks) -> Report:
    """As check, of one launch of the backward: "sums", "queries", "keys", "values", or "keys and values"."""
    started = time.time()
    compiled, log = _compile(backward_launch(entry, sweep, blocks))
    code = disassemble(compiled.asm["cubin"])
    loop = main_loop(code)
    local = sum(x.opcode.startswith(("LDL", "STL")) for x in loop)
    products = sum(map(is_product, loop))
    expected = expected_backward_products(entry, sweep, blocks)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    spills = 0 if local <= RELOADS else local
    violations = _violations(code, loop, spills, log, compiled.metadata.shared, entry.arch, tensor_memory)
    if products != expected:
        violations.append(f"{products} matrix instructions per block instead of {expected}")
    return Report(
        _number(r"Used (\d+) registers", log),
        _number(r"(\d+) bytes spill stores", log),
        local,
        products,
        expected,
        len(loop),
        compiled.metadata.shared,
        tensor_memory,
        time.time() - started,
        tuple(violations),
    )


def _violations(
    code: list[Instruction],
    loop: list[Instruction],
    local: int,
    log: str,
    shared: int,
    arch: int,
    tensor_memory: int,
) -> list[str]:
    """What no kernel of tl may do."""
    violations = []
    if not loop:
        violations.append("no loop over keys in the binary")
    if local:
        violations.append(f"{local} spills in the loop")
    if notes := serialised(log):
        violations.append(f"wgmma is serialised: {', '.join(notes)}")
    violations += _lost_operands(code)
    if shared > SHARED_MEMORY[arch]:
        violations.append(f"shared memory {shared} of {SHARED_MEMORY[arch]} bytes")
    if tensor_memory > TENSOR_MEMORY:
        violations.append(f"tensor memory {tensor_memory} of {TENSOR_MEMORY} columns")
    return violations


def serialised(log: str) -> list[str]:
    """The notes of ptxas that wgmma does not run asynchronously."""
    return sorted(set(re.findall(r"\((C751[0-5])\)", log)))


def _lost_operands(code: list[Instruction]) -> list[str]:
    wrong = wrong_descriptors(code)
    return [f"{len(wrong)} products read by a wrong descriptor, the first at {wrong[0].address:#x}"] if wrong else []


def _by_warps(arch: int) -> bool:
    """Whether matrices are multiplied by single warps, as on Ampere."""
    return arch < 90 or arch >= 120


def expected_products(entry: Entry, blocks: Blocks, flags: Flags) -> int:
    """Matrix instructions that one warp (on Hopper one warpgroup, on sm_100 the program) issues per key block."""
    if entry.dtype == torch.float32:
        return 0  # multiplied as float32, on the ordinary units
    d_lo, d_hi, v_lo, v_hi, _ = blocks.split(entry.head_dim, entry.head_dim)
    s_moves = flags.has_q_dot or flags.has_k_dot or flags.has_bias_dot
    on_keys = 1 + flags.has_q_dot + flags.has_k_dot
    on_values = 1 + s_moves + flags.has_v_dot
    depth_d, depth_k = (d_lo + d_hi) // 16, blocks.block_k // 16
    if _by_warps(entry.arch):  # m16 n8 k16
        tiles = (blocks.block_k // 8) * depth_d * on_keys + ((v_lo + v_hi) // 8) * depth_k * on_values
        return blocks.block_q // 16 * tiles // blocks.num_warps
    parts = 2 if v_hi else 1
    per_row_block = depth_d * on_keys + parts * depth_k * on_values
    if entry.arch < 100:  # m64, n as wide as the tile, k16
        return blocks.block_q // 64 * per_row_block // (blocks.num_warps // 4)
    return blocks.block_q // min(blocks.block_q, 128) * per_row_block  # m64 or m128, n as wide as the tile, k16


def expected_backward_products(entry: BackwardEntry, sweep: str, blocks: BackwardBlocks) -> int:
    """As expected_products, of one launch of the backward where all or nothing moves."""
    widths, moves = parts_of_head_dim(entry.head_dim), entry.moves
    by_key = sweep not in ("sums", "queries")
    rows, columns = (blocks.block_k, blocks.block_q) if by_key else (blocks.block_q, blocks.block_k)
    scores, of_grads = (3, 3) if moves else (1, 1)
    each = 3 if moves else 1  # products that a gradient and that of its tangent take
    weights = scores if sweep == "values" else scores + of_grads
    outputs = {"sums": 0, "queries": each, "keys": each, "values": each}.get(sweep, 2 * each)
    if _by_warps(entry.arch):
        tiles = weights * columns // 8 * sum(widths) // 16 + outputs * sum(widths) // 8 * columns // 16
        return rows // 16 * tiles // blocks.num_warps
    per_row_block = weights * sum(widths) // 16 + outputs * len(widths) * columns // 16
    if entry.arch < 100:
        return rows // 64 * per_row_block // (blocks.num_warps // 4)
    return rows // min(rows, 128) * per_row_block


# -------------------------------------------------------------------------------------------------- recording

HEADS, LENGTH_Q, LENGTH_KV = 4, 160, 192  # of which no launch depends


def meta_rows(dim: int, dtype: torch.dtype, length: int = LENGTH_Q, heads: int = HEADS, batch: int = 2) -> Tensor:
    """[batch, heads, length, dim] on meta, in memory as B, L, H, D."""
    return torch.empty(batch, length, heads, dim, dtype=dtype, device="meta").transpose(1, 2)


def _dots(flags: Flags, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return q if flags.has_q_dot else None, k if flags.has_k_dot else None, v if flags.has_v_dot else None


def forward_launch(
    arch: int,
    head_dim: int,
    head_dim_v: int,
    dtype: torch.dtype,
    blocks: Blocks,
    flags: Flags,
    by_descriptor: bool,
) -> Launch:
    """What attention_triton launches for a call of this variant, with these blocks."""
    batch = 1 if flags.packed else 2
    q = meta_rows(head_dim, dtype, batch=batch)
    k, v = (meta_rows(dim, dtype, LENGTH_KV, batch=batch) for dim in (head_dim, head_dim_v))
    shape = (batch, HEADS, LENGTH_Q, LENGTH_KV) if flags.bias_has_rows else (batch, 1, 1, LENGTH_KV)
    of_bias = {NO_BIAS: None, BOOLEAN_BIAS: torch.bool, ADDITIVE_BIAS: torch.float32}[flags.bias]
    bias = None if of_bias is None else torch.empty(shape, dtype=of_bias, device="meta")
    window = Window(5 if flags.has_left else None, 0 if flags.has_right else None)
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    with recording(arch) as launches:
        attention_triton.attention_jvp(
            q,
            k,
            v,
            *_dots(flags, q, k, v),
            bias,
            bias if flags.has_bias_dot else None,
            window,
            1.0,
            cu_seqlens=(cu, cu) if flags.packed else None,
            blocks=blocks,
            by_descriptor=by_descriptor,
        )
    (launch,) = launches
    return launch


def backward_launch(entry: BackwardEntry, sweep: str, blocks: BackwardBlocks) -> Launch:
    """What backward_triton launches as this sweep, without a mask."""
    q, lse = meta_rows(entry.head_dim, torch.bfloat16), torch.empty(2, HEADS, LENGTH_Q, device="meta")
    k = meta_rows(entry.head_dim, torch.bfloat16, LENGTH_KV)
    o_dot_grad, lse_dot_grad = (q, lse) if entry.moves else (None, None)
    q_dot, k_dot = (q, k) if entry.moves else (None, None)
    lse_dot = lse if entry.moves else None
    sweeps = Sweeps(blocks, blocks, blocks, blocks if sweep in ("keys", "values") else None)
    with recording(entry.arch) as launches:
        backward_triton.attention_jvp_backward(
            q,
            lse,
            o_dot_grad,
            lse_dot_grad,
            q,
            k,
            k,
            q_dot,
            k_dot,
            k_dot,
            None,
            q,
            lse,
            lse_dot,
            EVERYTHING,
            1.0,
            sweeps=sweeps,
        )
    return next(launch for launch in launches if sweep_of(launch) == sweep)


def sweep_of(launch: Launch) -> str:
    """What a launch of the backward gives."""
    flags = launch.constants
    if launch.name == "queries_kernel":
        return "sums" if flags["SUMS"] else "queries"
    return " and ".join(name for name, flag in (("keys", "HAS_DK"), ("values", "HAS_DV")) if flags[flag])


@contextlib.contextmanager
def _knob(owner: Any, name: str) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, True)
    try:
        yield
    finally:
        setattr(owner, name, before)


# -------------------------------------------------------------------------------------------------- reading


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _row(entry: Entry, blocks: Blocks, report: Report) -> str:
    tile = f"{blocks.block_q}x{blocks.block_k}"
    compiled = f"{entry.variant:>7} {tile:>8} {blocks.num_warps:>5} {blocks.num_stages:>6}"
    return f"{entry.arch:>4} {entry.head_dim:>4} {TYPE[entry.dtype]:>5} {compiled} | {_figures(report)}"


def _gluon_row(entry: GluonEntry, blocks: GluonBlocks, report: Report) -> str:
    tile = f"2x64x{blocks.block_k}"
    kind = f"gluon {entry.streamed}" if entry.moves else "gluon v"
    compiled = f"{kind:>7} {tile:>8} {'8 + 1':>5} {blocks.stages:>6}"
    return f"{90:>4} {entry.head_dim:>4} {TYPE[torch.bfloat16]:>5} {compiled} | {_figures(report)}"


def launches(entry: BackwardEntry, sweeps: Sweeps) -> dict[str, BackwardBlocks]:
    """The launches of an entry that have a loop, by name."""
    found = {"sums": sweeps.sums} if entry.moves else {}
    found |= {"queries": sweeps.queries, "keys" if sweeps.values else "keys and values": sweeps.keys}
    return found | ({"values": sweeps.values} if sweeps.values else {})


def _backward_row(entry: BackwardEntry, sweep: str, blocks: BackwardBlocks, report: Report) -> str:
    tile = f"{blocks.block_q}x{blocks.block_k}"
    name = {"queries": "d q", "keys": "d k", "values": "d v", "keys and values": "d k,v"}.get(sweep, sweep)
    compiled = f"{name + '.' * entry.moves:>7} {tile:>8} {blocks.num_warps:>5} {blocks.num_stages:>6}"
    return f"{entry.arch:>4} {entry.head_dim:>4} {TYPE[torch.bfloat16]:>5} {compiled} | {_figures(report)}"


def _figures(report: Report) -> str:
    size = f"{report.registers:>4} {report.spilled:>6} {report.shared:>7} {report.tensor_memory:>5}"
    loop = f"{report.local:>5} {report.products:>4} {report.instructions:>6}"
    return f"{size} | {loop} | {report.seconds:>5.1f}  " + ("; ".join(report.violations) or "ok")


# -------------------------------------------------------------------------------------------------- all launches

MASKS: dict[str, tuple[torch.dtype, int] | None] = {  # dtype and length
    "no mask": None,
    "padding": (torch.bool, 1),
    "fp32 padding": (torch.float32, 1),
    "bool rows": (torch.bool, LENGTH_Q),
    "half rows": (torch.bfloat16, LENGTH_Q),
    "fp32 rows": (torch.float32, LENGTH_Q),
}


class Call(NamedTuple):
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
        how, lse_grad = ops.How(is_causal=self.is_causal), lse if has_lse_grad else None
        if self.way == "value":
            ops._attention_real(q, k, k, bias, *how)
        elif self.way == "tangent":
            ops._attention_jvp_real(q, k, k, q, k, k, bias, bias_dot, *how)
        elif self.way == "d value":
            ops._attention_backward_real(q, lse_grad, q, k, k, bias, q, lse, *how)
        else:
            grads, dots = (q, lse_grad, q, lse), (q, k, k)
            ops._attention_jvp_backward_real(*grads, q, k, k, *dots, bias, None, q, lse, q, lse, *how)

    def __str__(self) -> str:
        notes = ("causal" * self.is_causal, "expanded" * self.is_expanded, "fp32" * (self.dtype == torch.float32))
        return ", ".join((f"{self.way} {self.head_dim}", self.mask, *filter(None, notes)))


def _calls() -> Iterator[Call]:
    head_dims = {"d value": (64, 128), "d tangent": (64, 128), "value": (64, 128), "tangent": (64, 128, 256)}
    for (way, of_way), mask in itertools.product(head_dims.items(), MASKS):
        for head_dim in of_way:
            yield Call(way, head_dim, mask)
            if mask == "bool rows":  # a window takes no memory
                yield Call(way, head_dim, mask, is_causal=True)
    parts = {"d value": (72, 112), "d tangent": (72, 112), "value": (256,), "tangent": (96, 192)}
    for way, of_way in parts.items():  # several parts of the head dim, or of v
        for head_dim in of_way:
            yield Call(way, head_dim, "fp32 rows")
    for head_dim, mask in itertools.product((64, 128), ("no mask", "fp32 rows")):
        yield Call("tangent", head_dim, mask, is_expanded=True)
    for mask in ("no mask", "fp32 rows"):
        yield Call("tangent", 64, mask, dtype=torch.float32)


CALLS = tuple(_calls())


def too_large(call: Call, archs: tuple[int, ...]) -> tuple[dict[int, dict[str, int]], list[str]]:
    """The bytes of shared memory that each launch of the call takes, by architecture, and what does not fit."""
    sizes: dict[int, dict[str, int]] = {}
    violations, known = [], {}
    for arch in archs:
        sizes[arch] = {}
        for launch in call.launches(arch):
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


# -------------------------------------------------------------------------------------------------- command


def _check_entry(entry: Entry, blocks: Blocks) -> tuple[str, bool]:
    report = check(entry, blocks)
    return _row(entry, blocks, report), not report.violations


def _check_gluon_entry(entry: GluonEntry, blocks: GluonBlocks) -> tuple[str, bool]:
    report = check_gluon(entry, blocks)
    return _gluon_row(entry, blocks, report), not report.violations


def _check_launch(entry: BackwardEntry, sweep: str, blocks: BackwardBlocks) -> tuple[str, bool]:
    report = check_backward(entry, sweep, blocks)
    return _backward_row(entry, sweep, blocks, report), not report.violations


def _check_call(call: Call, archs: tuple[int, ...]) -> tuple[str, bool]:
    started = time.time()
    sizes, violations = too_large(call, archs)
    found = "; ".join(
        f"sm_{arch} " + (", ".join(f"{name} {size}" for name, size in launches.items()) or "no kernel of ours")
        for arch, launches in sizes.items()
    )
    return f"{call}: {found} | {time.time() - started:>5.1f}  " + ("; ".join(violations) or "ok"), not violations


def jobs(archs: tuple[int, ...], tables: tuple[str, ...]) -> list[Callable[[], tuple[str, bool]]]:
    """What the command checks; each gives a line, and whether all is well. 86 has the tiles and the instructions of 89:
    beside it, its entries are not assembled again."""
    of_tables = [arch for arch in archs if arch != 86 or 89 not in archs]
    found: list[Callable[[], tuple[str, bool]]] = []
    if "forward" in tables:
        found += [partial(_check_entry, *item) for item in TABLE.items() if item[0].arch in of_tables]
        found += [partial(_check_gluon_entry, *item) for item in GLUON_TABLE.items() if 90 in archs]
    for entry, sweeps in BACKWARD_TABLE.items() if "backward" in tables else ():
        if entry.arch in of_tables and backward_sweeps(*entry[:3]) == sweeps:  # not for masks with rows alone
            found += [partial(_check_launch, entry, sweep, blocks) for sweep, blocks in launches(entry, sweeps).items()]
    groups = [tuple(arch for arch in archs if arch < 90), *((arch,) for arch in archs if arch >= 90)]  # see Launch.key
    if "launches" in tables:
        found += [partial(_check_call, call, group) for group in groups if group for call in CALLS]
    return found


def _do(job: Callable[[], tuple[str, bool]]) -> tuple[str, bool]:
    return job()


def main(arguments: list[str] | None = None) -> int:
    """Check the tables and the launches, print a line for each, return the number of lines with something wrong."""
    parser = argparse.ArgumentParser(description="compile the attention kernels for absent GPUs, and check them")
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_MEMORY), help="only this one")
    tables = ("forward", "backward", "launches")
    parser.add_argument("--table", choices=tables, help="only the entries of this one, or only the launches")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    started = time.time()
    print(f"triton {triton.__version__}")
    print(
        f"{'arch':>4} {'D':>4} {'dtype':>5} {'':>7} {'tile':>8} {'warps':>5} {'stages':>6} | {'regs':>4} {'spills':>6} "
        f"{'shared':>7} {'tmem':>5} | {'local':>5} {'mma':>4} {'instr.':>6} | {'s':>5}"
    )
    archs = tuple(sorted(SHARED_MEMORY)) if options.arch is None else (options.arch,)
    todo = jobs(archs, tables if options.table is None else (options.table,))
    bad = 0
    with contextlib.ExitStack() as stack:
        rows: Iterator[tuple[str, bool]] = map(_do, todo)
        if options.jobs > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(options.jobs))
            rows = pool.imap(_do, todo)
        for row, is_right in rows:
            bad += not is_right
            print(row, flush=True)
    print(f"{bad} of {len(todo)} with violations, {time.time() - started:.0f} s")
    return bad


if __name__ == "__main__":
    sys.exit(bool(main()))
