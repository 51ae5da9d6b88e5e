"""What flash_attn fuses besides attention: rotary embeddings, norms and cross entropy, which Triton computes there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jvpgraph.foreign.table import check_options, refuse, swaps, wide

__all__: list[str] = []

ROTARY, NORM = "flash_attn.layers.rotary", "flash_attn.ops.triton.layer_norm"
CROSS_ENTROPY = "flash_attn.ops.triton.cross_entropy"


@swaps(f"{ROTARY}.apply_rotary_emb", f"{ROTARY}.ApplyRotaryEmb")
def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Any = 0,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """x [B, L, H, D] with cos and sin [Lmax, R / 2], of which the first R columns are turned."""
    check_options("apply_rotary_emb", options)
    if cu_seqlens is not None or isinstance(seqlen_offsets, torch.Tensor):
        refuse("apply_rotary_emb", "cu_seqlens, seqlen_offsets", "positions of several sequences: index cos and sin")
    half, n = cos.shape[-1], x.shape[1]
    cos, sin = (wide(a[..., seqlen_offsets : seqlen_offsets + n, :]).unsqueeze(-2) for a in (cos, sin))
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = wide(turned[..., ::2]), wide(turned[..., 1::2])
        both = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = wide(turned[..., :half]), wide(turned[..., half:])
        both = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    out = torch.cat([both.to(x.dtype), rest], -1)
    return x.copy_(out) if inplace else out


@swaps(f"{ROTARY}.apply_rotary_emb_qkv_", f"{ROTARY}.ApplyRotaryEmbQKV_")
def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: Any = 0,
    num_heads_q: int | None = None,
    **options: Any,
) -> Tensor:
    """qkv [B, L, 3, H, D], or [B, L, H + 2 Hkv, D] with num_heads_q = H; q and k are turned in place."""
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    if qkv.dim() == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif num_heads_q is None:
        refuse("apply_rotary_emb_qkv_", "num_heads_q", "qkv has four dims, and it is not said how many are q")
    else:
        n_kv = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + n_kv]
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets, **options)
    apply_rotary_emb(k, cos_k, sin_k, interleaved, True, seqlen_offsets, **options)
    return qkv


@swaps(f"{ROTARY}.apply_rotary_emb_kv_", f"{ROTARY}.ApplyRotaryEmbKV_")
def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: Any = 0, **options: Any
) -> Tensor:
    """kv [B, L, 2, H, D]; k is turned in place."""
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets, **options)
    return kv


@swaps(f"{NORM}.layer_norm_fn", f"{NORM}.LayerNormFn")
def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """norm(x + residual), and with prenorm that sum too, in the dtype of the residual."""
    for name in ("x1", "weight1", "bias1", "rowscale", "out", "residual_out", "return_dropout_mask"):
        if options.pop(name, None) not in (None, False):
            refuse("layer_norm_fn", name, "parallel norms, scaled rows and given outputs are not written again")
    check_options("layer_norm_fn", options)
    total = wide(x) if residual is None else wide(x) + wide(residual)
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    scale = wide(weight) + 1 if zero_centered_weight else wide(weight)
    shift = None if bias is None else wide(bias)
    if is_rms_norm:
        y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * scale
        y = y if shift is None else y + shift
    else:
        y = F.layer_norm(total, total.shape[-1:], scale, shift, eps)
    y = y.to(x.dtype if out_dtype is None else out_dtype)
    return (y, total.to(kept)) if prenorm else y


@swaps(f"{NORM}.rms_norm_fn")
def rms_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Any:
    return layer_norm_fn(x, weight, bias, is_rms_norm=True, **options)


@swaps("flash_attn.ops.rms_norm.rms_norm")
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    result: Tensor = layer_norm_fn(x, weight, eps=epsilon, is_rms_norm=True)
    return result


@swaps(f"{CROSS_ENTROPY}.cross_entropy_loss", f"{CROSS_ENTROPY}.CrossEntropyLoss")
def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The losses of rows of logits, and the part of it that is the square of the logsumexp, which has no gradient."""
    others = ("precomputed_lse", "inplace_backward")
    check_options("cross_entropy_loss", {name: x for name, x in options.items() if name not in others})
    scaled = wide(logits) * logit_scale
    smooth = label_smoothing or smoothing
    losses = F.cross_entropy(scaled, labels, ignore_index=ignore_index, reduction="none", label_smoothing=smooth)
    squares = lse_square_scale * scaled.logsumexp(-1).square()
    squares = torch.where(labels == ignore_index, 0.0, squares)
    return losses + squares, squares.detach()
