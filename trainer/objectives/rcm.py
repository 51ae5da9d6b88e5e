"""rCM: the score-regularised continuous-time consistency loss (arXiv 2510.08431), sCM + lambda * DMD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random
from jvpgraph.trainer.objectives.dmd import DMD, dmd_loss
from jvpgraph.trainer.objectives.judge import Judge
from jvpgraph.trainer.objectives.objective import Objective, Shared, Terms, objective
from jvpgraph.trainer.objectives.scm import SCM, scm_loss
from jvpgraph.trainer.objectives.simulation import Earlier, Simulation
from jvpgraph.trainer.ranges import not_negative
from jvpgraph.trainer.times import Ranges


@dataclass(frozen=True)
class RCM(Objective):
    """sCM alone while its tangent warms up, then both."""

    name: ClassVar[str] = "rcm"
    weight: float = 0.01  # lambda; the paper tried 1, 0.1, 0.01, 0.001. 0 is sCM exactly
    scm: SCM = field(default_factory=SCM)  # the consistency part
    dmd: DMD = field(default_factory=DMD)  # the score regulariser

    def __post_init__(self) -> None:
        not_negative(self, "weight")
        if self.dmd.second_time:
            raise ValueError("dmd.rollout: jumps need a second time, which scm's student has not: set it to renoise")

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.scm.needs_data or bool(self.weight and self.dmd.needs_data)

    @property
    def fake_score(self) -> DMD | None:
        return self.dmd if self.weight else None

    @property
    def asks_teacher(self) -> bool:
        return bool(self.weight) or self.scm.asks_teacher

    @property
    def asked(self) -> Ranges:
        return (self.scm.asked if self.scm.asks_teacher else ()) + (self.dmd.asked if self.weight else ())

    @property
    def trains_plainly(self) -> bool:  # type: ignore[override]
        return bool(self.weight)

    @property
    def waits(self) -> dict[str, int]:
        return {**self.scm.waits, **({"dmd begins": self.scm.tangent_warmup} if self.weight else {})}

    @property
    def guided_apart(self) -> bool:
        return bool(self.weight) and self.dmd.guided_apart

    @property
    def needs_critic(self) -> bool:
        return bool(self.weight) and self.dmd.needs_critic

    @property
    def simulation(self) -> Simulation:
        return self.dmd.simulation if self.weight else self.scm.simulation

    @property
    def span(self) -> tuple[float, float]:
        start, end = self.scm.span
        return max(start, self.dmd.start) if self.weight else start, end

    def fake_updates(self, iteration: int) -> int:
        return self.dmd.fake_updates_per_step if self.regularises(iteration) else 0

    def regularises(self, iteration: int) -> bool:
        return self.weight != 0 and iteration > self.scm.tangent_warmup


@objective
def rcm_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: RCM,
    *,
    iteration: int,
    fake: nn.Module | None,
    critic: Judge | None = None,
    shared: Shared | None = None,
    earlier: Earlier | None = None,
) -> Terms:
    """The two losses, float64; arguments as those of `scm_loss` and `dmd_loss`."""
    terms = scm_loss(student, teacher, batch, rng, config.scm, iteration=iteration, shared=shared)
    if not config.regularises(iteration):
        return terms
    dmd = dmd_loss(
        student,
        teacher,
        batch,
        rng,
        config.dmd,
        iteration=iteration,
        fake=fake,
        critic=critic,
        shared=shared,
        earlier=earlier,
    )
    loss = terms["loss"] + config.weight * dmd["loss"]
    return {**terms, **dmd, "loss": loss, "scm": terms["loss"], "dmd": dmd["loss"]}
