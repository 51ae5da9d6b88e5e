"""Time of T tangents in one call, compared with T calls, for a DiT whose gradients nobody asks for.

    python -m benchmarks.several_tangents [--device cpu] [--tangents 4] [--tokens 256] [--width 384] [--out DIR]

As Hutchinson probes and products of the Jacobian with a block need it. Both ways are compiled by Inductor and run in
turns in one process; figures are medians. Nothing is printed unless their tangents agree.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jvpgraph
from benchmarks.record import environment
from benchmarks.timing import Clock, interleaved, summary
from jvpgraph.trainer.model.dit import DiT, DiTConfig


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    size = 2 * round(options.tokens**0.5)
    config = DiTConfig(image_size=size, width=options.width, depth=options.depth, heads=options.width // 64)
    model = DiT(config).to(options.device)
    for p in model.parameters():  # adaLN-zero would make the output zero
        torch.nn.init.normal_(p, std=0.02)
    x = torch.randn(options.batch, 1, size, size, device=options.device)
    t, labels = torch.rand(len(x), device=x.device), torch.zeros(len(x), dtype=torch.long, device=x.device)
    dots = torch.randn(options.tangents, *x.shape, device=x.device)
    one, several = jvpgraph.transform(model), jvpgraph.transform(model, tangents_batched=options.tangents)

    def each() -> Tensor:
        return torch.stack([one(x, t, labels, tangents={"x": dot})[1] for dot in dots])

    def together() -> Tensor:
        return several(x, t, labels, tangents={"x": dots})[1]  # type: ignore[no-any-return]

    with torch.no_grad():
        error = float((together() - each()).abs().max() / each().abs().max())
        if not error < 1e-4:
            raise SystemExit(f"the tangents differ by {error:.1e} of the largest: no figures")
        times = interleaved(Clock(options.device), {"calls": each, "together": together}, least=7, seconds=20)
    found = {name: summary(of) for name, of in times.items()}
    ratio = found["together"]["seconds"] / found["calls"]["seconds"]
    return {**vars(options), "out": None, "error": error, "times": found, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    for name, value in (("tangents", 4), ("tokens", 256), ("width", 384), ("depth", 4), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="folder for several_tangents.json")
    options = parser.parse_args()
    result = environment(options.device) | measure(options)
    print(f"{options.tangents} tangents in one call: {result['ratio']:.2f} x the time of as many calls")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "several_tangents.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
