"""What is wrong with a compiled attention kernel: read off its binary, and off what the assembler said."""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from jvpgraph.kernels.blocks import (
    SHARED_MEMORY,
    BackwardBlocks,
    BackwardEntry,
    Blocks,
    Entry,
    GluonBlocks,
    GluonEntry,
    parts_of_head_dim,
)
from jvpgraph.kernels.gate_launches import (
    TENSOR_MEMORY,
    VARIANTS,
    Flags,
    backward_launch,
    forward_launch,
    gluon_launch,
)
from jvpgraph.kernels.recorded import Launch
from jvpgraph.kernels.sass import Instruction, disassemble, inner_loops, is_product, main_loop, wrong_descriptors

__all__ = ["Report", "check", "check_backward", "check_gluon", "compile_launch", "serialised"]

RELOADS = 3  # words that a loop may load again, of hundreds of instructions: some have one
GLUON_REGISTERS = 240  # per thread of the two warpgroups that multiply


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


def compile_launch(launch: Launch) -> tuple[Any, str]:
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
    compiled, log = compile_launch(
        forward_launch(entry.arch, (entry.head_dim, entry.head_dim), entry.dtype, blocks, flags, by_descriptor)
    )
    code = disassemble(compiled.asm["cubin"])
    loop = main_loop(code)
    local = sum(x.opcode.startswith(("LDL", "STL")) for x in loop)
    products = sum(map(is_product, loop))
    expected = expected_products(entry, blocks, flags)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    registers = _number(r"Used (\d+) registers", log)
    shared = compiled.metadata.shared
    spills = 0 if local <= RELOADS else local
    violations = _violations(code, loop, spills, log, shared, entry.arch, tensor_memory)
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
    flags = Flags(entry.active, has_k_dot=entry.streamed > 3, has_v_dot=entry.streamed > 2)
    compiled, log = compile_launch(gluon_launch(entry.head_dim, torch.bfloat16, blocks, flags))
    code = disassemble(compiled.asm["cubin"])
    loops = inner_loops(code)
    local = sum(x.opcode.startswith(("LDL", "STL")) for loop in loops for x in loop)
    products = [sum(map(is_product, loop)) for loop in loops]
    on_keys, on_values = 1 + entry.active + flags.has_k_dot, 1 + entry.active + flags.has_v_dot
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
    compiled, log = compile_launch(backward_launch(entry, sweep, blocks))
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
    widths, widths_v, _ = blocks.split(entry.head_dim, entry.head_dim)
    s_active = flags.has_q_dot or flags.has_k_dot or flags.has_bias_dot
    on_keys = 1 + flags.has_q_dot + flags.has_k_dot
    on_values = 1 + s_active + flags.has_v_dot
    depth_d, depth_k = sum(widths) // 16, blocks.block_k // 16
    if _by_warps(entry.arch):  # m16 n8 k16
        tiles = (blocks.block_k // 8) * depth_d * on_keys + (sum(widths_v) // 8) * depth_k * on_values
        return blocks.block_q // 16 * tiles // blocks.num_warps
    per_row_block = depth_d * on_keys + len(widths_v) * depth_k * on_values
    if entry.arch < 100:  # m64, n as wide as the tile, k16
        return blocks.block_q // 64 * per_row_block // (blocks.num_warps // 4)
    return blocks.block_q // min(blocks.block_q, 128) * per_row_block  # m64 or m128, n as wide as the tile, k16


def expected_backward_products(entry: BackwardEntry, sweep: str, blocks: BackwardBlocks) -> int:
    """As expected_products, of one launch of the backward where everything has a tangent or nothing."""
    widths, active = parts_of_head_dim(entry.head_dim), entry.active
    by_key = sweep not in ("sums", "queries")
    rows, columns = (blocks.block_k, blocks.block_q) if by_key else (blocks.block_q, blocks.block_k)
    scores, of_grads = (3, 3) if active else (1, 1)
    each = 3 if active else 1  # products that a gradient and that of its tangent take
    weights = scores if sweep == "values" else scores + of_grads
    outputs = {"sums": 0, "queries": each, "keys": each, "values": each}.get(sweep, 2 * each)
    if _by_warps(entry.arch):
        tiles = weights * columns // 8 * sum(widths) // 16 + outputs * sum(widths) // 8 * columns // 16
        return rows // 16 * tiles // blocks.num_warps
    per_row_block = weights * sum(widths) // 16 + outputs * len(widths) * columns // 16
    if entry.arch < 100:
        return rows // 64 * per_row_block // (blocks.num_warps // 4)
    return rows // min(rows, 128) * per_row_block


@contextlib.contextmanager
def _knob(owner: Any, name: str) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, True)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0
