"""Samples while a run goes on, as pictures and videos; they take nothing from its random streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from jvpgraph.trainer.config import RunConfig, SamplingConfig
from jvpgraph.trainer.data.sample import Dataset, first_samples
from jvpgraph.trainer.evaluation.samplers import draw, sampler_of
from jvpgraph.trainer.files import naming
from jvpgraph.trainer.model.networks import averaged
from jvpgraph.trainer.pictures import frames_of, save_frames
from jvpgraph.trainer.run.log import RunLog, grid
from jvpgraph.trainer.run.prompted import Prompted
from jvpgraph.trainer.trigflow import TrigFlow


@dataclass(frozen=True)
class Previews:
    """What is drawn of a run, and where it goes."""

    config: RunConfig
    student: TrigFlow
    dataset: Dataset
    prompted: Prompted | None
    log: RunLog | None  # the first process's

    def draw(self, stage: int, average: Mapping[str, Tensor], step: int) -> None:
        """Samples of the averaged student: OUT/samples/step-N.png for the data set's first conditions, and a file in
        the folder step-N for each prompt and each video.

        Where the student is spread over processes all of them call this, and the first one writes.
        """
        config = self.config
        device = next(self.student.parameters()).device
        count = min(config.log.preview_count, len(self.dataset))
        steps = max(config.sampling.steps)
        sample = sampler_of(config.stages[stage].objective.sampler, self.student, steps, config.sampling)
        own = None if self.prompted is None else self.prompted.batch
        with averaged(self.student, average):
            latents = [
                draw(sample, batch.to(device), config.sampling.batch, config.seed)
                for batch in (first_samples(self.dataset, count), own)
                if batch is not None
            ]
        if self.log is not None:
            shown = self.save(self.log.path.parent / "samples" / f"step-{step:08d}", latents)
            self.log.pictures(step, shown, config.log.fps)

    def save(self, stem: Path, latents: Sequence[Tensor]) -> dict[str, list[Image.Image]]:
        """Writes them, and gives the frames of each by its name in TensorBoard and wandb."""
        pixels = picture_of(latents[0], self.config.sampling)
        path = stem.with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(pixels, path, columns=max(1, round(len(pixels) ** 0.5)))
        with Image.open(path) as picture:
            shown = {"samples/grid": [picture.copy()]}
        if self.config.sampling.decode is not None and pixels.dim() == 5 and pixels.shape[2] > 1:
            shown |= {f"samples/{i}": frames_of(video) for i, video in enumerate(pixels)}
        if self.prompted is not None:
            decoded = self.prompted.decode.build()(latents[1])
            shown |= {f"prompts/{i}": frames_of(one) for i, one in enumerate(decoded)}
        for name, frames in shown.items():
            if name != "samples/grid":
                kind, number = name.split("/")
                stem.mkdir(exist_ok=True)
                with naming(stem):
                    save_frames(
                        frames, stem / f"{kind.removesuffix('s')}-{number}", self.config.log.fps, self.config.log.film
                    )
        return shown


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
