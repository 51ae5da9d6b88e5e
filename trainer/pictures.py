"""Pictures and animations as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


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
