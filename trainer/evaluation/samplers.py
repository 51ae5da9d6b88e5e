"""Samplers: the teacher's Euler steps, the student's few consistency or average-velocity steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import SamplingConfig
from jvpgraph.trainer.noise import noise_like
from jvpgraph.trainer.objectives.dcm import euler_step
from jvpgraph.trainer.objectives.mean_flow import to_flow
from jvpgraph.trainer.times import equal_steps, from_flow_time
from jvpgraph.trainer.trigflow import add_noise, clean_image, expand_like

Sampler = Callable[[Batch, torch.Generator], Tensor]
"""(batch, rng) -> latents of the shape of batch.x0, made for its conditions; its latents are not looked at."""


def sampler_of(kind: str, model: nn.Module, steps: int, config: SamplingConfig) -> Sampler:
    """`kind`: consistency, mean_flow or flow, as an objective's `sampler` says."""

    def sample(batch: Batch, rng: torch.Generator) -> Tensor:
        if kind == "consistency":
            return sample_consistency(model, batch, few_step_times(steps, config), rng)
        grid = euler_grid(steps, config.shift)
        if kind == "mean_flow":
            return sample_mean_flow(model, batch, grid, rng)
        return sample_euler(model, batch, grid, rng)

    return sample


def draw(sample: Sampler, batch: Batch, size: int, seed: int) -> Tensor:
    """Latents for all conditions of a batch, `size` at a time, from one stream of noise."""
    rng = torch.Generator(batch.x0.device).manual_seed(seed)
    return torch.cat([sample(part, rng) for part in batch.split(size)])


def few_step_times(steps: int, config: SamplingConfig) -> list[float]:
    """Radians, falling: atan(sigma_max), then the first `steps - 1` middle times."""
    if not 1 <= steps <= 1 + len(config.middle_times):
        raise ValueError(
            f"{steps} steps need {steps - 1} middle times, and sampling.middle_times has {len(config.middle_times)}: "
            f"{config.middle_times}. Add some, or sample in 1 to {1 + len(config.middle_times)} steps."
        )
    return [math.atan(config.sigma_max), *config.middle_times[: steps - 1]]


def euler_grid(steps: int, shift: float = 1.0) -> Tensor:
    """t [steps + 1] radians, falling from pi/2 to 0: equal steps of rectified-flow time, shifted."""
    return from_flow_time(equal_steps(steps, shift).flip(0))


@torch.no_grad()
def sample_euler(teacher: nn.Module, batch: Batch, grid: Tensor, rng: torch.Generator) -> Tensor:
    """The probability flow from noise to data, one Euler step of rectified flow per interval of `grid`."""
    x = noise_like(batch.x0, rng)
    for t, t_next in pairwise(grid.to(x.device)[:, None].expand(-1, len(batch))):
        x = euler_step(teacher(x, t, batch.cond), x, t, t_next)
    return x


@torch.no_grad()
def sample_consistency(student: nn.Module, batch: Batch, times: Sequence[float], rng: torch.Generator) -> Tensor:
    """x0 = f(x_t, t) at each time, fresh noise in between; one evaluation per step."""
    x0 = torch.zeros_like(batch.x0, dtype=torch.float64)
    for time in times:
        t = torch.full((len(batch),), time, dtype=torch.float64, device=x0.device)
        x = add_noise(x0, noise_like(x0, rng), t)
        x0 = clean_image(student(x, t, batch.cond), x, t)
    return x0


@torch.no_grad()
def sample_mean_flow(student: nn.Module, batch: Batch, grid: Tensor, rng: torch.Generator) -> Tensor:
    """z_r = z_s - (s - r) u(z_s, r, s) over the intervals of `grid`, in rectified-flow coordinates."""
    z = noise_like(batch.x0, rng)
    for t, r in pairwise(grid.to(z.device)[:, None].expand(-1, len(batch))):
        k, k_r = (expand_like(angle.cos() + angle.sin(), z) for angle in (t, r))
        _, u = to_flow(k * z, student(k * z, t, batch.cond, r), t)
        s, s_r = expand_like(t.sin(), z) / k, expand_like(r.sin(), z) / k_r
        z = z - (s - s_r) * u
    return z
