"""sCM: the continuous-time consistency loss (Lu & Song 2024), as rCM uses it (arXiv 2510.08431).

The consistency function f(x_t, t) = cos(t) x_t - sin(t) F(x_t, t) should not change along the teacher's
trajectory dx_t/dt = F_T(x_t, t):

    0 = df/dt = -cos(t) (F - F_T) - sin(t) (x_t + dF/dt),   dF/dt = (dF/dx) F_T + (partial dF/dt)

The loss moves F by g = cos(t) df/dt. Its F_dot = cos(t) sin(t) dF/dt comes from the tangents
cos(t) sin(t) F_T of x and cos(t) sin(t) of t.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random, noise_like
from jvpgraph.trainer.objectives.objective import Objective, Shared, Terms, objective
from jvpgraph.trainer.objectives.simulation import Samples, Simulation
from jvpgraph.trainer.ranges import not_negative, positive
from jvpgraph.trainer.times import LogNormal, Times
from jvpgraph.trainer.trigflow import add_noise, along_trajectory, clean_image, expand_like


@dataclass(frozen=True)
class SCM(Objective):
    """Continuous-time consistency."""

    name: ClassVar[str] = "scm"
    times: Times = field(default_factory=LogNormal)  # p_G
    tangent_warmup: int = 0  # student updates until r = 1; 0: none, which the rCM paper finds enough
    tangent_floor: float = 0.1  # c in g / (||g|| + c); sCM

    def __post_init__(self) -> None:
        not_negative(self, "tangent_warmup")
        positive(self, "tangent_floor")

    @property
    def simulation(self) -> Simulation:
        return Simulation(self.times, steps=1, rollout="once")


def tangent_target(F: Tensor, F_dot: Tensor, F_teacher: Tensor, x: Tensor, t: Tensor, r: float) -> Tensor:
    """g = -cos^2(t) (F - F_T) - r (cos(t) sin(t) x_t + F_dot); latents [B, ...], t [B] in radians."""
    cos, sin = expand_like(t.cos(), x), expand_like(t.sin(), x)
    return -(cos**2) * (F - F_teacher) - r * (cos * sin * x + F_dot)


@objective
def scm_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: SCM,
    *,
    iteration: int,
    shared: Shared | None = None,
) -> Terms:
    """Sum over the latent of (F - F_sg - g)^2, float64.

    Args:
        student: the dual of a TrigFlow model; one call gives F with its autograd history and F_dot.
        teacher: gives the velocity F_T, guidance included.
        batch: real latents and their conditions.
        rng: times and noise.
        iteration: of the student, from 1; what the tangent's warm-up goes by.
        shared: where other terms find the clean images that F implies.
    """
    x0 = batch.x0.double()
    t = config.times.draw(len(batch), rng)
    x = add_noise(x0, noise_like(x0, rng), t)
    with torch.no_grad():
        F_teacher = teacher(x, t, batch.cond)

    F, F_dot = student(x, t, batch.cond, tangents=along_trajectory(x, t, F_teacher))
    if shared is not None:
        shared[config.simulation] = Samples(clean_image(F, x, t), t)

    r = min(1.0, iteration / config.tangent_warmup) if config.tangent_warmup else 1.0
    g = tangent_target(F.detach(), F_dot, F_teacher, x, t, r)
    norm = g.flatten(1).norm(dim=1)
    g = g / expand_like(norm + config.tangent_floor, g)
    loss = (F - F.detach() - g).square().flatten(1).sum(1)
    return {"loss": loss, "target_norm": norm, "tangent_norm": F_dot.flatten(1).norm(dim=1)}
