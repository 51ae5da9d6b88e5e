"""jvpgraph.diagnose: planted faults are found where they are, and the figures are those of transform."""

from __future__ import annotations

import copy
import functools
import json
import math
import sys

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import jvpgraph
from jvpgraph import Config, Diagnosis
from jvpgraph.diagnosis.exact import Exact
from jvpgraph.diagnosis.lockstep import Lockstep
from jvpgraph.diagnosis.measure import _epilogue
from jvpgraph.op_by_op import OpByOp
from jvpgraph.precision import PRECISIONS
from tests.rounding import cast
from tests.zoo.base import QUIET
from tests.zoo.cases import CASES

WIDTH, HEADS = 32, 4


class TimeEmbedding(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("frequencies", torch.logspace(0, -3, WIDTH // 2))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, t):
        angle = t.to(self.dtype)[:, None] * self.frequencies.to(self.dtype)
        return self.out(torch.cat([angle.sin(), angle.cos()], -1).to(self.out.weight.dtype))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2)
        o = (scores * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.out(o.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.gate = 1.0

    def forward(self, x, c):
        x = x + self.attention(self.norm(x) + c[:, None])
        return x + self.gate * self.mlp(x)


class Undone(Block):
    """Something large is added, and taken away again by a sum."""

    def forward(self, x, c):
        large = 300 * self.mlp(x)
        y = x + large
        return super().forward(y - large, c)


class Small(nn.Module):
    def __init__(self, depth=4, time_dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.time = TimeEmbedding(time_dtype)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x, t):
        c = self.time(t).to(x.dtype)
        for block in self.blocks:
            x = block(x, c)
        return x


PLAIN = Config(tangent_precision="model")


def inputs(dtype=torch.float32, tokens=6, batch=2, largest=1.0):
    torch.manual_seed(1)
    x, x_dot = torch.randn(2, batch, tokens, WIDTH, dtype=torch.float64).to(dtype)
    t = largest * (0.1 + 0.8 * torch.rand(batch))
    return (x, t), {"x": x_dot, "t": torch.ones(batch)}


def diagnosed(model, dtype=torch.float32, largest=1.0, **options):
    args, tangents = inputs(dtype, largest=largest)
    return jvpgraph.diagnose(model, args, tangents=tangents, **{"steps": ()} | options)


def test_a_float32_model_is_right_to_rounding():
    found = diagnosed(Small())
    assert 1e-8 < found.tangent_error < 1e-5
    assert 1e-8 < found.value_error < 1e-5
    assert found.worst(1)[0].adds < 1e-5
    assert found.first_not_finite is None
    assert not found.losses
    assert all(op.adds == op.adds_in["model"] == op.adds_in["float32"] for op in found.ops)


# ------------------------------------------------------------------------------------------------- planted faults


def test_a_time_embedding_in_bfloat16():
    found = diagnosed(Small(time_dtype=torch.bfloat16), largest=1000)
    worst = found.worst(2)
    assert {op.module for op in worst} == {"time"}
    assert {op.op for op in worst} == {"aten.sin.default", "aten.cos.default"}
    assert all(op.adds > 0.1 and "TimeEmbedding.forward" in op.line for op in worst)
    lost = next(loss for loss in found.losses if loss.what == "time")
    assert (lost.module, lost.op) == ("time", "aten._to_copy.default")
    assert "input t is rounded to bfloat16" in lost.text
    assert 1e-4 < lost.error < 4e-3
    assert "input t is rounded to bfloat16" in str(found)


def test_a_time_that_is_given_in_bfloat16():
    model, (args, tangents) = Small().bfloat16(), inputs(torch.bfloat16)
    args, tangents = (args[0], args[1].bfloat16()), {**tangents, "t": tangents["t"].bfloat16()}
    found = jvpgraph.diagnose(model, args, tangents=tangents, steps=())
    assert [loss.what for loss in found.losses].count("given") == 1
    assert "input t is bfloat16 as it is given" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_sum_of_large_terms(dtype):
    model = Small()
    model.blocks[2] = Undone()
    found = diagnosed(model.to(dtype), dtype)
    worst = found.worst(1)[0]
    assert (worst.module, worst.op) == ("blocks.2", "aten.sub.Tensor")
    assert "Undone.forward" in worst.line
    assert worst.cancels < 0.05
    assert worst.adds > 20 * found.worst(1, lambda op: op.module == "blocks.1")[0].adds
    assert "sums whose terms cancel" in str(found)


def test_an_overflow_in_one_head():
    model = Small().half()
    with torch.no_grad():
        rows = model.blocks[1].attention.qkv.weight.view(3, HEADS, -1, WIDTH)
        rows[:2, 3] *= 150  # of queries and keys
    found = diagnosed(model, torch.float16, config=PLAIN)
    first = found.first_not_finite
    assert found.worst(1) == [first]
    assert (first.module, first.op) == ("blocks.1.attention", "aten.bmm.default")
    assert first.overflows
    assert f"3, {HEADS + 3} of {2 * HEADS} in dim 0" in first.where  # the head, of both samples
    assert not any(op.overflows for op in found.ops if op.module != "blocks.1.attention")
    assert math.isinf(found.tangent_error)
    assert "NOT FINITE first in the" in str(found)


def test_an_overflow_of_the_tangent_alone():
    (args, tangents), model = inputs(torch.float16), Small().half()
    tangents["x"] *= 1e3
    model.blocks[1].mlp = Steep()
    found = jvpgraph.diagnose(model, args, tangents=tangents, steps=(), config=PLAIN)
    first = found.first_not_finite
    assert first.value_not_finite == 0 < first.not_finite
    assert first.module.startswith("blocks.1")
    wide = jvpgraph.diagnose(
        model, args, tangents=tangents, steps=(), config=Config(tangent_precision="float32_matmul")
    )
    assert wide.tangent_error < 0.1


class Steep(nn.Module):
    """Small values, large slopes."""

    def forward(self, x):
        return (x * 300).sin() * 3e-3


def test_a_norm_with_tiny_variance():
    model = Small()
    with torch.no_grad():
        for parameter in model.blocks[2].mlp.parameters():
            parameter.mul_(1e-3)
    model.blocks[3].norm = Nearly()
    found = diagnosed(model.bfloat16(), torch.bfloat16)
    worst = found.worst(1)[0]
    assert (worst.module, worst.op) == ("blocks.3.norm", "aten.native_layer_norm.default")
    assert worst.adds > 0.1 > 5 * found.worst(1, lambda op: "blocks.3" not in op.module)[0].adds


class Nearly(nn.Module):
    """Of what is all but constant."""

    def forward(self, x):
        return nn.functional.layer_norm(50 + x / 50, (WIDTH,))


def test_underflow():
    (args, tangents), model = inputs(torch.float16), Small().half()
    tangents["x"] *= 1e-7
    found = jvpgraph.diagnose(model, args, tangents={"x": tangents["x"]}, steps=(), config=PLAIN)
    assert max(op.underflow for op in found.ops) > 0.1
    assert "underflow" in str(found)


def test_rotations_whose_angles_are_rounded():
    """An op without a tangent, whose values others' tangents are made of."""
    model = Small()
    model.blocks[1] = Rotated()
    found = diagnosed(model, largest=1.0)
    worst = found.worst(1)[0]
    assert (worst.module, worst.op, worst.active) == ("blocks.1", "aten.cos.default", False)
    assert worst.adds_value > 1e-4 > 10 * found.worst(2)[1].badness


class Rotated(Block):
    """By angles up to 1e5."""

    def forward(self, x, c):
        angles = torch.arange(x.shape[1])[:, None] * torch.logspace(0, 4, WIDTH)
        return super().forward(x * (angles * 1.7).cos(), c)


# ------------------------------------------------------------------------------------------- the figures are right


def error(found, wanted):
    return float((found.detach() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_final_error_is_that_of_transform(dtype, precision):
    model, (args, tangents) = Small().to(dtype), inputs(dtype)
    config = Config(tangent_precision=precision)
    found = jvpgraph.diagnose(model, args, tangents=tangents, steps=(), config=config)
    y, y_dot = jvpgraph.transform(model, backend="op_by_op", config=config)(*args, tangents=tangents)
    exact = {name: dot.double() for name, dot in tangents.items()}
    wide = copy.deepcopy(model).double()
    wide.time.frequencies = model.time.frequencies.double()
    wide.time.dtype = torch.float64
    z, z_dot = jvpgraph.transform(wide, backend="op_by_op")(*(x.double() for x in args), tangents=exact)
    assert found.value_error == pytest.approx(error(y, z), rel=1e-3)
    assert found.tangent_error == pytest.approx(error(y_dot, z_dot), rel=1e-3)
    assert (found.dtype, found.precision) == (str(dtype).removeprefix("torch."), precision)
    half = dtype is not torch.float32
    assert {op.precision for op in found.ops if op.active} == {precision}
    assert all(op.bytes_in["float32"] >= op.bytes_in["model"] for op in found.ops)
    assert any(op.bytes_in["float32"] > op.bytes_in["model"] for op in found.ops) == half
    sums = [op for op in found.ops if op.kind == "sum" and op.active and op.dtype != "float32"]
    assert all(op.adds_in["float32"] < op.adds_in["model"] / 3 for op in sums)
    assert "what each kind adds" in str(found)
    last = found.modules[-1]
    assert (last.module, last.tangent) == ("", pytest.approx(found.tangent_error, rel=1e-6))


def test_growth_and_what_a_module_takes_and_gives():
    model = Small()
    model.blocks[1].register_forward_hook(lambda module, args, out: 8 * out)
    found = diagnosed(model.bfloat16(), torch.bfloat16)
    modules = {record.module: record for record in found.modules}
    assert modules["blocks.1"].amplifies > 4
    assert modules["blocks.2"].norm_in == pytest.approx(modules["blocks.1"].norm)  # whatever comes with the time
    assert modules["blocks.2"].amplifies < 3
    assert modules["blocks.2"].tangent_in == pytest.approx(modules["blocks.1"].tangent, rel=0.5)
    assert modules["blocks.2"].adds_op in {op.op for op in found.ops if op.module == "blocks.2"}
    assert [record.depth for record in found.modules][-1] == 0


def test_times():
    model = Small(time_dtype=torch.bfloat16)
    args, tangents = inputs()
    found = jvpgraph.diagnose(model, args, tangents=tangents, times=(1.0, 30.0, 1000.0), steps=())
    assert [output.time for output in found.outputs] == [1.0, 30.0, 1000.0]
    errors = [output.tangent[""] for output in found.outputs]
    assert 5 * errors[0] < errors[2]
    assert found.worst(1)[0].time == 1000.0

    def call(t):
        return (args[0], torch.full_like(args[1], t)), {}, tangents

    same = jvpgraph.diagnose(model, tangents=None, times=(1.0,), time=call, steps=())
    assert same.outputs[0] == found.outputs[0]
    with pytest.raises(ValueError, match="no input 'when' to set to times; the tensors are: x, t"):
        jvpgraph.diagnose(model, args, tangents=tangents, times=(1.0,), time="when")


def test_differences():
    found = diagnosed(Small().bfloat16(), torch.bfloat16, steps=(0.5, 2**-4, 2**-8))
    best = found.best_differences
    assert set(best) == {"bfloat16", "float32"}
    assert best["float32"].error < 1e-3 < found.tangent_error < best["bfloat16"].error
    assert best["float32"].step == 2**-8 < best["bfloat16"].step
    assert "central differences in bfloat16" in str(found)
    single = diagnosed(Small(), steps=(2**-6,))
    assert [(row.precision, row.step) for row in single.differences] == [("float32", 2**-6)]
    assert single.differences[0].error < 1e-2


def test_nothing_of_the_model_changes():
    model = Normed().bfloat16()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    (x, _), tangents = inputs(torch.bfloat16)
    args, state = (x,), torch.get_rng_state()
    found = jvpgraph.diagnose(model, args, tangents={"x": tangents["x"]}, steps=(0.1,))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    again = jvpgraph.diagnose(model, args, tangents={"x": tangents["x"]}, steps=(0.1,))
    assert again.to_json() == found.to_json()
    assert found.tangent_error < 0.03


class Normed(nn.Module):
    """Norms with statistics, dropout, a convolution, attention with a mask, writes in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH)
        self.group, self.drop = nn.GroupNorm(4, WIDTH), nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x = self.drop(self.group(self.norm(self.into(x.transpose(1, 2))))).transpose(1, 2)
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        o = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        y = torch.empty_like(x)
        y[..., : WIDTH // 2] = o.transpose(1, 2).flatten(-2)[..., WIDTH // 2 :]
        y[..., WIDTH // 2 :] = x[..., : WIDTH // 2]
        y.mul_(2).add_(x)
        return nn.functional.dropout(y, 0.2)


def test_the_reference_is_as_large_as_what_is_alive(monkeypatch):
    """However deep the model."""
    held, sweep = [], Lockstep.sweep

    def swept(self):
        sweep(self)
        held.append(sum(storage.nbytes() for storage in self._exact_storages.values()))

    monkeypatch.setattr(Lockstep, "sweep", swept)
    peaks = []
    for depth in (2, 8):
        held.clear()
        diagnosed(Small(depth).bfloat16(), torch.bfloat16)
        peaks.append(max(held))
    assert 0 < peaks[1] < 1.1 * peaks[0]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return scale * x * x

    @staticmethod
    def jvp(ctx, x_dot, _):
        return 2 * ctx.scale * ctx.saved_tensors[0] * x_dot


class Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, x_dot):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * x_dot


class InFloat32Only(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        if x.dtype == torch.float64:
            raise TypeError("not in float64")
        return 2 * x

    @staticmethod
    def jvp(ctx, x_dot):
        return 2 * x_dot


def test_functions_with_a_jvp_of_their_own():
    class Model(nn.Module):
        def forward(self, x):
            return Cube.apply(Square.apply(x * 1.1, 0.3) + 0.2)

    (x, _), tangents = inputs(torch.bfloat16)
    found = jvpgraph.diagnose(Model(), (x,), tangents={"x": tangents["x"]}, steps=())
    y, y_dot = jvpgraph.transform(Model(), backend="op_by_op")(x, tangents={"x": tangents["x"]})
    z, z_dot = jvpgraph.transform(Model(), backend="op_by_op")(x.double(), tangents={"x": tangents["x"].double()})
    assert not found.losses
    assert found.value_error == pytest.approx(error(y, z), rel=1e-3)
    assert found.tangent_error == pytest.approx(error(y_dot, z_dot), rel=1e-3)


def test_what_cannot_be_compared_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return InFloat32Only.apply(x * 1.1) * 1.3

    (x, _), tangents = inputs(torch.bfloat16, tokens=300)
    found = jvpgraph.diagnose(Odd(), (x,), tangents={"x": tangents["x"]}, steps=())
    assert [loss.what for loss in found.losses] == ["not compared"]
    assert "not compared: the reference cannot run it (not in float64), and takes its result as it is" in str(found)
    found = jvpgraph.diagnose(Decides(), (x,), tangents={"x": tangents["x"]}, steps=())
    assert {loss.what for loss in found.losses} == {"decision", "number"}
    assert "differs from the reference" in str(found)


class Decides(nn.Module):
    def forward(self, x):
        y = x * 1.1
        level = float(y.detach().mean())
        return y * (y.detach() * 3 > torch.linspace(0.1, 2, WIDTH)) * level


def test_what_has_no_rule_is_refused_as_by_transform():
    class Refused(nn.Module):
        def forward(self, x):
            return x * x.mean().item()

    (x, _), tangents = inputs()
    with pytest.raises(jvpgraph.UnsupportedOp, match="Python number"):
        jvpgraph.diagnose(Refused(), (x,), tangents={"x": tangents["x"]})


def test_wrong_arguments():
    (args, tangents), model = inputs(), Small()
    with pytest.raises(ValueError, match="unknown reference 'float16': choose one of 'float64', 'float32'"):
        jvpgraph.diagnose(model, args, tangents=tangents, reference="float16")
    with pytest.raises(ValueError, match=r"takes an nn\.Module, not function"):
        jvpgraph.diagnose(lambda x: x, args, tangents=tangents)
    with pytest.raises(ValueError, match="no input tensor named 'y'"):
        jvpgraph.diagnose(model, args, tangents={"y": args[0]})
    with pytest.raises(ValueError, match="no tangent was given"):
        jvpgraph.diagnose(model, args)


def test_the_reference_may_be_float32():
    exact, found = (diagnosed(Small().bfloat16(), torch.bfloat16, reference=name) for name in ("float64", "float32"))
    assert found.reference == "float32"
    assert found.tangent_error == pytest.approx(exact.tangent_error, rel=1e-3)
    same = diagnosed(Small(), reference="float32")
    assert same.tangent_error < 1e-6


def test_transformed_models_bring_their_config():
    args, tangents = inputs(torch.bfloat16)
    dual = jvpgraph.transform(Small().bfloat16(), config=Config(tangent_precision="float32"))
    assert jvpgraph.diagnose(dual, args, tangents=tangents, steps=()).precision == "float32"


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.slow
def test_json_and_picture(tmp_path):
    model, (args, tangents) = Small().half(), inputs(torch.float16)
    with torch.no_grad():
        model.blocks[1].attention.qkv.weight.mul_(100)
    found = jvpgraph.diagnose(model, args, tangents=tangents, times=(0.1, 0.9), steps=(0.1, 0.01), config=PLAIN)
    found.save(tmp_path / "found.json")
    json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    assert str(Diagnosis.load(tmp_path / "found.json")) == str(found)
    assert Diagnosis.load(tmp_path / "found.json").worst(3) == found.worst(3)
    found.plot(tmp_path / "found.png")
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.size == (1320, 900)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no diagnosis of this version"):
        Diagnosis.load(tmp_path / "other.json")


def test_a_picture_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        diagnosed(Small(depth=1)).plot(tmp_path / "found.png")


# -------------------------------------------------------------------------------------------------- real networks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["WanTransformer3DModel", "FluxTransformer2DModel"])
@pytest.mark.filterwarnings(*QUIET)
def test_networks_of_diffusers(name):
    case = CASES[name]
    for dtype, variant, bounds in ((torch.float32, 0, (1e-8, 1e-4)), (torch.bfloat16, 1, (1e-3, 3.0))):
        model = case.build().to(dtype)
        given = {k: cast(v, dtype) for k, v in case.inputs(variant).items()}
        given["timestep"] = given["timestep"].float()
        tangents = {path: torch.ones_like(given[path]) for path in case.tangents}
        found = jvpgraph.diagnose(model, kwargs=given, tangents=tangents, steps=())
        assert bounds[0] < found.tangent_error < bounds[1]
        assert not [loss for loss in found.losses if loss.what == "not compared"]
        assert {"attention", "product", "norm", "sum"} <= {op.kind for op in found.ops}
        assert all(op.line.split(":")[0].endswith(".py") for op in found.ops)
        assert all(not math.isnan(op.adds) for op in found.ops if op.active)
        if name.startswith("Flux") and dtype is torch.bfloat16:  # which multiplies the time by 1000 in bfloat16
            worst = found.worst(1)[0]
            assert (worst.module, worst.op) == ("time_text_embed.time_proj", "aten.sin.default")
            assert worst.magnifies > 100 > 1 > worst.before
            assert "input timestep is rounded to bfloat16 on its way in" in str(found)


def test_autocast():
    """Weights in float32, products in bfloat16: the reference has neither rounding."""

    class Cast(Small):
        def forward(self, x, t):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x, t)

    model = Cast()
    found = diagnosed(model)
    exact = diagnosed(Small())
    assert 1e-3 < found.tangent_error < 0.05
    assert exact.tangent_error < 1e-5
    products = [op for op in found.ops if op.kind == "product"]
    assert {op.dtype for op in products} == {"bfloat16"}
    assert all(op.adds_in["float32"] < op.adds_in["model"] for op in products)
    casts = [op for op in found.ops if op.op == "aten._to_copy.default" and not op.active]
    assert {op.module for op in casts} >= {"blocks.0.attention.qkv", "blocks.3.mlp.0"}  # of weights
    assert all(1e-3 < op.adds_value < 4e-3 for op in casts if op.shape)


def test_what_is_zero_says_nothing():
    class Constant(nn.Module):
        def forward(self, x):
            y = x - x.clone()
            unit = torch.cat([x.sin(), x.cos()], -1).square().sum(-1, keepdim=True)
            return x * unit + y

    (x, _), tangents = inputs()
    found = jvpgraph.diagnose(Constant(), (x,), tangents={"x": tangents["x"]}, steps=())
    assert found.tangent_error < 1e-6
    assert any(op.is_zero for op in found.ops)
    assert found.worst(1)[0].badness < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_has_a_reference():
    """Which runs as a small graph, between ops."""

    class Flex(nn.Module):
        def forward(self, x):
            q = (x * 1.7).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            return flex_attention(q, q, q, lambda score, b, h, i, j: score - (i - j).abs())

    (x, _), tangents = inputs(torch.bfloat16)
    found = jvpgraph.diagnose(Flex(), (x,), tangents={"x": tangents["x"]}, steps=())
    y, y_dot = jvpgraph.transform(Flex(), backend="op_by_op")(x, tangents={"x": tangents["x"]})
    z, z_dot = jvpgraph.transform(Flex(), backend="op_by_op")(x.double(), tangents={"x": tangents["x"].double()})
    assert not found.losses
    assert found.value_error == pytest.approx(error(y, z), rel=1e-3)
    assert found.tangent_error == pytest.approx(error(y_dot, z_dot), rel=1e-3)


@pytest.mark.parametrize(
    ("op", "arguments", "lse"),
    [
        ("_scaled_dot_product_flash_attention", (0.0, True), (2, HEADS, 6)),
        ("_scaled_dot_product_efficient_attention", (None, True, 0.0, True), (2, HEADS, 32)),
        ("_scaled_dot_product_cudnn_attention", (None, True, 0.0, True), (2, HEADS, 6, 1)),
    ],
)
def test_the_reference_of_attention_on_gpus(op, arguments, lse):
    """Whose kernels do not take float64."""
    torch.manual_seed(0)
    q, k, v, *dots = torch.randn(6, 2, HEADS, 6, 8, dtype=torch.float64)
    func, seen = getattr(torch.ops.aten, op).default, []
    like = [q.half(), torch.empty(lse), *[None] * (len(func._schema.returns) - 2)]
    with OpByOp() as mode, mode.asleep():
        exact = Exact(seen.append)
        exact.follow(mode)
        for x, dot in zip((q, k, v), dots):
            exact.set_tangent(x, dot)
        o, o_lse, *_ = exact.run(func, (q, k, v, *arguments), {}, like)
        o_dot, lse_dot = exact.tangent(o).clone(), exact.tangent(o_lse).clone()
    assert o_lse.shape == lse_dot.shape == lse
    math_only = functools.partial(nn.functional.scaled_dot_product_attention, is_causal=True)
    with sdpa_kernel(SDPBackend.MATH):
        want = torch.func.jvp(math_only, (q, k, v), tuple(dots))
    torch.testing.assert_close((o, o_dot), want)
    figures = _epilogue(seen[0])
    assert 0.1 < float(figures["epilogue"]) <= 1
