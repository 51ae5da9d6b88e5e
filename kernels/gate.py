"""What the attention kernel becomes on GPUs that are not here: compiled ahead of time, read off the binary.

    python -m jvpgraph.kernels.gate [--arch 90] [--table forward]

Every entry of the block table is compiled by Triton for its architecture and must
    keep its registers: no load from or store to local memory in the loop over whole key blocks,
    run its wgmma asynchronously: ptxas says so (C7510 to C7514) where it does not,
    find all operands of wgmma: some versions of ptxas lose descriptors (jvpgraph.kernels.sass),
    fit the shared memory, and on Blackwell the tensor memory,
    issue as many matrix instructions per key block as the products need: none replicated, none on other units.
The entries for a bias are compiled for the mask of padded keys, which must keep all this, and for a full additive
bias with a tangent, which must fit the shared memory. The masked loop over the last key blocks runs once per program
and may spill. The same holds for the table of the Gluon kernel, for the loops of both warpgroups, and for that of the
backward, whose launches are named after what they give (a dot: with the gradients of tangents). Registers and spills
depend on the version of ptxas that Triton brings, so this is to be run with the version that will run the kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from jvpgraph.kernels import attention_gluon, backward_kernel
from jvpgraph.kernels.attention_kernel import (
    ADDITIVE_BIAS,
    BIAS_DOT_STRIDES,
    BIAS_STRIDES,
    BOOLEAN_BIAS,
    NO_BIAS,
    attention_kernel,
)
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
    least_columns,
    parts_of_head_dim,
)
from jvpgraph.kernels.sass import Instruction, disassemble, inner_loops, is_product, main_loop, wrong_descriptors

__all__ = ["Report", "check", "check_backward", "check_gluon", "compile_ahead", "compile_gluon", "main"]

TENSOR_MEMORY = 512  # columns
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
    is_pipelined = by_descriptor and not flags.packed and blocks.num_stages > 1
    least = least_columns(arch, (head_dim, head_dim_v), dtype, is_pipelined)
    source = _source(head_dim, head_dim_v, dtype, blocks, flags, by_descriptor, least)
    return _compile(source, arch, {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages})


def compile_gluon(head_dim: int, dtype: torch.dtype, blocks: GluonBlocks, flags: Flags) -> tuple[Any, str]:
    """The compiled Gluon kernel, for Hopper, and what ptxas said."""
    return _compile(_gluon_source(head_dim, dtype, blocks, flags), 90, {"num_warps": 4})


def _compile(source: ASTSource, arch: int, options: dict[str, Any]) -> tuple[Any, str]:
    options = {**options, "enable_fp_fusion": True}
    log = io.StringIO()
    with (
        _knob(triton.knobs.nvidia, "dump_ptxas_log"),
        _knob(triton.knobs.compilation, "always_compile"),
        contextlib.redirect_stdout(log),
    ):
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
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
    if flags.bias and entry.dtype != torch.float32:  # whose tiles are small
        largest, _ = compile_ahead(
            entry.arch, entry.head_dim, entry.head_dim, entry.dtype, blocks, FULL_BIAS, by_descriptor
        )
        shared = max(shared, largest.metadata.shared)
    violations = _violations(code, loop, local, log, shared, entry.arch, tensor_memory)
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
    flags = VARIANTS["jvp" if entry.moves else "forward"]
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    compiled, log = _compile(_backward_source(entry, blocks, sweep, flags), entry.arch, options)
    code = disassemble(compiled.asm["cubin"])
    loop = main_loop(code)
    local = sum(x.opcode.startswith(("LDL", "STL")) for x in loop)
    products = sum(map(is_product, loop))
    expected = expected_backward_products(entry, sweep, blocks)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    violations = _violations(code, loop, local, log, compiled.metadata.shared, entry.arch, tensor_memory)
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
    if notes := sorted(set(re.findall(r"\((C751[0-4])\)", log))):
        violations.append(f"wgmma is serialised: {', '.join(notes)}")
    violations += _lost_operands(code)
    if shared > SHARED_MEMORY[arch]:
        violations.append(f"shared memory {shared} of {SHARED_MEMORY[arch]} bytes")
    if tensor_memory > TENSOR_MEMORY:
        violations.append(f"tensor memory {tensor_memory} of {TENSOR_MEMORY} columns")
    return violations


def _lost_operands(code: list[Instruction]) -> list[str]:
    wrong = wrong_descriptors(code)
    return [f"{len(wrong)} products read by a wrong descriptor, the first at {wrong[0].address:#x}"] if wrong else []


def expected_products(entry: Entry, blocks: Blocks, flags: Flags) -> int:
    """Matrix instructions that one warp (of sm_90 one warpgroup, of sm_100 the program) issues per key block."""
    if entry.dtype == torch.float32:
        return 0  # multiplied as float32, on the ordinary units
    d_lo, d_hi, v_lo, v_hi, _ = blocks.split(entry.head_dim, entry.head_dim)
    s_moves = flags.has_q_dot or flags.has_k_dot or flags.has_bias_dot
    on_keys = 1 + flags.has_q_dot + flags.has_k_dot
    on_values = 1 + s_moves + flags.has_v_dot
    depth_d, depth_k = (d_lo + d_hi) // 16, blocks.block_k // 16
    if entry.arch < 90:  # m16 n8 k16
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
    if entry.arch < 90:
        tiles = weights * columns // 8 * sum(widths) // 16 + outputs * sum(widths) // 8 * columns // 16
        return rows // 16 * tiles // blocks.num_warps
    per_row_block = weights * sum(widths) // 16 + outputs * len(widths) * columns // 16
    if entry.arch < 100:
        return rows // 64 * per_row_block // (blocks.num_warps // 4)
    return rows // min(rows, 128) * per_row_block


# -------------------------------------------------------------------------------------------------- compiling


def _source(
    head_dim: int,
    head_dim_v: int,
    dtype: torch.dtype,
    blocks: Blocks,
    flags: Flags,
    by_descriptor: bool,
    least: int = 16,
) -> ASTSource:
    """The kernel with the types that the host function would pass: absent arguments are None."""
    d_lo, d_hi, v_lo, v_hi, v_parts = blocks.split(head_dim, head_dim_v, least)
    s_moves = flags.has_q_dot or flags.has_k_dot or flags.has_bias_dot
    pointer = f"*{TYPE[dtype]}"

    def streamed(width: int) -> str | None:
        if not by_descriptor:
            return pointer
        return f"tensordesc<{TYPE[dtype]}[1, 1, {blocks.block_k}, {width}]>" if width else None

    def second(width: int) -> str | None:
        return streamed(width) if by_descriptor else None

    present = {"q": True, "k": True, "v": True}
    present |= {"q_dot": flags.has_q_dot, "k_dot": flags.has_k_dot, "v_dot": flags.has_v_dot}
    types: dict[str, Any] = {
        "q": pointer,
        "q_dot": pointer,
        "k": streamed(d_lo),
        "k_hi": second(d_hi),
        "k_dot": streamed(d_lo),
        "k_dot_hi": second(d_hi),
        "v": streamed(v_lo),
        "v_hi": second(v_hi),
        "v_dot": streamed(v_lo),
        "v_dot_hi": second(v_hi),
        "bias": (None, "*u8", "*fp32")[flags.bias],
        "bias_dot": "*fp32" if flags.has_bias_dot else None,
        "o": pointer,
        "lse": "*fp32",
        "o_dot": pointer if s_moves or flags.has_v_dot else None,
        "lse_dot": "*fp32" if s_moves else None,
        "o_strides": ("i32",) * 3,
        **dict.fromkeys(BIAS_STRIDES, "i32" if flags.bias else None),
        **dict.fromkeys(BIAS_DOT_STRIDES, "i32" if flags.has_bias_dot else None),
        "scale": "fp32",
        **dict.fromkeys(("heads", "group", "length_q", "length_kv", "left", "right", "sequences"), "i32"),
        **dict.fromkeys(("cu_q", "cu_kv"), "*i32" if flags.packed else None),
    }
    for name, there in present.items():
        by_stride = there and (name.startswith("q") or not by_descriptor)
        types[f"{name}_strides"] = ("i32",) * 3 if by_stride else None
        if not there:
            types[name] = types[f"{name}_hi"] = None
    constants = {name: None for name, kind in types.items() if kind is None} | {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "D_LO": d_lo,
        "D_HI": d_hi,
        "V_LO": v_lo,
        "V_HI": v_hi,
        "V_PARTS": v_parts,
        "BLOCK_Q": blocks.block_q,
        "BLOCK_K": blocks.block_k,
        "STAGES": blocks.num_stages,
        "CUT_STAGES": blocks.cut_stages(d_lo, d_hi, v_lo, v_hi),
        **dict.fromkeys(("bias_key",) * bool(flags.bias) + ("bias_dot_key",) * flags.has_bias_dot, 1),
        "SCALE_IS_POSITIVE": True,
        "BY_DESCRIPTOR": by_descriptor,
        **{name.upper(): value for name, value in flags._asdict().items()},
    }
    return _source_of(attention_kernel, types, constants)


def _source_of(kernel: Any, types: dict[str, Any], constants: dict[str, Any]) -> ASTSource:
    """The kernel specialised as a launch would, types and constants by name."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]  # what the host's pointers and strides have, else loads are not of 16 bytes
    hints: dict[tuple[int, ...], Any] = {}
    for i, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            hints |= {(i, j): aligned for j in range(len(kind))}
        elif kind[0] == "*" and not name.startswith("cu"):
            hints[(i,)] = aligned
    present_constants = {name: constants[name] for name in signature if name in constants}
    return ASTSource(fn=kernel, signature=signature, constexprs=present_constants, attrs=hints)


def _backward_source(entry: BackwardEntry, blocks: BackwardBlocks, sweep: str, flags: Flags) -> ASTSource:
    """A kernel of the backward with the types that the host function would pass: absent arguments are None."""
    kernel = backward_kernel.queries_kernel if sweep in ("sums", "queries") else backward_kernel.keys_kernel
    pointer = f"*{TYPE[torch.bfloat16]}"
    there = {"q_dot": flags.has_q_dot, "k_dot": flags.has_k_dot, "v_dot": flags.has_v_dot}
    moves = any(there.values())
    names = ("q", "k", "v", *there, "o_grad", "o_dot_grad", "o", "dq", "dk", "dv", *(f"d{name}" for name in there))
    present = dict.fromkeys(names, True) | there | {"o_dot_grad": moves}
    present |= {f"d{name}": value for name, value in there.items()}
    types: dict[str, Any] = {name: pointer if is_there else None for name, is_there in present.items()}
    types |= {f"{name}_strides": ("i32",) * 3 if is_there else None for name, is_there in present.items()}
    types |= {
        "bias": (None, "*u8", pointer)[flags.bias],
        **dict.fromkeys(BIAS_STRIDES, "i32" if flags.bias else None),
        "sums": "*fp32",
        "centre": "*fp32" if moves else None,
        "scale": "fp32",
        **dict.fromkeys(("heads", "group", "length_q", "length_kv", "left", "right"), "i32"),
    }
    widths = parts_of_head_dim(entry.head_dim)
    constants = {name: None for name, kind in types.items() if kind is None} | {
        "HEAD_DIM": entry.head_dim,
        "HEAD_DIM_V": entry.head_dim,
        "WIDTHS": widths,
        "WIDTHS_V": widths,
        "BLOCK_Q": blocks.block_q,
        "BLOCK_K": blocks.block_k,
        "STAGES": blocks.num_stages,
        "MOVES": moves,
        **dict.fromkeys(("bias_key",) * bool(flags.bias), 1),
        "SUMS": sweep == "sums",
        "HAS_DK": sweep in ("keys", "keys and values"),
        "HAS_DV": sweep in ("values", "keys and values"),
        **{name.upper(): value for name, value in flags._asdict().items()},
    }
    return _source_of(kernel, types, constants)


def _gluon_source(head_dim: int, dtype: torch.dtype, blocks: GluonBlocks, flags: Flags) -> GluonASTSource:
    """The Gluon kernel with the types that the host function would pass."""

    def box(rows: int) -> str:
        layout = attention_gluon.layout_of(rows, head_dim, dtype)
        return f"tensordesc<{TYPE[dtype]}[1, 1, {rows}, {head_dim}],{layout!r}>"

    kernel = attention_gluon.attention_jvp_kernel
    constants = {
        "STAGES": blocks.stages,
        "OVERLAP": blocks.overlap,
        "HAS_Q_DOT": flags.has_q_dot,
        "HAS_K_DOT": flags.has_k_dot,
        "HAS_V_DOT": flags.has_v_dot,
    }
    types = {
        **dict.fromkeys(constants, "constexpr"),
        **dict.fromkeys(("q", "q_dot", "o", "o_dot"), box(64)),
        **dict.fromkeys(("k", "k_dot", "v", "v_dot"), box(blocks.block_k)),
        **dict.fromkeys(("lse", "lse_dot"), "*fp32"),
        "scale": "fp32",
        **dict.fromkeys(("heads", "group", "length_q", "length_kv"), "i32"),
    }
    signature = {name: types[name] for name in kernel.arg_names}
    hints = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    return GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)


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


# -------------------------------------------------------------------------------------------------- command


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


def main(arguments: list[str] | None = None) -> int:
    """Check the table, print a line for each entry, return the number of entries with something wrong."""
    parser = argparse.ArgumentParser(description="compile the attention kernel for absent GPUs, and check it")
    parser.add_argument("--arch", type=int, choices=sorted({entry.arch for entry in TABLE}), help="only this one")
    parser.add_argument("--table", choices=("forward", "backward"), help="only this one")
    options = parser.parse_args(arguments)
    print(f"triton {triton.__version__}")
    print(
        f"{'arch':>4} {'D':>4} {'dtype':>5} {'':>7} {'tile':>8} {'warps':>5} {'stages':>6} | {'regs':>4} {'spills':>6} "
        f"{'shared':>7} {'tmem':>5} | {'local':>5} {'mma':>4} {'instr.':>6} | {'s':>5}"
    )
    bad = 0
    forward, backward = (options.table in (None, table) for table in ("forward", "backward"))
    for entry, blocks in TABLE.items() if forward else ():
        if options.arch in (None, entry.arch):
            report = check(entry, blocks)
            bad += bool(report.violations)
            print(_row(entry, blocks, report), flush=True)
    if forward and options.arch in (None, 90):
        for gluon_entry, gluon_blocks in GLUON_TABLE.items():
            report = check_gluon(gluon_entry, gluon_blocks)
            bad += bool(report.violations)
            print(_gluon_row(gluon_entry, gluon_blocks, report), flush=True)
    for backward_entry, sweeps in BACKWARD_TABLE.items() if backward else ():
        if options.arch in (None, backward_entry.arch):
            for sweep, launch_blocks in launches(backward_entry, sweeps).items():
                report = check_backward(backward_entry, sweep, launch_blocks)
                bad += bool(report.violations)
                print(_backward_row(backward_entry, sweep, launch_blocks, report), flush=True)
    print(f"{bad} entries with violations")
    return bad


if __name__ == "__main__":
    sys.exit(bool(main()))
