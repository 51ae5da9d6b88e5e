"""Distributions of training times, all in TrigFlow radians: t in [0, pi/2], tan(t) = noise / signal."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from jvpgraph.trainer.noise import Random, normal, uniform
from jvpgraph.trainer.ranges import finite, positive
from jvpgraph.trainer.settings import Variants

Ranges = tuple[tuple[float, float], ...]
"""Rectified-flow times: from each to each, which may be the same."""


class Times(Variants):
    """Where on the noise axis an objective trains."""

    @abstractmethod
    def draw(self, size: int, rng: Random) -> Tensor:
        """t [size] radians, float64, on the generator's device."""


@dataclass(frozen=True)
class Known(Times):
    """A distribution by its quantiles, of which a part may be drawn alone."""

    between: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)  # rectified-flow times; of others none

    def __post_init__(self) -> None:
        low, high = self.between
        if not 0 <= low < high <= 1:
            raise ValueError(f"between is {self.between}: two times that rise, from 0 (data) to 1 (noise)")

    def draw(self, size: int, rng: Random) -> Tensor:
        if self.between == (0.0, 1.0):
            return self.draw_all(size, rng)
        low, high = from_flow_time(torch.tensor(self.between, dtype=torch.float64))
        first, last = self.share(torch.stack([low, high])).tolist()
        return self.quantile(first + (last - first) * uniform(size, rng)).clamp(low.item(), high.item())

    @abstractmethod
    def draw_all(self, size: int, rng: Random) -> Tensor:
        """As `draw`, of all times."""

    @abstractmethod
    def share(self, t: Tensor) -> Tensor:
        """Of what is drawn, that below t."""

    @abstractmethod
    def quantile(self, share: Tensor) -> Tensor:
        """t, radians: the inverse of `share`."""


@dataclass(frozen=True)
class LogNormal(Known):
    """tan(t) = exp(mean + std * normal): p_G of rCM, the proposal of EDM and sCM."""

    name: ClassVar[str] = "log_normal"
    mean: float = -0.8  # of log tan(t); rCM: -0.8 for images, + log(T) / 2 for T latent frames: 0.7 for Wan2.1
    std: float = 1.6  # of log tan(t); rCM

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self, "mean")
        positive(self, "std")

    def draw_all(self, size: int, rng: Random) -> Tensor:
        return (self.mean + self.std * normal(size, rng)).exp().atan()

    def share(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((t.tan().log() - self.mean) / self.std)

    def quantile(self, share: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(share)).exp().atan()


@dataclass(frozen=True)
class ShiftedUniform(Known):
    """Uniform rectified-flow time s, shifted to k s / (1 + (k - 1) s): p_D of rCM."""

    name: ClassVar[str] = "shifted_uniform"
    shift: float = 5.0  # k; rCM: 5 for video, 1 is plain uniform

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "shift")

    def draw_all(self, size: int, rng: Random) -> Tensor:
        return self.quantile(uniform(size, rng))

    def share(self, t: Tensor) -> Tensor:
        return t.sin() / (t.sin() + self.shift * t.cos())

    def quantile(self, share: Tensor) -> Tensor:
        return torch.atan2(self.shift * share, 1 - share)


@dataclass(frozen=True)
class LogitNormal(Known):
    """Rectified-flow time s = sigmoid(mean + std * normal): SD3 and MeanFlow."""

    name: ClassVar[str] = "logit_normal"
    mean: float = 0.0  # of logit s; SD3: 0, MeanFlow: -0.4
    std: float = 1.0  # of logit s; both papers

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self, "mean")
        positive(self, "std")

    def draw_all(self, size: int, rng: Random) -> Tensor:
        s = torch.sigmoid(self.mean + self.std * normal(size, rng))
        return from_flow_time(s)

    def share(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((t.tan().log() - self.mean) / self.std)  # logit s = log tan t

    def quantile(self, share: Tensor) -> Tensor:
        return from_flow_time(torch.sigmoid(self.mean + self.std * torch.special.ndtri(share)))


def shifted(s: Tensor, shift: float) -> Tensor:
    """Rectified-flow times nearer to noise: k s / (1 + (k - 1) s), k the shift (SD3, arXiv 2403.03206, equation 23)."""
    return shift * s / (1 + (shift - 1) * s)


def equal_steps(steps: int, shift: float = 1.0) -> Tensor:
    """s [steps + 1], rising from 0 to 1: equal steps of rectified-flow time, shifted; float64."""
    return shifted(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift)


def from_flow_time(s: Tensor) -> Tensor:
    """Rectified-flow time s in [0, 1] -> TrigFlow t with the same noise-to-signal ratio, s / (1 - s)."""
    return torch.atan2(s, 1 - s)


def flow_time(t: Tensor) -> Tensor:
    """The inverse of `from_flow_time`: s = sin(t) / (sin(t) + cos(t))."""
    return t.sin() / (t.sin() + t.cos())
