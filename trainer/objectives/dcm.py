"""dCM: discrete consistency distillation (Song et al. 2023), in TrigFlow coordinates.

Two neighbours on the teacher's trajectory should have the same clean image. The nearer one is one Euler step
of the teacher away from the farther one, and the student's answer there is the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.noise import Random, integers, noise_like
from jvpgraph.trainer.objectives.objective import Objective, Terms, objective
from jvpgraph.trainer.ranges import positive
from jvpgraph.trainer.times import from_flow_time
from jvpgraph.trainer.trigflow import add_noise, clean_image, expand_like


@dataclass(frozen=True)
class DCM(Objective):
    """Discrete-time consistency."""

    name: ClassVar[str] = "dcm"
    teacher_steps: int = 48  # Euler steps from noise to data; rCM's code
    shift: float = 1.0  # of the grid in rectified-flow time, k s / (1 + (k - 1) s); 5 for Wan

    def __post_init__(self) -> None:
        positive(self, "teacher_steps", "shift")

    def grid(self, device: torch.device) -> Tensor:
        """t [teacher_steps + 1] radians, rising from 0 to pi/2."""
        s = torch.linspace(0, 1, self.teacher_steps + 1, dtype=torch.float64, device=device)
        return from_flow_time(self.shift * s / (1 + (self.shift - 1) * s))


def euler_step(F: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """x_t -> x_t_next with the clean image and the noise that F implies, both held.

    cos(t') (cos(t) x - sin(t) F) + sin(t') (sin(t) x + cos(t) F) is a rotation by t' - t. It is DDIM's step, and
    an Euler step of rectified flow in its own coordinates.
    """
    angle = t_next - t
    return expand_like(angle.cos(), x) * x + expand_like(angle.sin(), x) * F


@objective
def dcm_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: Random,
    config: DCM,
) -> Terms:
    """Sum over the latent of (f(x_t, t) - sg f(x_t', t'))^2, float64; t and t' neighbours on the grid.

    Args:
        student: a TrigFlow model or its dual.
        teacher: makes the step from t to t', guidance included.
        batch: real latents and their conditions.
        rng: times and noise.
    """
    grid = config.grid(rng.device)
    index = integers(1, config.teacher_steps + 1, len(batch), rng)
    t, t_next = grid[index], grid[index - 1]
    x0 = batch.x0.double()
    x = add_noise(x0, noise_like(x0, rng), t)
    with torch.no_grad():
        x_next = euler_step(teacher(x, t, batch.cond), x, t, t_next)
        target = clean_image(student(x_next, t_next, batch.cond), x_next, t_next)
    f = clean_image(student(x, t, batch.cond), x, t)
    return {"loss": (f - target).square().flatten(1).sum(1)}
