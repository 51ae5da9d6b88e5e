"""Stands for flash_attn 2 and the interface of flash_attn 3, written from their documented signatures.

What Dynamo meets is what it would meet there: functions around autograd.Functions around ops of torch.library. Their
kernels are plain math here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NO_WINDOW = (-1, -1)


def probabilities(q, k, scale, causal, left, right):
    """p and lse of [B, H, L, D]; windows are counted from the end."""
    s = scale * q @ k.mT
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    right = 0 if causal else right
    hidden = ((distance > right) & (right >= 0)) | ((distance < -left) & (left >= 0))
    s = s.masked_fill(hidden, -math.inf)
    lse = s.logsumexp(-1)
    return torch.exp(s - lse[..., None]).nan_to_num(0.0), lse.masked_fill(lse == -math.inf, math.inf)


def math_attention(q, k, v, scale, causal, left, right):
    """o and lse of [B, L, H, D]"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    p, lse = probabilities(q, k, scale, causal, left, right)
    return (p @ v).transpose(1, 2), lse


def math_backward(dout, q, k, v, scale, causal, left, right):
    """dq, dk, dv, without autograd, which is switched off inside of an op."""
    groups = q.shape[2] // k.shape[2]
    dout, q, k, v = (x.transpose(1, 2) for x in (dout, q, k, v))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    p, _ = probabilities(q, k, scale, causal, left, right)
    dp = dout @ v.mT
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    dk, dv = ((x.mT @ y).unflatten(1, (-1, groups)).sum(2) for x, y in ((ds, q), (p, dout)))
    return [x.transpose(1, 2) for x in (ds @ k, dk, dv)]


def each(q, k, v, cu_q, cu_k, *how):
    outs, lses = [], []
    for a, b, c, d in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]):
        o, lse = math_attention(q[None, a:b], k[None, c:d], v[None, c:d], *how)
        outs.append(o[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, lse = math_attention(q, k, v, softmax_scale, causal, window_size_left, window_size_right)
    return o.contiguous(), lse.float(), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


@_flash_attn_forward.register_fake
def _(q, k, v, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes, return_softmax):
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    grads = math_backward(dout, q, k, v, softmax_scale, causal, window_size_left, window_size_right)
    for buffer, grad in zip((dq, dk, dv), grads):
        buffer.copy_(grad)
    return dout.new_zeros(1)


@_flash_attn_backward.register_fake
def _(dout, *_):
    return dout.new_empty(1)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how = (softmax_scale, causal, window_size_left, window_size_right)
    o, lse = each(q, k, v, cu_seqlens_q, cu_seqlens_k, *how)
    return o.contiguous(), lse.float(), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


@_flash_attn_varlen_forward.register_fake
def _(q, k, v, *_, **__):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    how = (softmax_scale, causal, window_size_left, window_size_right)
    ends = zip(*(cu.tolist()[i:] for cu in (cu_seqlens_q, cu_seqlens_k) for i in (0, 1)))
    parts = [math_backward(*(x[None, a:b] for x in (dout, q)), k[None, c:d], v[None, c:d], *how) for a, b, c, d in ends]
    grads = [torch.cat(xs, 1)[0] for xs in zip(*parts)]
    for buffer, grad in zip((dq, dk, dv), grads):
        buffer.copy_(grad)
    return dout.new_zeros(1)


@_flash_attn_varlen_backward.register_fake
def _(dout, *_):
    return dout.new_empty(1)


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled,
    ):
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out, lse, probabilities, _ = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, dropout_p, scale, causal, *window_size, softcap, alibi_slopes, False
        )
        ctx.save_for_backward(q, k, v)
        ctx.how = (scale, causal, *window_size)
        return (out, lse, probabilities) if return_softmax else out

    @staticmethod
    def backward(ctx, dout, *_):
        q, k, v = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        torch.ops.flash_attn._flash_attn_backward(dout, q, k, v, *ctx.how, *grads)
        return *grads, *[None] * 9


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        qkv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled,
    ):
        q, k, v = (qkv[:, :, i].detach() for i in range(3))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out, lse, probabilities, _ = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, dropout_p, scale, causal, *window_size, softcap, alibi_slopes, False
        )
        ctx.save_for_backward(q, k, v)
        ctx.how = (scale, causal, *window_size)
        return (out, lse, probabilities) if return_softmax else out

    @staticmethod
    def backward(ctx, dout, *_):
        q, k, v = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        torch.ops.flash_attn._flash_attn_backward(dout, q, k, v, *ctx.how, *grads)
        return torch.stack(grads, 2), *[None] * 9


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        block_table,
        is_grad_enabled,
    ):
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out, lse, probabilities, _ = torch.ops.flash_attn._flash_attn_varlen_forward(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, scale, causal, *window_size),
            *(softcap, alibi_slopes, False, block_table),
        )
        ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)
        ctx.how = (scale, causal, *window_size)
        return (out, lse, probabilities) if return_softmax else out

    @staticmethod
    def backward(ctx, dout, *_):
        q, k, v, *cu = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        torch.ops.flash_attn._flash_attn_varlen_backward(dout, q, k, v, *cu, *ctx.how, *grads)
        return *grads, *[None] * 14


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=NO_WINDOW,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return FlashAttnFunc.apply(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        *(return_attn_probs, torch.is_grad_enabled()),
    )


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=NO_WINDOW,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    return FlashAttnQKVPackedFunc.apply(
        *(qkv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        *(return_attn_probs, torch.is_grad_enabled()),
    )


def flash_attn_kvpacked_func(q, kv, **options):
    return flash_attn_func(q, *kv.unbind(2), **options)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=NO_WINDOW,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    return FlashAttnVarlenFunc.apply(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal),
        *(window_size, softcap, alibi_slopes, deterministic, return_attn_probs, block_table, torch.is_grad_enabled()),
    )


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options):
    return flash_attn_varlen_func(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_attn_varlen_func(q, *kv.unbind(1), *lengths, **options)
