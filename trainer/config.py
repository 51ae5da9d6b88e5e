"""A run's settings: frozen dataclasses, each field with its unit and where its default comes from.

The comments are what `jvpgraph train --help` prints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from jvpgraph.precision import Policy, Precision
from jvpgraph.trainer.guidance import GuidanceConfig, StageGuidance
from jvpgraph.trainer.model.additions import TimeInput
from jvpgraph.trainer.model.student import LoRA
from jvpgraph.trainer.objectives import RCM, FlowMatching, Objective
from jvpgraph.trainer.pictures import Film
from jvpgraph.trainer.plug import Plug
from jvpgraph.trainer.ranges import not_negative, positive
from jvpgraph.trainer.trigflow import HALF_PI, meet

NetworkKey = Literal["model", "teacher.model"]


@dataclass(frozen=True)
class StudentConfig:
    """What is trained: a copy of the network of `model`."""

    dtype: Literal["float32", "bfloat16", "float64"] | None = None  # of the weights; null: the teacher's
    lora: LoRA | None = None  # train low-rank adapters only (peft), on the teacher's weights
    checkpoint_blocks: bool = False  # save memory: recompute each block's primal in the backward pass
    backend: Literal["inductor", "eager", "op_by_op"] = "inductor"  # of jvpgraph.transform
    compile: bool = False  # torch.compile the teacher, the fake score and the student's calls without tangents too
    second_time: bool | TimeInput = False  # take r beside t, for average velocities; where, if that is not known
    embed_scale: bool | TimeInput = False  # take the guidance scale too; where, if that is not known

    @property
    def added_time(self) -> TimeInput | None:
        """Where a second time is to be taken in; None: there is none."""
        return self._where(self.second_time)

    @property
    def added_scale(self) -> TimeInput | None:
        """Where the guidance scale is to be taken in; None: it is not."""
        return self._where(self.embed_scale)

    def _where(self, setting: bool | TimeInput) -> TimeInput | None:
        """One place is enough for both."""
        named = [place for place in (setting, self.second_time, self.embed_scale) if isinstance(place, TimeInput)]
        return (named or [TimeInput()])[0] if setting else None

    @property
    def fake_score(self) -> StudentConfig:
        """How the fake score is built, which gives the velocity of a score: it has one time."""
        return replace(self, second_time=False, embed_scale=self.added_scale or False)


@dataclass(frozen=True)
class PrecisionConfig:
    """Of what is computed, beside the dtype of the weights."""

    tangent: Precision | dict[str, Precision] = "float32"  # of jvpgraph.Config; or by module and op, as jvpgraph.Policy
    probe_every: int | None = None  # steps between looks at the tangent's error on two samples; null: none
    probe_limit: float = 0.1  # relative error of the tangent from which on a look warns

    def __post_init__(self) -> None:
        positive(self, "probe_every", "probe_limit")

    @property
    def of_tangents(self) -> Precision | Policy:
        """For jvpgraph.Config.tangent_precision."""
        return Policy(self.tangent) if isinstance(self.tangent, dict) else self.tangent


@dataclass(frozen=True)
class TeacherConfig:
    """What the student learns from, which is only asked and never trained, and how it is kept."""

    model: Plug | None = None  # a network of another size or checkpoint than the student's; null: `model` itself
    conditions: dict[str, Any] | None = None  # of all samples, for teacher.model; null: those of `conditions`
    offload: bool = False  # rest on the CPU; each block is on the device while it computes
    quantization: Literal["int8", "float8"] | None = None  # of its linear layers' weights, a scale a row (torchao)


@dataclass(frozen=True)
class FakeScoreConfig:
    """The fake score of rcm and dmd, which is built like the student, and how it is kept."""

    network: Literal["student", "teacher"] = "student"  # starts from `model`, or as DMD2 from teacher.model
    offload: bool = False  # rest on the CPU, with its gradients and its optimiser, which steps there


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    kind: Literal["adamw", "adamw_8bit"] = "adamw"  # 8bit: moments in a byte each instead of four (torchao)
    lr: float = 2e-6  # per update; rCM at 1.3B: 2e-6 student, 4e-7 fake score
    betas: tuple[float, float] = (0.0, 0.999)  # rCM
    eps: float = 1e-8  # torch's default
    weight_decay: float = 0.01  # rCM
    clip_norm: float | None = None  # L2 norm of all gradients; null: off, which rCM calls crucial
    warmup: int = 0  # updates of linear rise of lr
    decay: Literal["constant", "cosine"] = "constant"  # of lr after the rise, over the stage

    def __post_init__(self) -> None:
        positive(self, "lr", "eps", "clip_norm")
        not_negative(self, "weight_decay", "warmup")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas} and must be in [0, 1)")


@dataclass(frozen=True)
class StageConfig:
    """One objective for some steps. Stages run in a row, each on the weights of the one before."""

    steps: int  # student updates
    objective: Objective = field(default_factory=RCM)  # rcm, scm, dmd, dcm, mean_flow, ..., or terms of them
    batch: int = 64  # samples per forward, over all processes
    accumulate: int = 1  # forwards per update, of student, fake score and critic
    condition_dropout: float = 0.0  # share of conditions replaced by the negative one; 0.1 to train a teacher
    student: OptimizerConfig = field(default_factory=OptimizerConfig)
    fake: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=4e-7))  # of the fake score
    critic: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))  # of the heads of adversarial
    guidance: StageGuidance = field(default_factory=StageGuidance)  # of the teacher, in this stage

    @property
    def fake_begins(self) -> int:
        """Student updates before the first one that fake score and critic follow."""
        first = (i for i in range(1, self.steps + 1) if self.objective.fake_updates(i))
        return next(first, 1) - 1

    def __post_init__(self) -> None:
        positive(self, "steps", "batch", "accumulate")
        critic = self.objective.critic
        if critic is None and self.objective.needs_critic:
            raise ValueError(
                "dmd.divergence needs the ratio that a critic learns: put an adversarial term beside dmd in terms, "
                "with weight 0 for its ratio alone; or set divergence to reverse_kl"
            )
        if critic is not None and self.objective.needs_critic and critic.loss != "softplus":
            raise ValueError("dmd.divergence needs a critic with loss softplus: that of hinge is no ratio of densities")
        if self.objective.needs_critic and critic.made_by != self.objective.fake_score.simulation:
            raise ValueError(
                "dmd.divergence weighs by the ratio of dmd's samples, and adversarial.simulation makes other ones for "
                "the critic: leave it out"
            )
        if critic is not None and critic.features == "fake_score" and self.objective.fake_score is None:
            raise ValueError(
                "adversarial.features: no term trains a fake score. Put dmd beside it in terms, or set features to "
                "teacher"
            )
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout is {self.condition_dropout} and must be in [0, 1)")


@dataclass(frozen=True)
class ParallelConfig:
    """Processes that train together, started by torchrun; their number is the product of the five sizes."""

    dp_shard: int = 1  # how many parts weights and batch are split into (FSDP2); -1: all remaining processes
    dp_replicate: int = 1  # copies of that, each with its part of the batch (HSDP)
    tp: int = 1  # the matrices of the layers are split (tensor parallel)
    cp_ulysses: int = 1  # the tokens are split, in attention the heads (Ulysses); weights are sharded too
    cp_ring: int = 1  # the tokens are split, keys and values go round (ring attention); weights are sharded too
    timeout: float = 600.0  # seconds that a process waits for the others before it gives up

    def __post_init__(self) -> None:
        positive(self, "dp_replicate", "tp", "cp_ulysses", "cp_ring", "timeout")
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ValueError(f"dp_shard is {self.dp_shard} and must be above 0, or -1 for all remaining processes")


@dataclass(frozen=True)
class DataConfig:
    """Latents and conditions."""

    source: Plug = field(default_factory=lambda: Plug("jvpgraph.trainer.data.digits:digits"))  # gives the data set
    workers: int = 0  # processes that read ahead; 0: read in the training process

    def __post_init__(self) -> None:
        not_negative(self, "workers")


@dataclass(frozen=True)
class EMAConfig:
    """Power-function averages of the weights (Karras et al. 2024)."""

    sigma_rel: tuple[float, ...] = (0.05, 0.1)  # widths as shares of the stage; the first is sampled. rCM: 0.05
    snapshot_every: int | None = None  # steps between snapshots, from which other widths are made afterwards
    device: Literal["run", "cpu"] = "run"  # where they are kept; cpu frees a GPU of 4 bytes a parameter and width

    def __post_init__(self) -> None:
        positive(self, "snapshot_every")
        if not self.sigma_rel or not all(0 < sigma < 0.29 for sigma in self.sigma_rel):
            raise ValueError(f"sigma_rel is {self.sigma_rel}: one or more widths between 0 and 0.28")
        if len({f"{sigma:g}" for sigma in self.sigma_rel}) < len(self.sigma_rel):
            raise ValueError(f"sigma_rel is {self.sigma_rel}: each width once")


@dataclass(frozen=True)
class CheckpointConfig:
    """Where a run resumes after a stop."""

    every: int = 500  # steps; the last step of a stage is always saved
    keep: int = 3  # how many of the latest stay
    asynchronous: bool = True  # write while training goes on

    def __post_init__(self) -> None:
        positive(self, "every", "keep")


@dataclass(frozen=True)
class LogConfig:
    """What a run shows."""

    every: int = 10  # steps between log lines
    tensorboard: bool = False  # event files in OUT/tensorboard
    wandb: str | None = None  # project name
    preview_every: int | None = None  # steps between previews in OUT/samples, TensorBoard and wandb
    preview_count: int = 16  # samples per grid
    prompts: tuple[str, ...] = ()  # texts of yours for previews beside the data's
    prompts_pipeline: Path | None = None  # folder whose text encoders encode them; null: that of the teacher
    fps: float = 16.0  # frames per second of previews that are videos
    film: Film = "webp"  # mp4 loses a little, plays anywhere, and needs PyAV: pip install av
    flops: bool = True  # count FLOPs per update, in a process beside the run, for those per second
    peak_tflops: float | None = None  # TFLOPs per second of one device, for utilisation; null: by its name, if known

    def __post_init__(self) -> None:
        positive(self, "every", "preview_every", "preview_count", "peak_tflops", "fps")


@dataclass(frozen=True)
class SamplingConfig:
    """How students and teachers are sampled; times in TrigFlow radians."""

    sigma_max: float | None = None  # samples begin at atan(sigma_max); null: 80 (rCM), and jumps at pure noise
    middle_times: tuple[float, ...] = (1.3, 1.0, 0.6)  # n steps use the first n - 1; rCM; its code: 1.5, 1.4, 1.0
    steps: tuple[int, ...] = (1, 2, 4)  # what `jvpgraph evaluate` looks at
    gamma: float = 0.0  # of jumps: how much of the noise between them is new; 0: along the flow, 1: all of it (CTM)
    teacher_steps: int = 50  # Euler steps of the teacher
    shift: float = 1.0  # of the Euler steps in rectified-flow time; 5 for Wan at 720p, 3 at 480p
    guidance: float | None = None  # where guidance.scale is two: of samples; null: the middle
    earlier: Path | None = None  # folder of a run whose student makes what this one begins from, below pure noise
    batch: int = 64  # samples at a time
    decode: Plug | None = None  # a function from latents [B, ...] to images in [0, 1]
    call: dict[str, Any] = field(default_factory=dict)  # of the pipeline that samples prompts: height, width, ...

    def __post_init__(self) -> None:
        positive(self, "sigma_max", "teacher_steps", "shift", "guidance", "batch")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps is {self.steps}: one or more numbers from 1")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma} and must be in [0, 1]")
        times = [self.start("consistency"), *self.middle_times, 0.0]
        if not all(earlier > later for earlier, later in pairwise(times)):
            raise ValueError(
                f"middle_times are {list(self.middle_times)}: radians that fall, below atan(sigma_max) = "
                f"{times[0]:.4g} and above 0"
            )

    def start(self, kind: str) -> float:
        """Radians where samples of a kind begin, which see pure noise there; `kind` as in RunConfig.sampler."""
        if kind == "flow" or (kind == "mean_flow" and self.sigma_max is None):
            return HALF_PI
        return math.atan(self.sigma_max or 80.0)


@dataclass(frozen=True)
class EvaluationConfig:
    """Distances between samples and real data."""

    features: Plug | None = None  # a feature space; see jvpgraph.trainer.features
    count: int = 10_000  # samples per sampler and seed, at most the size of the data set
    seeds: tuple[int, ...] = (0, 1, 2)  # sampling seeds, for the spread
    neighbours: int = 3  # k of precision and recall (Kynkaanniemi et al. 2019)

    def __post_init__(self) -> None:
        positive(self, "count", "neighbours")
        if not self.seeds:
            raise ValueError("seeds is empty: give at least one")


@dataclass(frozen=True)
class ValidationConfig:
    """Figures of the averaged student while a run goes on, beside its teacher's for the same noise."""

    every: int | None = None  # steps; null: off
    count: int = 64  # samples, for the data's first conditions; at most as many as it has
    steps: int | None = None  # network passes of the student; null: the most of sampling.steps
    seed: int = 0  # of the noise
    measures: dict[str, Plug] = field(default_factory=dict)  # by name; jvpgraph.trainer.measures has some, or yours

    def __post_init__(self) -> None:
        positive(self, "every", "count", "steps")
        not_negative(self, "seed")
        if self.every is not None and not self.measures:
            raise ValueError("measures is empty: name at least one, such as jvpgraph.trainer.measures:fid")


@dataclass(frozen=True)
class WatchConfig:
    """Signs of a run that goes wrong, in samples of the averaged student: docs/training_goes_wrong.md."""

    every: int | None = None  # steps between looks; null: off
    count: int = 16  # conditions, the data's first
    repeats: int = 2  # samples of each, whose distances are the diversity
    steps: int | None = None  # network passes of the student; null: the most of sampling.steps
    seed: int = 0  # of the noise, which is the same at each look

    def __post_init__(self) -> None:
        positive(self, "every", "count", "repeats", "steps")
        not_negative(self, "seed")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: `jvpgraph train CONFIG`."""

    out: Path  # folder of checkpoints, logs and samples
    model: Plug  # gives what the student starts as, a TrigFlow: jvpgraph.trainer.adapters:diffusers_model or yours
    stages: tuple[StageConfig, ...]  # one after the other
    imports: tuple[str, ...] = ()  # modules or .py files with objectives and time distributions of yours
    seed: int = 0  # of everything random
    device: str = "auto"  # auto: cuda if there is one
    threads: int | None = None  # CPU threads; null: torch's choice
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    fake_score: FakeScoreConfig = field(default_factory=FakeScoreConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    conditions: dict[str, Any] = field(default_factory=dict)  # the same for all samples: {guidance: 3.5} for FLUX.1-dev
    data: DataConfig = field(default_factory=DataConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    @property
    def bytes_below_adapters(self) -> Literal["int8", "float8"] | None:
        """What weights of the teacher the student's adapters are trained on, if those are in bytes."""
        own = self.student.lora is None or self.teacher.model is not None
        return None if own else self.teacher.quantization

    @property
    def teacher_key(self) -> NetworkKey:
        """The setting that names the teacher's network."""
        return "model" if self.teacher.model is None else "teacher.model"

    def network(self, key: NetworkKey) -> Plug:
        """What gives a network."""
        return self.model if key == "model" or self.teacher.model is None else self.teacher.model

    def conditions_of(self, key: NetworkKey) -> dict[str, Any]:
        """The same for all samples that the network gets."""
        other = None if key == "model" else self.teacher.conditions
        return self.conditions if other is None else other

    def guidance_in(self, stage: int) -> GuidanceConfig:
        """The teacher's guidance in a stage."""
        return self.guidance.in_stage(self.stages[stage].guidance)

    def scales_asked(self, stage: int) -> tuple[float, float]:
        """The lowest and the highest guidance scale of a stage."""
        scale = self.guidance_in(stage).scale
        return scale if isinstance(scale, tuple) else (scale, scale)

    def scales_in(self, stage: int) -> tuple[float, float] | None:
        """The lowest and the highest guidance scale that the student is told in a stage; None: it is told none."""
        return None if self.told_scale is None else self.scales_asked(stage)

    def scale_of_samples(self, stage: int) -> float | None:
        """Of guidance: what students of other runs are told in samples of a stage; None: there is none, and they are
        told their own."""
        if self.told_scale is not None:
            return self.told_scale
        scale = self.scales_asked(stage)[0]
        return None if scale == 1 else scale

    @property
    def told_scale(self) -> float | None:
        """The guidance scale that a student is told when it is sampled, if it learns more than one."""
        scales = [self.guidance_in(index).scale for index in range(len(self.stages))]
        if not any(isinstance(scale, tuple) for scale in (self.guidance.scale, *scales)):
            return None
        if self.sampling.guidance is not None:
            return self.sampling.guidance
        learnt = scales[-1]
        return sum(learnt) / 2 if isinstance(learnt, tuple) else learnt

    @property
    def looked_at(self) -> bool:
        """Whether samples are made while it runs."""
        return any((self.log.preview_every, self.validation.every, self.watch.every))

    def sampler(self, stage: int) -> str:
        """How the student of a stage is sampled: consistency, mean_flow or flow."""
        own = self.stages[stage].objective.sampler
        return "mean_flow" if self.student.added_time is not None and own == "consistency" else own

    def __post_init__(self) -> None:
        positive(self, "threads")
        not_negative(self, "seed")
        if not self.stages:
            raise ValueError("stages is empty: a run needs at least one")
        for problem in self.problems():
            raise ValueError(problem)

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        for index, stage in enumerate(self.stages):
            objective, key = stage.objective, f"stages.{index}.objective"
            try:
                self.guidance_in(index)
            except ValueError as error:
                yield f"stages.{index}.guidance: {error}"
            if objective.critic is not None and self.student.compile:
                yield (
                    f"{key}: a critic looks into the blocks of a network, and student.compile makes them one piece. "
                    "Set it to false"
                )
            if isinstance(self.guidance_in(index).scale, tuple) and not objective.asks_teacher:
                yield (
                    f"{key}: {objective.name} has no teacher here, and guidance.scale gives two numbers: the student "
                    "would be told a scale that changes nothing. Give one number"
                )
            if objective.guided_apart and not self.guidance_in(index).on:
                yield f"{key}: dmd.guidance_times are for guidance, and guidance.scale is 1: set one of them"
            if objective.asks_teacher and (idle := self.guidance_in(index).idle(objective.asked)) is not None:
                yield f"stages.{index}: {idle} (rectified-flow times, 1 is noise). Change one of them"
        teachers = [i for i, stage in enumerate(self.stages) if isinstance(stage.objective, FlowMatching)]
        learning = [i for i, stage in enumerate(self.stages) if stage.objective.asks_teacher]
        if self.teacher.model is None and teachers and learning and teachers[0] < learning[-1]:
            yield (
                f"stages.{learning[-1]} learns from `model` as it is loaded, not from what flow_matching makes of it "
                f"in stages.{teachers[0]}: train that in a run of its own, and name what `jvpgraph export` writes as "
                "`model`; or name teacher.model, if it is another or the loaded one that you mean"
            )
        lowest = self.stages[0].objective.span[1]
        for index, stage in enumerate(self.stages[1:], 1):
            (start, end), samples = stage.objective.span, stage.objective.simulated
            if start < lowest and not meet(start, lowest) and (samples is None or samples.earlier is None):
                yield (
                    f"stages.{index}.objective starts at {start:.6g} radians, and the stages before it end at "
                    f"{lowest:.6g}, so that nobody learns the times between. Make them one"
                )
            lowest = min(lowest, end)
        if self.guidance.interval != (0.0, 1.0) and not any(self.guidance_in(i).on for i in range(len(self.stages))):
            yield "guidance.interval is for guidance, and guidance.scale is 1 in all stages: set one of them"
        if self.teacher.model is None:
            for key, needless in (
                ("teacher.conditions", self.teacher.conditions is not None),
                ("fake_score.network=teacher", self.fake_score.network == "teacher"),
            ):
                if needless:
                    yield (
                        f"{key} is for a teacher of its own, and there is no teacher.model: name one, or leave it out"
                    )
        if self.student.embed_scale and self.told_scale is None:
            yield (
                "student.embed_scale tells a student its guidance scale, and guidance.scale is one number: give two, "
                "between which it is drawn in training, or set student.embed_scale to false"
            )
        if self.sampling.guidance is not None and self.told_scale is None:
            yield (
                "sampling.guidance is for a student that is told its guidance scale, and guidance.scale is one number: "
                "give two, between which it is drawn in training, or leave sampling.guidance out"
            )
        if self.sampling.gamma and (kind := self.sampler(len(self.stages) - 1)) != "mean_flow":
            yield (
                f"sampling.gamma is for the jumps of students with two times, and this one's samples are of {kind}: "
                "set it to 0"
            )
        learnt = self.scales_in(len(self.stages) - 1)
        if self.sampling.guidance is not None and learnt is not None:
            low, high = learnt
            if not low <= self.sampling.guidance <= high:
                yield (
                    f"sampling.guidance is {self.sampling.guidance:g}, and the student learns scales from "
                    f"{low:g} to {high:g}{' in its last stage' * (len(self.stages) > 1)}: give one of these"
                )
