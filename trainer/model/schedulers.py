"""Schedulers of diffusers that sample a student at its own times, and still do after save_pretrained."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jvpgraph.trainer.config import SamplingConfig
from jvpgraph.trainer.model.loading import diffusers
from jvpgraph.trainer.times import from_flow_time
from jvpgraph.trainer.trigflow import HALF_PI, RECTIFIED_FLOW, TrigFlow, level

# Mochi's pipeline turns noise levels upside down, Cosmos 2's works on x0 + sigma eps
OWN_NOISE_LEVELS = ("MochiTransformer3DModel", "CosmosTransformer3DModel")
# whose pipeline gives a scheduler timesteps of its own beside sigmas, and diffusers' keep those that they are given
OWN_TIMESTEPS = ("CogView4Transformer2DModel",)


@dataclass(frozen=True)
class Sampling:
    """What diffusers needs to sample a student at given times.

    Attributes:
        scheduler: fixed to these times, whatever sigmas or shift a pipeline asks it for.
        arguments: what set_timesteps would need otherwise, and a pipeline that takes them: sigmas or timesteps.
        noise_scale: the standard deviation of the latents that sampling starts from.
    """

    scheduler: Any
    arguments: dict[str, Any]
    noise_scale: float


def scheduler_for(model: TrigFlow, times: Sequence[float]) -> Sampling:
    """The scheduler of diffusers that samples like sample_consistency: x0 = f(x_t, t), noise to the next time, ...

    A student that predicts the velocity of a rectified flow goes back into its own pipeline: assign the scheduler and
    call the pipeline with num_inference_steps = len(times), and with latents = noise_scale * noise if the last 1 %
    matters (a pipeline starts at deviation 1, which is right for t = pi / 2). Its configuration holds the times, so
    that pipeline.save_pretrained keeps them. It is a FlowMatchLCMScheduler if that can be told to use them: one or two
    times, or those of `even_times`. For other times, and for CogView4, it is our FewStepScheduler, and from_pretrained
    wants `import jvpgraph.trainer.model.few_step_scheduler` first, else it says so.

    Any other student, and those whose pipelines count noise in ways of their own, get the SCMScheduler, which steps
    F itself: call the TrigFlow model at the scheduler's timesteps. It cannot keep times and refuses to be saved.

    Args:
        times: TrigFlow times in radians, decreasing, at most pi / 2; without the final 0.
    """
    radians = torch.tensor(list(times), dtype=torch.float64)
    if len(radians) == 0 or radians[-1] <= 0 or radians[0] > torch.pi / 2 or (radians.diff() >= 0).any():
        raise ValueError(f"times are radians that fall from at most pi / 2 and stay above 0, not {list(times)}")
    if fits_pipelines(model):
        levels = model.s_of_t(radians).tolist()
        make = few_step_scheduler if getattr(model.call, "name", None) in OWN_TIMESTEPS else flow_scheduler
        return Sampling(make(levels), {"sigmas": levels}, model.c_in(radians[:1]).item())
    arguments = {
        "num_inference_steps": len(radians),
        "timesteps": [*radians.tolist(), 0.0],
        "max_timesteps": None,
        "intermediate_timesteps": None,
    }
    return Sampling(trigflow_scheduler(arguments), arguments, 1.0)


def fits_pipelines(model: TrigFlow) -> bool:
    """Whether a pipeline with a scheduler of rectified flow samples the student as it was trained."""
    return model.schedule == RECTIFIED_FLOW and getattr(model.call, "name", None) not in OWN_NOISE_LEVELS


def even_times(times: Sequence[float]) -> list[float]:
    """As many times [radians] in equal steps of rectified-flow time, from pure noise to the last of `times`.

    diffusers' own FlowMatchLCMScheduler can be told to use these, so that a saved pipeline needs diffusers alone;
    rCM's four (1.558, 1.3, 1.0, 0.6) become 1.571, 1.329, 0.991, 0.6.
    """
    last = 1 / (1 + 1 / math.tan(times[-1])) if len(times) > 1 else 1.0
    return from_flow_time(torch.linspace(1, last, len(times), dtype=torch.float64)).tolist()


def flow_scheduler(levels: Sequence[float]) -> Any:
    """A scheduler whose configuration holds these falling sigmas of a rectified flow."""
    library, steps = diffusers(), len(levels)
    even = torch.linspace(1, levels[-1], steps, dtype=torch.float64)
    if torch.allclose(even, torch.tensor(levels, dtype=torch.float64), rtol=0, atol=1e-7):
        return at(library.FlowMatchLCMScheduler(shift_terminal=levels[-1] if steps > 1 else None), steps)
    if steps <= 2:  # Karras' spacing goes from sigma_max to sigma_min, whatever a pipeline asks for
        ends = {"use_karras_sigmas": True, "sigma_max": levels[0], "sigma_min": levels[-1]}
        scheduler = library.FlowMatchLCMScheduler(use_karras_sigmas=True)
        scheduler.register_to_config(**ends)
        return at(scheduler, steps)
    return few_step_scheduler(levels)


def few_step_scheduler(levels: Sequence[float]) -> Any:
    return importlib.import_module("jvpgraph.trainer.model.few_step_scheduler").FewStepScheduler(tuple(levels))


def jump_scheduler(sampling: SamplingConfig) -> Any:
    """Of AnyFlow's pipeline, for jumps as sample_mean_flow makes them; diffusers' own knows no new noise."""
    start = sampling.start("mean_flow")
    if not sampling.gamma and start == HALF_PI:
        return diffusers().FlowMapEulerDiscreteScheduler(shift=sampling.shift)
    module = importlib.import_module("jvpgraph.trainer.model.gamma_scheduler")
    return module.GammaScheduler(gamma=sampling.gamma, start=level(start), shift=sampling.shift)


def own_file(scheduler: Any) -> Path | None:
    """The file of the scheduler's class, if that is ours and not diffusers'."""
    module = sys.modules[type(scheduler).__module__]
    return Path(str(module.__file__)) if module.__name__.startswith("jvpgraph.") else None


def at(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


def trigflow_scheduler(arguments: dict[str, Any]) -> Any:
    scheduler = diffusers().SCMScheduler(sigma_data=1.0)
    set_timesteps, steps = scheduler.set_timesteps, arguments["num_inference_steps"]

    def at_these_times(num_inference_steps: int | None = None, device: Any = None, **asked: Any) -> None:
        if num_inference_steps not in (None, steps):
            raise ValueError(f"this scheduler was made for {steps} steps, not {num_inference_steps}")
        set_timesteps(device=device, **arguments)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "an SCMScheduler does not keep its times when it is saved, and no pipeline steps this student's F\n"
            "Save the network alone (jvpgraph export RUN), and make the scheduler with scheduler_for after loading."
        )

    scheduler.set_timesteps = at_these_times
    scheduler.save_pretrained = scheduler.save_config = refuse
    scheduler.set_timesteps()
    return scheduler
