"""Grids of samples while a run goes on; they take nothing from its random streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from jvpgraph.trainer.config import RunConfig, SamplingConfig
from jvpgraph.trainer.data.sample import first_samples
from jvpgraph.trainer.evaluation.samplers import draw, sampler_of
from jvpgraph.trainer.model.networks import averaged
from jvpgraph.trainer.run.log import grid
from jvpgraph.trainer.trigflow import TrigFlow


def preview(
    config: RunConfig,
    stage: int,
    student: TrigFlow,
    average: Mapping[str, Tensor],
    dataset: Any,
    folder: Path,
    step: int,
    *,
    write: bool = True,
) -> Path:
    """Samples of the averaged student for the data set's first conditions: `folder`/step-N.png.

    Where the student is spread over processes all of them call this, and one writes.
    """
    device = next(student.parameters()).device
    count = min(config.log.preview_count, len(dataset))
    batch = first_samples(dataset, count).to(device)
    steps = max(config.sampling.steps)
    sample = sampler_of(config.stages[stage].objective.sampler, student, steps, config.sampling)
    with averaged(student, average):
        latents = draw(sample, batch, config.sampling.batch, config.seed)
    path = folder / f"step-{step:08d}.png"
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        grid(picture_of(latents, config.sampling), path, columns=max(1, round(count**0.5)))
    return path


def decoder_of(config: SamplingConfig) -> Callable[[Tensor], Tensor]:
    """The plugged-in decoder, latents -> images, which may load a VAE; without one the latents stay as they are."""
    return (lambda latents: latents) if config.decode is None else config.decode.build()


def picture_of(latents: Tensor, config: SamplingConfig) -> Tensor:
    """Something to look at, in [0, 1]: decoded images, or up to three channels of the latents on their own scale."""
    if config.decode is not None:
        return decoder_of(config)(latents).clamp(0, 1)
    shown = latents[:, : 3 if latents.shape[1] >= 3 else 1].float()
    low, high = shown.amin(), shown.amax()
    return (shown - low) / (high - low).clamp(min=1e-6)
