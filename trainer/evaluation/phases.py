"""Students of parts of the times: which of them takes a sample when, from noise to data.

A phase of dmd ends where the next one starts, and the student of the next is asked there itself, with fresh noise, as
in training. Students that were trained apart meet where the times of the one for low noise end (`times.between`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.evaluation.samplers import Sampler, few_step_times, sampler_of
from jvpgraph.trainer.noise import noise_like
from jvpgraph.trainer.objectives.dcm import euler_step
from jvpgraph.trainer.objectives.simulation import Simulation
from jvpgraph.trainer.times import equal_steps, from_flow_time
from jvpgraph.trainer.trigflow import HALF_PI, add_noise, clean_image, level, meet

RUNS = 8  # that may follow one another


@dataclass(frozen=True)
class Part:
    """What a student does of the way from noise to data.

    Attributes:
        config, stage: of the run that trained it there.
        folders: of the runs from the one that was asked for to this one; empty: the one that was asked for.
        start, end: radians.
    """

    config: RunConfig
    stage: int
    folders: tuple[Path, ...]
    start: float
    end: float

    @property
    def kind(self) -> str:
        return self.config.sampler(self.stage)

    @property
    def simulation(self) -> Simulation | None:
        """Of the steps that it learnt to make, if it did."""
        samples: Simulation | None = self.config.stages[self.stage].objective.simulated
        return None if samples is None or samples.rollout == "once" else samples

    @property
    def has_fixed_times(self) -> bool:
        return self.simulation is not None and bool(self.simulation.fixed_times)

    @property
    def asked_there_alone(self) -> bool:
        """Whether it was trained at the times of its simulation alone, and those are few.

        Jumps from other times may have been learnt in a stage before.
        """
        few = self.simulation is not None and (self.simulation.steps == 1 or self.has_fixed_times)
        alone = self.config.stages[self.stage].objective.only_simulated
        return few and alone and (self.kind == "consistency" or self.stage == 0)

    @property
    def times(self) -> list[float]:
        """Radians at which it may be asked, falling; the first one always, and no more than in its simulation."""
        sampling, simulation = self.config.sampling, self.simulation
        first = sampling.start(self.kind) if self.start == HALF_PI else self.start
        fixed = () if simulation is None else simulation.fixed_times
        between = [t for t in fixed or sampling.middle_times if self.end < t < first]
        return [first, *(between if simulation is None else between[: simulation.steps - 1])]


@dataclass(frozen=True)
class Leg:
    """Steps of one student: `times` in radians, falling, at which it is asked; `end` is where the last one lands."""

    owner: int  # 0: the student of the run that was asked for, 1: that of the run before it, ...
    kind: str  # consistency, mean_flow or flow
    times: tuple[float, ...]
    end: float


def parts_of(config: RunConfig, stage: int, folders: tuple[Path, ...] = ()) -> list[Part]:
    """From the noisiest down, for a stage of a run: of its own, of stages before it, of runs that it names.

    Raises:
        FileNotFoundError: a run that it names is not there.
        ValueError: it cannot be one that comes before.
    """
    objective, sampling = config.stages[stage].objective, config.sampling
    start, end = objective.span
    named = None if objective.simulated is None else objective.simulated.earlier
    if named is not None:
        start = objective.simulated.start
    noisiest = sampling.start("consistency")
    # what samples begin with is noise enough, and the noise that is left of them data
    start = HALF_PI if named is None and start >= noisiest else start
    end = 0.0 if end <= HALF_PI - noisiest else end
    before: list[Part] = []
    if named is None and stage > 0:
        before = parts_of(config, stage - 1, folders)
    elif start < HALF_PI and (named := named or sampling.earlier) is not None:
        other = settings_of(named)
        if len(folders) == RUNS:
            raise ValueError(f"more than {RUNS} runs, each of which names the next one as earlier: {named} is the last")
        before = parts_of(other, len(other.stages) - 1, (*folders, named))
    above = [replace(part, end=max(part.end, start)) for part in before if part.start > start]
    below = [replace(part, start=min(part.start, end)) for part in before if part.end < end]
    return [*above, Part(config, stage, folders, start, end), *below]


def folders_of(parts: Iterable[Part]) -> tuple[Path, ...]:
    """Of the runs before, the nearest first."""
    return max((part.folders for part in parts), key=len)


def folders_held(config: RunConfig, stage: int) -> tuple[Path, ...]:
    """Of the runs whose students are there in a stage: what it starts from, and whom its samples go through."""
    found, samples = list[Path](), config.stages[stage].objective.simulated
    while samples is not None and samples.earlier is not None:
        found.append(samples.earlier)
        samples = settings_of(samples.earlier).stages[-1].objective.simulated
    return folders_of(parts_of(config, stage)) if config.looked_at else tuple(found)


def settings_of(folder: Path, key: str = "earlier") -> RunConfig:
    """Of a run that was begun. Raises FileNotFoundError."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{key}: {file} does not exist: the folder of a run, the `out` of its settings")
    return settings.load(RunConfig, file)


def is_whole(parts: Sequence[Part]) -> bool:
    """Whether one student, of one stage, knows all times."""
    return len(parts) == 1 and (parts[0].start, parts[0].end) == (HALF_PI, 0)


def knows_all_times(parts: Sequence[Part]) -> bool:
    """Whether samples may be made in any number of steps, at any times."""
    return is_whole(parts) and not parts[0].asked_there_alone


def note_of(parts: Sequence[Part]) -> str:
    """What has to be said of samples by these; empty: nothing."""
    if not parts[-1].end:
        return ""
    return (
        f"the samples are what the student implies at rectified-flow time {said(parts[-1].end)}, where its phase ends: "
        "clean images whose details are for the phase after it to make"
    )


def check_from_noise(parts: Sequence[Part]) -> None:
    """Raises ValueError if samples could not begin with noise, or would meet times that nobody was trained for."""
    if parts[0].start < HALF_PI:
        raise ValueError(
            f"the student begins at {parts[0].start:.6g} radians, rectified-flow time {said(parts[0].start)}, and was "
            "not trained on noisier samples, so that it makes none from noise\nName the run whose student makes what "
            "it begins from: dmd.earlier; or, if they were trained apart, sampling.earlier."
        )
    for one, other in pairwise(parts):
        if not meet(one.end, other.start):
            raise ValueError(
                f"nobody was trained between {one.end:.6g} radians (rectified-flow time {said(one.end)}), where "
                f"{named(one)} ends, and {other.start:.6g} ({said(other.start)}), where {named(other)} begins\n"
                "Make them one."
            )


def said(t: float) -> str:
    return f"{level(t):.4g}"


def named(part: Part) -> str:
    return f"the student of {part.folders[-1] if part.folders else 'this run'}"


def legs_of(parts: Sequence[Part], steps: int) -> list[Leg]:
    """How many steps are taken by whom: one by each, and of the others as many as it has times by the noisiest first,
    since what the next one learnt from was made with all of them.

    Raises:
        ValueError: they do not go from noise to data, or have not so many times.
    """
    check_from_noise(parts)
    kinds = {part.kind for part in parts}
    if parts[-1].config.sampling.gamma and "mean_flow" in kinds:
        raise ValueError(
            f"sampling.gamma is {parts[-1].config.sampling.gamma:g}, by which jumps go beyond where they end, and this "
            "student was trained for few times or for a part of them: set it to 0"
        )
    if len(kinds) == 1 and kinds != {"consistency"} and not any(part.has_fixed_times for part in parts):
        return legs_on_grid(parts, steps)
    times = [part.times for part in parts]
    most = sum(map(len, times))
    if not len(parts) <= steps <= most:
        each = ", ".join(f"{len(own)} from {said(part.start)} on" for part, own in zip(parts, times))
        raise ValueError(
            f"{steps} step{'s' * (steps > 1)}: this run's samples take {len(parts)} to {most} ({each}, in "
            "rectified-flow time). Change sampling.steps; or give more times, dmd.fixed_times or sampling.middle_times"
        )
    legs, left = [], steps
    for i, (part, own) in enumerate(zip(parts, times)):
        taken = min(len(own), left - (len(parts) - 1 - i))
        left -= taken
        # the last one may end above 0: of its clean images nothing below that was trained, but they can be looked at
        lands = 0.0 if part is parts[-1] and part.kind == "consistency" else part.end
        legs.append(Leg(len(part.folders), part.kind, tuple(own[:taken]), lands))
    return legs


def legs_on_grid(parts: Sequence[Part], steps: int) -> list[Leg]:
    """Even steps, shifted; for jumps the nearest time to where two students meet is moved there."""
    if steps < len(parts):
        raise ValueError(
            f"{steps} steps are fewer than the {len(parts)} students that take part: change sampling.steps"
        )
    sampling = parts[-1].config.sampling
    low, high = level(parts[-1].end), level(sampling.start(parts[0].kind))
    grid = from_flow_time(low + (high - low) * equal_steps(steps, sampling.shift).flip(0)).tolist()
    if parts[0].kind == "mean_flow":
        free = list(range(1, steps))
        for part in parts[1:]:
            nearest = min(free, key=lambda i: abs(grid[i] - part.start))
            grid[nearest] = part.start
            free.remove(nearest)
        grid.sort(reverse=True)
    legs = []
    for part in parts:
        own = [i for i, t in enumerate(grid[:-1]) if part.end < t <= part.start]
        if own:
            legs.append(Leg(len(part.folders), part.kind, tuple(grid[i] for i in own), grid[own[-1] + 1]))
    return legs


def times_of(config: RunConfig, stage: int, steps: int) -> list[float]:
    """Radians at which samples in so many steps of clean images and noise in turn are made, falling.

    Raises:
        ValueError: there are not so many.
    """
    parts = parts_of(config, stage)
    if knows_all_times(parts):
        return few_step_times(steps, config.sampling)
    return [t for leg in legs_of(parts, steps) for t in leg.times]


def check_steps(config: RunConfig, stage: int, counts: Iterable[int]) -> None:
    """Raises ValueError if the run's samples in so many steps cannot be made.

    A student that begins below pure noise may go without, if nobody looks at it while it is trained.
    """
    parts = parts_of(config, stage)
    if config.sampling.earlier is not None and stage == len(config.stages) - 1 and not any(p.folders for p in parts):
        raise ValueError(
            "sampling.earlier: the student of this run makes samples from noise by itself\nLeave it out; a student of "
            "lower times says so by `times.between`, or by `start` of dmd."
        )
    if parts[0].start < HALF_PI and not config.looked_at:
        return
    for steps in sorted(counts):
        if not knows_all_times(parts):
            legs_of(parts, steps)
        elif config.sampler(stage) == "consistency":
            few_step_times(steps, config.sampling)


def student_sampler(config: RunConfig, stage: int, students: Sequence[nn.Module], steps: int) -> Sampler:
    """Samples in so many steps by the student of a stage, and by those before it.

    Args:
        students: the run's own, then that of the run that it names, and so on.

    Raises:
        ValueError: such samples cannot be made.
    """
    parts = parts_of(config, stage)
    if knows_all_times(parts):
        return sampler_of(config.sampler(stage), students[0], steps, config.sampling)
    legs = legs_of(parts, steps)

    def sample(batch: Batch, rng: torch.Generator) -> Tensor:
        return sample_in_legs(students, legs, batch, rng)

    return sample


@torch.no_grad()
def sample_in_legs(students: Sequence[nn.Module], legs: Sequence[Leg], batch: Batch, rng: torch.Generator) -> Tensor:
    """As `sample_consistency`, `sample_mean_flow` and `sample_euler` do, each leg by its own student; float64."""
    x = math.sin(legs[0].times[0]) * noise_like(batch.x0, rng)
    for leg in legs:
        student = students[leg.owner]
        for start, end in pairwise((*leg.times, leg.end)):
            t, r = (torch.full((len(batch),), time, dtype=torch.float64, device=x.device) for time in (start, end))
            if leg.kind == "mean_flow":
                x = euler_step(student(x, t, batch.cond, r), x, t, r)
            elif leg.kind == "flow":
                x = euler_step(student(x, t, batch.cond), x, t, r)
            else:
                x0 = clean_image(student(x, t, batch.cond), x, t)
                x = add_noise(x0, noise_like(x0, rng), r) if end else x0
    return x
