"""The networks of a run, built from its settings: teacher, guidance, student, fake score."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.config import GuidanceConfig, RunConfig, StageConfig, StudentConfig
from jvpgraph.trainer.data.sample import Dataset, collate
from jvpgraph.trainer.student import make_student
from jvpgraph.trainer.trigflow import Guided, TrigFlow


def device_of(config: RunConfig) -> torch.device:
    """Raises ValueError for a device that this machine does not have."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {config.device} asked for, and torch {torch.__version__} sees no CUDA device")
    return device


def build_teacher(config: RunConfig, device: torch.device) -> TrigFlow:
    """Frozen, in evaluation mode: dropout and the like have no place in a teacher's trajectory."""
    teacher = config.model.build()
    if not isinstance(teacher, TrigFlow):
        raise ValueError(f"model.load: {config.model.load} gave a {type(teacher).__name__}; it must return a TrigFlow")
    return teacher.to(device).requires_grad_(False).eval()


def build_guided(teacher: TrigFlow, config: GuidanceConfig, device: torch.device) -> Guided:
    negative = {name: torch.as_tensor(value)[None].to(device) for name, value in config.negative.items()}
    if config.negative_file is not None:
        negative |= {name: x[None].to(device) for name, x in load_condition(config.negative_file).items()}
    if config.scale != 1 and not negative:
        raise ValueError(
            f"guidance.scale is {config.scale} and there is no negative condition: give guidance.negative or "
            "guidance.negative_file, or a scale of 1"
        )
    return Guided(teacher, config.scale, negative)


def load_condition(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"guidance.negative_file: {path} does not exist")
    return load_file(path)


def build_student(teacher: TrigFlow, config: StudentConfig) -> TrigFlow:
    """A trainable copy of the teacher; the fake score is one too."""
    student = make_student(teacher, dtype=config.dtype, lora=config.lora, checkpoint_blocks=config.checkpoint_blocks)
    return student.eval()


@torch.no_grad()
def check_data(guided: Guided, dataset: Dataset, device: torch.device) -> None:
    """Raises ValueError if the network does not take a sample of the data, or the negative condition."""
    batch = collate([dataset[0]]).to(device)
    given = ", ".join(f"{name} {list(x.shape)}" for name, x in {"x0": batch.x0, **batch.cond}.items())
    if guided.negative and guided.negative.keys() != batch.cond.keys():
        raise ValueError(
            f"the negative condition has {', '.join(sorted(guided.negative))}, and the data's samples have "
            f"{', '.join(sorted(batch.cond)) or 'no conditions'}: give the same names in guidance.negative"
        )
    t = torch.full((1,), 0.5, dtype=torch.float64, device=device)
    for what, cond in (("a sample of the data", batch.cond), ("the negative condition", guided.negative or batch.cond)):
        try:
            F = guided.model(batch.x0, t, cond)
        except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
            raise ValueError(f"the network cannot run with {what} ({given}): {error}") from error
        if F.shape != batch.x0.shape:
            raise ValueError(f"the network gives {list(F.shape)} for {what} ({given}): their shapes must be the same")


def check_stage(stage: StageConfig, student: TrigFlow, negative: Condition) -> None:
    """Raises ValueError if the stage cannot train this network."""
    objective = stage.objective
    if objective.second_time and "time_r" not in inspect.signature(student.call).parameters:
        raise ValueError(
            f"objective {objective.name} needs a network with a second time, and the call of "
            f"{type(student.net).__name__} takes none: TrigFlow(net, call=...) with call(net, x, time, cond, time_r)"
        )
    if stage.condition_dropout and not negative:
        raise ValueError("condition_dropout needs a negative condition to drop to: give guidance.negative")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moving(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, and buffers: what is not the teacher's own."""
    state = model.state_dict()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def with_weights(model: TrigFlow, weights: Mapping[str, Tensor]) -> TrigFlow:
    """A frozen copy of a student with other values for what is trained of it, such as an average; shares the rest."""
    model = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return model.requires_grad_(False).eval()
