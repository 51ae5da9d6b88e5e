"""Attention with its JVP compared with its peers: a stage of benchmarks/gpu.py.

No figure for a wrong result: a peer's is compared with float64 before the peer is timed.
"""

from __future__ import annotations

import functools
import gc
import random
from typing import Any

import torch

from benchmarks.ahead import compile_ahead
from benchmarks.attention_peers import (
    FORWARDS,
    LIMIT,
    MATH,
    OURS,
    PEERS,
    POINTERS,
    Case,
    Inputs,
    Run,
    Truth,
    Unavailable,
    cases,
    is_lost,
    poison,
)
from benchmarks.part import PEER, Part
from benchmarks.timing import Clock, interleaved, state, summary
from jvpgraph.kernels.call import Call
from jvpgraph.kernels.choose import plan


def first_run(name: str, case: Case, x: Inputs, truth: Truth) -> tuple[dict[str, Any], Run | None]:
    """What a peer gives and takes; the function to be timed, if that is right."""
    cuda = x.q.is_cuda
    try:
        run = PEERS[name](case, x)
        poison(x)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        o, o_dot = run()
        memory = torch.cuda.max_memory_allocated() - before if cuda else None
        errors = truth.errors(o, o_dot)
    except Unavailable as reason:
        return {"skipped": str(reason)}, None
    except torch.OutOfMemoryError:
        return {"skipped": "needs more memory than there is"}, None
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if is_lost(what, cuda):
            raise SystemExit(f"{name}: {what}: nothing more runs in this process") from error
        return {"refused" if isinstance(error, AssertionError) else "failed": what}, None
    result: dict[str, Any] = {"error": errors, "memory_bytes": memory}
    if name in OURS:
        tensors = x.all() if o_dot is not None else (x.q, x.k, x.v)
        call = Call(*tensors, scale=case.head_dim**-0.5)
        result["implementation"] = str(plan(call))  # as the run has left the variable for it
    if not max(errors.values()) < LIMIT:
        return {"wrong": True} | result, None
    return result, run


def measure_case(case: Case, part: Part, clock: Clock, crashed: dict[str, str]) -> dict[str, Any]:
    torch.manual_seed(random.SystemRandom().randrange(1 << 31))
    x = Inputs(case, part.device)
    truth = Truth(case, x)
    peers: dict[str, dict[str, Any]] = {}
    runs = {}
    for name in case.peers:
        if name in crashed:
            peers[name] = {"crashed": crashed[name]}
            continue
        part.save(running=[case.key, name])
        peers[name], run = first_run(name, case, x, truth)
        if run is not None:
            runs[name] = run
        gc.collect()
        if part.device == "cuda":
            torch.cuda.empty_cache()
    part.save(running=[case.key, "timing"])
    quick = {"least": 2, "most": 2} if part.dry_run else {}
    times = interleaved(clock, runs, **quick)
    ceiling = part.of("environment").get("matmul_flops")
    forwards = [summary(times[name])["seconds"] for name in FORWARDS if name.startswith("SDPA") and name in runs]
    for name, run in runs.items():
        found = summary(times[name])
        rate = case.matmuls(name) * case.product / found["seconds"]
        found |= {"host_seconds": min(clock.host(run) for _ in range(3)), "tflops": rate / 1e12}
        if ceiling:
            found["of_ceiling"] = rate / ceiling
        if forwards:
            found["times_sdpa_forward"] = found["seconds"] / min(forwards)
        peers[name] |= found
    shape = {"kind": case.kind, "head_dim": case.head_dim, "heads": case.heads, "batch": case.batch}
    shape |= {"n": case.n, "n_kv": case.n_kv, "dtype": "bfloat16", "flop": case.matmuls("jvpgraph") * case.product}
    return {"case": case.key} | shape | {"peers": peers, "state": state(part.device)}


def measure(part: Part) -> None:
    """All cases, as far as the time goes; goes on where a process that died left off."""
    data = part.data
    done = data.setdefault("cases", [])
    crashed = data.setdefault("crashed", {})
    died_at = data.pop("running", None)
    if died_at is not None:
        crashed[died_at[1]] = f"took the process down in {died_at[0]}"
    todo = [case for case in cases(part.dry_run) if case.key not in {entry["case"] for entry in done}]
    if died_at is None:
        compile_ahead(
            part,
            (
                functools.partial(run_once, part.device, case, name)
                for case in todo
                for name in case.peers
                if worth_compiling_ahead(case, name)
            ),
        )
    elif died_at[1] == "timing":
        todo = [case for case in todo if case.key != died_at[0]]
    clock = Clock(part.device)
    for i, case in enumerate(todo):
        if part.left < 5 and not part.dry_run:
            part.save(left_out=[case.key for case in todo[i:]])
            break
        entry = measure_case(case, part, clock, crashed)
        done.append(entry)
        data.pop("running", None)
        part.save(table=table(done))
    problems = [
        f"{entry['case']}: {name}: {peer}"
        for entry in done
        for name, peer in entry["peers"].items()
        if name in OURS and ("wrong" in peer or "failed" in peer or "refused" in peer or "crashed" in peer)
    ]
    problems += [f"{what}: while it was timed" for name, what in crashed.items() if name == "timing"]
    part.save(problems=problems)
    if problems:
        raise SystemExit("\n".join(problems[:8]))


def table(done: list[dict[str, Any]]) -> list[str]:
    """A line per case: TFLOP/s of every peer."""
    lines = []
    for entry in done:
        figures = [
            f"{name} {peer['tflops']:.3g}" if "tflops" in peer else f"{name}: {next(iter(peer))}"
            for name, peer in entry["peers"].items()
        ]
        lines.append(f"{entry['case']}: " + "; ".join(figures))
    return lines


def worth_compiling_ahead(case: Case, name: str) -> bool:
    """Triton kernels: ours once for all lengths, the peer's for every length."""
    if case.peers == MATH:
        return False
    if name in (PEER, POINTERS):
        return case.kind == "self"
    return name in OURS and case.n in (1024, 64)


def run_once(device: str, case: Case, name: str) -> None:
    PEERS[name](case, Inputs(case, device))()
