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

    @staticmethod
    def ragged(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """So many rows of each sample, one sample after the other, and where these begin and end."""
        rows = torch.cat([sample[:length] for sample, length in zip(x, lengths)])
        return rows, F.pad(lengths.cumsum(0), (1, 0)).int()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, newest: bool = True) -> Tensor:
        batch, most = q.shape[:2]
        q, of_q = self.ragged(q, torch.full((batch,), most))
        (k, of_k), (v, _) = (self.ragged(x, lengths) for x in (k, v))
        how = {"cu_seqlens_q": of_q, "cu_seqlens_k": of_k, "max_seqlen_q": most, "max_seqlen_k": int(lengths.max())}
        if newest and self.flash_3 is not None:
            o, _ = self.flash_3.flash_attn_varlen_func(q, k, v, causal=False, seqused_q=None, **how)
        else:
            o = self.flash_2.flash_attn_varlen_func(q, k, v, dropout_p=0.0, window_size=(-1, -1), **how)
        return o.unflatten(0, (batch, most)).flatten(2)

    def on_tokens(self, h, emb, height):
        h = h + emb[:, None]
        lengths = torch.tensor([len(sample) for sample in h])
        h = h + self.own.out(self.attend(*self.own.split(h).unbind(2), lengths))
        context = self.context.expand(len(h), -1, -1)
        keys, values = self.cross.split(context)[:, :, 1:].unbind(2)
        queries, lengths = self.cross.split(h)[:, :, 0], torch.tensor([TEXT] * len(h))
        return h + self.cross.out(self.attend(queries, keys, values, lengths, newest=False))


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
    def ends(text_mask: Tensor, tokens: int) -> tuple[Tensor, int]:
        """Of the image with its prompt, and of the padding behind it, for each sample."""
        width = tokens + text_mask.shape[1]
        ends = torch.zeros(2 * len(text_mask) + 1, dtype=torch.int32)
        for row, words in enumerate(text_mask.sum(1)):
            ends[2 * row + 1] = ends[2 * row] + tokens + words
            ends[2 * row + 2] = width * (row + 1)
        return ends, width

    def mixed(self, h, text, text_mask):
        ends, width = self.ends(text_mask, h.shape[1])
        packed = torch.cat([self.image.split(h), self.prompt.split(text)], dim=1).flatten(0, 1)
        o = self.varlen(*packed.unbind(1), ends, ends, width, width).unflatten(0, (len(h), width)).flatten(2)
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
        n = h.shape[1]
        kept = F.pad(text_mask, (n, 0), value=True)
        where = kept.flatten().nonzero().squeeze(1)
        rows = torch.cat([self.image.split(h), self.prompt.split(text)], dim=1).flatten(0, 1)[where]
        ends = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        o = self.varlen(rows, cu_seqlens=ends, max_seqlen=kept.shape[1], dropout_p=0.0).flatten(1)
        whole = o.new_zeros(kept.numel(), o.shape[1]).index_copy(0, where, o).unflatten(0, kept.shape)
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
        attend, mask = self.xformers.memory_efficient_attention, self.xformers.fmha.BlockDiagonalMask
        h = h + self.own.out(attend(*self.own.split(h).unbind(2), p=0.0).flatten(2))
        words = text.masked_select(text_mask[..., None]).unflatten(0, (1, -1, WIDTH))
        queries = self.cross.split(h)[:, :, 0].flatten(0, 1)[None]
        keys, values = self.cross.split(words)[:, :, 1:].unbind(2)
        blocks = mask.from_seqlens([h.shape[1]] * len(h), text_mask.sum(1).tolist())
        return h + self.cross.out(attend(queries, keys, values, attn_bias=blocks).reshape(h.shape))


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
