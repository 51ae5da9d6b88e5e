"""The expert of an earlier phase: a run whose student makes what the next phase of dmd starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.model.networks import try_network
from jvpgraph.trainer.noise import Random
from jvpgraph.trainer.objectives import Objective
from jvpgraph.trainer.objectives.simulation import Simulation, simulate_backward
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.run.origin import digest_of
from jvpgraph.trainer.run.parallel import Layout
from jvpgraph.trainer.trigflow import TrigFlow


class Expert:
    """Makes x_start from pure noise, with all the steps of its own simulation.

    It is the averaged student of the run's newest checkpoint. A checkpoint of the next phase has its digest: a run that
    goes on with another expert would learn from other samples.
    """

    def __init__(self, path: Path, student: TrigFlow, simulation: Simulation, before: Expert | None) -> None:
        self.path, self.student, self.simulation, self.before = path, student, simulation, before
        self.digest = digest_of(student)

    @torch.no_grad()
    def __call__(self, batch: Batch, rng: Random) -> Tensor:
        simulation = self.simulation
        return simulate_backward(self.student, batch, simulation.steps, rng, simulation, self.before).x

    def state_dict(self) -> dict[str, Any]:
        return {"digest": self.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["digest"] != self.digest:
            raise ValueError(
                f"dmd.earlier: the student in {self.path} has other weights than when this run began. Give the run as "
                "it was, or begin this one with --fresh"
            )


def check_earlier(objective: Objective) -> None:
    """Raises FileNotFoundError or ValueError if the run of the phase before is none, or ends where none begins."""
    score = objective.fake_score
    if score is None or score.earlier is None:
        return
    file = score.earlier / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"dmd.earlier: {file} does not exist: the folder of a run, the `out` of its settings")
    phase = settings.load(RunConfig, file).stages[-1].objective.phase
    if phase is None or phase[1] != score.start:
        where = "has no phase of dmd" if phase is None else f"ends its phase at {phase[1]:.6g} radians"
        raise ValueError(
            f"dmd.earlier: {score.earlier} {where}, and this one starts at {score.start:.6g}, so that nobody learns "
            "the times between. Make them one"
        )


def expert_of(objective: Objective, layout: Layout, sample: Batch) -> Expert | None:
    """The expert that the settings name, with those before it; None: they name none.

    Raises:
        FileNotFoundError, ValueError: there is no such run, its phase ends elsewhere, or it has other latents.
    """
    score = objective.fake_score
    if score is None or score.earlier is None:
        return None
    check_earlier(objective)
    run = load_run(score.earlier)
    own = run.config.stages[-1].objective
    if run.stage != len(run.config.stages) - 1:
        raise ValueError(f"dmd.earlier: {score.earlier} has not begun its last stage: let it end first")
    expert = Expert(score.earlier, run.student, own.fake_score.simulation, expert_of(own, layout, sample))
    layout.spread(run.student)
    try_network(f"the student in {score.earlier} cannot run with a sample", run.student, sample.x0, sample.cond)
    return expert
