"""A scheduler that keeps its noise levels. It needs diffusers alone: exported pipelines take this file along."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config

__all__ = [
    "FewStepScheduler",
    "SchedulerMixin",
]  # from_pretrained looks for the mixin beside the class


class FewStepScheduler(FlowMatchLCMScheduler):
    """x0 = x - sigma u at each of `levels`, noise to the next level in between.

    Args:
        levels: sigmas of a rectified flow, x = (1 - sigma) x0 + sigma eps, falling, without the final 0.
        num_train_timesteps: the network's time at sigma = 1.
    """

    config: Any  # frozen by ConfigMixin

    @register_to_config
    def __init__(self, levels: tuple[float, ...] = (1.0,), num_train_timesteps: int = 1000) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps)
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,  # pipelines look for these names, and pass their own defaults
        mu: Any = None,
        timesteps: Any = None,
    ) -> None:
        levels = torch.tensor(self.config.levels, dtype=torch.float32)
        if num_inference_steps not in (None, len(levels)):
            raise ValueError(
                f"this scheduler was made for {len(levels)} steps, not {num_inference_steps}: "
                f"call the pipeline with num_inference_steps={len(levels)}"
            )
        self.num_inference_steps = len(levels)
        self.sigmas = torch.cat([levels, torch.zeros(1)]).to(device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._step_index = None
        self._begin_index = None
