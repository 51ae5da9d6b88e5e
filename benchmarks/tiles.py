"""Attention with tiles near those of the block table: a stage of benchmarks/gpu.py."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from typing import Any

import torch

from benchmarks.ahead import compile_ahead
from benchmarks.attention_peers import LIMIT, Case, Inputs, Result, Run, Truth, is_lost, poison
from benchmarks.part import Part
from benchmarks.timing import Clock, interleaved, summary
from jvpgraph.kernels import attention_blocked
from jvpgraph.kernels.blocks import Blocks, GluonBlocks, choose_blocks
from jvpgraph.kernels.call import Call

if importlib.util.find_spec("triton"):
    from jvpgraph.kernels import attention_gluon, attention_triton

# Near the entries of the tables, and those of the tables again: None. "forward" is the value alone.
CANDIDATES: dict[tuple[str, int, torch.dtype], list[Blocks | GluonBlocks]] = {
    ("self", 128, torch.bfloat16): [Blocks(64, 64, 4, 2), GluonBlocks(64, 2)],
    ("self", 64, torch.bfloat16): [
        Blocks(128, 128, 8, 2),
        Blocks(64, 64, 4, 3),
        GluonBlocks(128, 2),
        GluonBlocks(64, 4),
    ],
    ("cross", 128, torch.bfloat16): [Blocks(128, 64, 8, 3), GluonBlocks(64, 4), GluonBlocks(64, 3)],
    ("cross", 64, torch.bfloat16): [Blocks(64, 128, 4, 2), GluonBlocks(128, 3), GluonBlocks(128, 4)],
    ("self", 72, torch.bfloat16): [Blocks(64, 64, 4, 2), GluonBlocks(64, 2)],
    ("self", 96, torch.bfloat16): [GluonBlocks(64, 2)],
    ("self", 128, torch.float16): [GluonBlocks(64, 2)],
    ("self", 64, torch.float16): [GluonBlocks(128, 2)],
    ("self", 48, torch.bfloat16): [GluonBlocks(128, 2)],
    ("self", 32, torch.bfloat16): [GluonBlocks(128, 2)],
    ("forward", 128, torch.bfloat16): [Blocks(128, 128, 8, 3), GluonBlocks(128, 2), GluonBlocks(64, 4)],
    ("forward", 64, torch.bfloat16): [Blocks(64, 64, 4, 4), GluonBlocks(128, 4), GluonBlocks(128, 2)],
}


def small(case: Case) -> Case:
    """What compiles the same kernels, and is done at once."""
    return replace(case, batch=1, n=256, n_kv=256)


def sweep_run(kind: str, case: Case, x: Inputs, tile: Blocks | GluonBlocks | None) -> Run:
    """A kernel with a tile, None for the Triton kernel with that of the table; without a GPU torch's blocks, of a size
    of theirs."""
    scale = case.head_dim**-0.5

    def run() -> Result:
        call = Call(*(x.all() if kind != "forward" or not x.q.is_cuda else (x.q, x.k, x.v)), scale=scale)
        if not x.q.is_cuda:
            outs = attention_blocked.attend(call, block_k=None if tile is None else tile.block_k // 8)
        elif isinstance(tile, GluonBlocks):
            outs = attention_gluon.attend(call, blocks=tile)
        else:
            outs = attention_triton.attend(call, blocks=tile)
        return outs.o, outs.o_dot

    return run


def run_once(device: str, kind: str, case: Case, tile: Blocks | GluonBlocks | None) -> None:
    sweep_run(kind, case, Inputs(small(case), device), tile)()


def tile_name(tile: Blocks | GluonBlocks | None) -> str:
    if tile is None:
        return "table"
    name = "x".join(str(int(x)) for x in tile[: 3 if isinstance(tile, GluonBlocks) else 4])
    return f"gluon {name}" if isinstance(tile, GluonBlocks) else name


def sweep(part: Part) -> None:
    """Times of candidate tiles beside that of the table's entry; the table stays as it is."""
    n, heads, batch = (48, 2, 1) if part.dry_run else (8192, 12, 2)
    swept = {
        at: Case("cross" if at[0] == "cross" else "self", at[1], heads * 128 // at[1], batch, n, n, (), at[2])
        for at in CANDIDATES
    }
    if not part.dry_run:
        compile_ahead(
            part,
            (
                functools.partial(run_once, part.device, at[0], swept[at], tile)
                for at, tiles in CANDIDATES.items()
                for tile in (None, *tiles)
            ),
        )
    clock = Clock(part.device)
    found = part.data.setdefault("sweep", [])
    for (kind, dim, dtype), tiles in CANDIDATES.items():
        if part.left < 3 and not part.dry_run:
            part.save(left_out=[f"{kind} D={dim}" for kind, dim, _ in list(CANDIDATES)[len(found) :]])
            break
        case = swept[kind, dim, dtype]
        x = Inputs(case, part.device)
        truth = Truth(case, x)
        matmuls = 2 if kind == "forward" else case.matmuls("jvpgraph")
        entry: dict[str, Any] = {"kind": kind, "head_dim": dim, "heads": case.heads, "batch": batch, "n": n}
        entry["dtype"] = str(dtype).removeprefix("torch.")
        entry["table"] = list(table_entry(part, kind, dim))
        tried: dict[str, dict[str, Any]] = {}
        runs = {}
        for tile in (None, *tiles):
            name = tile_name(tile)
            part.save(running=[f"sweep {kind} D={dim}", name])
            run = sweep_run(kind, case, x, tile)
            try:
                poison(x)
                errors = truth.errors(*run())
            except Exception as error:  # more shared memory than there is, say
                tried[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
                if is_lost(tried[name]["failed"], x.q.is_cuda):
                    part.save(sweep=[*found, entry | {"tried": tried}])
                    raise SystemExit(f"{name}: {tried[name]['failed']}") from error
                continue
            tried[name] = {"error": errors} | ({} if max(errors.values()) < LIMIT else {"wrong": True})
            if "wrong" not in tried[name]:
                runs[name] = run
        quick = {"least": 2, "most": 2} if part.dry_run else {"seconds": 1.0}
        for name, times in interleaved(clock, runs, **quick).items():
            tried[name] |= summary(times)
            tried[name]["tflops"] = matmuls * case.product / tried[name]["seconds"] / 1e12
        entry["tried"] = tried
        if runs:
            entry["winner"] = min(runs, key=lambda name: tried[name]["seconds"])
        found.append(entry)
        part.data.pop("running", None)
        part.save(table=[sweep_line(entry) for entry in found])
    if any("tflops" not in entry["tried"]["table"] for entry in found):
        raise SystemExit("an entry of the table is wrong or does not run")


def table_entry(part: Part, kind: str, dim: int) -> tuple[Any, ...]:
    """What the block table has for this device."""
    if part.device != "cuda":
        return ()
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    variant = "forward" if kind == "forward" else "jvp"
    return choose_blocks(arch, (dim, dim), torch.bfloat16, variant, 90 <= arch < 120)


def sweep_line(entry: dict[str, Any]) -> str:
    figures = [
        f"{name} {tried['tflops']:.3g}" if "tflops" in tried else f"{name}: {next(iter(tried))}"
        for name, tried in entry["tried"].items()
    ]
    return f"{entry['kind']} D={entry['head_dim']} {entry['dtype']} (table {entry['table']}): " + "; ".join(figures)
