"""Errors of tangents in bfloat16, by the precision that they are computed in, and of central differences.

    python -m benchmarks.precision [--seeds 3] [--only own-12 wan ...] [--times] [--out DIR]

The trainer's DiT of 4 to 48 layers, small Wan and Flux transformers, with random weights of realistic scale; the DiT
with what trained networks have besides, one by one and together; and the digits' teacher that the demo trains. Weights,
values and inputs are bfloat16. Errors are norm-wise, of tangents along the latents x and along the time t, against the
same network in float64; median over seeds, for the deepest and those with outliers of one. `auto 1.1` is Policy.auto
for a tenth more traffic of tangents; `float32 values` are those of the network in float32 with the same weights.
`--times` adds the time of a whole step on Inductor, in turns in one process, and the bytes that its forward moves.
Prints tables; writes precision.json and precision.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch.utils._pytree import tree_map_only

import jvpgraph
from benchmarks.precision_cases import INGREDIENTS, Case, digits_teacher, flux, own, wan
from benchmarks.record import environment
from benchmarks.timing import Clock, interleaved, summary
from jvpgraph import Config, Policy
from jvpgraph.kernels.products import DECOMPOSITIONS
from jvpgraph.precision import PRECISIONS
from jvpgraph.trainer.model.student import repeated_blocks

DEPTHS = (4, 12, 24, 48)
OFTEN = ("own-4", "own-12", "wan", "flux")  # with several seeds; the others take long
BUDGETS = (1.1, 1.2)  # of Policy.auto
STEPS = [2.0**-k for k in range(1, 13)]  # of central differences, of inputs of about one
Errors = dict[str, dict[str, float]]  # by way, and by what the tangent is along


def cases(out: Path) -> dict[str, Callable[[], Case]]:
    found: dict[str, Callable[[], Case]] = {f"own-{depth}": partial(own, depth) for depth in DEPTHS}
    found |= {"wan": wan, "flux": partial(flux, True), "flux, its own time": partial(flux, False)}
    found["digits"] = partial(digits_teacher, out / "teacher")
    found |= {f"own-12 {name}": partial(own, 12, name) for name in INGREDIENTS}
    found["own-12 gains, sharp"] = partial(own, 12, "gains", "sharp")
    found |= {f"own-{depth} all": partial(own, depth, *INGREDIENTS) for depth in DEPTHS}
    return found


def exactly(tree: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Floating tensors in another dtype."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def error(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


def plainly(net: nn.Module, inputs: dict[str, Any]) -> Tensor:
    out = net(**inputs)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def differences(net: nn.Module, inputs: dict[str, Any], name: str, dot: Tensor, want: Tensor) -> float:
    """The error of central differences at the step that is best for them."""

    def moved(step: float) -> Tensor:
        there = (inputs[name].float() + step * dot.float()).to(inputs[name].dtype)
        return plainly(net, {**inputs, name: there}).double()

    scale = float(inputs[name].abs().max()) / float(dot.abs().max())
    steps = [step * min(1.0, scale) for step in STEPS]
    return min(error((moved(h) - moved(-h)) / (2 * h), want) for h in steps)


def dual_of(net: nn.Module, precision: Any = "model") -> Callable[..., tuple[Tensor, Tensor]]:
    """(value, tangent) of a call: a graph for all equal blocks, and op by op around them."""
    config, blocks = Config(tangent_precision=precision), set(repeated_blocks(net))
    dual = jvpgraph.transform(net, backend="eager", regions=blocks.__contains__, config=config)

    def run(inputs: dict[str, Any], name: str, dot: Tensor) -> tuple[Tensor, Tensor]:
        y, y_dot = dual(**inputs, tangents={name: dot})
        return (y[0], y_dot[0]) if isinstance(y, tuple) else (y, y_dot)

    return run


def errors(case: Case) -> Errors:
    """By way, and by what the tangent is along."""
    net, inputs = case.net, case.inputs
    exact, full = dual_of(copy.deepcopy(net).double()), dual_of(copy.deepcopy(net).float())
    found: Errors = {}

    def note(way: str, along: str, value: float) -> None:
        found.setdefault(way, {})[along] = value

    diagnosis = jvpgraph.diagnose(net, (), inputs, dict(case.dots.values()), steps=())
    ways = {**dict(zip(PRECISIONS, PRECISIONS)), **{f"auto {b}": Policy.auto(diagnosis, budget=b) for b in BUDGETS}}
    for along, (name, dot) in case.dots.items():
        y, want = exact(exactly(inputs), name, dot.double())
        for way, precision in ways.items():
            value, tangent = dual_of(net, precision)(inputs, name, dot)
            note(way, along, error(tangent, want))
        note("value", along, error(value, y))
        note("differences", along, differences(net, inputs, name, dot, want))
        note("float32 values", along, error(full(exactly(inputs, torch.float32), name, dot.float())[1], want))
    return found


def times() -> dict[str, Any]:
    """Seconds of a step with gradients, on the default backend."""
    torch.manual_seed(0)
    case = own(6)
    net, inputs, dots = case.net.requires_grad_(True), case.inputs, dict(case.dots.values())

    def step(dual: Any) -> None:
        y, y_dot = dual(**inputs, tangents=dots)
        (y.float() - y_dot.float()).square().mean().backward()
        net.zero_grad()

    ways = {name: jvpgraph.transform(net, config=Config(tangent_precision=name)) for name in PRECISIONS[:2]}
    runs = {name: lambda dual=dual: step(dual) for name, dual in ways.items()}
    return {name: summary(of) for name, of in interleaved(Clock("cpu"), runs, least=9, seconds=40).items()}


def traffic() -> dict[str, int]:
    """Bytes that the forward reads and writes, as Inductor schedules it, with products as CUDA has them: alone, and
    with its tangent by precision."""
    torch.manual_seed(0)
    case = own(2, width=512)
    counted: list[int] = []

    def count(graph: GraphLowering) -> Any:
        graph.codegen()
        counted.append(graph.count_bytes()[0])
        raise _Counted

    found = {}
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(GraphLowering, "compile_to_module", count))
        patches.enter_context(mock.patch.dict(DECOMPOSITIONS, clear=True))
        patches.enter_context(torch._inductor.config.patch(force_disable_caches=True))
        patches.enter_context(torch.no_grad())
        for name in ("alone", *PRECISIONS[:2]):
            torch._dynamo.reset()
            try:
                if name == "alone":
                    torch.compile(case.net, fullgraph=True)(**case.inputs)
                else:
                    dual = jvpgraph.transform(case.net, config=Config(tangent_precision=name))
                    dual(**case.inputs, tangents=dict(case.dots.values()))
            except (_Counted, jvpgraph.CaptureError, torch._dynamo.exc.BackendCompilerFailed):
                found[name] = counted.pop()
    return found


class _Counted(Exception):
    """There is no need for the code."""


def table(rows: dict[str, Errors]) -> str:
    ways = list(next(iter(rows.values())))
    lines = [f"| network | {' | '.join(ways)} |", "|---" * (1 + len(ways)) + "|"]
    for name, found in rows.items():
        lines.append(f"| {name} | {' | '.join('{x:.1e} / {t:.1e}'.format(**found[way]) for way in ways)} |")
    return "\n".join(lines)


def draw(rows: dict[str, Errors], target: Path) -> None:
    """Errors over depth, along x and, dashed, t; and by network, the larger of the two."""
    figure = Figure(figsize=(11, 4.6))
    over_depth, by_network = figure.subplots(1, 2, width_ratios=(2, 3))
    deep = {depth: rows[f"own-{depth}"] for depth in DEPTHS if f"own-{depth}" in rows}
    others = {name: found for name, found in rows.items() if not name.startswith("own") or " " in name}
    for i, way in enumerate(("differences", "model", "float32", "float32 values")):
        colour = f"C{i}"
        for along, style in (("x", "-"), ("t", "--")):
            label = {"label": way} if along == "x" else {}
            over_depth.plot(
                list(deep), [e[way][along] for e in deep.values()], style, color=colour, marker="o", **label
            )
        larger = [max(found[way].values()) for found in others.values()]
        by_network.plot(larger, list(others), "o", color=colour, markersize=6)
    over_depth.set_title("DiT in bfloat16, random weights", fontsize=10)
    over_depth.set_xlabel("layers")
    over_depth.set_ylabel("error of the tangent")
    over_depth.set_yscale("log")
    over_depth.legend(fontsize=8, frameon=False)
    by_network.set_title("other networks, and what trained ones have", fontsize=10)
    by_network.set_xlabel("error of the tangent, along x or t")
    by_network.set_xscale("log")
    by_network.invert_yaxis()
    for panel in (over_depth, by_network):
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def medians(out: Path, name: str, seeds: int) -> Errors:
    torch.set_num_threads(1)
    runs = []
    for seed in range(seeds if name in OFTEN else 1):
        torch.manual_seed(seed)
        runs.append(errors(cases(out)[name]()))
    return {way: {a: statistics.median(run[way][a] for run in runs) for a in "xt"} for way in runs[0]}


def measured(out: Path, only: list[str] | None, seeds: int, jobs: int) -> Iterator[tuple[str, Errors]]:
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = {n: pool.submit(medians, out, n, seeds) for n in cases(out) if only is None or n in only}
        for name, task in tasks.items():
            yield name, task.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="some of the networks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="networks at a time, one thread each")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/precision"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Errors] = {}
    for name, found in measured(options.out, options.only, options.seeds, options.jobs):
        rows[name] = found
        print(table({name: found}).splitlines()[-1], flush=True)
    result: dict[str, Any] = environment("cpu") | {"rows": rows}
    if options.times:
        result |= {"times": times(), "traffic": traffic()}
    print(table(rows), result.get("times", ""), result.get("traffic", ""), sep="\n")
    (options.out / "precision.json").write_text(json.dumps(result, indent=1))
    draw(rows, options.out / "precision.png")


if __name__ == "__main__":
    main()
