"""First light: distil a diffusion transformer on real handwritten digits, in minutes, on a CPU.

    python -m jvpgraph.trainer.demo [--out DIR] [--seed N] [--threads N] [--quick]

Two runs of the trainer, with the ready settings `digits_teacher` and `digits`: a class-conditional teacher by flow
matching, then its distillation with rCM. Writes DIR/samples.png and DIR/metrics.json and prints a table. Where other
programs use the same cores, set OMP_WAIT_POLICY=passive: threads that spin while they wait made a step several
times slower there.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.configs import ready
from jvpgraph.trainer.data.digits import Digits, digits
from jvpgraph.trainer.evaluation.samplers import Sampler, sampler_of
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.run.finished import Comparison, compare, load_run, samplers_of
from jvpgraph.trainer.train import train

QUICK_NET = ("model.options.width=16", "model.options.depth=1", "model.options.heads=2")
QUICK = {
    "digits_teacher": (*QUICK_NET, "stages.0.steps=20", "stages.0.batch=32"),
    "digits": (
        "stages.0.steps=6",
        "stages.0.batch=16",
        "stages.0.objective.scm.tangent_warmup=2",
        "stages.0.objective.dmd.fake_updates_per_step=1",
        "sampling.teacher_steps=6",
        "evaluation.count=200",
    ),
}


def run(out: Path, *, seed: int = 0, quick: bool = False) -> Comparison:
    """The whole demo; earlier results in `out` are replaced."""
    for part in ("teacher", "student"):
        shutil.rmtree(out / part, ignore_errors=True)
    phases = Phases()
    with phases.measure("teacher"):
        teacher = configure("digits_teacher", out / "teacher", seed, quick)
        net = export_run(train(teacher), out / "teacher" / "net")
    with phases.measure("student"):
        train(configure("digits", out / "student", seed, quick, f"model.options.path={net}"))
    with phases.measure("sampling and metrics"):
        report = evaluate_student(out / "student", seed)

    data = digits()
    draw_panels(report, data, out / "samples.png")
    summary = {
        "samplers": {name: asdict(qualities[0]) for name, qualities in report.rows.items()},
        "phase_seconds": phases.seconds,
        "seed": seed,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
    }
    (out / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
    seconds = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in phases.seconds.items())
    print(f"\n{report}\n\n{seconds}\nwrote {out}/samples.png and {out}/metrics.json")
    return report


def configure(name: str, out: Path, seed: int, quick: bool, *overrides: str) -> RunConfig:
    """Ready settings by name, for this folder and seed."""
    quicker = QUICK[name] if quick else ()
    return settings.load(RunConfig, ready(name), (f"out={out}", f"seed={seed}", *quicker, *overrides))


def evaluate_student(folder: Path, seed: int) -> Comparison:
    """Real images drawn again (the floor of every figure), the teacher in many and few steps, the student."""
    run = load_run(folder)
    config, data = run.config, digits()
    most = max(config.sampling.steps)
    teacher_in_few: dict[str, Sampler] = {
        f"teacher, {most} steps": sampler_of("flow", run.guided, most, config.sampling)
    }
    teacher, *students = samplers_of(run, config.sampling.steps).items()

    def resample(batch: Batch, rng: torch.Generator) -> Tensor:
        return real_again(data, batch.cond["labels"], rng)

    samplers = {"real, resampled": resample, teacher[0]: teacher[1], **teacher_in_few, **dict(students)}
    return compare(run, samplers, seeds=(seed,))


def real_again(data: Digits, labels: Tensor, rng: torch.Generator) -> Tensor:
    """Real images of the given classes, with replacement."""
    of_class = [(data.labels == c).nonzero().squeeze(1) for c in range(int(data.labels.max()) + 1)]
    choice = torch.rand(len(labels), generator=rng, device=rng.device)
    index = [of_class[c][int(u * len(of_class[c]))] for c, u in zip(labels.tolist(), choice.tolist())]
    return data.x0[torch.stack(index)]


class Phases:
    """Wall-clock seconds of each phase, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def draw_panels(report: Comparison, data: Digits, path: Path, columns: int = 6) -> None:
    """One panel per sampler, side by side: a row per class, in order, and `columns` samples of it."""
    figure = Figure(figsize=(2.1 * len(report.samples), 3.7), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(report.samples), squeeze=False)[0]
    for axis, (name, samples) in zip(axes, report.samples.items()):
        labels = data.labels[: len(samples)]
        rows = [samples[labels == c][:columns] for c in range(10)]
        axis.imshow(tile(data.grey(torch.stack(rows))).numpy(), cmap="gray_r", vmin=0, vmax=16)
        axis.set_title(name.replace(", resampled", ""), fontsize=10)
        axis.set_xlabel(f"distance {report.rows[name][0].frechet_distance:.2f}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([9 * c + 4 for c in range(10)], [str(c) for c in range(10)], fontsize=8)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.savefig(path)


def tile(images: Tensor) -> Tensor:
    """[R, C, 1, S, S] -> one picture [R (S + 1), C (S + 1)] with a blank line between images."""
    spaced = torch.nn.functional.pad(images.squeeze(2), (0, 1, 0, 1))
    return spaced.transpose(1, 2).flatten(2).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jvpgraph.trainer.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the picture and the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--quick", action="store_true", help="a tiny run that only shows that everything works")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    run(arguments.out, seed=arguments.seed, quick=arguments.quick)


if __name__ == "__main__":
    main()
