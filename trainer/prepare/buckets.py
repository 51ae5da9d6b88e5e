"""Sizes and lengths that samples are cut to: few shapes of about equal area, so that batches have one shape each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ASPECTS = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")  # width to height


@dataclass(frozen=True, order=True)
class Bucket:
    """A shape in pixels."""

    width: int
    height: int
    frames: int = 1

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames > 1 else "")


def resolutions(width: int, height: int, multiple: int, aspects: Sequence[str]) -> list[tuple[int, int]]:
    """Widths and heights: the given one, and one of about its area for each aspect ratio.

    Raises:
        ValueError: the given one is no multiple of what VAE and network need.
    """
    if width % multiple or height % multiple or width < multiple or height < multiple:
        near = "x".join(str(max(multiple, round(side / multiple) * multiple)) for side in (width, height))
        raise ValueError(
            f"--size {width}x{height}: this VAE and network need multiples of {multiple} pixels. Take {near}."
        )
    found = [(width, height)]
    for aspect in aspects:
        ratio = ratio_of(aspect)
        if abs(math.log(ratio * height / width)) < 0.05:  # as good as the size itself
            continue
        sides = math.sqrt(width * height * ratio), math.sqrt(width * height / ratio)
        w, h = (max(multiple, round(side / multiple) * multiple) for side in sides)
        if (w, h) not in found:
            found.append((w, h))
    return found


def ratio_of(aspect: str) -> float:
    """`16:9` -> 16 / 9."""
    try:
        width, height = (float(part) for part in aspect.split(":"))
        if width > 0 and height > 0:
            return width / height
    except ValueError:
        pass
    raise ValueError(f"--aspects {aspect}: write width:height, such as 16:9.")


def nearest(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size that cuts away least of a picture: whose aspect ratio is nearest, the first of equals."""
    return min(sizes, key=lambda size: abs(math.log(width / height * size[1] / size[0])))


def check_lengths(lengths: Sequence[int], period: int) -> list[int]:
    """Numbers of frames, falling.

    Raises:
        ValueError: one is not 1 + a multiple of the VAE's period.
    """
    for length in lengths:
        if length < 1 or (length - 1) % period:
            near = 1 + max(0, round((length - 1) / period)) * period
            raise ValueError(
                f"--frames {length}: this VAE joins {period} frames, so a clip has 1 + a multiple of them. Take {near}."
            )
    return sorted(set(lengths), reverse=True)
