"""Pictures and animations as files."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jvpgraph.trainer.optional import optional


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


Film = Literal["webp", "mp4"]


def mp4_writer() -> ModuleType:
    """PyAV, which only films that are asked for as mp4 need. Raises ValueError if it is not there."""
    return optional("av", "av", "webp instead of mp4")


def save_frames(frames: Sequence[Image.Image], stem: Path, fps: float, film: Film = "webp") -> Path:
    """One frame as STEM.png, several as an animated STEM.webp without loss, or as STEM.mp4."""
    first, *rest = frames
    if rest and film == "mp4":
        return save_mp4(frames, stem.with_suffix(".mp4"), fps)
    if not rest:
        path = stem.with_suffix(".png")
        first.save(path)
        return path
    path = stem.with_suffix(".webp")
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, lossless=True)
    return path


def save_mp4(frames: Sequence[Image.Image], path: Path, fps: float) -> Path:
    """H.264 where PyAV has it. Colours have half the resolution; an odd last row or column is there twice for that."""
    av = mp4_writer()
    width, height = (side + side % 2 for side in frames[0].size)
    with av.open(str(path), "w") as file:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "12"}  # of 51, where 18 is said to look like the original
        else:
            stream.bit_rate = 20 * width * height  # bits per second
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB"))
            pixels = np.pad(pixels, ((0, height - frame.height), (0, width - frame.width), (0, 0)), mode="edge")
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path
