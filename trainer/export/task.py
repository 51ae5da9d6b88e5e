"""What is exported, and the few things that several formats need to know about it."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.evaluation.phases import (
    check_from_noise,
    folders_of,
    is_whole,
    knows_all_times,
    said,
    settings_of,
    times_of,
)
from jvpgraph.trainer.files import read_json
from jvpgraph.trainer.model.additions import EMBEDDED, INTERVAL, added
from jvpgraph.trainer.model.anyflow import NAME as ANYFLOW
from jvpgraph.trainer.model.anyflow import as_anyflow, fits_anyflow
from jvpgraph.trainer.model.embedded_scale import fix
from jvpgraph.trainer.model.loading import diffusers
from jvpgraph.trainer.model.pipelines import check_one_network, class_name
from jvpgraph.trainer.model.saved_additions import saved_with
from jvpgraph.trainer.model.schedulers import even_times, fits_pipelines, jump_scheduler, own_file, scheduler_for
from jvpgraph.trainer.model.second_time import takes_r
from jvpgraph.trainer.model.student import merged
from jvpgraph.trainer.model.told import WithScale, unit_of
from jvpgraph.trainer.objectives import DCM
from jvpgraph.trainer.prepare.families import FAMILIES
from jvpgraph.trainer.run.finished import Run
from jvpgraph.trainer.trigflow import HALF_PI, TrigFlow, level

NETWORK = "transformer"  # the part of a pipeline that is distilled
SECOND = "transformer_2"  # the network for low noise, where a pipeline has two
PIPELINES_WITH_R_AT_T = ("AceStepTransformer1DModel",)
SILENT = ("SanaPipeline", "SanaVideoPipeline")  # which tell a network with guidance_embeds no scale: Sprint's does
MARGIN = 1e-5  # of rectified-flow time, by which a pipeline changes networks before the time where the second begins


@dataclass
class Task:
    """A student on its way out of its run.

    Attributes:
        folder: of the run.
        pipeline: a whole pipeline of diffusers that the network belongs to.
        steps: that the scheduler makes; None: the most of sampling.steps.
        own_times: keep the run's times even where diffusers' own schedulers cannot.
        rank: of a LoRA taken from whole weights.
        keep_scale: leave the guidance scale of student.embed_scale an input; else it is fixed, at that of samples.
    """

    run: Run
    folder: Path
    pipeline: Path | None = None
    steps: int | None = None
    own_times: bool = False
    rank: int | None = None
    keep_scale: bool = False

    @cached_property
    def net(self) -> Any:
        """The student's network, adapters added to the weights."""
        net = self.plain(self.run.student)
        return as_anyflow(net) if fits_anyflow(net) else saved_with(net)

    def plain(self, student: TrigFlow) -> Any:
        """The network of a student, adapters and the scale of student.embed_scale in its weights."""
        net, scale = merged(student), self.scale_of(student)
        if scale is not None:
            fix(net, scale)
        return net

    def scale_of(self, student: TrigFlow) -> float | None:
        """The guidance scale that an export of the student has in its weights; None: it has none, or is told one."""
        if self.keep_scale or EMBEDDED not in added(student.net):
            return None
        if isinstance(student.call, WithScale):
            return student.call.usual
        own = student is self.run.student
        config = self.run.config if own else settings_of(folders_of(self.run.parts)[0])
        return config.conditions.get("guidance")

    @property
    def has_scale(self) -> bool:
        """Whether the student was given its guidance scale as an input."""
        return EMBEDDED in added(self.run.student.net)

    @property
    def fixed_scale(self) -> float | None:
        return self.scale_of(self.run.student)

    @property
    def takes_scale(self) -> bool:
        """Whether the export is told a guidance scale that its class does not know."""
        return self.has_scale and self.fixed_scale is None

    @cached_property
    def networks(self) -> dict[str, Any]:
        """What takes the place of the teacher's in a pipeline, by the names of its parts."""
        students = self.run.students
        if len(students) == 1:
            return {NETWORK: self.net}
        low, high = students[:2]
        if len(students) > 2:
            raise ValueError(
                f"{len(students)} students take part in this run's samples, and a pipeline of diffusers has places for "
                "two\nExport each network alone (without --pipeline), and sample them with jvpgraph sample RUN."
            )
        if (type(high.net), high.schedule, high.time_scale) != (type(low.net), low.schedule, low.time_scale):
            raise ValueError(
                f"the students of this run and of {folders_of(self.run.parts)[0]} are no pair for a pipeline: a "
                f"{type(low.net).__name__} of {low.schedule.name} and a {type(high.net).__name__} of "
                f"{high.schedule.name}\nTrain both from the networks of one pipeline."
            )
        plain = self.plain(high)
        if EMBEDDED in added(plain):
            raise ValueError(
                f"the student of {folders_of(self.run.parts)[0]} takes a guidance scale, which no pipeline tells it\n"
                "Leave --keep-scale out; or, if the scale is in its data, export each network alone."
            )
        return {NETWORK: plain, SECOND: self.net}

    @property
    def kinds(self) -> str:
        """How it is sampled; of several students, all ways."""
        return " and ".join(sorted({part.kind for part in self.run.parts}))

    @property
    def whole(self) -> bool:
        """Whether its samples go from noise to data."""
        return self.run.parts[0].start == HALF_PI and self.run.parts[-1].end == 0

    @cached_property
    def boundary(self) -> float | None:
        """Rectified-flow time from which on a pipeline asks the first of two networks.

        It asks that one at the time itself, where the second begins: so it lies above.
        """
        if not folders_of(self.run.parts):
            return None
        meet = next(part.start for part in self.run.parts if not part.folders)
        first, second = level(min(t for t in self.times if t > meet)), level(meet)
        return min(second + MARGIN, (first + second) / 2)

    @property
    def about_part(self) -> str:
        """What has to be said of a student that does not go all the way from noise to data."""
        if is_whole(self.run.parts):
            return ""
        own = [part for part in self.run.parts if not part.folders]
        text = f"This student was trained from rectified-flow time {said(own[0].start)} down to {said(own[-1].end)}"
        if folders := folders_of(self.run.parts):
            return f"{text}; above that, its samples are made by the one in {folders[0]}."
        return f"{text}." if self.whole else f"{text}, and is of use beside one for the other times only."

    @property
    def by_jumps(self) -> bool:
        """Whether a pipeline samples it by jumps from one time to the next: AnyFlow's."""
        return self.run.sampler == "mean_flow" and type(self.net).__name__ == ANYFLOW

    @property
    def own_scheduler(self) -> bool:
        """Whether its pipeline gets another scheduler than the teacher's."""
        return self.run.sampler == "consistency" or self.by_jumps

    @property
    def has_second_time(self) -> bool:
        return self.run.sampler == "mean_flow" or INTERVAL in added(self.run.student.net)

    @property
    def about_bytes(self) -> str:
        """What has to be said of adapters that were trained on weights in bytes; empty where there are none."""
        kind = self.run.config.bytes_below_adapters
        if kind is None:
            return ""
        return f"The adapters were trained on {kind} weights of the teacher (teacher.quantization)."

    @property
    def from_diffusers(self) -> bool:
        return any(cls.__module__.startswith("diffusers.") for cls in type(self.net).__mro__)

    def check_inputs(self, who: str) -> None:
        """Raises ValueError for a student with a second time or a guidance scale, of which `who` tells it none."""
        if self.has_second_time:
            raise ValueError(f"the student takes two times, and {who} it one\nUse --format diffusers.")
        if self.takes_scale:
            raise ValueError(f"the student takes a guidance scale, and {who} it none\nLeave --keep-scale out.")

    @cached_property
    def count(self) -> int:
        return self.steps or max(self.run.config.sampling.steps)

    @cached_property
    def times(self) -> list[float]:
        """Radians at which the scheduler samples: the run's own, or the even ones next to them. Of several students,
        which meet at one of these times, always the run's own."""
        times = self.run_times
        if self.own_times or not knows_all_times(self.run.parts) or not self.fits:
            return times
        even = even_times(times)
        theirs, evenly = (own_file(scheduler_for(self.run.student, each).scheduler) is None for each in (times, even))
        return even if evenly and not theirs else times

    @property
    def run_times(self) -> list[float]:
        return times_of(self.run.config, self.run.stage, self.count)

    @property
    def fits(self) -> bool:
        """Whether a pipeline can sample the student in few steps."""
        known = self.from_diffusers and not self.told_else and fits_pipelines(self.run.student)
        return self.kinds == "consistency" and self.whole and known

    @property
    def told_else(self) -> bool:
        """Whether a pipeline would not tell it what it was told in training: its guidance scale, or r = t."""
        return self.takes_scale or self.told_next or self.told_no_scale

    @property
    def told_no_scale(self) -> bool:
        """Whether its own pipeline tells it no guidance scale, though its class takes one."""
        whole = self.pipeline is not None and (self.pipeline / "model_index.json").is_file()
        return whole and self.index["_class_name"] in SILENT and getattr(self.net.config, "guidance_embeds", False)

    @property
    def told_next(self) -> bool:
        """Whether it was trained with r = t, and pipelines of its class tell it where the step ends, or nothing."""
        student = self.run.student
        at_t = self.run.sampler != "mean_flow" and INTERVAL not in added(student.net) and takes_r(student)
        return at_t and getattr(student.call, "name", None) not in PIPELINES_WITH_R_AT_T

    @property
    def goes_into_pipelines(self) -> bool:
        if folders_of(self.run.parts) and not self.takes_two:
            return False
        by_flow = self.kinds == "flow" and self.whole and not self.has_second_time and not self.told_else
        return by_flow or self.fits or (self.by_jumps and knows_all_times(self.run.parts))

    @property
    def takes_two(self) -> bool:
        """Whether there are two students, and the pipeline has places for them."""
        if self.pipeline is None or len(folders_of(self.run.parts)) != 1:
            return False
        return {SECOND, "boundary_ratio"} <= inspect.signature(self.pipeline_class().__init__).parameters.keys()

    @cached_property
    def scheduler(self) -> Any:
        if self.by_jumps:
            return jump_scheduler(self.run.config.sampling)
        return scheduler_for(self.run.student, self.times).scheduler

    @property
    def levels(self) -> list[float]:
        """The scheduler's sigmas."""
        return self.scheduler.sigmas.tolist()

    def check_pipeline(self) -> Path:
        """The pipeline's folder. Raises ValueError if there is none, or none that can sample the student."""
        if self.pipeline is None:
            raise ValueError(
                "the run's checkpoint is no folder of a whole pipeline\nGive one: --pipeline FOLDER, with a "
                "model_index.json."
            )
        if not (self.pipeline / "model_index.json").is_file():
            raise ValueError(
                f"{self.pipeline} has no model_index.json, so it is no pipeline of diffusers\n"
                "Give the folder that DiffusionPipeline.save_pretrained wrote."
            )
        own = (self.index.get(NETWORK) or ["", ""])[1]
        if (file := self.pipeline / NETWORK / "config.json").is_file():
            own = class_name({"_class_name": own, "norm_type": read_json(file).get("norm_type")})
        if own not in (type(self.net).__name__, type(self.run.student.net).__name__):
            raise ValueError(
                f"{self.pipeline} has a {own or 'pipeline without a ' + NETWORK}, and the student is a "
                f"{type(self.net).__name__}\nGive the pipeline that the teacher comes from."
            )
        check_from_noise(self.run.parts)
        if self.run.parts[-1].end:
            raise ValueError(
                f"{self.about_part}\nExport the run of the next phase, which names this one as dmd.earlier, or the "
                "network alone (without --pipeline)."
            )
        if len(self.networks) == 1:
            check_one_network(self.pipeline, self.index)
        elif not self.takes_two:
            raise ValueError(
                f"a {self.index['_class_name']} has a place for one network, and two students take part in this run's "
                "samples\nExport each alone (without --pipeline), and sample them with jvpgraph sample RUN."
            )
        if self.takes_scale:
            raise ValueError(
                f"no pipeline of diffusers tells a {type(self.net).__name__} the scale of student.embed_scale\n"
                "Leave --keep-scale out: its scale is fixed then, at that of --guidance."
            )
        if self.told_no_scale:
            raise ValueError(
                f"a {self.index['_class_name']} tells its network no guidance scale, which this one takes "
                "(guidance_embeds)\nExport the network alone (without --pipeline), and sample it with jvpgraph sample "
                "RUN."
            )
        if self.told_next:
            raise ValueError(
                f"pipelines of a {type(self.net).__name__} do not tell it r = t, as this run did\n"
                "Export the network alone (without --pipeline), and sample it with jvpgraph sample RUN; or train it by "
                "mean_flow or flow_map."
            )
        if self.has_second_time and not self.goes_into_pipelines:
            raise ValueError(
                f"a {type(self.net).__name__} takes two times, and the one pipeline for jumps between them that export "
                "knows is AnyFlow's, of Wan from text to video\n"
                "Export the network alone (without --pipeline), and sample it with jvpgraph sample RUN."
            )
        if not self.goes_into_pipelines:
            raise ValueError(
                f"no scheduler of diffusers lets a pipeline sample this student: it is of {self.kinds} in "
                f"{self.run.student.schedule.name} coordinates, and pipelines step rectified flows\n"
                "Export the network alone (without --pipeline), and sample it with jvpgraph sample RUN."
            )
        return self.pipeline

    @cached_property
    def index(self) -> dict[str, Any]:
        assert self.pipeline is not None, "asked for after it was found"
        return read_json(self.pipeline / "model_index.json")

    def pipeline_class(self) -> Any:
        return getattr(diffusers(), "AnyFlowPipeline" if self.by_jumps else self.index["_class_name"])

    def arguments(self) -> dict[str, Any]:
        """What the pipeline is called with: the number of steps, and no guidance on top of the student's."""
        known = inspect.signature(self.pipeline_class().__call__).parameters
        config = self.run.config
        objective = config.stages[self.run.stage].objective
        many = self.run.sampler == "flow" and not isinstance(objective, DCM)  # whose segments are few
        arguments: dict[str, Any] = {"num_inference_steps": config.sampling.teacher_steps if many else self.count}
        scale = config.conditions.get("guidance")
        if getattr(self.net.config, "guidance_embeds", False):  # the network is told the scale
            if isinstance(scale, int | float) and (name := told_by(known)) is not None:
                arguments[name] = scale / unit_of(self.net)
        elif "guidance_scale" in known and "true_cfg_scale" not in known:
            arguments["guidance_scale"] = self.unguided
        if "true_cfg_scale" in known:
            arguments["true_cfg_scale"] = 1.0
        arguments |= config.sampling.call  # as `prepare` wrote it down, for the guidance in the data's card
        if not self.has_scale and (told := told_instead(config)) is not None and (name := told_by(known)) is not None:
            arguments[name] = told
        return arguments

    @property
    def unguided(self) -> float:
        """The pipeline's guidance scale that means none."""
        own = self.index["_class_name"]
        return next((family.unguided for family in FAMILIES if own in family.pipelines), 1.0)

    @property
    def first_frame(self) -> bool:
        """Whether the pipeline has to be given a picture to begin with."""
        image = inspect.signature(self.pipeline_class().__call__).parameters.get("image")
        return image is not None and image.default is inspect.Parameter.empty

    def save_scheduler(self, folder: Path) -> list[str]:
        """Writes it, and gives its library and class for a model_index.json."""
        self.scheduler.save_pretrained(folder)
        name = type(self.scheduler).__name__
        if file := own_file(self.scheduler):
            shutil.copy(file, folder / file.name)
            return [file.stem, name]
        return ["diffusers", name]


def told_by(arguments: Collection[str]) -> str | None:
    """The argument of a pipeline's call by which a network is told its guidance scale."""
    return next((name for name in ("distilled_guidance_scale", "guidance_scale") if name in arguments), None)


def told_instead(config: RunConfig) -> float | None:
    """The guidance scale that the network is told in sampling, where that is not the one in the card of its data."""
    if config.told_scale is not None:
        return config.told_scale
    source = config.data.source
    return source.options.get("guidance") if source.load == "jvpgraph.trainer.prepare:prepared" else None
