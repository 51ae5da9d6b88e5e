"""Sweep jvpgraph over the zoo: ``python -m tests.zoo.run [--backend eager] [names]``.

Per model: how it was captured, the relative error of value, tangent and parameter gradients in float64 against
oracles that share nothing with jvpgraph, and how many ops had a rule of the table and how many a derived one.
"""

from __future__ import annotations

import argparse
import builtins
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch.overrides import _pop_mode, _push_mode

import jvpgraph
from jvpgraph.dynamo_backend import Backend
from jvpgraph.tree import leaves
from tests.zoo import sweep
from tests.zoo.base import QUIET, Case
from tests.zoo.cases import CASES, NOT_CONSTRUCTIBLE
from tests.zoo.oracle import NARROW, AllDouble, float_leaves, oracle, oracle_grads, projected, random_tangents

TOLERANCE = 1e-9  # relative to the largest entry; central differences get their own
TOLERANCE_OF = {"forward AD": TOLERANCE, "differences": 1e-5}


@dataclass
class Result:
    """One model in all its variants."""

    name: str
    capture: str = "whole"  # whole, regions, refused, failed
    cause: str = ""
    oracle: str = ""
    value: float = 0.0
    tangent: float = 0.0
    gradient: float = 0.0
    regions: str = ""  # which they are and what became of them, where one graph is not to be had
    table: int = 0
    derived: int = 0
    seconds: float = 0.0
    variants: int = 0
    derived_ops: dict[str, int] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        return self.capture in ("whole", "regions") and self.agrees

    @property
    def agrees(self) -> bool:
        tolerance = TOLERANCE_OF.get(self.oracle, TOLERANCE)
        return self.value <= TOLERANCE and self.tangent <= tolerance and self.gradient <= TOLERANCE

    def __str__(self) -> str:
        head = f"{self.name:38s} {self.capture:13s} "
        if self.capture in ("refused", "failed"):
            return head + self.cause
        errors = f"value {self.value:.0e}  tangent {self.tangent:.0e}  gradient {self.gradient:.0e}"
        rules = f"table {self.table:4d}  derived {self.derived:2d}"
        verdict = "right" if self.right else "WRONG"
        return f"{head}{verdict}  {errors}  {rules}  {self.oracle}  {self.seconds:.0f} s"


class DoubleBackend(Backend):
    """Turns a model's own casts to narrower types into float64, as AllDouble does for the oracle."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        for module in gm.modules():
            if isinstance(module, fx.GraphModule):
                for node in module.graph.nodes:
                    if node.op == "call_method" and node.target in ("float", "bfloat16", "half"):
                        node.target = "double"
                    node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _double)
                module.recompile()
        return super().__call__(gm, example_inputs)


@contextmanager
def widened(dual: jvpgraph.DualModule) -> Iterator[None]:
    """AllDouble around the regions of a model; inside them DoubleBackend does the same, and Dynamo meets no mode."""
    regions = dual.regions
    if regions is None:
        yield
        return
    compiled = regions._compiled

    def without_mode(*args: Any) -> Any:
        mode = _pop_mode()
        try:
            return compiled(*args)
        finally:
            _push_mode(mode)

    with AllDouble(), patch.object(regions, "_compiled", without_mode):
        yield


def _double(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest deviation relative to the largest entry; infinite where shapes differ or something is not finite."""
    if got.shape != wanted.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    return (got - wanted).abs().max().item() / max(scale, 1e-300) if scale or bool(got.any()) else 0.0


def examine(case: Case, backend: str = "eager", variants: Iterable[int] = (0, 1)) -> Result:
    """Compare the transformed model with the oracles: as one graph where that can be, else with regions."""
    result, start = Result(case.name), time.perf_counter()
    compiler = DoubleBackend(backend)
    try:
        _compare(case, jvpgraph.transform(_model(case), backend=compiler, dynamic=False), variants, result)
    except jvpgraph.CaptureError as error:
        cause = _first_lines(str(error).split("graph: ", 1)[-1])
        result = Result(case.name, "regions", cause)
        dual = jvpgraph.transform(_model(case), regions="auto", backend=compiler, dynamic=False)
        try:
            _compare(case, dual, variants, result)
        except jvpgraph.UnsupportedOp as refusal:
            result.capture, result.cause = "refused", "; ".join(map(str, refusal.nodes))
        result.regions = _regions_in_short(dual)
    except jvpgraph.UnsupportedOp as error:
        result.capture, result.cause = "refused", "; ".join(map(str, error.nodes))
    for report in compiler.reports if result.capture == "regions" else compiler.reports[:1]:
        rules = report.rules
        result.table += rules["table"].total()
        result.derived += rules["derived"].total()
        result.derived_ops |= rules["derived"]
    result.seconds = time.perf_counter() - start
    torch._dynamo.reset()
    return result


def _model(case: Case) -> torch.nn.Module:
    return case.build().double()  # also what the case keeps in float32: see DoubleBackend


def _compare(case: Case, dual: jvpgraph.DualModule, variants: Iterable[int], result: Result) -> None:
    """Fill in the errors. The oracles get a model of their own: some keep what they have computed."""
    model = _model(case)
    for variant in variants:
        inputs = case.inputs(variant)
        dots = random_tangents(inputs, case.tangents, seed=variant)
        with AllDouble():
            outs, out_dots, result.oracle = oracle(model, inputs, dots)
            wanted = _gradients_or_none(model, inputs)
        with torch.set_grad_enabled(wanted is not None), widened(dual):
            y, y_dot = dual(**inputs, tangents=dots)
        got = float_leaves(y)
        got_dots = [dot for _, dot in leaves(y_dot) if dot is not None]
        result.value = max([result.value, *map(relative_error, got, outs)])
        result.tangent = max([result.tangent, *map(relative_error, got_dots, out_dots)])
        if wanted is not None:
            result.gradient = max(result.gradient, _gradient_error(dual.model, wanted, got))
        result.variants += 1


def _regions_in_short(dual: jvpgraph.DualModule) -> str:
    """How many regions of which class ran as graphs, and what ran op by op."""
    assert dual.regions is not None
    groups = [g for g in dual.regions.groups if g.calls or g.cause]
    compiled = [f"{len(g.names)} x {g.kind}" for g in groups if not g.cause]
    left = [f"{len(g.names)} x {g.kind} op by op" for g in groups if g.cause]
    return ", ".join(compiled + left)


def _gradients_or_none(model: torch.nn.Module, inputs: dict) -> dict[str, torch.Tensor] | None:
    try:
        return oracle_grads(model, inputs)
    except NotImplementedError:  # flex attention has no backward on a CPU
        return None


def _gradient_error(model: torch.nn.Module, wanted: dict, outputs: list[torch.Tensor]) -> float:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    got = torch.autograd.grad(projected(outputs), parameters, allow_unused=True)
    # Relative to the largest gradient of the model: a bias under a softmax has none but rounding. A region whose
    # output goes nowhere gives its parameters zeros, which eager code leaves without a gradient.
    scale = max(w.abs().max().item() for w in wanted.values())
    errors = [(g - wanted.get(name, 0.0)).abs().max().item() for name, g in zip(names, got) if g is not None]
    assert set(wanted) <= {name for name, g in zip(names, got) if g is not None}, "gradients are missing"
    return max(errors) / scale


def _first_lines(text: str) -> str:
    text = re.sub(r" object at 0x[0-9a-f]+", "", text)  # no two runs have the same
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[:3])[:300]


def markdown(results: list[Result]) -> str:
    """The results as docs/zoo.md."""
    head = [
        "# The zoo",
        "",
        "Written by `python -m tests.zoo.run --table docs/zoo.md`; `make zoo-exact` prints the same. It has a small",
        "version of every transformer class of diffusers, in float64, at two shapes, with tangents for latents and",
        "timestep. Errors of value, tangent and parameter gradients are relative to the largest entry. The oracle is",
        "`torch.func.jvp` with the math attention, or extrapolated central differences where there is no forward AD.",
        "",
        "| model | captured | value | tangent | gradients | rules: table + derived | oracle |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for r in results:
        errors = f"{r.value:.0e} | {r.tangent:.0e} | {r.gradient:.0e} | {r.table} + {r.derived}"
        if r.capture in ("refused", "failed"):
            errors = "| | |"
        rows.append(f"| {r.name} | {r.capture} | {errors} | {r.oracle} |")
    parts = [f"* {r.name}: {r.regions}. One graph: {r.cause}" for r in results if r.capture == "regions"]
    causes = [f"* {r.name}: {r.cause}" for r in results if r.capture in ("refused", "failed")]
    reasons = [f"* {name}: {reason}" for name, reason in NOT_CONSTRUCTIBLE.items()]
    tail = [
        "",
        _summary(results),
        "",
        'With `regions="auto"`: the regions, and why there is no single graph:',
        "",
        *parts,
    ]
    tail += ["", "Refused, and why:", "", *causes, "", "Not in the zoo:", "", *reasons]
    return "\n".join(head + rows + tail) + "\n"


def _summary(results: list[Result]) -> str:
    right = {kind: sum(r.right and r.capture == kind for r in results) for kind in ("whole", "regions")}
    refused = sum(r.capture == "refused" for r in results)
    return (
        f"{right['whole']} of {len(results)} right as one graph, {right['regions']} with regions, "
        f"{refused} refused, {len(_wrong(results))} wrong"
    )


def _wrong(results: list[Result]) -> list[str]:
    return [r.name for r in results if not r.right]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="eager", choices=("eager", "inductor"))
    parser.add_argument("--table", type=Path, help="write the results there as Markdown, too")
    parser.add_argument("names", nargs="*", help="model classes; default: all")
    options = parser.parse_args()
    for quiet in QUIET:
        action, message, category = quiet.split(":")
        warnings.filterwarnings(action, message, getattr(builtins, category))
    unknown = set(options.names) - set(CASES)
    if unknown:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    results = []
    for name in options.names or CASES:
        try:
            result = examine(CASES[name], options.backend)
        except Exception as error:
            result = Result(name, "failed", f"{type(error).__name__}: {_first_lines(str(error))}")
        print(result, flush=True)
        results.append(result)
    for name, reason in NOT_CONSTRUCTIBLE.items():
        if not options.names:
            print(f"{name:38s} not built     {reason}")
    print(_summary(results))
    if options.table:
        before = options.table.read_text() if options.table.exists() else ""
        found = before.find(f"\n{sweep.TITLE}\n")
        options.table.write_text(markdown(results) + (before[found:] if found >= 0 else ""))
    wrong = _wrong(results)
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
