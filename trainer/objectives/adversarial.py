"""An adversarial term: a critic tells real latents from the student's samples, and the student learns to pass for real.

As in DMD2 (Yin et al. 2024) beside `dmd`, with heads on the fake score, or as in SANA-Sprint (arXiv 2503.09641) beside
`scm`, with heads on the teacher. The critic sees x_t = cos(t) x0 + sin(t) eps of both. Its answer is, once it has
learned, the logarithm of the ratio of their densities at x_t, which f-distill weighs the scores by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.noise import Random, noise_like
from jvpgraph.trainer.objectives.dmd import DMD, fake_score_error
from jvpgraph.trainer.objectives.judge import Features, Judge, host_of
from jvpgraph.trainer.objectives.objective import Objective, Shared, Terms, objective
from jvpgraph.trainer.objectives.simulation import Earlier, Simulation, draw_between, noise_from, samples_of
from jvpgraph.trainer.ranges import not_negative, positive
from jvpgraph.trainer.times import ShiftedUniform, Times
from jvpgraph.trainer.trigflow import add_noise


@dataclass(frozen=True)
class Adversarial(Objective):
    """Passing for real; beside dmd or scm in `terms`."""

    name: ClassVar[str] = "adversarial"
    takes_tangent: ClassVar[bool] = False
    features: Features = "teacher"  # whose blocks the heads are on; SANA-Sprint: teacher
    blocks: tuple[int, ...] = ()  # which, from 0; empty: four, evenly spread
    width: int = 256  # of the heads' layers
    loss: Literal["softplus", "hinge"] = "softplus"  # DMD2; hinge: SANA-Sprint
    times: Times | None = None  # of the noise; null: those of the fake score with the heads, else uniform
    simulation: Simulation | None = None  # how samples are made; null: those of the dmd or scm beside it
    share: float = 0.01  # of the critic's loss, beside the mean over a latent, in what trains the fake score; DMD2
    updates_per_step: int = 1  # of the critic, after each student update, where no fake score has some

    def __post_init__(self) -> None:
        positive(self, "width", "updates_per_step")
        not_negative(self, "share")
        if len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"blocks are {list(self.blocks)}: each once")

    @property
    def made_by(self) -> Simulation:
        return self.simulation or Simulation()

    @property
    def only_simulated(self) -> bool:  # type: ignore[override]
        return self.made_by.rollout != "once"

    @property
    def second_time(self) -> bool:  # type: ignore[override]
        return self.made_by.rollout == "jumps"

    @property
    def sampler(self) -> str:  # type: ignore[override]
        return self.made_by.sampler

    @property
    def span(self) -> tuple[float, float]:
        return self.made_by.start, self.made_by.end

    @property
    def asks_teacher(self) -> bool:
        return False  # whose features have no guidance

    @property
    def critic(self) -> Adversarial:
        return self

    @property
    def trained_like(self) -> Adversarial:
        """The same for all that train a critic alike."""
        return self

    def fake_updates(self, iteration: int) -> int:
        return self.updates_per_step


def passing_loss(logits: Tensor, kind: str) -> Tensor:
    """[B] of the student, for logits [B, heads] of its samples; float64."""
    logits = logits.double()
    return (softplus(-logits) if kind == "softplus" else -logits).mean(1)


def telling_loss(real: Tensor, made: Tensor, kind: str) -> Tensor:
    """[B] of the critic, for logits [B, heads] of real latents and of samples; float64."""
    real, made = real.double(), made.double()
    if kind == "softplus":
        return (softplus(-real) + softplus(made)).mean(1)
    return ((1 - real).relu() + (1 + made).relu()).mean(1)


@objective
def adversarial_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: Adversarial,
    *,
    iteration: int,
    fake: nn.Module | None,
    critic: Judge | None,
    shared: Shared | None = None,
    earlier: Earlier | None = None,
) -> Terms:
    """softplus(-logit), or -logit with hinge, of the student's samples; the mean over the heads, float64.

    Its gradient in the samples is taken here, so that none reaches the parameters of the critic and of its network.

    Args:
        student: a TrigFlow model or its dual; makes the samples.
        teacher, fake: one of them has the heads.
        batch: conditions, and latents if samples are made from them.
        critic: the heads.
        shared: where other terms find the samples, or left them.
        earlier: the expert of the phase before.
    """
    assert critic is not None, "the adversarial term needs a critic"
    simulation = config.made_by
    x = samples_of(student, batch, rng, simulation, iteration, shared, earlier).x
    t = draw_between(simulation.end, None, times_of(config), len(batch), rng)
    eps = noise_like(x, rng)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        x_t = noise_from(leaf, simulation.end, eps, t)
        _, logits = critic.judge(host_of(critic, fake, teacher), x_t, t, batch.cond)
        loss = passing_loss(logits, config.loss)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    moved = ((x - x.detach()) * gradient).flatten(1).sum(1)
    return {"loss": loss.detach() + moved, "logit": logits.detach().double().mean(1)}


def times_of(config: Adversarial) -> Times:
    return config.times or ShiftedUniform(shift=1.0)


class Looking:
    """A network that keeps what a critic says of its last call."""

    def __init__(self, critic: Judge, network: nn.Module, share: float) -> None:
        self.critic, self.network, self.share = critic, network, share
        self.logits: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        F, self.logits = self.critic.judge(self.network, x, t, cond, self.share)
        return F


def beside_loss(
    fake: nn.Module | None,
    critic: Judge | None,
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: Objective,
    *,
    count: int,
    earlier: Earlier | None = None,
) -> Terms:
    """What trains fake score and critic, as far as the objective has them, on fresh student samples; float64.

    The score's velocity error, and telling_loss. Where the heads are on the fake score and look at its times, the pass
    that has the one gives the other, and the critic costs one pass more, of the real latents.

    Args:
        fake, critic: what is trained.
        student: makes the samples.
        teacher: may have the heads.
        batch: conditions, and real latents for the critic.
        count: numbers the updates; the backward simulation's steps go by it.
        earlier: the expert of the phase before.
    """
    score: DMD | None = config.fake_score
    telling: Adversarial | None = config.critic
    shared: Shared = {}
    if telling is None or critic is None:
        assert score is not None, "there is nothing to train"
        assert fake is not None, "the settings have a fake score"
        return {"loss": fake_score_error(fake, student, batch, rng, score, count, shared, earlier)}

    host = host_of(critic, fake, teacher)
    share = telling.share * batch.x0[0].numel() if host is fake else 0.0
    looking = Looking(critic, host, share)
    terms: Terms = {}
    if score is not None and fake is not None:
        judged = looking if shares_pass(score, telling) else fake
        terms["velocity"] = fake_score_error(judged, student, batch, rng, score, count, shared, earlier)
    if looking.logits is None:
        simulation = telling.made_by
        with torch.no_grad():
            x = samples_of(student, batch, rng, simulation, count, shared, earlier).x
        t = draw_between(simulation.end, None, times_of(telling), len(batch), rng)
        looking(noise_from(x, simulation.end, noise_like(x, rng), t), t, batch.cond)
    made = looking.logits
    assert made is not None
    t = draw_between(telling.made_by.end, None, times_of(telling), len(batch), rng)
    x0 = batch.x0.double()
    looking(add_noise(x0, noise_like(x0, rng), t), t, batch.cond)
    real = looking.logits
    assert real is not None
    told = telling_loss(real, made, telling.loss)
    means = {"logit_real": real.detach().double().mean(1), "logit_made": made.detach().double().mean(1)}
    loss = terms["velocity"] + told if terms else told
    return {"loss": loss, **terms, "telling": told, **means}


def shares_pass(score: DMD, telling: Adversarial) -> bool:
    """Whether the critic may look at the pass that trains the fake score."""
    return telling.features == "fake_score" and telling.made_by == score.simulation and times_of(telling) == score.times
