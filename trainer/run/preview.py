"""Samples while a run goes on, as pictures and videos; they take nothing from its random streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from jvpgraph.trainer.config import RunConfig, SamplingConfig
from jvpgraph.trainer.data.sample import Dataset, first_samples, some_samples
from jvpgraph.trainer.evaluation.samplers import Sampler, draw
from jvpgraph.trainer.files import naming
from jvpgraph.trainer.model.networks import averaged
from jvpgraph.trainer.pictures import frames_of, save_frames
from jvpgraph.trainer.plug import Plug, PlugFailed, described, speaks_for_itself
from jvpgraph.trainer.run.kept import unseen
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

    def draw(self, sampler: Callable[[int], Sampler], average: Mapping[str, Tensor], step: int) -> None:
        """Samples of the averaged student: OUT/samples/step-N.png for the data set's first conditions, and a file in
        the folder step-N for each prompt and each video.

        Where the student is spread over processes all of them call this, and the first one writes.

        Args:
            sampler: of the student, in a number of steps.
        """
        config = self.config
        device = next(self.student.parameters()).device
        sample = sampler(max(config.sampling.steps))
        own = None if self.prompted is None else self.prompted.batch
        with averaged(self.student, average):
            latents = [
                draw(sample, batch.to(device), config.sampling.batch, config.seed)
                for batch in (some_samples(self.dataset, config.log.preview_count), own)
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


def try_decoders(config: RunConfig, dataset: Dataset, prompted: Prompted | None, device: torch.device) -> None:
    """Raises ValueError, if there are to be previews, where one of a sample of the data cannot be made."""
    if config.log.preview_every is None:
        return
    latents = first_samples(dataset, 1).x0.to(device)
    decode, of_prompts = config.sampling.decode, None if prompted is None else prompted.decode
    if decode is not None:
        unseen(lambda: try_decoder("sampling.decode", decode, latents))
    if of_prompts is not None and of_prompts != decode:
        unseen(lambda: try_decoder("log.prompts_pipeline", of_prompts, latents))


def try_decoder(key: str, decode: Plug, latents: Tensor) -> None:
    function = decode.build()
    if not callable(function):
        raise ValueError(f"{key}: {decode.load} gave no function\nIt has to return one, from latents to pictures.")
    try:
        pictures = function(latents)
    except Exception as error:
        if speaks_for_itself(error):
            raise
        raise PlugFailed(
            f"{key}: {decode.load}, for latents {list(latents.shape)}, raised {described(error)}"
        ) from error
    wanted = f"pictures [{len(latents)}, 1 or 3, (T,) H, W] in [0, 1]"
    if not isinstance(pictures, Tensor) or pictures.dim() not in (4, 5) or pictures.shape[1] not in (1, 3):
        found = list(pictures.shape) if isinstance(pictures, Tensor) else type(pictures).__name__
        raise ValueError(
            f"{key}: {decode.load} gave {found} for latents {list(latents.shape)}\nIt has to give {wanted}."
        )
    if not pictures.isfinite().all():
        raise ValueError(
            f"{key}: {decode.load} gave NaN for a sample of the data\nHave it decode in float32, or set it to null."
        )


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
