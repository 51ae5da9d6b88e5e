"""dCM: discrete consistency distillation (Song et al. 2023), in TrigFlow coordinates.

Two neighbours on the teacher's trajectory should have the same clean image. The nearer one is a step of the teacher
away from the farther one, and the student's answer there is the target. With segments it is the same place at the
lower end of their segment that they should have (multistep consistency models, Heek et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.noise import Random, integers, noise_like, uniform
from jvpgraph.trainer.objectives.objective import Objective, Terms, listed, objective
from jvpgraph.trainer.ranges import not_negative, positive
from jvpgraph.trainer.times import Ranges, equal_steps, flow_time, from_flow_time, shifted
from jvpgraph.trainer.trigflow import add_noise, clean_image, expand_like


@dataclass(frozen=True)
class DCM(Objective):
    """Discrete-time consistency."""

    name: ClassVar[str] = "dcm"
    takes_tangent: ClassVar[bool] = False
    teacher_steps: int = 48  # steps from noise to data; rCM's code
    shift: float = 1.0  # of the grid in rectified-flow time, k s / (1 + (k - 1) s); 5 for Wan
    substeps: int = 1  # Euler steps of the teacher in each; SCott: 3
    jitter: bool = False  # draw t between the points of the grid, too, and its neighbour a step below; rCM's code
    noise: float = 0.0  # share of a step's noise that is fresh: 0 is the ODE, 1 DDPM's chain (SCott)
    target: Literal["student", "ema"] = "student"  # whose answer; ema: of the first width in ema.sigma_rel (LCM)
    huber: float | None = None  # c of sqrt(|d|^2 + c^2) - c instead of |d|^2; iCT: 0.00054 sqrt(numbers of a latent)
    segments: int = 1  # parts of the grid, each with a clean end of its own; then sampled by as many Euler steps

    def __post_init__(self) -> None:
        positive(self, "teacher_steps", "shift", "substeps", "huber", "segments")
        not_negative(self, "noise")
        if self.noise > 1:
            raise ValueError(f"noise is {self.noise} and must be in [0, 1]")
        if self.teacher_steps % self.segments:
            raise ValueError(
                f"teacher_steps is {self.teacher_steps} and must be a multiple of segments, {self.segments}"
            )

    @property
    def sampler(self) -> str:  # type: ignore[override]
        return "flow" if self.segments > 1 else "consistency"

    @property
    def asked(self) -> Ranges:
        if self.jitter:
            return ((0.0, 1.0),)
        grid = equal_steps(self.teacher_steps, self.shift).tolist()
        parts = [index / self.substeps for index in range(self.substeps)]
        return tuple((t + (below - t) * part,) * 2 for below, t in pairwise(grid) for part in parts)

    def check_sampling(self, steps: Collection[int], shift: float, gamma: float = 0.0) -> None:
        if self.segments > 1 and (set(steps) != {self.segments} or shift != self.shift):
            raise ValueError(
                f"dcm with {self.segments} segments is sampled in {self.segments} steps, from end to end, with shift "
                f"{self.shift:g}; not in {listed(steps)} with shift {shift:g}: set sampling.steps to "
                f"[{self.segments}] and sampling.shift to {self.shift:g}"
            )

    def grid(self, device: torch.device) -> Tensor:
        """t [teacher_steps + 1] radians, rising from 0 to pi/2."""
        return from_flow_time(equal_steps(self.teacher_steps, self.shift).to(device))

    def at(self, place: Tensor) -> Tensor:
        """Radians of places on the grid in [0, 1]."""
        return from_flow_time(shifted(place, self.shift))

    def draw(self, size: int, rng: Random) -> tuple[Tensor, Tensor, Tensor]:
        """t, its neighbour below, and the end of their segment, each [B] radians."""
        index = integers(1, self.teacher_steps + 1, size, rng)
        length = self.teacher_steps // self.segments
        end = self.at(((index - 1) // length * length).double() / self.teacher_steps)
        if not self.jitter:
            grid = self.grid(rng.device)
            return grid[index], grid[index - 1], end
        place = (index - uniform(size, rng)) / self.teacher_steps
        below = self.at((place - 1 / self.teacher_steps).clamp(min=0))
        return self.at(place), torch.maximum(below, end), end


def euler_step(F: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """x_t -> x_t_next with the clean image and the noise that F implies, both held.

    cos(t') (cos(t) x - sin(t) F) + sin(t') (sin(t) x + cos(t) F) is a rotation by t' - t. It is DDIM's step, and
    an Euler step of rectified flow in its own coordinates.
    """
    angle = t_next - t
    return expand_like(angle.cos(), x) * x + expand_like(angle.sin(), x) * F


@objective
def dcm_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: DCM,
    *,
    averaged: Callable[[], AbstractContextManager[None]] | None = None,
) -> Terms:
    """Sum over the latent of (f(x_t, t) - sg f(x_t', t'))^2, float64; t and t' neighbours on the grid.

    Args:
        student: a TrigFlow model or its dual.
        teacher: makes the step from t to t', guidance included.
        batch: real latents and their conditions.
        rng: times and noise.
        averaged: while its context is entered, the student has its average's weights.
    """
    t, t_next, end = config.draw(len(batch), rng)
    x0 = batch.x0.double()
    x = add_noise(x0, noise_like(x0, rng), t)
    with torch.no_grad():
        x_next = teacher_step(teacher, x, t, t_next, batch.cond, rng, config)
        if config.target == "ema":
            assert averaged is not None, "dcm with target: ema needs the average"
            with averaged():
                F_next = student(x_next, t_next, batch.cond)
        else:
            F_next = student(x_next, t_next, batch.cond)
        target = euler_step(F_next, x_next, t_next, end)
    f = euler_step(student(x, t, batch.cond), x, t, end)
    squares = (f - target).square().flatten(1).sum(1)
    if config.huber is None:
        return {"loss": squares}
    return {"loss": (squares + config.huber**2).sqrt() - config.huber, "error": squares.detach()}


def teacher_step(
    teacher: nn.Module, x: Tensor, t: Tensor, t_next: Tensor, cond: Condition, rng: Random, config: DCM
) -> Tensor:
    """x_t -> x_t_next in `substeps` steps of the teacher."""

    def stochastic(F: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return stochastic_step(F, x, t, t_next, noise_like(x, rng), config.noise)

    return walked(teacher, x, t, t_next, cond, config.substeps, stochastic if config.noise else euler_step)


Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(F, x_t, t, t') -> x_t'."""


def walked(
    teacher: nn.Module, x: Tensor, t: Tensor, t_next: Tensor, cond: Condition, steps: int, step: Step = euler_step
) -> Tensor:
    """x_t -> x_t_next along the teacher's trajectory, in steps that are even in rectified-flow time; times [B]."""
    s, s_next, now = flow_time(t), flow_time(t_next), t
    for index in range(1, steps + 1):
        following = from_flow_time(torch.lerp(s, s_next, index / steps)) if index < steps else t_next
        x, now = step(teacher(x, now, cond), x, now, following), following
    return x


def stochastic_step(F: Tensor, x: Tensor, t: Tensor, t_next: Tensor, noise: Tensor, share: float) -> Tensor:
    """x_t_next = cos(t') x0 + sqrt(sin^2(t') - w^2) eps + w noise: DDIM's step with eta = share (Song et al. 2021).

    x0 and eps are what F implies. w is share times the deviation of x_t_next given x_t and x0 in DDPM's chain, so that
    x_t_next given x0 is distributed as noised data whatever the share.
    """
    eps = expand_like(t.sin(), x) * x + expand_like(t.cos(), x) * F
    # sin(t') / sin(t) sqrt(1 - cos^2(t) / cos^2(t')) with cos(t) <= cos(t')
    ratio = (t.cos() / t_next.cos()).clamp(max=1)
    w = share * t_next.sin() / t.sin() * (1 - ratio**2).sqrt()
    kept = (t_next.sin() ** 2 - w**2).clamp(min=0).sqrt()
    x0 = clean_image(F, x, t)
    return expand_like(t_next.cos(), x) * x0 + expand_like(kept, x) * eps + expand_like(w, x) * noise
