"""MeanFlow: the average velocity over an interval (Geng et al. 2025), of a teacher's flow or of the data's.

On the straight path z_s = (1 - s) x0 + s eps the average velocity between r and s satisfies

    u(z_s, r, s) = v(z_s, s) - (s - r) du/ds,   du/ds = (du/dz) v + (partial du/ds)

(equation 6). With r = s it is the velocity itself; with r = 0, z_s - s u is the clean image. A difference of two points
of the path in the place of the derivative is AlphaFlow (2025), which goes from flow matching to MeanFlow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.noise import Random, noise_like
from jvpgraph.trainer.objectives.objective import Terms, objective
from jvpgraph.trainer.objectives.two_times import TwoTimes, ordered_times
from jvpgraph.trainer.ranges import not_negative, positive
from jvpgraph.trainer.times import LogitNormal, Times, flow_time, from_flow_time
from jvpgraph.trainer.trigflow import Guided, expand_like

__all__ = ["Curriculum", "MeanFlow", "mean_flow_loss", "ordered_times", "to_flow"]


@dataclass(frozen=True)
class Curriculum:
    """alpha, the step of a difference as a share of the interval, falls to 0, the derivative (AlphaFlow)."""

    end: int  # student updates after which alpha is 0
    begin: int | None = None  # updates until it falls, by a sigmoid; null: all at once, at the end
    first: float = 1.0  # alpha until then; 1: flow matching along the interval, 0.5: a shortcut model
    sharpness: float = 25.0  # of the sigmoid; AlphaFlow
    floor: float = 5e-3  # alpha below it is 0, and above 1 - floor 1; AlphaFlow

    def __post_init__(self) -> None:
        positive(self, "end", "first", "sharpness", "floor")
        not_negative(self, "begin")
        if self.first > 1:
            raise ValueError(f"first is {self.first} and must be above 0, and at most 1")
        if self.begin is not None and self.begin >= self.end:
            raise ValueError(f"begin is {self.begin} and must be below end, {self.end}")

    def alpha(self, iteration: int) -> float:
        if self.begin is None or iteration > self.end:
            return self.first if iteration <= self.end else 0.0
        place = (iteration - self.begin) / (self.end - self.begin) - 0.5
        alpha = self.first / (1 + math.exp(self.sharpness * place))
        return 0.0 if alpha < self.floor else 1.0 if alpha > 1 - self.floor else alpha


@dataclass(frozen=True)
class MeanFlow(TwoTimes):
    """Average velocity; needs a network that takes a second time."""

    name: ClassVar[str] = "mean_flow"
    times: Times = field(default_factory=lambda: LogitNormal(mean=-0.4))  # of both ends; the paper's table 1
    instant_share: float = 0.75  # samples with r = s, plain flow matching; the paper's table 1
    clean_share: float = 0.0  # samples with r = 0; AnyFlow: 0.25 beside 0.5 with r = s
    power: float | None = None  # p of the weight 1 / (||error||^2 + c)^p; null: 0.5, of data 1 as in the paper
    floor: float = 1e-3  # c of the weight; the paper
    discrete: Curriculum | None = None  # differences first, as AlphaFlow; null: the derivative from the start
    velocity: Literal["teacher", "data"] = "teacher"  # data: no teacher, eps - x0, as in the paper
    own_direction: float = 0.0  # of data: share of u at r = s in the tangent's direction; improved MeanFlow: 1
    guidance: float = (
        1.0  # of data: omega of omega v + kappa u + (1 - omega - kappa) u_negative; appendix B of the paper
    )
    guidance_mix: float = 0.0  # of data: kappa; the scale of the guidance is omega / (1 - kappa)

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "power", "own_direction", "guidance_mix")
        positive(self, "floor", "guidance")
        if self.own_direction > 1 or self.guidance_mix >= 1:
            raise ValueError(
                f"own_direction is {self.own_direction} and guidance_mix {self.guidance_mix}: at most 1, and below 1"
            )
        if self.velocity == "teacher" and (self.own_direction, self.guidance, self.guidance_mix) != (0, 1, 0):
            raise ValueError(
                "own_direction, guidance and guidance_mix are of velocity: data. A teacher's velocity has no noise to "
                "take out, and its guidance is set under guidance"
            )

    @property
    def exponent(self) -> float:
        """`power`, or what suits the velocity.

        At r = s a student that begins as its teacher has next to no error: with 1 such samples would outweigh all,
        with 0.5 all gradients are of one length. The noise of the data's velocity leaves no error small.
        """
        return (0.5 if self.velocity == "teacher" else 1.0) if self.power is None else self.power

    @property
    def asks_teacher(self) -> bool:
        return self.velocity == "teacher"

    @property
    def trains_plainly(self) -> bool:  # type: ignore[override]
        return self.discrete is not None

    @property
    def waits(self) -> dict[str, int]:
        return {} if self.discrete is None else {"its derivative takes the place of differences": self.discrete.end}

    @property
    def guided(self) -> bool:
        return (self.guidance, self.guidance_mix) != (1, 0)

    @property
    def needs_negative(self) -> bool:  # type: ignore[override]
        return self.guided


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
    *,
    iteration: int = 1,
) -> Terms:
    """error / sg(error + c)^p, error = sum over the latent of (u - u_target)^2, float64.

    Args:
        student: the dual of a TrigFlow model whose network takes a second time.
        teacher: gives the velocity, guidance included; of one that is not asked, the negative condition.
        batch: latents and their conditions.
        rng: times and noise.
        iteration: of the student, from 1; what the curriculum goes by.
    """
    t, r = ordered_times(len(batch), config, rng)
    s, s_r = flow_time(t), flow_time(r)
    x0 = batch.x0.double()
    eps = noise_like(x0, rng)
    z = torch.lerp(x0, eps, expand_like(s, x0))
    v, direction = velocities(student, teacher, batch.cond, z, t, eps - x0, config)
    length = expand_like(s - s_r, z)
    alpha = 0.0 if config.discrete is None else config.discrete.alpha(iteration)
    if alpha:
        u = average_velocity(student, z, t, r, batch.cond)
        change = torch.zeros_like(u)
        if alpha < 1:
            with torch.no_grad():
                nearer = from_flow_time(s - alpha * (s - s_r))
                u_nearer = average_velocity(student, z - alpha * length * direction, nearer, r, batch.cond)
            change = (u.detach() - u_nearer) / alpha
        target = v - (1 - alpha) * change
    else:
        u, change = average_velocity_with_tangent(student, z, t, r, batch.cond, direction)
        target = v - length * change
    change, target = change.detach(), target.detach()  # whatever the dual gives its tangents
    error = (u - target).square().flatten(1).sum(1)
    weight = (error.detach() + config.floor) ** -config.exponent
    return {"loss": weight * error, "error": error.detach(), "tangent_norm": change.flatten(1).norm(dim=1)}


@torch.no_grad()
def velocities(
    student: nn.Module,
    teacher: nn.Module,
    cond: Condition,
    z: Tensor,
    t: Tensor,
    of_sample: Tensor,
    config: MeanFlow,
) -> tuple[Tensor, Tensor]:
    """The velocity that is learned, and the direction of the tangent; rectified-flow coordinates."""
    if config.velocity == "teacher":
        v = average_velocity(teacher, z, t, None, cond)
        return v, v
    v = of_sample
    own = average_velocity(student, z, t, t, cond) if config.own_direction or config.guidance_mix else v
    if config.guided:
        assert isinstance(teacher, Guided)
        negative = average_velocity(student, z, t, t, teacher.without_prompt(cond, len(z)))
        omega, kappa = config.guidance, config.guidance_mix
        v = omega * v + kappa * own + (1 - omega - kappa) * negative
    return v, torch.lerp(v, own, config.own_direction)


def average_velocity(model: nn.Module, z: Tensor, t: Tensor, r: Tensor | None, cond: Condition) -> Tensor:
    """u(z, r, s) of a TrigFlow model; without r, the velocity of a model with one time."""
    x = expand_like(t.cos() + t.sin(), z) * z
    F = model(x, t, cond) if r is None else model(x, t, cond, r)
    return to_flow(x, F, t)[1]


def average_velocity_with_tangent(
    student: nn.Module, z: Tensor, t: Tensor, r: Tensor, cond: Condition, v: Tensor
) -> tuple[Tensor, Tensor]:
    """u and du/ds along dz/ds = v, with r held.

    The network is differentiated in TrigFlow coordinates, where x = k z and u = a x + k F with k = cos t + sin t and
    a = sin t - cos t. Along the trajectory dt/ds = k^2, dk/dt = -a and da/dt = k.
    """
    k, a = expand_like(t.cos() + t.sin(), z), expand_like(t.sin() - t.cos(), z)
    x = k * z
    t_dot = k**2
    k_dot, a_dot = -a * t_dot, k * t_dot
    x_dot = k_dot * z + k * v
    F, F_dot = student(x, t, cond, r, tangents={"x": x_dot, "t": t_dot.flatten()})
    return a * x + k * F, a_dot * x + a * x_dot + k_dot * F.detach() + k * F_dot
