"""Attention of other packages in graphs: value, tangent and gradients against math attention in float64."""

from __future__ import annotations

import functools
import importlib
import inspect
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import jvpgraph
from jvpgraph.errors import UnsupportedOp
from tests.foreign.plain import band, blocks, neighbourhoods, plain
from tests.foreign.stand_ins import INSTALL, function_of

H, D, C = 4, 8, 16
pytestmark = pytest.mark.slow
both_ways = pytest.mark.parametrize("backend", ["eager", "op_by_op"])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


def lengths(n):
    """Of three sequences in n."""
    return [n // 4, n // 2, n - n // 4 - n // 2]


def cu(of):
    return torch.tensor([0, *of]).cumsum(0).int()


class Net(nn.Module):
    """Attention of the last rows on all, between projections."""

    def __init__(self, attention, kv_heads=H, last=None):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(C, H * D), nn.Linear(C, kv_heads * D), nn.Linear(C, kv_heads * D)
        self.out = nn.Linear(H * D, C)
        self.attention, self.last = attention, last

    def forward(self, x, t, **others):
        x = x + t[:, None, None].sin()
        rows = x if self.last is None else x[:, -self.last :]
        q, k, v = (layer(y).unflatten(-1, (-1, D)) for layer, y in ((self.q, rows), (self.k, x), (self.v, x)))
        return self.out(self.attention(q, k, v, **others).flatten(2))


def check(attention, reference, sizes=((2, 12), (3, 17)), backend="eager", dtype=torch.float32, others=None, **how):
    """A net with attention, at each of the sizes, is that with reference, at (q, k, v)."""
    net = Net(attention, **how).to(dtype)
    dual = jvpgraph.transform(net, backend=backend)
    for batch, n in sizes:
        torch.manual_seed(n)
        x, x_dot, weight = (torch.randn(batch, n, C, dtype=dtype) for _ in range(3))
        t, t_dot = torch.rand(batch, dtype=dtype), torch.ones(batch, dtype=dtype)
        more = others(n) if others else {}
        exact = Net(functools.partial(reference, **more), **how).double()
        exact.load_state_dict(net.state_dict())
        wanted, wanted_dot = torch.func.jvp(exact, (x.double(), t.double()), (x_dot.double(), t_dot.double()))
        x.requires_grad_()
        inputs = x.detach().double().requires_grad_()
        weight = weight[:, -how["last"] :] if how.get("last") else weight
        grads = torch.autograd.grad((exact(inputs, t.double()) * weight).sum(), [inputs, *exact.parameters()])
        y, y_dot = dual(x, t, tangents={"x": x_dot, "t": t_dot}, **more)
        got = torch.autograd.grad((y * weight).sum(), [x, *net.parameters()])
        for a, b in zip((y, y_dot, *got), (wanted, wanted_dot, *grads), strict=True):
            assert (a - b).abs().max() <= TOLERANCE[dtype] * max(1, b.abs().max())
    return dual


def importing(name):
    """A fixture that puts the stand-in of a package in place, and imports modules of it."""

    @pytest.fixture(name=f"of_{name.removesuffix('attention')}")
    def fixture(monkeypatch):
        INSTALL[name](monkeypatch)
        return importlib.import_module

    return fixture


of_flash_attn, of_sage = importing("flash_attn"), importing("sageattention")
of_natten, of_xformers = importing("natten"), importing("xformers")


def qkv(q, k, v):
    return torch.stack([q, k, v], 2)


def whole(x):
    """One sequence after the other: [B L, H, D]."""
    return x.flatten(0, 1)


def ends_of(x):
    of = torch.tensor([x.shape[1]] * x.shape[0])
    return torch.cat([of.new_zeros(1), of.cumsum(0)]).int()


def packed(flash, q, k, v, **options):
    ends, n = ends_of(q), q.shape[1]
    o = flash.flash_attn_varlen_func(whole(q), whole(k), whole(v), ends, ends, n, n, **options)
    return o.unflatten(0, q.shape[:2])


FLASH = {
    "plain": (lambda f, q, k, v: f.flash_attn_func(q, k, v), plain, {}),
    "causal": (
        lambda f, q, k, v: f.flash_attn_func(q, k, v, causal=True),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], right=0)),
        {},
    ),
    "causal, fewer queries": (
        lambda f, q, k, v: f.flash_attn_func(q, k, v, 0.0, None, True),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], right=0)),
        {"last": 5},
    ),
    "window, groups, scale": (
        lambda f, q, k, v: f.flash_attn_func(q, k, v, window_size=(3, 2), softmax_scale=0.3),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], 3, 2), scale=0.3),
        {"kv_heads": 2},
    ),
    "window, fewer queries": (
        lambda f, q, k, v: f.flash_attn_func(q, k, v, window_size=(4, 0)),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], 4, 0)),
        {"last": 7},
    ),
    "logsumexp": (
        lambda f, q, k, v: (out := f.flash_attn_func(q, k, v, return_attn_probs=True))[0] * out[1].mT[..., None],
        lambda q, k, v: (
            plain(q, k, v) * (q.transpose(1, 2) @ k.transpose(1, 2).mT * D**-0.5).logsumexp(-1).mT[..., None]
        ),
        {},
    ),
    "qkv packed": (lambda f, q, k, v: f.flash_attn_qkvpacked_func(qkv(q, k, v)), plain, {}),
    "kv packed": (lambda f, q, k, v: f.flash_attn_kvpacked_func(q, torch.stack([k, v], 2)), plain, {}),
    "sequences": (packed, plain, {}),
    "causal sequences": (
        lambda f, q, k, v: packed(f, q, k, v, causal=True),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], right=0)),
        {},
    ),
    "qkv of sequences": (
        lambda f, q, k, v: f.flash_attn_varlen_qkvpacked_func(
            whole(qkv(q, k, v)), ends_of(q), q.shape[1], softmax_scale=0.3, causal=True
        ).unflatten(0, q.shape[:2]),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], right=0), scale=0.3),
        {},
    ),
    "kv of sequences": (
        lambda f, q, k, v: f.flash_attn_varlen_kvpacked_func(
            *(whole(q), whole(torch.stack([k, v], 2)), ends_of(q), ends_of(k), q.shape[1], k.shape[1]),
            window_size=(3, 1),
        ).unflatten(0, q.shape[:2]),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], 3, 1)),
        {"kv_heads": 2, "last": 7},
    ),
    "the autograd.Function": (
        lambda f, q, k, v: f.flash_attn_interface.FlashAttnFunc.apply(
            *(q, k, v, 0.0, None, True, (-1, -1), 0.0, None, False, False, True)
        ),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], right=0)),
        {},
    ),
    "inside a checkpoint": (
        lambda f, q, k, v: checkpoint(f.flash_attn_func, q, k, v, use_reentrant=False),
        plain,
        {},
    ),
}


ARGUMENTS = (
    "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_softmax is_grad_enabled"
)
PACKED_FUNCTIONS = {  # by what comes before those arguments
    "FlashAttnKVPackedFunc": ("q kv", lambda q, k, v: (q, torch.stack([k, v], 2))),
    "FlashAttnVarlenQKVPackedFunc": (
        "qkv cu_seqlens max_seqlen",
        lambda q, k, v: (whole(qkv(q, k, v)), ends_of(q), q.shape[1]),
    ),
    "FlashAttnVarlenKVPackedFunc": (
        "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
        lambda q, k, v: (whole(q), whole(torch.stack([k, v], 2)), ends_of(q), ends_of(k), q.shape[1], k.shape[1]),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", PACKED_FUNCTIONS)
def test_autograd_functions_of_packed_operands(of_flash_attn, monkeypatch, name):
    flash = of_flash_attn("flash_attn.flash_attn_interface")
    names, operands = PACKED_FUNCTIONS[name]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(x, kind) for x in f"{names} {ARGUMENTS}".split()])
    monkeypatch.setattr(flash, name, function_of(name, signature), raising=False)

    def call(q, k, v):
        given = (*operands(q, k, v), 0.0, 0.3, True, (-1, -1), 0.0, None, False, True, True)
        o, lse, _ = getattr(flash, name).apply(*given)
        return o.view(q.shape) + 0 * lse.sum()

    check(call, lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], right=0), scale=0.3))


def of_sequences(q, k, v, cu_q, cu_k):
    """That FLASH["sequences of several lengths"] should be."""
    return plain(q, k, v, blocks(cu_q.diff().tolist(), cu_k.diff().tolist(), lambda n, m: band(n, m, right=0)))


@pytest.mark.long
@pytest.mark.parametrize("form", FLASH)
def test_flash_attn(of_flash_attn, form):
    flash = of_flash_attn("flash_attn")
    flash.flash_attn_interface = of_flash_attn("flash_attn.flash_attn_interface")
    call, reference, how = FLASH[form]
    dual = check(lambda q, k, v: call(flash, q, k, v), reference, **how)
    assert all(report.fused == 1 and len(report.swapped) == 1 for report in dual.reports)
    assert "test_swaps.py" in dual.reports[0].swapped[0][1]
    assert "flash_attn" in dual.reports[0].swapped[0][2]


def test_causal_sequences_of_several_lengths_are_counted_from_their_ends(of_flash_attn):
    flash = of_flash_attn("flash_attn")

    def call(q, k, v, cu_q, cu_k):
        o = flash.flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, 9, 9, causal=True)
        return o[None]

    def others(n):
        return {"cu_q": cu([2, 1, 4]), "cu_k": cu(lengths(n))}

    check(call, of_sequences, sizes=((1, 12), (1, 20)), others=others, last=7)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flash_attn_with_inductor(of_flash_attn, dtype):
    flash = of_flash_attn("flash_attn")
    check(
        lambda q, k, v: flash.flash_attn_func(q, k, v, causal=True),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], right=0)),
        backend="inductor",
        dtype=dtype,
    )


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("form", "dtype"), [("window, fewer queries", torch.float32), ("causal, fewer queries", torch.bfloat16)], ids=str
)
def test_windows_from_the_last_key_with_inductor(of_flash_attn, form, dtype):
    """A block mask made of sizes, which are symbols the second time."""
    flash = of_flash_attn("flash_attn")
    call, reference, how = FLASH[form]
    check(lambda q, k, v: call(flash, q, k, v), reference, backend="inductor", dtype=dtype, **how)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_p": 0.1}, "dropout"),
        ({"softcap": 3.0}, "tanh"),
        ({"alibi_slopes": torch.ones(H)}, "ALiBi"),
    ],
)
def test_what_flash_attn_does_and_we_do_not_is_refused(of_flash_attn, options, reason):
    flash = of_flash_attn("flash_attn")
    dual = jvpgraph.transform(Net(lambda q, k, v: flash.flash_attn_func(q, k, v, **options)), backend="eager")
    x = torch.randn(1, 6, C)
    with pytest.raises(UnsupportedOp) as told:
        dual(x, torch.rand(1), tangents={"x": x})
    assert str(told.value).count("\n") == 2
    assert f"flash_attn_func ({next(iter(options))})  test_swaps.py:" in str(told.value)
    assert reason in str(told.value)


def test_another_compilation_keeps_the_functions_of_the_package(of_flash_attn):
    """And does so after a graph of ours, and with what was traced for it."""
    flash = of_flash_attn("flash_attn")
    net = Net(lambda q, k, v: flash.flash_attn_func(q, k, v))
    x, t = torch.randn(1, 6, C), torch.rand(1)
    jvpgraph.transform(net, backend="eager")(x, t, tangents={"x": x})
    seen = []

    def look(gm, _):
        seen.extend(str(node.target) for m in gm.modules() if hasattr(m, "graph") for node in m.graph.nodes)
        return gm

    with torch.no_grad():
        torch.compile(net, backend=look, fullgraph=True)(x, t)
    assert any("flash_attn._flash_attn_forward" in name for name in seen)
    assert not any("jvpgraph" in name for name in seen)


# ------------------------------------------------------------------------------------------------------- xformers


def of_pairs(name, *arguments):
    return lambda masks, n: getattr(masks, name)(*arguments)


def of_lengths(name, q=lengths, k=None):
    return lambda masks, n: getattr(masks, name).from_seqlens(q(n), None if k is None else k(n))


def reversed_lengths(n):
    return lengths(n)[::-1]


XFORMERS = {
    "from the end": (
        of_pairs("LowerTriangularFromBottomRightMask"),
        lambda n_q, n_k: band(n_q, n_k, right=0),
        {"last": 5},
    ),
    "window": (of_pairs("LocalAttentionFromBottomRightMask", 3, 2), lambda n_q, n_k: band(n_q, n_k, 3, 2), {"last": 9}),
    "blocks": (of_lengths("BlockDiagonalMask"), lambda n, m: blocks(lengths(n), lengths(m)), {}),
    "blocks of other lengths": (
        of_lengths("BlockDiagonalMask", k=reversed_lengths),
        lambda n, m: blocks(lengths(n), reversed_lengths(m)),
        {},
    ),
    "causal blocks": (
        of_lengths("BlockDiagonalCausalMask", k=reversed_lengths),
        lambda n, m: blocks(lengths(n), reversed_lengths(m), lambda a, b: band(a, b, right=0, from_the_end=False)),
        {},
    ),
    "causal blocks from the end": (
        of_lengths("BlockDiagonalCausalFromBottomRightMask", lambda n: [2, 4, 1], lengths),
        lambda n, m: blocks([2, 4, 1], lengths(m), lambda a, b: band(a, b, right=0)),
        {"last": 7},
    ),
}


@both_ways
@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", XFORMERS)
def test_masks_of_xformers(of_xformers, form, backend):
    """As an argument of the model, whose lengths change."""
    ops, masks = of_xformers("xformers.ops"), of_xformers("xformers.ops.fmha.attn_bias")
    mask, wanted, how = XFORMERS[form]
    check(
        lambda q, k, v, bias: ops.memory_efficient_attention(q, k, v, attn_bias=bias),
        lambda q, k, v, bias: plain(q, k, v, wanted(q.shape[1], k.shape[1])),
        sizes=((1, 13), (1, 22)),
        others=lambda n: {"bias": mask(masks, n)},
        backend=backend,
        **how,
    )


@pytest.mark.long
def test_layouts_of_xformers(of_xformers):
    ops = of_xformers("xformers.ops")

    def single_heads(q, k, v):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return ops.memory_efficient_attention(q, k, v).unflatten(0, (-1, H)).transpose(1, 2)

    def grouped(q, k, v):
        q = q.unflatten(2, (2, 2))
        k, v = (x.unflatten(2, (2, 1)).expand(-1, -1, 2, 2, -1) for x in (k, v))
        return ops.memory_efficient_attention(q, k, v).flatten(2, 3)

    check(single_heads, plain)
    check(grouped, plain, kv_heads=2)


@pytest.mark.long
def test_biases_of_xformers(of_xformers):
    """A mask made by the model, and an additive one, which has a tangent and gradients."""
    ops = of_xformers("xformers.ops")

    def from_the_model(q, k, v):
        bias = (q[..., :1] * 2).transpose(1, 2).expand(-1, -1, -1, k.shape[1])
        bias = bias * torch.arange(k.shape[1], device=k.device).cos()
        return ops.memory_efficient_attention(q, k, v, bias.to(q.dtype))

    def reference(q, k, v):
        bias = (q[..., :1] * 2).transpose(1, 2) * torch.arange(k.shape[1]).cos()
        return plain(q, k, v, bias=bias)

    check(lambda q, k, v: ops.memory_efficient_attention(q, k, v, ops.LowerTriangularMask()), causal)
    check(from_the_model, reference)


def causal(q, k, v):
    return plain(q, k, v, band(q.shape[1], k.shape[1], right=0))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_xformers_with_inductor(of_xformers, dtype):
    ops, masks = of_xformers("xformers.ops"), of_xformers("xformers.ops.fmha.attn_bias")
    check(
        lambda q, k, v, bias: ops.memory_efficient_attention(q, k, v, bias),
        lambda q, k, v, bias: plain(q, k, v, blocks(lengths(q.shape[1]), lengths(q.shape[1]))),
        sizes=((1, 12), (1, 20)),
        others=lambda n: {"bias": masks.BlockDiagonalMask.from_seqlens(lengths(n))},
        backend="inductor",
        dtype=dtype,
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("bias", "reason"),
    [(torch.ones(6, 6, dtype=torch.bool), "boolean"), (nn.Identity(), "Identity is a mask that our version")],
)
def test_masks_that_are_unknown_are_refused(of_xformers, bias, reason):
    ops = of_xformers("xformers.ops")
    dual = jvpgraph.transform(Net(lambda q, k, v: ops.memory_efficient_attention(q, k, v, bias)), backend="eager")
    x = torch.randn(1, 6, C)
    with pytest.raises(UnsupportedOp, match=reason):
        dual(x, torch.rand(1), tangents={"x": x})


# --------------------------------------------------------------------------------------------- sage, NATTEN, torch


@pytest.mark.long
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_sage_attention_is_exact_here(of_sage, layout):
    """Behind torch.compiler.disable, as theirs."""
    sage = of_sage("sageattention")

    def call(q, k, v):
        if layout == "NHD":
            return sage.sageattn(q, k, v, tensor_layout=layout, is_causal=True)
        return sage.sageattn(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)

    check(call, causal, kv_heads=2)
    dual = jvpgraph.transform(Net(lambda q, k, v: sage.sageattn(q, k, v, attn_mask=q > 0)), backend="eager")
    with pytest.raises(UnsupportedOp, match="ignores it"):
        dual(torch.ones(1, 6, C), torch.rand(1), tangents={"x": torch.ones(1, 6, C)})


@pytest.mark.long
def test_packed_sage_attention(of_sage):
    sage = of_sage("sageattention")
    check(
        lambda q, k, v, ends: sage.sageattn_varlen(q[0], k[0], v[0], ends, ends, 9, 9)[None],
        lambda q, k, v, ends: plain(q, k, v, blocks(ends.diff().tolist(), ends.diff().tolist())),
        sizes=((1, 12), (1, 20)),
        others=lambda n: {"ends": cu(lengths(n))},
    )


NATTEN = [
    ((12,), {"kernel_size": 5}),
    ((13,), {"kernel_size": 4, "dilation": 3}),
    ((12,), {"kernel_size": 4, "is_causal": True, "dilation": 2}),
    ((12,), {"kernel_size": 4, "stride": 2}),
    ((12,), {"kernel_size": 4, "stride": 3, "is_causal": True}),
    ((3, 4), {"kernel_size": (3, 2), "dilation": (1, 2), "is_causal": (False, True)}),
    ((2, 3, 4), {"kernel_size": (2, 3, 3)}),
]


@pytest.mark.long
@both_ways
@pytest.mark.sampled(3)
@pytest.mark.parametrize(("space", "options"), NATTEN, ids=str)
def test_neighbourhoods(of_natten, space, options, backend):
    natten, n = of_natten("natten"), math.prod(space)
    attention = getattr(natten, f"na{len(space)}d")
    mask = neighbourhoods(space, **options)
    check(
        lambda q, k, v: attention(*(x.unflatten(1, space) for x in (q, k, v)), **options).flatten(1, -3),
        lambda q, k, v: plain(q, k, v, mask),
        sizes=((2, n), (3, n)),
        kv_heads=2,
        backend=backend,
    )


@pytest.mark.long
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0)])
def test_varlen_attention_of_torch(window):
    varlen = importlib.import_module("torch.nn.attention.varlen")

    def call(q, k, v, ends):
        o, lse = varlen.varlen_attn(
            *(q[0], k[0], v[0], ends, ends, 9, 9), window_size=window, return_aux=varlen.AuxRequest(lse=True)
        )
        return o[None] + 0 * lse.mT[None, ..., None]

    def reference(q, k, v, ends):
        of = ends.diff().tolist()
        return plain(q, k, v, blocks(of, of, lambda a, b: band(a, b, *window)))

    check(call, reference, sizes=((1, 12), (1, 20)), others=lambda n: {"ends": cu(lengths(n))})


# ------------------------------------------------------------------------------------------------- ways to run them


class Stack(nn.Module):
    """Blocks with Python between them that no graph has."""

    def __init__(self, attention):
        super().__init__()
        self.blocks = nn.ModuleList(Net(attention) for _ in range(2))

    def forward(self, x, t):
        for block in self.blocks:
            x = x + block(x, t)
            if x.detach().sum().item() > 1e9:
                return x
        return x


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_regions(of_flash_attn):
    flash = of_flash_attn("flash_attn")
    x, t = torch.randn(2, 6, C), torch.rand(2)
    net, exact = Stack(lambda q, k, v: flash.flash_attn_func(q, k, v, causal=True)), Stack(causal).double()
    dual = jvpgraph.transform(net, backend="eager", regions="auto")
    got = dual(x, t, tangents={"x": x})
    wanted = torch.func.jvp(exact, (x.double(), t.double()), (x.double(), torch.zeros(2).double()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert ", 2 calls" in str(dual.regions)


def test_gradients_of_the_tangent(of_xformers):
    ops = of_xformers("xformers.ops")
    x, t = torch.randn(2, 6, C), torch.rand(2)
    net, exact = Net(lambda q, k, v: ops.memory_efficient_attention(q, k, v)), Net(plain).double()
    dual = jvpgraph.transform(net, backend="eager", differentiable_tangent=True)
    dual(x, t, tangents={"x": x})[1].square().sum().backward()
    dots = x.double(), torch.zeros(2).double()
    torch.func.jvp(exact, (x.double(), t.double()), dots)[1].square().sum().backward()
    for a, b in zip(net.parameters(), exact.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)
