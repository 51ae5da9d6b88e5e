"""The sums: what each process of a run will hold, what an update computes, how long it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig, StageConfig
from jvpgraph.trainer.model.networks import build_student, check_conditions
from jvpgraph.trainer.model.parts import commonest_dtype
from jvpgraph.trainer.model.quantize import chosen, saved_bytes
from jvpgraph.trainer.plan.layout import Held, Spread, Training, brought, held, nbytes, training
from jvpgraph.trainer.plan.machines import GPU, USABLE
from jvpgraph.trainer.plan.subject import Origins, check_sample, sample_of
from jvpgraph.trainer.plan.updates import Cost, Costs, costs_of
from jvpgraph.trainer.run.parallel import check, sizes_of
from jvpgraph.trainer.trigflow import TrigFlow


@dataclass(frozen=True)
class Plan:
    """Of one stage, for each process.

    Attributes:
        index: of the stage.
        parameters: of the student, and how many of them are trained.
        resident: bytes that are there all the time, by what they are for.
        host: bytes in the memory of the CPU of what rests there, likewise.
        host_at_work: bytes there beyond these, of gradients and an optimiser's step.
        moved: bytes of an update between the two, both ways together.
        moments: the most bytes at each moment of an update, what is resident included.
        kept: bytes of activations that the student's forward keeps for its backward.
        at_work: bytes beyond these, gradients and what is resident, at the moment that needs the most: tangents and
            other results on the way, and parameters that are gathered.
        flops: of one update, in one process, recomputation included.
        dtype: of most of the parameters, in which most is computed.
        steps, samples: updates of the stage, and samples per update of all processes.
        processes: how many there are.
        costs: of a forward and backward in one process, of which the rest was made.
    """

    index: int
    parameters: tuple[int, int]
    resident: dict[str, float]
    host: dict[str, float]
    host_at_work: float
    moved: float
    moments: dict[str, float]
    kept: float
    gradients: float
    flops: float
    dtype: torch.dtype
    steps: int
    samples: int
    processes: int
    costs: Costs

    @property
    def peak(self) -> float:
        return max(self.moments.values())

    @property
    def at_work(self) -> float:
        return max(0.0, self.peak - sum(self.resident.values()) - self.kept - self.gradients)

    def fits(self, gpu: GPU) -> bool:
        return self.peak <= USABLE * gpu.memory

    def seconds(self, gpu: GPU, share: float) -> float:
        """Of one update, if `share` of what the GPU could compute is computed."""
        return self.flops / (share * gpu.peak(self.dtype))


def plan_run(
    config: RunConfig,
    *,
    processes: int,
    on_gpu: bool = True,
    latents: Sequence[int] | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    costs: Sequence[Costs | None] = (),
) -> list[Plan]:
    """A plan of each stage.

    Args:
        processes: how many there will be.
        on_gpu: optimisers and attention as on a GPU.
        latents: shape of a sample [C, ...]; None for one of the run's data.
        conditions: tensors on the meta device like those of a sample [...], by name.
        costs: of each stage, from a plan of as many samples per process; None or absent: they are measured.

    Raises:
        ValueError: the settings do not fit the number of processes, the network, or there are no data to plan for.
    """
    spread = Spread(sizes_of(config.parallel, processes))
    check(config, spread.sizes)
    origins = Origins.of(config)
    sample = sample_of(config, latents, conditions or {})
    check_conditions(config, sample)
    check_sample("model", origins.base, sample)
    if origins.teacher is not origins.base:
        check_sample("teacher.model", origins.teacher, sample)
    known = dict(enumerate(costs))
    return [
        plan_stage(config, i, origins, sample, spread, known.get(i), on_gpu=on_gpu) for i in range(len(config.stages))
    ]


def plan_stage(
    config: RunConfig,
    index: int,
    origins: Origins,
    sample: Batch,
    spread: Spread,
    costs: Costs | None,
    *,
    on_gpu: bool,
) -> Plan:
    stage, teacher = config.stages[index], origins.teacher
    student = build_student(origins.base, config.student, config.told_scale)
    scored = stage.objective.fake_score is not None
    fake = build_student(origins.of_fake(config), config.student.fake_score, config.told_scale) if scored else None
    copies = {"student": student} | ({} if fake is None else {"fake score": fake})
    settings = {"student": stage.student, "fake score": stage.fake}
    parts = {"teacher": held(teacher, spread), **{name: held(network, spread) for name, network in copies.items()}}

    away = {"teacher": config.teacher.offload, "fake score": config.fake_score.offload and scored}
    away |= {"averages": config.ema.device == "cpu" and on_gpu}
    held_here: dict[str, float] = {}
    host: dict[str, float] = {}

    def keep(what: str, size: float, whose: str) -> None:
        (host if away.get(whose) else held_here)[what] = size

    keep("teacher", teacher_bytes(config, teacher, parts["teacher"]), "teacher")
    before = origins.in_stage(config, index).before
    keep("students of earlier phases", sum(resident_bytes(n, held(n, spread), set()) for n in before), "")
    # Without adapters nothing is shared: a student is a copy.
    seen = {id(tensor) for tensor in tensors_of(teacher)}
    trained = {}
    for name, network in copies.items():
        keep(name, resident_bytes(network, parts[name], seen), name)
        seen |= {id(tensor) for tensor in tensors_of(network)}
        widths = config.ema.sigma_rel if name == "student" else ()
        trained[name] = training(network, parts[name].shapes, settings[name], widths, on_gpu)
        keep(f"optimiser of the {name}", trained[name].states, name)
    keep("averages", trained["student"].averages, "averages")
    conditions = sum(x.nbytes for x in sample.cond.values())
    held_here["data"] = stage.batch // spread.parts * (sample.x0.nbytes + conditions)

    costs = costs or costs_of(
        config, index, origins, sample, stage.batch // spread.parts, sharded=spread.sharded, on_gpu=on_gpu
    )
    if costs.critic:  # whole in each process, with two moments in float32
        held_here["critic and its optimiser"] = 3 * costs.critic
    base = sum(held_here.values())
    guests = at_work_of_guests(config, copies | {"teacher": teacher}, spread)
    moments, host_at_work = {}, 0.0
    for name in copies:
        cost = costs.student if name == "student" else costs.fake
        own, part = trained[name], parts[name]
        elsewhere = away.get(name, False)
        for moment, most in at_moments(cost, stage, own.gradients, part, spread, elsewhere).items():
            moments[f"{name}: {moment}"] = base + most + guests[name]
        if elsewhere:
            host_at_work = own.gradients + own.step
        else:
            moments[f"{name}: optimiser's step"] = base + own.gradients + own.step
    if costs.critic and not scored:
        moments["critic: an update"] = base + max(costs.fake.forward, costs.fake.start, costs.fake.end)
    split = spread.tokens * spread.sizes["tp"]
    computed = costs.student.flops + costs.fake_updates * costs.fake.flops
    return Plan(
        index=index,
        parameters=count(student),
        resident=held_here,
        host=host,
        host_at_work=host_at_work,
        moved=moved(config, stage, copies | {"teacher": teacher}, costs, parts, trained, spread) if on_gpu else 0.0,
        moments=moments,
        kept=costs.student.kept / spread.tokens,
        gradients=max(own.gradients for name, own in trained.items() if not away.get(name)),
        flops=stage.accumulate * computed / split,
        dtype=computing_dtype(student),
        steps=stage.steps,
        samples=stage.batch * stage.accumulate,
        processes=prod(spread.sizes.values()),
        costs=costs,
    )


def at_moments(
    cost: Cost, stage: StageConfig, gradients: float, part: Held, spread: Spread, elsewhere: bool
) -> dict[str, float]:
    """Bytes beyond what is resident.

    FSDP2 gathers a block into a buffer and copies its parameters from there, while those outside of blocks are there;
    in the backward it also reduces the block's gradients, from a float32 copy. Of those that it has reduced each
    process has its part, on the CPU if the network rests there (`elsewhere`). But where a loss goes through the network
    twice, autograd adds up what both passes give before it hands that on: whole gradients wait for the second pass.
    """
    own = 0.0 if elsewhere else gradients
    before = own if stage.accumulate > 1 else 0.0
    if not spread.many:
        return {
            "forward": cost.forward + before,
            "backward begins": cost.start + before,
            "backward ends": max(0.0, cost.end - (gradients - own)) + before,
        }
    gathered = part.root + 2 * part.block
    waiting = min(cost.waiting, cost.reduced)  # not of tokens, which several processes may divide
    at_most = (cost.reduced - waiting) / spread.tokens + waiting
    done = before or own * cost.done / part.gradients
    return {
        "forward": cost.forward / spread.tokens + before + gathered,
        "backward": at_most + done + gathered + part.reduced,
        "backward ends": own + gathered + part.reduced,
    }


def at_work_of_guests(config: RunConfig, networks: Mapping[str, TrigFlow], spread: Spread) -> dict[str, float]:
    """What networks that rest bring to the device in an update of each; FSDP2's gathers are in `at_moments`.

    A block at a time; but what is trained keeps its blocks for the backward, if that does not compute them again. Of a
    teacher in bytes, one weight is widened.
    """
    found = {"student": 0.0, "fake score": 0.0}
    if config.teacher.quantization is not None:
        found["student"] += max(layer.weight.nbytes for layer in chosen(networks["teacher"]).values())
    if spread.sharded:
        return found
    if config.teacher.offload:
        found["student"] += brought(networks["teacher"]).largest
    if config.fake_score.offload and "fake score" in networks:
        sizes = brought(networks["fake score"])
        found["student"] += sizes.largest
        found["fake score"] += sizes.largest if config.student.checkpoint_blocks else sizes.everything
    return found


def moved(
    config: RunConfig,
    stage: StageConfig,
    networks: Mapping[str, TrigFlow],
    costs: Costs,
    parts: Mapping[str, Held],
    trained: Mapping[str, Training],
    spread: Spread,
) -> float:
    """Bytes between CPU and device in an update of the student and those of the fake score, as `Traffic` counts."""
    total = 0.0
    shares = {
        name: resident_bytes(n, parts[name], set()) / max(1, nbytes(tensors_of(n))) for name, n in networks.items()
    }
    if config.teacher.offload:
        size = brought(networks["teacher"]).everything * shares["teacher"]
        if config.teacher.quantization is not None:
            size -= saved_bytes(networks["teacher"], config.teacher.quantization)
        total += costs.teacher_calls * size
    if config.fake_score.offload and "fake score" in networks:
        sizes, share = brought(networks["fake score"]), shares["fake score"]
        again = sizes.everything if spread.sharded else sizes.blocks * config.student.checkpoint_blocks
        gradients = sizes.trained + (0 if spread.sharded else sizes.trained / sizes.everything * again)
        each = sizes.everything + again + gradients
        total += share * (costs.fake_calls * sizes.everything + costs.fake_updates * each)
    total *= stage.accumulate
    if config.ema.device == "cpu":
        total += trained["student"].averages / len(config.ema.sigma_rel)
    return total


def teacher_bytes(config: RunConfig, teacher: TrigFlow, part: Held) -> float:
    kind = config.teacher.quantization
    if kind is None:
        return resident_bytes(teacher, part, set())
    return nbytes(tensors_of(teacher)) - saved_bytes(teacher, kind)  # in each process


def tensors_of(network: TrigFlow) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def resident_bytes(network: TrigFlow, part: Held, seen: set[int]) -> float:
    """Of parameters and buffers that are not another network's."""
    own = [(name, p) for name, p in network.named_parameters() if id(p) not in seen]
    sizes = sum(prod(part.shapes.get(name, tuple(p.shape))) * p.element_size() for name, p in own)
    return sizes + sum(b.nbytes for b in network.buffers() if id(b) not in seen)


def computing_dtype(student: TrigFlow) -> torch.dtype:
    """Not that of adapters: the products with the weights below them take the time."""
    return commonest_dtype(student.parameters()) or torch.float32


def count(student: TrigFlow) -> tuple[int, int]:
    """Parameters, and those of them that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in student.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
