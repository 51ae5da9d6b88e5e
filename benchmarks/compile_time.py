"""Compile time against depth: one graph, and regions. ``python -m benchmarks.compile_time [--backend inductor]``.

Compile time is the processor time, C++ compilers included, of the first dual call with its backward, less that of a
later one. Every depth is compiled from nothing, in one process, without Inductor's caches.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import jvpgraph
from benchmarks import record
from benchmarks.models import Block, TinyDiT, inputs

DEPTHS = (4, 40)


def seconds(call: Callable[[], Any]) -> float:
    start = sum(os.times()[:4])
    call()
    return sum(os.times()[:4]) - start


def compile_time(depth: int, regions: Any, backend: str, width: int = 64) -> tuple[float, int]:
    """Seconds of compiling a DiT of this depth, and the number of graphs."""
    torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(0)
    model = TinyDiT(width, heads=4, depth=depth)
    dual = jvpgraph.transform(model, regions=regions, backend=backend)
    x, t, x_dot, t_dot = inputs(dtype=torch.float32)

    def step() -> None:
        y, _ = dual(x, t, tangents={"x": x_dot, "t": t_dot})
        y.square().sum().backward()

    first = seconds(step)
    steady = min(seconds(step) for _ in range(3))
    return first - steady, len(dual.reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--regions-only", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for compile_time_<backend>.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        compile_time(1, Block, options.backend)  # imports, and what the compiler sets up once
        for name, regions in (("regions", Block), ("one graph", None)):
            if regions is None and options.regions_only:
                continue
            rounds = [
                [compile_time(depth, regions, options.backend) for depth in DEPTHS] for _ in range(options.rounds)
            ]
            best = [min(row[i][0] for row in rounds) for i in range(len(DEPTHS))]
            for depth, found, (_, graphs) in zip(DEPTHS, best, rounds[0]):
                print(f"{name:10s} {depth:3d} blocks  {found:7.2f} s  {graphs} graphs")
            print(f"{name:10s} {DEPTHS[1]} blocks / {DEPTHS[0]} blocks = {best[1] / best[0]:.3f}")
            seconds_of = dict(zip(map(str, DEPTHS), best))
            figures[name] = {"seconds": seconds_of, "ratio": best[1] / best[0], "graphs": rounds[0][1][1]}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"compile_time_{options.backend}.json"
        path.write_text(json.dumps(record.environment() | {"blocks": DEPTHS, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
