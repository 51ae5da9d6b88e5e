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

Every launch of the calls of CASES, forward and backward with masks of all kinds, must fit the shared and the tensor
memory: for that it is compiled as far as it has any. With masks that have rows, some spill.

Registers and spills depend on the version of ptxas that Triton brings, so this is to be run with the version that will
run the kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton

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
    backward_sweeps,
)
from jvpgraph.kernels.gate_checks import Report, check, check_backward, check_gluon
from jvpgraph.kernels.gate_launches import CASES, Case, sweeps_of, too_large

__all__ = ["jobs", "main"]

TYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _row(entry: Entry, blocks: Blocks, report: Report) -> str:
    tile = f"{blocks.block_q}x{blocks.block_k}"
    compiled = f"{entry.variant:>7} {tile:>8} {blocks.num_warps:>5} {blocks.num_stages:>6}"
    return f"{entry.arch:>4} {entry.head_dim:>4} {TYPE[entry.dtype]:>5} {compiled} | {_figures(report)}"


def _gluon_row(entry: GluonEntry, blocks: GluonBlocks, report: Report) -> str:
    tile = f"2x64x{blocks.block_k}"
    kind = f"gluon {entry.streamed}" if entry.active else "gluon v"
    compiled = f"{kind:>7} {tile:>8} {'8 + 1':>5} {blocks.stages:>6}"
    return f"{90:>4} {entry.head_dim:>4} {TYPE[torch.bfloat16]:>5} {compiled} | {_figures(report)}"


def _backward_row(entry: BackwardEntry, sweep: str, blocks: BackwardBlocks, report: Report) -> str:
    tile = f"{blocks.block_q}x{blocks.block_k}"
    name = {"queries": "d q", "keys": "d k", "values": "d v", "keys and values": "d k,v"}.get(sweep, sweep)
    compiled = f"{name + '.' * entry.active:>7} {tile:>8} {blocks.num_warps:>5} {blocks.num_stages:>6}"
    return f"{entry.arch:>4} {entry.head_dim:>4} {TYPE[torch.bfloat16]:>5} {compiled} | {_figures(report)}"


def _figures(report: Report) -> str:
    size = f"{report.registers:>4} {report.spilled:>6} {report.shared:>7} {report.tensor_memory:>5}"
    loop = f"{report.local:>5} {report.products:>4} {report.instructions:>6}"
    return f"{size} | {loop} | {report.seconds:>5.1f}  " + ("; ".join(report.violations) or "ok")


def _check_entry(entry: Entry, blocks: Blocks) -> tuple[str, bool]:
    report = check(entry, blocks)
    return _row(entry, blocks, report), not report.violations


def _check_gluon_entry(entry: GluonEntry, blocks: GluonBlocks) -> tuple[str, bool]:
    report = check_gluon(entry, blocks)
    return _gluon_row(entry, blocks, report), not report.violations


def _check_launch(entry: BackwardEntry, sweep: str, blocks: BackwardBlocks) -> tuple[str, bool]:
    report = check_backward(entry, sweep, blocks)
    return _backward_row(entry, sweep, blocks, report), not report.violations


def _check_case(case: Case, archs: tuple[int, ...]) -> tuple[str, bool]:
    started = time.time()
    sizes, violations = too_large(case, archs)
    found = "; ".join(
        f"sm_{arch} " + (", ".join(f"{name} {size}" for name, size in launches.items()) or "no kernel of ours")
        for arch, launches in sizes.items()
    )
    return f"{case}: {found} | {time.time() - started:>5.1f}  " + ("; ".join(violations) or "ok"), not violations


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
            found += [
                partial(_check_launch, entry, sweep, blocks) for sweep, blocks in sweeps_of(entry, sweeps).items()
            ]
    groups = [tuple(arch for arch in archs if arch < 90), *((arch,) for arch in archs if arch >= 90)]  # see Launch.key
    if "launches" in tables:
        found += [partial(_check_case, case, group) for group in groups if group for case in CASES]
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
