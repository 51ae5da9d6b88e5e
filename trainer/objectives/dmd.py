"""DMD: distribution matching with a fake score (Yin et al. 2024), rCM's score regulariser (arXiv 2510.08431).

The student's samples are pulled along the difference of two scores: the teacher's, and that of a "fake" model
which keeps learning what the student currently produces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.noise import Random, noise_like
from jvpgraph.trainer.objectives.dcm import euler_step
from jvpgraph.trainer.objectives.judge import Judge, host_of, without_guidance
from jvpgraph.trainer.objectives.objective import Objective, Shared, Terms, between, objective
from jvpgraph.trainer.objectives.simulation import (
    Earlier,
    Samples,
    Simulation,
    draw_between,
    missing_noise,
    noise_from,
    samples_of,
)
from jvpgraph.trainer.ranges import positive
from jvpgraph.trainer.times import Ranges, ShiftedUniform, Times
from jvpgraph.trainer.trigflow import HALF_PI, add_noise, clean_image, expand_like, level, velocity_of

Divergence = Literal["reverse_kl", "softened_reverse_kl", "jensen_shannon", "hellinger", "jeffreys", "forward_kl"]
WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda ratio: 2 / (1 + ratio),
    "jensen_shannon": lambda ratio: 2 * ratio / (1 + ratio),
    "hellinger": torch.sqrt,
    "jeffreys": lambda ratio: (1 + ratio) / 2,
    "forward_kl": lambda ratio: ratio,
}
"""f''(r) r^2 of E_student[f(r)], r = data / student (f-distill, arXiv 2502.15681), divided by its value at r = 1."""

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t, t, cond) -> F."""


@dataclass(frozen=True)
class DMD(Objective):
    """Distribution matching; also the settings of rCM's regulariser and its fake score."""

    name: ClassVar[str] = "dmd"
    takes_tangent: ClassVar[bool] = False
    only_simulated: ClassVar[bool] = True
    times: Times = field(default_factory=ShiftedUniform)  # p_D, also of the fake score and the simulation
    fake_updates_per_step: int = 4  # after each student update; rCM: 4 at 1.3B, 9 at 14B
    simulation_steps: int = 4  # backward simulation cycles through 1..simulation_steps steps; rCM
    fixed_times: tuple[float, ...] = ()  # of the simulation, else random; rCM: [1.5042, 1.3734, 1.0304]
    rollout: Literal["renoise", "jumps"] = "renoise"  # jumps t -> r need a network with a second time
    guidance_times: Times | None = None  # of the guidance's part, below the last step; null: the same time as the rest
    divergence: Divergence = "reverse_kl"  # of student and data: f-distill; any other needs a critic's ratio
    ratio_limit: float = 10.0  # of the densities data / student, and of its inverse, in the weights of f-distill
    start: float = HALF_PI  # radians where the simulation starts; below pi/2: in real latents with noise
    end: float = 0.0  # radians where it ends, and scores are matched from: above 0 a phase of phased DMD
    earlier: Path | None = None  # folder of the run of the phase before, whose student makes x_start; null: see start

    def __post_init__(self) -> None:
        positive(self, "fake_updates_per_step", "simulation_steps")
        if not self.ratio_limit > 1:
            raise ValueError(f"ratio_limit is {self.ratio_limit} and must be above 1")
        _ = self.simulation  # which checks the rest

    @property
    def simulation(self) -> Simulation:
        return Simulation(
            self.times, self.simulation_steps, self.fixed_times, self.rollout, self.start, self.end, self.earlier
        )

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.simulation.needs_data

    @property
    def second_time(self) -> bool:  # type: ignore[override]
        return self.rollout == "jumps"

    @property
    def sampler(self) -> str:  # type: ignore[override]
        return self.simulation.sampler

    @property
    def span(self) -> tuple[float, float]:
        return self.start, self.end

    @property
    def asked(self) -> Ranges:
        times, high = (self.times, 1.0) if self.guidance_times is None else (self.guidance_times, level(self.start))
        low, (first, last) = level(self.end), between(times)
        return ((low if self.guided_apart else low + first * (high - low), low + last * (high - low)),)

    @property
    def fake_score(self) -> DMD:
        return self

    @property
    def trained_like(self) -> DMD:
        """The same for all that train a fake score alike."""
        return replace(self, guidance_times=None, divergence="reverse_kl", ratio_limit=10.0)

    @property
    def guided_apart(self) -> bool:
        return self.guidance_times is not None

    @property
    def needs_critic(self) -> bool:
        return self.divergence != "reverse_kl"

    def fake_updates(self, iteration: int) -> int:
        return self.fake_updates_per_step


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
    critic: Judge | None = None,
    shared: Shared | None = None,
    earlier: Earlier | None = None,
) -> Terms:
    """Sum over the latent of (x - sg(x - gradient))^2, float64; x is x0, in a phase x_end.

    Args:
        student: a TrigFlow model or its dual; makes the samples x.
        teacher: gives the velocity of the data's score, guidance included; of its `model` without.
        batch: conditions to sample; its latents only lend their shape, unless the simulation starts from them.
        rng: times and noise.
        iteration: of the student; the backward simulation's steps go by it.
        fake: gives the velocity of the score of the student's own samples.
        critic: knows the ratio of the densities that f-distill weighs by.
        shared: where other terms find the samples.
        earlier: the expert of the phase before.
    """
    assert fake is not None, "DMD needs a fake score"
    samples = samples_of(student, batch, rng, config.simulation, iteration, shared, earlier)
    with torch.no_grad():
        gradient, weight, told = matching_gradient(samples.x, fake, teacher, critic, batch, rng, config)
        if config.guidance_times is not None:
            gradient = gradient + guidance_gradient(samples, teacher, batch, rng, config)
        target = samples.x - expand_like(weight, gradient) * gradient
    loss = (samples.x - target).square().flatten(1).sum(1)
    return {"loss": loss, "score_gap": gradient.abs().flatten(1).mean(1), **told}


def matching_gradient(
    x_end: Tensor,
    fake: nn.Module,
    teacher: nn.Module,
    critic: Judge | None,
    batch: Batch,
    rng: Random,
    config: DMD,
) -> tuple[Tensor, Tensor, Terms]:
    """The difference of the two scores at one time, the divergence's weight [B] of it, and what of both is logged.

    The teacher's is with guidance, if that has no time of its own. Of the student's samples with noise both say what is
    below it: `score_error` and `score_error_teacher` are their mean squared errors.
    """
    t = draw_between(config.end, None, config.times, len(batch), rng)
    x = noise_from(x_end, config.end, noise_like(x_end, rng), t)
    weight = torch.ones_like(t)
    if config.needs_critic:
        assert critic is not None, "f-distill needs a critic"
        host = host_of(critic, fake, teacher)
        F_host, logits = critic.judge(host, x, t, batch.cond)
        limit = math.log(config.ratio_limit)
        weight = WEIGHTS[config.divergence](logits.double().mean(1).clamp(-limit, limit).exp())
        F_fake = F_host if host is fake else fake(x, t, batch.cond)
    else:
        F_fake = fake(x, t, batch.cond)
    F_teacher = (teacher if config.guidance_times is None else without_guidance(teacher))(x, t, batch.cond)
    x_fake, x_teacher = (image_at(config.end, F, x, t) for F in (F_fake, F_teacher))
    errors = [(image - x_end).square().flatten(1).mean(1) for image in (x_fake, x_teacher)]
    told = dict(zip(("score_error", "score_error_teacher"), errors))
    if config.needs_critic:
        told["weight"] = weight
    return score_gradient(x_end, x_fake, x_teacher), weight, told


def guidance_gradient(samples: Samples, teacher: nn.Module, batch: Batch, rng: Random, config: DMD) -> Tensor:
    """What guidance adds to the difference of the scores, at times of its own (Decoupled DMD, arXiv 2511.22677).

    They are below the time where the student's last step began, tau_CA > t in the paper, whose time runs from noise, 0,
    to data, 1: what is noisier was settled before that step. The matching's are any, tau_DM in [0, 1] there.
    """
    assert config.guidance_times is not None
    t = draw_between(config.end, samples.t, config.guidance_times, len(batch), rng)
    x = noise_from(samples.x, config.end, noise_like(samples.x, rng), t)
    F_plain, F_guided = without_guidance(teacher)(x, t, batch.cond), teacher(x, t, batch.cond)
    return score_gradient(samples.x, *(image_at(config.end, F, x, t) for F in (F_plain, F_guided)))


def image_at(end: float, F: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The x_end that F implies at x_t: clean images if `end` is 0. Differences of two are those of their scores."""
    return euler_step(F, x, t, torch.full_like(t, end)) if end else clean_image(F, x, t)


def fake_score_error(
    fake: Network,
    student: nn.Module,
    batch: Batch,
    rng: Random,
    config: DMD,
    count: int,
    shared: Shared | None = None,
    earlier: Earlier | None = None,
) -> Tensor:
    """[B]: the sum over the latent of (F_fake - v)^2 on fresh student samples, float64; `count` numbers the updates.

    With v = cos(t) eps - sin(t) x0 this is the paper's (x0 - x0_fake)^2 / sin^2(t), without the division.
    """
    with torch.no_grad():
        x = samples_of(student, batch, rng, config.simulation, count, shared, earlier).x
    if config.end:
        return velocity_error_from(config.end, fake, Batch(x, batch.cond), config.times, rng)
    return velocity_error(fake, Batch(x, batch.cond), config.times, rng)


def velocity_error(model: Network, batch: Batch, times: Times, rng: Random) -> Tensor:
    """[B]: the sum over the latent of (F - v)^2, v = cos(t) eps - sin(t) x0: conditional flow matching."""
    x0 = batch.x0.double()
    t = times.draw(len(batch), rng)
    eps = noise_like(x0, rng)
    F = model(add_noise(x0, eps, t), t, batch.cond)
    return (F - velocity_of(x0, eps, t)).square().flatten(1).sum(1)


def velocity_error_from(low: float, model: Network, batch: Batch, times: Times, rng: Random) -> Tensor:
    """`velocity_error` where samples are known as x_low only, [B]: score matching within a sub-interval (Phased DMD).

    x_t = a x_low + b eps has the conditional score -eps / b; as a velocity that is (sin(t) eps / b - sin(t) x_t) /
    cos(t), whose mean given x_t is F. Its error is weighted by (b / sin(t))^2, so that nothing divides by b, which is 0
    at t = low, nor by cos(t): b^2 = 1 - cos^2(t) / cos^2(low). For low = 0 it is `velocity_error`.
    """
    x_low = batch.x0.double()
    t = draw_between(low, None, times, len(batch), rng)
    eps = noise_like(x_low, rng)
    _, b = missing_noise(low, t)
    first = math.cos(low)
    target = expand_like(t.cos() / first**2, eps) * eps - expand_like(b / first, eps) * x_low
    F = model(noise_from(x_low, low, eps, t), t, batch.cond)
    return (expand_like(b / t.sin(), eps) * F - target).square().flatten(1).sum(1)
