"""What the recipes give on the digits: one teacher, every recipe with equal student steps, several seeds.

    python -m benchmarks.quality [--steps 500] [--seeds 0 1 2] [--only NAME ...] [--there] [--out DIR] [--quick]

Frechet distance, precision, recall and diversity in the features of a small classifier, 1797 samples against the 1797
images, at 1, 2 and 4 steps, beside the teacher's 50. Then rCM over lambda, with lambda = 0 (sCM itself) for the limit.
A seed is that of the training, of its data and of the samples. Runs that are in DIR already are not repeated.
Prints tables, the one of docs/results.md among them, which recipes are closer to the data than rCM and sCM, and what
becomes of the claims below; writes quality_digits.json, quality_digits.png.

Claims (rCM, arXiv 2510.08431, in miniature), as means over the seeds:
  1. rCM in 4 steps is at or below the teacher's distance;
  2. rCM in 1 step is within 1.5 times of it;
  3. rCM's recall is above DMD's by at least 0.1, in each number of steps;
  4. rCM is at least as precise as sCM, in each number of steps; lambda chosen on the first seed, judged on the others;
  5. recipes of several stages are at or below rCM's distance in 1 and 2 steps.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.record import environment
from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.configs import ready
from jvpgraph.trainer.evaluation.distances import Quality, Spread, spread, table
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.files import write_whole
from jvpgraph.trainer.run.finished import compare, load_run, samplers_of
from jvpgraph.trainer.train import train

STEPS = (1, 2, 4)
LAMBDAS = (0.001, 0.01, 0.1, 1.0)
SCM = {"name": "scm", "times": {"name": "log_normal", "mean": -0.4, "std": 1.6}, "tangent_warmup": 50}
DMD = {"name": "dmd", "times": {"name": "shifted_uniform", "shift": 1.0}, "fake_updates_per_step": 2}


def rcm(weight: float) -> dict:
    parts = {key: {k: v for k, v in part.items() if k != "name"} for key, part in (("scm", SCM), ("dmd", DMD))}
    return {"name": "rcm", "weight": weight, **parts}


UNIFORM = {"name": "shifted_uniform", "shift": 1.0}


@dataclass(frozen=True)
class Recipe:
    """Objectives one after the other, each for its share of the student's steps; and whatever else is set."""

    stages: tuple[tuple[dict, float], ...]
    settings: tuple[str, ...] = ()

    def overrides(self, steps: int) -> list[str]:
        own = {"batch": 64, "student": {"lr": 3e-4}, "fake": {"lr": 3e-4}, "critic": {"lr": 3e-3}}
        stages = [
            {**own, "objective": objective, "steps": max(1, round(share * steps))} for objective, share in self.stages
        ]
        return [f"stages={json.dumps(stages)}", *self.settings]


def alone(objective: dict, *settings: str) -> Recipe:
    return Recipe(((objective, 1.0),), settings)


def terms(*of: dict) -> dict:
    return {"name": "terms", "terms": list(of)}


PAIRS = {"instant_share": 0.25, "clean_share": 0.25, "times": UNIFORM}  # of times, for networks that take two
JUMPS = {**DMD, "rollout": "jumps", "fixed_times": [1.2490, 0.7854, 0.3217]}  # the grid of four steps
MAP = {"name": "flow_map", **PAIRS, "tangent_warmup": 50}
FAR = {**MAP, "instant_share": 0.0, "clean_share": 0.5}  # where r = t the student begins as its teacher, and stays
GAMMA = ("sampling.gamma=1", "sampling.sigma_max=80")  # each jump to the clean image, from where rCM's samples begin
CRITIC = {"name": "adversarial", "width": 64}
JUDGED = {"objective": {**CRITIC, "features": "fake_score"}, "weight": 0.6}  # 0.01 of a mean over 64 pixels

RECIPES = {
    **{f"rCM {weight:g}": alone(rcm(weight)) for weight in LAMBDAS},
    "sCM": alone(SCM),
    "sCM, rf": alone({**SCM, "coordinates": "rf"}),
    "sCT": alone({**SCM, "velocity": "data"}),
    "TBCM": alone({**SCM, "points": "trajectory"}),
    "sCM, critic": alone(terms({"objective": SCM}, {"objective": {**CRITIC, "loss": "hinge"}, "weight": 0.6})),
    "DMD": alone(DMD),
    "DMD, fixed times": alone({**DMD, "fixed_times": [1.3, 1.0, 0.6]}),
    "DMD, data": alone(terms({"objective": DMD}, {"objective": {"name": "data"}})),
    "DMD2": alone(terms({"objective": DMD}, JUDGED)),
    "f-distill": alone(terms({"objective": {**DMD, "divergence": "jensen_shannon"}}, JUDGED)),
    "dCM": alone({"name": "dcm"}),
    "dCM, LCM": alone({"name": "dcm", "jitter": True, "target": "ema", "huber": 0.0043}),
    "MeanFlow": alone({"name": "mean_flow", **PAIRS}),
    "MeanFlow, power 1": alone({"name": "mean_flow", "instant_share": 0.25, "times": UNIFORM, "power": 1.0}),
    "MeanFlow, data": alone({"name": "mean_flow", **PAIRS, "power": 0.5, "velocity": "data", "own_direction": 1.0}),
    "AlphaFlow": alone({"name": "mean_flow", **PAIRS, "discrete": {"begin": 100, "end": 300}}),
    "flow map": alone(MAP),
    "flow map, gamma": alone(MAP, *GAMMA),
    "flow map, lagrangian": alone({"name": "flow_map", **PAIRS, "method": "lagrangian"}),
    "flow map, terminal": alone({"name": "flow_map", **PAIRS, "method": "terminal"}),
    "FreeFlow": alone({"name": "free_flow"}, "sampling.steps=[1]"),
    "dCM, sCM, rCM": Recipe((({"name": "dcm"}, 0.2), (SCM, 0.3), (rcm(0.01), 0.5))),
    "flow map, DMD alone": Recipe(((MAP, 0.7), (JUMPS, 0.3))),
    "flow map, DMD": Recipe(((FAR, 0.7), (terms({"objective": FAR}, {"objective": JUMPS, "weight": 0.01}), 0.3))),
    "flow map, DMD, gamma": Recipe(
        ((MAP, 0.7), (terms({"objective": MAP}, {"objective": JUMPS, "weight": 0.003}), 0.3)), GAMMA
    ),
}
CHOSEN = "rCM 0.01"  # the paper's lambda
STAGED = ("dCM, sCM, rCM", "flow map, DMD", "flow map, DMD, gamma")
DRAWN = (CHOSEN, "sCM", "dCM", "DMD", "MeanFlow", "flow map", *STAGED)  # all are too many

Figures = dict[str, list[Quality]]  # sampler -> one Quality per seed


def teacher_run(out: Path, steps: int) -> Path:
    """Trains and exports the teacher unless it is there; gives the exported folder."""
    folder = out / f"teacher-{steps}"
    net = folder / "net"
    if not (net / "model.safetensors").exists():
        shutil.rmtree(net, ignore_errors=True)
        overrides = (f"out={folder}", f"stages.0.steps={steps}")
        export_run(train(settings.load(RunConfig, ready("digits_teacher"), overrides)), net)
    return net


def figures_of(name: str, seed: int, steps: int, out: Path) -> Path:
    return out / f"{name.replace(' ', '-')}-{steps}" / f"seed-{seed}" / "quality.json"


def student_run(name: str, seed: int, steps: int, out: Path, net: Path) -> tuple[float, dict[str, Quality]]:
    """Trains one student unless it is there, and evaluates it; beside the chosen one, the teacher with this seed.

    Returns:
        Seconds of a core for each update, graphs included; and the figures.
    """
    torch.set_num_threads(1)
    done = figures_of(name, seed, steps, out)
    folder = done.parent
    if not done.exists():
        overrides = (
            f"out={folder}",
            f"seed={seed}",
            f"model.options.path={net}",
            *RECIPES[name].overrides(steps),
            "threads=1",
            "log.flops=false",
        )
        began = time.process_time()
        train(settings.load(RunConfig, ready("digits"), overrides))
        seconds = (time.process_time() - began) / steps
        run = load_run(folder)
        samplers = samplers_of(run, run.config.sampling.steps)
        if name != CHOSEN:  # the teacher is slow to sample, and always the same
            samplers = {key: sampler for key, sampler in samplers.items() if key.startswith("student")}
        report = compare(run, samplers, seeds=(seed,))
        figures = {sampler: asdict(qualities[0]) for sampler, qualities in report.rows.items()}
        write_whole(done, json.dumps({"seconds": seconds, "figures": figures}))
    found = json.loads(done.read_text())
    return found["seconds"], {sampler: Quality(**figures) for sampler, figures in found["figures"].items()}


def measure(
    out: Path, steps: int, teacher_steps: int, seeds: Sequence[int], jobs: int, only: Sequence[str], there: bool
) -> tuple[dict[str, Figures], dict[str, float]]:
    """recipe -> sampler -> one Quality per seed, the teacher's under "teacher"; and recipe -> seconds per update."""
    net = teacher_run(out, teacher_steps)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        wanted = [(n, s) for s in seeds for n in only if not there or figures_of(n, s, steps, out).exists()]
        tasks = {(n, s): pool.submit(student_run, n, s, steps, out, net) for n, s in wanted}
        found = {task: future.result() for task, future in tqdm(tasks.items(), desc="students", unit="run")}
    seconds = {name: median(found[n, s][0] for n, s in wanted if n == name) for name in dict(wanted)}
    figures: dict[str, Figures] = {}
    for (name, _), (_, rows) in found.items():
        for sampler, quality in rows.items():
            if sampler.startswith("student"):
                figures.setdefault(name, {}).setdefault(sampler.removeprefix("student, "), []).append(quality)
            else:
                figures.setdefault("teacher", {}).setdefault(sampler.removeprefix("teacher, "), []).append(quality)
    return figures, seconds


def page(figures: dict[str, Figures], seconds: dict[str, float]) -> str:
    """The table of docs/results.md, a row per recipe: what `cell` says, and seconds of a core for each update."""
    (teacher,) = figures["teacher"].values()
    rows = [["recipe", *map(by_count, STEPS), "s per update"]]
    rows.append(["teacher, 50 steps", *[""] * (len(STEPS) - 1), cell(teacher), ""])
    for name, of in figures.items():
        if name != "teacher":
            cells = [cell(of[by_count(n)]) if by_count(n) in of else "" for n in STEPS]
            seeds = len(of[by_count(1)])
            fewer = "" if seeds == len(teacher) else f" ({seeds} seed{'s'[: seeds > 1]})"
            rows.append([name + fewer, *cells, f"{seconds[name]:.2f}"])
    head, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *lines])


def cell(qualities: Sequence[Quality]) -> str:
    """Distance / precision / recall / diversity, means over the seeds."""
    distance = fmean(q.frechet_distance for q in qualities)
    others = (fmean(getattr(q, of) for q in qualities) for of in ("precision", "recall", "diversity"))
    return " / ".join([f"{distance:.{1 if distance < 9.95 else 0}f}", *(f"{value:.2f}" for value in others)])


def by_count(steps: int) -> str:
    """A column's name, as in the samplers' names."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def closer(figures: dict[str, Figures], than: str) -> dict[str, list[str]]:
    """Steps -> recipes whose distance is the smaller one with every seed."""
    return {
        steps: [
            name
            for name, of in figures.items()
            if name not in (than, "teacher")
            and steps in of
            and all(a.frechet_distance < b.frechet_distance for a, b in zip(of[steps], theirs, strict=True))
        ]
        for steps, theirs in figures[than].items()
    }


def claims(figures: dict[str, Figures]) -> dict[str, tuple[bool, str]]:
    """Claim -> whether the means over the seeds bear it out, and the figures with the spread of the differences."""
    (teacher,) = figures["teacher"].values()
    level = fmean(q.frechet_distance for q in teacher)
    ours = distances(figures[CHOSEN])
    found = {
        "rCM in 4 steps at or below the teacher's distance": (ours[4] <= level, f"{ours[4]:.2f} against {level:.2f}"),
        "rCM in 1 step within 1.5 times of it": (
            ours[1] <= 1.5 * level,
            f"{ours[1]:.2f} against {level:.2f}, {ours[1] / level:.2f} times",
        ),
    }
    if "DMD" in figures:
        recall = differences(figures[CHOSEN], figures["DMD"], "recall")
        found["rCM's recall above DMD's by 0.1"] = (min(s.mean for s in recall.values()) >= 0.1, by_steps(recall))
    if len(teacher) > 1 and figures.keys() >= {"sCM", *(f"rCM {weight:g}" for weight in LAMBDAS)}:

        def gain(name: str) -> float:
            chosen = differences(figures[name], figures["sCM"], "precision", slice(0, 1))
            return min(s.mean for s in chosen.values())

        # lambda is chosen on the first seed and judged on the others: the best of several is flattered by its figures
        best = max((name for name in figures if name.startswith("rCM")), key=gain)
        precision = differences(figures[best], figures["sCM"], "precision", slice(1, None))
        claim = f"rCM at least as precise as sCM; lambda {best[4:]}, the best on the first seed, on the others"
        found[claim] = (min(s.mean for s in precision.values()) >= 0, by_steps(precision))
    for name in STAGED:
        if name in figures:
            theirs = distances(figures[name])
            found[f"{name} at or below rCM's distances in 1 and 2 steps"] = (
                all(theirs[n] <= ours[n] for n in (1, 2)),
                ", ".join(f"{theirs[n]:.2f} against {ours[n]:.2f} in {n}" for n in (1, 2)),
            )
    return found


def distances(of: Figures) -> dict[int, float]:
    """Steps -> the mean distance."""
    return {n: fmean(q.frechet_distance for q in qualities) for n, qualities in zip(STEPS, of.values())}


def differences(a: Figures, b: Figures, metric: str, seeds: slice = slice(None)) -> dict[str, Spread]:
    """Steps -> the metric of `a` less that of `b`, seed by seed."""
    return {
        steps: spread([getattr(x, metric) - getattr(y, metric) for x, y in zip(a[steps][seeds], b[steps][seeds])])
        for steps in a
    }


def by_steps(found: dict[str, Spread]) -> str:
    return ", ".join(f"{s.format(3).strip()} in {steps}" for steps, s in found.items())


def draw(figures: dict[str, Figures], path: Path) -> None:
    """Upper row: each metric against the steps, for each of DRAWN. Lower row: against lambda, a line per steps."""
    metrics = [f.name for f in fields(Quality) if f.name != "accuracy"]
    figure = Figure(figsize=(4 * len(metrics), 7), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(metrics))
    shown = [name for name in DRAWN if name in figures]
    (teacher,) = figures["teacher"].values()
    for metric, (upper, lower) in zip(metrics, axes.T):
        level = fmean(getattr(q, metric) for q in teacher)
        for axis in (upper, lower):
            axis.axhline(level, color="black", linestyle="--", label="teacher, 50 steps")
            axis.set_ylabel(metric.replace("_", " "))
            if metric == "frechet_distance":
                axis.set_yscale("log")
        for name in shown:
            bars(upper, [int(key.split()[0]) for key in figures[name]], list(figures[name].values()), metric, name)
        upper.set_xscale("log", base=2)
        upper.set_xticks(STEPS, [str(n) for n in STEPS])
        upper.set_xlabel("steps of the student")
        for key in figures["sCM"] if figures.keys() >= {"sCM", *(f"rCM {weight:g}" for weight in LAMBDAS)} else ():
            qualities = [figures["sCM"][key], *(figures[f"rCM {weight:g}"][key] for weight in LAMBDAS)]
            bars(lower, range(1 + len(LAMBDAS)), qualities, metric, key)
        lower.set_xticks(range(1 + len(LAMBDAS)), ["0 (sCM)", *(f"{weight:g}" for weight in LAMBDAS)])
        lower.set_xlabel("lambda of rCM")
    for row in axes:
        row[0].legend(fontsize=8)
    figure.savefig(path)


def bars(axis, x: Sequence[float], qualities: Sequence[list[Quality]], metric: str, label: str) -> None:
    spreads = [spread([getattr(q, metric) for q in of_seeds]) for of_seeds in qualities]
    axis.errorbar(
        list(x), [s.mean for s in spreads], [s.half_width for s in spreads], label=label, marker="o", capsize=3
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="student updates of every recipe")
    parser.add_argument("--teacher-steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="and the one of CHOSEN")
    parser.add_argument("--jobs", type=int, default=2, help="students at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="folder of the runs")
    parser.add_argument("--record", type=Path, help="folder of the figures; default: that of the runs")
    parser.add_argument("--there", action="store_true", help="train none: the figures of those that are in DIR")
    parser.add_argument("--quick", action="store_true", help="a few steps of each: shows that it runs")
    o = parser.parse_args()
    if o.quick:
        o.steps, o.teacher_steps, o.seeds = 2, 10, [0, 1]

    names = [name for name in RECIPES if name in {CHOSEN, *o.only}]
    figures, seconds = measure(o.out, o.steps, o.teacher_steps, o.seeds, o.jobs, names, o.there)
    rows = {f"{name}, {sampler}": found for name, of in figures.items() for sampler, found in of.items()}
    (teacher,) = figures["teacher"].values()
    # those with every seed
    whole = {name: of for name, of in figures.items() if len(next(iter(of.values()))) == len(teacher)}
    verdicts = claims(whole)
    nearer = {than: closer(whole, than) for than in (CHOSEN, "sCM") if than in whole}
    print(f"\n{table(rows, digits=3)}\n\n{page(figures, seconds)}\n")
    for than, found in nearer.items():
        for count, better in found.items():
            print(f"closer to the data than {than} in {count}, with every seed: {', '.join(better) or 'none'}")
    for claim, (holds, figure) in verdicts.items():
        print(f"{'confirmed' if holds else 'refuted'}: {claim}: {figure}")

    record = o.record or o.out
    record.mkdir(parents=True, exist_ok=True)
    summary = environment() | {
        "settings": {
            "steps": o.steps,
            "teacher_steps": o.teacher_steps,
            "seeds": o.seeds,
            "recipes": {name: asdict(RECIPES[name]) for name in names},
        },
        "claims": {claim: {"holds": holds, "figures": text} for claim, (holds, text) in verdicts.items()},
        "closer": nearer,
        "seconds_per_update": seconds,
        "figures": {row: [asdict(quality) for quality in found] for row, found in rows.items()},
    }
    (record / "quality_digits.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(figures, record / "quality_digits.png")
    print(f"\nwritten to {record}/quality_digits.json and quality_digits.png")


if __name__ == "__main__":
    main()
