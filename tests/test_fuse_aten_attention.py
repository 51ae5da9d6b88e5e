"""ATen's attention inside autograd Functions: one call of attention_jvp, for the Function's own backward as well."""

import pytest
import torch

import jvpgraph

aten = torch.ops.aten
SHAPE = (2, 3, 7, 8)


class Attention(torch.autograd.Function):
    """As diffusers writes it for the CUDA kernel: what the backward needs is kept by hand."""

    @staticmethod
    def forward(ctx, q, k, v):
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        return o, lse

    @staticmethod
    def backward(ctx, o_grad, lse_grad):
        q, k, v, o, lse = ctx.saved_tensors
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(o_grad, q, k, v, o, lse, 0.0, False)


def attend(q, k, v):
    o, lse = Attention.apply(q, k, v)
    return o * lse.detach().sigmoid().unsqueeze(-1)


def plain(q, k, v):
    s = q @ k.transpose(-1, -2) / SHAPE[-1] ** 0.5
    return s.softmax(-1) @ v * s.logsumexp(-1).detach().sigmoid().unsqueeze(-1)


@pytest.mark.parametrize("skip", [(), ("fuse_aten_attention",)])
def test_value_tangent_and_gradients(skip):
    backend = jvpgraph.backend("eager", jvpgraph.Config(skip_passes=skip))
    primals = tuple(torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(3))
    dots = tuple(torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))
    y, y_dot = jvpgraph.jvp(attend, primals, dots, backend=backend)
    want, want_dot = torch.func.jvp(plain, tuple(x.detach() for x in primals), dots)
    torch.testing.assert_close((y, y_dot), (want, want_dot), rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(want)
    grads = torch.autograd.grad((y * weight).sum(), primals)
    want_grads = torch.autograd.grad((plain(*primals) * weight).sum(), primals)
    torch.testing.assert_close(grads, want_grads, rtol=1e-10, atol=1e-10)
    assert backend.reports[0].fused == (0 if skip else 1)


@pytest.mark.parametrize("skip", [(), ("fuse_aten_attention",)])
@pytest.mark.parametrize(
    ("compiler", "dtype", "eps"),
    [("eager", torch.float64, 1e-10), ("inductor", torch.float32, 1e-5), ("inductor", torch.bfloat16, 5e-2)],
)
def test_a_query_that_sees_nothing(compiler, dtype, eps, skip):
    """Its lse is 0 in ATen and -inf in our kernel, of which ATen's backward would make NaN."""
    seen = torch.ones(SHAPE[2], SHAPE[2], dtype=torch.bool).tril()
    seen[0] = False
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)[None, None]
    on_cpu = aten._scaled_dot_product_flash_attention_for_cpu

    def masked(q, k, v):
        o, lse = on_cpu(q, k, v, attn_mask=mask)
        return o * lse.detach().unsqueeze(-1), lse.detach()

    def by_hand(q, k, v):
        s = (q @ k.mT / SHAPE[-1] ** 0.5).masked_fill(~seen, -1e30)
        lse = torch.where(seen.any(-1), s.logsumexp(-1), 0).detach()
        return s.softmax(-1) * seen @ v * lse.unsqueeze(-1), lse

    backend = jvpgraph.backend(compiler, jvpgraph.Config(skip_passes=skip))
    primals = tuple(torch.randn(SHAPE, dtype=dtype, requires_grad=True) for _ in range(3))
    dots = tuple(torch.randn(SHAPE, dtype=dtype) for _ in range(3))
    exact, exact_dots = (tuple(x.detach().double().requires_grad_(x.requires_grad) for x in y) for y in (primals, dots))
    (y, lse), (y_dot, _) = jvpgraph.jvp(masked, primals, dots, backend=backend)
    want, want_dot = torch.func.jvp(lambda *x: by_hand(*x)[0], tuple(x.detach() for x in exact), exact_dots)
    grads = torch.autograd.grad(y.square().sum(), primals)
    want_grads = torch.autograd.grad(by_hand(*exact)[0].square().sum(), exact)
    for found, wanted in zip((y, y_dot, *grads, lse), (want, want_dot, *want_grads, by_hand(*exact)[1])):
        scale = 1.0 if dtype == torch.float64 else float(wanted.abs().max())
        torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=eps * scale)


def test_another_call_of_the_kernel_is_left_alone():
    """Only the call whose tangent is asked for becomes ours."""

    def both(x, y):
        return (
            aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]
            + (aten._scaled_dot_product_flash_attention_for_cpu(y, y, y)[0])
        )

    backend = jvpgraph.backend("eager")
    x, y, x_dot = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))
    out, out_dot = jvpgraph.jvp(both, (x, y), (x_dot, None), backend=backend)
    torch.testing.assert_close(out, both(x, y))
    alone = jvpgraph.jvp(lambda x: both(x, y), (x,), (x_dot,), backend="op_by_op")[1]
    torch.testing.assert_close(out_dot, alone)
    assert backend.reports[0].fused == 1


def test_causal_flash_attention_of_unequal_lengths_is_refused():
    """It counts positions from the end, where the rule counts them from the beginning."""
    op = aten._scaled_dot_product_flash_attention.default
    x, keys = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    with pytest.raises(jvpgraph.UnsupportedOp, match="flash_attention"):
        jvpgraph.jvp(lambda q: op(q, keys, keys, 0.0, True)[0], (x,), (x,), backend="eager")
