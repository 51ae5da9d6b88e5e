"""The registry of the zoo, complete by construction: python -m tests.zoo.cases --check [class names]."""

import argparse
import builtins
import time
import warnings
from collections.abc import Callable, Iterable

import torch

from . import cases_image, cases_mmdit, cases_other, cases_video, cases_wan  # noqa: F401  (each fills CASES)
from .base import CASES, PACKAGE, QUIET, Case, model_class, modules
from .oracle import float_leaves, forward_ad, oracle, oracle_grads, random_tangents

# Models of diffusers.models.transformers that have no case, each with the reason.
NOT_CONSTRUCTIBLE: dict[str, str] = {}


def transformer_classes() -> list[str]:
    """The names of all models (ModelMixin subclasses) defined in diffusers.models.transformers."""
    return [n for n in modules() if any(base.__name__ == "ModelMixin" for base in model_class(n).__mro__)]


def missing_classes() -> list[str]:
    """Models that have neither a case nor a reason for having none."""
    return sorted(set(transformer_classes()) - set(CASES) - set(NOT_CONSTRUCTIBLE))


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t.detach().clone() for n, t in tensors.items()}


def refusal(f: Callable, *args: object) -> str:
    try:
        f(*args)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return ""


def check(case: Case) -> str:
    """Build, run and differentiate both variants; one line saying how that went."""
    model, kinds, remarks = case.build(), set(), []
    size = sum(p.numel() for p in model.parameters())
    for variant in (0, 1):
        inputs = case.inputs(variant)
        before = snapshot(model)
        with torch.no_grad():
            y, again = (float_leaves(model(**inputs)) for _ in range(2))
        assert y, "no floating output"
        assert all(t.isfinite().all() for t in y), "the output is not finite"
        assert all(t.any() for t in y), "the output is zero"
        if not all(torch.equal(a, b) for a, b in zip(y, again)):
            remarks.append("stochastic")
        after = snapshot(model)
        if changed := [n for n in before if n not in after or not torch.equal(before[n], after[n])]:
            remarks.append(f"changes {changed}")
        out, out_dot, kind = oracle(model, inputs, random_tangents(inputs, case.tangents))
        kinds.add(kind)
        if kind == "differences":
            remarks.append(refusal(forward_ad, model, inputs, random_tangents(inputs, case.tangents)))
        worst = max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(out, y))
        assert worst < 1e-5, f"the oracle's primal is off by {worst:.1e}"
        assert all(t.isfinite().all() for t in out_dot), "a tangent is not finite"
        assert any(t.any() for t in out_dot), "every tangent is zero"
        for path in case.tangents:
            alone = oracle(model, inputs, random_tangents(inputs, (path,)))[1]
            assert any(t.any() for t in alone), f"the tangent of {path} has no effect"
        try:
            grads = oracle_grads(model, inputs)
        except NotImplementedError as error:  # flex attention has no backward on a CPU
            remarks.append(f"no gradients: {error}")
            continue
        idle = [n for n, p in model.named_parameters() if p.requires_grad and not grads.get(n, p.new_zeros(1)).any()]
        if idle:
            remarks.append(f"{len(idle)} idle parameters: {', '.join(idle[:3])}")
    shapes = "  ".join(str(tuple(t.shape)) for t in y)
    remarks = "; ".join(dict.fromkeys(remarks))
    return f"ok  {'/'.join(sorted(kinds)):11}  {size:8,} parameters  {shapes}  {remarks}"


def check_all(names: Iterable[str]) -> int:
    failures = 0
    for name in names:
        start = time.perf_counter()
        try:
            line = check(CASES[name])
        except Exception as error:
            failures += 1
            line = f"FAILED  {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{name:42} {time.perf_counter() - start:5.1f} s  {line}", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=f"The zoo: every model of {PACKAGE}")
    parser.add_argument("--check", nargs="*", metavar="CLASS", help="build and differentiate these, or all")
    names = parser.parse_args().check
    if names is None:
        print("\n".join(f"{c.family:16} {c.name}" for c in CASES.values()))
        return
    failures = check_all(names or CASES)
    if not names:
        print(f"{len(CASES)} cases, {failures} failed")
        for name, reason in NOT_CONSTRUCTIBLE.items():
            print(f"{name:42} left out: {reason}")
        for name in missing_classes():
            failures += 1
            print(f"{name:42} MISSING")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for message in QUIET:
        action, text, category = message.split(":")
        warnings.filterwarnings(action, text, getattr(builtins, category))
    main()
