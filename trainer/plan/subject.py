"""The networks of a run on the meta device: as they are, and with fewer of their repeated blocks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jvpgraph
from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.config import GuidanceConfig, NetworkKey, RunConfig, StudentConfig
from jvpgraph.trainer.data.sample import first_samples
from jvpgraph.trainer.evaluation.phases import folders_held, settings_of
from jvpgraph.trainer.model.networks import build_student, new_network, try_network
from jvpgraph.trainer.model.parts import parts_of
from jvpgraph.trainer.model.quantize import put_on_bytes
from jvpgraph.trainer.model.student import repeated_blocks, repeated_lists
from jvpgraph.trainer.noise import RankNoise
from jvpgraph.trainer.plan.meter import fused_attention, numbers_on_meta
from jvpgraph.trainer.trigflow import Guided, TrigFlow

META = torch.device("meta")


def network_of(config: RunConfig, key: NetworkKey) -> TrigFlow:
    """A network without its weights; one of diffusers is built from config.json alone.

    Raises:
        ValueError: the settings' function does not give a TrigFlow, or what it does cannot be done without numbers.
    """
    with warnings.catch_warnings():  # weights that are loaded by hand go nowhere, as they should
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter.*")
        try:
            with META:
                network = new_network(config, key)
        except NotImplementedError as error:
            load = config.network(key).load
            raise ValueError(f"{key}.load: {load} needs numbers to build the network: {error}") from error
    return network.to(META).requires_grad_(False).eval()


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


def check_sample(key: str, network: TrigFlow, sample: Batch) -> None:
    """Raises ValueError if the network cannot run with it, which on the meta device says nothing about its numbers."""
    try:
        try_network(f"{key}: the network cannot run with a sample", network, sample.x0, sample.cond)
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

    @property
    def net(self) -> nn.Module:
        """Of the network, which a critic looks into."""
        net = self.network.net
        assert isinstance(net, nn.Module)
        return net

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
    before: tuple[TrigFlow, ...]  # students of earlier phases, the nearest first

    @property
    def known(self) -> list[Tensor]:
        """Parameters, buffers and the negative condition."""
        networks = [each for each in (self.teacher, self.student, self.fake, *self.before) if each is not None]
        held = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
        return [*(part for tensor in held for part in parts_of(tensor)), *self.guided.negative.values()]


@dataclass(frozen=True)
class Origins:
    """The networks that those of a run are copies of, without weights."""

    teacher: TrigFlow
    base: TrigFlow  # of the student; the same one if the teacher is no other
    before: tuple[TrigFlow, ...] = ()  # students of earlier phases, the nearest first; of one stage

    @classmethod
    def of(cls, config: RunConfig) -> Origins:
        base = network_of(config, "model")
        return cls(base if config.teacher.model is None else network_of(config, "teacher.model"), base)

    def of_fake(self, config: RunConfig) -> TrigFlow:
        return self.base if config.fake_score.network == "student" else self.teacher

    def in_stage(self, config: RunConfig, stage: int) -> Origins:
        """With the students of the runs that a stage builds on."""
        return replace(self, before=tuple(before_of(folder) for folder in folders_held(config, stage)))

    @property
    def networks(self) -> list[TrigFlow]:
        """Each once."""
        return [self.base, *([] if self.teacher is self.base else [self.teacher]), *self.before]

    @property
    def lists(self) -> list[int]:
        """How many blocks each list of repeated ones has, of all networks."""
        return [count for network in self.networks for count in depths(network)]

    def shortened(self, counts: Sequence[int]) -> Origins:
        """With so many blocks in each list of `lists`."""
        left, made = list(counts), []
        for network in self.networks:
            here = len(depths(network))
            made.append(shortened(network, left[:here]))
            del left[:here]
        base, *others = made
        teacher = base if self.teacher is self.base else others.pop(0)
        return Origins(teacher, base, tuple(others))


def before_of(folder: Path) -> TrigFlow:
    """The student of another run, which is only asked."""
    config = settings_of(folder)
    student = student_of(config, config.student, network_of(config, "model"))
    return student.requires_grad_(False)


def student_of(config: RunConfig, settings: StudentConfig, base: TrigFlow) -> TrigFlow:
    """A student, whose adapters compute with the teacher's weights in bytes if that is asked for."""
    student = build_student(base, settings, config.told_scale)
    put_on_bytes(student, base, config.bytes_below_adapters)
    return student


def subject_of(
    config: RunConfig,
    origins: Origins,
    guidance: GuidanceConfig,
    cond: Condition,
    *,
    fake: bool,
    sharded: bool,
    through_tangent: bool = False,
) -> Subject:
    """The networks of a run.

    Args:
        guidance: of the stage.
        cond: of one sample, which the negative condition is taken to be like.
        fake: whether there is a fake score.
        sharded: whether FSDP2 has the student: blocks are graphs of their own then, and their gradients come one by
            one.
        through_tangent: whether the loss has a gradient through the tangent.
    """
    student = student_of(config, config.student, origins.base)
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
    asked = guidance.on or any(stage.objective.needs_negative for stage in config.stages)
    negative = dict(cond) if asked else {}
    scale = config.told_scale if isinstance(guidance.scale, tuple) else guidance.scale
    return Subject(
        origins.teacher,
        student,
        student_of(config, config.student.fake_score, origins.of_fake(config)) if fake else None,
        Plainly(dual),
        Guided(Plainly(origins.teacher), scale, negative, guidance.keep_norm, (), guidance.interval, guidance.below),
        origins.before,
    )
