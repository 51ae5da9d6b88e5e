"""A world whose answers are known: data ~ N(0, STD^2), its flow, its consistency function, its average velocity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.trigflow import expand_like

STD = 0.5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(size: int, rng: torch.Generator) -> Tensor:
    return torch.randn(size, 1, 4, 4, generator=rng, dtype=torch.float64)


def gaussian_batch(size: int, rng: torch.Generator, std: float = STD) -> Batch:
    return Batch(std * images(size, rng), {})


def variance(t: Tensor, std: float = STD) -> Tensor:
    """Of x_t: std^2 cos^2(t) + sin^2(t)."""
    return std**2 * t.cos() ** 2 + t.sin() ** 2


class GaussianFlow(nn.Module):
    """E[v | x_t] = x_t V'(t) / (2 V(t)), the velocity of the probability flow; it scales x_t like sqrt(V)."""

    def __init__(self, std: float = STD) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return x * expand_like((1 - self.std**2) * t.sin() * t.cos() / variance(t, self.std), x)


class GaussianConsistency(nn.Module):
    """The F of the exact consistency function f(x_t, t) = STD x_t / sqrt(V(t)); at t = 0 its limit, 0."""

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        at_zero = t == 0
        factor = (t.cos() - STD / variance(t).sqrt()) / torch.where(at_zero, 1, t.sin())
        return x * expand_like(torch.where(at_zero, 0, factor), x)


class GaussianAverage(nn.Module):
    """The F whose rectified-flow velocity is the average over [r, t], (z_s - z_r) / (s - r); with r = t the flow.

    z_s = x_t / (cos(t) + sin(t)) scales like sqrt(V(t)) / (cos(t) + sin(t)) along the flow.
    """

    def forward(self, x: Tensor, t: Tensor, cond: Condition, r: Tensor) -> Tensor:
        k, k_r = t.cos() + t.sin(), r.cos() + r.sin()
        s, s_r = t.sin() / k, r.sin() / k_r
        ratio = (variance(r) / variance(t)).sqrt() * k / k_r
        same = t == r
        average = (1 - ratio) / k / torch.where(same, 1, s - s_r)
        instant = (1 - STD**2) * t.sin() * t.cos() / variance(t) * k + (t.sin() - t.cos())
        u = x * expand_like(torch.where(same, instant, average), x)
        return (u - expand_like(t.sin() - t.cos(), x) * x) / expand_like(k, x)


class ExactDual(nn.Module):
    """F and F_dot of a small model by torch.func.jvp: a reference for the library's dual."""

    def __init__(self, model: nn.Module, differentiable_tangent: bool = False) -> None:
        super().__init__()
        self.model = model
        self.differentiable_tangent = differentiable_tangent

    def forward(self, x: Tensor, t: Tensor, cond: Condition, *r: Tensor, tangents: dict[str, Tensor] | None = None):
        if tangents is None:
            return self.model(x, t, cond, *r)
        primals = dict(zip(("x", "t", "r"), (x, t, *r)))
        dots = tuple(tangents.get(name, torch.zeros_like(value)) for name, value in primals.items())
        F, F_dot = torch.func.jvp(lambda x, t, *r: self.model(x, t, cond, *r), tuple(primals.values()), dots)
        return F, F_dot if self.differentiable_tangent else F_dot.detach()


class Constant(nn.Module):
    """A velocity that implies the clean image `x0` from everywhere: F = (cos(t) x_t - x0) / sin(t)."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = nn.Parameter(x0)
        self.had_gradient: list[bool] = []

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.had_gradient.append(torch.is_grad_enabled())
        return (expand_like(t.cos(), x) * x - self.x0) / expand_like(t.sin(), x)


class Shifted(nn.Module):
    """A model plus a parameter of the batch's shape, whose gradient is d loss / d F."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model = model
        self.shift = nn.Parameter(torch.zeros(size, 1, 4, 4, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, *rest: object) -> Tensor:
        return self.model(x, t, *rest) + self.shift
