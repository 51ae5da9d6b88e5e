"""A finished run: its student, samples of it, and how good they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.sample import first_samples, some_samples
from jvpgraph.trainer.evaluation import distances
from jvpgraph.trainer.evaluation.distances import Quality, table
from jvpgraph.trainer.evaluation.phases import Part, folders_of, note_of, parts_of, settings_of, student_sampler
from jvpgraph.trainer.evaluation.samplers import Sampler, draw, sampler_of
from jvpgraph.trainer.files import naming
from jvpgraph.trainer.model.ema import PowerEMA, averages_of, reconstruct, snapshots
from jvpgraph.trainer.model.networks import (
    build_guided,
    build_network,
    build_student,
    build_teacher,
    device_of,
    moving,
    trainable,
    with_weights,
)
from jvpgraph.trainer.model.quantize import put_on_bytes
from jvpgraph.trainer.run.checkpoint import Checkpoints, OnePiece
from jvpgraph.trainer.run.log import grid
from jvpgraph.trainer.run.origin import digest_of, read_origin
from jvpgraph.trainer.run.preview import decoder_of, picture_of
from jvpgraph.trainer.trigflow import Guided, TrigFlow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a run's folder holds at one of its checkpoints."""

    config: RunConfig
    step: int
    stage: int  # the last one begun
    base: TrigFlow  # what the student was at first
    student: TrigFlow  # frozen, with the averaged weights
    made_from: str | None = None  # digest of the student whose samples the last phase of dmd began from

    @cached_property
    def teacher(self) -> TrigFlow:
        """Frozen; where it is another network than the student, it is built when it is asked for."""
        return self.base if self.config.teacher.model is None else build_teacher(self.config, device_of(self.config))

    @property
    def guided(self) -> Guided:
        """The teacher with the guidance of the run's settings."""
        config = self.config
        return build_guided(self.teacher, config.guidance, device_of(config), scale=config.told_scale)

    @property
    def sampler(self) -> str:
        return self.config.sampler(self.stage)

    @cached_property
    def parts(self) -> list[Part]:
        """Who takes part in its samples, from the noisiest down."""
        return parts_of(self.config, self.stage)

    @cached_property
    def students(self) -> list[TrigFlow]:
        """The run's own, then those of the runs before it that samples go through.

        Raises:
            FileNotFoundError, ValueError: such a run is not there, not done, or has other weights than it had.
        """
        found = [self.student]
        for folder in folders_of(self.parts):
            device = next(self.student.parameters()).device
            found.append(load_earlier(folder, device, guidance=self.config.scale_of_samples(self.stage)).student)
            if len(found) == 2 and self.made_from not in (None, digest_of(found[1])):
                raise ValueError(
                    f"earlier: the student in {folder} has other weights than when this run began with its samples\n"
                    "Give the run as it was: dmd.earlier in config.yaml."
                )
        return found

    def sample(self, steps: int) -> Sampler:
        """Samples of the student, and of those before it. Raises ValueError as `student_sampler`."""
        if note := note_of(self.parts):
            log.warning("%s", note)
        return student_sampler(self.config, self.stage, self.students, steps)

    def check_sampling(self, *steps: int) -> None:
        """Raises ValueError for steps in which samples of the student would be wrong."""
        sampling = self.config.sampling
        self.config.stages[self.stage].objective.check_sampling(steps, sampling.shift, sampling.gamma)


def load_earlier(folder: Path, device: torch.device, *, guidance: float | None = None) -> Run:
    """A run that another one builds on, with the average that is sampled; told that one's guidance scale, if any.

    Raises:
        FileNotFoundError, ValueError: as load_run; or it is not so far.
    """
    told = settings_of(folder).told_scale is not None
    run = load_run(folder, guidance=guidance if told else None, device=device)
    if run.stage != len(run.config.stages) - 1:
        raise ValueError(f"earlier: {folder} has not begun its last stage: let it end first")
    return run


def load_run(
    folder: Path,
    *,
    ema: float | None = None,
    step: int | None = None,
    guidance: float | None = None,
    device: torch.device | None = None,
) -> Run:
    """The student of a run, averaged with relative width `ema` (default: the first of ema.sigma_rel), on a device
    (default: the one of its settings).

    A width that was not tracked is put together from the snapshots of those that were; so is a step whose checkpoint
    was not kept.

    Args:
        guidance: the scale that it is told, instead of sampling.guidance.

    Raises:
        FileNotFoundError: the folder holds no run, or neither checkpoint nor snapshots of that step.
        ValueError: there are no snapshots that could give this width; or the student is told no scale, or not this one;
            or the network below its adapters is another one than when the run began.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: the folder of a run, the `out` of its settings, has one")
    config = settings.load(RunConfig, file)
    if guidance is not None:
        if config.told_scale is None:
            raise ValueError("--guidance: the student of this run learnt one guidance scale\nLeave it out.")
        config = replace(config, sampling=replace(config.sampling, guidance=guidance))
    device = device_of(config) if device is None else device
    checkpoints = Checkpoints(folder / "checkpoints")
    gone = step is not None and not checkpoints.has(step) and has_averages(folder, config, step)
    path = None if step is None or gone else checkpoints.at(step)

    base = build_network(config, device, "model")
    student = build_student(base, config.student, config.told_scale)
    if config.student.lora is not None:
        check_base(folder, base)
    put_on_bytes(student, base, config.bytes_below_adapters)
    ema = config.ema.sigma_rel[0] if ema is None else ema
    weights: Mapping[str, Tensor]
    if step is not None and gone:
        stage = stage_of(config, step)
        weights = reconstruct(averages_of(folder, stage), ema, step=step)
        return Run(config, step, stage, base, with_weights(student, weights))
    state: dict = {"student": moving(student)}
    if ema in config.ema.sigma_rel:
        average = PowerEMA(trainable(student), ema)
        state["ema"] = {f"{ema:g}": average}
    # The run may be going on, and delete a checkpoint while it is read.
    whole = ["student"]
    if path is None:
        step = checkpoints.load_newest(state, partial=True, whole=whole)
    else:
        step = checkpoints.load(state, path, partial=True, whole=whole)
    if step is None:
        raise FileNotFoundError(f"{folder / 'checkpoints'} holds no complete checkpoint: wait until the run has one")
    stage = stage_of(config, step)
    if ema in config.ema.sigma_rel:
        weights = average.parameters
    else:
        weights = reconstruct(averages_of(folder, stage), ema, step=step)
    noted = Noted()
    samples = config.stages[stage].objective.simulated
    if samples is not None and samples.earlier is not None and checkpoints.has(step):
        checkpoints.load({"earlier": OnePiece(noted)}, checkpoints.at(step), partial=True)
    return Run(config, step, stage, base, with_weights(student, weights), noted.digest)


def check_base(folder: Path, base: TrigFlow) -> None:
    """Raises ValueError if a network has other weights than the one that a run's adapters were trained on."""
    origin = read_origin(folder)
    if origin is not None and digest_of(base) != (origin.base or origin.teacher):
        raise ValueError(
            f"model: its weights are others than those that the adapters in {folder} were trained on\n"
            "Put the old ones back, or name where they are in the config.yaml there."
        )


class Noted:
    """What a checkpoint says of the expert of the phase before."""

    digest: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"digest": self.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.digest = state["digest"]


def has_averages(folder: Path, config: RunConfig, step: int) -> bool:
    """Whether there are snapshots of a step."""
    stages = range(len(config.stages))
    return any(snapshot.step == step for i in stages for snapshot in snapshots(averages_of(folder, i)))


def stage_of(config: RunConfig, step: int) -> int:
    """Index of the stage that step `step` belongs to; step 0 to the first."""
    end = 0
    for index, stage in enumerate(config.stages):
        end += stage.steps
        if step <= end:
            return index
    raise ValueError(f"step {step} is beyond the {end} steps of this run's settings")


def sample_run(
    folder: Path, *, steps: int, count: int, ema: float | None, seed: int, out: Path, guidance: float | None = None
) -> Path:
    """Latents for the first `count` conditions of the run's data, as OUT.safetensors, and as a picture OUT.png."""
    run = load_run(folder, ema=ema, guidance=guidance)
    config = run.config
    batch = first_samples(config.data.source.build(), count).to(device_of(config))
    run.check_sampling(steps)
    latents = draw(run.sample(steps), batch, config.sampling.batch, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents.float().cpu(), **dict(batch.cond)}, out.with_suffix(".safetensors"))
    picture = out.with_suffix(".png")
    grid(picture_of(latents, config.sampling), picture, columns=max(1, round(count**0.5)))
    return picture


@dataclass(frozen=True)
class Comparison:
    """Figures of every sampler, one Quality per seed; `str()` is a table."""

    rows: dict[str, list[Quality]]
    samples: dict[str, Tensor]  # of the first seed

    def __str__(self) -> str:
        return table(self.rows)


def evaluate_run(
    folder: Path, *, steps: Sequence[int] = (), seeds: Sequence[int] = (), ema: float | None = None
) -> Comparison:
    """The student in `steps` steps beside its teacher.

    Writes evaluation.json into the run's folder. Defaults are those of the run's settings.

    Raises:
        ValueError: the run has no feature space.
    """
    run = load_run(folder, ema=ema)
    config, origin = run.config, read_origin(folder)
    if origin is not None and digest_of(run.teacher) != origin.teacher:
        log.warning("the teacher has other weights than when the run in %s began: its figures are of another", folder)
    steps, seeds = tuple(steps) or config.sampling.steps, tuple(seeds) or config.evaluation.seeds
    report = compare(run, samplers_of(run, steps), seeds)
    figures = {name: [asdict(quality) for quality in qualities] for name, qualities in report.rows.items()}
    summary = {"step": run.step, "seeds": list(seeds), "samplers": figures}
    with naming(folder / "evaluation.json"):
        (folder / "evaluation.json").write_text(json.dumps(summary, indent=2) + "\n")
    return report


def samplers_of(run: Run, steps: Sequence[int]) -> dict[str, Sampler]:
    """The teacher in its many steps, then the student in each of `steps`."""
    config = run.config
    many = config.sampling.teacher_steps
    run.check_sampling(*steps)
    students = {f"student, {n} step{'s' * (n > 1)}": run.sample(n) for n in steps}
    return {f"teacher, {many} steps": sampler_of("flow", run.guided, many, config.sampling), **students}


def compare(run: Run, samplers: Mapping[str, Sampler], seeds: Sequence[int]) -> Comparison:
    """Every sampler for the data's own conditions, with each seed."""
    config = run.config
    if config.evaluation.features is None:
        raise ValueError("evaluation.features is not set: name a feature space, see jvpgraph.trainer.features")
    data = config.data.source.build()
    if not getattr(data, "has_latents", True):
        raise ValueError(
            "the data set holds prompts only, and samples are compared with real ones: name another source of data, "
            "data.source, with pictures or clips"
        )
    space = config.evaluation.features.build()
    decode = decoder_of(config.sampling)
    real = some_samples(data, config.evaluation.count)
    labels = real.cond.get("labels")

    def features(latents: Tensor) -> Tensor:
        return torch.cat([space(decode(part)) for part in latents.split(config.sampling.batch)])

    real_features = features(real.x0)

    batch = real.to(device_of(config))
    rows: dict[str, list[Quality]] = {}
    samples: dict[str, Tensor] = {}
    for name, sample in tqdm(samplers.items(), desc="sampling", unit="sampler"):
        for seed in seeds:
            latents = draw(sample, batch, config.sampling.batch, seed).cpu()
            samples.setdefault(name, latents)
            quality = distances.compare(
                features(latents),
                real_features,
                neighbours=config.evaluation.neighbours,
                labels=labels,
                real_labels=labels,
                space=space,
            )
            rows.setdefault(name, []).append(quality)
    return Comparison(rows, samples)
