"""Pictures and animations as files."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def frames_of(pixels: Tensor) -> list[Image.Image]:
    """[C, H, W], or [C, T, H, W] of several frames, C = 1 or 3, in [0, 1]."""
    frames = pixels[:, None] if pixels.dim() == 3 else pixels
    bytes_ = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1, -1).cpu()
    return [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in bytes_.unbind(1)]


def gif(frames: Sequence[Image.Image], fps: float) -> bytes:
    """An animation that TensorBoard and wandb show; of 256 colours a frame."""
    first, *rest = frames
    buffer = BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def save_frames(frames: Sequence[Image.Image], stem: Path, fps: float) -> Path:
    """One frame as STEM.png, several as an animated STEM.webp without loss."""
    first, *rest = frames
    if not rest:
        path = stem.with_suffix(".png")
        first.save(path)
        return path
    path = stem.with_suffix(".webp")
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, lossless=True)
    return path
