"""rCM: the score-regularised continuous-time consistency loss (arXiv 2510.08431), sCM + lambda * DMD."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jvpgraph.trainer.config import DistillConfig
from jvpgraph.trainer.data import Batch
from jvpgraph.trainer.objectives.dmd import dmd_loss
from jvpgraph.trainer.objectives.scm import scm_loss


def rcm_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    rng: torch.Generator,
    *,
    fake: nn.Module,
    config: DistillConfig,
    iteration: int,
) -> Tensor:
    """sCM alone while its tangent warms up, then both; `iteration` counts student updates from 1."""
    warmup = min(1.0, iteration / max(1, config.tangent_warmup))
    loss = scm_loss(student, teacher, batch, rng, config=config, warmup=warmup)
    if iteration <= config.tangent_warmup:
        return loss
    steps = 1 + iteration % config.simulation_steps
    return loss + config.dmd_weight * dmd_loss(student, teacher, batch, rng, fake=fake, config=config, steps=steps)
