"""The registry of the zoo, complete by construction: python -m tests.zoo.cases --check [class names]."""

import argparse
import builtins
import time
import warnings
from collections.abc import Callable, Iterable

import torch

from . import cases_image, cases_mmdit, cases_other, cases_video, cases_wan  # noqa: F401  (each fills CASES)
from .base import CASES, PACKAGE, QUIET, Case, model_class, modules
from .oracle import (
    AllDouble,
    differences,
    float_leaves,
    forward_ad,
    oracle,
    oracle_grads,
    random_tangents,
)

# Transformers of diffusers that have no case, each with the reason.
NOT_CONSTRUCTIBLE: dict[str, str] = {
    "DualTransformer2DModel": "no model of its own: mixes two Transformer2DModels inside a U-Net",
    "UVit2DModel": "a U-Net that denoises discrete tokens: no latent carries a tangent",
}


def transformer_classes() -> list[str]:
    """The names of all models (ModelMixin subclasses) defined in diffusers.models.transformers."""
    return [n for n in modules() if any(base.__name__ == "ModelMixin" for base in model_class(n).__mro__)]


def missing_classes() -> list[str]:
    """Models that have neither a case nor a reason for having none."""
    return sorted(set(transformer_classes()) - set(CASES) - set(NOT_CONSTRUCTIBLE))


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t.detach().clone() for n, t in tensors.items()}


def distance(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest element."""
    return max((x - y).abs().max().item() for x, y in zip(xs, ys)) / max(y.abs().max().item() for y in ys)


def check(case: Case) -> str:
    """Build, run and differentiate both variants; one line saying how that went."""
    model, kinds, remarks, rounding = case.build(), set(), [], 0.0
    for variant in (0, 1):
        inputs = case.inputs(variant)
        before = snapshot(model)
        with torch.no_grad():
            y, again = (float_leaves(model(**inputs)) for _ in range(2))
        assert y, "no floating output"
        assert all(t.isfinite().all() for t in y), "the output is not finite"
        assert all(t.any() for t in y), "the output is zero"
        if not all(map(torch.equal, y, again)):
            remarks.append("stochastic")
        after = snapshot(model)
        if changed := [n for n in before if n not in after or not torch.equal(before[n], after[n])]:
            remarks.append(f"changes {changed}")

        tangents = random_tangents(inputs, case.tangents)
        out, out_dot, kind = oracle(model, inputs, tangents)
        kinds.add(kind)
        assert distance(out, y) < case.tolerance, "the oracle's primal is off"
        assert all(t.isfinite().all() for t in out_dot), "a tangent is not finite"
        for path in case.tangents:
            alone = oracle(model, inputs, {path: tangents[path]})[1]
            assert any(t.any() for t in alone), f"the tangent of {path} has no effect"
        if kind == "forward AD":
            with AllDouble():
                exact = forward_ad(model, inputs, tangents)[1]
            slopes = (differences(model, inputs, tangents, step)[1] for step in (1e-6, 1e-7))
            error = min(distance(slope, exact) for slope in slopes)
            assert error < 1e-6, f"forward AD and differences are {error:.1e} apart"
            rounding = max(rounding, distance(out_dot, exact))
            assert rounding < case.tolerance, f"casts move the tangent by {rounding:.1e}"
        else:
            remarks.append(refusal(forward_ad, model, inputs, tangents))
        remarks.append(idle_parameters(model, inputs))
    shapes = " ".join(str(tuple(t.shape)) for t in y)
    remarks = "; ".join(dict.fromkeys(filter(None, remarks)))
    return f"ok  {'/'.join(sorted(kinds)):11}  casts {rounding:.0e}  {shapes}  {remarks}"


def refusal(f: Callable, *args: object) -> str:
    try:
        f(*args)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return ""


def idle_parameters(model: torch.nn.Module, inputs: dict) -> str:
    try:
        grads = oracle_grads(model, inputs)
    except NotImplementedError as error:  # flex attention has no backward on a CPU
        return f"no gradients: {error}"
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    idle = [n for n in names if n not in grads or not grads[n].any()]
    return f"{len(idle)} idle parameters: {', '.join(idle[:3])}" if idle else ""


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
