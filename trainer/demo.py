"""First light: distil a diffusion transformer on real handwritten digits, in minutes, on a CPU.

    python -m jvpgraph.trainer.demo [--out DIR] [--seed N] [--threads N] [--quick]

Trains a class-conditional teacher, distils it with rCM and samples both. Writes DIR/samples.png and
DIR/metrics.json and prints a table. Where other programs use the same cores, set OMP_WAIT_POLICY=passive:
threads that spin while they wait made a step several times slower there.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from jvpgraph.trainer.config import DemoConfig
from jvpgraph.trainer.data import Batch, Digits, digits
from jvpgraph.trainer.evaluate import Quality, evaluate, train_classifier
from jvpgraph.trainer.sample import few_step_times, sample_euler, sample_few_steps
from jvpgraph.trainer.train import distill, train_teacher
from jvpgraph.trainer.trigflow import Guided, TrigFlow


@dataclass(frozen=True)
class Sampler:
    """`draw(labels [B], rng=...)` gives images [B, 1, 8, 8], at `evaluations` network passes per image."""

    name: str
    evaluations: int
    draw: Callable[..., Tensor]


@dataclass(frozen=True)
class Result:
    """A sampler's images and figures."""

    name: str
    evaluations: int
    seconds_per_image: float  # median over the batches
    quality: Quality
    samples: Batch


class Phases:
    """Wall-clock seconds of each phase, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def run(config: DemoConfig) -> list[Result]:
    """The whole demo; writes samples.png and metrics.json under `config.out` and prints the table."""
    torch.manual_seed(config.seed)  # initial parameters; every other draw comes from `rng`
    rng = torch.Generator().manual_seed(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    phases = Phases()
    data = digits()

    with phases.measure("classifier"):
        classifier = train_classifier(data, config.classifier, config.model.classes, rng)
    with phases.measure("teacher"):
        teacher = train_teacher(data, config, rng)
    with phases.measure("student"):
        student = distill(teacher, data, config, rng)

    results: list[Result] = []
    with phases.measure("sampling and metrics"):
        labels = data.labels[: config.samples]
        for sampler in tqdm(samplers(data, teacher, student, config), desc="sampling", unit="sampler"):
            noise = torch.Generator().manual_seed(config.seed)  # the same for every sampler
            parts, seconds = [], []
            for part in labels.split(config.sampling_batch):
                start = time.perf_counter()
                parts.append(sampler.draw(part, rng=noise))
                seconds.append((time.perf_counter() - start) / len(part))
            samples = Batch(torch.cat(parts), labels)
            quality = evaluate(samples, data.x0, classifier, config.neighbours)
            results.append(Result(sampler.name, sampler.evaluations, median(seconds), quality, samples))

    draw_panels(results, data, config.out / "samples.png")
    summary = json.dumps(report(results, phases, config), indent=2, default=str)
    (config.out / "metrics.json").write_text(summary + "\n")
    print(f"\n{table(results, phases, config)}\n\nwrote {config.out}/samples.png and {config.out}/metrics.json")
    return results


def samplers(data: Digits, teacher: TrigFlow, student: TrigFlow, config: DemoConfig) -> list[Sampler]:
    """Real images drawn again (the floor of every figure), the teacher in many and few steps, the student."""
    size, most = config.model.image_size, max(config.few_step.steps)
    guided = Guided(teacher, config.teacher.guidance, no_label=config.model.classes)
    return [
        Sampler("real, resampled", 0, partial(resample, data)),
        *(
            Sampler(f"teacher, {n} steps", 2 * n, partial(sample_euler, guided, steps=n, image_size=size))
            for n in (config.teacher.euler_steps, most)
        ),
        *(
            Sampler(
                f"student, {n} step{'s' * (n > 1)}",
                n,
                partial(sample_few_steps, student, times=few_step_times(n, config.few_step), image_size=size),
            )
            for n in config.few_step.steps
        ),
    ]


def resample(data: Digits, labels: Tensor, *, rng: torch.Generator) -> Tensor:
    """Real images of the given classes, with replacement."""
    of_class = [(data.labels == c).nonzero().squeeze(1) for c in range(int(data.labels.max()) + 1)]
    choice = torch.rand(len(labels), generator=rng)
    index = [of_class[c][int(u * len(of_class[c]))] for c, u in zip(labels.tolist(), choice.tolist())]
    return data.x0[torch.stack(index)]


def draw_panels(results: list[Result], data: Digits, path: Path, columns: int = 6) -> None:
    """One panel per sampler, side by side: a row per class, in order, and `columns` samples of it."""
    classes = int(data.labels.max()) + 1
    figure = Figure(figsize=(2.1 * len(results), 3.7), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, result in zip(axes, results):
        rows = [result.samples.x0[result.samples.labels == c][:columns] for c in range(classes)]
        axis.imshow(tile(data.grey(torch.stack(rows))).numpy(), cmap="gray_r", vmin=0, vmax=16)
        axis.set_title(result.name.replace(", resampled", ""), fontsize=10)
        if result is not results[0]:
            distance, faster = result.quality.frechet_distance, speed_up(result, results)
            axis.set_xlabel(f"distance {distance:.2f}, speed {faster:.1f}x", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([9 * c + 4 for c in range(classes)], [str(c) for c in range(classes)], fontsize=8)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.savefig(path)


def tile(images: Tensor) -> Tensor:
    """[R, C, 1, S, S] -> one picture [R (S + 1), C (S + 1)] with a blank line between images."""
    spaced = torch.nn.functional.pad(images.squeeze(2), (0, 1, 0, 1))
    return spaced.transpose(1, 2).flatten(2).flatten(0, 1)


def speed_up(result: Result, results: list[Result]) -> float:
    """Times faster per image than the teacher's full sampler, the second row."""
    return results[1].seconds_per_image / result.seconds_per_image


def report(results: list[Result], phases: Phases, config: DemoConfig) -> dict:
    """What metrics.json holds."""
    return {
        "samplers": [
            {
                "name": r.name,
                "evaluations": r.evaluations,
                **asdict(r.quality),
                "seconds_per_image": r.seconds_per_image,
                "speed_up_over_teacher": speed_up(r, results) if r.evaluations else None,
            }
            for r in results
        ],
        "phase_seconds": phases.seconds,
        "settings": asdict(config),
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
    }


def table(results: list[Result], phases: Phases, config: DemoConfig) -> str:
    header = f"{'sampler':<18}{'evaluations':>12}{'distance':>10}{'precision':>11}{'recall':>8}{'label':>7}"
    lines = [f"{header}{'ms/image':>10}{'speed-up':>10}"]
    for r in results:
        q = r.quality
        line = f"{r.name:<18}{r.evaluations:>12}{q.frechet_distance:>10.2f}{q.precision:>11.2f}"
        line += f"{q.recall:>8.2f}{q.accuracy:>7.2f}"
        if r.evaluations:
            line += f"{1e3 * r.seconds_per_image:>10.3f}{speed_up(r, results):>9.1f}x"
        lines.append(line)
    seconds = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in phases.seconds.items())
    return "\n".join([*lines, "", f"{seconds}; {config.samples} images per sampler"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jvpgraph.trainer.demo", description=__doc__.split("\n")[0])
    default = DemoConfig()
    parser.add_argument("--out", type=Path, default=default.out, help="folder of the picture and the figures")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--quick", action="store_true", help="a tiny run that only shows that everything works")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = replace(default, out=args.out, seed=args.seed)
    run(config.quick() if args.quick else config)


if __name__ == "__main__":
    main()
