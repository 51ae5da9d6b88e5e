"""Every adapter against its pipeline's own convention, written out by hand; graphs, dtypes, errors, sampling."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import jvpgraph
from jvpgraph.trainer.export.keys import to_original
from jvpgraph.trainer.model import adapters
from jvpgraph.trainer.model.adapters import ADAPTERS, adapter_of, diffusers_model, qwen_image
from jvpgraph.trainer.model.saved_additions import saved_with
from jvpgraph.trainer.model.schedulers import scheduler_for
from jvpgraph.trainer.model.second_time import add_second_time, takes_r
from jvpgraph.trainer.model.told import unit_of
from jvpgraph.trainer.trigflow import EDM_NETWORK, RECTIFIED_FLOW, TrigFlow, add_noise, clean_image, expand_like
from tests.zoo.base import QUIET, padding, randomise
from tests.zoo.cases import CASES

diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.filterwarnings(quiet) for quiet in QUIET]

B, L = 2, 5  # samples, words
MASK = padding(L, 5, 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def times() -> Tensor:
    return torch.tensor([0.4, 1.2], dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A tiny network, its latents and conditions, and its pipeline's way to the velocity eps - x0.

    Attributes:
        latent: shape of one sample.
        cond: the conditions [B, ...].
        by_hand: (net, x_s, s, cond) -> eps - x0, for rectified flows.
        config: replaces entries of the zoo's configuration.
    """

    latent: tuple[int, ...]
    cond: dict[str, Tensor]
    by_hand: Callable[[Any, Tensor, Tensor, dict[str, Any]], Tensor] | None = None
    config: tuple[tuple[str, Any], ...] = ()


def simply(scale: float, name: str = "timestep") -> Callable[..., Tensor]:
    def by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
        return net(hidden_states=x, **{name: (scale * s).float()}, **cond).sample

    return by_hand


def flux_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    pipeline = diffusers.FluxPipeline
    _, C, H, W = x.shape
    ids = pipeline._prepare_latent_image_ids(B, H // 2, W // 2, x.device, torch.float32)
    words = torch.zeros(L, 3)
    tokens = pipeline._pack_latents(x, B, C, H, W)
    u = net(hidden_states=tokens, timestep=s.float(), img_ids=ids, txt_ids=words, **cond).sample
    return pipeline._unpack_latents(u, 8 * H, 8 * W, 8)


def chroma_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    tokens = x.shape[-2] * x.shape[-1] // 4
    mask = torch.cat([cond["attention_mask"], torch.ones(B, tokens, dtype=torch.bool)], dim=1)
    return flux_by_hand(net, x, s, cond | {"attention_mask": mask})


def flux2_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    pipeline = diffusers.Flux2Pipeline
    patches = pipeline._patchify_latents(x)
    ids = pipeline._prepare_latent_ids(patches)
    words = pipeline._prepare_text_ids(cond["encoder_hidden_states"])
    u = net(
        hidden_states=pipeline._pack_latents(patches), timestep=s.float(), img_ids=ids, txt_ids=words, **cond
    ).sample
    return pipeline._unpatchify_latents(pipeline._unpack_latents_with_ids(u, ids))


def qwen_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    pipeline = diffusers.QwenImagePipeline
    _, C, _, H, W = x.shape
    tokens = pipeline._pack_latents(x, B, C, H, W)
    u = net(hidden_states=tokens, timestep=s.float(), img_shapes=[[(1, H // 2, W // 2)]] * B, **cond).sample
    return pipeline._unpack_latents(u, 8 * H, 8 * W, 8)


def ltx_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    pipeline = diffusers.LTXPipeline
    _, _, T, H, W = x.shape
    sizes = {"num_frames": T, "height": H, "width": W, "rope_interpolation_scale": (8 / 25, 32, 32)}
    u = net(hidden_states=pipeline._pack_latents(x), timestep=(1000 * s).float(), **sizes, **cond).sample
    return pipeline._unpack_latents(u, T, H, W)


def sana_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    return net(x, timestep=(1000 * net.config.timestep_scale * s).float(), **cond).sample


def lumina_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    return -net(hidden_states=x, timestep=1 - s.float(), **cond).sample


def mochi_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    return -net(hidden_states=x, timestep=1000 - (1000 * s).float(), **cond).sample


def hidream_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    states = cond["encoder_hidden_states_llama3"].transpose(0, 1)
    cond = cond | {"encoder_hidden_states_llama3": states}
    return -net(hidden_states=x, timesteps=(1000 * s).float(), **cond).sample


def z_image_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    out = net([image[:, None] for image in x], 1 - s.float(), list(cond["cap_feats"])).sample
    return -torch.stack([image[:, 0] for image in out])


def anyflow_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any], **more: Any) -> Tensor:
    """With r = t, a velocity."""
    time = (1000 * s).float()[:, None].expand(-1, x.shape[2])
    u = net(hidden_states=x.transpose(1, 2), timestep=time, r_timestep=time, **cond, **more).sample
    return u.transpose(1, 2)


def far_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    return anyflow_by_hand(net, x, s, cond, chunk_partition=[1, 3])


def hunyuan_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    time = (1000 * s).float().double()  # their sinusoids are to be of the network's dtype
    return net(hidden_states=x, timestep=time, timestep_r=time, **cond, return_dict=False)[0]


def ace_step_by_hand(net: Any, x: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
    time = s.float().double()
    return net(hidden_states=x, timestep=time, timestep_r=time, **cond).sample


TEXT_12 = {"encoder_hidden_states": normal(B, L, 12)}
TEXT_10 = {"encoder_hidden_states": normal(B, L, 10)}
FRAMED = {"encoder_hidden_states": normal(B, 512, 10), "encoder_hidden_states_image": normal(B, 3, 14)}
GUIDANCE = {"guidance": torch.tensor([3.5, 2.0])}
SIZES = {name: 100 * normal(B, 2).abs() for name in ("original_size", "target_size", "crop_coords")}
IMAGE, VIDEO = (4, 8, 6), (4, 2, 4, 6)

SECOND_TEXT = {"encoder_hidden_states_2": normal(B, 3, 10), "encoder_attention_mask_2": padding(3, 2, 3)}

TABLE = {
    "AceStepTransformer1DModel": Case(
        (12, 4), {"encoder_hidden_states": normal(B, L, 24), "context_latents": normal(B, 12, 6)}, ace_step_by_hand
    ),
    "AnyFlowFARTransformer3DModel": Case((4, 4, 8, 8), TEXT_10, far_by_hand),
    "AnyFlowTransformer3DModel": Case(VIDEO, TEXT_10, anyflow_by_hand),
    "AuraFlowTransformer2DModel": Case(IMAGE, TEXT_12, simply(1)),
    "ChromaTransformer2DModel": Case((2, 8, 6), TEXT_12 | {"attention_mask": MASK}, chroma_by_hand),
    "CogView4Transformer2DModel": Case(IMAGE, TEXT_12 | SIZES, simply(1000)),
    "CosmosTransformer3DModel": Case(VIDEO, TEXT_10, simply(1)),
    "DiTTransformer2DModel": Case((4, 8, 8), {"class_labels": torch.tensor([3, 8])}),
    "Flux2Transformer2DModel": Case((2, 8, 6), TEXT_12 | GUIDANCE, flux2_by_hand),
    "FluxTransformer2DModel": Case((2, 8, 6), TEXT_12 | GUIDANCE | {"pooled_projections": normal(B, 10)}, flux_by_hand),
    "HiDreamImageTransformer2DModel": Case(
        (4, 8, 8),
        {
            "encoder_hidden_states_t5": normal(B, L, 12),
            "encoder_hidden_states_llama3": normal(B, 2, L, 10),
            "pooled_embeds": normal(B, 14),
        },
        hidream_by_hand,
    ),
    "HunyuanImageTransformer2DModel": Case(
        IMAGE,
        TEXT_12 | {"encoder_attention_mask": MASK, "guidance": torch.tensor([6000.0, 1000.0]).double()} | SECOND_TEXT,
        hunyuan_by_hand,
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        VIDEO,
        TEXT_12 | {"encoder_attention_mask": MASK, "image_embeds": normal(B, 2, 6)} | SECOND_TEXT,
        hunyuan_by_hand,
    ),
    "HunyuanVideoTransformer3DModel": Case(
        VIDEO,
        TEXT_12
        | {"encoder_attention_mask": MASK, "pooled_projections": normal(B, 10)}
        | {"guidance": torch.tensor([6000.0, 1000.0])},
        simply(1000),
    ),
    "LTXVideoTransformer3DModel": Case(VIDEO, TEXT_12 | {"encoder_attention_mask": MASK.double()}, ltx_by_hand),
    "Lumina2Transformer2DModel": Case(IMAGE, TEXT_12 | {"encoder_attention_mask": MASK}, lumina_by_hand),
    "MochiTransformer3DModel": Case(
        VIDEO, {"encoder_hidden_states": normal(B, L, 16), "encoder_attention_mask": MASK}, mochi_by_hand
    ),
    "PixArtTransformer2DModel": Case(
        IMAGE,
        TEXT_12
        | {"encoder_attention_mask": MASK.double()}
        | {"resolution": 500 + 100 * normal(B, 2), "aspect_ratio": torch.ones(B, 1)},
    ),
    "PRXTransformer2DModel": Case(IMAGE, TEXT_12 | {"attention_mask": MASK}, simply(1)),
    "QwenImageTransformer2DModel": Case((2, 1, 8, 6), TEXT_12 | {"encoder_hidden_states_mask": MASK}, qwen_by_hand),
    "SD3Transformer2DModel": Case(IMAGE, TEXT_12 | {"pooled_projections": normal(B, 10)}, simply(1000)),
    "SanaTransformer2DModel": Case(
        IMAGE, TEXT_12 | GUIDANCE | {"encoder_attention_mask": MASK.double()}, sana_by_hand, (("timestep_scale", 0.5),)
    ),
    "SanaVideoTransformer3DModel": Case(
        VIDEO, TEXT_12 | GUIDANCE | {"encoder_attention_mask": MASK.double()}, simply(1000)
    ),
    "SkyReelsV2Transformer3DModel": Case(VIDEO, FRAMED, simply(1000)),
    "WanTransformer3DModel": Case(VIDEO, FRAMED, simply(1000)),
    "ZImageTransformer2DModel": Case(IMAGE, {"cap_feats": normal(B, L, 12)}, z_image_by_hand),
}
EVERY = pytest.mark.parametrize("name", sorted(TABLE))
MATCHED = pytest.mark.parametrize("name", sorted(name for name, case in TABLE.items() if case.by_hand))


def build(name: str, dtype: str = "float64", **more: Any) -> TrigFlow:
    """The zoo's network with no gate closed."""
    case = TABLE[name]
    config = CASES[name].config | dict(case.config) | more.pop("config", {})
    model = diffusers_model(name=name, config=config, dtype=dtype, **more)
    randomise(model.net, 0)
    return model


def latents(name: str, seed: int = 1) -> Tensor:
    return normal(B, *TABLE[name].latent, seed=seed)


def test_every_adapter_is_in_the_table() -> None:
    assert set(TABLE) == set(ADAPTERS)


@MATCHED
@torch.no_grad()
def test_the_clean_image_is_that_of_the_pipeline(name: str) -> None:
    """x0 = x_s - s u, with u from a direct call."""
    model, x, t, case = build(name), latents(name), times(), TABLE[name]
    s = t.sin() / (t.sin() + t.cos())
    x_s = x / expand_like(t.sin() + t.cos(), x)
    u = case.by_hand(model.net, x_s, s, case.cond)
    F = model(x, t, case.cond)
    assert F.shape == x.shape
    assert F.dtype == torch.float64
    torch.testing.assert_close(clean_image(F, x, t), x_s - expand_like(s, x) * u.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "PixArtTransformer2DModel"])
@torch.no_grad()
def test_the_clean_image_is_that_of_ddpm(name: str) -> None:
    """The scheduler's x0 from the first half of the channels, at integer timesteps."""
    model, x, cond = build(name), latents(name), dict(TABLE[name].cond)
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule="linear", clip_sample=False)
    n = torch.tensor([130, 760])
    alpha2 = scheduler.alphas_cumprod[n].double()
    t = torch.atan2((1 - alpha2).sqrt(), alpha2.sqrt())
    x0 = clean_image(model(x, t, cond), x, t)
    if name.startswith("PixArt"):
        cond["added_cond_kwargs"] = {key: cond.pop(key) for key in ("resolution", "aspect_ratio")}
    noise = model.net(x, timestep=n, **cond).sample
    assert noise.shape[1] == 2 * x.shape[1]
    for i in range(B):
        expected = scheduler.step(noise[i : i + 1, : x.shape[1]], int(n[i]), x[i : i + 1]).pred_original_sample
        torch.testing.assert_close(x0[i : i + 1], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_cosmos_1_is_preconditioned_as_its_scheduler_says() -> None:
    """Learnt positions mark Cosmos 1; the zoo's network stands in for its body, which refuses float64."""
    name = "CosmosTransformer3DModel"
    body, x, t = build(name).net, latents(name), times()[1:]
    body.register_to_config(extra_pos_embed_type="learnable")
    adapter = adapter_of(body)
    assert adapter.schedule is EDM_NETWORK
    body.register_to_config(extra_pos_embed_type=None)
    assert adapter_of(body).schedule is RECTIFIED_FLOW

    x, cond = x[1:], {"encoder_hidden_states": TEXT_10["encoder_hidden_states"][1:]}
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.5, sigma_min=0.002, sigma_max=80, prediction_type="epsilon")
    sigma = 0.5 * t.tan()
    sample = 0.5 * x / t.cos()  # sigma_data x0 + sigma eps
    out = body(
        hidden_states=scheduler.precondition_inputs(sample, sigma),
        timestep=scheduler.precondition_noise(sigma).float(),
        **cond,
    ).sample
    x0 = scheduler.precondition_outputs(sample, out, sigma) / 0.5
    F = TrigFlow(body, adapter, adapter.schedule, time_scale=adapter.time_scale)(x, t, cond)
    torch.testing.assert_close(clean_image(F, x, t), x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@EVERY
@torch.no_grad()
def test_any_dtype_gives_float64_and_the_time_arrives_in_float32(name: str, dtype: str) -> None:
    model, x, seen = build(name, dtype), latents(name), []

    def record(net: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        time = next((kwargs[k] for k in ("timestep", "timesteps") if k in kwargs), args[1] if len(args) > 1 else None)
        seen.append(time.dtype)

    model.net.register_forward_pre_hook(record, with_kwargs=True)
    F = model(x, times(), TABLE[name].cond)
    assert F.shape == x.shape
    assert F.dtype == torch.float64
    assert F.isfinite().all()
    assert seen == [getattr(torch, dtype) if name in TOLD else torch.float32]  # the sinusoids are told the exact one


TOLD = ("AceStepTransformer1DModel", "HunyuanImageTransformer2DModel", "HunyuanVideo15Transformer3DModel")
ROUNDING = (  # in bfloat16, by themselves
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "ChromaTransformer2DModel",
    "QwenImageTransformer2DModel",
    *TOLD,
)
UNKNOWN_TO_FUNC = (
    "HiDreamImageTransformer2DModel",  # its Python reads numbers, which torch.func has none of
    "AnyFlowFARTransformer3DModel",  # flex attention
)

IN_ONE_GRAPH = (
    "WanTransformer3DModel",
    "FluxTransformer2DModel",
    "LTXVideoTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
)


@pytest.mark.long
@pytest.mark.parametrize("name", IN_ONE_GRAPH)
def test_a_graph_carries_the_tangent_through_the_adapter(name: str) -> None:
    model, x, t, cond = build(name), latents(name), times(), TABLE[name].cond
    tangents = {"x": latents(name, seed=2), "t": torch.tensor([1.0, -0.5], dtype=torch.float64)}
    F, F_dot = jvpgraph.transform(model, backend="eager")(x, t, cond, tangents=tangents)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(lambda x, t: model(x, t, cond), (x, t), (tangents["x"], tangents["t"]))
    torch.testing.assert_close(F.detach(), expected[0], rtol=1e-6, atol=1e-6)
    scale = expected[1].abs().max().item()
    torch.testing.assert_close(F_dot, expected[1], rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize(
    "name",
    [
        *ROUNDING,
        *(pytest.param(name, marks=pytest.mark.matrix) for name in sorted(set(TABLE) - {*ROUNDING, *UNKNOWN_TO_FUNC})),
    ],
)
def test_the_time_tangent_survives_bfloat16(name: str) -> None:
    """Flux and Qwen-Image by themselves round their time: F_dot would be off by half. The sinusoids see the
    time in float32 ..."""
    model, x, cond = copy.deepcopy(build(name, "bfloat16")), latents(name), TABLE[name].cond
    exact = build(name)
    exact.net.load_state_dict({key: value.double() for key, value in model.net.state_dict().items()})
    tangents = (latents(name, seed=2), torch.tensor([1.0, -0.5], dtype=torch.float64))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        (_, F_dot), (_, expected) = (
            torch.func.jvp(lambda x, t: wrapped(x, t, cond), (x, times()), tangents)  # noqa: B023
            for wrapped in (model, exact)
        )
    assert (F_dot - expected).norm() < 0.15 * expected.norm()
    for module in model.net.modules():  # ... of this call only
        assert getattr(module, "exact_time", None) is None


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel"])
def test_a_call_that_failed_leaves_no_time_to_the_next(name: str) -> None:
    model = copy.deepcopy(build(name))
    told = [module for module in model.net.modules() if hasattr(module, "exact_time")]
    assert told

    def fail(*_: Any) -> None:
        assert told[0].exact_time is not None
        raise RuntimeError("before any time is embedded")

    model.net.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="embedded"):
        model(latents(name), times(), TABLE[name].cond)
    assert all(module.exact_time is None for module in told)


# ---------------------------------------------------------------- networks


def test_a_saved_network_is_loaded_with_its_class(tmp_path) -> None:
    name = "SD3Transformer2DModel"
    model = build(name, "float32")
    model.net.save_pretrained(tmp_path / "transformer")
    for path in (tmp_path, tmp_path / "transformer"):
        loaded = diffusers_model(path)
        assert type(loaded.net).__name__ == name
        assert not loaded.net.training
        x, t, cond = latents(name), times(), TABLE[name].cond
        assert torch.equal(loaded(x, t, cond), model(x, t, cond))


@pytest.mark.parametrize("blocks", [-1, 1], ids=["fewer", "more"])
def test_a_folder_whose_weights_are_of_other_blocks_is_refused(tmp_path, blocks: int) -> None:
    """diffusers would leave those it has no weights for on the meta device, and weights without a block out."""
    model = build("WanTransformer3DModel", "float32")
    model.net.save_pretrained(tmp_path)
    count = model.net.config.num_layers
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": count + blocks}))
    which, what = (count, "is missing") if blocks > 0 else (count - 1, "is of no use")
    with pytest.raises(ValueError, match=rf"not those of the WanTrans.*blocks\.{which}\.attn1\.norm_k\.weight {what}"):
        diffusers_model(tmp_path)


def test_a_second_time_that_the_config_says_nothing_of_is_refused(tmp_path) -> None:
    """What it has learnt would be lost."""
    model = add_second_time(build("WanTransformer3DModel", "float32"))
    saved_with(model.net).save_pretrained(tmp_path)
    assert takes_r(diffusers_model(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["_second_time"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"interval\.embedder\.linear_1\.bias is of no use"):
        diffusers_model(tmp_path)


def test_what_an_older_version_has_saved_besides_is_left_out(tmp_path) -> None:
    model = build("WanTransformer3DModel", "float32")
    model.net.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    save_file({**load_file(file), "rope.freqs": torch.zeros(3)}, file, {"format": "pt"})
    again = diffusers_model(tmp_path).net.state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.net.state_dict().items())


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
def test_quantised_weights_without_their_scales_are_refused(tmp_path, scale: str) -> None:
    """As ComfyUI's files have them, in float8; diffusers would read the numbers and not what they are to be times."""
    model = build("WanTransformer3DModel", "float32")
    model.net.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    name = "blocks.0.ffn.net.2.weight"
    weights = load_file(file)
    factor = weights[name].abs().max() / 448
    weights[name] = (weights[name] / factor).to(torch.float8_e4m3fn)
    save_file({**weights, f"{name.removesuffix('weight')}{scale}": factor.reshape(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"blocks\.0\.ffn\.net\.2\.{scale} is of no use"):
        diffusers_model(tmp_path)
    with pytest.raises(ValueError, match=rf"is quantised, and .* blocks\.0\.ffn\.net\.2\.{scale}"):
        diffusers_model(file)


def test_a_single_file_that_is_not_whole_is_refused(tmp_path) -> None:
    model = build("WanTransformer3DModel", "float32")
    model.net.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = to_original(load_file(file), "WanTransformer3DModel", model.net.config)
    del weights["blocks.0.ffn.2.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="it has not all weights of the WanTransformer3DModel"):
        diffusers_model(file)
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="is damaged"):
        diffusers_model(file)


def test_what_diffusers_keeps_in_float32_stays_there(tmp_path) -> None:
    name = "WanTransformer3DModel"
    new = build(name, "bfloat16")
    new.net.save_pretrained(tmp_path)
    for net in (new.net, diffusers_model(tmp_path, dtype="bfloat16").net):
        dtypes = {key: p.dtype for key, p in net.named_parameters()}
        assert (
            dtypes["scale_shift_table"] == dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
        )
        assert dtypes["blocks.0.ffn.net.2.weight"] == dtypes["patch_embedding.weight"] == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_network_is_of_the_same_dtypes_wherever_it_is_from(tmp_path, dtype: str) -> None:
    """Tables that are not saved, such as rotary ones, included."""
    name = "WanTransformer3DModel"
    build(name, "float32").net.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    nets = [build(name, dtype).net, diffusers_model(tmp_path, dtype=dtype).net, diffusers_model(file, dtype=dtype).net]
    of_all = [{key: x.dtype for key, x in (*net.named_parameters(), *net.named_buffers())} for net in nets]
    assert of_all[0] == of_all[1] == of_all[2]
    assert torch.float32 in of_all[0].values() or dtype == "float64"


def test_the_seed_decides_the_weights() -> None:
    name = "DiTTransformer2DModel"
    first, again, other = (
        diffusers_model(name=name, config=CASES[name].config, seed=seed).net.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_labels_are_dropped_by_the_trainer_alone() -> None:
    """DiT in training mode would drop labels at random, block by block."""
    name = "DiTTransformer2DModel"
    model = build(name)
    x, t, cond = latents(name), times(), TABLE[name].cond
    expected = model(x, t, cond)
    model.train()
    for _ in range(5):
        assert torch.equal(model(x, t, cond), expected)


def test_settings_override_the_adapter() -> None:
    name = "PixArtTransformer2DModel"
    plain = build(name)
    assert (plain.schedule.name, plain.schedule.predicts, plain.time_scale) == ("vp linear", "noise", 1000.0)
    other = build(name, schedule="rectified flow", predicts="data", time_scale=1.0)
    assert (other.schedule.name, other.schedule.predicts, other.time_scale) == ("rectified flow", "data", 1.0)


def test_the_condition_video_stands_behind_the_latents() -> None:
    name = "WanTransformer3DModel"
    model = build(name, config={"in_channels": 7})
    x, extra = latents(name), normal(B, 3, *TABLE[name].latent[1:])
    with torch.no_grad():
        F = model(x, times(), TABLE[name].cond | {"condition": extra})
    assert F.shape == x.shape


def test_the_frame_rate_of_ltx_counts_per_sample() -> None:
    name = "LTXVideoTransformer3DModel"
    model, x, cond = build(name), latents(name), TABLE[name].cond
    with torch.no_grad():
        usual = model(x, times(), cond)
        given = model(x, times(), cond | {"frame_rate": torch.tensor([25.0, 50.0])})
    torch.testing.assert_close(given[0], usual[0], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(given[1], usual[1])


# ---------------------------------------------------------------- errors


def test_a_missing_condition_is_named() -> None:
    name = "FluxTransformer2DModel"
    model = build(name)
    with pytest.raises(
        ValueError,
        match=r"FluxTransformer2DModel needs the conditions pooled_projections, guidance; "
        r"the batch has encoder_hidden_states",
    ):
        model(latents(name), times(), TEXT_12)


def test_a_missing_condition_is_named_while_a_graph_is_made() -> None:
    name = "SD3Transformer2DModel"
    dual = jvpgraph.transform(build(name), backend="eager")
    x = latents(name)
    with pytest.raises(Exception, match="SD3Transformer2DModel needs the conditions pooled_projections"):
        dual(x, times(), TEXT_12, tangents={"x": x})


def test_an_unknown_condition_is_named() -> None:
    name = "WanTransformer3DModel"
    with pytest.raises(ValueError, match=r"WanTransformer3DModel takes encoder_hidden_states, .*, not labels"):
        build(name)(latents(name), times(), TEXT_10 | {"labels": torch.zeros(B)})


def test_a_second_time_is_refused() -> None:
    name = "WanTransformer3DModel"
    with pytest.raises(ValueError, match=r"WanTransformer3DModel takes one time, not two: .* add_second_time"):
        build(name)(latents(name), times(), TEXT_10, r=times())


TWO_TIMES = ("AnyFlowFARTransformer3DModel", "AnyFlowTransformer3DModel", *TOLD)


@pytest.mark.parametrize("name", TWO_TIMES)
@torch.no_grad()
def test_two_times_arrive_in_the_network_s_own_units(name: str) -> None:
    """r on its own, and r = t where there is none."""
    model, x, t, cond = build(name), latents(name), times(), TABLE[name].cond
    r, seen = t / 2, []
    key = "r_timestep" if "AnyFlow" in name else "timestep_r"
    model.net.register_forward_pre_hook(lambda _, __, given: seen.append(given[key]), with_kwargs=True)
    F = model(x, t, cond, r)
    wanted = model.network_time(r)
    torch.testing.assert_close(seen[0].reshape(B, -1)[:, 0].float(), wanted, rtol=1e-6, atol=0)
    assert (F - model(x, t, cond)).norm() > 1e-3 * F.norm()
    assert torch.equal(model(x, t, cond), model(x, t, cond, t))


def test_a_hunyuan_without_mean_flow_takes_one_time() -> None:
    name = "HunyuanVideo15Transformer3DModel"
    assert takes_r(build(name))
    model = build(name, config={"use_meanflow": False})
    assert not takes_r(model)
    assert model(latents(name), times(), TABLE[name].cond).isfinite().all()


def test_more_chunks_than_a_far_network_sees_whole_are_refused() -> None:
    name = "AnyFlowFARTransformer3DModel"
    with pytest.raises(ValueError, match=r"7 frames of latents are no 2 or fewer of the chunks \[1, 3, 3"):
        build(name)(normal(B, 4, 7, 8, 8), times(), TEXT_10)


def test_an_unknown_class_is_told_what_to_do(tmp_path) -> None:
    known = r"known are AceStep.*ZImageTransformer2DModel; for another network write call\(net, x, time, cond\)"
    with pytest.raises(ValueError, match="Linear has no adapter; " + known):
        adapter_of(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="UNet2DModel has no adapter; " + known):
        diffusers_model(name="UNet2DModel")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="UNet2DModel has no adapter"):
        diffusers_model(tmp_path)


def test_what_to_load_is_said_once(tmp_path) -> None:
    with pytest.raises(ValueError, match="give either the path"):
        diffusers_model()
    with pytest.raises(ValueError, match="give either the path"):
        diffusers_model(tmp_path, name="WanTransformer3DModel")
    with pytest.raises(ValueError, match=r"holds no config.json"):
        diffusers_model(tmp_path)
    with pytest.raises(ValueError, match="dtype is a floating type"):
        diffusers_model(name="WanTransformer3DModel", dtype="bf16")


def test_diffusers_is_asked_for_only_when_needed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install diffusers"):
        adapters.diffusers_model(name="WanTransformer3DModel")


# ---------------------------------------------------------------- sampling by diffusers

STEPS = pytest.mark.parametrize("steps", [[math.atan(80.0)], [math.pi / 2, 1.1], [math.atan(80.0), 1.3, 1.0, 0.6]])


def consistency_steps(model: TrigFlow, cond: dict[str, Tensor], steps: list[float], noises: list[Tensor]) -> Tensor:
    """x0 = f(x_t, t), with fresh noise to the next time."""
    x = noises[0]
    for i, time in enumerate(steps):
        t = torch.full((len(x),), time, dtype=torch.float64)
        if i > 0:
            x = add_noise(x0, noises[i], t)  # noqa: F821
        x0 = clean_image(model(x, t, cond), x, t)
    return x0


@STEPS
@torch.no_grad()
def test_diffusers_samples_a_rectified_flow_student_alike(steps: list[float]) -> None:
    """The same noise, the network's own velocity, the loop of a pipeline."""
    name = "SD3Transformer2DModel"
    model, cond = build(name, "float32"), {key: c.float() for key, c in TABLE[name].cond.items()}
    generator = torch.Generator().manual_seed(3)
    noises = [torch.randn(latents(name).shape, generator=generator) for _ in steps]
    expected = consistency_steps(model, cond, steps, [noise.double() for noise in noises])

    sampling = scheduler_for(model, steps)
    scheduler = sampling.scheduler
    assert isinstance(scheduler, diffusers.FlowMatchLCMScheduler)
    wishes = torch.linspace(1, 1 / len(steps), len(steps)).tolist()
    scheduler.set_timesteps(sigmas=wishes, mu=1.0)  # as pipelines do
    torch.testing.assert_close(scheduler.sigmas[:-1].tolist(), sampling.arguments["sigmas"], rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(3)
    x = sampling.noise_scale * torch.randn(latents(name).shape, generator=generator)
    for t in scheduler.timesteps:
        u = model.net(x, timestep=t.expand(B), **cond, return_dict=False)[0]
        x = scheduler.step(u, t, x, generator=generator, return_dict=False)[0]
    torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-4)


def wan_pipeline(model: TrigFlow, scheduler: Any, text: Tensor, x: Tensor, **common: Any) -> Tensor:
    missing = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipeline = diffusers.WanPipeline(transformer=model.net, scheduler=scheduler, **missing)
    size = {"num_frames": 5, "height": 32, "width": 48}
    return pipeline(prompt_embeds=text, guidance_scale=1.0, latents=x, **size, **common)[0]


def flux_pipeline(model: TrigFlow, scheduler: Any, text: Tensor, x: Tensor, **common: Any) -> Tensor:
    missing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = diffusers.FluxPipeline(transformer=model.net, scheduler=scheduler, **missing)
    pooled = torch.ones(1, 10)
    given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "guidance_scale": 3.5, "height": 64, "width": 48}
    return adapters.unpack(pipeline(latents=adapters.pack(x), **given, **common)[0], 8, 6)


@pytest.mark.parametrize(
    ("name", "pipeline", "more", "config"),
    [
        ("WanTransformer3DModel", wan_pipeline, {}, {"image_dim": None, "added_kv_proj_dim": None}),
        (
            "FluxTransformer2DModel",
            flux_pipeline,
            {"pooled_projections": torch.ones(1, 10), "guidance": torch.tensor([3.5])},
            {},
        ),
    ],
    ids=["wan", "flux"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_a_pipeline_of_diffusers_samples_the_student_in_four_steps(
    name: str, pipeline: Callable[..., Tensor], more: dict[str, Tensor], config: dict[str, Any]
) -> None:
    model, steps = build(name, "float32", config=config), [math.atan(80.0), 1.3, 1.0, 0.6]
    text = normal(1, L, 10 if pipeline is wan_pipeline else 12).float()
    sampling = scheduler_for(model, steps)
    x = normal(1, *TABLE[name].latent).float()
    common = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False}
    torch.manual_seed(5)
    sampled = pipeline(model, sampling.scheduler, text, sampling.noise_scale * x, **common)

    torch.manual_seed(5)  # the scheduler draws in the shape of the tokens
    shape = x.shape if pipeline is wan_pipeline else adapters.pack(x).shape
    fresh = [torch.randn(shape) for _ in steps[1:]]
    noises = [x, *(n if pipeline is wan_pipeline else adapters.unpack(n, 8, 6) for n in fresh)]
    expected = consistency_steps(model, {"encoder_hidden_states": text} | more, steps, [n.double() for n in noises])
    torch.testing.assert_close(sampled.double(), expected, rtol=1e-4, atol=1e-4)


@STEPS
@torch.no_grad()
def test_any_student_is_sampled_alike_by_the_scheduler_of_scm(steps: list[float]) -> None:
    name = "DiTTransformer2DModel"
    model, cond = build(name, "float32"), TABLE[name].cond
    generator = torch.Generator().manual_seed(4)
    noises = [torch.randn(latents(name).shape, generator=generator, dtype=torch.float64) for _ in steps]
    expected = consistency_steps(model, cond, steps, noises)

    sampling = scheduler_for(model, steps)
    assert type(sampling.scheduler).__name__ == "SCMScheduler"
    x = sampling.noise_scale * noises[0]
    for i, t in enumerate(sampling.scheduler.timesteps[:-1]):
        F = model(x, t.expand(B), cond)
        _, x0 = sampling.scheduler.step(F, t, x, return_dict=False)
        if i + 1 < len(steps):
            x = add_noise(x0, noises[i + 1], torch.full((B,), steps[i + 1], dtype=torch.float64))
    torch.testing.assert_close(x0, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_pipelines_with_noise_levels_of_their_own_get_the_scheduler_of_scm() -> None:
    for name in ("MochiTransformer3DModel", "CosmosTransformer3DModel"):
        assert type(scheduler_for(build(name), [1.5, 1.0]).scheduler).__name__ == "SCMScheduler"


def test_a_scheduler_refuses_other_steps_and_impossible_times() -> None:
    model = build("SD3Transformer2DModel")
    with pytest.raises(ValueError, match="made for 3 steps, not 4"):
        scheduler_for(model, [1.5, 1.0, 0.5]).scheduler.set_timesteps(4)
    for wrong in ([], [1.0, 1.5], [1.6], [1.0, 0.0]):
        with pytest.raises(ValueError, match="times are radians"):
            scheduler_for(model, wrong)


@torch.no_grad()
def test_clean_pictures_of_qwen_image_have_their_own_time() -> None:
    name = "QwenImageTransformer2DModel"
    model = build(name, config={"zero_cond_t": True}).double()
    x, t = latents(name), times()
    cond = {key: value.double() if value.is_floating_point() else value for key, value in TABLE[name].cond.items()}
    x_s = model.c_in(t).reshape(-1, *[1] * (x.dim() - 1)) * x
    u = model.call(model.net, x_s, model.network_time(t), cond)
    torch.testing.assert_close(u, qwen_by_hand(model.net, x_s, model.s_of_t(t), cond).reshape(x.shape))


def test_times_of_another_shape_than_the_network_asks_for_are_refused() -> None:
    name = "QwenImageTransformer2DModel"
    model = build(name, "float32")
    model.net.zero_cond_t = True
    model.call = replace(model.call, function=lambda net, x, time, cond: qwen_image(Without(net), x, time, cond))
    with pytest.raises(ValueError, match=r"asks for times of shape \[4\], and is told \[2\]"):
        model(latents(name), times(), TABLE[name].cond)


class Without:
    """A network that says it has one time for all."""

    zero_cond_t = False

    def __init__(self, net: Any) -> None:
        self.net, self.time_text_embed = net, net.time_text_embed

    def __call__(self, **asked: Any) -> Any:
        return self.net(**asked)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("HunyuanImageTransformer2DModel", 1000.0),
        ("HunyuanVideoTransformer3DModel", 1000.0),
        ("FluxTransformer2DModel", 1.0),
    ],
)
def test_a_scale_is_told_in_the_network_s_own_unit(name: str, unit: float) -> None:
    assert unit_of(build(name, "float32").net) == unit
