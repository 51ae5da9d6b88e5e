"""MeanFlow: the average velocity over an interval (Geng et al. 2025), learned from a teacher.

On the straight path z_s = (1 - s) x0 + s eps the average velocity between r and s satisfies

    u(z_s, r, s) = v(z_s, s) - (s - r) du/ds,   du/ds = (du/dz) v + (partial du/ds)

(equation 6). With r = s it is the velocity itself; with r = 0, z_s - s u is the clean image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random, noise_like, uniform
from jvpgraph.trainer.objectives.objective import Objective, Terms, objective
from jvpgraph.trainer.ranges import not_negative, positive
from jvpgraph.trainer.times import LogitNormal, Times, flow_time
from jvpgraph.trainer.trigflow import expand_like


@dataclass(frozen=True)
class MeanFlow(Objective):
    """Average velocity; needs a network that takes a second time."""

    name: ClassVar[str] = "mean_flow"
    sampler: ClassVar[str] = "mean_flow"
    second_time: ClassVar[bool] = True
    knows_second_time: ClassVar[bool] = True
    times: Times = field(default_factory=lambda: LogitNormal(mean=-0.4))  # of both ends; the paper's table 1
    instant_share: float = 0.75  # samples with r = s, plain flow matching; the paper's table 1
    power: float = 1.0  # p of the weight 1 / (||error||^2 + c)^p; the paper's table 1
    floor: float = 1e-3  # c of the weight; the paper

    def __post_init__(self) -> None:
        not_negative(self, "power")
        positive(self, "floor")
        if not 0 <= self.instant_share <= 1:
            raise ValueError(f"instant_share is {self.instant_share} and must be in [0, 1]")


def to_flow(x: Tensor, F: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """TrigFlow -> rectified flow: z = x / k and u = eps - x0 = a x + k F; k = cos t + sin t, a = sin t - cos t."""
    cos, sin = expand_like(t.cos(), x), expand_like(t.sin(), x)
    return x / (cos + sin), (sin - cos) * x + (cos + sin) * F


@objective
def mean_flow_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: MeanFlow,
) -> Terms:
    """error / sg(error + c)^p, error = sum over the latent of (u - u_target)^2, float64.

    The network is differentiated in TrigFlow coordinates, where x = k z and u = a x + k F with k = cos t + sin t and
    a = sin t - cos t. Along the trajectory dz/ds = v, dt/ds = k^2, dk/dt = -a and da/dt = k.

    Args:
        student: the dual of a TrigFlow model whose network takes a second time.
        teacher: gives the velocity, guidance included.
        batch: real latents and their conditions.
        rng: times and noise.
    """
    t, r = ordered_times(len(batch), config, rng)
    s, s_r = flow_time(t), flow_time(r)
    x0 = batch.x0.double()
    z = torch.lerp(x0, noise_like(x0, rng), expand_like(s, x0))
    k, a = expand_like(t.cos() + t.sin(), z), expand_like(t.sin() - t.cos(), z)
    x = k * z
    with torch.no_grad():
        _, v = to_flow(x, teacher(x, t, batch.cond), t)

    t_dot = k**2
    k_dot, a_dot = -a * t_dot, k * t_dot
    x_dot = k_dot * z + k * v
    F, F_dot = student(x, t, batch.cond, r, tangents={"x": x_dot, "t": t_dot.flatten()})
    u = a * x + k * F
    u_dot = a_dot * x + a * x_dot + k_dot * F.detach() + k * F_dot

    target = v - expand_like(s - s_r, z) * u_dot
    error = (u - target).square().flatten(1).sum(1)
    weight = (error.detach() + config.floor) ** -config.power
    return {"loss": weight * error, "error": error.detach(), "tangent_norm": u_dot.flatten(1).norm(dim=1)}


def ordered_times(size: int, config: MeanFlow, rng: Random) -> tuple[Tensor, Tensor]:
    """t >= r, both [B] radians; equal for a share of the samples."""
    first, second = config.times.draw(size, rng), config.times.draw(size, rng)
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    instant = uniform(size, rng, torch.float32) < config.instant_share
    return t, torch.where(instant, t, r)
