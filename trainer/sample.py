"""Samplers: the teacher's Euler integration, the student's few consistency steps. Images are [B, 1, 8, 8]."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from jvpgraph.trainer.config import FewStepConfig
from jvpgraph.trainer.trigflow import add_noise, clean_image, expand_like


def initial_noise(labels: Tensor, image_size: int, rng: torch.Generator) -> Tensor:
    return torch.randn((len(labels), 1, image_size, image_size), generator=rng, dtype=torch.float64)


@torch.no_grad()
def sample_euler(teacher: nn.Module, labels: Tensor, steps: int, rng: torch.Generator, *, image_size: int) -> Tensor:
    """Equal Euler steps in rectified-flow time s, from 1 (noise) to 0; each moves x_s by (s' - s) u.

    The teacher is in TrigFlow coordinates: t = atan2(s, 1 - s), x_t = (cos(t) + sin(t)) x_s, and u = eps - x0
    with eps = sin(t) x_t + cos(t) F and x0 = cos(t) x_t - sin(t) F.
    """
    x_s = initial_noise(labels, image_size, rng)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for s, s_next in pairwise(times):
        t = torch.atan2(s, 1 - s).expand(len(labels))
        cos, sin = expand_like(t.cos(), x_s), expand_like(t.sin(), x_s)
        x = (cos + sin) * x_s
        F = teacher(x, t, labels)
        u = (sin * x + cos * F) - (cos * x - sin * F)
        x_s = x_s + (s_next - s) * u
    return x_s


def few_step_times(steps: int, config: FewStepConfig) -> list[float]:
    """Radians, falling: atan(sigma_max), then the first `steps - 1` middle times."""
    if not 1 <= steps <= 1 + len(config.middle_times):
        raise ValueError(f"{steps} steps need {steps - 1} middle times, the settings have {config.middle_times}")
    return [math.atan(config.sigma_max), *config.middle_times[: steps - 1]]


@torch.no_grad()
def sample_few_steps(
    student: nn.Module, labels: Tensor, times: list[float], rng: torch.Generator, *, image_size: int
) -> Tensor:
    """x0 = f(x_t, t) at each time, fresh noise in between; one evaluation per step."""
    x0 = torch.zeros(len(labels), 1, image_size, image_size, dtype=torch.float64)
    for time in times:
        t = torch.full((len(labels),), time, dtype=torch.float64)
        x = add_noise(x0, initial_noise(labels, image_size, rng), t)
        x0 = clean_image(student(x, t, labels), x, t)
    return x0
