"""Whatever the layout of their operands, our ops give what contiguous ones give: op by op, and where Inductor chooses
the layout of what a backward is given."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import jvpgraph
from jvpgraph.kernels import aten_cpu
from jvpgraph.kernels.attention import attention
from jvpgraph.kernels.layout import for_aten
from jvpgraph.kernels.ops import OPS

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
SEEDS = 500 if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 40


# ------------------------------------------------------------------------------------------ layouts at random


ORDERS = ("permuted", "holes", "offset", "last dim", "rows apart", "as it is")
REPEATS = ("expanded", "overlapping")


def in_some_layout(x: Tensor, draw: random.Random, kinds: Sequence[str] = ORDERS + REPEATS) -> Tensor:
    """The numbers of x, or, where that repeats some, of one slice of it for all of a dim, elsewhere in memory."""
    kind = draw.choice(kinds)
    if x.dim() == 0 or kind == "as it is":
        return x
    if kind == "permuted":
        order = draw.sample(range(x.dim()), x.dim())
        back = sorted(range(x.dim()), key=order.__getitem__)
        return x.permute(order).contiguous().permute(back)
    if kind == "holes":
        wide = x.new_empty([size * draw.choice((1, 2)) for size in x.shape])
        return wide[tuple(slice(0, size * 2, w // max(size, 1)) for size, w in zip(x.shape, wide.shape))].copy_(x)
    if kind == "offset":
        return x.new_empty(x.numel() + 3)[3:].view(x.shape).copy_(x)
    if kind == "last dim":
        return x.new_empty(*x.shape, 2)[..., draw.randrange(2)].copy_(x)
    if kind == "rows apart":
        return x.new_empty(*x.shape[:-1], x.shape[-1] + 1)[..., : x.shape[-1]].copy_(x)
    if kind == "expanded":
        dim = draw.randrange(x.dim())
        return x.narrow(dim, 0, 1).expand(x.shape) if x.shape[dim] else x
    if x.dim() < 2:
        return x
    flat = x.reshape(-1)  # each row begins one number behind the last one
    return flat.as_strided(x.shape, (*x.stride()[:-2], 1, 1)) if x.is_contiguous() else x


def case(draw: random.Random, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of attention_jvp_backward by name, all contiguous, and those of the others with them."""
    b, kv_heads, group = draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((1, 1, 2))
    n_q, n_k = draw.choice(((5, 7), (11, 11), (1, 9), (33, 260), (260, 260)))
    d, d_v = draw.choice(((8, 8), (8, 8), (5, 3), (1, 1), (16, 16)))
    h = kv_heads * group

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    packed = b == 1 and n_k < 100 and draw.random() < 0.3
    bias = None
    if not packed:
        shape = draw.choice(((b, h, n_q, n_k), (b, 1, 1, n_k), (1, h, n_q, n_k), (b, 1, n_q, 1), (n_k,), (n_q, n_k)))
        hides = torch.rand(shape) > 0.7
        fill = draw.choice((-1e4, -1e9, float("-inf")))
        bias = draw.choice((None, ~hides, normal(*shape), normal(*shape).masked_fill(hides, fill)))
    floating = bias is not None and bias.dtype != torch.bool
    cu = (torch.tensor([0, n_q // 2, n_q], dtype=torch.int32), torch.tensor([0, 2, n_k], dtype=torch.int32))
    return {
        "q": normal(b, h, n_q, d),
        "k": normal(b, kv_heads, n_k, d),
        "v": normal(b, kv_heads, n_k, d_v),
        "q_dot": normal(b, h, n_q, d),
        "k_dot": normal(b, kv_heads, n_k, d),
        "v_dot": normal(b, kv_heads, n_k, d_v),
        "bias": bias,
        "bias_dot": normal(*bias.shape) if floating and bias is not None else None,
        "is_causal": draw.random() < 0.4,
        "scale": draw.choice((None, 0.3, 0.0, -0.4)),
        "window": draw.choice((None, None, [2, 3])),
        **dict(zip(("cu_seqlens_q", "cu_seqlens_kv"), cu if packed else (None, None))),
    }


def call(op: str, given: dict[str, Any]) -> tuple[Tensor, ...]:
    overload = getattr(OPS, op).default
    names = [argument.name for argument in overload._schema.arguments]
    return overload(**{name: given[name] for name in names if name in given})


def assert_layout_does_not_matter(op: str, given: dict[str, Any], draw: random.Random) -> None:
    def kinds(name: str) -> Sequence[str]:
        if name.startswith("cu_seqlens"):  # refused unless contiguous
            return ("as it is",)
        # With another q or lse than the forward's, a backward's exp(s - lse) is as large as you like.
        return ORDERS if op.endswith("backward") and not name.endswith("_grad") else ORDERS + REPEATS

    odd = {name: in_some_layout(x, draw, kinds(name)) if isinstance(x, Tensor) else x for name, x in given.items()}
    plain = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in odd.items()}
    for i, (have, want) in enumerate(zip(call(op, odd), call(op, plain), strict=True)):
        said = f"{op}, output {i}: " + ", ".join(
            f"{name} {tuple(x.shape)} {x.stride()} + {x.storage_offset()}" if isinstance(x, Tensor) else f"{name} {x}"
            for name, x in odd.items()
        )
        assert have.stride() == want.stride(), said
        assert torch.equal(have.isinf(), want.isinf()), said
        have, want = (x.double().masked_fill(x.isinf(), 0) for x in (have, want))
        size = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        assert (have - want).abs().amax().item() <= TOLERANCE[given["q"].dtype] * size if want.numel() else True, said


def try_layouts(seed: int, dtype: torch.dtype) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    given = case(draw, dtype)
    assert_layout_does_not_matter("attention", given, draw)
    assert_layout_does_not_matter("attention_jvp", given, draw)
    outs = dict(zip(("o", "lse", "o_dot", "lse_dot"), call("attention_jvp", given)))
    cotangents = {f"{name}_grad": torch.randn_like(x).contiguous() for name, x in outs.items()}
    if draw.random() < 0.5:
        cotangents["lse_grad"] = None  # ATen's kernels take no other
    floating = given["bias_dot"] is not None
    needs = {"bias_needs_grad": floating and draw.random() < 0.5, "bias_dot_needs_grad": floating}
    everything = given | {name: x.contiguous() for name, x in outs.items()} | cotangents | needs
    assert_layout_does_not_matter("attention_backward", everything, draw)
    assert_layout_does_not_matter("attention_jvp_backward", everything, draw)


@pytest.mark.fuzz
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_of_all_operands(dtype):
    for seed in range(SEEDS):
        try_layouts(seed, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [11, 260])
@pytest.mark.parametrize("name", ["o_grad", "q", "k", "v", "o", "lse"])
def test_a_backward_of_one_operand_in_another_layout(name, n, dtype):
    """Each on its own, as Inductor lays out what it saves: strides like (704, 1, 64, 2)."""
    q, k, v, o_grad = (torch.randn(2, 2, n, 32).to(dtype) for _ in range(4))
    o, lse = attention(q, k, v)
    given = {"o_grad": o_grad, "q": q, "k": k, "v": v, "bias": None, "o": o, "lse": lse}
    want = call("attention_backward", {"lse_grad": None} | given)
    for order in ((0, 3, 1, 2), (3, 0, 2, 1), (2, 3, 1, 0)):
        x = given[name]
        axes = order if x.dim() == 4 else (2, 0, 1)
        back = sorted(range(x.dim()), key=axes.__getitem__)
        apart = x.permute(axes).contiguous().repeat_interleave(2, -1)[..., ::2].permute(back)
        have = call("attention_backward", {"lse_grad": None} | given | {name: apart})
        for a, b in zip(have[:3], want[:3]):
            torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_what_atens_kernels_take_for_granted():
    x = torch.randn(2, 3, 7, 8)
    for fine in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x[:, :1].expand(2, 3, 7, 8), x[:, :, ::2]):
        assert for_aten(fine) is fine
    for wrong in (
        x.mT,
        x[..., ::2],
        x[:, :, :1].expand_as(x),
        x.as_strided((2, 3, 7, 8), (168, 56, 1, 1)),
        x[..., :1].expand_as(x),
    ):
        assert for_aten(wrong).is_contiguous()
        assert torch.equal(for_aten(wrong), wrong)
    odd = torch.empty(3, 2).T.copy_(torch.randn(2, 3))
    assert for_aten(odd).is_contiguous()


def test_layouts_are_shown_to_matter(monkeypatch):
    """The fuzzer finds it where an operand of ATen's goes there as it is."""
    monkeypatch.setattr(aten_cpu, "for_aten", lambda x: x)
    found = 0
    for seed in range(60):
        try:
            try_layouts(seed, torch.float32)
        except (AssertionError, RuntimeError) as error:
            found += isinstance(error, RuntimeError) or "output" in str(error)
    assert found > 3


# ------------------------------------------------------------------------------------------- through Inductor


class Block(nn.Module):
    """As stable-audio's: grouped heads, and the output transposed for a convolution, so that Inductor saves o, and gets
    its gradient, with the length last."""

    def __init__(self, heads: int = 2, kv_heads: int = 1, dim: int = 8) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.q, self.kv = nn.Linear(heads * dim, heads * dim), nn.Linear(heads * dim, 2 * kv_heads * dim)
        self.out = nn.Conv1d(heads * dim, heads * dim, 1)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        y = x + shift[:, None]
        q = self.q(y).view(*y.shape[:2], self.heads, self.dim).transpose(1, 2)
        k, v = self.kv(y).view(*y.shape[:2], 2, self.kv_heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(o.transpose(1, 2).flatten(2).transpose(1, 2)).transpose(1, 2)


@pytest.mark.long
def test_gradients_through_inductor():
    """Of parameters and inputs, at a second size, against the float64 model."""
    net = Block()
    dual = jvpgraph.transform(net)
    parameters = {name: p.detach().double().requires_grad_() for name, p in net.named_parameters()}
    for n in (11, 22):
        x, x_dot = torch.randn(2, n, 16, requires_grad=True), torch.randn(2, n, 16)
        shift, shift_dot = torch.randn(2, 16, requires_grad=True), torch.randn(2, 16)
        y, y_dot = dual(x, shift, tangents={"x": x_dot, "shift": shift_dot})
        y_grad = torch.randn_like(y)
        have = torch.autograd.grad(y, (x, shift, *net.parameters()), y_grad)
        inputs = [t.detach().double().requires_grad_() for t in (x, shift)]
        with sdpa_kernel(SDPBackend.MATH):
            wanted, wanted_dot = torch.func.jvp(
                lambda *given: functional_call(net, parameters, given),
                tuple(inputs),
                (x_dot.double(), shift_dot.double()),
            )
        want = torch.autograd.grad(wanted, (*inputs, *parameters.values()), y_grad.double())
        size = max(g.abs().max() for g in want)
        for a, b in zip((y, y_dot), (wanted, wanted_dot)):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        for a, b in zip(have, want):
            assert (a.double() - b).abs().max() <= 1e-5 * size
