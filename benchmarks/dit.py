"""Time of value, tangent and backward for a DiT: jvpgraph beside its alternatives, interleaved in one process.

    python -m benchmarks.dit [--device cpu] [--tokens 256] [--width 384] [--depth 4] [--repeats 9] [--out DIR]

Peers, each doing what a distillation step needs (the value with gradients, and a tangent without):
  one pass           torch.func.jvp with the math attention: backward through its value, its tangent detached
  two passes         torch.func.jvp without autograd, then a second forward for the gradient
  compiled ...       the same, compiled by Inductor
  differences        two more forwards without gradient: a finite difference, wrong in half precision
The plain model's forward and backward, compiled, is the floor: the primal alone. Figures are medians, and ratios to
that floor. Nothing is printed unless value and tangent agree with torch.func.jvp in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import jvpgraph
from benchmarks.record import environment
from jvpgraph.trainer.model.dit import DiT, DiTConfig

Step = Callable[[], Tensor]  # runs forward, tangent and backward; returns the tangent


def steps(
    model: nn.Module, x: Tensor, t: Tensor, labels: Tensor, x_dot: Tensor, t_dot: Tensor, compiler: str
) -> dict[str, Step]:
    """One function per way of getting (y with gradient, y_dot)."""
    dual = jvpgraph.transform(model, backend=compiler)
    forward = torch.compile(model, backend=compiler)

    def both(x: Tensor, t: Tensor, x_dot: Tensor, t_dot: Tensor) -> tuple[Tensor, Tensor]:
        y, y_dot = torch.func.jvp(lambda x, t: model(x, t, labels), (x, t), (x_dot, t_dot))
        return y, y_dot.detach()

    # Two compilations: one whose value has a backward, one that is never asked for it.
    compiled_both, compiled_tangent = (
        torch.compile(lambda *inputs, i=i: both(*inputs)[i:], backend=compiler) for i in range(2)
    )

    def ours() -> Tensor:
        y, y_dot = dual(x, t, labels, tangents={"x": x_dot, "t": t_dot})
        y.square().mean().backward()
        return y_dot

    def plain() -> Tensor:
        y = forward(x, t, labels)
        y.square().mean().backward()
        return torch.zeros_like(y)

    def one_pass(run: Callable[..., Any] = both) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            y, y_dot = run(x, t, x_dot, t_dot)
        y.square().mean().backward()
        return y_dot

    def two_passes() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            y_dot = both(x, t, x_dot, t_dot)[1]
        model(x, t, labels).square().mean().backward()
        return y_dot

    def compiled_two_passes() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            (y_dot,) = compiled_tangent(x, t, x_dot, t_dot)
        forward(x, t, labels).square().mean().backward()
        return y_dot

    def differences(h: float = 1e-3) -> Tensor:
        with torch.no_grad():
            y_dot = forward(x + h * x_dot, t + h * t_dot, labels) - forward(x - h * x_dot, t - h * t_dot, labels)
        forward(x, t, labels).square().mean().backward()
        return y_dot / (2 * h)

    return {
        "primal only": plain,
        "jvpgraph": ours,
        "compiled one pass": lambda: one_pass(compiled_both),
        "one pass": one_pass,
        "compiled two passes": compiled_two_passes,
        "two passes": two_passes,
        "differences": differences,
    }


def seconds(run: Step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=256, help="a square number: patches per image")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "eager"), help="eager: nothing is fused")
    parser.add_argument("--out", type=Path, default=None, help="folder for dit_<device>_<dtype>_<tokens>.json")
    o = parser.parse_args()

    torch.manual_seed(0)
    dtype = getattr(torch, o.dtype)
    side = 2 * round(o.tokens**0.5)
    config = DiTConfig(image_size=side, width=o.width, depth=o.depth, heads=o.width // 64)
    model = DiT(config).to(o.device, dtype)
    for p in model.parameters():  # adaLN-zero would make the output zero
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.02)
    x = torch.randn(o.batch, 1, side, side, device=o.device, dtype=dtype)
    t = torch.rand(o.batch, device=o.device, dtype=dtype)
    labels = torch.arange(o.batch, device=o.device) % 10
    x_dot, t_dot = torch.randn_like(x), torch.ones_like(t)
    ways = steps(model, x, t, labels, x_dot, t_dot, o.compiler)

    exact = DiT(config).to(o.device, torch.float64)
    exact.load_state_dict(model.state_dict())
    inputs = (x.double(), t.double()), (x_dot.double(), t_dot.double())
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        truth = torch.func.jvp(lambda x, t: exact(x, t, labels), *inputs)[1]
    errors = {name: ((run().double() - truth).norm() / truth.norm()).item() for name, run in ways.items()}
    limit = 1e-4 if dtype is torch.float32 else 3e-2
    if not errors["jvpgraph"] < limit:
        raise SystemExit(f"the tangent is off by {errors['jvpgraph']:.1e}: no figures for wrong code")

    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(o.repeats):
        for name, run in ways.items():
            times[name].append(seconds(run, o.device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    floor = medians["primal only"]
    print(f"DiT {o.depth} x {o.width}, batch {o.batch}, {o.tokens} tokens, {o.dtype}, {o.device}")
    print(f"{'':22s}{'ms':>10s}{'/ primal':>10s}{'error of the tangent':>24s}")
    for name, value in medians.items():
        error = "" if name == "primal only" else f"{errors[name]:.1e}"
        print(f"{name:22s}{1e3 * value:10.1f}{value / floor:10.2f}{error:>24s}")
    if o.out is not None:
        o.out.mkdir(parents=True, exist_ok=True)
        record = environment(o.device) | {
            "settings": {k: str(v) for k, v in vars(o).items() if k != "out"},
            "seconds": medians,
        }
        record |= {"ratio": {n: v / floor for n, v in medians.items()}, "tangent_error": errors}
        path = o.out / f"dit_{o.device}_{o.dtype}_{o.tokens}.json"
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
