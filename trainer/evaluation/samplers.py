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
from jvpgraph.trainer.times import equal_steps, flow_time, from_flow_time, shifted
from jvpgraph.trainer.trigflow import HALF_PI, add_noise, clean_image, expand_like, level

Sampler = Callable[[Batch, torch.Generator], Tensor]
"""(batch, rng) -> latents of the shape of batch.x0, made for its conditions; its latents are not looked at."""


def sampler_of(kind: str, model: nn.Module, steps: int, config: SamplingConfig) -> Sampler:
    """`kind`: consistency, mean_flow or flow, as an objective's `sampler` says."""

    def sample(batch: Batch, rng: torch.Generator) -> Tensor:
        if kind == "consistency":
            return sample_consistency(model, batch, few_step_times(steps, config), rng)
        grid = euler_grid(steps, config.shift, config.start(kind))
        if kind == "mean_flow":
            return sample_mean_flow(model, batch, grid, rng, config.gamma)
        return sample_euler(model, batch, grid, rng)

    return sample


def draw(sample: Sampler, batch: Batch, size: int, seed: int) -> Tensor:
    """Latents for all conditions of a batch, `size` at a time, from one stream of noise."""
    rng = torch.Generator(batch.x0.device).manual_seed(seed)
    return torch.cat([sample(part, rng) for part in batch.split(size)])


def few_step_times(steps: int, config: SamplingConfig) -> list[float]:
    """Radians, falling: where samples begin, then the first `steps - 1` middle times."""
    if not 1 <= steps <= 1 + len(config.middle_times):
        raise ValueError(
            f"{steps} steps need {steps - 1} middle times, and sampling.middle_times has {len(config.middle_times)}: "
            f"{config.middle_times}. Add some, or sample in 1 to {1 + len(config.middle_times)} steps."
        )
    return [config.start("consistency"), *config.middle_times[: steps - 1]]


def euler_grid(steps: int, shift: float = 1.0, start: float = HALF_PI) -> Tensor:
    """t [steps + 1] radians, falling from `start` to 0: equal steps of rectified-flow time, shifted."""
    return from_flow_time(level(start) * equal_steps(steps, shift).flip(0))


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
def sample_mean_flow(
    student: nn.Module, batch: Batch, grid: Tensor, rng: torch.Generator, gamma: float = 0.0
) -> Tensor:
    """Jumps over the intervals of `grid`, from noise."""
    x = grid[0].sin().item() * noise_like(batch.x0, rng)
    for t, r in pairwise(grid.to(x.device)[:, None].expand(-1, len(batch))):
        x = jump(student, batch, x, t, r, rng, gamma)
    return x


def jump(
    student: nn.Module, batch: Batch, x: Tensor, t: Tensor, r: Tensor, rng: torch.Generator, gamma: float
) -> Tensor:
    """x_t -> x_r [B, ...], by an average velocity alone or, with gamma > 0, by gamma-sampling.

    That goes farther, to the noise-to-signal ratio sqrt(1 - gamma^2) tan(r), and adds what noise is wanting there: none
    of it is new with gamma = 0, and with 1 all of it, as `sample_consistency` has it (CTM, arXiv 2310.02279, algorithm
    3).
    """
    if not gamma or not r.any():
        return euler_step(student(x, t, batch.cond, r), x, t, r)
    end = from_flow_time(shifted(flow_time(r), math.sqrt(1 - gamma**2)))
    x = euler_step(student(x, t, batch.cond, end), x, t, end)
    kept, new = r.cos() / end.cos(), gamma * r.sin()
    return expand_like(kept, x) * x + expand_like(new, x) * noise_like(x, rng)
