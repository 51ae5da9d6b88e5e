"""The front door: what a user of transform and jvp relies on."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.testing import assert_close

import jvpgraph
from jvpgraph import api
from jvpgraph.functions import identity
from jvpgraph.kernels.call import Place
from jvpgraph.passes.pipeline import AFTER_COMPILER, ON_ATEN_GRAPH, ON_TORCH_GRAPH
from jvpgraph.settings import Settings
from tests.models import Checkpointed, Computed, CountOps, Output, TinyDiT, inputs, oracle

BACKENDS = ("op_by_op", "eager", "inductor")
EXACT = {"rtol": 1e-9, "atol": 1e-11}


class Wrapped(nn.Module):
    """A function as a module, with one parameter that takes part."""

    def __init__(self, fn):
        super().__init__()
        self.fn, self.gain = fn, nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x * self.gain)


def check(fn, x: Tensor, x_dot: Tensor | None = None, backend: str = "eager", **settings) -> None:
    """Value, tangent and gradients of a module around ``fn`` against torch."""
    model = Wrapped(fn)
    x_dot = torch.randn_like(x) if x_dot is None else x_dot
    y0, d0 = oracle(model, (x.clone(),), (x_dot.clone(),))
    y, d = jvpgraph.transform(model, backend=backend, **settings)(x, tangents={"x": x_dot})
    assert_close(y, y0, **EXACT)
    assert_close(d, d0, **EXACT)
    assert not d.requires_grad
    weights = torch.randn_like(y)
    (g,) = torch.autograd.grad(torch.sum((y * weights).real), model.gain)
    (g0,) = torch.autograd.grad(torch.sum((model(x) * weights).real), model.gain)
    assert_close(g, g0, **EXACT)


@pytest.mark.parametrize("backend", BACKENDS[:2])  # Inductor's are in TestDynamicShapes
def test_value_tangent_and_gradients(backend):
    model = TinyDiT().double()
    x, t, x_dot, t_dot = inputs()
    y0, d0 = oracle(model, (x, t), (x_dot, t_dot))
    y, d = jvpgraph.transform(model, backend=backend)(x, t, tangents={"x": x_dot, "t": t_dot})
    assert_close(y, y0, **EXACT)
    assert_close(d, d0, **EXACT)
    assert y.requires_grad
    assert not d.requires_grad
    grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x, t).square().sum(), list(model.parameters()))
    assert_close(grads, expected, **EXACT)


def test_without_tangents_it_is_the_model():
    model = TinyDiT().double()
    x, t, *_ = inputs()
    assert torch.equal(jvpgraph.transform(model)(x, t), model(x, t))


def test_one_of_two_inputs_active():
    model = TinyDiT().double()
    x, t, _, t_dot = inputs()
    _, d = jvpgraph.transform(model, backend="eager")(x, t=t, tangents={"t": t_dot})
    assert_close(d, oracle(lambda t: model(x, t), (t,), (t_dot,))[1], **EXACT)


class TestSharedState:
    """A transformed model is a view: nothing is copied, everything keeps its name."""

    def test_names_and_identity(self):
        model = TinyDiT()
        dual = jvpgraph.transform(model)
        assert list(dual.state_dict()) == list(model.state_dict())
        assert [n for n, _ in dual.named_parameters()] == [n for n, _ in model.named_parameters()]
        assert all(a is b for a, b in zip(dual.parameters(), model.parameters()))
        assert dual.blocks is model.blocks

    def test_moving_one_moves_the_other(self):
        model = TinyDiT()
        dual = jvpgraph.transform(model)
        dual.double()
        assert model.head.weight.dtype is torch.float64
        model.head = nn.Linear(16, 2)
        assert dual.head is model.head
        dual.eval()
        assert not model.training
        assert not model.blocks[0].training

    def test_attributes_are_the_models(self):
        model = TinyDiT()
        dual = jvpgraph.transform(model)
        dual.scale, dual.extra = 3.0, nn.Linear(2, 2)
        assert model.scale == 3.0
        assert model.extra is dual.extra
        assert "extra.weight" in dual.state_dict()
        del dual.extra
        assert not hasattr(model, "extra")
        model.eval()
        assert not dual.training
        dual.requires_grad_(False)
        assert not model.head.weight.requires_grad

    def test_hooks_run_once(self):
        model, calls = TinyDiT().double(), []
        dual = jvpgraph.transform(model, backend="op_by_op")
        dual.register_forward_pre_hook(lambda *_: calls.append("pre"))
        model.register_forward_hook(lambda *_: calls.append("post"))
        x, t, x_dot, _ = inputs()
        dual(x, t)
        dual(x, t, tangents={"x": x_dot})
        assert calls == ["pre", "post"] * 2

    def test_hooks_inside_a_compiled_graph(self):
        model = TinyDiT().double()
        model.blocks[0].register_forward_hook(lambda _module, _args, out: out * 3)
        x, t, x_dot, t_dot = inputs()
        _, d = jvpgraph.transform(model, backend="eager")(x, t, tangents={"x": x_dot, "t": t_dot})
        assert_close(d, oracle(model, (x, t), (x_dot, t_dot))[1], **EXACT)

    def test_state_dict_round_trip_through_a_file(self):
        dual, other = jvpgraph.transform(TinyDiT()), TinyDiT()
        file = io.BytesIO()
        torch.save(dual.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other.head.weight, dual.head.weight)

    @pytest.mark.slow
    @pytest.mark.parametrize("through", [copy.deepcopy, lambda dual: pickle.loads(pickle.dumps(dual))])
    def test_a_copy_is_independent(self, through):
        x, t, x_dot, _ = inputs()
        dual = jvpgraph.transform(TinyDiT().double(), backend="eager")
        before = dual(x, t, tangents={"x": x_dot})
        other = through(dual)
        with torch.no_grad():
            for p in dual.parameters():
                p.zero_()
        assert_close(other(x, t, tangents={"x": x_dot}), before)
        assert not dual(x, t, tangents={"x": x_dot})[1].any()

    def test_the_model_is_freed(self):
        model = TinyDiT()
        dual = jvpgraph.transform(model)
        reference = weakref.ref(model)
        del model, dual
        gc.collect()
        assert reference() is None


class Structured(nn.Module):
    def forward(self, x, cond, *, frames=None, kind="tuple"):
        y = x * cond["text"].sum() + sum(frames or [torch.zeros_like(x)])
        if kind == "dict":
            return {"a": y, "n": torch.tensor(3), "rest": (y * 2, None)}
        if kind == "dataclass":
            return Output(y.sin(), torch.arange(2))
        return y, [y * 2, x.detach() * 0], "label"


class TestStructure:
    """Nested inputs and outputs."""

    def setup_method(self):
        self.x, self.text = torch.randn(3).double(), torch.randn(2).double()
        self.frames = [torch.randn(3).double() for _ in range(2)]
        self.dots = [torch.randn_like(v) for v in (self.x, self.text, self.frames[1])]

    def call(self, kind, tangents):
        dual = jvpgraph.transform(Structured(), backend="eager")
        return dual(self.x, {"text": self.text}, frames=self.frames, kind=kind, tangents=tangents)

    def expected(self):
        def f(x, text, frame):
            return x * text.sum() + self.frames[0] + frame

        return oracle(f, (self.x, self.text, self.frames[1]), tuple(self.dots))

    @pytest.mark.parametrize("dotted", [False, True])
    def test_nested_tangents(self, dotted):
        x_dot, text_dot, frame_dot = self.dots
        nested = {"x": x_dot, "cond": {"text": text_dot}, "frames": [None, frame_dot]}
        flat = {"x": x_dot, "cond.text": text_dot, "frames.1": frame_dot}
        (y, (twice, zero), label), (dot, (twice_dot, zero_dot), no_dot) = self.call("tuple", flat if dotted else nested)
        y0, d0 = self.expected()
        assert_close((y, dot), (y0, d0), **EXACT)
        assert_close(twice_dot, 2 * d0, **EXACT)
        assert label == "label"
        assert no_dot is None
        assert not zero_dot.any()
        assert zero.shape == zero_dot.shape
        assert_close(twice, 2 * y0, **EXACT)

    def test_dict(self):
        out, dot = self.call("dict", {"x": self.dots[0]})
        assert list(out) == list(dot) == ["a", "n", "rest"]
        assert dot["n"] is None
        assert dot["rest"][1] is None
        assert_close(dot["rest"][0], 2 * dot["a"], **EXACT)

    def test_dataclass(self):
        out, dot = self.call("dataclass", {"x": self.dots[0]})
        assert isinstance(dot, Output)
        assert dot.index is None
        assert out.sample.shape == dot.sample.shape


@pytest.mark.parametrize("backend", ["op_by_op", "eager"])
@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda x: x.clone().mul_(2).add_(x).sin_(), id="in-place"),
        pytest.param(lambda x: _write_a_slice(x), id="in-place on a view"),
        pytest.param(lambda x: x + x.clone().fill_(2).zero_() + x.sin().uniform_(1, 1), id="in-place overwriting"),
        pytest.param(lambda x: torch.sin(x * 2, out=None) * x.clone().masked_fill_(x > 0, 3), id="in-place masks"),
        pytest.param(lambda x: _fill_a_buffer(x), id="write into a fresh buffer"),
        pytest.param(lambda x: x[torch.argsort(x[:, 0])] * (x > 0), id="integers and booleans"),
        pytest.param(lambda x: torch.view_as_real(torch.polar(x, x.cos()) * (1 + 2j)).sum(-1), id="complex"),
        pytest.param(lambda x: torch.view_as_complex(x.reshape(3, 2, 2).contiguous()).abs(), id="view as complex"),
        pytest.param(lambda x: torch.fft.rfft(x, dim=0).real, id="fft"),
        pytest.param(lambda x: x.unsqueeze(0).expand(5, -1, -1).sin().sum(0), id="expand"),
        pytest.param(lambda x: torch.einsum("ij,kj->ik", x, x.softmax(0)), id="einsum"),
        pytest.param(lambda x: F.one_hot(x.argmax(-1), 4).to(x) * x.logsumexp(-1, keepdim=True), id="one-hot"),
        pytest.param(lambda x: torch.zeros_like(x).scatter_add(0, _index(x), x * x), id="scatter"),
        pytest.param(lambda x: torch.where(x > 0, x.exp(), x / 2), id="where"),
        pytest.param(lambda x: torch.cumsum(x, 0).tril(), id="cumsum"),
        pytest.param(lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"), id="interpolate"),
        pytest.param(lambda x: F.pad(x, (1, 1), mode="reflect").unfold(1, 2, 1).prod(-1), id="pad and unfold"),
        pytest.param(lambda x: torch.linalg.norm(x, dim=-1) + x.var(-1), id="norms"),
        pytest.param(lambda x: _no_grad_part(x), id="no_grad inside"),
        pytest.param(lambda x: x.detach() * x, id="detach"),
    ],
)
def test_python_and_tensor_features(fn, backend):
    check(fn, torch.randn(3, 4).double(), backend=backend)


def _write_a_slice(x):
    y = x.clone()
    y[1:, ::2] = x[:-1, 1::2].exp()
    y.t()[0].mul_(3)
    return y


def _fill_a_buffer(x):
    out = torch.empty(4, 3, dtype=x.dtype)
    out.copy_(x.t())
    out[2] = 0
    return out.square()


def _index(x):
    return torch.zeros(x.shape, dtype=torch.long) + torch.arange(x.shape[0])[:, None] // 2


def _no_grad_part(x):
    with torch.no_grad():
        scale = torch.ones(4).double()
    return x * scale


@pytest.mark.parametrize("backend", BACKENDS)
class TestLayouts:
    """Primal and tangent laid out in memory however they like."""

    @pytest.mark.long
    def test_strided(self, backend):
        x = torch.randn(8, 6).double()[::2, 1::2].t()
        check(lambda x: x.sin() @ x.t(), x, torch.randn(4, 3).double().t(), backend)

    def test_expanded(self, backend):
        x = torch.randn(1, 3).double().expand(4, 3)
        check(lambda x: x.softmax(-1).cumsum(0), x, torch.randn(1, 1).double().expand(4, 3), backend)

    def test_view_of_a_strided_tangent(self, backend):
        x = torch.randn(4, 6).double()
        check(lambda x: x.view(2, 12).sin().view(-1), x, torch.randn(6, 4).double().t(), backend)

    def test_view_as_complex_of_a_strided_tangent(self, backend):
        x = torch.randn(4, 2).double()
        fn = lambda x: torch.view_as_real(torch.view_as_complex(x * 1.0) ** 2)  # noqa: E731
        check(fn, x, torch.randn(2, 4).double().t(), backend)

    def test_inputs_that_alias(self, backend):
        base, dot = torch.randn(5).double(), torch.randn(5).double()
        fn = lambda a, b: a[1:] * b[:-1].exp()  # noqa: E731
        out, out_dot = jvpgraph.jvp(fn, (base, base), (dot, 2 * dot), backend=backend)
        y0, d0 = oracle(fn, (base, base.clone()), (dot, 2 * dot))
        assert_close((out, out_dot), (y0, d0), **EXACT)

    def test_outputs_that_are_inputs(self, backend):
        x, dot = torch.randn(3, 2).double(), torch.randn(3, 2).double()
        (same, view, y), (same_dot, view_dot, y_dot) = jvpgraph.jvp(_inputs_back, (x,), (dot,), backend=backend)
        assert_close((same, view, y), (x, x.t(), x * 2))
        assert_close((same_dot, view_dot, y_dot), (dot, dot.t(), dot * 2))
        same.zero_()
        assert x.any(), "an output shares memory with the input"

    def test_output_that_repeats(self, backend):
        x, dot = torch.randn(3).double(), torch.randn(3).double()
        out, out_dot = jvpgraph.jvp(_twice_the_same, (x,), (dot,), backend=backend)
        assert_close(out_dot, (dot.cos() * 0 + dot * x.cos(), dot * x.cos()))
        assert_close(out, (x.sin(), x.sin()))


def _inputs_back(x):
    return x, x.t(), x * 2


def _twice_the_same(x):
    y = x.sin()
    return y, y


def test_dataclass_with_a_computed_field():
    """Tangents go to the fields that the constructor is given, whatever stands before them."""
    x, dot = torch.randn(3).double(), torch.randn(3).double()
    out, out_dot = jvpgraph.jvp(lambda x: Computed(x.sin()), (x,), (dot,), backend="op_by_op")
    assert_close((out.sample, out_dot.sample), (x.sin(), dot * x.cos()), **EXACT)


class TestPrecision:
    @pytest.mark.long
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        """The tangent is as far from the truth as rounding makes the value: a few units of the format."""
        model = TinyDiT().to(dtype)
        x, t, x_dot, t_dot = inputs(dtype=dtype)
        y, d = jvpgraph.transform(model)(x, t, tangents={"x": x_dot, "t": t_dot})
        exact = TinyDiT().double()
        exact.load_state_dict(model.state_dict())
        y0, d0 = oracle(exact, (x.double(), t.double()), (x_dot.double(), t_dot.double()))
        assert y.dtype is dtype
        assert d.dtype is torch.float32
        unit = torch.finfo(dtype).eps
        assert (y.double() - y0).norm() / y0.norm() < 4 * unit
        assert (d.double() - d0).norm() / d0.norm() < 4 * unit

    @pytest.mark.long
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_autocast(self, backend):
        model = TinyDiT()
        x, t, x_dot, t_dot = inputs(dtype=torch.float32)
        dual = jvpgraph.transform(model, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            y, d = dual(x, t, tangents={"x": x_dot, "t": t_dot})
            wanted = model(x, t)
        assert y.dtype is wanted.dtype
        assert (y - wanted).norm() / wanted.norm() < 0.02
        d0 = oracle(model, (x, t), (x_dot, t_dot))[1]
        assert (d - d0).norm() / d0.norm() < 0.03

    def test_mixed_promotion(self):
        x, dot = torch.randn(4, dtype=torch.bfloat16), torch.randn(4, dtype=torch.bfloat16)
        scale = torch.randn(4)
        out, out_dot = jvpgraph.jvp(lambda x: x * scale + x.float().sin(), (x,), (dot,), backend="eager")
        assert out.dtype is out_dot.dtype is torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_in_training_updates_its_statistics_once(backend):
    model = nn.BatchNorm1d(3).double().train()
    reference = copy.deepcopy(model)
    x, dot = torch.randn(8, 3).double(), torch.randn(8, 3).double()
    y, d = jvpgraph.transform(model, backend=backend)(x, tangents={"input": dot})
    standardize = lambda x: (x - x.mean(0)) / (x.var(0, unbiased=False) + model.eps).sqrt()  # noqa: E731
    assert_close((y, d), oracle(standardize, (x,), (dot,)), **EXACT)
    reference(x)
    assert_close(dict(model.named_buffers()), dict(reference.named_buffers()), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend):
    model = TinyDiT().double()
    x, t, x_dot, t_dot = inputs()
    with torch.inference_mode():
        got = jvpgraph.transform(model, backend=backend)(x, t, tangents={"x": x_dot, "t": t_dot})
    assert_close(got, oracle(model, (x, t), (x_dot, t_dot)), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_uses_one_mask(backend):
    x, dot = torch.ones(1000).double(), torch.ones(1000).double()
    dual = jvpgraph.transform(nn.Dropout(0.3).train(), backend=backend)
    y, d = dual(x, tangents={"input": dot})
    assert torch.equal(y != 0, d != 0)
    assert_close(y, d)
    assert 0.2 < (y == 0).double().mean() < 0.4


class TestActivationCheckpointing:
    @pytest.mark.parametrize("backend", BACKENDS[:2])  # Inductor's are in test_student.py
    def test_value_tangent_and_gradients(self, backend):
        model = Checkpointed(depth=2).double()
        x, t, x_dot, t_dot = inputs()
        y0, d0 = oracle(lambda x, t: TinyDiT.forward(model, x, t), (x, t), (x_dot, t_dot))
        y, d = jvpgraph.transform(model, backend=backend)(x, t, tangents={"x": x_dot, "t": t_dot})
        assert_close((y, d), (y0, d0), **EXACT)
        grads = torch.autograd.grad(y.sum(), list(model.parameters()))
        assert_close(grads, torch.autograd.grad(model(x, t).sum(), list(model.parameters())), **EXACT)

    @pytest.mark.slow
    def test_the_backward_recomputes_no_tangent(self):
        model = Checkpointed(depth=2).double()
        x, t, x_dot, t_dot = inputs()
        y, _ = jvpgraph.transform(model, backend="eager")(x, t, tangents={"x": x_dot, "t": t_dot})
        with CountOps() as backward:
            y.sum().backward()
        assert backward.ran["jvpgraph.attention_backward.default"] == 2
        assert backward.ran["jvpgraph.attention_jvp.default"] == 0
        assert backward.ran["aten.gelu.default"] == 2, "nothing was recomputed: checkpointing had no effect"


class TestDynamicShapes:
    @pytest.mark.long
    def test_no_recompilation_per_size(self):
        """Batch and length vary: dynamic=True compiles once, the default once more when the first size changes."""
        for dynamic, graphs in ((True, 1), (None, 2)):
            model = TinyDiT().double()
            dual = jvpgraph.transform(model, backend="eager", dynamic=dynamic)
            for batch, tokens in ((2, 6), (3, 8), (5, 10), (4, 7)):
                x, t, x_dot, t_dot = inputs(batch, tokens)
                y, d = dual(x, t, tangents={"x": x_dot, "t": t_dot})
                assert_close((y, d), oracle(model, (x, t), (x_dot, t_dot)), **EXACT)
            assert len(dual.reports) == graphs

    @pytest.mark.long
    def test_inductor(self):
        model = TinyDiT().double()
        dual = jvpgraph.transform(model, dynamic=True)
        for batch, tokens in ((2, 6), (3, 9)):
            x, t, x_dot, t_dot = inputs(batch, tokens)
            y, d = dual(x, t, tangents={"x": x_dot, "t": t_dot})
            assert_close((y, d), oracle(model, (x, t), (x_dot, t_dot)), **EXACT)
            grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
            assert_close(grads, torch.autograd.grad(model(x, t).square().sum(), list(model.parameters())), **EXACT)
        assert len(dual.reports) == 1


class TestErrors:
    """Bad input gets a message that says what, where and what to do."""

    def call(self, tangents, backend="eager"):
        x, t, *_ = inputs()
        return jvpgraph.transform(TinyDiT().double(), backend=backend)(x, t, tangents=tangents)

    def test_unknown_name(self):
        with pytest.raises(
            ValueError, match=r"no input tensor named 'z'.*x \(float64 \(2, 6, 4\)\), t \(float64 \(2,\)\)"
        ):
            self.call({"z": torch.zeros(2)})

    def test_shape(self):
        with pytest.raises(ValueError, match=r"tangent of 'x' has shape \(2, 6\), the input has \(2, 6, 4\)"):
            self.call({"x": torch.zeros(2, 6).double()})

    def test_dtype(self):
        with pytest.raises(ValueError, match=r"tangent of 't' has dtype torch.float32, the input has torch.float64"):
            self.call({"t": torch.zeros(2)})

    def test_device(self):
        with pytest.raises(ValueError, match=r"has device meta, the input has cpu"):
            self.call({"t": torch.zeros(2, device="meta").double()})

    def test_not_a_tensor(self):
        with pytest.raises(ValueError, match="must be a tensor, not float"):
            self.call({"t": 1.0})

    def test_nothing_given(self):
        with pytest.raises(ValueError, match=r"no tangent was given; tangents can be given for: x .*"):
            self.call({})

    def test_integer_input(self):
        dual = jvpgraph.transform(nn.Embedding(3, 2), backend="eager")
        index = torch.tensor([1, 2])
        with pytest.raises(ValueError, match=r"'input' is torch.int64 and has no tangent.*none is floating"):
            dual(index, tangents={"input": index})

    def test_arguments_of_transform(self):
        with pytest.raises(ValueError, match=r"unknown backend 'tpu'.*'inductor', 'eager', 'op_by_op'"):
            jvpgraph.transform(TinyDiT(), backend="tpu")
        with pytest.raises(ValueError, match=r"takes an nn.Module, not function.*jvpgraph.jvp"):
            jvpgraph.transform(lambda x: x)
        with pytest.raises(ValueError, match="transformed already"):
            jvpgraph.transform(jvpgraph.transform(TinyDiT()))
        with pytest.raises(ValueError, match=r"cannot skip nonsense: optional passes"):
            jvpgraph.transform(TinyDiT(), config=jvpgraph.Config(skip_passes=("nonsense",)))

    @pytest.mark.parametrize("backend", ["eager", "inductor"])
    def test_unsupported_ops_all_at_once(self, backend):
        class Mixer(nn.Module):
            def forward(self, x):
                y = torch.ops.jvpgraph_test.opaque(x)
                return torch.ops.jvpgraph_test.opaque(y.sin()) + x

        x = torch.randn(3)
        with pytest.raises(jvpgraph.UnsupportedOp) as error:
            jvpgraph.transform(Mixer(), backend=backend)(x, tangents={"x": x})
        message = str(error.value)
        assert message.startswith("2 ops on the tangent path have no JVP")
        assert message.count("  jvpgraph_test.opaque.default") == 2
        assert "input x)  test_transform.py:" in message
        assert "in Mixer.forward" in message
        _, begins = message.split("Register a rule with jvpgraph.rules.jvp, or keep the input out of the tangents.")
        assert "@jvp(torch.ops.jvpgraph_test.opaque.default)\n    def rule(y, x, *, x_dot):\n        return" in begins

    def test_unsupported_op_by_op(self):
        model = Wrapped(torch.ops.jvpgraph_test.opaque)
        x = torch.randn(3).double()
        with pytest.raises(jvpgraph.UnsupportedOp, match=r"opaque.default .*test_transform.py:\d+ in Wrapped.forward"):
            jvpgraph.transform(model, backend="op_by_op")(x, tangents={"x": x})

    def test_off_the_tangent_path_anything_goes(self):
        x, dot = torch.randn(3), torch.randn(3)
        fn = lambda x, c: x * torch.ops.jvpgraph_test.opaque(c)  # noqa: E731
        _, out_dot = jvpgraph.jvp(fn, (x, x), (dot, None), backend="eager")
        assert_close(out_dot, dot * x)

    def test_data_dependent_python(self):
        model = Wrapped(lambda x: x.sin() if x.sum() > 0 else x.cos())
        x = torch.randn(3).double().abs()
        with pytest.raises(jvpgraph.CaptureError, match=r"(?s)captured as one graph.*op_by_op"):
            jvpgraph.transform(model, backend="eager")(x, tangents={"x": x})
        check(model.fn, x, backend="op_by_op")

    def test_an_assertion_of_dynamos(self, monkeypatch):
        """As a checkpoint of attention at symbolic sizes meets one, in plain torch.compile too; regions go on."""

        def fails(self):
            raise AssertionError("lift_tracked_freevar_to_input should not be called")

        model, x = Wrapped(torch.sin), torch.randn(3).double()
        with monkeypatch.context() as patch:
            patch.setattr(torch._dynamo.symbolic_convert.InstructionTranslator, "run", fails)
            with pytest.raises(jvpgraph.CaptureError, match=r"(?s)captured as one graph: .*lift_tracked.*op_by_op"):
                jvpgraph.transform(model)(x, tangents={"x": x})
            _, x_dot = jvpgraph.transform(model, regions="auto")(x, tangents={"x": x})
        assert_close(x_dot, (1.5 * x).cos() * 1.5 * x)

    def test_an_assertion_of_the_models(self):
        def fn(x):
            assert x.isnan().any(), "the model's own"
            return x

        x = torch.randn(3)
        with pytest.raises(AssertionError, match="the model's own"):
            jvpgraph.jvp(fn, (x,), (x,), backend="op_by_op")

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_non_finite_tangents_on_request(self, backend):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.good, self.bad = Wrapped(torch.sin), Wrapped(torch.sqrt)

            def forward(self, x):
                return self.bad(self.good(x))

        x = torch.zeros(2).double()
        settings = {"backend": backend, "config": jvpgraph.Config(check_finite=True)}
        with pytest.raises(jvpgraph.NonFiniteTangent, match=r"first in Net.bad, op aten.sqrt.default"):
            jvpgraph.transform(Net(), **settings)(x, tangents={"x": torch.ones_like(x)})
        with pytest.raises(jvpgraph.NonFiniteTangent, match="given for 'x' is not finite"):
            jvpgraph.transform(Net(), **settings)(x + 1, tangents={"x": x / 0})


torch.library.define("jvpgraph_test::opaque", "(Tensor x) -> Tensor")
torch.library.impl("jvpgraph_test::opaque", "CompositeExplicitAutograd")(lambda x: x.clone())
torch.library.register_fake("jvpgraph_test::opaque", torch.empty_like)


class TestComposition:
    """Calls with tangents inside other compiled code."""

    # Dynamo's own, when it goes on behind a call that it left out.
    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_in_a_compiled_training_step(self):
        model = TinyDiT().double()
        dual = jvpgraph.transform(model, backend="eager")
        x, t, x_dot, t_dot = inputs()

        @torch.compile(backend="eager")
        def step(x):
            y, y_dot = dual(x * 2, t, tangents={"x": x_dot, "t": t_dot})
            return (y * y_dot).sum()

        y0, d0 = oracle(model, (x * 2, t), (x_dot, t_dot))
        assert_close(step(x).detach(), (y0 * d0).sum(), **EXACT)

    def test_a_jvp_inside_a_transformed_model_is_refused(self):
        """Forward over forward would need levels: one graph must not mix up two sets of tangents."""
        inner = jvpgraph.transform(Wrapped(torch.sin), backend="eager")
        model = Wrapped(lambda x: inner(x, tangents={"x": torch.ones_like(x)})[1])
        x = torch.randn(3).double()
        with pytest.raises(jvpgraph.CaptureError, match="compiled on its own"):
            jvpgraph.transform(model, backend="eager")(x, tangents={"x": x})

    @pytest.mark.slow
    def test_on_top_of_torch_compile(self):
        model = TinyDiT().double()
        x, t, x_dot, t_dot = inputs()
        dual = jvpgraph.transform(torch.compile(model, backend="eager"), backend="eager")
        got = dual(x, t, tangents={"x": x_dot, "t": t_dot})
        assert_close(got, oracle(model, (x, t), (x_dot, t_dot)), **EXACT)


@pytest.mark.parametrize("backend", ["op_by_op", "eager"])
def test_tangents_have_memory_of_their_own(backend):
    """What a caller does to y_dot in place changes neither its x_dot nor the tangent of another output."""
    x, t = torch.randn(3).double(), torch.randn(3).double()
    dot = torch.ones(3).double()
    _, (a_dot, b_dot, c_dot) = jvpgraph.jvp(_shifted, (x, t), (dot, None), backend=backend)
    a_dot.mul_(100)
    assert torch.equal(dot, torch.ones_like(dot))
    assert torch.equal(b_dot, dot)
    assert torch.equal(c_dot, dot.view(3, 1))


def _shifted(x, t):
    y = x + t
    return y, y + 1, y.view(3, 1)


def test_numbers_from_active_tensors_are_refused_op_by_op():
    x = torch.randn(3).double()
    with pytest.raises(jvpgraph.UnsupportedOp, match="becomes a Python number"):
        jvpgraph.jvp(lambda x: x * float(x.sum()), (x,), (x,), backend="op_by_op")


def test_too_many_variants():
    dual = jvpgraph.transform(Wrapped(torch.sin), backend="eager", dynamic=False)
    x = torch.randn(9).double()
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in (2, 3):
            dual(x[:n], tangents={"x": x[:n]})
        with pytest.raises(jvpgraph.CaptureError, match="too many variants"):
            dual(x[:4], tangents={"x": x[:4]})


class TestMarkers:
    @pytest.mark.slow
    def test_inside_the_users_own_compiled_function(self):
        def step(x, x_dot):
            y = (jvpgraph.make_dual(x, x_dot) ** 2).sum()
            return y, jvpgraph.tangent_of(y) * 2

        x, x_dot = torch.randn(4).double(), torch.randn(4).double()
        run = torch.compile(step, backend=jvpgraph.backend(), fullgraph=True)
        y, twice = run(x.requires_grad_(), x_dot)
        assert_close(twice, 4 * (x * x_dot).sum().detach())
        assert not twice.requires_grad
        (g,) = torch.autograd.grad(y, x)
        assert_close(g, 2 * x)

    def test_refuse_to_run_elsewhere(self):
        x = torch.randn(3)
        for call in (lambda: jvpgraph.make_dual(x, x), lambda: jvpgraph.tangent_of(x)):
            with pytest.raises(RuntimeError, match="marker was executed"):
                call()
        with pytest.raises(RuntimeError, match="marker was executed"):
            torch.compile(lambda x: jvpgraph.make_dual(x, x) * 2, backend="aot_eager")(x)

    @pytest.mark.parametrize("again", [False, True])
    def test_a_graph_break_between_them_is_refused(self, again):
        """The second graph would know of no tangent, or only of those that begin in it."""

        def step(x, x_dot):
            y = jvpgraph.make_dual(x, x_dot).sin()
            torch._dynamo.graph_break()
            return jvpgraph.tangent_of(y * jvpgraph.make_dual(x, x_dot) if again else y)

        with pytest.raises(BackendCompilerFailed, match=r"the tangent would be lost.*fullgraph=True"):
            torch.compile(step, backend=jvpgraph.backend("eager"))(torch.randn(3), torch.randn(3))

    def test_a_graph_break_after_them_is_harmless(self):
        def step(x, x_dot):
            y = jvpgraph.make_dual(x, x_dot).sin()
            y_dot = jvpgraph.tangent_of(y)
            torch._dynamo.graph_break()
            return y + 1, y_dot + 1

        x, x_dot = torch.randn(2, 3)
        _, y_dot = torch.compile(step, backend=jvpgraph.backend("eager"))(x, x_dot)
        assert_close(y_dot, x.cos() * x_dot + 1)

    def test_questions_without_a_beginning_are_refused(self):
        with pytest.raises(BackendCompilerFailed, match="the tangent would be lost"):
            torch.compile(lambda x: jvpgraph.tangent_of(x.sin()), backend=jvpgraph.backend("eager"))(torch.randn(3))

    def test_check_their_arguments(self):
        x = torch.randn(3)
        with pytest.raises(ValueError, match="shape"):
            jvpgraph.make_dual(x, x[:2])
        with pytest.raises(ValueError, match="only floating"):
            jvpgraph.make_dual(x.long(), x.long())


class TestJvp:
    @pytest.mark.slow
    def test_mirrors_torch_func_jvp(self):
        def fn(x, pair):
            return {"y": x @ pair[0], "z": pair[1].sin()}

        args = torch.randn(2, 3).double(), (torch.randn(3, 2).double(), torch.randn(2).double())
        dots = torch.randn(2, 3).double(), (torch.randn(3, 2).double(), torch.randn(2).double())
        assert_close(jvpgraph.jvp(fn, args, dots), torch.func.jvp(fn, args, dots), **EXACT)

    def test_has_aux(self):
        fn = lambda x: (x.sin(), {"mean": x.mean()})  # noqa: E731
        x, dot = torch.randn(3).double(), torch.randn(3).double()
        got = jvpgraph.jvp(fn, (x,), (dot,), has_aux=True, backend="eager")
        opaque = lambda x: (x.sin(), torch.ops.jvpgraph_test.opaque(x))  # noqa: E731
        assert_close(jvpgraph.jvp(opaque, (x,), (dot,), has_aux=True, backend="eager")[2], x)
        assert_close(got, torch.func.jvp(fn, (x,), (dot,), has_aux=True), **EXACT)

    def test_the_graph_is_kept(self):
        for _ in range(3):
            jvpgraph.jvp(_twice_the_same, (torch.ones(2),), (torch.ones(2),), backend="eager", dynamic=False)
        settings = Settings.of(backend="eager", dynamic=False, config=None)
        kept = api._functions.get((identity(_twice_the_same), settings), None)
        assert len(kept.reports) == 1

    def test_errors(self):
        x = torch.ones(2)
        with pytest.raises(ValueError, match="must be tuples"):
            jvpgraph.jvp(torch.sin, x, x)
        with pytest.raises(ValueError, match="1 primals but 2 tangents"):
            jvpgraph.jvp(torch.sin, (x,), (x, x))
        with pytest.raises(ValueError, match=r"tangent of '0' has shape \(3,\)"):
            jvpgraph.jvp(torch.sin, (x,), (torch.ones(3),))


class TestExplain:
    @pytest.mark.long
    def test_counts(self):
        model = TinyDiT(depth=2)
        x, t, x_dot, t_dot = inputs(dtype=torch.float32)
        found = jvpgraph.transform(model).explain(x, t, tangents={"x": x_dot, "t": t_dot})
        assert len(found.swapped) == found.fused == 2
        assert not found.left
        assert not found.unsupported
        assert found.table.total() > 30
        assert found.active >= found.table.total()
        symbols = {meaning: symbol for symbol, (meaning, _) in found.sizes.items()}
        N, B = symbols["x.shape[1]"], symbols["x.shape[0]"]
        D, depth = 16, 2
        attention = 4 * B * N**2 * D
        linear = 2 * B * N * (4 * D + 4 * D) + 2 * B * D + depth * (2 * B * D * 2 * D + 2 * B * N * D * D * 8)
        assert (found.primal_flops - linear - depth * attention).expand() == 0
        assert (found.tangent_flops - linear - depth * 2 * attention).expand() == 0
        assert found.flops()[0] == found.primal_flops.subs({N: 6, B: 2})
        assert "2 swapped, 2 fused" in str(found)
        assert "2 by blocks of torch ops" in str(found)

    @pytest.mark.long
    def test_what_computes_attention(self, monkeypatch):
        """A backward that ATen's kernels do not take is said, with the reason."""
        pytest.importorskip("triton")
        monkeypatch.setattr(Place, "of", lambda device: Place("cuda", 89))
        x, x_dot = torch.randn(2, 2, 4, 5, 8, dtype=torch.bfloat16)
        masks = {
            "Triton, backward by ATen's flash": None,
            "Triton, backward by ATen's efficient kernel": x[:, :, :, :1] > 0,
            "Triton, backward by Triton: a torch.float32 bias beside torch.bfloat16": torch.randn(5, 5),
        }
        for said, mask in masks.items():
            model = Wrapped(lambda x, mask=mask: F.scaled_dot_product_attention(x, x, x, mask))
            found = jvpgraph.transform(model).explain(x, tangents={"x": x_dot})
            assert dict(found.kernels) == {said: 1}
            assert f"1 by {said}" in str(found)
        for arch, dim, way in (
            (89, 128, "blocks of torch ops: Triton's has no tile that fits sm_89 at 128 columns"),
            (89, 64, "Triton"),
            (90, 128, "Triton"),
        ):
            monkeypatch.setattr(Place, "of", lambda device, arch=arch: Place("cuda", arch))
            x, x_dot = torch.randn(2, 2, 4, 5, dim, dtype=torch.bfloat16)
            model = Wrapped(lambda x: F.scaled_dot_product_attention(x, x, x))
            found = jvpgraph.transform(model, differentiable_tangent=True).explain(x, tangents={"x": x_dot})
            forward = "Gluon" if arch == 90 else "Triton"
            assert dict(found.kernels) == {f"{forward}, backward by ATen's flash; through the tangent by {way}": 1}

    def test_unsupported_and_uncaptured(self):
        x = torch.randn(3).double()
        model = Wrapped(torch.ops.jvpgraph_test.opaque)
        with torch.no_grad():
            found = jvpgraph.transform(model).explain(x, tangents={"x": x})
        assert [node.op for node in found.unsupported] == ["jvpgraph_test.opaque.default"]
        assert "in Wrapped.forward" in str(found)
        branching = Wrapped(lambda x: x if x.sum() > 0 else -x)
        assert "not captured" in str(jvpgraph.transform(branching).explain(x, tangents={"x": x}))

    def test_a_model_on_meta(self):
        """What is too large for this machine is explained on the meta device, on the default backend too."""

        class Modulated(nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.out = nn.Parameter(torch.randn(1, 2, 4)), nn.Linear(4, 4)

            def forward(self, x, t):
                shift, scale = (self.table + self.out(t)[:, None]).chunk(2, dim=1)
                return self.out(F.layer_norm(x, (4,)) * (1 + scale) + shift)

        def explained() -> jvpgraph.Explanation:
            x, t = torch.randn(1, 6, 4), torch.randn(1, 4)
            return jvpgraph.transform(Modulated()).explain(x, t, tangents={"x": x, "t": t})

        with torch.device("meta"):
            on_meta = explained()
        real = explained()
        assert not on_meta.not_captured
        assert (on_meta.table, on_meta.active, on_meta.flops()) == (real.table, real.active, real.flops())

    def test_derived_rules_are_named(self):
        x = torch.rand(3).double() + 2
        found = jvpgraph.transform(Wrapped(torch.special.i0)).explain(x, tangents={"x": x})
        assert dict(found.derived) == {"aten.i0.default": 1}


@pytest.mark.slow
def test_dump_writes_one_readable_file_per_pass(tmp_path):
    x, t, x_dot, _ = inputs()
    config = jvpgraph.Config(dump=str(tmp_path))
    jvpgraph.transform(TinyDiT().double(), config=config)(x, t, tangents={"x": x_dot})
    names = sorted(path.name for path in (tmp_path / "000_graph").iterdir())
    stages = (ON_TORCH_GRAPH, ON_ATEN_GRAPH, AFTER_COMPILER)
    steps = [name for stage in stages for name in (stage.arrival, *(step.__name__ for step in stage.steps))]
    assert [n for n in names if n.endswith(".py")] == [f"{i:02d}_{step}.py" for i, step in enumerate(steps)]
    assert len([n for n in names if n.endswith(".diff")]) == len(steps) - 1
    text = (tmp_path / "000_graph" / f"{steps.index('fuse_attention'):02d}_fuse_attention.py").read_text()
    assert "# models.py:" in text
    assert "jvpgraph.attention_jvp.default" in text
    assert "float64[2, 6, 16]" in text
    for name in names:
        if name.endswith(".py"):
            compile((tmp_path / "000_graph" / name).read_text(), name, "exec")


TWO_GRAPHS = """
import sys, torch, jvpgraph
from torch._dynamo.utils import counters
factor, new = float(sys.argv[1]), float(sys.argv[2])
one = torch.ones(1, requires_grad=True)
y, _ = jvpgraph.jvp(lambda x: x.sin() * new, (one,), (torch.ones(1),))
y.sum().backward()
found = counters["inductor"], counters["aot_autograd"]
hits, misses = found[0]["fxgraph_cache_hit"] + found[1]["autograd_cache_hit"], found[0]["fxgraph_cache_miss"]

torch.library.define("own::scale", "(Tensor x) -> Tensor")
torch.library.impl("own::scale", "CompositeExplicitAutograd")(lambda x: x * 2)
torch.library.register_fake("own::scale", torch.empty_like)
jvpgraph.rules.jvp(torch.ops.own.scale.default)(lambda y, x, *, x_dot: x_dot * factor)
print(hits, misses, jvpgraph.jvp(torch.ops.own.scale, (torch.ones(1),), (torch.ones(1),))[1].item())
"""


@pytest.mark.long
def test_a_second_process_starts_warm_but_is_not_served_a_changed_rule():
    new = str(random.SystemRandom().random())  # a graph that nobody has compiled, in the cache of everybody
    for factor, is_warm in ((2, False), (7, True)):
        command = [sys.executable, "-W", "ignore", "-c", TWO_GRAPHS, str(factor), new]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        hits, misses, tangent = map(float, done.stdout.split())
        assert tangent == factor
        assert (hits > 0, misses == 0) == (is_warm, is_warm)


def test_primal_is_the_model_to_rounding():
    model = TinyDiT().float()
    x, t, x_dot, _ = inputs(dtype=torch.float32)
    config = jvpgraph.Config(swap_attention=False)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y, _ = jvpgraph.transform(model, backend="eager", config=config)(x, t, tangents={"x": x_dot})
        wanted = model(x, t)
    assert (y - wanted).abs().max() <= 16 * torch.finfo(y.dtype).eps * wanted.abs().max()


@pytest.mark.slow
def test_import_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", "import jvpgraph"], check=True)
