"""sCM: the continuous-time consistency loss (Lu & Song 2024), as rCM uses it (arXiv 2510.08431).

The consistency function f(x_t, t) = cos(t) x_t - sin(t) F(x_t, t) should not change along the teacher's
trajectory dx_t/dt = F_T(x_t, t):

    0 = df/dt = -cos(t) (F - F_T) - sin(t) (x_t + dF/dt),   dF/dt = (dF/dx) F_T + (partial dF/dt)

The loss moves F by g = cos(t) df/dt. Its F_dot = cos(t) sin(t) dF/dt comes from the tangents
cos(t) sin(t) F_T of x and cos(t) sin(t) of t.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jvpgraph.trainer.config import DistillConfig
from jvpgraph.trainer.data import Batch
from jvpgraph.trainer.trigflow import add_noise, expand_like


def draw_scm_times(size: int, config: DistillConfig, rng: torch.Generator) -> Tensor:
    """t [B] radians from p_G: tan(t) is log-normal."""
    normal = torch.randn(size, generator=rng, dtype=torch.float64)
    return (config.scm_log_sigma_mean + config.scm_log_sigma_std * normal).exp().atan()


def tangent_target(F: Tensor, F_dot: Tensor, F_teacher: Tensor, x: Tensor, t: Tensor, r: float) -> Tensor:
    """g = -cos^2(t) (F - F_T) - r (cos(t) sin(t) x_t + F_dot); images [B, ...], t [B] in radians."""
    cos, sin = expand_like(t.cos(), x), expand_like(t.sin(), x)
    return -(cos**2) * (F - F_teacher) - r * (cos * sin * x + F_dot)


def scm_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: torch.Generator,
    *,
    config: DistillConfig,
    warmup: float = 1.0,
) -> Tensor:
    """Mean over the batch of the sum over pixels of (F - F_sg - g)^2, float64.

    Args:
        student: the dual of a TrigFlow model; one call gives F with its autograd history and F_dot.
        teacher: gives the velocity F_T, guidance included.
        batch: real images and their labels.
        rng: times and noise.
        warmup: r, the share of the tangent that counts.
    """
    x0 = batch.x0.double()
    t = draw_scm_times(len(batch), config, rng)
    x = add_noise(x0, torch.randn(x0.shape, generator=rng, dtype=torch.float64), t)
    with torch.no_grad():
        F_teacher = teacher(x, t, batch.labels)

    speed = t.cos() * t.sin()
    tangents = {"x": expand_like(speed, x) * F_teacher, "t": speed}
    F, F_dot = student(x, t, batch.labels, tangents=tangents)

    g = tangent_target(F.detach(), F_dot, F_teacher, x, t, warmup)
    g = g / (expand_like(g.flatten(1).norm(dim=1), g) + config.tangent_floor)
    return (F - F.detach() - g).square().flatten(1).sum(1).mean()
