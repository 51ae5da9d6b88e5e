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

from jvpgraph.trainer.adapters import ADAPTERS, diffusers_model
from jvpgraph.trainer.model.adapters import unpack
from jvpgraph.trainer.model.student import LoRA, adapted_layers, make_student
from jvpgraph.trainer.prepare.families import FAMILIES
from jvpgraph.trainer.prepare.latents import decode, decoder, encode, load_vae, normalisation, place_norms
from tests.test_pipeline_calls import bound
from tests.tiny_pipelines import FRAMES, MAKERS, SIZE, call, conditions, encoder_of, size_of, wan_vae

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported"),  # of Mochi
]

NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # of DPM-Solver


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return functools.cache(lambda name: encoder_of(name, tmp_path_factory.mktemp(name)))


@NUMPY
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_conditions_are_those_of_the_pipeline(name: str, encoders: Any) -> None:
    encoder = encoders(name)
    positive, negative = conditions(name, encoder)
    family, seen = encoder.family, encoder.checkpoint.first_frame
    assert set(positive) - set(seen) == set(negative) == set(family.conditions)
    adapter = ADAPTERS[family.network]
    assert set(adapter.needs) - {"guidance"} <= set(positive) | set(encoder.checkpoint.sizes(*SIZE))
    assert set(positive) <= {*adapter.needs, *adapter.takes}

    pipe = getattr(diffusers, encoder.checkpoint.pipeline).from_pretrained(encoder.checkpoint.path)
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(
        lambda net, args, kwargs: calls.append(bound(net, args, kwargs)), with_kwargs=True
    )
    call(pipe, output_type="latent", true_cfg_scale=2.0)
    text = family.conditions[0]
    given: dict[str, list[Tensor]] = {}  # by argument: for the prompt and for the negative one
    for key in (*family.conditions, *(name for name in seen if name != "condition")):
        values = [call[key] for call in calls[:2] if call.get(key) is not None]
        if key == family.padded_mask:  # one prompt alone has no padding, and no mask
            assert not values
            values = [torch.ones(1, len(row), dtype=torch.int64) for row in given[text]]
            assert not positive[key][values[0].shape[1] :].any()
        assert values, f"{name} does not pass {key}"
        if key in family.layered:
            values = [value.transpose(0, 1) for value in values]
        whole = key == "attention_mask"  # Chroma's goes on over the picture
        given[key] = [row[: len(positive[key])] if whole else row for value in values for row in value]
    if seen:  # behind the noise
        channels = positive["condition"].shape[0]
        given["condition"] = [call["hidden_states"][0, -channels:] for call in calls[:2]]
    for key, rows in given.items():
        for mine in (positive[key], positive[key] if key in seen else negative[key]):
            cut = [mine[: len(row)] if key in (text, family.padded_mask) and mine.dim() else mine for row in rows]
            assert any(torch.equal(one.to(row.dtype), row) for one, row in zip(cut, rows)), (name, key)
    assert not torch.equal(positive[text], negative[text])


@NUMPY
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_latents_decode_to_what_the_pipeline_shows(name: str, encoders: Any) -> None:
    """Its last latents, decoded here, are its pictures: layout and normalisation are right."""
    encoder = encoders(name)
    cls = getattr(diffusers, encoder.checkpoint.pipeline)
    ends = []
    for kind in ("latent", "pt"):
        pipe = cls.from_pretrained(encoder.checkpoint.path)
        if kind == "latent" and name == "DiTPipeline":  # which shows pixels only
            ends.append(last_latents(pipe))
            continue
        ends.append(call(pipe, output_type=kind))
    latents, pixels = ends
    if name == "CosmosTextToWorldPipeline":  # of deviation 1/2, as its scheduler says
        latents = 2 * latents
    shape = encoder.latent_shape(FRAMES, *size_of(encoder))
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
    close = 0.004 if name.startswith("Cosmos") else 5e-5  # what its guardrail sees is bytes
    torch.testing.assert_close(mine, pixels, rtol=0, atol=close)
    assert mine.std() > 1e-3
    again = decoder(encoder.checkpoint.path)(latents)
    assert torch.equal(again.transpose(1, 2) if encoder.family.video else again, mine)


def last_latents(pipe: Any) -> Tensor:
    """Those of a DiTPipeline, [1, C, h, w], from what its VAE is given."""
    found: list[Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda x: found.append(x) or decode(x)
    call(pipe, output_type="pt")
    return found[0] * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_latents_are_the_mean_that_the_vae_gives(name: str, encoders: Any) -> None:
    encoder = encoders(name)
    rng = np.random.default_rng(0)
    count = FRAMES if encoder.family.video else 1
    frames = [Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)) for _ in range(count)]
    pixels = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames]).permute(3, 0, 1, 2) / 127.5 - 1
    vae = load_vae(encoder.checkpoint.path)
    with torch.no_grad():
        image = not any(isinstance(module, torch.nn.Conv3d) for module in vae.modules())
        output = vae.encode(pixels.squeeze(1)[None] if image else pixels[None])
    raw = (output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latent)[0]
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


NOT_PREPARED = {
    "AceStepTransformer1DModel",
    "AnyFlowFARTransformer3DModel",
    "AnyFlowTransformer3DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
}


def test_every_family_has_an_adapter_and_pipelines_that_diffusers_has() -> None:
    assert {family.network for family in FAMILIES} == set(ADAPTERS) - NOT_PREPARED
    for family in FAMILIES:
        adapter = ADAPTERS[family.network]
        assert {*family.conditions, *family.first_frame} <= {*adapter.needs, *adapter.takes}
        assert set(adapter.needs) <= {*family.conditions, *family.sizes}
        for pipeline in family.pipelines:
            if family.labels is None:
                returned = inspect.signature(getattr(diffusers, pipeline).encode_prompt)
                assert "prompt" in returned.parameters


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_run_that_prepare_writes_has_adapters_on_layers_of_the_network(name: str, encoders: Any) -> None:
    encoder = encoders(name)
    targets = encoder.family.attention or LoRA().targets
    student = make_student(
        diffusers_model(encoder.checkpoint.path), dtype=None, lora=LoRA(2, 2, targets), checkpoint_blocks=False
    )
    assert adapted_layers(student.net)


def test_a_picture_is_a_clip_of_one_frame() -> None:
    assert list(encode(wan_vae(), torch.zeros(3, 1, 32, 48)).shape) == [4, 1, 4, 6]
