"""A data term: real latents, a little noisy, come back as they were. It holds colours and contrast beside `dmd`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random, noise_like
from jvpgraph.trainer.objectives.objective import Objective, Terms, objective
from jvpgraph.trainer.times import LogNormal, Times
from jvpgraph.trainer.trigflow import add_noise, clean_image


@dataclass(frozen=True)
class Data(Objective):
    """The clean image of noisy real latents; beside others in `terms`."""

    name: ClassVar[str] = "data"
    takes_tangent: ClassVar[bool] = False
    times: Times = field(default_factory=lambda: LogNormal(mean=-2.0, std=1.0))  # low: far from the data, a mean blurs

    @property
    def asks_teacher(self) -> bool:
        return False


@objective
def data_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: Data,
) -> Terms:
    """Sum over the latent of (f(x_t, t) - x0)^2, float64; least at the mean of x0 given x_t. The teacher is not used.

    For a network with a second time, `flow_matching` is the data term: without bias at any time.
    """
    x0 = batch.x0.double()
    t = config.times.draw(len(batch), rng)
    x = add_noise(x0, noise_like(x0, rng), t)
    return {"loss": (clean_image(student(x, t, batch.cond), x, t) - x0).square().flatten(1).sum(1)}
