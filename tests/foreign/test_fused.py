"""Rotary embeddings, norms and cross entropy of flash_attn, and the attention backends of diffusers."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import nn

import jvpgraph
from jvpgraph.errors import UnsupportedOp
from tests.foreign.stand_ins import OPAQUE, function_of, put
from tests.foreign.test_swaps import C, D, H, Net, band, check, plain


def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
    raise AssertionError(OPAQUE)


def apply_rotary_emb_qkv_(
    qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None,
    num_heads_q=None
):  # fmt: skip
    raise AssertionError(OPAQUE)


def apply_rotary_emb_kv_(kv, cos, sin, interleaved=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
    raise AssertionError(OPAQUE)


def rms_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, residual_in_fp32=False, zero_centered_weight=False, return_dropout_mask=False, out_dtype=None,
    out=None, residual_out=None
):  # fmt: skip
    raise AssertionError(OPAQUE)


def layer_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, residual_in_fp32=False, zero_centered_weight=False, is_rms_norm=False, return_dropout_mask=False,
    out_dtype=None, out=None, residual_out=None
):  # fmt: skip
    raise AssertionError(OPAQUE)


def rms_norm(x, weight, epsilon):
    raise AssertionError(OPAQUE)


def cross_entropy_loss(
    logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0,
    ignore_index=-100, inplace_backward=False, process_group=None
):  # fmt: skip
    raise AssertionError(OPAQUE)


def class_of(name, function):
    return {name: function_of(name, inspect.signature(function))}


def cross_entropy_arguments(
    logits, labels, precomputed_lse=None, smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, ignore_index=-100,
    inplace_backward=False, process_group=None
):  # fmt: skip
    """Of the Function, which calls smoothing what the function calls label_smoothing."""


@pytest.fixture
def fused(monkeypatch):
    put(
        monkeypatch,
        "flash_attn.layers.rotary",
        apply_rotary_emb=apply_rotary_emb,
        apply_rotary_emb_qkv_=apply_rotary_emb_qkv_,
        apply_rotary_emb_kv_=apply_rotary_emb_kv_,
        **class_of("ApplyRotaryEmb", apply_rotary_emb),
        **class_of("ApplyRotaryEmbQKV_", apply_rotary_emb_qkv_),
        **class_of("ApplyRotaryEmbKV_", apply_rotary_emb_kv_),
    )
    put(
        monkeypatch,
        "flash_attn.ops.triton.layer_norm",
        rms_norm_fn=rms_norm_fn,
        layer_norm_fn=layer_norm_fn,
        **class_of("LayerNormFn", layer_norm_fn),
    )
    put(monkeypatch, "flash_attn.ops.rms_norm", rms_norm=rms_norm)
    put(
        monkeypatch,
        "flash_attn.ops.triton.cross_entropy",
        cross_entropy_loss=cross_entropy_loss,
        **class_of("CrossEntropyLoss", cross_entropy_arguments),
    )
    return importlib.import_module


def angles(n):
    freqs = torch.outer(torch.arange(n), torch.tensor([1.0, 0.3, 0.1]))
    return freqs.cos(), freqs.sin()


def rotated(x, interleaved, offset=0):
    """As complex numbers, of which the first six columns are three."""
    cos, sin = angles(64)
    turn = torch.complex(cos, sin).to(torch.complex128)[offset : offset + x.shape[1], None]
    y = x[..., :6].unflatten(-1, (3, 2) if interleaved else (2, 3))
    y = torch.view_as_complex((y if interleaved else y.mT).contiguous()) * turn
    y = torch.view_as_real(y)
    return torch.cat([(y if interleaved else y.mT).flatten(-2), x[..., 6:]], -1)


@pytest.mark.long
@pytest.mark.parametrize(("interleaved", "inplace"), [(False, True), (True, False)])
def test_rotary_embeddings(fused, interleaved, inplace):
    rotary = fused("flash_attn.layers.rotary")

    def call(q, k, v):
        cos, sin = angles(64)
        q = rotary.apply_rotary_emb(q, cos, sin, interleaved=interleaved, inplace=inplace)
        k = k.clone()
        out = rotary.apply_rotary_emb(k, cos, sin, interleaved, inplace, seqlen_offsets=2)
        return plain(q, k if inplace else out, v)

    check(call, lambda q, k, v: plain(rotated(q, interleaved), rotated(k, interleaved, 2), v))


@pytest.mark.long
def test_rotary_embedding_of_packed_operands(fused):
    rotary = fused("flash_attn.layers.rotary")

    def call(q, k, v):
        qkv = rotary.apply_rotary_emb_qkv_(torch.stack([q, k, v], 2), *angles(64))
        return plain(*qkv.unbind(2))

    check(call, lambda q, k, v: plain(rotated(q, False), rotated(k, False), v))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_of_packed_keys(fused, interleaved, dtype):
    """Grouped ones, turned from the second position on, in place: what is returned is what was given."""
    rotary = fused("flash_attn.layers.rotary")

    def call(q, k, v):
        kv = torch.stack([k, v], 2)
        turned = rotary.apply_rotary_emb_kv_(kv, *angles(64), interleaved=interleaved, seqlen_offsets=1)
        return plain(q, kv[:, :, 0], turned[:, :, 1])

    check(call, lambda q, k, v: plain(q, rotated(k, interleaved, 1), v), kv_heads=2, dtype=dtype)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "options", [{"cu_seqlens": torch.tensor([0, 6])}, {"seqlen_offsets": torch.tensor([1])}], ids=str
)
@pytest.mark.parametrize("name", ["apply_rotary_emb", "apply_rotary_emb_kv_", "apply_rotary_emb_qkv_"])
def test_positions_of_several_sequences_are_refused(fused, name, options):
    function = getattr(fused("flash_attn.layers.rotary"), name)

    def call(q, k, v):
        parts = {"apply_rotary_emb": q, "apply_rotary_emb_kv_": torch.stack([k, v], 2)}
        function(parts.get(name, torch.stack([q, k, v], 2)), *angles(64), **options)
        return q

    x, dual = torch.randn(1, 6, C), jvpgraph.transform(Net(call), backend="eager")
    with pytest.raises(UnsupportedOp, match="positions of several sequences: index cos and sin"):
        dual(x, torch.rand(1), tangents={"x": x})


@pytest.mark.long
def test_norms(fused):
    norms, simple = fused("flash_attn.ops.triton.layer_norm"), fused("flash_attn.ops.rms_norm")
    w, b = torch.linspace(0.5, 2, D), torch.linspace(-1, 1, D)

    def call(q, k, v):
        q, total = norms.rms_norm_fn(q, w.to(q), None, residual=v, eps=1e-5, prenorm=True)
        k = norms.layer_norm_fn(k, w.to(q), b.to(q), eps=1e-5)
        return plain(q, k, simple.rms_norm(total, w.to(q), 1e-5))

    def rms(x):
        return F.rms_norm(x, (D,), w.to(x), 1e-5)

    def reference(q, k, v):
        return plain(rms(q + v), F.layer_norm(k, (D,), w.to(k), b.to(k), 1e-5), rms(q + v))

    check(call, reference)
    check(call, reference, dtype=torch.bfloat16)


@pytest.mark.long
def test_autograd_function_of_norms(fused):
    norm = fused("flash_attn.ops.triton.layer_norm").LayerNormFn
    w, b = torch.linspace(0.5, 2, D), torch.linspace(-1, 1, D)

    def call(q, k, v):
        more = (None, None, None, 1e-5, 0.0, None, True)  # with the sum
        k, total = norm.apply(k, w.to(q), b.to(q), v, *more)
        return plain(q, k, total)

    check(call, lambda q, k, v: plain(q, F.layer_norm(k + v, (D,), w.to(q), b.to(q), 1e-5), k + v))


def test_autograd_function_of_cross_entropy(fused):
    module, labels = fused("flash_attn.ops.triton.cross_entropy"), torch.tensor([1, 3, -100, 0])
    x, x_dot = torch.randn(4, 5), torch.randn(4, 5)
    wanted = torch.func.jvp(
        lambda x: F.cross_entropy(0.7 * x, labels, reduction="none", label_smoothing=0.1),
        (x.double(),),
        (x_dot.double(),),
    )
    got = jvpgraph.jvp(
        lambda x: module.CrossEntropyLoss.apply(x, labels, None, 0.1, 0.7)[0], (x,), (x_dot,), backend="eager"
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_cross_entropy(fused):
    module = fused("flash_attn.ops.triton.cross_entropy")
    labels = torch.tensor([1, 3, -100, 0])

    def loss(x):
        losses, squares = module.cross_entropy_loss(
            x, labels, label_smoothing=0.1, logit_scale=0.7, lse_square_scale=0.2
        )
        return losses, squares

    def exact(x):
        x = 0.7 * x
        squares = 0.2 * x.logsumexp(-1).square() * (labels >= 0)
        return F.cross_entropy(x, labels, reduction="none", label_smoothing=0.1) + squares, squares

    x, x_dot = torch.randn(4, 5), torch.randn(4, 5)
    (wanted, squares), (wanted_dot, _) = torch.func.jvp(exact, (x.double(),), (x_dot.double(),))
    (got, got_squares), (got_dot, no_dot) = jvpgraph.jvp(loss, (x,), (x_dot,), backend="eager")
    for a, b in ((got, wanted), (got_squares, squares), (got_dot, wanted_dot), (no_dot, torch.zeros(4))):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ diffusers

pytestmark = pytest.mark.slow
SWAPPED = ("flash", "flash_hub", "_flash_3", "_flash_3_hub", "flash_4_hub", "aiter_fa2_hub", "sage", "sage_hub")
PACKED = ("flash_varlen", "flash_varlen_hub", "_flash_varlen_3", "_flash_3_varlen_hub", "sage_varlen")
OF_TORCH = ("native", "_native_flash", "_native_math")  # the others have no kernel with a backward on a CPU


def dispatch(backend, *qkv, **options):
    name = attention_dispatch.AttentionBackendName(backend)
    return attention_dispatch.dispatch_attention_fn(*qkv, backend=name, **options)


@pytest.mark.parametrize("backend", [*SWAPPED, "sage_blackwell_hub", *PACKED, *OF_TORCH])
def test_backends_of_diffusers(backend):
    dual = check(lambda q, k, v: dispatch(backend, q, k, v), plain, sizes=((2, 12),))
    assert all(report.fused == 1 for report in dual.reports)


@pytest.mark.parametrize("backend", ["flash", "_flash_3", "sage", "native", "flash_varlen"])
def test_causal_backends_of_diffusers(backend):
    check(
        lambda q, k, v: dispatch(backend, q, k, v, is_causal=True),
        lambda q, k, v: plain(q, k, v, band(q.shape[1], k.shape[1], right=0)),
        sizes=((2, 12),),
    )


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("backend", ["flash_varlen", "sage_varlen", "native"])
def test_masks_of_diffusers(backend):
    """How many keys each row shows is data, by which the packed backends cut: no graph could."""

    def mask(n):
        return torch.arange(n) < torch.tensor([[n], [n - 3]])

    def reference(q, k, v, mask):
        o = [plain(*(x[i : i + 1] for x in (q, k, v)), mask[i].expand(q.shape[1], -1)) for i in range(2)]
        return torch.cat(o)

    check(
        lambda q, k, v, mask: dispatch(backend, q, k, v, mask),
        reference,
        sizes=((2, 12), (2, 17)),
        others=lambda n: {"mask": mask(n)},
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("backend", ["flash", "sage"])
def test_masks_that_a_backend_of_diffusers_does_not_take(backend):
    dual = jvpgraph.transform(Net(lambda q, k, v: dispatch(backend, q, k, v, q[..., 0, 0] > 0)), backend="eager")
    x = torch.randn(1, 6, C)
    with pytest.raises(UnsupportedOp, match="takes no mask"):
        dual(x, torch.rand(1), tangents={"x": x})


def test_a_module_of_diffusers_with_the_flash_backend():
    """set_attention_backend, as users call it."""
    torch.manual_seed(0)
    module = WanAttention(dim=H * D, heads=H, dim_head=D, processor=WanAttnProcessor())
    x = torch.randn(1, 6, H * D)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = torch.func.jvp(module, (x,), (x,))
    module.processor._attention_backend = attention_dispatch.AttentionBackendName.FLASH
    got = jvpgraph.transform(nn.Sequential(module), backend="eager")(x, tangents={"input": x})
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
