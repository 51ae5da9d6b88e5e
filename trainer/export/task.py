"""What is exported, and the few things that several formats need to know about it."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.evaluation.samplers import few_step_times
from jvpgraph.trainer.files import read_json
from jvpgraph.trainer.model.adapters import diffusers
from jvpgraph.trainer.model.additions import EMBEDDED, INTERVAL, added
from jvpgraph.trainer.model.anyflow import NAME as ANYFLOW
from jvpgraph.trainer.model.anyflow import as_anyflow, fits_anyflow
from jvpgraph.trainer.model.embedded_scale import fix
from jvpgraph.trainer.model.pipelines import check_one_network, class_name
from jvpgraph.trainer.model.saved_additions import saved_with
from jvpgraph.trainer.model.schedulers import even_times, fits_pipelines, own_file, scheduler_for
from jvpgraph.trainer.model.student import merged
from jvpgraph.trainer.objectives import DCM
from jvpgraph.trainer.prepare.families import FAMILIES
from jvpgraph.trainer.run.finished import Run

NETWORK = "transformer"  # the part of a pipeline that is distilled


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
        net = merged(self.run.student)
        if self.fixed_scale is not None:
            fix(net, self.fixed_scale)
        return as_anyflow(net) if fits_anyflow(net) else saved_with(net)

    @property
    def has_scale(self) -> bool:
        """Whether the student was given its guidance scale as an input."""
        return EMBEDDED in added(self.run.student.net)

    @property
    def fixed_scale(self) -> float | None:
        """The guidance scale that the export has in its weights; None: it has none, or is told one."""
        config = self.run.config
        usual = config.conditions.get("guidance") if config.told_scale is None else config.told_scale
        return usual if self.has_scale and not self.keep_scale else None

    @property
    def takes_scale(self) -> bool:
        """Whether the export is told a guidance scale that its class does not know."""
        return self.has_scale and self.fixed_scale is None

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
        """Radians at which the scheduler samples: the run's own, or the even ones next to them."""
        times = self.run_times
        if self.own_times or not self.fits or own_file(scheduler_for(self.run.student, times).scheduler) is None:
            return times
        return even_times(times)

    @property
    def run_times(self) -> list[float]:
        return few_step_times(self.count, self.run.config.sampling)

    @property
    def fits(self) -> bool:
        """Whether a pipeline can sample the student in few steps."""
        known = self.from_diffusers and not self.takes_scale and fits_pipelines(self.run.student)
        return self.run.sampler == "consistency" and known

    @property
    def goes_into_pipelines(self) -> bool:
        flows = self.run.sampler == "flow" and not self.has_second_time and not self.takes_scale
        return flows or self.fits or self.by_jumps

    @cached_property
    def scheduler(self) -> Any:
        if self.by_jumps:
            return diffusers().FlowMapEulerDiscreteScheduler(shift=self.run.config.sampling.shift)
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
        check_one_network(self.pipeline, self.index)
        if self.takes_scale:
            raise ValueError(
                f"no pipeline of diffusers tells a {type(self.net).__name__} the scale of student.embed_scale\n"
                "Leave --keep-scale out: its scale is fixed then, at that of --guidance."
            )
        if self.has_second_time and not self.goes_into_pipelines:
            raise ValueError(
                f"no pipeline of diffusers tells a {type(self.net).__name__} a second time; AnyFlow's does, for Wan "
                "from text to video\n"
                "Export the network alone (without --pipeline), and sample it with jvpgraph sample RUN."
            )
        if not self.goes_into_pipelines:
            raise ValueError(
                f"no scheduler of diffusers lets a pipeline sample this student: it is of {self.run.sampler} in "
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
            if isinstance(scale, int | float) and "guidance_scale" in known:
                thousandfold = type(self.net).__name__ == "HunyuanVideoTransformer3DModel"
                arguments["guidance_scale"] = scale / 1000 if thousandfold else scale
        elif "guidance_scale" in known and "true_cfg_scale" not in known:
            arguments["guidance_scale"] = self.unguided
        if "true_cfg_scale" in known:
            arguments["true_cfg_scale"] = 1.0
        arguments |= config.sampling.call  # as `prepare` wrote it down, for the guidance in the data's card
        if not self.has_scale and (told := told_instead(config)) is not None and "guidance_scale" in known:
            arguments["guidance_scale"] = told
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


def told_instead(config: RunConfig) -> float | None:
    """The guidance scale that the network is told in sampling, where that is not the one in the card of its data."""
    if config.told_scale is not None:
        return config.told_scale
    source = config.data.source
    return source.options.get("guidance") if source.load == "jvpgraph.trainer.prepare:prepared" else None
