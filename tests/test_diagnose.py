"""jvpgraph.diagnose: planted faults are found where they are, and the figures are those of transform."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import jvpgraph
from jvpgraph import Config

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
    assert all(op.precision == "model" and op.adds == op.adds_in["float32"] for op in found.ops)


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
    found = diagnosed(model, torch.float16)
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
    found = jvpgraph.diagnose(model, args, tangents=tangents, steps=())
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
    found = jvpgraph.diagnose(model, args, tangents={"x": tangents["x"]}, steps=())
    assert max(op.underflow for op in found.ops) > 0.1
    assert "underflow" in str(found)
