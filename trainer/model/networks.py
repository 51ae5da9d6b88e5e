"""The networks of a run, built from its settings: teacher, guidance, student, fake score."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from jvpgraph.trainer.batch import Batch, Condition
from jvpgraph.trainer.config import GuidanceConfig, NetworkKey, RunConfig, StageConfig, StudentConfig
from jvpgraph.trainer.data.sample import Dataset, commonest, first_samples, shorten
from jvpgraph.trainer.evaluation.phases import check_steps
from jvpgraph.trainer.model.adamw_8bit import check_float32
from jvpgraph.trainer.model.additions import added, check_reached
from jvpgraph.trainer.model.critic import critic_on
from jvpgraph.trainer.model.experts import Experts
from jvpgraph.trainer.model.parts import gathered, in_bytes, local
from jvpgraph.trainer.model.second_time import takes_r
from jvpgraph.trainer.model.student import make_student
from jvpgraph.trainer.model.told import WithConditions, WithScale, watched
from jvpgraph.trainer.trigflow import Guided, TrigFlow

log = logging.getLogger(__name__)


def device_of(config: RunConfig, local_rank: int | None = None) -> torch.device:
    """The run's device; `local_rank`: of this process among those on this machine, each with a GPU of its own.

    Raises:
        ValueError: this machine does not have it, or it is one GPU for several processes.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {config.device!r} is no device of torch: auto, cpu, cuda, cuda:0, ...") from error
    if local_rank is not None and device.type == "cuda":
        if device.index is not None:
            raise ValueError(f"device: {config.device} is one GPU, and each process needs its own: set device to cuda")
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {config.device} asked for; torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def build_teacher(config: RunConfig, device: torch.device) -> TrigFlow:
    """The network of teacher.model, or of `model`, with which the student starts then."""
    return build_network(config, device, config.teacher_key)


def build_network(config: RunConfig, device: torch.device, key: NetworkKey) -> TrigFlow:
    """Frozen, in evaluation mode: dropout and the like have no place in a teacher's trajectory.

    One that starts at random is the same wherever it is built, in a run and for samples of it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = new_network(config, key)
    if empty := [name for name, tensor in network.state_dict().items() if tensor.is_meta]:
        raise ValueError(
            f"{key}: the weights that {config.network(key).load} reads lack {len(empty)} tensors of "
            f"{type(network.net).__name__}: {shorten(empty)}. Download or export the checkpoint again."
        )
    return network.to(device).requires_grad_(False).eval()


def new_network(config: RunConfig, key: NetworkKey) -> TrigFlow:
    """What the settings' function gives, told the conditions that are the same for all samples.

    Raises:
        ValueError: that is no TrigFlow.
    """
    plug, conditions = config.network(key), config.conditions_of(key)
    network = plug.build()
    if not isinstance(network, TrigFlow):
        raise ValueError(f"{key}.load: {plug.load} gave a {type(network).__name__}; it must return a TrigFlow")
    if key == "model" and isinstance(network.net, Experts):
        raise ValueError(
            f"model.load: {plug.load} gives two networks, and a student is one: name that as `model`, and the two as "
            "teacher.model"
        )
    if conditions:
        network.call = WithConditions(network.call, conditions)
    return network


def build_guided(
    teacher: TrigFlow,
    config: GuidanceConfig,
    device: torch.device,
    *,
    scale: float | None = None,
    drawn: bool = False,
    key: str = "guidance",
) -> Guided:
    """The teacher with guidance, as samples of it have it.

    Args:
        scale: where the settings give two, the one between them.
        drawn: instead, each sample brings its own, as in training.
        key: of the setting, for the error.

    Raises:
        ValueError: there is no negative condition.
    """
    negative = {name: as_tensor(name, value)[None].to(device) for name, value in config.negative.items()}
    if config.negative_file is not None:
        negative |= {name: x[None].to(device) for name, x in load_condition(config.negative_file).items()}
    if config.on and not negative:
        raise ValueError(
            f"{key}.scale is {config.scale} and there is no negative condition: give guidance.negative or "
            "guidance.negative_file, or a scale of 1"
        )
    used = scale
    if not isinstance(config.scale, tuple):
        used = config.scale
    elif drawn:
        used = None
    else:
        assert scale is not None, "a scale to sample with"
    return Guided(teacher, used, negative, config.keep_norm, config.shared, config.interval, config.below)


def as_tensor(name: str, value: Any) -> Tensor:
    """A condition of the settings. Raises ValueError for what is no number, nor a list of them."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"guidance.negative.{name} is {value!r}: give a number, or a list of them as the network takes it, without "
            "quotes"
        ) from error


def load_condition(path: Path) -> dict[str, Tensor]:
    """Raises ValueError for what is no safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"guidance.negative_file: {path} is no safetensors file, or is damaged ({error}). Write it with "
            "safetensors.torch.save_file: a tensor for each condition, without a batch dim"
        ) from error


def build_student(base: TrigFlow, config: StudentConfig, told_scale: float | None = None) -> TrigFlow:
    """A trainable copy of a network; the fake score is one too.

    Args:
        told_scale: the usual one, if it is told the guidance scale.
    """
    student = make_student(
        base,
        dtype=config.dtype,
        lora=config.lora,
        checkpoint_blocks=config.checkpoint_blocks,
        second_time=config.added_time,
        scale=config.added_scale,
    )
    if told_scale is not None:
        student.call = WithScale(student.call, told_scale)
    return student.eval()


def check_run(config: RunConfig, student: TrigFlow, guided: Guided, dataset: Dataset, device: torch.device) -> None:
    """Raises ValueError for what would go wrong later: networks, data, negative condition and stages fit each other."""
    sample = first_samples(dataset, 1).to(device)
    check_teacher(config, guided, sample)
    if config.told_scale is not None:
        check_told(config, student, guided, sample)
    try_network("the student cannot run with a sample of the data", student, sample.x0, sample.cond)
    if added(student.net):
        check_additions(config, student, sample)
    if any(stage.objective.takes_tangent for stage in config.stages):
        check_time(student, sample)
    tried = commonest(dataset)
    shapes = [shape for shape in getattr(dataset, "buckets", []) if shape is not tried]
    others = [first_samples(dataset, 1, shape).to(device) for shape in shapes]
    for other in others:
        try_network("the student cannot run with a sample of another shape", student, other.x0, other.cond)
    for each in (sample, *others) if guided.keep_norm is not None else ():
        what = f"guidance.keep_norm={guided.keep_norm} is not for such latents: set it to null"
        try_network(what, guided, each.x0, each.cond)
    for i, stage in enumerate(config.stages):
        if stage.objective.needs_data and not getattr(dataset, "has_latents", True):
            raise ValueError(
                f"objective {stage.objective.name} learns from latents, and the data set holds prompts only: "
                "train with dmd, or prepare pictures or clips"
            )
        check_stage(stage, student, guided.negative, sample, second_time=config.student.added_time is not None)
        looks = [part.steps for part in (config.validation, config.watch) if part.every is not None and part.steps]
        last = i == len(config.stages) - 1
        if last or config.looked_at:
            try:
                sampling = config.sampling
                stage.objective.check_sampling({*sampling.steps, *looks}, sampling.shift, sampling.gamma)
                check_steps(config, i, {*config.sampling.steps, *looks})
            except ValueError as error:
                if last:
                    raise
                raise ValueError(
                    f"{error}\nThese are the samples of stages.{i} while it is trained: without log.preview_every, "
                    "validation.every and watch.every there are none, and those of the last stage count."
                ) from error
        if (critic := stage.objective.critic) is not None:
            of_teacher = critic.features == "teacher" or config.fake_score.network == "teacher"
            critic_on(guided.model if of_teacher else student, critic, sample)


NEAR, FAR = (10.05, 10.45), 500.0  # of 1000: of the near ones round, floor and ceil make one


@torch.no_grad()
def check_time(student: TrigFlow, sample: Batch) -> None:
    """Warns of a network that rounds its time, whose derivative by it is 0: a table of a thousand times, or .long().

    It is asked at two times that rounding makes one, and at another one. Only times that go up to 1, or to 1000, are
    looked at: in logarithms of sigma integers mean nothing.
    """
    t = torch.full((1,), torch.pi / 2, dtype=torch.float64, device=sample.x0.device)
    last = student.network_time(t).item()
    if not 0.99 <= last <= 1.01 and not 990 <= last <= 1010:
        return

    def at(thousandths: float) -> Tensor:
        time = thousandths / 1000 if last < 2 else thousandths
        vars(student)["network_time"] = lambda t: torch.full_like(t, time).float()
        try:
            F: Tensor = student(sample.x0, t, sample.cond)
            return F
        finally:
            del vars(student)["network_time"]

    one, two, far = map(at, (*NEAR, FAR))
    if torch.equal(one, two) and not torch.equal(one, far):
        log.warning(
            "%s gives the same at the times %g and %g of 1000, to the bit, and something else at %g: it rounds its "
            "time, so that its derivative by it is 0, and the targets of this run lack that part. Let it take its time "
            "as it is: sinusoids of a float, in the place of a table or of .long(), .round() and the like.",
            type(student.net).__name__,
            *NEAR,
            FAR,
        )


def check_additions(config: RunConfig, student: TrigFlow, sample: Batch) -> None:
    """Raises ValueError if the network passes by what it was given, or loses it in a backward."""
    t = torch.full((len(sample),), 0.5, dtype=torch.float64, device=sample.x0.device)
    second = (t / 2,) if takes_r(student) else ()
    plainly = any(stage.objective.trains_plainly for stage in config.stages)
    check_reached(student.net, lambda: student(sample.x0, t, sample.cond, *second), plainly=plainly)


def check_teacher(config: RunConfig, guided: Guided, sample: Batch) -> None:
    """Raises ValueError if the teacher or its negative condition does not fit a sample of the data."""
    check_conditions(config, sample)
    names = [*guided.negative, *guided.shared]
    if guided.negative and sorted(names) != sorted(sample.cond):
        raise ValueError(
            f"the negative condition has {', '.join(sorted(names))}, and the data's samples have "
            f"{', '.join(sorted(sample.cond)) or 'no conditions'}: give the same names in guidance.negative, "
            "or in guidance.shared where it is to have the sample's own"
        )
    what = "the teacher cannot run with a sample of the data"
    if config.teacher.model is not None:
        what = f"teacher.model: {what}. Give a network for the same latents and conditions as `model`"
    try_network(what, guided.model, sample.x0, sample.cond)
    if guided.negative:
        negative = guided.without_prompt(sample.cond, 1)
        try_network("the teacher cannot run with the negative condition", guided.model, sample.x0, negative)


def check_told(config: RunConfig, student: TrigFlow, guided: Guided, sample: Batch) -> None:
    """Raises ValueError if the student, or a fake score of its teacher's network, cannot be told its guidance scale."""
    name, why_not = type(student.net).__name__, untold(student, sample)
    if config.student.embed_scale:
        if why_not is None:
            raise ValueError(
                f"student.embed_scale is for networks that take no guidance scale, and {name} takes it as its "
                "condition `guidance`, by which it is told: set student.embed_scale to false"
            )
        return
    what = "guidance.scale gives two numbers, so that the student is told its scale as the condition `guidance`, and"
    if why_not is not None:
        raise ValueError(
            f"{what} {name} {why_not}. Set student.embed_scale=true, which gives it an input for that, or give one "
            "number"
        )
    scored = any(stage.objective.fake_score is not None for stage in config.stages)
    if scored and config.fake_score.network == "teacher" and (why_not := untold(guided.model, sample)) is not None:
        raise ValueError(
            f"{what} so is the fake score, which starts from the teacher's network, and that {why_not}. Set "
            "fake_score.network=student, or give one number"
        )


def untold(model: nn.Module, sample: Batch) -> str | None:
    """Why a network itself, without what was added to it, takes no condition `guidance`; None: it does."""
    more = {"guidance": torch.ones(len(sample), device=sample.x0.device)}
    with torch.compiler.set_stance("force_eager"), watched(model, more) as names:
        try:
            try_network("cannot run with it", model, sample.x0, sample.cond)
        except ValueError as error:
            return str(error)
    return None if "guidance" in names else "does not look at it"


def check_conditions(config: RunConfig, sample: Batch) -> None:
    """Raises ValueError for a condition of all samples that the samples have themselves, which would hide it."""
    given = {"conditions": config.conditions, "teacher.conditions": config.teacher.conditions or {}}
    for key, name in ((key, name) for key, names in given.items() for name in sorted(names) if name in sample.cond):
        told = name == "guidance" and name in inspect.signature(config.data.source.function()).parameters
        raise ValueError(
            f"{key}.{name}: the data's samples have a {name} of their own, which would count: take it out of {key}"
            f"{', and set data.source.options.guidance' if told else ''}"
        )


@torch.no_grad()
def try_network(what: str, model: nn.Module, x0: Tensor, cond: Condition) -> None:
    given = ", ".join(f"{name} {list(x.shape)} {str(x.dtype)[6:]}" for name, x in {"x0": x0, **cond}.items())
    times = (0.01, 1.56) if isinstance(getattr(model, "net", None), Experts) else (0.5,)  # of both
    try:
        F, *_ = [model(x0, torch.full((1,), t, dtype=torch.float64, device=x0.device), cond) for t in times]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        raise ValueError(f"{what} ({given}): {error}") from error
    if F.shape != x0.shape:
        raise ValueError(f"{what} ({given}): it gives {list(F.shape)}, not the shape of x0")


def check_stage(
    stage: StageConfig, student: TrigFlow, negative: Condition, sample: Batch, *, second_time: bool = False
) -> None:
    """Raises ValueError if the stage cannot train this network on data like `sample`.

    `second_time`: whether the student was given one, and is sampled by jumps over intervals therefore.
    """
    objective = stage.objective
    if objective.second_time and not takes_r(student):
        raise ValueError(
            f"objective {objective.name} needs a network with a second time, and {type(student.net).__name__} takes "
            "none: set student.second_time=true, which gives it one"
        )
    if second_time and not objective.knows_second_time:
        raise ValueError(
            f"objective {objective.name} trains the student at r = t alone, and one with a second time is sampled by "
            "jumps from t to r: take mean_flow, or set student.second_time=false"
        )
    if objective.needs_negative and not negative:
        raise ValueError(f"objective {objective.name} asks the network without a prompt: give guidance.negative")
    if "adamw_8bit" in (stage.student.kind, objective.fake_score and stage.fake.kind):
        check_float32(trainable(student))
    if stage.condition_dropout:
        if not negative:
            raise ValueError("condition_dropout needs a negative condition to drop to: give guidance.negative")
        for name, value in negative.items():
            if value.shape != sample.cond[name].shape:
                raise ValueError(
                    f"condition_dropout needs a negative condition of the data's shape: {name} is "
                    f"{list(value.shape[1:])}, and {list(sample.cond[name].shape[1:])} in the data; pad one of them"
                )


@torch.no_grad()
def take_values(student: TrigFlow, teacher: TrigFlow) -> None:
    """Gives a student that was built beside its teacher the teacher's values; adapters stay as they are.

    A collective where one of the two is sharded in another way than the other.
    """
    values: dict[str, Tensor] = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
    for name, target in (*student.named_parameters(), *student.named_buffers()):
        source = values.get(name, values.get(name.replace(".base_layer.", ".")))
        if source is None:
            continue
        if spread_over(source) != spread_over(target):
            source = gathered(source)
            if isinstance(target, DTensor):
                source = distribute_tensor(source, target.device_mesh, target.placements)
        local(target).copy_(local(source))


@torch.no_grad()
def share_frozen(student: TrigFlow, teacher: TrigFlow) -> None:
    """Puts the teacher's parameters in the place of those that neither trains, and frees a LoRA student's own.

    They may be those of another student of the same network, too. In one process they are the same anyway. FSDP2 splits
    each network by itself, and here the parts become one; but it leaves weights in bytes alone, and what else their
    teacher has: of that each network keeps its own.
    """
    named = teacher.named_parameters(remove_duplicate=False)
    theirs = {name.replace(".base_layer.", "."): parameter for name, parameter in named}
    bytewise = any(map(in_bytes, theirs.values()))
    for path, module in student.named_modules():
        for name, own in module._parameters.items():
            source = theirs.get(f"{path}.{name}".replace(".base_layer.", "."))
            if own is None or own.requires_grad or source is None or source.requires_grad:
                continue
            if spread_over(source) != spread_over(own):
                assert bytewise, f"{path}.{name} is spread in another way"
                continue
            module._parameters[name] = source
    student._apply(lambda tensor: tensor)  # after which FSDP2 gathers from these


def spread_over(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moving(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, and buffers: what is not the teacher's own."""
    state = model.state_dict()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


@contextmanager
def averaged(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts other values in the place of what is trained, such as an average, and afterwards its own back, bit for bit.

    Costs one copy of what is trained, and nothing of what is sharded is gathered.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        kept = {name: local(parameters[name]).clone() for name in weights}
        try:
            for name, value in weights.items():
                local(parameters[name]).copy_(local(value))
            yield
        finally:
            for name, value in kept.items():
                local(parameters[name]).copy_(value)


def with_weights(model: TrigFlow, weights: Mapping[str, Tensor]) -> TrigFlow:
    """A frozen copy of a student with other values for what is trained of it, such as an average; shares the rest."""
    model = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    set_weights(model, weights)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Values for all that is trained, by name. Raises ValueError if they are those of another network."""
    parameters = trainable(model)
    shapes, given = ({name: list(x.shape) for name, x in of.items()} for of in (parameters, weights))
    if wrong := [name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)]:
        raise ValueError(
            f"the weights are those of another network: {shorten(sorted(wrong))} are missing on one side, or of "
            "another shape\nGive the network that they were averaged of."
        )
    for name, value in weights.items():
        parameters[name].copy_(value)
