"""check_jvp passes what is right, catches what is wrong, and names where it starts."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import DiT, Spec, normal
from torch import Tensor, nn
from torch._ops import OpOverload

import jvpgraph
from jvpgraph.rules import TABLE
from jvpgraph.testing import RTOL, JvpMismatch, check_jvp, float64_tangent

aten = torch.ops.aten
DIT = Spec(norm="layer_affine", qk_norm=True, rope="real", cross=True)


def dit(dtype: torch.dtype = torch.float64) -> tuple[DiT, dict[str, Tensor], dict[str, Tensor]]:
    """A small DiT, its inputs, and tangents of the image and of the time."""
    torch.manual_seed(0)
    sizes = {"x": (2, 3, 4, 4), "t": (2,), "text": (2, 3, DIT.width)}
    inputs = {name: normal(i, size, dtype) for i, (name, size) in enumerate(sizes.items())}
    return DiT(DIT).to(dtype), inputs, {"x": normal(7, sizes["x"], dtype), "t": torch.ones(2, dtype=dtype)}


@contextmanager
def wrong_rule(op: OpOverload, factor: float) -> Iterator[None]:
    """The rule of ``op`` gives tangents that are too large."""
    rule = TABLE[op]

    def spoilt(fn: Callable[..., Any]) -> Callable[..., Any]:
        def off(*args: Any, **dots: Any) -> Any:
            out = fn(*args, **dots)
            return tuple(factor * d if d is not None else None for d in out) if isinstance(out, tuple) else factor * out

        return off

    terms = [dataclasses.replace(term, fn=spoilt(term.fn)) for term in rule.terms]
    TABLE[op] = dataclasses.replace(rule, terms=terms)
    try:
        yield
    finally:
        TABLE[op] = rule


def mismatch(model: nn.Module, inputs: Any, tangents: Any, backend: str = "eager") -> jvpgraph.testing.JvpCheck:
    with pytest.raises(JvpMismatch) as caught:
        check_jvp(model, (), inputs, tangents, backend=backend)
    assert str(caught.value) == str(caught.value.report)
    return caught.value.report


# ----------------------------------------------------------------------------------------- what is right


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "op_by_op"])
def test_right_model_passes(backend: str, dtype: torch.dtype):
    model, inputs, tangents = dit(dtype)
    report = check_jvp(model, (), inputs, tangents, backend=backend)
    assert report.passed
    assert (report.oracle, report.dtype) == ("forward AD", dtype)
    assert {c.what for c in report.comparisons} == {"value", "tangent", "gradient", "linearity", "scaling"}
    assert all(c.tolerance <= RTOL[dtype] for c in report.comparisons)
    assert "right" in str(report)
    assert "WRONG" not in str(report)


@pytest.mark.slow
def test_compiled_model_passes():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    x = torch.randn(3, 4)
    report = check_jvp(model, (x,), tangents={"input": torch.randn(3, 4)})
    assert report.backend == "inductor"
    assert report.passed


@pytest.mark.slow
def test_transformed_model_is_checked_with_its_own_settings():
    model, inputs, tangents = dit()
    dual = jvpgraph.transform(model, backend="eager", config=jvpgraph.Config(swap_attention=False))
    report = check_jvp(dual, (), inputs, tangents)
    assert report.backend == "eager"
    value = next(c for c in report.comparisons if c.what == "value")
    assert 0 < value.tolerance < 1e-13  # no attention was replaced: roundings of other layouts, and nothing else


class LastPlaces(nn.Module):
    """Rounds otherwise where it is transformed, as a processor may round a matmul of other layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.transformed = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        other = self.transformed or torch.compiler.is_compiling()
        return y * (1 + 2 * torch.finfo(y.dtype).eps) if other else y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_last_places_of_a_graph_are_right(dtype: torch.dtype):
    x = torch.randn(3, 4, dtype=dtype)
    assert check_jvp(LastPlaces().to(dtype), (x,), tangents={"x": x}, backend="eager").passed


def test_op_by_op_the_primal_is_compared_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(3, 4)
    dual = jvpgraph.transform(LastPlaces(), backend="op_by_op")
    forward = dual._dual.forward

    def transformed(*inputs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setitem(vars(dual.model), "transformed", True)
            return forward(*inputs)

    monkeypatch.setattr(dual._dual, "forward", transformed)
    with pytest.raises(JvpMismatch) as caught:
        check_jvp(dual, (x,), tangents={"x": x})
    assert [(c.what, c.tolerance) for c in caught.value.report.wrong] == [("value", 0.0)]


FAILING = """
import torch, jvpgraph
from torch import nn

def test_fails():
    x = torch.randn(2, 4)
    jvpgraph.transform(nn.Linear(4, 4), backend="eager")(x, tangents={"input": x})
    assert False, "on purpose"
"""


@pytest.mark.long
def test_a_failure_is_read_on_one_screen(tmp_path: Path):
    """Neither torch's structured trace nor what triton's bindings say at exit stands below it."""
    (tmp_path / "test_failing.py").write_text(FAILING)
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "on purpose" in said
    assert "torch.__trace" not in said
    assert "nanobind" not in said
    assert len(said.splitlines()) < 40, said


def test_expanded_input_nested_output_and_frozen_parameters_pass():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x: Tensor, scale: float) -> dict[str, Any]:
            h = self.b(self.a(x).tanh())
            return {"h": h, "more": (h * scale, x > 0), "n": 3}

    x = torch.randn(1, 3).expand(4, 3)
    report = check_jvp(Model(), (x, 2.0), tangents={"x": torch.randn(4, 3)}, backend="eager")
    assert [c.where for c in report.comparisons if c.what == "tangent"] == ["h", "more.0"]
    assert [c.where for c in report.comparisons if c.what == "gradient"] == ["a.weight", "a.bias"]


class Rounding(nn.Module):
    """A float64 model that computes in float32 on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().sin().double().exp()


def test_tolerance_is_that_of_the_narrowest_type_on_the_path():
    x = normal(0, (8,))
    report = check_jvp(Rounding(), (x,), tangents={"x": x}, backend="eager")
    assert report.dtype == torch.float32
    y, y_dot, source = float64_tangent(Rounding(), (x,), tangents={"x": x})
    torch.testing.assert_close(y[""], x.sin().exp(), rtol=1e-14, atol=0)
    torch.testing.assert_close(y_dot[""], x.sin().exp() * x.cos() * x, rtol=1e-14, atol=0)
    assert source == "forward AD"


# ------------------------------------------------------------------------------------------- the oracle


class NoForwardFormula(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


class WrongForwardFormula(NoForwardFormula):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor) -> Tensor:
        return 2 * x_dot


class Through(nn.Module):
    def __init__(self, function: Any):
        super().__init__()
        self.function, self.linear = function, nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def test_falls_back_to_differences():
    x = normal(0, (3, 4))
    report = check_jvp(Through(NoForwardFormula.apply), (x,), tangents={"x": x}, backend="op_by_op")
    assert report.oracle == "differences"
    assert "does not take" in "".join(report.notes)
    error = next(c.error for c in report.comparisons if c.what == "tangent")
    assert error < 1e-8


def test_a_functions_own_formula_that_is_wrong_is_not_believed():
    """It is what the model has, and so what is computed: the report says that it is wrong."""
    x = normal(0, (3, 4))
    report = mismatch(Through(WrongForwardFormula.apply), {"x": x}, {"x": x}, backend="op_by_op")
    assert report.oracle == "differences"
    assert "is not trusted" in "".join(report.notes)
    assert {c.what for c in report.wrong} == {"tangent"}


def test_differences_cope_with_fast_embeddings():
    class Fast(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return NoForwardFormula.apply(1000 * t)

    t = torch.rand(5, dtype=torch.float64)
    _, dot, source = float64_tangent(Fast(), (t,), tangents={"t": torch.ones_like(t)})
    assert source == "differences"
    torch.testing.assert_close(dot[""], 1000 * (1000 * t).cos(), rtol=1e-7, atol=1e-6)


def test_stop_gradient_stops_the_differences_too():
    x = normal(0, (3, 4))
    model = Through(lambda h: h.sin() * h.detach())
    _, exact, source = float64_tangent(model, (x,), tangents={"x": x})
    assert source == "forward AD"
    model.function = lambda h: NoForwardFormula.apply(h) * h.detach()
    _, slope, source = float64_tangent(model, (x,), tangents={"x": x})
    assert source == "differences"
    torch.testing.assert_close(slope, exact, rtol=1e-8, atol=1e-9)


# ---------------------------------------------------------------------------------------- what is wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "module", "place"),
    [
        (aten.native_layer_norm.default, "blocks.0.norm1 (LayerNorm)", "its output"),
        (aten.gelu.default, "blocks.0.mlp (MLP)", "between blocks.0.mlp.up and blocks.0.mlp.down"),
        (aten.cat.default, "time (TimeEmbedding)", "between its beginning and time.first"),
    ],
)
def test_wrong_rule_is_caught_and_the_first_module_named(op: OpOverload, module: str, place: str):
    model, inputs, tangents = dit()
    with wrong_rule(op, 1.001):
        report = mismatch(model, inputs, tangents)
    assert {c.what for c in report.wrong} == {"tangent"}
    assert report.deviation is not None
    assert (report.deviation.module, report.deviation.place) == (module, place)
    assert report.deviation.error == pytest.approx(1e-3, rel=0.5)
    assert report.deviation.before < 1e-12
    assert module in str(report)
    assert str(pickle.loads(pickle.dumps(JvpMismatch(report)))) == str(report)


def test_rule_that_is_not_linear_is_caught():
    model, inputs, tangents = dit()
    rule = TABLE[aten.gelu.default]
    term = rule.terms[0]

    def bent(y: Tensor, x: Tensor, a: str, *, x_dot: Tensor) -> Tensor:
        return term.fn(y, x, a, x_dot=x_dot) + 1e-4 * x_dot * x_dot

    TABLE[aten.gelu.default] = dataclasses.replace(rule, terms=[dataclasses.replace(term, fn=bent)])
    try:
        report = mismatch(model, inputs, tangents, backend="op_by_op")
    finally:
        TABLE[aten.gelu.default] = rule
    assert {c.what for c in report.wrong} == {"tangent", "linearity", "scaling"}


class Unfaithful(nn.Module):
    """What it computes under torch.compile differs."""

    def __init__(self, lie: Callable[[Tensor], Tensor]):
        super().__init__()
        self.lie, self.linear = lie, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return self.lie(h) if torch.compiler.is_compiling() else h


@pytest.mark.parametrize(
    ("lie", "wrong"),
    [
        (lambda h: h + 1, {"value"}),
        (lambda h: 1.01 * h, {"value", "tangent", "gradient"}),
        (lambda h: ScaledGradient.apply(h), {"gradient"}),
        (lambda h: h + torch.nan, {"value"}),
    ],
    ids=["value", "all", "gradient", "nan"],
)
def test_graph_that_differs_from_the_model_is_caught(lie: Callable[[Tensor], Tensor], wrong: set[str]):
    x = torch.randn(3, 4)
    report = mismatch(Unfaithful(lie), {"x": x}, {"x": torch.randn(3, 4)})
    assert {c.what for c in report.wrong} == wrong
    assert report.deviation is None
    if any(c.what == "tangent" for c in report.wrong):
        assert "the compiled graph differs" in "".join(report.notes)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.01 * grad


def test_value_without_autograd_is_caught():
    x = torch.randn(3, 4)
    report = mismatch(Unfaithful(lambda h: h.data), {"x": x}, {"x": x})
    assert "autograd" in {c.what for c in report.wrong}


def test_dropout_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"random numbers.*model\.eval"):
        check_jvp(model, (x,), tangents={"input": x})
    assert check_jvp(model.eval(), (x,), tangents={"input": x}, backend="eager").passed


def test_unknown_tangent_is_refused():
    with pytest.raises(ValueError, match="input"):
        check_jvp(nn.Linear(4, 4), (torch.randn(3, 4),), tangents={"y": torch.randn(3, 4)})


# ------------------------------------------------------------------------------------ non-finite tangents


class Root(nn.Module):
    """Its derivative at zero is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).sqrt()


@pytest.mark.parametrize("backend", ["eager", "op_by_op"])
def test_non_finite_tangent_names_the_module(backend: str):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), Root()), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    loose = jvpgraph.transform(model, backend=backend)
    assert not loose(x, tangents={"input": x})[1].isfinite().all()
    dual = jvpgraph.transform(model, backend=backend, config=jvpgraph.Config(check_finite=True))
    with pytest.raises(jvpgraph.NonFiniteTangent, match=r"Sequential\.1\.1, op aten\.sqrt"):
        dual(x, tangents={"input": x})
