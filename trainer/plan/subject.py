"""The networks of a run on the meta device: as they are, and with fewer of their repeated blocks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import jvpgraph
from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.sample import first_samples
from jvpgraph.trainer.model.networks import build_student, new_teacher, try_network
from jvpgraph.trainer.model.parts import parts_of
from jvpgraph.trainer.model.quantize import put_on_bytes
from jvpgraph.trainer.model.student import repeated_blocks, repeated_lists
from jvpgraph.trainer.noise import RankNoise
from jvpgraph.trainer.plan.meter import fused_attention, numbers_on_meta
from jvpgraph.trainer.trigflow import Guided, TrigFlow

META = torch.device("meta")


def teacher_of(config: RunConfig) -> TrigFlow:
    """The teacher without its weights; one of diffusers is built from config.json alone.

    Raises:
        ValueError: the settings' function does not give a TrigFlow, or what it does cannot be done without numbers.
    """
    with warnings.catch_warnings():  # weights that are loaded by hand go nowhere, as they should
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter.*")
        try:
            with META:
                teacher = new_teacher(config)
        except NotImplementedError as error:
            raise ValueError(f"model.load: {config.model.load} needs numbers to build the network: {error}") from error
    return teacher.to(META).requires_grad_(False).eval()


def sample_of(config: RunConfig, latents: Sequence[int] | None, conditions: Condition) -> Batch:
    """One sample of the run's data on the meta device, or one of this shape with these conditions.

    Raises:
        ValueError, OSError: no shapes are given, and there is no data.
    """
    if latents is not None:
        return Batch(torch.empty(1, *latents, device=META), {name: x[None] for name, x in conditions.items()})
    if conditions:
        raise ValueError("--condition without --latents: the conditions of the data would be others. Give both.")
    try:
        return first_samples(config.data.source.build(), 1).to(META)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error}\nTo plan before the data is there, give the shapes of a sample: --latents 16x21x60x104 "
            "--condition encoder_hidden_states=512x4096"
        ) from error


def check_sample(teacher: TrigFlow, sample: Batch) -> None:
    """Raises ValueError if the network cannot run with it, which on the meta device says nothing about its numbers."""
    try:
        try_network("model: the network cannot run with a sample", teacher, sample.x0, sample.cond)
    except ValueError as error:
        raise ValueError(
            f"{error}\nOf another shape or dtype: --latents CxTxHxW and --condition NAME=LxD[:KIND] for each argument "
            "of the network, such as labels=:0..999"
        ) from error


def larger(sample: Batch, size: int) -> Batch:
    """`size` samples like the one."""
    conditions = {name: x.new_empty(size, *x.shape[1:]) for name, x in sample.cond.items()}
    return Batch(sample.x0.new_empty(size, *sample.x0.shape[1:]), conditions)


def depths(network: TrigFlow) -> list[int]:
    """How many blocks each list of repeated ones has."""
    return [len(blocks) for blocks in repeated_lists(network.net)]


def shortened(network: TrigFlow, counts: Sequence[int]) -> TrigFlow:
    """A copy with so many blocks in each list of repeated ones; the last block stays, as it may be another."""
    short = copy.deepcopy(network)
    for blocks, count in zip(repeated_lists(short.net), counts, strict=True):
        del blocks[count - 1 : -1]
    return short


class NoNoise(RankNoise):
    """Draws on the meta device: shapes alone."""

    def __init__(self) -> None:
        super().__init__(None, 0, 1)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return META


class Plainly(nn.Module):
    """A network, or a dual one, as it is on the meta device, where it attends as kernels do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, tangents: Any = None, **kwargs: Any) -> Any:
        with numbers_on_meta(), fused_attention():  # with tangents too: what is computed again has to be the same
            if tangents is not None:
                return self.network(*args, tangents=tangents, **kwargs)
            return self.network(*args, **kwargs)


@dataclass(frozen=True)
class Subject:
    """What a run trains and asks, on the meta device."""

    teacher: TrigFlow
    student: TrigFlow
    fake: TrigFlow | None
    dual: Plainly
    guided: Guided

    @property
    def known(self) -> list[Tensor]:
        """Parameters, buffers and the negative condition."""
        networks = [network for network in (self.teacher, self.student, self.fake) if network is not None]
        held = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
        return [*(part for tensor in held for part in parts_of(tensor)), *self.guided.negative.values()]


def student_of(config: RunConfig, teacher: TrigFlow) -> TrigFlow:
    """A student, whose adapters compute with the teacher's weights in bytes if that is asked for."""
    student = build_student(teacher, config.student)
    put_on_bytes(student, teacher, config.bytes_below_adapters)
    return student


def subject_of(
    config: RunConfig, teacher: TrigFlow, cond: Condition, *, fake: bool, sharded: bool, through_tangent: bool = False
) -> Subject:
    """The networks of a run with this teacher.

    Args:
        cond: of one sample, which the negative condition is taken to be like.
        fake: whether there is a fake score.
        sharded: whether FSDP2 has the student: blocks are graphs of their own then, and their gradients come one by
            one.
        through_tangent: whether the loss has a gradient through the tangent.
    """
    student = student_of(config, teacher)
    blocks = set(repeated_blocks(student.net)) if sharded else set()
    # Without Inductor, which makes no code for this device.
    of_tangents = jvpgraph.Config(tangent_precision=config.precision.of_tangents)
    regions = None if through_tangent else blocks.__contains__ if blocks else "auto"
    dual = jvpgraph.transform(
        student,
        backend="eager",
        dynamic=False,
        regions=regions,
        differentiable_tangent=through_tangent,
        config=of_tangents,
    )
    asked = config.guidance.scale != 1 or any(stage.objective.needs_negative for stage in config.stages)
    negative = dict(cond) if asked else {}
    return Subject(
        teacher,
        student,
        student_of(config, teacher) if fake else None,
        Plainly(dual),
        Guided(Plainly(teacher), config.guidance.scale, negative, config.guidance.keep_norm),
    )
