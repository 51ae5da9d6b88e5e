"""DMD: distribution matching with a fake score (Yin et al. 2024), rCM's score regulariser (arXiv 2510.08431).

The student's samples are pulled along the difference of two scores: the teacher's, and that of a "fake" model
which keeps learning what the student currently produces.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from jvpgraph.trainer.config import DistillConfig
from jvpgraph.trainer.data import Batch
from jvpgraph.trainer.trigflow import add_noise, clean_image, expand_like


def draw_dmd_times(size: int, config: DistillConfig, rng: torch.Generator) -> Tensor:
    """t [B] radians from p_D: uniform rectified-flow time s, shifted by k.

    s' = k s / (1 + (k - 1) s) and tan(t) = s' / (1 - s') = k s / (1 - s).
    """
    s = torch.rand(size, generator=rng, dtype=torch.float64)
    k = config.dmd_time_shift
    return torch.atan2(k * s, 1 - s)


def simulate_backward(
    student: nn.Module, batch: Batch, steps: int, rng: torch.Generator, *, config: DistillConfig
) -> Tensor:
    """Student samples x0 [B, ...] from pure noise in `steps` steps at random falling times.

    Only the last step has a gradient. Labels and shape are those of `batch`.
    """
    noise = torch.randn(batch.x0.shape, generator=rng, dtype=torch.float64)
    t = torch.full((len(batch),), math.pi / 2, dtype=torch.float64)
    x = noise
    with torch.no_grad():
        for _ in range(steps - 1):
            x0 = clean_image(student(x, t, batch.labels), x, t)
            t = torch.minimum(draw_dmd_times(len(batch), config, rng), t)
            x = add_noise(x0, torch.randn(x0.shape, generator=rng, dtype=torch.float64), t)
    return clean_image(student(x, t, batch.labels), x, t)


def score_gradient(x0_student: Tensor, x0_fake: Tensor, x0_teacher: Tensor) -> Tensor:
    """(x0_fake - x0_teacher) / mean |x0_student - x0_teacher|; the mean is per image and at least 1e-5."""
    distance = (x0_student - x0_teacher).abs().flatten(1).mean(1).clamp(min=1e-5)
    return (x0_fake - x0_teacher) / expand_like(distance, x0_fake)


def dmd_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: torch.Generator,
    *,
    fake: nn.Module,
    config: DistillConfig,
    steps: int,
) -> Tensor:
    """Mean over the batch of the sum over pixels of (x0 - sg(x0 - gradient))^2, float64.

    Args:
        student: a TrigFlow model or its dual; makes the samples x0.
        teacher: gives the velocity of the data's score, guidance included.
        batch: labels to sample; its images are not used.
        rng: times and noise.
        fake: gives the velocity of the score of the student's own samples.
        steps: of the backward simulation.
    """
    x0 = simulate_backward(student, batch, steps, rng, config=config)
    with torch.no_grad():
        t = draw_dmd_times(len(batch), config, rng)
        x = add_noise(x0, torch.randn(x0.shape, generator=rng, dtype=torch.float64), t)
        x0_fake = clean_image(fake(x, t, batch.labels), x, t)
        x0_teacher = clean_image(teacher(x, t, batch.labels), x, t)
        target = x0 - score_gradient(x0, x0_fake, x0_teacher)
    return (x0 - target).square().flatten(1).sum(1).mean()


def fake_score_loss(
    fake: nn.Module,
    student: nn.Module,
    batch: Batch,
    rng: torch.Generator,
    *,
    config: DistillConfig,
    steps: int,
) -> Tensor:
    """Mean over the batch of the sum over pixels of (F_fake - v)^2 on fresh student samples, float64.

    With v = cos(t) eps - sin(t) x0 this is the paper's (x0 - x0_fake)^2 / sin^2(t), without the division.
    """
    with torch.no_grad():
        x0 = simulate_backward(student, batch, steps, rng, config=config)
    t = draw_dmd_times(len(batch), config, rng)
    eps = torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    v = expand_like(t.cos(), x0) * eps - expand_like(t.sin(), x0) * x0
    F = fake(add_noise(x0, eps, t), t, batch.labels)
    return (F - v).square().flatten(1).sum(1).mean()
