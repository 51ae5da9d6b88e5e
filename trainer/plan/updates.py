"""The updates of a stage, run on the meta device: what they keep, what they need at most, what they compute.

A network of many equal blocks is measured with two blocks in each list and with three; what a block adds is the
difference. What is needed at most does not grow evenly, since the moment of it changes, so that it is measured for
moments that stay what they are: the forward, the first half of the backward, and the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig, StageConfig
from jvpgraph.trainer.model.networks import trainable
from jvpgraph.trainer.objectives import Terms, loss_of
from jvpgraph.trainer.objectives.dmd import fake_score_loss
from jvpgraph.trainer.plan.meter import Meter, fused_attention
from jvpgraph.trainer.plan.subject import NoNoise, Plainly, Subject, depths, larger, shortened, subject_of
from jvpgraph.trainer.trigflow import TrigFlow

WHOLE = 4  # blocks in a list up to which a network is measured as it is
FEW = 2


class Cost(NamedTuple):
    """Of one forward and backward of a part of a batch: bytes beyond parameters and data, and FLOPs."""

    kept: float = 0.0  # between forward and backward
    forward: float = 0.0  # the most in the forward
    start: float = 0.0  # in the first half of the backward
    end: float = 0.0  # in the second
    flops: float = 0.0  # of all that is run, recomputation included

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        return Cost(*(a + times * b for a, b in zip(self, other)))


class Costs(NamedTuple):
    """Of a stage."""

    student: Cost
    fake: Cost  # of one update of the fake score
    fake_updates: float  # per update of the student
    plain: float  # FLOPs of one pass of the student without tangents, forward only
    teacher_calls: float  # in the loss of the student
    fake_calls: float  # likewise


def costs_of(config: RunConfig, stage: StageConfig, teacher: TrigFlow, sample: Batch, size: int) -> Costs:
    """What the most expensive updates of a stage need, for `size` samples on this process."""
    counts = depths(teacher)
    few = [n if n <= WHOLE else FEW for n in counts]

    def measured(blocks: Sequence[int]) -> Costs:
        network = teacher if list(blocks) == counts else shortened(teacher, blocks)
        fake = stage.objective.fake_score is not None
        subject = subject_of(config, network, sample.cond, fake=fake)
        return measure(subject, stage, larger(sample, size))

    base = total = measured(few)
    for index, count in enumerate(counts):
        if count > WHOLE:
            more = measured([n + (i == index) for i, n in enumerate(few)])
            total = Costs(
                total.student.plus(more.student.plus(base.student, -1), count - FEW),
                total.fake.plus(more.fake.plus(base.fake, -1), count - FEW),
                base.fake_updates,
                total.plain + (count - FEW) * (more.plain - base.plain),
                base.teacher_calls,
                base.fake_calls,
            )
    return total


def measure(subject: Subject, stage: StageConfig, batch: Batch) -> Costs:
    """Over the last iterations of the stage, when nothing warms up any more: the most bytes, FLOPs in the mean."""
    objective, loss, noise = stage.objective, loss_of(stage.objective), NoNoise()
    score = objective.fake_score
    cycle = min(stage.steps, getattr(score, "simulation_steps", 1))
    iterations = range(stage.steps - cycle + 1, stage.steps + 1)
    fake = None if subject.fake is None else Plainly(subject.fake)
    known = [*subject.known, batch.x0, *batch.cond.values()]
    run = partial(costs, known=known, again=stage.accumulate > 1)

    def student_loss(iteration: int) -> Terms:
        return loss(subject.dual, subject.guided, batch, noise, objective, iteration=iteration, fake=fake)

    with calls_of(subject.teacher) as teacher_calls, calls_of(subject.fake) as fake_calls:
        of_student = run(subject.student, [partial(student_loss, i) for i in iterations])
    runs = 2 * len(iterations)  # each once to make its graphs
    of_fake = Cost()
    updates = [objective.fake_updates(i) for i in iterations]
    if fake is not None and subject.fake is not None:

        def fake_loss(count: int) -> Terms:
            return fake_score_loss(fake, subject.dual, batch, noise, score, count=count)

        of_fake = run(subject.fake, [partial(fake_loss, count) for count in range(cycle)])
    with Meter(known) as meter:
        subject.dual(batch.x0.double(), batch.x0.new_empty(len(batch)).double(), batch.cond)
    rate = sum(updates) / len(updates)
    return Costs(of_student, of_fake, rate, meter.flops, len(teacher_calls) / runs, len(fake_calls) / runs)


@contextmanager
def calls_of(network: nn.Module | None) -> Iterator[list[None]]:
    """An entry for each call of a network from here on."""
    calls: list[None] = []
    hook = None if network is None else network.register_forward_pre_hook(lambda *_: calls.append(None))
    yield calls
    if hook is not None:
        hook.remove()


def costs(model: TrigFlow, losses: Iterable[Callable[[], Terms]], *, known: list[Tensor], again: bool) -> Cost:
    """The most that any of the losses takes of memory, and what they compute in the mean.

    Args:
        again: there are gradients of earlier batches, which are known.
    """
    parameters = list(trainable(model).values())
    found = []
    for loss in losses:
        backward_of(loss()["loss"].mean())  # makes the graphs
        if not again:
            model.zero_grad()
        gradients = [p.grad for p in parameters if p.grad is not None]
        with Meter([*known, *gradients]) as meter:
            value = loss()["loss"].mean()
            kept, first = meter.now, len(meter.timeline)
            backward_of(value)
        forward, rest = meter.timeline[:first], meter.timeline[first:]
        half = (len(rest) + 1) // 2
        found.append(Cost(kept, max(forward), max(rest[:half]), max(rest[half:], default=0), meter.flops))
        del value
        model.zero_grad()
    flops = sum(cost.flops for cost in found) / len(found)
    kept, forward, start, end = (max(of_all) for of_all in list(zip(*found))[:4])
    return Cost(kept, forward, start, end, flops)


def backward_of(value: Tensor) -> None:
    with fused_attention():  # of checkpointed blocks, which are computed again
        value.backward()
