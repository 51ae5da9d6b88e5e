"""sCM: the continuous-time consistency loss (Lu & Song 2024), as rCM uses it (arXiv 2510.08431).

The consistency function f(x_t, t) = cos(t) x_t - sin(t) F(x_t, t) should not change along the teacher's
trajectory dx_t/dt = F_T(x_t, t):

    0 = df/dt = -cos(t) (F - F_T) - sin(t) (x_t + dF/dt),   dF/dt = (dF/dx) F_T + (partial dF/dt)

The loss moves F by g = cos(t) df/dt. Its F_dot = cos(t) sin(t) dF/dt comes from the tangents
cos(t) sin(t) F_T of x and cos(t) sin(t) of t. In rectified flow's coordinates it is u = eps - x0 that is moved, by
df/ds = (cos(t) + sin(t))^2 df/dt: the same zero, and another weight of the times.

While the tangent warms up, `tangent_target` is sCM's. rCM's algorithm 1 has cos(t) sqrt(1 - r^2 sin^2(t)) in the place
of the first cos^2(t), which is the same at r = 1, and its authors find the warm-up not essential.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random, noise_like
from jvpgraph.trainer.objectives.dcm import walked
from jvpgraph.trainer.objectives.mean_flow import to_flow
from jvpgraph.trainer.objectives.objective import Objective, Shared, Terms, objective
from jvpgraph.trainer.objectives.simulation import Samples, Simulation
from jvpgraph.trainer.ranges import not_negative, positive
from jvpgraph.trainer.times import LogNormal, Ranges, Times
from jvpgraph.trainer.trigflow import HALF_PI, add_noise, clean_image, expand_like, velocity_of


@dataclass(frozen=True)
class SCM(Objective):
    """Continuous-time consistency."""

    name: ClassVar[str] = "scm"
    trains_plainly: ClassVar[bool] = False
    times: Times = field(default_factory=LogNormal)  # p_G
    tangent_warmup: int = 0  # student updates until r = 1; 0: none, which the rCM paper finds enough
    tangent_floor: float = 0.1  # c in g / (||g|| + c); sCM
    coordinates: Literal["trigflow", "rf"] = "trigflow"  # what is moved, and measured: F, or eps - x0
    velocity: Literal["teacher", "data"] = "teacher"  # data: no teacher, cos(t) eps - sin(t) x0 (sCT)
    points: Literal["data", "trajectory"] = "data"  # x_t: noised data, or the teacher's own from noise (TBCM)
    trajectory_steps: int = 8  # Euler steps of the teacher from noise to x_t, even in rectified-flow time

    def __post_init__(self) -> None:
        not_negative(self, "tangent_warmup")
        positive(self, "tangent_floor", "trajectory_steps")
        if self.span[1]:
            raise ValueError(
                "times.between begins above 0, and only at 0 is a consistency function tied to the data: begin it "
                "there. A student for high noise alone is trained by dmd, with `end`, or by flow_map"
            )
        if self.velocity == "data" and self.points == "trajectory":
            raise ValueError("velocity: data has none at points of the teacher's trajectory: set points to data")

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.points == "data"

    @property
    def asks_teacher(self) -> bool:
        return self.velocity == "teacher"

    @property
    def asked(self) -> Ranges:
        ((low, high),) = super().asked
        return ((low, high if self.points == "data" else 1.0),)

    @property
    def simulation(self) -> Simulation:
        return Simulation(self.times, steps=1, rollout="once")


def tangent_target(
    F: Tensor, F_dot: Tensor, F_teacher: Tensor, x: Tensor, t: Tensor, r: float, weight: Tensor | None = None
) -> Tensor:
    """g = -cos^2(t) (F - F_T) - r (cos(t) sin(t) x_t + F_dot); latents [B, ...], t [B] in radians.

    `weight` [B]: in the place of the first cos(t); F_dot then has weight sin(t) dF/dt.
    """
    cos, sin = expand_like(t.cos(), x), expand_like(t.sin(), x)
    w = cos if weight is None else expand_like(weight, x)
    return -(w * cos) * (F - F_teacher) - r * (w * sin * x + F_dot)


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
    eps = noise_like(x0, rng)
    if config.points == "data":
        x = add_noise(x0, eps, t)
    else:
        with torch.no_grad():
            x = walked(teacher, eps, torch.full_like(t, HALF_PI), t, batch.cond, config.trajectory_steps)
    if config.velocity == "data":
        velocity = velocity_of(x0, eps, t)
    else:
        with torch.no_grad():
            velocity = teacher(x, t, batch.cond)
    weight = t.cos() if config.coordinates == "trigflow" else (t.cos() + t.sin()) ** 2
    speed = weight * t.sin()

    F, F_dot = student(x, t, batch.cond, tangents={"x": expand_like(speed, x) * velocity, "t": speed})
    if shared is not None:
        shared[config.simulation] = Samples(clean_image(F, x, t), t)

    g = tangent_target(F.detach(), F_dot, velocity, x, t, warmed(config, iteration), weight)
    return moved(F if config.coordinates == "trigflow" else to_flow(x, F, t)[1], F_dot, g, config)


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
    """The loss that moves F by g / (||g|| + c), and the norms of g and F_dot per sample.

    Neither has a gradient, whatever the dual gives its tangents.
    """
    g, F_dot = g.detach(), F_dot.detach()
    norm = g.flatten(1).norm(dim=1)
    g = g / expand_like(norm + config.tangent_floor, g)
    loss = (F - F.detach() - g).square().flatten(1).sum(1)
    return {"loss": loss, "target_norm": norm, "tangent_norm": F_dot.flatten(1).norm(dim=1)}
