"""`train --from RUN|EXPORT`: a student that starts from earlier weights instead of its teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig, StudentConfig
from jvpgraph.trainer.data.sample import shorten
from jvpgraph.trainer.files import read_json
from jvpgraph.trainer.model.additions import (
    EMBEDDED,
    INTERVAL,
    NAMES,
    SETTINGS,
    WAN,
    TimeInput,
    added,
    found,
    of_addition,
)
from jvpgraph.trainer.model.anyflow import NAME, OURS, from_anyflow
from jvpgraph.trainer.model.ema import PowerEMA
from jvpgraph.trainer.model.networks import moving, set_weights, trainable
from jvpgraph.trainer.model.saved_additions import SAVED
from jvpgraph.trainer.run.checkpoint import Checkpoints
from jvpgraph.trainer.run.origin import read_origin
from jvpgraph.trainer.trigflow import TrigFlow


def start_from(student: TrigFlow, source: Path) -> None:
    """Gives a student, before it is spread over processes, the weights of a run or of an exported network.

    Of a run it is the average that `sample` takes too, at its newest checkpoint.

    Raises:
        ValueError: there is neither in the folder, or the weights are those of another network.
    """
    check_places(student, source)
    if is_run(source):
        take_run(student, source)
    else:
        take_tensors(student, in_names_of(student, source), source)


def is_run(source: Path) -> bool:
    """The export of a network of one's own has a config.yaml too."""
    return (source / "config.yaml").is_file() and not (source / "model.safetensors").is_file()


def check_start(config: StudentConfig, base: str, source: Path) -> None:
    """Raises ValueError if a student with the weights of a run would not be that run's student.

    Args:
        config: of the new student.
        base: digest of the network that it is made from.
    """
    if not is_run(source):
        return
    run = settings.load(RunConfig, source / "config.yaml")
    before, origin = run.student, read_origin(source)
    for name, then, now in (
        ("second_time", before.added_time, config.added_time),
        ("embed_scale", before.added_scale, config.added_scale),
    ):
        if then is not None and now is None:
            raise ValueError(
                f"--from {source}: its student.{name} is set, and what that has learnt would be lost\n"
                f"Set student.{name} as there."
            )
    if before.lora is None or config.lora is None:
        return
    if before.lora.rank == config.lora.rank and before.lora.alpha != config.lora.alpha:
        raise ValueError(
            f"--from {source}: its adapters act with alpha {before.lora.alpha:g}, and student.lora.alpha is "
            f"{config.lora.alpha:g}: the same weights would be another network\nSet student.lora.alpha as there."
        )
    if origin is not None and (origin.base or origin.teacher) != base:
        raise ValueError(
            f"--from {source}: its adapters were trained on other weights than those of `model`\n"
            "Name the same network; or export the run, and name that as `model`."
        )


def check_places(student: TrigFlow, source: Path) -> None:
    """Raises ValueError if the network in a folder was given its second time or scale in another place, or unit."""
    then: dict[str, TimeInput | None] = {}
    if (source / "config.yaml").is_file():
        before = settings.load(RunConfig, source / "config.yaml").student
        then = {INTERVAL: before.added_time, EMBEDDED: before.added_scale}
    elif (config := config_in(source)).get("_class_name") == NAME:
        then = {INTERVAL: WAN}
    else:
        then = {name: TimeInput(**config[key]) for name, key in SAVED.items() if config.get(key) is not None}
    for name, own in added(student.net).items():
        where = then.get(name)
        if where is not None and found(student.net, where, SETTINGS[name]) != own.place:
            raise ValueError(
                f"--from {source}: there it is {SETTINGS[name]}={where}, and here {own.place}: the same weights would "
                "be another network\nGive the same."
            )


def take_run(student: TrigFlow, source: Path) -> None:
    config = settings.load(RunConfig, source / "config.yaml")
    sigma, before = config.ema.sigma_rel[0], config.student
    had = {INTERVAL: before.added_time, EMBEDDED: before.added_scale}
    new = [name for name, then in had.items() if then is None]  # begin as additions do
    key, parameters = f"{sigma:g}", trainable(student)
    average = PowerEMA(parameters, sigma)  # float32, whatever the parameters are, here and there
    buffers = {name: value for name, value in moving(student).items() if name not in parameters}
    optional = {f"student.{name}" for name in buffers if of_addition(name, new)}
    optional |= {f"ema.{key}.parameters.{name}" for name in parameters if of_addition(name, new)}
    state = {"student": buffers, "ema": {key: average}}
    try:
        # the run may be going on
        step = Checkpoints(source / "checkpoints").load_newest(
            state, partial=True, whole=[f"ema.{key}"], optional=optional
        )
    except ValueError as error:
        raise ValueError(
            f"--from {source}: {error}\nIts student is another network, or has other adapters (student.lora): "
            "export it, and start from the exported folder."
        ) from error
    if step is None:
        raise ValueError(f"--from {source}: {source / 'checkpoints'} holds no checkpoint. Start from another run.")
    set_weights(student, average.parameters)


def values_in(source: Path) -> dict[str, Tensor]:
    """The tensors of a folder of safetensors, or of a pipeline's `transformer`."""
    folders = (source, source / "transformer")
    if (source / "transformer_2").is_dir():
        raise ValueError(
            f"--from {source}: a pipeline of two networks, and a student is one. Give {folders[1]}, the one for high "
            "noise, or transformer_2 beside it."
        )
    files = next((found for folder in folders if (found := sorted(folder.glob("*.safetensors")))), [])
    if not files:
        raise ValueError(
            f"--from {source}: no config.yaml of a run, and no *.safetensors of an exported network. Give the `out` "
            "of a run, or the folder that `jvpgraph export` wrote."
        )
    values: dict[str, Tensor] = {}
    for file in files:
        try:
            values |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"--from: {file} is damaged: {error}. Export the network again.") from error
    return values


def in_names_of(student: TrigFlow, source: Path) -> dict[str, Tensor]:
    """The tensors in a folder; those of an AnyFlow network for the Wan with a second time that it was exported from."""
    values, config = values_in(source), config_in(source)
    if config.get("_class_name") != NAME or not any(name.startswith(OURS) for name in student.net.state_dict()):
        return values
    try:
        return from_anyflow(values, config)
    except ValueError as error:
        raise ValueError(f"--from {source}: {error}") from error


def config_in(source: Path) -> dict[str, Any]:
    """The config.json of a network of diffusers, or of a pipeline's; empty: there is none."""
    file = next((file for file in (source / "config.json", source / "transformer/config.json") if file.is_file()), None)
    return {} if file is None else read_json(file)


@torch.no_grad()
def take_tensors(student: TrigFlow, values: Mapping[str, Tensor], source: Path) -> None:
    own = student.net.state_dict()
    new = [each for each in NAMES if not any(of_addition(name, [each]) for name in values)]  # begin as additions do
    places = {name: (value.data_ptr(), value.shape, value.stride()) for name, value in own.items()}
    saved = {places[name]: value for name, value in values.items() if name in own}  # those that are shared once
    values = {**values, **{name: saved[place] for name, place in places.items() if place in saved}}
    wrong = [f"{name} is missing" for name in own if name not in values and not of_addition(name, new)]
    wrong += [f"{name} is of no use" for name in values if name not in own]
    wrong += [
        f"{name} is {list(values[name].shape)}, and {list(own[name].shape)} here"
        for name in own.keys() & values.keys()
        if own[name].shape != values[name].shape
    ]
    if wrong:
        adapters = " A student with student.lora starts from a run with the same adapters." if _adapted(own) else ""
        raise ValueError(
            f"--from {source}: the weights of another network than {type(student.net).__name__}: "
            f"{shorten(sorted(wrong))}."
            f"{adapters or ' Give the folder of the same network.'}"
        )
    for name, value in own.items():
        if name in values:
            value.copy_(values[name])


def _adapted(state: Mapping[str, Tensor]) -> bool:
    return any(".lora_A." in name for name in state)
