"""Gamma-sampling for AnyFlow's pipeline. It needs diffusers alone: exported pipelines take this file along."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_map_euler_discrete import (
    FlowMapEulerDiscreteScheduler,
    FlowMapEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor

__all__ = [
    "GammaScheduler",
    "SchedulerMixin",
]  # from_pretrained looks for the mixin beside the class


class GammaScheduler(FlowMapEulerDiscreteScheduler):
    """Jumps that go beyond the next time, and noise that leads back to it (CTM, arXiv 2310.02279, algorithm 3).

    `timesteps` are where the network is asked, `sigmas` where its jumps end, which is what the pipeline tells it.

    Args:
        gamma: how much of the noise between two jumps is new, from 0 to 1.
        start: sigma where sampling begins, x = (1 - sigma) x0 + sigma eps.
        shift: of equal steps, towards noise.
        num_train_timesteps: the network's time at sigma = 1.
    """

    config: Any  # frozen by ConfigMixin

    @register_to_config
    def __init__(
        self, gamma: float = 0.0, start: float = 1.0, shift: float = 1.0, num_train_timesteps: int = 1000
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, timesteps)
        if sigmas is None and timesteps is None:
            self.sigmas, self.timesteps = self.config.start * self.sigmas, self.config.start * self.timesteps
        self.levels = self.sigmas
        farther = (1 - self.config.gamma**2) ** 0.5 * self.levels
        self.sigmas = torch.cat([self.levels[:1], (farther / (1 - self.levels + farther))[1:]])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        r_timestep: Any = None,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """From one of `timesteps` to the next. Raises ValueError for other times."""
        now = self.index_for_timestep(timestep)
        if now is None or r_timestep is not None:
            raise ValueError("with new noise between them jumps go from one of `timesteps` to the next alone")
        s, r, end = (float(level) for level in (self.levels[now], self.levels[now + 1], self.sigmas[now + 1]))
        moved = sample - (s - end) * model_output
        if new := self.config.gamma * r:
            noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            moved = (1 - r) / (1 - end) * moved + new * noise
        self._step_index = now + 1
        moved = moved.to(model_output.dtype)
        return FlowMapEulerDiscreteSchedulerOutput(prev_sample=moved) if return_dict else (moved,)
