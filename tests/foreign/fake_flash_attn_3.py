"""Stands for flash_attn 3's module flash_attn_interface, written from its documented signatures.

Functions around autograd.Functions around one op for dense and packed operands, whose kernel is plain math here. The
packed form is the dense one with offsets, the logsumexp is float32, and there are no probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.foreign.fake_flash_attn import each, math_attention, math_backward

NO_WINDOW = (-1, -1)


@torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=())
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    how = (scale, causal, window_size_left, window_size_right)
    if cu_seqlens_q is None:
        o, lse = math_attention(q, k, v, *how)
    elif cu_seqlens_k is None:  # keys of every sequence in a row of a cache
        ends = torch.arange(k.shape[0] + 1) * k.shape[1]
        o, lse = each(q, k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q, ends, *how)
    else:
        o, lse = each(q, k, v, cu_seqlens_q, cu_seqlens_k, *how)
    return o.contiguous(), lse.float().contiguous(), q.new_empty(0), q.new_empty(0)


@_flash_attn_forward.register_fake
def _(q, k, v, *rest, **kwargs):
    rows = q.shape[-2], q.shape[-3]
    lse = q.new_empty(rows if q.dim() == 3 else (q.shape[0], *rows), dtype=torch.float32)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse, q.new_empty(0), q.new_empty(0)


@torch.library.custom_op("flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
) -> Tensor:
    how = (softmax_scale, is_causal, window_size_left, window_size_right)
    if cu_seqlens_q is None:
        grads = math_backward(dout, q, k, v, *how)
    else:
        ends = zip(*(cu.tolist()[i:] for cu in (cu_seqlens_q, cu_seqlens_k) for i in (0, 1)))
        rows = [math_backward(dout[None, a:b], q[None, a:b], k[None, c:d], v[None, c:d], *how) for a, b, c, d in ends]
        grads = [torch.cat(parts, 1)[0] for parts in zip(*rows)]
    for buffer, grad in zip((dq, dk, dv), grads):
        buffer.copy_(grad)
    return dout.new_zeros(1)


@_flash_attn_backward.register_fake
def _(dout, *_):
    return dout.new_empty(1)


def forward(ctx, q, k, v, scale, causal, window, return_softmax, cu=(None, None), most=(None, None), qv=None, **how):
    """Of all three Functions."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse, *_ = torch.ops.flash_attn_3._flash_attn_forward(
        *(q, k, v, None, None, qv, None, *cu, None, None, None, *most),
        softmax_scale=scale,
        causal=causal,
        window_size_left=window[0],
        window_size_right=window[1],
        **how,
    )
    ctx.save_for_backward(q, k, v, *cu)
    ctx.how = (scale, causal, *window)
    return (out, lse) if return_softmax else out


def backward(ctx, dout):
    q, k, v, *cu = ctx.saved_tensors
    grads = [torch.empty_like(x) for x in (q, k, v)]
    torch.ops.flash_attn_3._flash_attn_backward(dout.contiguous(), q, k, v, *cu, *grads, *ctx.how)
    return grads


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        softmax_scale,
        causal,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=NO_WINDOW,
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_softmax=False,
    ):
        how = {"attention_chunk": attention_chunk, "softcap": softcap, "num_splits": num_splits, "qv": qv}
        return forward(ctx, q, k, v, softmax_scale, causal, window_size, return_softmax, **how)

    @staticmethod
    def backward(ctx, dout, *_):
        return *backward(ctx, dout), *[None] * 14


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        qkv,
        softmax_scale,
        causal,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=NO_WINDOW,
        attention_chunk=0,
        softcap=0.0,
        deterministic=False,
        num_heads_q=None,
        sm_margin=0,
        return_softmax=False,
    ):
        if qkv.dim() == 5:
            q, k, v = qkv.unbind(-3)
        else:
            n_kv = (qkv.shape[2] - num_heads_q) // 2
            q, k, v = qkv.split([num_heads_q, n_kv, n_kv], -2)
        ctx.dims = qkv.dim()
        how = {"attention_chunk": attention_chunk, "softcap": softcap}
        return forward(ctx, q, k, v, softmax_scale, causal, window_size, return_softmax, **how)

    @staticmethod
    def backward(ctx, dout, *_):
        join = torch.stack if ctx.dims == 5 else torch.cat
        return join(backward(ctx, dout), 2), *[None] * 12


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=NO_WINDOW,
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_softmax=False,
    ):
        cu, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        how = {"attention_chunk": attention_chunk, "softcap": softcap, "num_splits": num_splits, "qv": qv}
        return forward(ctx, q, k, v, softmax_scale, causal, window_size, return_softmax, cu, most, **how)

    @staticmethod
    def backward(ctx, dout, *_):
        return *backward(ctx, dout), *[None] * 20


def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=NO_WINDOW,
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
):
    return FlashAttnQKVPackedFunc.apply(
        *(qkv, softmax_scale, causal, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap),
        *(deterministic, num_heads_q, sm_margin, return_attn_probs),
    )


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=NO_WINDOW,
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    return FlashAttnFunc.apply(
        *(q, k, v, softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap),
        *(num_splits, pack_gqa, deterministic, sm_margin, return_attn_probs),
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=NO_WINDOW,
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    return FlashAttnVarlenFunc.apply(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, softmax_scale),
        *(causal, qv, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap, num_splits, pack_gqa),
        *(deterministic, sm_margin, return_attn_probs),
    )
