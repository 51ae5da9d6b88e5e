"""The exact derivative against finite differences, as other trainers of two-time networks take it, in the same loss.

    python -m benchmarks.finite_difference [--steps 300] [--seeds 0 1 2] [--eps 0.005] [--out DIR] [--quick]

MeanFlow and flow_map (eulerian) from one teacher of the digits, with the student in float32 and in bfloat16 on float32
masters. The derivative is jvpgraph's, or a central or a forward difference of the average velocity u between the points
z + eps v, s + eps and z - eps v, s - eps, or z, s itself; all compiled. Central with this eps is what AnyFlow's code
does, and FastGen's for Wan, there in float32. Three figures of each: how far the target of
the loss is from the one in float64, for a student that the exact derivative has trained; Frechet distances of samples
after the same number of updates; and CPU seconds per update, by the clock of the process. A seed is that of batches,
noise and samples; the table has means over the seeds. Runs that are in DIR already are not repeated. Prints a table,
writes finite_difference.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

import jvpgraph
from benchmarks.quality import teacher_run
from benchmarks.record import environment
from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.data.digits import digits
from jvpgraph.trainer.evaluation import distances
from jvpgraph.trainer.evaluation.features import digits_classifier
from jvpgraph.trainer.evaluation.samplers import draw, euler_grid, sample_euler, sample_mean_flow
from jvpgraph.trainer.files import write_whole
from jvpgraph.trainer.model.dit import dit
from jvpgraph.trainer.model.ema import PowerEMA, update_all
from jvpgraph.trainer.model.networks import trainable, with_weights
from jvpgraph.trainer.model.optimizer import MasterAdamW
from jvpgraph.trainer.model.student import make_student
from jvpgraph.trainer.noise import noise_like
from jvpgraph.trainer.objectives import FlowMap, MeanFlow, Objective, loss_of
from jvpgraph.trainer.objectives.mean_flow import average_velocity, average_velocity_with_tangent, to_flow
from jvpgraph.trainer.objectives.scm import tangent_target
from jvpgraph.trainer.objectives.two_times import TwoTimes, ordered_times
from jvpgraph.trainer.times import ShiftedUniform, flow_time, from_flow_time
from jvpgraph.trainer.trigflow import Guided, TrigFlow, along_trajectory, expand_like

SHARES: dict[str, Any] = {"times": ShiftedUniform(shift=1.0), "instant_share": 0.25, "clean_share": 0.25}
OBJECTIVES: dict[str, TwoTimes] = {"mean_flow": MeanFlow(**SHARES), "flow_map": FlowMap(**SHARES)}
DTYPES = ("float32", "bfloat16")
DERIVATIVES = ("exact", "central", "forward")
STEPS, TEACHER_STEPS = (1, 2, 4), 50
BATCH, LR, WARM = 64, 3e-4, 5  # of the ready settings; the first updates are not timed


class Differences(nn.Module):
    """A student whose F_dot is a difference of u along the straight path, in the place of a dual.

    Args:
        eps: of rectified-flow time.
        central: of two points, or of one and the place itself.
    """

    def __init__(self, student: nn.Module, eps: float, central: bool) -> None:
        super().__init__()
        self.student, self.eps, self.central = student, eps, central

    def forward(
        self, x: Tensor, t: Tensor, cond: Condition, r: Tensor, tangents: dict[str, Tensor] | None = None
    ) -> Any:
        F = self.student(x, t, cond, r)
        if tangents is None:
            return F
        k, a = expand_like(t.cos() + t.sin(), x), expand_like(t.sin() - t.cos(), x)
        t_dot = expand_like(tangents["t"], x)
        k_dot, a_dot = -a * t_dot, k * t_dot
        z, u = to_flow(x, F.detach(), t)
        z_dot, s_dot = (tangents["x"] - k_dot * z) / k, t_dot / k**2
        moves = s_dot.abs() > 1e-12  # of an empty interval nothing does
        v = torch.where(moves, z_dot / torch.where(moves, s_dot, 1), 0)

        def at(step: float) -> Tensor:
            return average_velocity(self.student, z + step * v, from_flow_time(flow_time(t) + step), r, cond)

        with torch.no_grad():
            change = (at(self.eps) - at(-self.eps)) / 2 if self.central else at(self.eps) - u
        u_dot = s_dot * change / self.eps
        return F, (u_dot - a_dot * x - a * tangents["x"] - k_dot * F.detach()) / k


def target_of(student: nn.Module, teacher: nn.Module, batch: Batch, objective: TwoTimes) -> Tensor:
    """What the loss moves u or F to, or by, at times and noise that are the same for each student."""
    rng = torch.Generator().manual_seed(1)
    t, r = ordered_times(len(batch), objective, rng)
    s, s_r = (expand_like(flow_time(each), batch.x0) for each in (t, r))
    z = torch.lerp(batch.x0.double(), noise_like(batch.x0, rng), s)
    with torch.no_grad():
        if isinstance(objective, MeanFlow):
            v = average_velocity(teacher, z, t, None, batch.cond)
            return v - (s - s_r) * average_velocity_with_tangent(student, z, t, r, batch.cond, v)[1]
        x = expand_like(t.cos() + t.sin(), z) * z
        F_T = teacher(x, t, batch.cond)
        F, F_dot = student(x, t, batch.cond, r, tangents=along_trajectory(x, t - r, F_T))
        return tangent_target(F, F_dot, F_T, x, t - r, 1.0)


class Subject:
    """A student of one dtype, and its ways to a derivative, compiled once."""

    def __init__(self, teacher: TrigFlow, dtype: str, eps: float) -> None:
        self.student = make_student(teacher, dtype=dtype, lora=None, checkpoint_blocks=False).eval()
        self.start = copy.deepcopy(self.student.state_dict())
        dual = jvpgraph.transform(self.student, dynamic=False)
        compiled = torch.compile(self.student, backend=jvpgraph.backend(), dynamic=False)
        self.ways: dict[str, nn.Module] = {
            "exact": dual,
            "central": Differences(compiled, eps, central=True),
            "forward": Differences(compiled, eps, central=False),
        }

    def train(self, way: str, guided: Guided, objective: Objective, data: Any, steps: int, seed: int) -> dict[str, Any]:
        """Losses, distances and seconds; leaves the trained weights in the student."""
        self.student.load_state_dict(self.start)
        optimizer = MasterAdamW(trainable(self.student), lr=LR)
        ema = PowerEMA(optimizer.masters, 0.1)
        rng = torch.Generator().manual_seed(seed)
        loss, losses, seconds = loss_of(objective), [], []
        for iteration in range(1, steps + 1):
            index = torch.randint(len(data.labels), (BATCH,), generator=rng)
            batch = Batch(data.x0[index], {"labels": data.labels[index]})
            begun = time.process_time()
            terms = loss(self.ways[way], guided, batch, rng, objective, iteration=iteration)
            terms["loss"].mean().backward()
            optimizer.step(LR)
            optimizer.zero_grad()
            seconds.append(time.process_time() - begun)
            update_all([ema], optimizer.masters)
            losses.append(terms["error" if "error" in terms else "target_norm"].mean().item())
        return {
            "curve": [sum(losses[i : i + 20]) / len(losses[i : i + 20]) for i in range(0, steps, 20)],
            "distance": distance_of(with_weights(self.student, ema.parameters), data, seed),
            "seconds": median(seconds[WARM:] or seconds),
        }


def distance_of(
    model: nn.Module,
    data: Any,
    seed: int,
    sample: Callable[..., Tensor] = sample_mean_flow,
    several: Sequence[int] = STEPS,
) -> dict[str, float]:
    """Frechet distance of as many samples as there are images, by steps."""
    space = digits_classifier()
    real = Batch(data.x0, {"labels": data.labels})
    real_features = space(real.x0)
    found = {}
    for steps in several:
        grid = euler_grid(steps)
        latents = draw(lambda batch, rng, grid=grid: sample(model, batch, grid, rng), real, 600, seed)
        found[str(steps)] = distances.frechet_distance(space(latents), real_features)
    return found


def errors(subject: Subject, guided: Guided, objective: TwoTimes, data: Any) -> dict[str, float]:
    """Of the target against float64, relative in L2, for the student's weights as they are, by way."""
    batch = Batch(data.x0[:BATCH], {"labels": data.labels[:BATCH]})
    wide = jvpgraph.transform(copy.deepcopy(subject.student).double(), backend="op_by_op")
    exact = target_of(wide, guided, batch, objective)
    found = {way: target_of(student, guided, batch, objective) for way, student in subject.ways.items()}
    return {way: float((target - exact).norm() / exact.norm()) for way, target in found.items()}


def trained(
    subject: Subject, way: str, guided: Guided, objective: TwoTimes, data: Any, steps: int, seed: int
) -> dict[str, Any]:
    figures = subject.train(way, guided, objective, data, steps, seed)
    return figures | ({"errors": errors(subject, guided, objective, data)} if way == "exact" else {})


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(make()))
    return json.loads(path.read_text())


def guided_of(teacher: TrigFlow) -> Guided:
    return Guided(teacher, 1.25, {"labels": torch.tensor([10])})  # of the ready settings


def measure(teacher: TrigFlow, steps: int, eps: float, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """objective -> dtype -> derivative -> figures, a list of those of each seed."""
    guided = guided_of(teacher)
    data = digits()
    found: dict[str, Any] = {name: {dtype: {} for dtype in DTYPES} for name in OBJECTIVES}
    subjects = {dtype: Subject(teacher, dtype, eps) for dtype in DTYPES}
    for seed, dtype, (name, objective) in product(seeds, DTYPES, OBJECTIVES.items()):
        runs = {}
        for way in DERIVATIVES:
            run = partial(trained, subjects[dtype], way, guided, objective, data, steps, seed)
            runs[way] = kept(out / f"{name}-{dtype}-{way}-{steps}-{eps:g}-{seed}.json", run)
        for way, error in runs["exact"].pop("errors").items():
            found[name][dtype].setdefault(way, []).append(runs[way] | {"error": error})
        print(table({name: {dtype: found[name][dtype]}}), flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Means over the seeds."""
    lines = ["| objective, student | derivative | error of the target | distance in 1, 2, 4 steps | CPU s per update |"]
    lines.append("|---|---|---|---|---|")
    for name, dtypes in found.items():
        for dtype, rows in dtypes.items():
            for way, runs in rows.items():
                distance = " / ".join(f"{fmean(run['distance'][str(n)] for run in runs):.3g}" for n in STEPS)
                error, seconds = (fmean(run[of] for run in runs) for of in ("error", "seconds"))
                lines.append(f"| {name}, {dtype} | {way} | {error:.1e} | {distance} | {seconds:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="updates of each student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eps", type=float, default=0.005, help="step of the differences, of rectified-flow time")
    parser.add_argument("--teacher-steps", type=int, default=4000, help="as of make bench-quality, whose teacher it is")
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="folder of the teacher and the runs")
    parser.add_argument("--record", type=Path, help="folder of the figures; default: that of the runs")
    parser.add_argument("--quick", action="store_true", help="a few steps of each: shows that it runs")
    o = parser.parse_args()
    if o.quick:
        o.steps, o.teacher_steps, o.seeds = 2, 10, [0, 1]
    teacher = dit(path=teacher_run(o.out, o.teacher_steps)).requires_grad_(False).eval()
    folder = o.out / "finite_difference"
    found = measure(teacher, o.steps, o.eps, o.seeds, folder)
    print(f"\n{table(found)}")
    of_teacher = kept(
        folder / f"teacher-{o.teacher_steps}.json",
        lambda: distance_of(guided_of(teacher), digits(), 0, sample_euler, (TEACHER_STEPS,)),
    )
    print(f"\nthe teacher: {of_teacher}")
    record = o.record or o.out
    record.mkdir(parents=True, exist_ok=True)
    summary = environment() | {
        "settings": {
            "steps": o.steps,
            "seeds": o.seeds,
            "eps": o.eps,
            "teacher_steps": o.teacher_steps,
            "batch": BATCH,
            "lr": LR,
        },
        "objectives": {name: {**asdict(each), "times": asdict(each.times)} for name, each in OBJECTIVES.items()},
        "teacher": of_teacher,
        "figures": found,
    }
    (record / "finite_difference.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\nwritten to {record}/finite_difference.json")


if __name__ == "__main__":
    main()
