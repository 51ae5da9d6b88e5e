"""What can be known before the first step, and before a folder is made: files, plugs, sizes, and a look at the data."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.sample import Dataset, Sample, collate, read_sample, shorten
from jvpgraph.trainer.evaluation.phases import note_of, parts_of, settings_of
from jvpgraph.trainer.pictures import mp4_writer
from jvpgraph.trainer.plug import Plug, PlugError

log = logging.getLogger(__name__)

LOOKED_AT = 32  # samples, evenly spaced over the data set
BUCKETS = 8  # of which so many are looked into
USUAL = (0.4, 2.5)  # deviations of latents that nobody is warned of


def data_of(config: RunConfig) -> Dataset:
    """The data set, once everything else that the settings name is known to be there.

    Raises:
        ValueError: of several problems, all at once; a single one as it is.
    """
    problems: list[Exception] = []

    def attempt(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (ValueError, OSError, ImportError) as error:
            problems.append(error)
            return None

    for key, plug in plugs_of(config):
        attempt(plug.function)
        for name, path in paths_of(plug):
            attempt(partial(_exists, f"{key}.options.{name}", path))
    if config.guidance.negative_file is not None:
        attempt(lambda: _exists("guidance.negative_file", config.guidance.negative_file))
    if config.log.film == "mp4":
        attempt(mp4_writer)
    dataset = attempt(config.data.source.build)
    unlike = {str(problem): problem for problem in problems}
    if len(unlike) > 1:
        kind = PlugError if all(isinstance(problem, PlugError) for problem in problems) else ValueError
        lines = "\n".join(unlike).replace("\n", "\n  ")
        raise kind(f"{len(unlike)} problems before the first step:\n  {lines}\nMend them and start again.")
    if unlike:
        raise problems[0]
    return dataset


def plugs_of(config: RunConfig) -> list[tuple[str, Plug]]:
    named = [("model", config.model), ("teacher.model", config.teacher.model)]
    named += [("data.source", config.data.source), ("sampling.decode", config.sampling.decode)]
    named += [(f"validation.measures.{name}", plug) for name, plug in config.validation.measures.items()]
    return [(key, plug) for key, plug in named if plug is not None]


def paths_of(plug: Plug) -> list[tuple[str, Path]]:
    """Options that are called a path or a file; those of shards may have braces, and are the data set's to check."""
    names = [name for name in plug.options if name.split("_")[-1] in ("path", "file", "weights")]
    return [(name, Path(plug.options[name])) for name in names if isinstance(plug.options[name], str)]


def _exists(key: str, path: Path | None) -> None:
    if path is not None and not path.exists():
        raise FileNotFoundError(f"{key}: {path} does not exist; give the path of what is there")


def look(config: RunConfig, dataset: Dataset) -> list[Batch]:
    """The extremes of the conditions that are whole numbers, one sample each, after a look at LOOKED_AT samples.

    Raises:
        ValueError: what would end the run later; all of it.
        BadShard: a sample cannot be read, and the data set says to stop then.
    """
    problems = [
        f"stages.{i}.batch is {stage.batch}, and the data set has {len(dataset)} samples: take a smaller batch"
        for i, stage in enumerate(config.stages)
        if stage.batch > len(dataset)
    ]
    seen: list[Sample] = []
    for samples in samples_by_shape(dataset):
        seen += samples
        try:
            collate(samples)
        except ValueError as error:
            problems.append(str(error))
    problems += [problem for sample in seen for problem in problems_of(sample)][:5]
    if problems:
        raise ValueError("\n".join(problems))
    if getattr(dataset, "has_latents", True):
        warn_of_scale(config, seen)
    return extremes(seen)


def warn_of_settings(config: RunConfig) -> None:
    """What stages end before, what a student may unlearn, and what is not to be expected of samples."""
    for index, stage in enumerate(config.stages):
        waits = dict(stage.objective.waits)
        if stage.student.warmup:
            waits["student.lr is reached"] = stage.student.warmup
        for name, settings, there in (
            ("fake", stage.fake, stage.objective.fake_score),
            ("critic", stage.critic, stage.objective.critic),
        ):
            if there is not None and settings.warmup:
                waits[f"{name}.lr is reached"] = stage.fake_begins + settings.warmup
        for what, updates in waits.items():
            if updates >= stage.steps:
                log.warning(
                    "stages.%d: %s after %d updates, and the stage has %d steps", index, what, updates, stage.steps
                )
        if stage.objective.needs_negative and not stage.condition_dropout:
            log.warning(
                "stages.%d: %s takes guidance from the student's own answer to the negative condition, which "
                "condition_dropout 0 never trains: 0.1 is usual",
                index,
                stage.objective.name,
            )
        samples = stage.objective.simulated
        if config.told_scale is not None and samples is not None and samples.earlier is not None:
            before = settings_of(samples.earlier)
            if before.told_scale is None:
                log.warning(
                    "stages.%d: whatever scale samples are told, they begin with those of %s, which learnt one scale",
                    *(index, samples.earlier),
                )
        if config.looked_at and (note := note_of(parts_of(config, index))):
            log.warning("stages.%d: %s", index, note)


def samples_by_shape(dataset: Dataset) -> list[list[Sample]]:
    """Samples that come together in batches."""
    buckets: Sequence[Sequence[int]] = getattr(dataset, "buckets", [range(len(dataset))])
    chosen = sorted(buckets, key=len, reverse=True)[:BUCKETS]
    found = []
    for members in chosen:
        count = min(len(members), max(2, LOOKED_AT // len(chosen)))
        places = {round(i * (len(members) - 1) / max(1, count - 1)) for i in range(count)}
        samples = [read_sample(dataset, members[place]) for place in sorted(places)]
        found.append([sample for sample in samples if sample is not None])
    return [samples for samples in found if samples]


def problems_of(sample: Sample) -> list[str]:
    found = []
    for name, value in {"x0": sample.x0, **sample.cond}.items():
        if not value.numel():
            tokens = "a prompt of 0 tokens? Leave the sample out, or encode an empty text"
            found.append(f"sample {sample.key}: {name} is empty, {list(value.shape)}: {tokens}")
        elif bad := int((~value.isfinite()).sum()):
            found.append(
                f"sample {sample.key}: {name}: {bad} of {value.numel()} values are NaN or infinite: leave it out"
            )
    return found


def extremes(samples: Sequence[Sample]) -> list[Batch]:
    """For each condition of whole numbers, such as labels, the samples with its smallest and its largest one."""
    names = [name for name, x in samples[0].cond.items() if not x.is_floating_point()] if samples else []
    chosen = {f.key: f for name in names for f in _ends(samples, name)}
    return [collate([sample]) for sample in chosen.values()]


def _ends(samples: Sequence[Sample], name: str) -> tuple[Sample, Sample]:
    return min(samples, key=lambda s: int(s.cond[name].min())), max(samples, key=lambda s: int(s.cond[name].max()))


def warn_of_scale(config: RunConfig, samples: Sequence[Sample]) -> None:
    """Latents whose mean and deviation are far from 0 and 1, with the shift and scale that would be right."""
    if not samples:
        return
    channels = len(samples[0].x0) if samples[0].x0.dim() > 1 else 1
    values = torch.cat([sample.x0.double().reshape(channels, -1) for sample in samples], dim=1)  # [C, ...]
    mean, deviation = values.mean().item(), values.std().item()
    if USUAL[0] <= deviation <= USUAL[1] and abs(mean) <= 1:
        return
    log.warning(
        "latents have mean %.3g and deviation %.3g (%d samples), and should have about 0 and 1: %s",
        *(mean, deviation, len(samples), advice_of_scale(config, values, deviation)),
    )


def advice_of_scale(config: RunConfig, values: Tensor, deviation: float) -> str:
    plug = config.data.source
    if not deviation or not {"scale", "shift"} <= inspect.signature(plug.function()).parameters.keys():
        return f"{plug.load} has to normalise them, or the run learns at other noise levels than it says"
    means, deviations = values.mean(1), values.std(1)
    if bool((deviations > 0).all()) and float(deviations.max() / deviations.min()) > 1.5:
        pass  # a number for each channel
    else:
        means, deviations = values.mean()[None], values.std()[None]
    scale, shift = (torch.as_tensor(plug.options.get(key, 1.0 * (key == "scale"))) for key in ("scale", "shift"))
    right = {"shift": shift + means / scale, "scale": scale / deviations}
    return " ".join(f"data.source.options.{name}={_brief(value)}" for name, value in right.items()) + " would be right"


def _brief(value: Tensor) -> str:
    numbers = [float(f"{x:.4g}") for x in value.flatten().tolist()]
    return str(numbers[0]) if len(numbers) == 1 else str(numbers).replace(" ", "")


def shown(batch: Batch) -> str:
    """A sample and its whole numbers, for errors."""
    numbers = [f"{n} {x.flatten().tolist()}" for n, x in batch.cond.items() if not x.is_floating_point()]
    return f"sample {', '.join(batch.keys)} ({shorten(numbers)})"
