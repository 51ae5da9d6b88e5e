"""Attention of other packages op by op, and in what runs op by op between regions: as in graphs."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import jvpgraph
from jvpgraph.errors import UnsupportedOp
from jvpgraph.foreign import table
from tests.foreign import test_flash_attn_3 as flash_3
from tests.foreign import test_fused as of_fused
from tests.foreign import test_masks_of_xformers as xformers
from tests.foreign import test_sage_natten as others
from tests.foreign import test_swaps as swaps
from tests.foreign.plain import band, blocks, neighbourhoods, plain
from tests.foreign.stand_ins import INSTALL
from tests.foreign.test_swaps import C, D, H, Net, cu, lengths

pytestmark = [pytest.mark.slow, pytest.mark.sampled(5)]
check = functools.partial(swaps.check, backend="op_by_op")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def packages(monkeypatch):
    """Imports stand-ins."""
    for install in INSTALL.values():
        install(monkeypatch)
    return importlib.import_module


# ------------------------------------------------------------------------------------------------ all that graphs do


@pytest.mark.parametrize("form", swaps.FLASH)
def test_flash_attn(packages, form):
    flash = packages("flash_attn")
    flash.flash_attn_interface = packages("flash_attn.flash_attn_interface")
    call, reference, how = swaps.FLASH[form]
    check(lambda q, k, v: call(flash, q, k, v), reference, **how)


@pytest.mark.parametrize("form", flash_3.FORMS)
def test_flash_attn_3(packages, form):
    flash = packages("flash_attn_interface")
    call, reference, how = flash_3.FORMS[form]
    sizes = ((1, 12), (1, 17)) if form == "Function of sequences" else ((2, 12), (3, 17))
    if form == "Function's logsumexp":
        pytest.skip("what a Function of theirs computes is theirs op by op, and its logsumexp has no gradient")
    check(lambda q, k, v: call(flash, q, k, v), reference, sizes=sizes, **how)


of_xformers = swaps.of_xformers
masks = xformers.masks


def test_a_tangent_in_the_mask_alone(of_xformers, masks):
    """Queries, keys and values are constants."""
    ops = of_xformers("xformers.ops")
    q, k, v = (torch.randn(2, 6, H, D) for _ in range(3))
    bias, bias_dot = (torch.randn(2, H, 6, 6) for _ in range(2))

    def call(bias):
        return ops.memory_efficient_attention(q, k, v, masks.LowerTriangularMaskWithTensorBias(bias))

    def exact(bias):
        return plain(q.double(), k.double(), v.double(), band(6, 6, right=0), bias)

    wanted = torch.func.jvp(exact, (bias.double(),), (bias_dot.double(),))
    got = jvpgraph.jvp(call, (bias,), (bias_dot,), backend="op_by_op")
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["single heads", "grouped", "bias"])
def test_layouts_of_xformers(packages, layout):
    ops = packages("xformers.ops")

    def call(q, k, v):
        if layout == "single heads":
            q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
            return ops.memory_efficient_attention(q, k, v).unflatten(0, (-1, H)).transpose(1, 2)
        if layout == "grouped":
            q = q.unflatten(2, (2, 2))
            k, v = (x.unflatten(2, (2, 1)).expand(-1, -1, 2, 2, -1) for x in (k, v))
            return ops.memory_efficient_attention(q, k, v).flatten(2, 3)
        return ops.memory_efficient_attention(q, k, v, xformers.bias_of(q, k.shape[1]))

    reference = plain if layout != "bias" else lambda q, k, v: plain(q, k, v, bias=xformers.bias_of(q, k.shape[1]))
    check(call, reference, kv_heads=2 if layout == "grouped" else H)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sage_attention(packages, dtype):
    """Behind torch.compiler.disable, packed, and in version 3."""
    sage, sage_3 = packages("sageattention"), packages("sageattn3")
    check(lambda q, k, v: sage.sageattn(q, k, v, "NHD"), plain, dtype=dtype)
    check(
        lambda q, k, v, ends: sage.sageattn_varlen(q[0], k[0], v[0], ends, ends, 9, 9)[None],
        lambda q, k, v, ends: plain(q, k, v, blocks(ends.diff().tolist(), ends.diff().tolist())),
        sizes=((1, 12), (1, 20)),
        others=lambda n: {"ends": cu(lengths(n))},
        dtype=dtype,
    )
    check(lambda q, k, v: sage_3.sageattn3_blackwell(*others.heads_first(q, k, v)).transpose(1, 2), plain, dtype=dtype)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0)])
def test_varlen_attention_of_torch(window):
    """Whose op has no kernel on a CPU: what is called is ours."""
    varlen = importlib.import_module("torch.nn.attention.varlen")

    def reference(q, k, v, ends):
        of = ends.diff().tolist()
        return plain(q, k, v, blocks(of, of, lambda a, b: band(a, b, *window)))

    check(
        lambda q, k, v, ends: varlen.varlen_attn(q[0], k[0], v[0], ends, ends, 9, 9, window_size=window)[None],
        reference,
        sizes=((1, 12), (1, 20)),
        others=lambda n: {"ends": cu(lengths(n))},
        kv_heads=H,
    )


@pytest.mark.parametrize("backend", ["flash", "_flash_3", "sage", "flash_varlen", "flash_4_hub", "_flash_3_varlen_hub"])
def test_backends_of_diffusers(backend):
    """With names that its registry holds."""

    def call(q, k, v, mask=None):
        name = attention_dispatch.AttentionBackendName(backend)
        return attention_dispatch.dispatch_attention_fn(q, k, v, mask, backend=name)

    check(call, plain, sizes=((2, 12),))
    if backend == "flash_varlen":
        seen = torch.arange(12) < torch.tensor([[12], [9]])

        def reference(q, k, v, mask):
            return torch.cat([plain(*(x[i : i + 1] for x in (q, k, v)), mask[i].expand(12, -1)) for i in range(2)])

        check(call, reference, sizes=((2, 12),), others=lambda n: {"mask": seen})


CALLS = {
    "flash_attn": ("flash_attn.flash_attn_func", {}),
    "flash_attn 3": ("flash_attn_interface.flash_attn_func", {}),
    "sage": ("sageattention.sageattn", {"tensor_layout": "NHD"}),
    "natten": ("natten.neighborhood_attention_generic", {"kernel_size": 6}),
    "xformers": ("xformers.ops.memory_efficient_attention", {}),
}


def named(name):
    """One of CALLS, and what it should be of six tokens or more."""
    path, options = CALLS[name]
    module, _, function = path.rpartition(".")
    theirs = getattr(importlib.import_module(module), function)

    def exact(q, k, v):
        seen = neighbourhoods((q.shape[1],), 6) if name == "natten" else None
        return plain(q, k, v, seen)

    return lambda q, k, v: theirs(q, k, v, **options), exact


@pytest.mark.parametrize("name", CALLS)
def test_half_precision_and_groups(packages, name):
    check(*named(name), dtype=torch.bfloat16, kv_heads=H if name == "xformers" else 2)


# ------------------------------------------------------------------------------------------------------ ways to run


class Outside(nn.Module):
    """Blocks, and attention of a package next to them, in Python that no graph has."""

    def __init__(self, attention):
        super().__init__()
        self.blocks = nn.ModuleList(Net(attention) for _ in range(2))
        self.qkv, self.attention = nn.Linear(C, 3 * C), attention

    def forward(self, x, t):
        for block in self.blocks:
            x = x + block(x, t)
            if x.detach().sum().item() > 1e9:
                return x
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).unbind(2)
        return x + self.attention(q, k, v).flatten(2)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
@pytest.mark.parametrize("name", CALLS)
def test_between_regions(packages, name):
    """At two sizes: the blocks are graphs, what is between them is ours as well."""
    torch.manual_seed(0)
    net, exact = map(Outside, named(name))
    exact.double()
    exact.load_state_dict(net.state_dict())
    dual = jvpgraph.transform(net, backend="eager", regions="auto")
    for n in (6, 9):
        x, t = torch.randn(2, n, C), torch.rand(2)
        got = dual(x, t, tangents={"x": x})
        wanted = torch.func.jvp(exact, (x.double(), t.double()), (x.double(), torch.zeros(2).double()))
        grads = torch.autograd.grad(got[0].square().sum(), tuple(net.parameters()))
        exact_grads = torch.autograd.grad(exact(x.double(), t.double()).square().sum(), tuple(exact.parameters()))
        for a, b in zip((*got, *grads), (*wanted, *exact_grads), strict=True):
            assert (a - b).abs().max() <= 2e-5 * max(1, b.abs().max())
    assert ", 4 calls" in str(dual.regions)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_checkpoints(packages, name, nested):
    """What is computed again is what was computed: ours, in the order of the calls; theirs where no tangent came."""

    theirs, exact = named(name)

    def attention(q, k, v):
        return theirs(q, k, v) + theirs(*(torch.ones_like(x) for x in (q, k, v)))

    def inner(q, k, v):
        return checkpoint(attention, q, k, v, use_reentrant=False) if nested else attention(q, k, v)

    check(
        lambda q, k, v: checkpoint(lambda *x: inner(*x) * 1, q, k, v, use_reentrant=False),
        lambda q, k, v: exact(q, k, v) + 1,
    )


@pytest.mark.parametrize("layout", ["unbind", "chunk", "heads first"])
@pytest.mark.parametrize("name", CALLS)
def test_views(packages, name, layout):
    """q, k and v that are parts of one tensor, or lie by heads."""
    qkv, qkv_dot = torch.randn(2, 7, 3, H, D), torch.randn(2, 7, 3, H, D)

    def parts(qkv):
        if layout == "unbind":
            return qkv.unbind(2)
        if layout == "chunk":
            return [x.unflatten(-1, (H, D)) for x in qkv.flatten(2).chunk(3, -1)]
        return [x.transpose(1, 2) for x in qkv.permute(2, 0, 3, 1, 4).contiguous()]

    theirs, exactly = named(name)
    x = qkv.clone().requires_grad_()
    wanted = torch.func.jvp(lambda x: exactly(*parts(x)), (qkv.double(),), (qkv_dot.double(),))
    exact = qkv.double().requires_grad_()
    (wanted_grad,) = torch.autograd.grad(exactly(*parts(exact)).square().sum(), exact)
    got = jvpgraph.jvp(lambda x: theirs(*parts(x)), (x,), (qkv_dot,), backend="op_by_op")
    (grad,) = torch.autograd.grad(got[0].square().sum(), x)
    for a, b in zip((*got, grad), (*wanted, wanted_grad), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        alone = jvpgraph.jvp(lambda x: theirs(*parts(x)), (x,), (qkv_dot,), backend="op_by_op")
    assert not alone[0].requires_grad
    torch.testing.assert_close(alone, tuple(a.detach() for a in got), rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CALLS)
def test_views_in_graphs(packages, name, dynamic):
    """Parts of one tensor at three sizes, with gradients, without, and of some operands only."""
    theirs, exact = named(name)
    net, of_net = Views(theirs), Views(exact).double()
    of_net.load_state_dict(net.state_dict())
    dual = jvpgraph.transform(net, backend="eager", dynamic=dynamic)
    for batch, n, grads in ((2, 7, True), (3, 9, True), (4, 8, False)):
        net.requires_grad_(grads)
        x, x_dot = torch.randn(batch, n, C), torch.randn(batch, n, C)
        wanted = torch.func.jvp(of_net, (x.double(),), (x_dot.double(),))
        got = dual(x, tangents={"x": x_dot})
        for a, b in zip(got, wanted, strict=True):
            assert (a - b).abs().max() <= 2e-5 * max(1, b.abs().max())
        assert got[0].requires_grad == grads
        if grads:
            net.kv.requires_grad_(False)
            some = torch.autograd.grad(dual(x, tangents={"x": x_dot})[0].square().sum(), net.q.weight)
            every = torch.autograd.grad(of_net(x.double()).square().sum(), of_net.q.weight)
            torch.testing.assert_close(some[0].double(), every[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_tangents_in_graphs(packages, name):
    """Which nothing but one graph has, whichever the package."""
    theirs, exact = named(name)
    net, of_net = Views(theirs), Views(exact).double()
    of_net.load_state_dict(net.state_dict())
    x, x_dot = torch.randn(2, 7, C), torch.randn(2, 7, C)
    y, y_dot = jvpgraph.transform(net, backend="eager", differentiable_tangent=True)(x, tangents={"x": x_dot})
    wanted, wanted_dot = torch.func.jvp(of_net, (x.double(),), (x_dot.double(),))
    grads = torch.autograd.grad(y.sum() + y_dot.square().sum(), tuple(net.parameters()))
    exact_grads = torch.autograd.grad(wanted.sum() + wanted_dot.square().sum(), tuple(of_net.parameters()))
    for a, b in zip((y, y_dot, *grads), (wanted, wanted_dot, *exact_grads), strict=True):
        assert (a - b).abs().max() <= 5e-5 * max(1, b.abs().max())
    with pytest.raises(ValueError, match="differentiable_tangent=True needs one graph"):
        jvpgraph.transform(net, backend="op_by_op", differentiable_tangent=True)


class Views(nn.Module):
    """Queries that lie by heads, keys and values that are parts of one tensor."""

    def __init__(self, attention):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.kv, self.attention = nn.Linear(C, H * D), nn.Linear(C, 2 * H * D), attention

    def forward(self, x):
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2).contiguous().transpose(1, 2)
        k, v = self.kv(x).chunk(2, -1)
        return self.attention(q, k.unflatten(-1, (H, D)), v.unflatten(-1, (H, D))).flatten(2)


def test_where_no_tangent_arrives_the_package_computes(packages):
    """The stand-in of this kernel raises when it is called."""
    kernel = packages("sageattention").sageattn_qk_int8_pv_fp16_cuda
    x = torch.randn(1, H, 6, D)
    with pytest.raises(AssertionError, match="a stand-in's kernel"):
        jvpgraph.jvp(lambda y: y + kernel(x, x, x), (x,), (x,), backend="op_by_op")
    with pytest.raises(AssertionError, match="a stand-in's kernel"):
        jvpgraph.jvp(lambda y: y + kernel(*[y.detach()] * 3), (x,), (x,), backend="op_by_op")
    jvpgraph.jvp(lambda y: kernel(x, x, y), (x,), (x,), backend="op_by_op")
    with pytest.raises(AssertionError, match="a stand-in's kernel"):  # afterwards it is what it was
        kernel(x, x, x)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda m, q, k, v: m("flash_attn").flash_attn_func(q, k, v, dropout_p=0.1), "dropout_p.*dropout is drawn"),
        (lambda m, q, k, v: m("sageattention").sageattn(q, k, v, attn_mask=q), "attn_mask.*SageAttention ignores it"),
        (lambda m, q, k, v: m("natten").attention(q, k, v, seqlens_Q=cu([6])), "seqlens_Q.*are missing"),
        (
            lambda m, q, k, v: m("xformers.ops").memory_efficient_attention(q, k, v, nn.Identity()),
            "attn_bias.*Identity is a mask that our version",
        ),
    ],
)
def test_refusals_name_the_users_line(packages, call, reason):
    x = torch.randn(1, 6, C)
    dual = jvpgraph.transform(Net(lambda q, k, v: call(packages, q, k, v)), backend="op_by_op")
    with pytest.raises(UnsupportedOp, match=reason) as told:
        dual(x, torch.rand(1), tangents={"x": x})
    assert "test_op_by_op.py:" in str(told.value)


def test_what_ops_refuse_in_ours_names_the_users_line(packages, monkeypatch):
    """And not the code that their function has for so long."""
    name = "natten.functional.attention"
    monkeypatch.setitem(table.SWAPS, name, table.Swap(lambda query, key, value: query * query.sum().item()))
    attention, x = packages("natten").attention, torch.randn(1, 6, H, D)
    with pytest.raises(UnsupportedOp, match="becomes a Python number") as told:
        jvpgraph.jvp(lambda x: attention(x, x, x), (x,), (x,), backend="op_by_op")
    assert "test_op_by_op.py:" in str(told.value)
    assert "calls.py" not in str(told.value)


# -------------------------------------------------------------------------------------- what else flash_attn fuses

fused = of_fused.fused


@pytest.mark.parametrize(("interleaved", "inplace"), [(False, True), (True, False)])
def test_rotary_embeddings(fused, interleaved, inplace):
    rotary = fused("flash_attn.layers.rotary")

    def call(q, k, v):
        cos, sin = of_fused.angles(64)
        q = rotary.apply_rotary_emb(q.clone(), cos, sin, interleaved=interleaved, inplace=inplace)
        kv = torch.stack([k, v], 2)
        turned = rotary.apply_rotary_emb_kv_(kv, cos, sin, interleaved, seqlen_offsets=2)
        return plain(q, kv[:, :, 0], turned[:, :, 1])

    turned = of_fused.rotated
    check(call, lambda q, k, v: plain(turned(q, interleaved), turned(k, interleaved, 2), v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(fused, dtype):
    norms, simple = fused("flash_attn.ops.triton.layer_norm"), fused("flash_attn.ops.rms_norm")
    w, b = torch.linspace(0.5, 2, D), torch.linspace(-1, 1, D)

    def call(q, k, v):
        q, total = norms.rms_norm_fn(q, w.to(q), None, residual=v, eps=1e-5, prenorm=True)
        return plain(q, norms.layer_norm_fn(k, w.to(q), b.to(q), eps=1e-5), simple.rms_norm(total, w.to(q), 1e-5))

    def rms(x):
        return F.rms_norm(x, (D,), w.to(x), 1e-5)

    check(
        call,
        lambda q, k, v: plain(rms(q + v), F.layer_norm(k, (D,), w.to(k), b.to(k), 1e-5), rms(q + v)),
        dtype=dtype,
    )


def test_cross_entropy(fused):
    module, labels = fused("flash_attn.ops.triton.cross_entropy"), torch.tensor([1, 3, -100, 0])
    x, x_dot = torch.randn(4, 5), torch.randn(4, 5)
    wanted = torch.func.jvp(
        lambda x: F.cross_entropy(0.7 * x, labels, reduction="none"), (x.double(),), (x_dot.double(),)
    )
    got = jvpgraph.jvp(
        lambda x: module.cross_entropy_loss(x, labels, logit_scale=0.7)[0], (x,), (x_dot,), backend="op_by_op"
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------- other checkpoints


@pytest.mark.parametrize("name", CALLS)
def test_reentrant_checkpoints(packages, name):
    """Which compute their forward again by what is there during the backward: the functions of the package."""
    theirs, exact = named(name)
    x, x_dot = torch.randn(2, 7, H, D, requires_grad=True), torch.randn(2, 7, H, D)
    y, y_dot = jvpgraph.jvp(
        lambda x: checkpoint(lambda x: theirs(x, x, x), x, use_reentrant=True), (x,), (x_dot,), backend="op_by_op"
    )
    y.square().sum().backward()
    double = x.detach().double().requires_grad_()
    wanted, wanted_dot = torch.func.jvp(lambda x: exact(x, x, x), (double,), (x_dot.double(),))
    exact(double, double, double).square().sum().backward()
    for a, b in zip((y, y_dot, x.grad), (wanted, wanted_dot, double.grad), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_selective_checkpoints(packages, name):
    theirs, exact = named(name)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.jvpgraph.attention.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    check(lambda q, k, v: checkpoint(theirs, q, k, v, use_reentrant=False, context_fn=contexts), exact)
