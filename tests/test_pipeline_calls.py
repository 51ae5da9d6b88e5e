"""Training asks the network what its pipeline asks it: the same arguments, and the same step out of the answer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from jvpgraph.trainer.adapters import diffusers_model
from jvpgraph.trainer.model.adapters import unpack
from jvpgraph.trainer.prepare.checkpoint import Encoder
from jvpgraph.trainer.times import from_flow_time
from jvpgraph.trainer.trigflow import RECTIFIED_FLOW, Guided
from tests.tiny_pipelines import MAKERS, encoder_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # of DPM-Solver
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported"),  # of Mochi
]

SIZE, FRAMES = (32, 64), 9  # height, width
PROMPT, NEGATIVE = "a red thing moves over", "blue"
NO_NEGATIVE = ("Flux2KleinPipeline",)  # none but an empty one
PACKED = ("FluxPipeline", "QwenImagePipeline", "ChromaPipeline", "Flux2KleinPipeline")
TOKENS = ("LTXPipeline",)


@dataclass
class Recorded:
    """Of a pipeline: what its network and its scheduler were given, call by call."""

    network: list[dict[str, Any]] = field(default_factory=list)
    steps: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # prediction, time, latents


def bound(net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults, without those that say how to compute."""
    call = inspect.signature(type(net).forward).bind(net, *args, **kwargs)
    call.apply_defaults()
    how = ("self", "return_dict", "attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")
    return {name: value for name, value in call.arguments.items() if name not in how}


def record(pipe: Any, **more: Any) -> Recorded:
    found = Recorded()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.register_forward_pre_hook(
        lambda net, args, kwargs: found.network.append(bound(net, args, kwargs)), with_kwargs=True
    )
    step = pipe.scheduler.step

    def recorded(prediction: Tensor, time: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.steps.append((prediction.clone(), torch.as_tensor(time), latents.clone()))
        return step(prediction, time, latents, *args, **kwargs)

    pipe.scheduler.step = recorded
    takes = inspect.signature(pipe.__call__).parameters
    usual = {
        "height": SIZE[0],
        "width": SIZE[1],
        "num_frames": FRAMES,
        "frames": FRAMES,
        "num_inference_steps": 2,
        "negative_prompt": NEGATIVE,
        "use_resolution_binning": False,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    pipe(prompt=PROMPT, **{name: value for name, value in usual.items() if name in takes} | more)
    return found


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Encoder]:
    return functools.cache(lambda name: encoder_of(name, tmp_path_factory.mktemp(name)))


def as_latents(name: str, x: Tensor, shape: list[int]) -> Tensor:
    """What the trainer's latents are, from the pipeline's."""
    if name in PACKED:
        return unpack(x, *shape[-2:])
    return x.transpose(1, 2).unflatten(2, shape[1:]) if name in TOKENS else x


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_network_is_asked_as_by_its_pipeline(name: str, encoders: Callable[[str], Encoder]) -> None:
    encoder = encoders(name)
    folder: Path = encoder.checkpoint.path
    found = record(getattr(diffusers, encoder.checkpoint.pipeline).from_pretrained(folder))
    shape = encoder.latent_shape(FRAMES, *SIZE)
    rate = 25.0 if encoder.family.rate == "frame_rate" else encoder.family.fps
    more = {**encoder.constants(None, rate), **encoder.checkpoint.sizes(*SIZE)}
    more = {key: torch.tensor(value, dtype=torch.float32)[None] for key, value in more.items()}
    positive, negative = (
        {key: value[None] for key, value in cond.items()} | more
        for cond in (encoder.prompt(PROMPT), encoder.negative("" if name in NO_NEGATIVE else NEGATIVE))
    )
    model = diffusers_model(folder)
    mine: list[dict[str, Any]] = []
    model.net.register_forward_pre_hook(
        lambda net, args, kwargs: mine.append(bound(net, args, kwargs)), with_kwargs=True
    )
    scale = encoder.negative_scale
    assert (scale == 1) == (len(found.network) == len(found.steps) and len(found.network[0]["hidden_states"]) == 1)
    guided = Guided(model, scale, negative, encoder.family.keep_norm)
    for prediction, time, latents in found.steps:
        if name == "MochiPipeline":  # counts from noise to data, and so does its velocity
            prediction, time = -prediction, 1000 - time
        x = as_latents(name, latents, shape)
        assert list(x.shape[1:]) == shape
        with torch.no_grad():
            u = velocity(guided, x, time / 1000, positive)
        torch.testing.assert_close(u, as_latents(name, prediction, shape).double(), rtol=1e-4, atol=1e-4)

    mine = mine[: 1 + (scale != 1)]
    theirs = rows(found.network, len(mine))
    for call in mine:
        assert any(not (difference := differences(call, other)) for other in theirs), difference


def velocity(guided: Guided, x_s: Tensor, s: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The network's own prediction with guidance, at x_s and s in [0, 1], through TrigFlow where that is exact."""
    model: Any = guided.model
    s = s.double().reshape(1)
    if model.schedule == RECTIFIED_FLOW:
        t = from_flow_time(s)
        x = x_s.double() / model.c_in(t)
        return (t.sin() - t.cos()) * x + (t.sin() + t.cos()) * guided(x, t, cond)
    time = (model.time_scale * s).float()
    u, u_negative = (model.call(model.net, x_s, time, c).double() for c in (cond, guided.negative))
    return u_negative + guided.scale * (u - u_negative)


def rows(calls: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first `count` calls for one sample each, whether they were made one by one or as one batch."""
    batch = len(calls[0]["hidden_states"])
    if batch == 1:
        return calls[:count]
    return [{key: row(value, i, batch) for key, value in calls[0].items()} for i in range(batch)]


def row(value: Any, i: int, batch: int) -> Any:
    if isinstance(value, dict):
        return {key: row(inner, i, batch) for key, inner in value.items()}
    return value[i : i + 1] if isinstance(value, Tensor) and value.dim() and len(value) == batch else value


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of arguments with other values. Padding that a mask hides is not looked at."""
    found = []
    for key in mine.keys() | theirs.keys():
        a, b = mine.get(key), theirs.get(key)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            text = key in ("encoder_hidden_states", "encoder_hidden_states_mask") and a.shape[1] > b.shape[1]
            a = a[:, : b.shape[1]] if text else a
            same = a.numel() == b.numel() and torch.allclose(a.float().reshape(b.shape), b.float(), 1e-5, 1e-5)
        elif key == "encoder_hidden_states_mask" and b is None:
            same = True
        elif isinstance(a, dict) and isinstance(b, dict):
            same = not differences(a, b)
        else:
            same = list(a) == list(b) if isinstance(a, (tuple, list)) else a == b
        if not same:
            found.append(f"{key}: {a} and {b}")
    return found
