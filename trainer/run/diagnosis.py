"""Where the tangents of a run's student lose their digits, at a checkpoint or while it is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import jvpgraph
from jvpgraph.precision import HALF
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.sample import Dataset, some_samples
from jvpgraph.trainer.files import draft_of
from jvpgraph.trainer.model.networks import device_of
from jvpgraph.trainer.model.student import repeated_blocks
from jvpgraph.trainer.noise import noise_like
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.run.parallel import Layout
from jvpgraph.trainer.trigflow import Guided, TrigFlow, add_noise, along_trajectory

log = logging.getLogger(__name__)

FILE = "diagnosis.json"
TIMES = (0.02, 0.2, 0.8, 1.3, 1.52, 1.56)  # radians: both ends, where coefficients and embeddings are special
STEPS = tuple(2.0**-k for k in (2, 5, 8, 11))  # of central differences
PROBE_TIMES = (0.02, 0.8, 1.56)
PROBED = 2  # samples
SHOWN = 3  # of the worst ops


def diagnose_run(
    folder: Path,
    *,
    times: Sequence[float] = TIMES,
    count: int = 2,
    ema: float | None = None,
    reference: str = "float64",
    steps: Sequence[float] = STEPS,
    seed: int = 0,
    out: Path | None = None,
) -> jvpgraph.Diagnosis:
    """The student along its teacher's trajectory, as in training, for the first `count` samples of the data.

    Writes diagnosis.json and diagnosis.png.

    Args:
        folder: of a run.
        times: TrigFlow's, in radians.
        ema: which average of the weights; default: the first.
        reference: "float64" or "float32".
        steps: of central differences, whose errors are told as well; () for none.
        seed: of the noise.
        out: where to write (default: the folder).

    Raises:
        FileNotFoundError: the folder holds no run, or no checkpoint.
        ValueError: a time is not between 0 and pi / 2, or the run has no average of that width.
    """
    outside = [t for t in times if not 0 < t < math.pi / 2]
    if outside or not times:
        wrong = ", ".join(f"{t:g}" for t in outside) or "no time at all"
        raise ValueError(f"--times: {wrong}\nTimes are in radians, between 0 (data) and 1.5708 (noise).")
    run = load_run(folder, ema=ema)
    config = run.config
    device = device_of(config)
    batch = some_samples(config.data.source.build(), count).to(device)
    second_time = is_asked_for(config, run.stage)
    path = Trajectory(batch, run.guided, second_time, seed)
    out = folder if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    found = jvpgraph.diagnose(
        run.student,
        reference=reference,
        times=times,
        time=path,
        steps=steps,
        config=jvpgraph.Config(tangent_precision=config.precision.of_tangents),
    )
    found = replace(found, about=f"step {run.step} of {folder}")
    save(found, out)
    return found


def save(found: jvpgraph.Diagnosis, folder: Path) -> None:
    """diagnosis.json and diagnosis.png."""
    with draft_of(folder / FILE) as draft:
        found.save(draft)
    with draft_of((folder / FILE).with_suffix(".png")) as draft:
        found.plot(draft)


def is_asked_for(config: RunConfig, stage: int) -> bool:
    """Whether a stage asks its student at a second time."""
    return config.stages[stage].objective.second_time or config.student.added_time is not None


class Trajectory:
    """Arguments and tangents of the student at a time, as the consistency loss has them."""

    def __init__(self, batch: Batch, guided: Guided, second_time: bool, seed: int) -> None:
        self.batch, self.guided, self.second_time, self.seed = batch, guided, second_time, seed

    @torch.no_grad()
    def __call__(self, time: float) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        x0 = self.batch.x0.double()
        rng = torch.Generator(x0.device).manual_seed(self.seed)
        t = torch.full((len(x0),), time, dtype=torch.float64, device=x0.device)
        x = add_noise(x0, noise_like(x0, rng), t)
        tangents = along_trajectory(x, t, self.guided(x, t, self.batch.cond))
        return (x, t, self.batch.cond, *([t / 2] if self.second_time else [])), {}, tangents


class Probe:
    """Looks at the tangents of the student that is being trained, on the same samples each time.

    Nothing is taken from the run's random streams.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, guided: Guided, layout: Layout) -> None:
        self.config, self.guided, self.ranks = config, guided, layout.ranks
        self.batch = some_samples(dataset, PROBED).to(layout.device)

    def look(self, step: int, stage: int, student: TrigFlow) -> dict[str, float]:
        """For the log: the error of the tangent and its largest growth in a block, by time. A collective.

        Writes diagnosis.json and diagnosis.png, and warns above the limit.
        """
        config = self.config
        second_time = is_asked_for(config, stage)
        found = jvpgraph.diagnose(
            student,
            reference="float32" if any(p.dtype in HALF for p in student.parameters()) else "float64",
            times=PROBE_TIMES,
            time=Trajectory(self.batch, self.guided, second_time, seed=0),
            steps=(),
            config=jvpgraph.Config(tangent_precision=config.precision.of_tangents),
        )
        found = replace(found, about=f"step {step} of {config.out}")
        repeated = set(repeated_blocks(student))
        blocks = {name for name, module in student.named_modules() if module in repeated}
        values: dict[str, float] = {}
        for output in found.outputs:
            values[f"tangent_error/t={output.time:g}"] = max(output.tangent.values())
            grown = [m.amplifies for m in found.modules if m.time == output.time and m.module in blocks and m.norm_in]
            values[f"tangent_growth/t={output.time:g}"] = max(grown, default=1.0)
        values = {name: max(each) for name, each in _by_name(self.ranks.gather(lambda: values)).items()}
        self.ranks.on_first(lambda: save(found, config.out))
        worst = max(value for name, value in values.items() if name.startswith("tangent_error"))
        if self.ranks.first and not worst <= config.precision.probe_limit:
            log.warning("step %d: tangents are off by up to %.1e\n%s", step, worst, "\n".join(worst_of(found)))
        return values


def _by_name(several: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [each[name] for each in several] for name in several[0]}


def worst_of(found: jvpgraph.Diagnosis) -> list[str]:
    """Lines on the ops that add most."""
    return [f"    {op.op} in {op.module or 'the student'}, {op.line}: {op.badness:.1e}" for op in found.worst(SHOWN)]


def last_diagnosis(folder: Path) -> list[str]:
    """Lines on what `jvpgraph diagnose` has found in the folder of a run, or that it can be asked."""
    path = folder / FILE
    ask = f"  `jvpgraph diagnose {folder}` says which ops lose the tangent's digits at its last checkpoint."
    if not path.is_file():
        return [ask]
    try:
        found = jvpgraph.Diagnosis.load(path)
    except (ValueError, TypeError, KeyError):  # of another version, or half a file: no reason to hide what went wrong
        return [ask]
    head = f"  The last diagnosis, {found.about}: tangents off by up to {found.tangent_error:.1e}; most is added by"
    return [head, *worst_of(found)]
