"""Pictures and clips from files: what a header says, and the pixels, cut to a bucket."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
VIDEOS = (".mp4", ".webm")
ORIENTATION = 0x0112  # of EXIF; from 5 on, width and height change places
# Counterclockwise, as PyAV counts them.
QUARTERS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
SLACK = 1.5e-3  # seconds: webm rounds time stamps to milliseconds


class BadFile(ValueError):
    """A file cannot be used; the message says why."""


@dataclass(frozen=True)
class Media:
    """What the header of a file says.

    Attributes:
        width, height: in pixels, as it is shown.
        times: of a clip: when each frame is shown, in seconds from the first; empty for a picture.
    """

    width: int
    height: int
    times: tuple[float, ...] = ()

    def frames_at(self, fps: float) -> int:
        """How many frames the clip has at another frame rate."""
        return int(self.times[-1] * fps + SLACK * fps) + 1 if self.times else 1


def look_at(path: Path) -> Media:
    """The header of a picture, or all time stamps of a clip and its first frame. Raises BadFile."""
    if path.suffix.lower() in IMAGES:
        with opened_image(path) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return Media(height, width) if turned else Media(width, height)
    with opened_video(path) as (container, stream):
        stamps = [packet.pts for packet in container.demux(stream) if packet.size]
        if not stamps:
            raise BadFile("no frames")
        if None in stamps:
            raise BadFile("frames without time stamps")
        first = min(stamps)
        times = tuple(float((stamp - first) * stream.time_base) for stamp in sorted(stamps))
    with opened_video(path) as (container, stream):  # only a frame says how it is turned
        frame = next(container.decode(stream), None)
        if frame is None:
            raise BadFile("no frames")
        return Media(*as_shown(frame, stream).size, times)


def read(path: Path, width: int, height: int, frames: int, start: int, fps: float) -> list[Image.Image]:
    """Frames `start` to `start + frames - 1` at `fps`, each scaled and cut at its middle to width x height.

    Raises:
        BadFile: the file cannot be decoded, or ends early.
    """
    if path.suffix.lower() in IMAGES:
        with opened_image(path) as image:
            return [cut(as_rgb(ImageOps.exif_transpose(image)), width, height)]
    moments = [(start + k) / fps for k in range(frames)]
    return [cut(frame, width, height) for frame in frames_shown_at(path, moments)]


def frames_shown_at(path: Path, moments: Sequence[float]) -> list[Image.Image]:
    """The frame that a player shows at each of some rising moments, in seconds from the first frame."""
    shown: list[Image.Image] = []
    with opened_video(path) as (container, stream):
        first: Any = None
        last: Any = None
        time = 0.0
        for frame in container.decode(stream):
            if frame.pts is None:
                raise BadFile("frames without time stamps")
            first = frame.pts if first is None else first
            time = float((frame.pts - first) * stream.time_base)
            while last is not None and len(shown) < len(moments) and moments[len(shown)] < time - SLACK:
                shown.append(as_shown(last, stream))
            if len(shown) == len(moments):
                return shown
            last = frame
        while last is not None and len(shown) < len(moments) and moments[len(shown)] <= time + SLACK:
            shown.append(last.to_image())
    if len(shown) < len(moments):
        raise BadFile(f"ends after {time:.2f} seconds, before its header says")
    return shown


def as_shown(frame: Any, stream: Any) -> Image.Image:
    """A frame with square pixels, upright: phones write clips lying, and how to turn them. Raises BadFile."""
    if frame.rotation % 90:
        raise BadFile(f"its frames are to be turned by {frame.rotation} degrees")
    image = frame.to_image()
    if aspect := stream.sample_aspect_ratio:  # of a pixel; None or 0 where nothing is said
        image = image.resize((round(image.width * aspect), image.height), Image.Resampling.LANCZOS)
    turn = QUARTERS[frame.rotation // 90 % 4]
    return image if turn is None else image.transpose(turn)


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(f"not a whole picture: {' '.join(str(error).split())}") from error


@contextmanager
def opened_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and the first of its video streams."""
    av = pyav()
    if not path.stat().st_size:
        raise BadFile("an empty file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadFile("no video in it")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise BadFile(f"not a whole video: {error.strerror}") from error


def pyav() -> Any:
    try:
        return importlib.import_module("av")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading videos needs PyAV, which is not installed: pip install av") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits per colour; what is transparent becomes white."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray(
            (values / (65535 if image.mode != "F" else 1) * 255).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def cut(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled until it covers width x height, and what sticks out cut off on both sides alike."""
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    scaled = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return scaled.crop((left, top, left + width, top + height))
