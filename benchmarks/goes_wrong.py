"""Runs on the digits that are made to go wrong, and what the watch of a run shows of them.

    python -m benchmarks.goes_wrong [--steps 1000] [--only NAME ...] [--jobs 1] [--out DIR] [--record DIR] [--quick]

Each differs from the demo's rCM in the settings that RUNS names. Writes goes_wrong.json and goes_wrong.png: a panel for
each figure, a line for each run; and prints at which step each run was first warned of.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.quality import DMD, SCM, rcm, teacher_run
from benchmarks.record import environment
from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.configs import ready
from jvpgraph.trainer.run.decay import PREFIX, signs
from jvpgraph.trainer.run.log import series
from jvpgraph.trainer.train import train

SLOW = {**DMD, "fake_updates_per_step": 1}
RUNS: dict[str, dict] = {
    "as it should be": {"objective": rcm(0.01)},
    "DMD alone": {"objective": DMD},
    "fake score too slow": {"objective": SLOW, "fake": {"lr": 1e-5}},
    "guidance of 8": {"objective": rcm(0.01), "guidance": 8.0},
    "learning rate 20 times": {"objective": SCM, "student": {"lr": 6e-3}},
}
FIGURES = ("loss", "score_gap", "fake_loss", "tangent_norm", "shift", "variance", "power_fine", "diversity", "distance")


def run(name: str, steps: int, out: Path, net: Path) -> Path:
    """Trains unless it is there; gives the log."""
    torch.set_num_threads(1)
    folder, changed = out / name.replace(" ", "-"), RUNS[name]
    overrides = [
        f"out={folder}",
        f"model.options.path={net}",
        f"stages.0.steps={steps}",
        f"stages.0.objective={json.dumps(changed['objective'])}",
        f"guidance.scale={changed.get('guidance', 1.25)}",
        *(f"stages.0.{who}.lr={changed[who]['lr']}" for who in ("student", "fake") if who in changed),
        f"watch.every={max(1, steps // 40)}",
        "watch.count=64",
        "threads=1",
    ]
    train(settings.load(RunConfig, ready("digits"), overrides))
    return folder / "log.jsonl"


def first_warning(of: dict[str, tuple[list[float], list[float]]]) -> str:
    """What the first warning of a run says, with its step."""
    figures = {key.removeprefix(PREFIX): values for key, values in of.items() if key.startswith(PREFIX)}
    steps = figures["variance"][0]
    looks = [{name: values[i] for name, (_, values) in figures.items()} for i in range(len(steps))]
    found = ((step, wrong) for step, look in zip(steps, looks) if (wrong := signs(look, looks[0])))
    step, wrong = next(found, (0, ["no warning"]))
    return f"step {step:.0f}: {'; '.join(wrong)}" if step else wrong[0]


def draw(curves: dict[str, dict[str, tuple[list[float], list[float]]]], path: Path) -> None:
    figure = Figure(figsize=(12, 9), dpi=110, layout="constrained")
    for axis, name in zip(figure.subplots(3, 3).flat, FIGURES):
        for i, (run_name, of) in enumerate(curves.items()):
            key = name if name in of else PREFIX + name
            if key in of:
                axis.plot(*of[key], color=f"C{i}", label=run_name, linewidth=1.2)
        axis.set_title(name)
        axis.set_xlabel("step")
        if name in ("loss", "fake_loss", "tangent_norm", "power_fine", "distance", "variance"):
            axis.set_yscale("log")
    figure.axes[5].legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="student updates of each run")
    parser.add_argument("--teacher-steps", type=int, default=4000)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("out/goes_wrong"), help="folder of the runs")
    parser.add_argument("--record", type=Path, help="folder of the figures; default: that of the runs")
    parser.add_argument("--quick", action="store_true", help="a few steps of each: shows that it runs")
    o = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if o.quick:
        o.steps, o.teacher_steps = 2, 10

    net = teacher_run(o.out, o.teacher_steps)
    with ProcessPoolExecutor(o.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        logs = {name: pool.submit(run, name, o.steps, o.out, net) for name in o.only}
        curves = {name: series(log.result()) for name, log in logs.items()}
    record = o.record or o.out
    record.mkdir(parents=True, exist_ok=True)
    kept = {name: {key: of[key] for key in of if key.removeprefix(PREFIX) in FIGURES} for name, of in curves.items()}
    (record / "goes_wrong.json").write_text(json.dumps(environment() | {"steps": o.steps, "curves": kept}) + "\n")
    draw(curves, record / "goes_wrong.png")
    for name, of in curves.items():
        print(f"{name}: {first_warning(of)}")
    print(f"written to {record}/goes_wrong.json and goes_wrong.png")


if __name__ == "__main__":
    main()
