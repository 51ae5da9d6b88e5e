"""sCM: the continuous-time consistency loss (Lu & Song 2024), as rCM uses it (arXiv 2510.08431).

The consistency function f(x_t, t) = cos(t) x_t - sin(t) F(x_t, t) should not change along the teacher's
trajectory dx_t/dt = F_T(x_t, t):

    0 = df/dt = -cos(t) (F - F_T) - sin(t) (x_t + dF/dt),   dF/dt = (dF/dx) F_T + (partial dF/dt)

The loss moves F by g = cos(t) df/dt. Its F_dot = cos(t) sin(t) dF/dt comes from the tangents
cos(t) sin(t) F_T of x and cos(t) sin(t) of t.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random, noise_like
from jvpgraph.trainer.objectives.objective import Objective, Terms, objective
from jvpgraph.trainer.ranges import not_negative, positive
from jvpgraph.trainer.times import LogNormal, Times
from jvpgraph.trainer.trigflow import add_noise, along_trajectory, expand_like


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
) -> Terms:
    """Sum over the latent of (F - F_sg - g)^2, float64.

    Args:
        student: the dual of a TrigFlow model; one call gives F with its autograd history and F_dot.
        teacher: gives the velocity F_T, guidance included.
        batch: real latents and their conditions.
        rng: times and noise.
        iteration: of the student, from 1; what the tangent's warm-up goes by.
    """
    x0 = batch.x0.double()
    t = config.times.draw(len(batch), rng)
    x = add_noise(x0, noise_like(x0, rng), t)
    with torch.no_grad():
        F_teacher = teacher(x, t, batch.cond)

    F, F_dot = student(x, t, batch.cond, tangents=along_trajectory(x, t, F_teacher))

    return moved(F, F_dot, tangent_target(F.detach(), F_dot, F_teacher, x, t, warmed(config, iteration)), config)


class Tangent(Protocol):
    """What settings say of a target with a tangent in it."""

    @property
    def tangent_warmup(self) -> int: ...
    @property
    def tangent_floor(self) -> float: ...


def warmed(config: Tangent, iteration: int) -> float:
    """The share of the tangent that counts, rising to 1."""
    return min(1.0, iteration / config.tangent_warmup) if config.tangent_warmup else 1.0


def moved(F: Tensor, F_dot: Tensor, g: Tensor, config: Tangent) -> Terms:
    """The loss that moves F by g / (||g|| + c), and the norms of g and F_dot per sample."""
    norm = g.flatten(1).norm(dim=1)
    g = g / expand_like(norm + config.tangent_floor, g)
    loss = (F - F.detach() - g).square().flatten(1).sum(1)
    return {"loss": loss, "target_norm": norm, "tangent_norm": F_dot.flatten(1).norm(dim=1)}
