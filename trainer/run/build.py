"""The networks of a run, built from its settings and spread over its processes, each kept as the settings say.

A LoRA student and its fake score are the same network with adapters, the teacher's where it has none of its own:
modules of their own around the same frozen parameters, in one process and, where FSDP2 shards them, in many. So none of
them has to be told which part it plays before a call, which a block that is computed again in the backward could not
be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import jvpgraph
from jvpgraph.passes.context import Report
from jvpgraph.trainer.config import NetworkKey, RunConfig, StudentConfig
from jvpgraph.trainer.model.networks import (
    build_guided,
    build_network,
    build_student,
    build_teacher,
    share_frozen,
    take_values,
)
from jvpgraph.trainer.model.offload import Traffic
from jvpgraph.trainer.model.quantize import put_on_bytes, quantize
from jvpgraph.trainer.objectives import Objective
from jvpgraph.trainer.run.origin import Digests, digest_of
from jvpgraph.trainer.run.parallel import Layout
from jvpgraph.trainer.run.start import check_start, start_from
from jvpgraph.trainer.trigflow import Guided, TrigFlow


@dataclass(frozen=True)
class Networks:
    """What is there through all stages."""

    teacher: TrigFlow  # frozen
    guided: Guided  # the teacher with classifier-free guidance, as in samples of it
    guided_in: Sequence[Guided]  # the same as each stage trains with it
    student: TrigFlow
    dual: jvpgraph.DualModule  # the student with tangents; the same parameters
    through: jvpgraph.DualModule | None  # likewise, with gradients through the tangents, if a stage asks for that
    new_student: Callable[[], TrigFlow]  # what the student was at first, or a copy of the teacher: a fake score
    digests: Digests  # on the first process
    traffic: Traffic  # between CPU and device, of networks that rest

    def dual_for(self, objective: Objective) -> jvpgraph.DualModule:
        if not objective.through_tangent:
            return self.dual
        assert self.through is not None
        return self.through

    @property
    def reports(self) -> list[Report]:
        """Of all graphs so far."""
        return [*self.dual.reports, *([] if self.through is None else self.through.reports)]


def build_networks(config: RunConfig, layout: Layout, start: Path | None = None) -> Networks:
    """Teacher and student from the settings, spread over the processes; the student from the weights in `start`."""
    traffic = Traffic()
    workshop = torch.device("cpu") if config.teacher.offload else layout.workshop

    def student_of(
        base: TrigFlow, settings: StudentConfig, start: Path | None = None, rests: Traffic | None = None
    ) -> TrigFlow:
        student = build_student(base, settings, config.told_scale)
        if start is not None:
            start_from(student, start)
        put_on_bytes(student, base, config.bytes_below_adapters)  # before FSDP2 has its parameters
        student = layout.spread(student, rests)
        if config.student.compile:
            student.compile(backend=jvpgraph.backend(), dynamic=False)
        return student

    own = config.teacher.model is not None  # a teacher that is another network than the student
    base = build_network(config, workshop, "model")
    of_base = of_teacher = digest_of(base) if layout.first else ""
    if start is not None:
        layout.ranks.on_first(lambda: check_start(config.student, of_base, start))
    student = student_of(base, config.student, start)  # a copy before the teacher, if it is that, is taken apart
    teacher = base
    del base
    if own:
        teacher = build_teacher(config, workshop)
        of_teacher = digest_of(teacher) if layout.first else ""
    digests = Digests(of_teacher, of_base)
    rests = traffic if config.teacher.offload else None
    if config.teacher.quantization is not None:
        teacher = layout.keep(quantize(teacher, config.teacher.quantization), rests)
    else:
        teacher = layout.spread(teacher, rests)
    if config.student.lora is not None and not own:
        share_frozen(student, teacher)
    guided = build_guided(teacher, config.guidance, layout.device, scale=config.told_scale)
    guided_in = [
        build_guided(teacher, config.guidance_in(i), layout.device, drawn=True, key=f"stages.{i}.guidance")
        for i in range(len(config.stages))
    ]
    if config.student.compile:
        teacher.compile(backend=jvpgraph.backend(), dynamic=False)
    # One graph where that can be had. FSDP2 gathers a block's parameters when the block is called, which has to stay a
    # module of its own then; and a network may branch on its data.
    regions = None if config.student.backend == "op_by_op" else "auto"
    of_tangents = jvpgraph.Config(tangent_precision=config.precision.of_tangents)
    backend = config.student.backend
    dual = jvpgraph.transform(student, backend=backend, dynamic=False, regions=regions, config=of_tangents)
    through = None
    if any(stage.objective.through_tangent for stage in config.stages):
        through = jvpgraph.transform(
            student, backend=backend, dynamic=False, differentiable_tangent=True, config=of_tangents
        )

    def new_student() -> TrigFlow:
        rests = traffic if config.fake_score.offload else None
        key = "model" if config.fake_score.network == "student" else config.teacher_key
        whole = key == config.teacher_key and config.teacher.quantization is None  # the values are still there
        if whole and not layout.many and rests is None and not config.teacher.offload:
            return student_of(teacher, config.student.fake_score)
        with torch.random.fork_rng(devices=[]):  # as if nothing were built anew
            again = build_network(config, torch.device("cpu"), key)
            if not whole:
                before = digests.teacher if key == config.teacher_key else digests.base
                layout.ranks.on_first(lambda: check_same(again, before, config, key))
            new = student_of(again, config.student.fake_score, rests=rests)
        if whole:
            take_values(new, teacher)  # a network that starts at random may have another start now
        if config.student.lora is not None:
            share_frozen(new, teacher if key == config.teacher_key else student)
        return new

    return Networks(teacher, guided, guided_in, student, dual, through, new_student, digests, traffic)


def check_same(network: TrigFlow, digest: str, config: RunConfig, key: NetworkKey) -> None:
    if digest_of(network) != digest:
        instead = (
            "teacher.quantization=null"
            if key == config.teacher_key
            else "fake_score.network=teacher, which starts from the teacher's"
        )
        raise ValueError(
            f"{key}: {config.network(key).load} builds another network each time, and the fake score starts from the "
            f"values that it had before. Load its weights from a file, or set {instead}"
        )
