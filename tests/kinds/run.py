"""``python -m tests.kinds.run [--ways op_by_op inductor] [--dtypes float32] [kinds]``: every kind on every way.

Each is called three times, at two sizes: value, tangent and gradients of parameters and inputs are right, or the
package's own error names the line and what to do. Anything else is a fault. For Inductor's sake, which takes seconds
for each graph, kinds that a graph can hold are compiled several at a time.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jvpgraph
from tests.kinds.programs import COARSE, KINDS, RANDOM, TWINS

WAYS = ("op_by_op", "eager", "inductor", "auto", "regions")
SIZES = (3, 3, 5)
NEAR = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 6e-2}  # of the largest entry, or four times PyTorch's
PACKAGE = Path(jvpgraph.__file__).parent
FAULTS = ("wrong", "raw", "no line")
SEED = 5


@dataclass(frozen=True)
class Verdict:
    """``what``: right, refused, wrong, raw (an error of PyTorch's), no line (an error that does not say where)."""

    what: str
    why: str = ""


class Program(nn.Module):
    """A kind behind a layer."""

    def __init__(self, name: str):
        super().__init__()
        kind: Any = KINDS[name]
        self.before, self.kind = nn.Linear(4, 4), kind() if isinstance(kind, type) else kind

    def forward(self, x: Tensor) -> Tensor:
        return self.kind(self.before(x))


class Group(nn.Module):
    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.programs = nn.ModuleList([seeded(Program, name) for name in names])

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [program(x) for program, x in zip(self.programs, xs)]


class Model(nn.Module):
    """Kinds beside each other, each with an input of its own; with regions, the code around them runs op by op."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.group = Group(names)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [y * 1.5 for y in self.group([x * 2 for x in xs])]


@dataclass
class Call:
    """What is put in, and what is right for a single kind."""

    x: Tensor
    v: Tensor
    value: Tensor
    candidates: list[Tensor]
    gradients: list[Tensor | None] | None  # None: the model cannot be differentiated by PyTorch

    def own_error(self) -> float:
        """Four times what PyTorch's own forward AD is off by in this dtype, relative to the largest entry."""
        exact, own = self.candidates[0], self.candidates[-1]
        same = exact.shape == own.shape
        return 4 * biggest([exact.double() - own.double()]) / max(biggest([exact]), 1e-30) if same else 0.0


def model_of(names: Sequence[str], dtype: torch.dtype) -> Model:
    model = Model(names).to(dtype)
    with torch.no_grad():  # the same for a kind wherever it stands
        for name, program in zip(names, model.group.programs):
            generator = torch.Generator().manual_seed(len(name))
            for p in program.parameters():
                p.copy_(torch.rand(p.shape, generator=generator) - 0.4)
    return model


def seeded(fn: Any, *args: Any) -> Any:
    torch.manual_seed(SEED)
    return fn(*args)


def weights(y: Tensor) -> Tensor:
    return torch.rand(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype) + 0.5


def calls(name: str, dtype: torch.dtype) -> list[Call]:
    """Raises: what the kind itself raises of such inputs."""
    found = []
    for i, n in enumerate(SIZES):
        x, v = torch.randn(2, n, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(dtype)
        model = model_of([name], dtype)
        with torch.no_grad():
            value = seeded(model, [x])[0]
        found.append(Call(x, v, value, tangents(name, model, x, v), plain_gradients(model, x)))
    return found


def tangents(name: str, model: Model, x: Tensor, v: Tensor) -> list[Tensor]:
    """What may be said to be right: in float64 and, where that draws others or cannot run, as forward AD has it."""
    exact = copy.deepcopy(model).double()
    if (stand_in := TWINS.get(name)) is not None:
        model, exact = copy.deepcopy(model), copy.deepcopy(exact)
        model.group.programs[0].kind = exact.group.programs[0].kind = stand_in
    found = by_forward_ad(model, x, v) if name in RANDOM or x.dtype is torch.bfloat16 else []
    if name in RANDOM:
        return found
    try:
        return [differences(exact, x.double(), v.double()) if name not in TWINS else forward(exact, x, v), *found]
    except Exception:  # of what knows its own dtype only
        return found or by_forward_ad(model, x, v)


def differences(model: nn.Module, x: Tensor, v: Tensor, h: float = 1e-6) -> Tensor:
    with torch.no_grad():
        ahead, behind = (seeded(copy.deepcopy(model), [x + s * h * v])[0] for s in (1, -1))
    return (ahead - behind) / (2 * h)


def forward(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return seeded(torch.func.jvp, lambda x: model([x])[0], (x.to(dtype),), (v.to(dtype),))[1]


def by_forward_ad(model: nn.Module, x: Tensor, v: Tensor) -> list[Tensor]:
    try:
        return [forward(model, x, v)]
    except Exception:
        return []


def plain_gradients(model: Model, x: Tensor) -> list[Tensor | None] | None:
    x = x.clone().requires_grad_()
    try:
        y = seeded(model, [x])[0]
        return gradients([y], model, [x]) if y.requires_grad else [None] * (1 + len(list(model.parameters())))
    except Exception:
        return None


def gradients(ys: Sequence[Tensor], model: nn.Module, xs: Sequence[Tensor]) -> list[Tensor | None]:
    total: Any = sum((y * weights(y)).sum().double() for y in ys if y.requires_grad)
    return list(torch.autograd.grad(total, [*xs, *model.parameters()], allow_unused=True))


def transformed(model: Model, way: str) -> Any:
    config = jvpgraph.Config(inductor={"fallback_random": True})
    match way:
        case "op_by_op" | "eager":
            return jvpgraph.transform(model, backend=way)
        case "inductor":
            return jvpgraph.transform(model, config=config)
        case "auto":
            return jvpgraph.transform(model, regions="auto", config=config)
    return jvpgraph.transform(model, regions=Group, config=config)


def examine(names: Sequence[str], way: str, dtype: torch.dtype, wanted: dict[str, list[Call]]) -> dict[str, Verdict]:
    """Of kinds in one model; of those that fail together, each alone."""
    torch._dynamo.reset()
    model = model_of(names, dtype)
    differentiable = all(trains(wanted[name]) for name in names)
    model.requires_grad_(differentiable)
    dual, verdicts = transformed(model, way), {name: Verdict("right") for name in names}
    try:
        for i in range(len(SIZES)):
            found = [wanted[name][i] for name in names]
            xs = [call.x.clone().requires_grad_(differentiable) for call in found]
            ys, dots = seeded(lambda: dual(xs, tangents={"xs": [call.v for call in found]}))  # noqa: B023
            got = gradients(ys, model, xs) if any(y.requires_grad for y in ys) else None
            for name, verdict in compared(names, found, ys, dots, got, model):
                if verdicts[name].what == "right":
                    verdicts[name] = Verdict(verdict.what, f"call {i}: {verdict.why}" if verdict.why else "")
    except Exception as error:
        if len(names) > 1:
            return {name: v for name in names for v in examine([name], way, dtype, wanted).values()}
        return {names[0]: judged(error, i)}
    return verdicts


def judged(error: Exception, call: int) -> Verdict:
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    own = isinstance(error, ValueError) and Path(frames[-1].filename).is_relative_to(PACKAGE)
    if not (own or isinstance(error, (jvpgraph.UnsupportedOp, jvpgraph.CaptureError))):
        return Verdict("raw", f"call {call}: {type(error).__name__}: {text[:400]}")
    where = re.search(r"\w+\.py(\", line |:)\d+|the output at", text)
    return Verdict("refused" if where else "no line", f"call {call}: {text[:1500]}")


def compared(
    names: Sequence[str], found: list[Call], ys: Any, dots: Any, got: list[Tensor | None] | None, model: Model
) -> Iterator[tuple[str, Verdict]]:
    own = [list(program.parameters()) for program in model.group.programs]
    for i, (name, call) in enumerate(zip(names, found)):
        near = NEAR[torch.bfloat16 if name in COARSE else call.x.dtype]
        if not close(ys[i], call.value, near):
            yield name, Verdict("wrong", f"value {shown(ys[i])} for {shown(call.value)}")
        if dots[i] is None or dots[i].requires_grad:
            yield name, Verdict("wrong", "tangent None, or with gradients")
        elif call.candidates and not any(close(dots[i], t, max(near, call.own_error())) for t in call.candidates):
            yield name, Verdict("wrong", f"tangent {shown(dots[i])} for {shown(call.candidates[0])}")
        elif not call.candidates:
            yield name, Verdict("right", "no oracle")
        if not trains([call]):
            continue
        mine = [None] * len(call.gradients)
        if got is not None:
            first = len(found) + sum(map(len, own[:i]))
            mine = [got[i], *got[first : first + len(own[i])]]
        for which, (g, w) in enumerate(zip(mine, call.gradients)):
            zero = torch.zeros_like(next(x for x in (g, w, call.x) if x is not None))
            if not close(zero if g is None else g, zero if w is None else w, near, biggest(call.gradients)):
                yield name, Verdict("wrong", f"gradient {which}: {shown(g)} for {shown(w)}")


def biggest(tensors: Sequence[Tensor | None]) -> float:
    """The largest finite entry."""
    finite = [torch.where(x.isfinite(), x.abs(), 0.0) for x in tensors if x is not None and x.numel()]
    return max((x.max().item() for x in finite), default=0.0)


def close(got: Tensor, wanted: Tensor, near: float, scale: float = 0.0) -> bool:
    if got.shape != wanted.shape:
        return False
    size = max(scale, biggest([wanted]))
    return torch.allclose(got.double(), wanted.double(), rtol=near, atol=near * size + 1e-9, equal_nan=True)


def shown(x: Tensor | None) -> str:
    return "None" if x is None else str([float(f"{e:.3g}") for e in x.detach().flatten()[:5].double()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="default: all")
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--dtypes", nargs="*", default=["float32"])
    parser.add_argument("--together", type=int, default=8, help="how many kinds Inductor compiles at a time")
    parser.add_argument("--out", type=Path, default=Path("out/kinds"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    args.out.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for way in args.ways:
            for name, verdict in sweep(args.kinds or list(KINDS), way, dtype, args):
                counts[verdict.what] += 1
                if verdict.what in FAULTS or args.kinds:
                    print(f"{way} {dtype}: {name}: {verdict.what}: {verdict.why}", flush=True)
    print(dict(counts))
    return min(1, sum(counts[what] for what in FAULTS))


def sweep(names: Sequence[str], way: str, dtype: torch.dtype, args: Any) -> Iterator[tuple[str, Verdict]]:
    path = args.out / f"{way}-{str(dtype).removeprefix('torch.')}.jsonl"
    done = {} if args.kinds else records(path)
    wanted: dict[str, list[Call]] = {}
    with path.open("a") as log:

        def told(verdicts: dict[str, Verdict], seconds: float) -> Iterator[tuple[str, Verdict]]:
            for name, v in verdicts.items():
                record = {"kind": name, "what": v.what, "why": v.why, "seconds": round(seconds, 1)}
                print(json.dumps(record), file=log, flush=True)
                yield name, v

        for name in names:
            if name in done:
                yield name, done[name]
                continue
            try:
                wanted[name] = calls(name, dtype)
            except Exception as error:
                yield from told({name: Verdict("raises", f"{type(error).__name__}: {error}"[:200])}, 0.0)
        for group in groups(wanted, way, args):
            start = time.time()
            yield from told(examine(group, way, dtype, wanted), time.time() - start)


def records(path: Path) -> dict[str, Verdict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["kind"]: Verdict(record["what"], record["why"]) for record in map(json.loads, lines)}


def groups(wanted: dict[str, list[Call]], way: str, args: Any) -> Iterator[list[str]]:
    """What an eager graph can hold is compiled together; without a sweep of those, everything alone."""
    eager = records(args.out / "eager-float32.jsonl") if way not in ("op_by_op", "eager") else {}
    together = [n for n in wanted if n in eager and eager[n].what == "right" and n not in RANDOM and trains(wanted[n])]
    yield from (together[i : i + args.together] for i in range(0, len(together), args.together))
    yield from ([name] for name in wanted if name not in together)


def trains(found: list[Call]) -> bool:
    """Whether PyTorch has gradients of a kind."""
    return all(call.gradients is not None for call in found)


if __name__ == "__main__":
    sys.exit(main())
