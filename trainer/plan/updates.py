"""The updates of a stage, run on the meta device: what they keep, what they need at most, what they compute.

A network of many equal blocks is measured with two blocks in each list and with three; what a block adds is the
difference. What is needed at most does not grow evenly, since the moment of it changes, so that it is measured for
moments that stay what they are: the forward, the first half of the backward, and the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import _dynamo as dynamo

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig, StageConfig
from jvpgraph.trainer.evaluation.phases import settings_of
from jvpgraph.trainer.model.critic import BLOCKS, Critic, critic_on
from jvpgraph.trainer.model.networks import trainable
from jvpgraph.trainer.model.student import repeated_blocks
from jvpgraph.trainer.noise import Random
from jvpgraph.trainer.objectives import Adversarial, Objective, Terms, loss_of
from jvpgraph.trainer.objectives.adversarial import beside_loss
from jvpgraph.trainer.objectives.simulation import Earlier, simulate_backward
from jvpgraph.trainer.plan.layout import nbytes
from jvpgraph.trainer.plan.meter import Meter, fused_attention
from jvpgraph.trainer.plan.subject import NoNoise, Origins, Plainly, Subject, larger, subject_of

WHOLE = 4  # blocks in a list up to which a network is measured as it is
FEW = 2
MANY = 256


class Cost(NamedTuple):
    """Of one forward and backward of a part of a batch: bytes beyond parameters and data, and FLOPs."""

    kept: float = 0.0  # between forward and backward
    forward: float = 0.0  # the most in the forward
    start: float = 0.0  # in the first half of the backward
    end: float = 0.0  # in the second
    reduced: float = 0.0  # in all of it, without gradients that are complete, which FSDP2 reduces
    done: float = 0.0  # those at that moment
    waiting: float = 0.0  # gradients that a later pass of the same loss adds to: autograd waits for it
    flops: float = 0.0  # of all that is run, recomputation included

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        return Cost(*(a + times * b for a, b in zip(self, other)))


class Costs(NamedTuple):
    """Of a stage."""

    student: Cost
    fake: Cost  # of one update of the fake score, of the critic, or of both
    fake_updates: float  # per update of the student
    plain: float  # FLOPs of one pass of the student without tangents, forward only
    teacher_calls: float  # in the loss of the student
    fake_calls: float  # likewise
    critic: float = 0.0  # bytes of its parameters


def costs_of(
    config: RunConfig,
    index: int,
    origins: Origins,
    sample: Batch,
    size: int,
    *,
    sharded: bool = False,
    on_gpu: bool = True,
) -> Costs:
    """What the most expensive updates of a stage, by its index, need for `size` samples on this process."""
    stage = config.stages[index]
    origins = origins.in_stage(config, index)
    counts = origins.lists
    few = [n if n <= WHOLE else FEW for n in counts]

    def measured(blocks: Sequence[int]) -> Costs:
        networks = origins if list(blocks) == counts else origins.shortened(blocks)
        fake, guidance = stage.objective.fake_score is not None, config.guidance_in(index)
        through = stage.objective.through_tangent
        subject = subject_of(
            config, networks, guidance, sample.cond, fake=fake, sharded=sharded, through_tangent=through
        )
        with dynamo.config.patch(recompile_limit=MANY):  # of a block: in each subject, with and without tangents
            return measure(subject, stage, larger(sample, size), on_gpu)

    base = total = measured(few)
    for place, count in enumerate(counts):
        if count > WHOLE:
            more = measured([n + (i == place) for i, n in enumerate(few)])
            total = Costs(
                total.student.plus(more.student.plus(base.student, -1), count - FEW),
                total.fake.plus(more.fake.plus(base.fake, -1), count - FEW),
                base.fake_updates,
                total.plain + (count - FEW) * (more.plain - base.plain),
                base.teacher_calls,
                base.fake_calls,
                base.critic,
            )
    return total


def measure(subject: Subject, stage: StageConfig, batch: Batch, on_gpu: bool) -> Costs:
    """Over the last iterations of the stage, when nothing warms up any more: the most bytes, FLOPs in the mean."""
    objective, loss, noise = stage.objective, loss_of(stage.objective), NoNoise()
    score = objective.fake_score
    simulation = objective.simulation if score is None else score.simulation
    cycle = min(stage.steps, 1 if simulation is None else simulation.steps)
    iterations = range(stage.steps - cycle + 1, stage.steps + 1)
    fake = None if subject.fake is None else Plainly(subject.fake)
    critic = None if objective.critic is None else critic_of(objective.critic, fake, subject, batch)
    heads = [] if critic is None else list(critic.parameters())
    known = [*subject.known, *heads, batch.x0, *batch.cond.values()]
    earlier = expert_in(objective, [Plainly(student) for student in subject.before])
    run = partial(costs, known=known, again=stage.accumulate > 1, on_gpu=on_gpu)

    def student_loss(iteration: int) -> Terms:
        more = {"iteration": iteration, "fake": fake, "critic": critic, "averaged": nullcontext, "earlier": earlier}
        return loss(subject.dual, subject.guided, batch, noise, objective, **more)

    with calls_of(subject.teacher) as teacher_calls, calls_of(subject.fake) as fake_calls:
        of_student = run(subject.student, subject.dual, [partial(student_loss, i) for i in iterations])
    runs = 2 * len(iterations)  # each once to make its graphs
    of_fake = Cost()
    updates = [objective.fake_updates(i) for i in iterations]
    trained = nn.ModuleList([network for network in (subject.fake, critic) if network is not None])
    if len(trained):

        def others_loss(count: int) -> Terms:
            asked = subject.dual, subject.guided
            return beside_loss(fake, critic, *asked, batch, noise, objective, count=count, earlier=earlier)

        of_fake = run(trained, fake or trained, [partial(others_loss, count) for count in range(cycle)])
    with Meter(known) as meter:
        subject.dual(batch.x0.double(), batch.x0.new_empty(len(batch)).double(), batch.cond)
    rate = sum(updates) / len(updates)
    calls = len(teacher_calls) / runs, len(fake_calls) / runs
    return Costs(of_student, of_fake, rate, meter.flops, *calls, nbytes(heads))


def expert_in(objective: Objective, students: Sequence[nn.Module]) -> Earlier | None:
    """As `expert_of` in a run, of students of earlier phases, the nearest first."""
    if objective.simulated is None or objective.simulated.earlier is None:
        return None
    own = settings_of(objective.simulated.earlier).stages[-1].objective
    student, before = students[0], expert_in(own, students[1:])

    @torch.no_grad()
    def make(batch: Batch, rng: Random) -> Tensor:
        return simulate_backward(student, batch, own.simulated.steps, rng, own.simulated, before).x

    return make


def critic_of(settings: Adversarial, fake: Plainly | None, subject: Subject, batch: Batch) -> Critic:
    """A critic as the run's own, with its heads on the last block if there are fewer blocks here."""
    host = subject.guided.model if fake is None or settings.features == "teacher" else fake
    assert isinstance(host, Plainly)
    last = len(list(repeated_blocks(host.net))) - 1
    blocks = [min(index, last) for index in settings.blocks] or [last] * BLOCKS
    return critic_on(host, settings, batch, blocks)


@contextmanager
def calls_of(network: nn.Module | None, *, of_gradients: bool = False) -> Iterator[list[None]]:
    """An entry for each call of a network from here on, or for each that a backward goes through."""
    calls: list[None] = []

    def called(*_: Any) -> None:
        if torch.is_grad_enabled() or not of_gradients:
            calls.append(None)

    hook = None if network is None else network.register_forward_pre_hook(called)
    yield calls
    if hook is not None:
        hook.remove()


def costs(
    model: nn.Module,
    asked: nn.Module,
    losses: Iterable[Callable[[], Terms]],
    *,
    known: list[Tensor],
    again: bool,
    on_gpu: bool,
) -> Cost:
    """The most that any of the losses takes of memory, and what they compute in the mean.

    Args:
        model: whose parameters are trained.
        asked: what the losses call of it.
        again: there are gradients of earlier batches, which are known.
        on_gpu: whose kernels need little memory for themselves.
    """
    parameters = list(trainable(model).values())
    found = []
    for loss in losses:
        with calls_of(asked, of_gradients=True) as passes:
            value = loss()["loss"].mean()
        waiting = nbytes(parameters) if len(passes) > 1 else 0
        backward_of(value)  # makes the graphs
        if not again:
            model.zero_grad()
        gradients = [p.grad for p in parameters if p.grad is not None]
        with Meter([*known, *gradients], by_blocks=not on_gpu) as meter:
            value = loss()["loss"].mean()
            kept, first = meter.now, len(meter.timeline)
            with nullcontext() if again else set_aside(parameters, meter):
                backward_of(value)
        half = (first + len(meter.timeline) + 1) // 2
        parts = meter.timeline[:first], meter.timeline[first:half], meter.timeline[half:]
        forward, start, end = (max(part, default=0) for part in parts)
        reduced, when = max((size, i) for i, size in enumerate(meter.beside) if i >= first)
        found.append(Cost(kept, forward, start, end, reduced, meter.timeline[when] - reduced, waiting, meter.flops))
        del value
        model.zero_grad()
    highest = Cost(*(max(of_all) for of_all in zip(*found)))
    return highest._replace(flops=sum(cost.flops for cost in found) / len(found))


@contextmanager
def set_aside(parameters: Iterable[nn.Parameter], meter: Meter) -> Iterator[None]:
    """Counts gradients out of `meter.beside` as soon as they are complete."""

    def complete(parameter: Tensor) -> None:
        assert parameter.grad is not None
        meter.aside += parameter.grad.nbytes

    hooks = [parameter.register_post_accumulate_grad_hook(complete) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def backward_of(value: Tensor) -> None:
    with fused_attention():  # of checkpointed blocks, which are computed again
        value.backward()
