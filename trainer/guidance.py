"""Settings of a teacher's classifier-free guidance, for a run and for a stage of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jvpgraph.trainer.times import Ranges


@dataclass(frozen=True)
class GuidanceConfig:
    """The teacher's classifier-free guidance: F_negative + scale (F - F_negative)."""

    scale: float | tuple[float, float] = 1.0  # 1: none; rCM uses 5 for Wan. Two: see docs/trainer.md
    below: tuple[float, float] | None = None  # a rectified-flow time, 1 is noise, and the scale below it
    interval: tuple[float, float] = (0.0, 1.0)  # rectified-flow times between which it is on
    negative: dict[str, Any] = field(default_factory=dict)  # an empty or negative prompt: numbers or lists by condition
    negative_file: Path | None = None  # the same as a safetensors file of tensors without a batch dim
    shared: tuple[str, ...] = ()  # conditions that the negative prompt has from the sample: sizes, a first frame
    keep_norm: Literal["token", "row"] | None = None  # as Qwen-Image's or Lumina 2's pipeline: see docs/trainer.md

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_below(self.scale, self.below)
        check_interval(self.interval)

    @property
    def on(self) -> bool:
        """Whether there is any."""
        return self.scale != 1 or self.below is not None

    def in_stage(self, other: StageGuidance) -> GuidanceConfig:
        """The same, but for what a stage says of it."""
        return replace(
            self,
            scale=self.scale if other.scale is None else other.scale,
            below=self.below if other.scale is None and other.below is None else other.below,
            interval=self.interval if other.interval is None else other.interval,
        )

    def idle(self, asked: Ranges) -> str | None:
        """What of it would do nothing for a teacher that is asked at these rectified-flow times; None: all acts."""
        first, last = self.interval
        if not self.on:
            return None
        if self.below is not None and not first < self.below[0] < last:
            return f"guidance.below begins at {self.below[0]:g}, and guidance is on between {first:g} and {last:g} only"
        parts = [(first, last, self.scale)]
        if self.below is not None:
            parts = [(first, self.below[0], self.below[1]), (self.below[0], last, self.scale)]
        acting = [(start, end) for start, end, scale in parts if scale != 1]
        if not any(overlap(part, times) for part in acting for times in asked):
            where = " and ".join(f"{start:g} and {end:g}" for start, end in acting)
            return (
                f"guidance is on between {where} (guidance.interval, .below), and the teacher is asked {shown(asked)}, "
                "where there is none"
            )
        return None


@dataclass(frozen=True)
class StageGuidance:
    """Where a stage's guidance is another than the run's."""

    scale: float | tuple[float, float] | None = None  # as guidance.scale; null: the same, and the same below a time
    below: tuple[float, float] | None = None  # as guidance.below
    interval: tuple[float, float] | None = None  # as guidance.interval; null: the same

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_below(self.scale, self.below)
        check_interval(self.interval)


def overlap(part: tuple[float, float], times: tuple[float, float]) -> bool:
    """Whether two ranges of times have more in common than an end; the second may be one time."""
    (start, end), (low, high) = part, times
    return max(start, low) < min(end, high) or start <= low == high <= end


def shown(asked: Ranges) -> str:
    """Ranges of times for errors."""
    points = sorted({low for low, high in asked if low == high})
    words = [f"between {low:.4g} and {high:.4g}" for low, high in dict.fromkeys(asked) if low < high]
    if points:
        spread = "" if len(points) == 1 else f"{len(points)} times from {points[0]:.4g} to "
        words.append(f"at {spread}{points[-1]:.4g}")
    return " and ".join(words)


def check_below(scale: float | tuple[float, float] | None, below: tuple[float, float] | None) -> None:
    """Raises ValueError."""
    if below is None:
        return
    if not (0 < below[0] < 1 and 0 < below[1] < math.inf):
        raise ValueError(f"below is {below}: a time between 0 (data) and 1 (noise), and a scale above 0")
    if isinstance(scale, tuple):
        raise ValueError("below goes with one scale, not with two: leave one of them out")


def check_scale(scale: float | tuple[float, float] | None) -> None:
    """Raises ValueError; 0 would be the negative condition alone."""
    low, high = scale if isinstance(scale, tuple) else (scale, math.inf)
    if low is not None and not 0 < low < high:
        raise ValueError(f"scale is {scale} and must be above 0, or two numbers that rise, between which it is drawn")


def check_interval(interval: tuple[float, float] | None) -> None:
    """Raises ValueError."""
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"interval is {interval}: two times that rise, from 0 (data) to 1 (noise)")
