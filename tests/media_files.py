"""Pictures and clips with something to see, written to real files."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def picture(path: Path, width: int, height: int, seed: int, caption: str | None = "a red thing") -> Path:
    """A coloured slope with a square, as .jpg, .png or .webp."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    slopes = [(rows * rng.uniform(0, 3) + columns * rng.uniform(0, 3)) % 256 for _ in range(3)]
    pixels = np.stack(slopes, axis=-1).astype(np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 255, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def clip(
    path: Path,
    width: int,
    height: int,
    frames: int,
    fps: int = 16,
    caption: str | None = "it moves",
    aspect: Fraction = Fraction(1),
) -> Path:
    """A white square moves over grey that brightens, frame by frame; .mp4 or .webm. aspect: of a pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx" if path.suffix == ".webm" else "mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        stream.codec_context.sample_aspect_ratio = aspect
        stream.codec_context.time_base = Fraction(1, fps)
        for i in range(frames):
            pixels = np.full((height, width, 3), 20 + 200 * i // frames, np.uint8)
            left = (width - 8) * i // max(1, frames - 1)
            pixels[height // 3 : height // 3 + 8, left : left + 8] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def turned(path: Path, quarters: int) -> Path:
    """An .mp4 whose header says that it is shown turned by quarters, clockwise (ISO 14496-12, the matrix of tkhd)."""
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters]
    matrix = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)
    return path
