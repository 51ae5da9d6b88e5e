"""Networks whose attention is that of packages for GPUs, called as repositories call it. Nothing in them is theirs.

They import the packages as they are built, while tests/reach/base.py has put stand-ins in their places.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tests.reach.base import images, network
from tests.reach.networks import WIDTH, Tokens
from tests.zoo.base import Draw, padding, pick

HEADS, TEXT = 2, 6


class Heads(nn.Module):
    """q, k, v [B, L, H, D] of tokens."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        return rearrange(self.qkv(x), "... (three h d) -> ... three h d", three=3, h=HEADS)


def with_text(draw: Draw, variant: int) -> dict[str, Any]:
    """Prompts of several lengths, padded."""
    valid = pick(variant, (3, 5), (2, 6, 4))
    text = {"text": draw.normal(len(valid), TEXT, WIDTH), "text_mask": padding(TEXT, *valid)}
    return images(draw, variant) | text


class WithText(Tokens):
    """Image tokens and text in one network."""

    def forward(self, x, t, text, text_mask):
        h = rearrange(self.patches(x), "b c h w -> b (h w) c")
        h = self.mixed(h * (1 + self.times(t)[:, None]), text, text_mask)
        return rearrange(self.last(h), "b (h w) (p q c) -> b c (h p) (w q)", h=x.shape[2] // 2, p=2, q=2)


# ------------------------------------------------------------------------------------------------------- flash_attn


@network(
    "Wan 2.1, Wan 2.2 (Wan-Video)",
    "flash_attn 3 if it can be imported, and 2 for text; keys cut by lengths in a tensor, all packed",
    packages=("flash_attn", "flash_attn_interface"),
)
class FlashEither(Tokens):
    def __init__(self):
        super().__init__()
        try:
            import flash_attn_interface

            self.flash_3 = flash_attn_interface
        except ModuleNotFoundError:
            self.flash_3 = None
        self.flash_2 = importlib.import_module("flash_attn")
        self.own, self.cross = Heads(), Heads()
        self.context = nn.Parameter(torch.zeros(TEXT, WIDTH))

    def attention(self, q, k, v, k_lens=None, version=None):
        b, lq, lk = q.size(0), q.size(1), k.size(1)
        q_lens = torch.tensor([lq] * b, dtype=torch.int32).to(device=q.device, non_blocking=True)
        if k_lens is None:
            k, v, k_lens = k.flatten(0, 1), v.flatten(0, 1), torch.tensor([lk] * b, dtype=torch.int32)
        else:
            k, v = (torch.cat([rows[:n] for rows, n in zip(x, k_lens)]) for x in (k, v))
        ends = [torch.cat([n.new_zeros([1]), n]).cumsum(0, dtype=torch.int32) for n in (q_lens, k_lens)]
        packed = {"q": q.flatten(0, 1), "k": k, "v": v, "cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
        packed |= {"max_seqlen_q": lq, "max_seqlen_k": lk, "softmax_scale": None, "causal": False}
        if version in (None, 3) and self.flash_3 is not None:
            o = self.flash_3.flash_attn_varlen_func(**packed, seqused_q=None, seqused_k=None, deterministic=False)[0]
        else:
            o = self.flash_2.flash_attn_varlen_func(**packed, dropout_p=0.0, window_size=(-1, -1), deterministic=False)
        return o.unflatten(0, (b, lq)).type(q.dtype)

    def on_tokens(self, h, emb, height):
        seq_lens = torch.tensor([u.size(0) for u in h], dtype=torch.long)
        h = h + emb[:, None]
        h = h + self.own.out(self.attention(*self.own.split(h).unbind(2), k_lens=seq_lens).flatten(2))
        q = self.cross.split(h)[:, :, 0]
        k, v = self.cross.split(self.context.expand(len(h), -1, -1)).unbind(2)[1:]
        return h + self.cross.out(self.attention(q, k, v, version=2).flatten(2))


@network(
    "HunyuanVideo, FramePack (Tencent, lllyasviel)",
    "flash_attn on image and text in one, whose ends a loop writes from a mask; what is padded is a sequence as well",
    with_text,
    packages=("flash_attn",),
)
class FlashJoint(WithText):
    def __init__(self):
        super().__init__()
        self.varlen = importlib.import_module("flash_attn.flash_attn_interface").flash_attn_varlen_func
        self.image, self.prompt = Heads(), Heads()

    @staticmethod
    def ends(text_mask, img_len):
        batch_size, text_len = text_mask.shape[0], text_mask.sum(dim=1)
        max_len = text_mask.shape[1] + img_len
        cu_seqlens = torch.zeros([2 * batch_size + 1], dtype=torch.int32, device=text_mask.device)
        for i in range(batch_size):
            cu_seqlens[2 * i + 1] = i * max_len + text_len[i] + img_len
            cu_seqlens[2 * i + 2] = (i + 1) * max_len
        return cu_seqlens, max_len

    def mixed(self, h, text, text_mask):
        cu_seqlens, max_len = self.ends(text_mask, h.shape[1])
        q, k, v = torch.cat([self.image.split(h), self.prompt.split(text)], dim=1).unbind(2)
        q, k, v = (x.view(x.shape[0] * x.shape[1], *x.shape[2:]) for x in (q, k, v))
        o = self.varlen(q, k, v, cu_seqlens, cu_seqlens, max_len, max_len)
        o = o.view(len(h), max_len, -1)
        image, prompt = o[:, : h.shape[1]], o[:, h.shape[1] :]
        return h + self.image.out(image) + self.prompt.out(prompt * text_mask[..., None]).mean(1, keepdim=True)


@network(
    "Mochi 1, Lumina-Next (genmo, Alpha-VLLM)",
    "tokens without padding, gathered by the indices of a mask, flash_attn on packed qkv, scattered into zeros",
    with_text,
    packages=("flash_attn",),
)
class FlashUnpadded(WithText):
    def __init__(self):
        super().__init__()
        self.varlen = importlib.import_module("flash_attn").flash_attn_varlen_qkvpacked_func
        self.image, self.prompt = Heads(), Heads()

    def mixed(self, h, text, text_mask):
        b, n = h.shape[:2]
        mask = F.pad(text_mask, (n, 0), value=True)
        indices = torch.nonzero(mask.flatten(), as_tuple=False).flatten()
        cu_seqlens = F.pad(mask.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
        qkv = torch.cat([self.image.split(h), self.prompt.split(text)], dim=1).flatten(0, 1).index_select(0, indices)
        o = self.varlen(qkv, cu_seqlens=cu_seqlens, max_seqlen=mask.shape[1], dropout_p=0.0, softmax_scale=None)
        o = o.flatten(1)
        whole = torch.zeros(b * mask.shape[1], o.shape[-1], dtype=o.dtype, device=o.device)
        whole = whole.scatter_(0, indices[:, None].expand(-1, o.shape[-1]), o).unflatten(0, (b, -1))
        image, prompt = whole.tensor_split([n], dim=1)
        return h + self.image.out(image) + self.prompt.out(prompt).sum(1, keepdim=True)


# ------------------------------------------------------------------------------------------------------ the others


@network(
    "PixArt-alpha, Open-Sora 1 (PixArt-alpha, hpcaitech)",
    "xformers with a mask of blocks made from lists, text without padding in one row",
    with_text,
    packages=("xformers",),
)
class Blocks(WithText):
    def __init__(self):
        super().__init__()
        self.xformers = importlib.import_module("xformers.ops")
        self.own, self.cross = Heads(), Heads()

    def mixed(self, h, text, text_mask):
        b, n, c = h.shape
        y_lens = text_mask.sum(dim=1).tolist()
        y = text.masked_select(text_mask.unsqueeze(-1)).view(1, -1, c)
        h = h + self.own.out(self.xformers.memory_efficient_attention(*self.own.split(h).unbind(2), p=0.0).flatten(2))
        q = self.cross.split(h)[:, :, 0].reshape(1, -1, HEADS, c // HEADS)
        k, v = self.cross.split(y).unbind(2)[1:]
        bias = self.xformers.fmha.BlockDiagonalMask.from_seqlens([n] * b, y_lens)
        o = self.xformers.memory_efficient_attention(q, k, v, p=0.0, attn_bias=bias)
        return h + self.cross.out(o.view(b, -1, c))


@network(
    "HDiT (crowsonkb)",
    "NATTEN's neighbourhoods of a grid of tokens, after cosine scaling",
    packages=("natten",),
)
class Neighbours(Tokens):
    def __init__(self):
        super().__init__()
        self.natten, self.heads = importlib.import_module("natten"), Heads()
        self.scale = nn.Parameter(torch.full([HEADS], 10.0))

    def on_tokens(self, h, emb, height):
        q, k, v = self.heads.split(rearrange(h + emb[:, None], "b (h w) c -> b h w c", h=height)).unbind(3)
        scale = torch.sqrt(self.scale)[:, None]
        q, k = (x * (scale / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-6)) for x in (q, k))
        o = self.natten.na2d(q, k, v, 3, scale=1.0)
        return h + self.heads.out(rearrange(o, "b h w nh e -> b (h w) (nh e)"))


@network(
    "CogVideoX (THUDM) with SageAttention",
    "sageattn in the place of scaled_dot_product_attention, on text and image with norms of q and k",
    with_text,
    packages=("sageattention",),
)
class Sage(WithText):
    def __init__(self):
        super().__init__()
        self.attend = importlib.import_module("sageattention").sageattn
        self.heads, self.norm = Heads(), nn.LayerNorm(WIDTH // HEADS, eps=1e-6)

    def mixed(self, h, text, text_mask):
        both = torch.cat([text, h], dim=1)
        q, k, v = (x.transpose(1, 2) for x in self.heads.split(both).unbind(2))
        o = self.attend(self.norm(q), self.norm(k), v, attn_mask=None, dropout_p=0.0, is_causal=False)
        return h + self.heads.out(o.transpose(1, 2).flatten(2))[:, text.shape[1] :]
