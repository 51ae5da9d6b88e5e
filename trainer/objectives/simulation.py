"""Samples of the student as it is going to be used, from noise to data in a few steps: what dmd and critics look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random, noise_like
from jvpgraph.trainer.objectives.dcm import euler_step
from jvpgraph.trainer.objectives.objective import Shared
from jvpgraph.trainer.ranges import positive
from jvpgraph.trainer.times import ShiftedUniform, Times, flow_time, from_flow_time
from jvpgraph.trainer.trigflow import HALF_PI, add_noise, clean_image, expand_like

Rollout = Literal["renoise", "jumps", "once"]


@dataclass(frozen=True)
class Simulation:
    """Backward simulation, from noise to data in 1 to `steps` steps in turn."""

    times: Times = field(default_factory=ShiftedUniform)  # between the steps, where they are not fixed
    steps: int = 4  # cycles through 1..steps; rCM
    fixed_times: tuple[float, ...] = ()  # between the steps: radians that fall; n steps use the first n - 1
    rollout: Rollout = "renoise"  # clean image and noise in turn; jumps of two-time networks; once from noisy latents
    start: float = HALF_PI  # radians; below pi/2 from real latents with noise
    end: float = 0.0  # radians; above 0 the samples are x_end
    earlier: Path | None = None  # folder of the run of the phase before, whose student makes x_start instead

    def __post_init__(self) -> None:
        positive(self, "steps")
        if not 0 <= self.end < self.start <= HALF_PI:
            raise ValueError(f"start is {self.start:.6g} and end {self.end:.6g}: radians, 0 <= end < start <= pi/2")
        if self.earlier is not None and self.start == HALF_PI:
            raise ValueError("earlier is a run of the phase before, and start is pi/2, before which there is none")
        if not self.fixed_times:
            return
        if not all(earlier > later for earlier, later in pairwise((self.start, *self.fixed_times, self.end))):
            raise ValueError(
                f"fixed_times are {list(self.fixed_times)}: radians that fall, below {self.start:.6g} and above "
                f"{self.end:.6g}"
            )
        if len(self.fixed_times) < self.steps - 1:
            raise ValueError(
                f"fixed_times are {len(self.fixed_times)}, and {self.steps} steps have {self.steps - 1} times between "
                "them: give more times, or fewer steps"
            )

    @property
    def sampler(self) -> str:
        return "mean_flow" if self.rollout == "jumps" else "consistency"

    @property
    def needs_data(self) -> bool:
        return (self.start < HALF_PI and self.earlier is None) or self.rollout == "once"

    def steps_at(self, count: int) -> int:
        """Steps of the count-th update: 1..steps in turn."""
        return 1 + count % self.steps

    def time_after(self, index: int, t: Tensor, rng: Random) -> Tensor:
        """[B] radians, where the step from t that is number `index` from 0 ends, if it is not the last."""
        if self.fixed_times:
            return torch.full_like(t, self.fixed_times[index])
        return torch.minimum(draw_between(self.end, None, self.times, len(t), rng), t)


class Samples(NamedTuple):
    """Of the student, float64, with the gradient of their last step."""

    x: Tensor  # [B, ...], x_end: x0 where that is 0
    t: Tensor  # [B] radians, where the last step began


Earlier = Callable[[Batch, Random], Tensor]
"""(batch, rng) -> x_start [B, ...], which the expert of the phase before makes; conditions and shape of the batch."""


def simulate_backward(
    student: nn.Module,
    batch: Batch,
    steps: int,
    rng: Random,
    simulation: Simulation,
    earlier: Earlier | None = None,
) -> Samples:
    """Student samples from pure noise in `steps` steps at falling times.

    Only the last step has a gradient. Conditions and shape are those of `batch`; so are, if `start` is below pi/2, the
    latents that it starts from, unless the expert of an earlier phase makes them. With rollout `once` that is all: one
    step from each, with the noise of `times`.
    """
    if simulation.rollout == "once":
        t = simulation.times.draw(len(batch), rng)
        x = add_noise(batch.x0.double(), noise_like(batch.x0, rng), t)
        return Samples(clean_image(student(x, t, batch.cond), x, t), t)
    x = noise_like(batch.x0, rng) if earlier is None else earlier(batch, rng)
    t = torch.full((len(batch),), simulation.start, dtype=torch.float64, device=x.device)
    end = torch.full_like(t, simulation.end)
    if simulation.start < HALF_PI and earlier is None:
        x = add_noise(batch.x0.double(), x, t)

    def step(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        if simulation.rollout == "jumps":
            return euler_step(student(x, t, batch.cond, r), x, t, r)
        x0 = clean_image(student(x, t, batch.cond), x, t)
        return x0 if r is end and not simulation.end else add_noise(x0, noise_like(x0, rng), r)

    with torch.no_grad():
        for index in range(steps - 1):
            r = simulation.time_after(index, t, rng)
            x, t = step(x, t, r), r
    return Samples(step(x, t, end), t)


def samples_of(
    student: nn.Module,
    batch: Batch,
    rng: Random,
    simulation: Simulation,
    count: int,
    shared: Shared | None,
    earlier: Earlier | None = None,
) -> Samples:
    """`simulate_backward` of the count-th update, once for all terms that share what they make."""
    shared = {} if shared is None else shared
    if simulation not in shared:
        steps = simulation.steps_at(count)
        earlier = None if simulation.earlier is None else earlier
        shared[simulation] = simulate_backward(student, batch, steps, rng, simulation, earlier)
    found: Samples = shared[simulation]
    return found


def draw_between(low: float, high: Tensor | None, times: Times, size: int, rng: Random) -> Tensor:
    """t [size] radians: rectified-flow times of the distribution, squeezed between two times; None: pi/2."""
    t = times.draw(size, rng)
    if not low and high is None:
        return t
    first = flow_time(torch.full_like(t, low))
    last = torch.ones_like(t) if high is None else flow_time(high)
    return from_flow_time(first + (last - first) * flow_time(t))


def noise_from(x: Tensor, low: float, eps: Tensor, t: Tensor) -> Tensor:
    """x_low -> x_t, t [B] radians from `low` on: a x_low + b eps with the noise that is still missing; x, eps [B, ...].

    x_t = cos(t) x0 + sin(t) eps has a = cos(t) / cos(low) and b^2 = sin^2(t) - a^2 sin^2(low).
    """
    if not low:
        return add_noise(x, eps, t)
    a, b = missing_noise(low, t)
    return expand_like(a, x) * x + expand_like(b, x) * eps


def missing_noise(low: float, t: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of `noise_from`, [B]."""
    first = torch.full_like(t, low)
    a = t.cos() / first.cos()
    return a, (t.sin().square() - (a * first.sin()).square()).clamp(min=0).sqrt()
