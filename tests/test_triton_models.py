"""Whole diffusers models whose attention runs on the Triton kernel: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

import jvpgraph
from jvpgraph.kernels import attention_triton, ops
from tests.interpreter import DEVICE, INTERPRETED, run_under_the_interpreter, runs_kernels
from tests.zoo.base import QUIET
from tests.zoo.cases import CASES
from tests.zoo.oracle import oracle, random_tangents

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(quiet) for quiet in QUIET)]


def test_under_the_interpreter():
    run_under_the_interpreter(__file__)


@runs_kernels
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_value_tangent_and_gradients(name, monkeypatch):
    """float32 against forward AD of the float64 model, gradients against its own."""
    calls: Counter[str] = Counter()

    class Watched:
        attention_backward = staticmethod(attention_triton.attention_backward)

        @staticmethod
        def attention(*args, **options):
            calls["forward"] += 1
            return attention_triton.attention(*args, **options)

        @staticmethod
        def attention_jvp(*args, **options):
            calls["jvp"] += 1
            return attention_triton.attention_jvp(*args, **options)

    if INTERPRETED:
        backward = ops.attention_blocked.attention_backward  # ATen's kernels for the backward are CUDA's
        monkeypatch.setattr(Watched, "attention_backward", staticmethod(backward))
    monkeypatch.setattr(ops, "implementation", lambda *_: Watched)
    case = CASES[name]
    exact, inputs = case.build(), case.inputs()
    dots = random_tangents(inputs, case.tangents)
    outs, out_dots, _ = oracle(exact, inputs, dots)
    exact_grads = torch.autograd.grad(exact(**inputs)[0].sum(), list(exact.parameters()), allow_unused=True)

    def single(x):
        return x.to(DEVICE, torch.float32) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    model = case.build().float().to(DEVICE)
    dual = jvpgraph.transform(model, backend="eager")
    inputs = {key: single(x) for key, x in inputs.items()}
    y, y_dot = dual(**inputs, tangents={key: single(x) for key, x in dots.items()})
    grads = torch.autograd.grad(y[0].sum(), list(model.parameters()), allow_unused=True)

    def error(got, wanted) -> float:
        return ((got.double().cpu() - wanted).norm() / wanted.norm()).item()

    assert calls["jvp"] > 0
    assert error(y[0], outs[0]) < 1e-5
    assert error(y_dot[0], out_dots[0]) < 1e-4  # float32 rounds times and rotary angles
    got, wanted = (torch.cat([g.flatten().double().cpu() for g in gs if g is not None]) for gs in (grads, exact_grads))
    assert error(got, wanted) < 1e-4
