"""The networks of a run, built from its settings and spread over its processes, each kept as the settings say.

A LoRA student and its fake score are the teacher with adapters: modules of their own around the same frozen parameters,
in one process and, where FSDP2 shards them, in many. So none of them has to be told which part it plays before a call,
which a block that is computed again in the backward could not be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import jvpgraph
from jvpgraph.passes.context import Report
from jvpgraph.trainer.config import RunConfig, StudentConfig, TeacherConfig
from jvpgraph.trainer.model.networks import build_guided, build_student, build_teacher, share_frozen, take_values
from jvpgraph.trainer.model.offload import Traffic
from jvpgraph.trainer.model.quantize import put_on_bytes, quantize
from jvpgraph.trainer.objectives import Objective
from jvpgraph.trainer.run.origin import digest_of
from jvpgraph.trainer.run.parallel import Layout
from jvpgraph.trainer.run.start import start_from
from jvpgraph.trainer.trigflow import Guided, TrigFlow


@dataclass(frozen=True)
class Networks:
    """What is there through all stages."""

    teacher: TrigFlow  # frozen
    guided: Guided  # the teacher with classifier-free guidance
    student: TrigFlow
    dual: jvpgraph.DualModule  # the student with tangents; the same parameters
    through: jvpgraph.DualModule | None  # likewise, with gradients through the tangents, if a stage asks for that
    new_student: Callable[[], TrigFlow]  # a copy of the teacher like the student: a fake score
    digest: str  # of the teacher's values, on the first process
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
        teacher: TrigFlow, settings: StudentConfig, start: Path | None = None, rests: Traffic | None = None
    ) -> TrigFlow:
        student = build_student(teacher, settings)
        if start is not None:
            start_from(student, start)
        put_on_bytes(student, teacher, config.bytes_below_adapters)  # before FSDP2 has its parameters
        student = layout.spread(student, rests)
        if config.student.compile:
            student.compile(backend=jvpgraph.backend(), dynamic=False)
        return student

    teacher = build_teacher(config, workshop)
    digest = digest_of(teacher) if layout.first else ""
    student = student_of(teacher, config.student, start)  # a copy of the teacher before that is taken apart
    rests = traffic if config.teacher.offload else None
    if config.teacher.quantization is not None:
        teacher = layout.keep(quantize(teacher, config.teacher.quantization), rests)
    else:
        teacher = layout.spread(teacher, rests)
    if config.student.lora is not None:
        share_frozen(student, teacher)
    guided = build_guided(teacher, config.guidance, layout.device)
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
        if not layout.many and rests is None and config.teacher == TeacherConfig():
            return student_of(teacher, config.student.fake_score)
        with torch.random.fork_rng(devices=[]):  # as if nothing were built anew
            again = build_teacher(config, torch.device("cpu"))
            if config.teacher.quantization is not None:  # the values that it had are gone
                layout.ranks.on_first(lambda: check_same(again, digest, config))
            new = student_of(again, config.student.fake_score, rests=rests)
        if config.teacher.quantization is None:
            take_values(new, teacher)  # a network that starts at random may have another start now
        if config.student.lora is not None:
            share_frozen(new, teacher)
        return new

    return Networks(teacher, guided, student, dual, through, new_student, digest, traffic)


def check_same(teacher: TrigFlow, digest: str, config: RunConfig) -> None:
    if digest_of(teacher) != digest:
        raise ValueError(
            f"teacher.quantization: {config.model.load} builds another network each time, and the fake score starts "
            "from the values that the teacher had before. Load its weights from a file, or set teacher.quantization="
            "null"
        )
