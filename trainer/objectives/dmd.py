"""DMD: distribution matching with a fake score (Yin et al. 2024), rCM's score regulariser (arXiv 2510.08431).

The student's samples are pulled along the difference of two scores: the teacher's, and that of a "fake" model
which keeps learning what the student currently produces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random, noise_like
from jvpgraph.trainer.objectives.objective import Objective, Terms, objective
from jvpgraph.trainer.ranges import positive
from jvpgraph.trainer.times import ShiftedUniform, Times
from jvpgraph.trainer.trigflow import add_noise, clean_image, expand_like


@dataclass(frozen=True)
class DMD(Objective):
    """Distribution matching; also the settings of rCM's regulariser and its fake score."""

    name: ClassVar[str] = "dmd"
    needs_data: ClassVar[bool] = False
    times: Times = field(default_factory=ShiftedUniform)  # p_D, also of the fake score and the simulation
    fake_updates_per_step: int = 4  # after each student update; rCM: 4 at 1.3B, 9 at 14B
    simulation_steps: int = 4  # backward simulation cycles through 1..simulation_steps steps; rCM

    def __post_init__(self) -> None:
        positive(self, "fake_updates_per_step", "simulation_steps")

    @property
    def fake_score(self) -> DMD:
        return self

    def fake_updates(self, iteration: int) -> int:
        return self.fake_updates_per_step

    def steps_at(self, count: int) -> int:
        """Simulation steps of the count-th update: 1..simulation_steps in turn."""
        return 1 + count % self.simulation_steps


def simulate_backward(student: nn.Module, batch: Batch, steps: int, rng: Random, times: Times) -> Tensor:
    """Student samples x0 [B, ...] from pure noise in `steps` steps at random falling times.

    Only the last step has a gradient. Conditions and shape are those of `batch`.
    """
    x = noise_like(batch.x0, rng)
    t = torch.full((len(batch),), math.pi / 2, dtype=torch.float64, device=x.device)
    with torch.no_grad():
        for _ in range(steps - 1):
            x0 = clean_image(student(x, t, batch.cond), x, t)
            t = torch.minimum(times.draw(len(batch), rng), t)
            x = add_noise(x0, noise_like(x0, rng), t)
    return clean_image(student(x, t, batch.cond), x, t)


def score_gradient(x0_student: Tensor, x0_fake: Tensor, x0_teacher: Tensor) -> Tensor:
    """(x0_fake - x0_teacher) / mean |x0_student - x0_teacher|; the mean is per sample and at least 1e-5."""
    distance = (x0_student - x0_teacher).abs().flatten(1).mean(1).clamp(min=1e-5)
    return (x0_fake - x0_teacher) / expand_like(distance, x0_fake)


@objective
def dmd_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: DMD,
    *,
    iteration: int,
    fake: nn.Module | None,
) -> Terms:
    """Sum over the latent of (x0 - sg(x0 - gradient))^2, float64.

    Args:
        student: a TrigFlow model or its dual; makes the samples x0.
        teacher: gives the velocity of the data's score, guidance included.
        batch: conditions to sample; its latents only lend their shape.
        rng: times and noise.
        iteration: of the student; the backward simulation's steps go by it.
        fake: gives the velocity of the score of the student's own samples.
    """
    assert fake is not None, "DMD needs a fake score"
    x0 = simulate_backward(student, batch, config.steps_at(iteration), rng, config.times)
    with torch.no_grad():
        t = config.times.draw(len(batch), rng)
        x = add_noise(x0, noise_like(x0, rng), t)
        x0_fake = clean_image(fake(x, t, batch.cond), x, t)
        x0_teacher = clean_image(teacher(x, t, batch.cond), x, t)
        gradient = score_gradient(x0, x0_fake, x0_teacher)
        target = x0 - gradient
    loss = (x0 - target).square().flatten(1).sum(1)
    return {"loss": loss, "score_gap": gradient.abs().flatten(1).mean(1)}


def fake_score_loss(
    fake: nn.Module, student: nn.Module, batch: Batch, rng: Random, config: DMD, *, count: int
) -> Terms:
    """Sum over the latent of (F_fake - v)^2 on fresh student samples, float64; `count` numbers the updates.

    With v = cos(t) eps - sin(t) x0 this is the paper's (x0 - x0_fake)^2 / sin^2(t), without the division.
    """
    with torch.no_grad():
        x0 = simulate_backward(student, batch, config.steps_at(count), rng, config.times)
    return {"loss": velocity_error(fake, Batch(x0, batch.cond), config.times, rng)}


def velocity_error(model: nn.Module, batch: Batch, times: Times, rng: Random) -> Tensor:
    """[B]: the sum over the latent of (F - v)^2, v = cos(t) eps - sin(t) x0: conditional flow matching."""
    x0 = batch.x0.double()
    t = times.draw(len(batch), rng)
    eps = noise_like(x0, rng)
    v = expand_like(t.cos(), x0) * eps - expand_like(t.sin(), x0) * x0
    F = model(add_noise(x0, eps, t), t, batch.cond)
    return (F - v).square().flatten(1).sum(1)
