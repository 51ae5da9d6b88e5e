"""Errors of tangents in bfloat16, by the precision that they are computed in, and of central differences.

    python -m benchmarks.precision [--depths 4 12 24] [--width 256] [--seeds 3] [--out DIR]

A DiT with random weights of realistic scale, and the same with what trained networks have: a few channels a hundred
times larger than the others, and gates and gains of modulation up to 10. Weights, values and inputs are bfloat16;
errors are norm-wise, against the same network in float64, of tangents along the latents x and along the time t. Median
over seeds. `--times` adds the time of a whole step on Inductor, in turns in one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jvpgraph
from benchmarks.record import environment
from benchmarks.timing import Clock, interleaved, summary
from jvpgraph import Config
from jvpgraph.precision import PRECISIONS
from jvpgraph.trainer.model.dit import DiT, DiTConfig

SIDE, BATCH = 16, 2  # pixels, of which a token has 2 x 2; images
STEPS = [2.0**-k for k in range(1, 13)]  # of central differences
Inputs = dict[str, Tensor]


def network(depth: int, width: int, outliers: bool) -> DiT:
    net = DiT(DiTConfig(image_size=SIDE, width=width, depth=depth, heads=width // 64))
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
    if outliers:
        with torch.no_grad():
            for block in net.blocks:
                block.mlp[-1].weight[:3] *= 100  # channels of the residual stream
                block.modulation.weight[torch.randint(6 * width, (width // 8,))] *= 10
    return net.to(torch.bfloat16).requires_grad_(False)


def drawn() -> tuple[Inputs, Inputs]:
    x = torch.randn(BATCH, 1, SIDE, SIDE, dtype=torch.bfloat16)
    inputs = {"x": x, "t": torch.rand(BATCH), "labels": torch.arange(BATCH)}
    return inputs, {"x": torch.randn_like(x), "t": torch.ones(BATCH)}


def exactly(given: Inputs) -> Inputs:
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


def error(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


def differences(net: nn.Module, inputs: Inputs, name: str, dot: Tensor, want: Tensor) -> float:
    """The error of central differences at the step that is best for them."""

    def moved(step: float) -> Tensor:
        there = (inputs[name].float() + step * dot.float()).to(inputs[name].dtype)
        result: Tensor = net(**{**inputs, name: there}).double()
        return result

    return min(error((moved(h) - moved(-h)) / (2 * h), want) for h in STEPS)


def errors(depth: int, width: int, outliers: bool, seed: int) -> dict[str, dict[str, float]]:
    """By way, and by what the tangent is along."""
    torch.manual_seed(seed)
    net, (inputs, dots) = network(depth, width, outliers), drawn()
    exact = jvpgraph.transform(copy.deepcopy(net).double(), backend="eager")
    ways = {
        name: jvpgraph.transform(net, backend="eager", config=Config(tangent_precision=name)) for name in PRECISIONS
    }
    found: dict[str, dict[str, float]] = {name: {} for name in ("value", *ways, "differences")}
    for along, dot in dots.items():
        y, want = exact(**exactly(inputs), tangents={along: dot.double()})
        for name, dual in ways.items():
            value, tangent = dual(**inputs, tangents={along: dot})
            found[name][along] = error(tangent, want)
        found["value"][along] = error(value, y)
        found["differences"][along] = differences(net, inputs, along, dot, want)
    return found


def times(depth: int, width: int) -> dict[str, Any]:
    """A step with gradients, on the default backend."""
    torch.manual_seed(0)
    net, (inputs, dots) = network(depth, width, False).requires_grad_(True), drawn()

    def step(dual: Any) -> None:
        y, y_dot = dual(**inputs, tangents=dots)
        (y.float() - y_dot.float()).square().mean().backward()
        net.zero_grad()

    ways = {name: jvpgraph.transform(net, config=Config(tangent_precision=name)) for name in PRECISIONS[:2]}
    runs = {name: lambda dual=dual: step(dual) for name, dual in ways.items()}
    return {name: summary(of) for name, of in interleaved(Clock("cpu"), runs, least=9, seconds=40).items()}


def table(rows: list[dict[str, Any]]) -> str:
    ways = list(rows[0]["errors"])
    lines = [f"| weights | depth | {' | '.join(ways)} |", "|---" * (2 + len(ways)) + "|"]
    for row in rows:
        cells = (f"{row['errors'][way]['x']:.1e} / {row['errors'][way]['t']:.1e}" for way in ways)
        lines.append(f"| {'outliers' if row['outliers'] else 'random'} | {row['depth']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 12, 24])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for precision.json")
    options = parser.parse_args()
    rows = []
    for outliers in (False, True):
        for depth in options.depths:
            runs = [errors(depth, options.width, outliers, seed) for seed in range(options.seeds)]
            median = {way: {a: statistics.median(run[way][a] for run in runs) for a in "xt"} for way in runs[0]}
            rows.append({"outliers": outliers, "depth": depth, "width": options.width, "errors": median})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    result: dict[str, Any] = environment("cpu") | {"rows": rows}
    if options.times:
        result["times"] = times(min(options.depths), options.width)
    print(table(rows), result.get("times", ""), sep="\n")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "precision.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
