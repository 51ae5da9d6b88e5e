"""What the default makes of every class: ``python -m tests.zoo.sweep [--shard 0/16] [--table docs/zoo.md] [names]``.

Inductor, in float32 and bfloat16, at two sizes without and with ``dynamic=True``, the latter with checkpointing where
the class has it; value, tangent, gradients of parameters and of the inputs that carry tangents. Right is what deviates
from the model in float64 by no more than 1e-5 (2e-2 in bfloat16) of the largest entry, or than four times what the
eager model in the same dtype does, as it is or with its ops rounded at random. What plain torch.compile of the model is
as far off as counts for itself: it may be how Inductor rounds, or a fault of Inductor's. ``regions="auto"`` tells what
could not be one graph.

Each class runs in a process of its own, which may die, and leaves a JSON file in the output folder; what is there is
not done again.
"""

from __future__ import annotations

import argparse
import builtins
import json
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import jvpgraph
from jvpgraph.regions import Regions
from tests.rounding import KINDS, Answer, RoundedOtherwise, allowed, answer, cast, dual_answer, eager_answer, errors
from tests.zoo.base import QUIET, Case
from tests.zoo.cases import CASES
from tests.zoo.oracle import AllDouble, differentiable, oracle, random_tangents

DTYPES = ("float32", "bfloat16")
# In the order of what they find: the first two have each dtype, each way to a symbolic size, and checkpointing.
RUNS = (("float32", None), ("bfloat16", True), ("float32", True), ("bfloat16", None))
TITLE = "## What the default makes of it"


def build(case: Case, dtype: torch.dtype, checkpointing: bool = False) -> nn.Module:
    """The case's model in ``dtype``, but for what its class keeps in float32."""
    model = case.build()
    kept = getattr(type(model), "_keep_in_fp32_modules", None) or ()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            narrow = torch.float32 if dtype != torch.float64 and any(k in name.split(".") for k in kept) else dtype
            tensor.data = tensor.data.to(narrow)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def has_checkpointing(case: Case) -> bool:
    return bool(getattr(case.build(), "_supports_gradient_checkpointing", False))


class Wanted:
    """What is right at one size, and how far the eager model in ``dtype`` is from it."""

    def __init__(self, case: Case, dtype: torch.dtype, variant: int):
        inputs = case.inputs(variant)
        self.inputs = cast(inputs, dtype)
        self.dots = cast(random_tangents(inputs, case.tangents, seed=variant), dtype)
        rounded = build(case, dtype)
        exact, inputs, dots = rounded.double(), cast(self.inputs, torch.float64), cast(self.dots, torch.float64)
        self.grad = True
        with AllDouble():
            try:
                with differentiable():
                    exact(**inputs)
            except NotImplementedError:  # flex attention has no backward on a CPU
                self.grad = False
            _, out_dots, _ = oracle(exact, inputs, dots)
            self.right = eager_answer(exact, inputs, dots, self.grad, tangent=False)
        self.right.tangent = out_dots
        self.own = errors(self._eager(build(case, dtype)), self.right)
        self.case, self.dtype = case, dtype
        if self.own["tangent"] == float("inf"):
            self.own["tangent"] = 10 * self.own["value"]

    def rounded_otherwise(self) -> dict[str, float]:
        """How far off the eager model is when each of its ops rounds at random, as in a gradient that cancels out."""
        model = build(self.case, self.dtype)
        with RoundedOtherwise():
            found = self._eager(model)
        return errors(found, self.right)

    def _eager(self, model: nn.Module) -> Answer:
        try:
            return eager_answer(model, self.inputs, self.dots, self.grad)
        except (RuntimeError, NotImplementedError):  # without a forward formula, as the oracle found
            found = eager_answer(model, self.inputs, self.dots, self.grad, tangent=False)
            found.tangent = [dot.new_full(dot.shape, float("nan")) for dot in self.right.tangent]
            return found


def examine(
    case: Case,
    dtype_name: str,
    dynamic: bool | None,
    checkpointing: bool = False,
    variants: Sequence[int] = (0, 1),
) -> dict[str, Any]:
    """One run: a model that is called at its sizes, and compared."""
    dtype, start = getattr(torch, dtype_name), time.perf_counter()
    result: dict[str, Any] = {"dtype": dtype_name, "dynamic": dynamic, "checkpointing": checkpointing, "sizes": 0}
    worst: dict[str, float] = {}
    try:
        dual = jvpgraph.transform(build(case, dtype, checkpointing), regions="auto", dynamic=dynamic)
        for variant in variants:
            wanted = Wanted(case, dtype, variant)
            found = errors(dual_answer(dual, wanted.inputs, wanted.dots, wanted.grad), wanted.right)
            off = _beyond(found, allowed(dtype, wanted.own))
            if off and (off := _beyond(found, allowed(dtype, wanted.own, wanted.rounded_otherwise()))):
                wrong = _beyond(found, allowed(dtype, wanted.own, _plain(case, wanted, dtype, dynamic, checkpointing)))
                result.setdefault("wrong" if wrong else "compiled", {})[variant] = wrong or off
            worst = {kind: max(found[kind], worst.get(kind, 0.0)) for kind in found}
            result["sizes"] += 1
            result["gradients"] = wanted.grad
        assert dual.regions is not None
        status = next((s for s in ("wrong", "compiled") if s in result), "right")
        result |= {"status": status, "graphs": len(dual.reports), **_capture(dual.regions)}
    except jvpgraph.UnsupportedOp as error:
        result |= {"status": "refused", "cause": "; ".join(map(str, error.nodes))}
    except Exception as error:  # a sweep goes on
        told = _told(error)
        result |= {"status": "failed", "cause": told, "trace": traceback.format_exc()[-3000:]}
        if told == _raised(case, dtype, checkpointing):
            result["status"] = "the model itself raises"
    torch._dynamo.reset()
    return result | {"errors": worst, "seconds": round(time.perf_counter() - start, 1)}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _raised(case: Case, dtype: torch.dtype, checkpointing: bool) -> str:
    """What the model raises where it is called without us; empty where it does not."""
    try:
        build(case, dtype, checkpointing)(**cast(case.inputs(0), dtype))
    except Exception as error:  # whatever it is, it is compared
        return _told(error)
    return ""


def _beyond(found: dict[str, float], limit: dict[str, float]) -> dict[str, list[float]]:
    return {kind: [found[kind], limit[kind]] for kind in found if not found[kind] <= limit[kind]}


def _plain(
    case: Case, wanted: Wanted, dtype: torch.dtype, dynamic: bool | None, checkpointing: bool
) -> dict[str, float]:
    """How far plain torch.compile of the model is off; it has no tangents."""
    model = build(case, dtype, checkpointing)
    compiled = torch.compile(model, dynamic=dynamic)
    found = answer(model, lambda given: (compiled(**given), ()), wanted.inputs, tuple(wanted.dots), wanted.grad)
    found.tangent = wanted.right.tangent
    return errors(found, wanted.right)


def _capture(regions: Regions) -> dict[str, Any]:
    if regions.whole:
        return {"capture": "one graph", "cause": ""}
    groups = [g for g in regions.groups if g.calls]
    count = ", ".join(f"{len(g.names)} x {g.kind}" for g in groups)
    return {"capture": "regions" if groups else "op by op", "cause": regions.reason[:300], "regions": count}


def examine_class(case: Case, out: Path, count: int = len(RUNS)) -> None:
    """Those of the first ``count`` runs of a class that are not there yet, each written when it is done."""
    runs, checkpointing = runs_of(out, case.name), has_checkpointing(case)
    for dtype, dynamic in RUNS[len(runs) : count]:
        run = examine(case, dtype, dynamic, checkpointing and dynamic is True)
        runs.append(run | {"layers": case.config.get("num_layers")})
        print(f"  {line(case.name, runs[-1])}", flush=True)
        write(out, case.name, runs)


def shallow(case: Case, layers: int | None) -> Case:
    """The case with so many layers, where its class calls them ``num_layers``."""
    given = layers is not None and "num_layers" in case.config
    return replace(case, config=case.config | {"num_layers": layers}) if given else case


def runs_of(out: Path, name: str) -> list[dict[str, Any]]:
    file = out / f"{name}.json"
    return json.loads(file.read_text())["runs"] if file.exists() else []


def write(out: Path, name: str, runs: list[dict[str, Any]]) -> None:
    text = json.dumps({"name": name, "torch": torch.__version__, "runs": runs}, indent=1)
    (out / f"{name}.json").write_text(text + "\n")


def line(name: str, run: dict[str, Any]) -> str:
    how = f"{run['dtype']}{' dynamic' if run['dynamic'] else ''}{' checkpointing' if run['checkpointing'] else ''}"
    off = "  ".join(f"{kind} {error:.0e}" for kind, error in run["errors"].items())
    told = run.get("wrong") or run.get("compiled") or run.get("cause", "")
    many = f" x {run['graphs']}" if run.get("graphs", 1) > 1 else ""
    return (
        f"{name} {how}: {run['status'].upper()} {run.get('capture', '')}{many}  {off}  {run['seconds']:.0f} s  {told}"
    )


def shard(names: list[str], part: str) -> list[str]:
    """Every n-th name from the i-th on, for "i/n", i from 0."""
    i, n = map(int, part.split("/"))
    if not 0 <= i < n:
        raise ValueError(f"a shard is i/n with 0 <= i < n, not {part}")
    return names[i::n]


def sweep(
    names: list[str], out: Path, minutes: float, count: int = len(RUNS), options: Sequence[str] = ()
) -> list[str]:
    """Do those of the first ``count`` runs that are not there yet; the names for which there was no time."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    for i, name in enumerate(names):
        while len(runs_of(out, name)) < count:
            print(name, flush=True)
            command = [sys.executable, "-m", "tests.zoo.sweep", "--one", name, "--out", str(out), *options]
            try:
                code = subprocess.run(command, timeout=max(end - time.monotonic(), 0), check=False).returncode
            except subprocess.TimeoutExpired:
                return names[i:]
            after = runs_of(out, name)
            if len(after) < count:  # the process died in the run that follows
                dtype, dynamic = RUNS[len(after)]
                died = {"dtype": dtype, "dynamic": dynamic, "checkpointing": False, "errors": {}, "seconds": 0}
                write(out, name, [*after, died | {"status": "failed", "cause": f"its process ended with {code}"}])
    return []


def read(out: Path) -> list[dict[str, Any]]:
    """The results so far, in the order of the zoo."""
    return [{"name": name, "runs": runs} for name in CASES if (runs := runs_of(out, name))]


def bad(result: dict[str, Any]) -> bool:
    expected = ("right", "the model itself raises")
    return any(run["status"] not in expected for run in result["runs"])


def section(results: list[dict[str, Any]]) -> str:
    """The results as a part of docs/zoo.md."""
    head = [
        TITLE,
        "",
        "Written by `python -m tests.zoo.sweep --table docs/zoo.md`, from the results of `make zoo`: Inductor, at two",
        "sizes, without and with `dynamic=True`, the latter with activation checkpointing where the class has it.",
        "Errors are the largest over all calls, of value / tangent / gradients of parameters / gradients of inputs,",
        "compared with the model in float64.",
        "",
        *coverage(results),
        "",
        "| model | default | float32 | bfloat16 | checkpointing |",
        "|---|---|---|---|---|",
    ]
    rows, notes = [], []
    for result in results:
        runs = result["runs"]
        captures = list(dict.fromkeys(_verdict(run) for run in runs))
        cells = [_errors([run for run in runs if run["dtype"] == dtype]) for dtype in DTYPES]
        checkpointed = "yes" if any(run["checkpointing"] for run in runs) else ""
        rows.append(f"| {result['name']} | {', '.join(captures)} | {' | '.join(cells)} | {checkpointed} |")
        causes = [f"{run.get('regions', '')}. {run['cause']}" if run.get("regions") else run["cause"] for run in runs]
        causes += [f"{told}: {run[told]}" for run in runs for told in ("wrong", "compiled") if told in run]
        causes = [re.sub(r"/\S*/site-packages/", "", cause) for cause in causes]
        notes += [f"* {result['name']}: {cause}" for cause in dict.fromkeys(c for c in causes if c)]
    raises = "the model itself raises"
    own = [[run for run in r["runs"] if run["status"] != raises] for r in results if not bad(r)]
    count = sum(all(run.get("capture") == "one graph" for run in runs) for runs in own)
    summary = f"{count} of {len(results)} right as one graph in all runs, {sum(map(bad, results))} wrong, failed or"
    summary += " no better than plain torch.compile"
    causes = ["", 'Not one graph, and why; with `regions="auto"` the regions:', "", *notes] if notes else []
    return "\n".join([*head, *rows, "", summary, *causes]) + "\n"


def coverage(results: list[dict[str, Any]]) -> list[str]:
    """Which of the runs have been done for how many of the classes."""
    counts = []
    for i, (dtype, dynamic) in enumerate(RUNS):
        done = sum(len(result["runs"]) > i for result in results)
        counts.append(f"{dtype} {'with' if dynamic else 'without'} `dynamic=True` {done}")
    layers = [r["name"] for r in results if any(_fewer(r["name"], run) for run in r["runs"])]
    told = [f"With fewer layers than in float64: {', '.join(layers)}."] if layers else []
    return [f"So far {len(results)} of {len(CASES)} classes: {', '.join(counts)}.", *told]


def _fewer(name: str, run: dict[str, Any]) -> bool:
    config = CASES[name].config if name in CASES else {}
    return "layers" in run and run["layers"] != config.get("num_layers")


def _verdict(run: dict[str, Any]) -> str:
    if run["status"] != "right":
        return run["status"]
    return run["capture"] if run["capture"] == "one graph" else f'{run["capture"]} with `regions="auto"`'


def _errors(runs: list[dict[str, Any]]) -> str:
    found = [run["errors"] for run in runs if run["errors"]]
    return " / ".join(f"{max(e[kind] for e in found):.0e}" for kind in KINDS) if found else ""


def with_section(text: str, new: str) -> str:
    """``text`` with its section of this title replaced, or one more at its end."""
    before, found, after = text.partition(f"\n{TITLE}\n")
    if not found:
        return f"{text.rstrip()}\n\n{new}"
    rest = after.find("\n## ")
    return f"{before}\n{new}" + (after[rest:] if rest >= 0 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th class from the i-th on, i from 0")
    parser.add_argument("--out", type=Path, default=Path("out/zoo"), help="folder of the JSON files")
    parser.add_argument("--minutes", type=float, default=20, help="stop after this long, to go on when called again")
    parser.add_argument("--runs", type=int, default=len(RUNS), help="only so many of the runs of each class")
    parser.add_argument("--layers", type=int, help="so many layers, where a class calls them num_layers")
    parser.add_argument("--again", action="store_true", help="do again what is there")
    parser.add_argument("--table", type=Path, help="write what is there into this file as Markdown, and run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help="model classes; default: all of the shard")
    options = parser.parse_args()
    if options.table:
        options.table.write_text(with_section(options.table.read_text(), section(read(options.out))))
        return
    if options.one:
        for quiet in QUIET:
            action, message, category = quiet.split(":")
            warnings.filterwarnings(action, message, getattr(builtins, category))
        examine_class(shallow(CASES[options.one], options.layers), options.out, options.runs)
        return
    unknown = set(options.names) - set(CASES)
    if unknown:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    names = options.names or shard(list(CASES), options.shard)
    if options.again:
        for name in names:
            (options.out / f"{name}.json").unlink(missing_ok=True)
    passed_on = ["--runs", str(options.runs), *(["--layers", str(options.layers)] if options.layers else [])]
    left = sweep(names, options.out, options.minutes, options.runs, passed_on)
    done = [result for result in read(options.out) if result["name"] in names]
    wrong = [result["name"] for result in done if bad(result)]
    print(f"{len(done)} of {len(names)} classes done; wrong, failed or as plain torch.compile: {', '.join(wrong) or 0}")
    if left:
        sys.exit(f"no time for {', '.join(left)}: run it again")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
