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
from jvpgraph.trainer.model.schedulers import even_times, fits_pipelines, scheduler_for
from jvpgraph.trainer.prepare.checkpoint import Encoder
from jvpgraph.trainer.times import from_flow_time
from jvpgraph.trainer.trigflow import RECTIFIED_FLOW, Guided, TrigFlow
from tests.tiny_pipelines import FRAMES, MAKERS, call, conditions, encoder_of, size_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # of DPM-Solver
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported"),  # of Mochi
]

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
    pipe.transformer.register_forward_pre_hook(
        lambda net, args, kwargs: found.network.append(bound(net, args, kwargs)), with_kwargs=True
    )
    step = pipe.scheduler.step

    def recorded(prediction: Tensor, time: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(pipe.scheduler, diffusers.EDMEulerScheduler) or "pred_original_sample" in kwargs:
            found.steps.append((prediction.clone(), torch.as_tensor(time), latents.clone()))
        return step(prediction, time, latents, *args, **kwargs)

    pipe.scheduler.step = recorded
    call(pipe, output_type="latent", **more)
    return found


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Encoder]:
    return functools.cache(lambda name: encoder_of(name, tmp_path_factory.mktemp(name)))


def as_latents(name: str, x: Tensor, shape: list[int]) -> Tensor:
    """What the trainer's latents are, from the pipeline's."""
    if name in PACKED:
        return unpack(x, *shape[-2:])
    if name in TOKENS:
        return x.transpose(1, 2).unflatten(2, shape[1:])
    return x.squeeze(2) if len(shape) == 3 and x.dim() == 5 else x


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_network_is_asked_as_by_its_pipeline(name: str, encoders: Callable[[str], Encoder]) -> None:
    encoder = encoders(name)
    folder: Path = encoder.checkpoint.path
    found = record(getattr(diffusers, encoder.checkpoint.pipeline).from_pretrained(folder))
    model = diffusers_model(folder)
    mine: list[dict[str, Any]] = []
    model.net.register_forward_pre_hook(
        lambda net, args, kwargs: mine.append(bound(net, args, kwargs)), with_kwargs=True
    )
    scale = encoder.negative_scale
    assert (scale == 1) == (len(found.network) == len(found.steps) and samples(found.network[0]) == 1)
    ask = asked(name, encoder, model)
    for prediction, time, latents in found.steps:
        check_step(name, ask, *OWN_WAYS.get(name, usually)(prediction, time, latents))

    mine = mine[: 1 + (scale != 1)]
    theirs = rows(found.network, len(mine))
    for one in mine:
        assert any(not (difference := differences(one, other)) for other in theirs), difference


NOT_BY_FLOW = ("CosmosTextToWorldPipeline", "Cosmos2TextToImagePipeline", "DiTPipeline", "MochiPipeline")


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {*NOT_BY_FLOW, "PixArtAlphaPipeline"}))
def test_the_network_is_told_the_levels_of_a_student_s_scheduler(name: str, encoders: Callable[[str], Encoder]) -> None:
    """Whatever times the pipeline asks the scheduler for."""
    encoder = encoders(name)
    folder: Path = encoder.checkpoint.path
    model, pipe = diffusers_model(folder), getattr(diffusers, encoder.checkpoint.pipeline).from_pretrained(folder)
    assert fits_pipelines(model)
    ask = asked(name, encoder, model)
    for times in ([1.4], [1.55, 1.0], even_times([1.57, 1.3, 0.6]), [1.55, 1.3, 0.6]):
        pipe.scheduler = scheduler_for(model, times).scheduler
        found = record(pipe, num_inference_steps=len(times))
        levels = model.s_of_t(torch.tensor(times, dtype=torch.float64))
        told = torch.stack([time for _, time, _ in found.steps]).double()
        torch.testing.assert_close(told, 1000 * levels, rtol=1e-6, atol=0)
        for level, (prediction, _, latents) in zip(levels, found.steps, strict=True):
            check_step(name, ask, prediction, level, latents, close=1e-3)  # Z-Image's guidance of 5, in float32


Velocity = Callable[[Tensor, Tensor], tuple[Tensor, list[int]]]
"""(x_s, s) -> the network's own prediction with the pipeline's guidance, and the shape of latents."""


def asked(name: str, encoder: Encoder, model: TrigFlow) -> Velocity:
    """The trainer's network, asked for what `call` asks its pipeline for."""
    size = size_of(encoder)
    rate = 25.0 if encoder.family.rate == "frame_rate" else encoder.family.fps
    more = {**encoder.constants(None, rate), **encoder.checkpoint.sizes(*size)}
    more = {key: torch.tensor(value, dtype=torch.float32)[None] for key, value in more.items()}
    positive, negative = ({key: value[None] for key, value in cond.items()} for cond in conditions(name, encoder))
    shared = [*encoder.checkpoint.first_frame, *more]
    guided = Guided(model, encoder.negative_scale, negative, encoder.family.keep_norm, shared)
    shape = encoder.latent_shape(FRAMES, *size)

    def ask(x_s: Tensor, s: Tensor) -> tuple[Tensor, list[int]]:
        x = as_latents(name, x_s, shape)
        assert list(x.shape[1:]) == shape
        with torch.no_grad():
            return velocity(guided, x, s, positive | more), shape

    return ask


def check_step(name: str, ask: Velocity, prediction: Tensor, s: Tensor, latents: Tensor, close: float = 1e-4) -> None:
    u, shape = ask(latents, s)
    close = 5e-3 if name.startswith("Cosmos") else close  # noise of 0.002 and 80 in float32
    torch.testing.assert_close(u, as_latents(name, prediction, shape).double(), rtol=close, atol=close)


Step = tuple[Tensor, Tensor, Tensor]
"""The network's prediction, s, and its input x_s, of what the scheduler is given."""


def usually(prediction: Tensor, time: Tensor, latents: Tensor) -> Step:
    return prediction, time / 1000, latents


def mochi(prediction: Tensor, time: Tensor, latents: Tensor) -> Step:
    """Counts from noise to data, and so does its velocity."""
    return -prediction, 1 - time / 1000, latents


def cosmos2(prediction: Tensor, time: Tensor, latents: Tensor) -> Step:
    """Steps x0 + sigma eps along eps."""
    sigma = time / 1000
    return (1 + sigma) * prediction - latents, sigma / (1 + sigma), latents / (1 + sigma)


def cosmos1(denoised: Tensor, time: Tensor, latents: Tensor) -> Step:
    """Steps x0 / 2 + sigma eps, and hands on x0 / 2; EDM's preconditioning."""
    sigma = (4 * time.double()).exp()
    size = (sigma**2 + 0.25).sqrt()
    raw = (denoised - latents * 0.25 / size**2) / (0.5 * sigma / size)
    return -raw, time, latents / size


def dit(prediction: Tensor, time: Tensor, latents: Tensor) -> Step:
    """Both halves of the batch are the same."""
    return prediction[:1], time / 1000, latents[:1]


OWN_WAYS = {
    "MochiPipeline": mochi,
    "Cosmos2TextToImagePipeline": cosmos2,
    "CosmosTextToWorldPipeline": cosmos1,
    "DiTPipeline": dit,
}


def velocity(guided: Guided, x_s: Tensor, s: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The network's own prediction with guidance, at x_s and s in [0, 1], through TrigFlow where that is exact."""
    model: Any = guided.model
    s = s.double().reshape(1)
    if model.schedule == RECTIFIED_FLOW:
        t = from_flow_time(s)
        x = x_s.double() / model.c_in(t)
        return (t.sin() - t.cos()) * x + (t.sin() + t.cos()) * guided(x, t, cond)
    time = (model.time_scale * s).float()
    u, u_negative = (model.call(model.net, x_s, time, c).double() for c in (cond, guided.without_prompt(cond, 1)))
    return u_negative + guided.scale * (u - u_negative)


def rows(calls: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first `count` calls for one sample each, whether they were made one by one or as one batch."""
    batch = samples(calls[0])
    if batch == 1:
        return calls[:count]
    layered = {"encoder_hidden_states_llama3"}  # [layers, B, ...]
    return [
        {key: value[:, i : i + 1] if key in layered else row(value, i, batch) for key, value in calls[0].items()}
        for i in range(batch)
    ]


def samples(call: dict[str, Any]) -> int:
    return len(call["x"] if "x" in call else call["hidden_states"])


def row(value: Any, i: int, batch: int) -> Any:
    if isinstance(value, dict):
        return {key: row(inner, i, batch) for key, inner in value.items()}
    if isinstance(value, list):
        return value[i : i + 1]
    return value[i : i + 1] if isinstance(value, Tensor) and value.dim() and len(value) == batch else value


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of arguments with other values. Padding that a mask hides is not looked at."""
    found = []
    for key in mine.keys() | theirs.keys():
        a, b = (call[key][0][None] if key in ("x", "cap_feats") else call.get(key) for call in (mine, theirs))
        if key == "padding_mask" and isinstance(a, Tensor):  # in pixels, and of latents
            same = not a.any() and not b.any()
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            padded = ("encoder_hidden_states", "encoder_hidden_states_mask", "cap_feats")
            text = key in padded and a.shape[1] > b.shape[1]
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
