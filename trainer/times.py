"""Distributions of training times, all in TrigFlow radians: t in [0, pi/2], tan(t) = noise / signal."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jvpgraph.trainer.noise import Random, normal, uniform
from jvpgraph.trainer.ranges import finite, positive
from jvpgraph.trainer.settings import Variants


class Times(Variants):
    """Where on the noise axis an objective trains."""

    @abstractmethod
    def draw(self, size: int, rng: Random) -> Tensor:
        """t [size] radians, float64, on the generator's device."""


@dataclass(frozen=True)
class LogNormal(Times):
    """tan(t) = exp(mean + std * normal): p_G of rCM, the proposal of EDM and sCM."""

    name: ClassVar[str] = "log_normal"
    mean: float = -0.8  # of log tan(t); rCM: -0.8 for images, 0.7 for Wan2.1 1.3B video
    std: float = 1.6  # of log tan(t); rCM

    def __post_init__(self) -> None:
        finite(self, "mean")
        positive(self, "std")

    def draw(self, size: int, rng: Random) -> Tensor:
        return (self.mean + self.std * normal(size, rng)).exp().atan()


@dataclass(frozen=True)
class ShiftedUniform(Times):
    """Uniform rectified-flow time s, shifted to k s / (1 + (k - 1) s): p_D of rCM."""

    name: ClassVar[str] = "shifted_uniform"
    shift: float = 5.0  # k; rCM: 5 for video, 1 is plain uniform

    def __post_init__(self) -> None:
        positive(self, "shift")

    def draw(self, size: int, rng: Random) -> Tensor:
        s = uniform(size, rng)
        return torch.atan2(self.shift * s, 1 - s)


@dataclass(frozen=True)
class LogitNormal(Times):
    """Rectified-flow time s = sigmoid(mean + std * normal): SD3 and MeanFlow."""

    name: ClassVar[str] = "logit_normal"
    mean: float = 0.0  # of logit s; SD3: 0, MeanFlow: -0.4
    std: float = 1.0  # of logit s; both papers

    def __post_init__(self) -> None:
        finite(self, "mean")
        positive(self, "std")

    def draw(self, size: int, rng: Random) -> Tensor:
        s = torch.sigmoid(self.mean + self.std * normal(size, rng))
        return from_flow_time(s)


def from_flow_time(s: Tensor) -> Tensor:
    """Rectified-flow time s in [0, 1] -> TrigFlow t with the same noise-to-signal ratio, s / (1 - s)."""
    return torch.atan2(s, 1 - s)


def flow_time(t: Tensor) -> Tensor:
    """The inverse of `from_flow_time`: s = sin(t) / (sin(t) + cos(t))."""
    return t.sin() / (t.sin() + t.cos())
