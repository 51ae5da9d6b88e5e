"""Signs that a run is going wrong, in samples of the averaged student: see docs/training_goes_wrong.md.

A few conditions are sampled again and again with the same noise, each several times. The samples are compared with the
data's latents, or with the teacher's samples where the data has none. Nothing is taken from the run's random streams.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.sample import Dataset, some_samples
from jvpgraph.trainer.evaluation.samplers import Sampler, draw, sampler_of
from jvpgraph.trainer.model.ema import averages_of, snapshots
from jvpgraph.trainer.model.networks import averaged
from jvpgraph.trainer.model.parts import gathered, local, widened
from jvpgraph.trainer.model.student import adapted_layers
from jvpgraph.trainer.run.kept import unseen
from jvpgraph.trainer.run.preview import decoder_of
from jvpgraph.trainer.run.ranks import Ranks
from jvpgraph.trainer.trigflow import Guided, TrigFlow

log = logging.getLogger(__name__)

BANDS = ("coarse", "middle", "fine")  # thirds of the spatial frequencies that the latents can have
PREFIX = "watch/"
CLIPPED = 0.02  # of a picture's range at either end


@dataclass(frozen=True)
class Sign:
    """A figure, the values between which it is as it should be, and what it means beyond them."""

    figure: str
    low: float
    high: float
    below: str
    above: str
    of_first: bool = False  # as a share of the first look's

    def said(self, value: float, first: float) -> str | None:
        share = value / first if self.of_first and first else value
        if self.low <= share <= self.high:
            return None
        what = self.below if share < self.low else self.above
        return f"{what} ({self.figure} {value:.3g}{f', at first {first:.3g}' if self.of_first else ''})"


# Chosen so that the first run of docs/training_goes_wrong.md keeps well within, and the last three do not.
SIGNS = (
    Sign("shift", 0.0, 0.3, "", "samples drift in brightness or colour"),
    Sign("variance", 0.7, 1.3, "samples fade", "samples saturate"),
    Sign("power_fine", 0.5, 1.8, "samples lose detail", "samples grow noise or sharp edges"),
    Sign("diversity", 0.6, float("inf"), "samples of a condition become alike", "", of_first=True),
    Sign("brightness", -0.15, 0.15, "pictures darken", "pictures grow pale"),
    Sign("clipped", float("-inf"), 0.1, "", "pictures saturate: more of them is black or white"),
)


def compared(samples: Tensor, real: Tensor, repeats: int) -> dict[str, float]:
    """Figures of latents [N repeats, C, ..., H, W], `repeats` of a condition in a row, against real ones [N, C, ...].

    shift: between the means of a channel, in deviations of the real ones; root mean square over channels. variance:
    quotient, mean over channels. power_*: quotients of the power in a third of the spatial frequencies, the mean of
    each sample left out. diversity: root mean square distance between samples of a condition, over that between real
    ones of several.
    """
    samples, real = samples.double(), real.double()
    (mean, variance), (mean_real, variance_real) = map(moments, (samples, real))
    floor = torch.finfo(torch.float32).eps
    figures = {
        "shift": ((mean - mean_real).square() / variance_real.clamp(min=floor)).mean().sqrt(),
        "variance": (variance / variance_real.clamp(min=floor)).mean(),
    }
    if samples.dim() >= 4 and min(samples.shape[-2:]) >= 4:
        powers = spectrum(samples) / spectrum(real).clamp(min=floor)
        figures |= {f"power_{band}": power for band, power in zip(BANDS, powers)}
    if repeats > 1 and len(real) > 1:
        alike = distances(samples.unflatten(0, (-1, repeats)).flatten(2))
        figures["diversity"] = (alike / distances(real.flatten(1)[None]).clamp(min=floor)).sqrt()
    return {name: value.item() for name, value in figures.items()}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
    channels = x.transpose(0, 1).flatten(1) if x.dim() > 2 else x.flatten()[None]
    return channels.mean(1), channels.var(1)


def spectrum(x: Tensor) -> Tensor:
    """[3]: mean power of x [..., H, W] in each third of the frequencies, up to the highest along an axis."""
    H, W = x.shape[-2:]
    power = torch.fft.fft2(x - x.mean((-2, -1), keepdim=True), norm="ortho").abs().square()
    rows, columns = torch.fft.fftfreq(H, device=x.device), torch.fft.fftfreq(W, device=x.device)
    radius = (rows[:, None].square() + columns.square()).sqrt() / 0.5
    thirds = (3 * radius).clamp(max=2).long()
    return torch.stack([power[..., thirds == third].mean() for third in range(3)])


def distances(x: Tensor) -> Tensor:
    """Mean squared distance between two different ones of x [groups, n, D] in a group, which is 2 n / (n - 1) times
    the mean squared distance from their mean."""
    n = x.shape[1]
    return 2 * n / (n - 1) * (x - x.mean(1, keepdim=True)).square().sum(-1).mean()


def of_pictures(pictures: Tensor, real: Tensor) -> dict[str, float]:
    """How much brighter pictures in [0, 1] are than real ones, and how much more of them is black or white."""

    def clipped(x: Tensor) -> Tensor:
        return ((x <= CLIPPED) | (x >= 1 - CLIPPED)).double().mean()

    figures = {
        "brightness": pictures.double().mean() - real.double().mean(),
        "clipped": clipped(pictures) - clipped(real),
    }
    return {name: value.item() for name, value in figures.items()}


@torch.no_grad()
def moved(student: nn.Module, start: nn.Module | None, ranks: Ranks) -> float | None:
    """The norm of what training has added to the weights, over that of the weights; None where it is not known from
    where they started. A collective."""
    theirs = {} if start is None else dict(start.named_parameters())
    added = total = torch.zeros((), dtype=torch.float64)

    def squares(x: Tensor, like: Tensor) -> Tensor:
        """Of this process's part; those that several processes have count once in all."""
        return x.double().square().sum().cpu() / (ranks.size / parts(like))

    adapted = adapted_layers(student)
    for _, layer in adapted:
        for name in layer.active_adapters:
            a, b = (gathered(part[name].weight).double() for part in (layer.lora_A, layer.lora_B))
            added = added + layer.scaling[name] ** 2 * ((b.mT @ b) * (a @ a.mT)).sum().cpu() / ranks.size
        weight = layer.base_layer.weight
        total = total + squares(local(widened(weight)), weight)
    for name, p in student.named_parameters() if not adapted else ():
        q = theirs.get(name)
        if p.requires_grad and q is not None and local(p).shape == local(q).shape:
            here, there = local(p), widened(local(q)).to(local(p))
            added = added + squares(here - there, p)
            total = total + squares(there, p)
    sums = ranks.gather(lambda: (added.item(), total.item()))
    whole = sum(size for _, size in sums)
    return (sum(change for change, _ in sums) / whole) ** 0.5 if whole else None


def parts(tensor: Tensor) -> int:
    """Into how many a tensor is split; the rest of the processes have copies of them."""
    if not isinstance(tensor, DTensor):
        return 1
    split = [not placement.is_replicate() for placement in tensor.placements]
    return math.prod(size for size, is_split in zip(tensor.device_mesh.shape, split) if is_split)


@dataclass(frozen=True)
class Watch:
    """What is looked at.

    Attributes:
        start: what the student is a copy of, if that is the teacher.
        batch: conditions on the device, with the data's latents for them or the teacher's.
        first: figures of the first look that had them.
        good: steps of looks at which all was well, the newest last.
    """

    config: RunConfig
    ranks: Ranks
    start: nn.Module | None
    batch: Batch
    first: dict[str, float]
    good: list[int]

    @classmethod
    def of(
        cls, config: RunConfig, dataset: Dataset, guided: Guided, ranks: Ranks, device: torch.device
    ) -> Watch | None:
        """None: watch.every is not set. A collective."""
        wanted = config.watch
        if wanted.every is None:
            return None
        batch = some_samples(dataset, wanted.count).to(device)
        if not getattr(dataset, "has_latents", True):
            sample = sampler_of("flow", guided, config.sampling.teacher_steps, config.sampling)
            batch = Batch(draw(sample, batch, config.sampling.batch, wanted.seed), batch.cond, batch.keys)
        return cls(config, ranks, None if config.teacher.model is not None else guided.model, batch, {}, [0])

    def remember(self, lines: Iterable[Mapping[str, float]]) -> None:
        """The looks of a run before it was stopped, from its log."""
        for line in lines:
            found = {name.removeprefix(PREFIX): x for name, x in line.items() if name.startswith(PREFIX)}
            if found:
                self.judge(int(line["step"]), found)

    def look(
        self,
        step: int,
        stage: int,
        student: TrigFlow,
        sampler: Callable[[int], Sampler],
        average: Mapping[str, Tensor],
    ) -> dict[str, float]:
        """Figures for the log, and a warning of what is wrong with them. A collective; on the first process alone they
        are more than nothing.

        Args:
            sampler: of the student, in a number of steps.
        """
        config, wanted = self.config, self.config.watch
        with averaged(student, average):
            sample = sampler(wanted.steps or max(config.sampling.steps))
            latents = draw(sample, repeated(self.batch, wanted.repeats), config.sampling.batch, wanted.seed)
            distance = moved(student, self.start, self.ranks)
        if not self.ranks.first:
            return {}
        figures = compared(latents, self.batch.x0, wanted.repeats)
        if config.sampling.decode is not None:
            figures |= unseen(lambda: self.decoded(latents))
        if distance is not None:
            figures["distance"] = distance
        before = self.good[-1]
        if wrong := self.judge(step, figures):
            log.warning("step %d: %s.\n  %s", step, "; ".join(wrong), advice(config, stage, before))
        return {f"{PREFIX}{name}": x for name, x in figures.items()}

    def decoded(self, latents: Tensor) -> dict[str, float]:
        decode, size = decoder_of(self.config.sampling), self.config.sampling.batch
        pictures, real = (torch.cat([decode(part) for part in x.float().split(size)]) for x in (latents, self.batch.x0))
        return of_pictures(pictures, real)

    def judge(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """What is wrong, and a note for the next look."""
        for name, value in figures.items():
            self.first.setdefault(name, value)  # a decoder, or repeats, may have come after a stop
        if not (wrong := signs(figures, self.first)):
            self.good.append(step)
        return wrong


def signs(figures: Mapping[str, float], first: Mapping[str, float]) -> list[str]:
    """What is wrong with a look's figures, given those of the first look."""
    return [said for s in SIGNS if s.figure in figures and (said := s.said(figures[s.figure], first[s.figure]))]


def repeated(batch: Batch, times: int) -> Batch:
    """Each sample `times` times in a row."""
    cond = {name: value.repeat_interleave(times, 0) for name, value in batch.cond.items()}
    return Batch(batch.x0.repeat_interleave(times, 0), cond)


def advice(config: RunConfig, stage: int, good: int) -> str:
    """Where the weights are from when all was well."""
    if config.ema.snapshot_every is None:
        return f"It was well at step {good}. With ema.snapshot_every there would be averages to go back to."
    folder = averages_of(config.out, stage)
    older = [s.step for s in snapshots(folder) if s.step <= good]
    if not older:
        return f"It was well at step {good}, and {folder} has no average from before that."
    return f"It was well at step {good}: `jvpgraph export {config.out} --step {max(older)}` gives the average of then."
