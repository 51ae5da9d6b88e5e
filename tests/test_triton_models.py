"""Whole diffusers models whose attention runs on the Triton kernel: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import jvpgraph
from jvpgraph.kernels import attention_triton, backward_triton, choose
from jvpgraph.kernels.call import Call
from tests.interpreter import (  # noqa: F401 - a fixture
    DEVICE,
    INTERPRETED,
    repaired_bfloat16,
    runs_kernels,
)
from tests.zoo.base import QUIET
from tests.zoo.cases import CASES
from tests.zoo.oracle import oracle, random_tangents

MODELS = ["FluxTransformer2DModel", "WanTransformer3DModel"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("repaired_bfloat16"),
    *(pytest.mark.filterwarnings(quiet) for quiet in QUIET),
]


class Errors(NamedTuple):
    """Relative to the float64 model, in the norm."""

    value: float
    tangent: float
    gradients: float


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel ran. On a processor they take what they take on a GPU, but for ATen's backward."""
    counter: Counter[str] = Counter()

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            counter[f"{owner.__name__.split('.')[-1]}.{name}"] += 1
            return function(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(attention_triton, "attend")
    watch(backward_triton, "differentiate")
    with choose.forced(on_the_interpreter) if INTERPRETED else contextlib.nullcontext():
        yield counter


def on_the_interpreter(call: Call) -> choose.Plan:
    """What a GPU would take."""
    is_ours = call.q.dtype != torch.float64 and os.environ.get("JVPGRAPH_ATTENTION") != "blocked"
    backward = choose.TRITON_BACKWARD if is_ours and call.q.dtype == torch.bfloat16 else choose.BLOCKED_BACKWARD
    return choose.Plan(choose.TRITON if is_ours else choose.BLOCKED, backward)


def errors(name: str, dtype: torch.dtype) -> Errors:
    """Of the model in dtype, transformed, against forward AD of the float64 one, and gradients against its own."""
    case = CASES[name]
    exact, inputs = case.build(), case.inputs()
    dots = random_tangents(inputs, case.tangents)
    outs, out_dots, _ = oracle(exact, inputs, dots)
    exact_grads = torch.autograd.grad(exact(**inputs)[0].sum(), list(exact.parameters()), allow_unused=True)

    def narrow(x: Any) -> Any:
        return x.to(DEVICE, dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    model = case.build().to(DEVICE, dtype)
    dual = jvpgraph.transform(model, backend="eager")
    inputs = {key: narrow(x) for key, x in inputs.items()}
    y, y_dot = dual(**inputs, tangents={key: narrow(x) for key, x in dots.items()})
    grads = torch.autograd.grad(y[0].sum(), list(model.parameters()), allow_unused=True)

    def error(got: Tensor, wanted: Tensor) -> float:
        return ((got.double().cpu() - wanted).norm() / wanted.norm()).item()

    got, wanted = (torch.cat([g.flatten().double().cpu() for g in gs if g is not None]) for gs in (grads, exact_grads))
    return Errors(error(y[0], outs[0]), error(y_dot[0], out_dots[0]), error(got, wanted))


@runs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_float32(name, ran):
    found = errors(name, torch.float32)
    assert found.value < 1e-5
    assert found.tangent < 1e-4  # float32 rounds times and rotary angles
    assert found.gradients < 1e-4
    assert ran["attention_triton.attend"] > 0


@runs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name, ran, monkeypatch):
    """As near to the float64 model as with attention in blocks of torch: the rest of the model rounds more."""
    found = errors(name, torch.bfloat16)
    attended, backwards = ran["attention_triton.attend"], ran["backward_triton.differentiate"]
    assert attended > 0
    assert backwards > 0 or not INTERPRETED
    monkeypatch.setenv("JVPGRAPH_ATTENTION", "blocked")
    torch._dynamo.reset()
    beside = errors(name, torch.bfloat16)
    assert ran["attention_triton.attend"] == attended
    assert all(mine < 1.3 * its for mine, its in zip(found, beside)), (found, beside)
