"""Students of other runs that a run builds on: what the next phase of dmd starts from, and whom samples go through."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.evaluation.phases import folders_held, settings_of
from jvpgraph.trainer.model.networks import try_network
from jvpgraph.trainer.noise import Random
from jvpgraph.trainer.objectives import Objective
from jvpgraph.trainer.objectives.simulation import Simulation, simulate_backward
from jvpgraph.trainer.run.build import Networks
from jvpgraph.trainer.run.finished import load_earlier
from jvpgraph.trainer.run.origin import digest_of
from jvpgraph.trainer.run.parallel import Layout
from jvpgraph.trainer.trigflow import TrigFlow, meet


class Expert:
    """Makes x_start from pure noise, with all the steps of its own simulation.

    It is the averaged student of the run's newest checkpoint. A checkpoint of the next phase has its digest: a run that
    goes on with another expert would learn from other samples.
    """

    def __init__(
        self, path: Path, student: TrigFlow, digest: str, simulation: Simulation, before: Expert | None
    ) -> None:
        self.path, self.student, self.digest, self.simulation, self.before = path, student, digest, simulation, before

    @torch.no_grad()
    def __call__(self, batch: Batch, rng: Random) -> Tensor:
        simulation = self.simulation
        return simulate_backward(self.student, batch, simulation.steps, rng, simulation, self.before).x

    @property
    def students(self) -> list[TrigFlow]:
        """Its own, and those of the experts before it."""
        return [self.student, *([] if self.before is None else self.before.students)]

    def state_dict(self) -> dict[str, Any]:
        return {"digest": self.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["digest"] != self.digest:
            raise ValueError(
                f"dmd.earlier: the student in {self.path} has other weights than when this run began. Give the run as "
                "it was, or begin this one with --fresh"
            )


def check_earlier(config: RunConfig, *, has_latents: bool) -> None:
    """Raises FileNotFoundError or ValueError if the run of a phase before is none, or ends where none begins.

    Args:
        has_latents: whether the data has some, with whose noise a phase may start.
    """
    for index, stage in enumerate(config.stages):
        check_before(stage.objective, config.scales_asked(index), has_latents)


def check_before(objective: Objective, scales: tuple[float, float], has_latents: bool) -> None:
    """`check_earlier` for an objective, whose samples are made for guidance scales between two."""
    samples = objective.simulated
    if samples is None or samples.earlier is None:
        return
    run = settings_of(samples.earlier, "dmd.earlier")
    before, learnt = run.stages[-1].objective, run.scales_in(len(run.stages) - 1)
    if before.simulated is None or not meet(before.simulated.end, samples.start):
        where = "has no phase of dmd"
        if before.simulated is not None:
            where = f"ends its phase at {before.simulated.end:.6g} radians"
        raise ValueError(
            f"dmd.earlier: {samples.earlier} {where}, and this one starts at {samples.start:.6g}, so that nobody "
            "learns the times between. Make them one"
        )
    if before.simulated.needs_data and not has_latents:
        raise ValueError(
            f"dmd.earlier: the last stage of {samples.earlier} starts from real latents, and the data set holds "
            "prompts only: name a run that starts from noise, or has an `earlier` itself"
        )
    if learnt is not None and not learnt[0] <= scales[0] <= scales[1] <= learnt[1]:
        raise ValueError(
            f"dmd.earlier: the student of {samples.earlier} learnt guidance scales from {learnt[0]:g} to {learnt[1]:g} "
            f"in its last stage, and is asked for {scales[0]:g} to {scales[1]:g} here: give guidance.scale within these"
        )
    check_before(before, scales, has_latents)


def expert_of(objective: Objective, layout: Layout, sample: Batch, guidance: float | None) -> Expert | None:
    """The expert that the settings name, with those before it; None: they name none.

    Args:
        guidance: scale that they are told in samples, if they are told any.

    Raises:
        FileNotFoundError, ValueError: there is no such run, its phase ends elsewhere, or it has other latents.
    """
    if objective.simulated is None or objective.simulated.earlier is None:
        return None
    path = objective.simulated.earlier
    student, digest = earlier_student(path, layout, sample, guidance)
    own = settings_of(path).stages[-1].objective
    return Expert(path, student, digest, own.simulated, expert_of(own, layout, sample, guidance))


def students_of(
    config: RunConfig, stage: int, student: TrigFlow, expert: Expert | None, layout: Layout, sample: Batch
) -> list[TrigFlow]:
    """Whom samples of a stage go through: its student, and those of the runs before, as far as samples are made.

    Args:
        expert: of the stage, whose networks are there already.
    """
    found = [student, *([] if expert is None else expert.students)]
    rest = folders_held(config, stage)[len(found) - 1 :]
    return [*found, *(earlier_student(folder, layout, sample, config.scale_of_samples(stage))[0] for folder in rest)]


def try_stages(config: RunConfig, first: int, layout: Layout, networks: Networks, sample: Batch) -> None:
    """Builds what the stages from one on begin with and drops it again: before a folder is made, and not after hours.

    Raises:
        FileNotFoundError, ValueError: one of them could not begin.
    """
    ahead = [*enumerate(config.stages)][first:]
    if any(stage.objective.fake_score is not None for _, stage in ahead):
        networks.new_student()
    for index, stage in ahead:
        expert = expert_of(stage.objective, layout, sample, config.scale_of_samples(index))
        students_of(config, index, networks.student, expert, layout, sample)


def earlier_student(path: Path, layout: Layout, sample: Batch, guidance: float | None) -> tuple[TrigFlow, str]:
    """The student of another run, spread over the processes, and the digest of its weights. Raises as `expert_of`."""
    # on the CPU, where there is room for what it is made from
    student = load_earlier(path, torch.device("cpu"), guidance=guidance).student
    digest = digest_of(student)
    student = layout.spread(student)
    try_network(f"earlier: the student in {path} cannot run with a sample", student, sample.x0, sample.cond)
    return student, digest
