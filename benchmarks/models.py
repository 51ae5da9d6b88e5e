"""A small diffusion transformer, for what is measured against depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """adaLN, attention, MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(c_BD))[:, None].chunk(2, -1)
        B, N, D = x_BND.shape
        qkv = self.qkv(self.norm(x_BND) * (1 + scale) + shift)
        q, k, v = qkv.view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        o_BHND = F.scaled_dot_product_attention(q, k, v)
        x_BND = x_BND + self.out(o_BHND.transpose(1, 2).reshape(B, N, D))
        return x_BND + self.mlp(x_BND)


class TinyDiT(nn.Module):
    """x [B, N, 4], t [B] -> [B, N, 4]."""

    def __init__(self, width: int = 16, heads: int = 2, depth: int = 1):
        super().__init__()
        self.embed, self.time = nn.Linear(4, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(torch.sin(t)[:, None])
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, c)
        return self.head(x)


def inputs(batch: int = 2, tokens: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, t and their tangents for TinyDiT."""
    x, t = torch.randn(batch, tokens, 4, dtype=dtype), torch.rand(batch, dtype=dtype)
    return x, t, torch.randn_like(x), torch.randn_like(t)
