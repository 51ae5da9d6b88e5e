"""Latents as the tokens of 2 x 2 pixels that Flux and its kind take, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(x: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens of 2 x 2 pixels [B, H/2 W/2, 4 C], in the order (C, row, column)."""
    B, C, H, W = x.shape
    return x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, 4 * C)


def unpack(tokens: Tensor, H: int, W: int) -> Tensor:
    """[B, H/2 W/2, 4 C] -> [B, C, H, W]."""
    B, _, C4 = tokens.shape
    return tokens.reshape(B, H // 2, W // 2, C4 // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C4 // 4, H, W)


def positions(H: int, W: int, device: torch.device) -> Tensor:
    """(0, row, column) of every token [H W, 3], float32."""
    rows = torch.arange(H, dtype=torch.float32, device=device)[:, None].expand(H, W)
    columns = torch.arange(W, dtype=torch.float32, device=device)[None].expand(H, W)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(H * W, 3)
