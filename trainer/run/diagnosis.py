"""Where the tangents of a run's student lose their digits, at one of its checkpoints: diagnosis.json and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import jvpgraph
from jvpgraph.trainer.data.sample import some_samples
from jvpgraph.trainer.files import draft_of
from jvpgraph.trainer.model.networks import build_guided, device_of
from jvpgraph.trainer.noise import noise_like
from jvpgraph.trainer.run.finished import Run, load_run
from jvpgraph.trainer.trigflow import add_noise, expand_like

FILE = "diagnosis.json"
TIMES = (0.02, 0.2, 0.8, 1.3, 1.52, 1.56)  # radians: both ends, where coefficients and embeddings are special
STEPS = tuple(2.0**-k for k in (2, 5, 8, 11))  # of central differences
SHOWN = 3


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
    out = folder if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    found = jvpgraph.diagnose(
        run.student,
        reference=reference,
        times=times,
        time=Trajectory(run, count, seed),
        steps=steps,
        config=jvpgraph.Config(tangent_precision=config.precision.of_tangents),
    )
    found = replace(found, about=f"step {run.step} of {folder}")
    with draft_of(out / FILE) as draft:
        found.save(draft)
    with draft_of((out / FILE).with_suffix(".png")) as draft:
        found.plot(draft)
    return found


class Trajectory:
    """Arguments and tangents of the student at a time, as the consistency loss has them."""

    def __init__(self, run: Run, count: int, seed: int) -> None:
        config = run.config
        device = device_of(config)
        self.batch = some_samples(config.data.source.build(), count).to(device)
        self.guided = build_guided(run.teacher, config.guidance, device)
        self.second_time = config.stages[run.stage].objective.second_time
        self.seed = seed

    @torch.no_grad()
    def __call__(self, time: float) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        x0 = self.batch.x0.double()
        rng = torch.Generator(x0.device).manual_seed(self.seed)
        t = torch.full((len(x0),), time, dtype=torch.float64, device=x0.device)
        x = add_noise(x0, noise_like(x0, rng), t)
        speed = t.cos() * t.sin()
        tangents = {"x": expand_like(speed, x) * self.guided(x, t, self.batch.cond), "t": speed}
        return (x, t, self.batch.cond, *([t / 2] if self.second_time else [])), {}, tangents


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
    lines = [f"  The last diagnosis, {found.about}: tangents off by up to {found.tangent_error:.1e}; most is added by"]
    for op in found.worst(SHOWN):
        lines.append(f"    {op.op} in {op.module or 'the student'}, {op.line}: {op.badness:.1e}")
    return lines
