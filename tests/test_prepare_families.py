"""What is prepared is what the pipeline itself hands to its network, and what its VAE makes of its latents."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from jvpgraph.trainer.adapters import ADAPTERS
from jvpgraph.trainer.model.adapters import unpack
from jvpgraph.trainer.prepare.families import FAMILIES
from jvpgraph.trainer.prepare.latents import decode, decoder, encode, load_vae, normalisation, place_norms
from tests.tiny_pipelines import MAKERS, encoder_of, wan_vae

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported"),  # of Mochi
]

SIZE = 32, 64  # height, width
PROMPT, NEGATIVE = "a red thing moves over", "blue"
NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # of DPM-Solver


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return functools.cache(lambda name: encoder_of(name, tmp_path_factory.mktemp(name)))


def call_pipeline(pipe: Any, **more: Any) -> tuple[list[dict[str, Any]], Any]:
    """What the pipeline hands to its network, call by call, and what it returns."""
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    takes = inspect.signature(pipe.__call__).parameters
    usual = {
        "height": SIZE[0],
        "width": SIZE[1],
        "num_frames": 9,
        "frames": 9,
        "num_inference_steps": 2,
        "negative_prompt": NEGATIVE,
        "true_cfg_scale": 2.0,
        "use_resolution_binning": False,
        "generator": torch.Generator().manual_seed(0),
    }
    result = pipe(
        prompt=PROMPT, **{name: value for name, value in usual.items() if name in takes} | more, return_dict=False
    )
    return calls, result[0]


@NUMPY
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_conditions_are_those_of_the_pipeline(name: str, encoders: Any) -> None:
    encoder = encoders(name)
    positive = encoder.prompt(PROMPT)
    negative = encoder.negative("" if name == "Flux2KleinPipeline" else NEGATIVE)  # which takes no other
    family = encoder.family
    assert set(positive) == set(negative) == set(family.conditions)
    adapter = ADAPTERS[family.network]
    assert set(adapter.needs) - {"guidance"} <= set(positive) | set(encoder.checkpoint.sizes(*SIZE))
    assert set(positive) <= {*adapter.needs, *adapter.takes}

    pipe = getattr(diffusers, encoder.checkpoint.pipeline).from_pretrained(encoder.checkpoint.path)
    calls, _ = call_pipeline(pipe, output_type="latent")
    given: dict[str, list[Tensor]] = {}  # by argument: for the prompt and for the negative one
    for key in family.conditions:
        values = [call[key] for call in calls[:2] if call.get(key) is not None]
        if key == family.padded_mask:  # one prompt alone has no padding, and no mask
            assert not values
            values = [torch.ones(1, call["encoder_hidden_states"].shape[1], dtype=torch.int64) for call in calls[:2]]
            assert not positive[key][values[0].shape[1] :].any()
        assert values, f"{name} does not pass {key}"
        whole = key == "attention_mask"  # Chroma's goes on over the picture
        given[key] = [row[: len(positive[key])] if whole else row for value in values for row in value]
    for key, rows in given.items():
        for mine in (positive[key], negative[key]):
            cut = [mine[: len(row)] if key in ("encoder_hidden_states", family.padded_mask) else mine for row in rows]
            assert any(torch.equal(one.to(row.dtype), row) for one, row in zip(cut, rows)), (name, key)
    assert not torch.equal(positive["encoder_hidden_states"], negative["encoder_hidden_states"])


@NUMPY
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_latents_decode_to_what_the_pipeline_shows(name: str, encoders: Any) -> None:
    """Its last latents, decoded here, are its pictures: layout and normalisation are right."""
    encoder = encoders(name)
    cls = getattr(diffusers, encoder.checkpoint.pipeline)
    ends = []
    for kind in ("latent", "pt"):
        pipe = cls.from_pretrained(encoder.checkpoint.path)
        ends.append(call_pipeline(pipe, output_type=kind)[1])
    latents, pixels = ends
    shape = encoder.latent_shape(9, *SIZE)
    if name in ("FluxPipeline", "QwenImagePipeline", "ChromaPipeline"):
        latents = unpack(latents, *shape[-2:])
    if norms := place_norms(encoder.vae, latents):  # which it has undone
        latents = (latents - norms[0]) / norms[1]
    if name == "LTXPipeline":  # which returns tokens
        latents = latents.transpose(1, 2).unflatten(2, shape[1:])
    assert list(latents.shape[1:]) == shape
    mine = decode(encoder.vae, latents)
    if encoder.family.video:
        mine = mine.transpose(1, 2)
    torch.testing.assert_close(mine, pixels, rtol=1e-5, atol=1e-5)
    assert mine.std() > 1e-3
    again = decoder(encoder.checkpoint.path)(latents)
    assert torch.equal(again.transpose(1, 2) if encoder.family.video else again, mine)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_latents_are_the_mean_that_the_vae_gives(name: str, encoders: Any) -> None:
    encoder = encoders(name)
    rng = np.random.default_rng(0)
    count = 9 if encoder.family.video else 1
    frames = [Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)) for _ in range(count)]
    pixels = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames]).permute(3, 0, 1, 2) / 127.5 - 1
    vae = load_vae(encoder.checkpoint.path)
    with torch.no_grad():
        image = not any(isinstance(module, torch.nn.Conv3d) for module in vae.modules())
        output = vae.encode(pixels.squeeze(1)[None] if image else pixels[None])
    raw = (output.latent_dist.mean if hasattr(output, "latent_dist") else output.latent)[0]
    if norms := place_norms(vae, raw):
        raw = (raw - norms[0]) / norms[1]
    found = encoder.latents(frames)
    assert list(found.shape) == encoder.latent_shape(count, *SIZE)
    torch.testing.assert_close(found, raw if encoder.family.video or image else raw.squeeze(1), rtol=1e-4, atol=1e-5)


def test_shift_and_scale_are_the_configurations(encoders: Any) -> None:
    shift, scale = normalisation(encoders("LTXPipeline").vae)
    assert shift == pytest.approx([0.1, -0.2, 0.3, 0.05])
    assert scale == pytest.approx([0.8 / 0.9, 0.8 / 1.1, 0.8 / 0.7, 0.8 / 1.3])
    assert normalisation(encoders("FluxPipeline").vae) == (0.12, 0.36)
    assert normalisation(encoders("PixArtAlphaPipeline").vae) == (0.0, 0.18)


def test_every_family_has_an_adapter_and_pipelines_that_diffusers_has() -> None:
    for network, family in FAMILIES.items():
        assert network in ADAPTERS
        known = {*ADAPTERS[network].needs, *ADAPTERS[network].takes}
        assert set(family.conditions) <= known
        assert set(ADAPTERS[network].needs) <= {*family.conditions, *family.sizes}
        for pipeline in family.pipelines:
            returned = inspect.signature(getattr(diffusers, pipeline).encode_prompt)
            assert "prompt" in returned.parameters


def test_a_picture_is_a_clip_of_one_frame() -> None:
    assert list(encode(wan_vae(), torch.zeros(3, 1, 32, 48)).shape) == [4, 1, 4, 6]
