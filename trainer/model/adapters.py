"""How the transformers of diffusers are called: latents and a time in, the prediction of their training out.

Each function below is call(net, x_s, time, cond) -> u for one or more classes of ADAPTERS. Latents are always
the VAE's, scaled to about unit variance and not packed, [B, C, H, W] or [B, C, T, H, W]; conditions carry the
names of the network's own arguments, [B, ...]; packing, position ids, signs, reversed times and learned
variances are the adapter's business. Sources: the denoising loops of diffusers.pipelines, version 0.42.
All of them are captured as one graph but HiDream and Lumina 2, whose own Python asks for expert and caption
lengths.

The Flux family and Qwen-Image would round the float32 time that they are given to their own dtype: in bfloat16 to steps
of 4 of 1000, which leaves the tangent along t to chance. See keep_time_exact.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.model.loading import diffusers, folder_of, initialise, load
from jvpgraph.trainer.model.one_call import keep_time_exact, told
from jvpgraph.trainer.model.packing import pack, positions, unpack
from jvpgraph.trainer.model.padded_text import HidesText, at_full_length, take_padded
from jvpgraph.trainer.model.saved_additions import load_additions
from jvpgraph.trainer.model.student import kept_in_float32
from jvpgraph.trainer.model.two_times import ace_step, anyflow, anyflow_far, hunyuan, with_exact_times, with_two_times
from jvpgraph.trainer.trigflow import (
    EDM_NETWORK,
    RECTIFIED_FLOW,
    VP_LINEAR,
    Call,
    Schedule,
    TrigFlow,
    to_network,
)
from jvpgraph.trainer.trigflow import schedule as schedule_named

FRAMED = 512  # tokens of text of Wan and SkyReels from image to video
WRITE_ONE = "for another network write call(net, x, time, cond) and build TrigFlow(net, call=...) yourself"


@dataclass(frozen=True)
class Adapter:
    """How a network is called, and what it was trained on.

    Attributes:
        name: the network's class in diffusers.
        function: call(net, x_s, time, cond), given only known conditions in the network's dtype.
        needs: conditions without which it cannot run.
        takes: further conditions that it understands.
        time_scale: the network's time at s = 1.
        adjust: (adapter, net) -> the adapter for this network's configuration.
        takes_r: the function is given a second time as well.
    """

    name: str
    function: Call
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    schedule: Schedule = RECTIFIED_FLOW
    time_scale: float = 1000.0
    adjust: Callable[[Adapter, Any], Adapter] = lambda adapter, net: adapter
    takes_r: bool = False

    def __call__(
        self, net: nn.Module, x: Tensor, time: Tensor, cond: Condition, time_r: Tensor | None = None
    ) -> Tensor:
        """x_s [B, C, ...] and the network's time [B], float32 -> the prediction, of x_s' shape. No time_r: it is t."""
        if time_r is not None and not self.takes_r:
            raise ValueError(f"{self.name} takes one time, not two: give it a second one, see add_second_time")
        second = {"time_r": time if time_r is None else time_r} if self.takes_r else {}
        has = ", ".join(cond) or "none"
        if missing := [name for name in self.needs if name not in cond]:
            raise ValueError(f"{self.name} needs the conditions {', '.join(missing)}; the batch has {has}")
        known = (*self.needs, *self.takes)
        if unknown := [name for name in cond if name not in known]:
            raise ValueError(f"{self.name} takes {', '.join(known)}, not {', '.join(unknown)}; the batch has {has}")
        dtype = computing_dtype(net)
        cond = {name: to_network(c, dtype) for name, c in cond.items()}
        return self.function(net, x.to(dtype), time, cond, **second)


def computing_dtype(net: nn.Module) -> torch.dtype:
    """The dtype of the parameters, leaving aside those that diffusers keeps in float32."""
    for name, p in net.named_parameters():
        if not kept_in_float32(net, name):
            return p.dtype
    return next(net.parameters()).dtype


# ---------------------------------------------------------------- calls


def plainly(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    return net(hidden_states=x, timestep=time, **cond, return_dict=False)[0]


def without_variance(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """The second half of the channels, if there is one, is a variance."""
    return plainly(net, x, time, cond)[:, : x.shape[1]]


def pixart(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """Resolution [B, 2] and aspect ratio [B, 1] are known to the largest PixArt-alpha only."""
    sizes = {name: cond.get(name) for name in ("resolution", "aspect_ratio")}
    rest = {name: c for name, c in cond.items() if name not in sizes}
    u = net(hidden_states=x, timestep=time, added_cond_kwargs=sizes, **rest, return_dict=False)[0]
    return u[:, : x.shape[1]]


def from_noise(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """Time runs from noise (0) to data (1), and so does the velocity."""
    return -plainly(net, x, 1 - time, cond)


def mochi(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    return -plainly(net, x, 1000 - time, cond)


def wan(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """`condition` [B, C', T, H, W], for image to video: known frames and their mask, behind the latents.

    With the embedding of a picture there are FRAMED words, as the network tells the two apart by that number.
    """
    words = cond["encoder_hidden_states"].shape[1]
    if "encoder_hidden_states_image" in cond and words != FRAMED:
        raise ValueError(
            f"{type(net).__name__} takes {FRAMED} tokens of text beside a picture's, not {words}: pad them"
        )
    rest = {name: c for name, c in cond.items() if name != "condition"}
    x = torch.cat([x, cond["condition"]], dim=1) if "condition" in cond else x
    return plainly(net, x, time, rest)


def hidream(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """The Llama states come as [B, layers, L, D]."""
    states = {**cond, "encoder_hidden_states_llama3": cond["encoder_hidden_states_llama3"].transpose(0, 1)}
    return -net(hidden_states=x, timesteps=time, **states, return_dict=False)[0]


def z_image(net: Any, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """Lists of images of one frame and of captions; a batch has captions of one length [B, L, D].

    `cap_mask` [B, L] says which tokens of padded captions count: see trainer/model/padded_text.py.
    """
    captions, mask = cond["cap_feats"], None
    if "cap_mask" in cond:
        captions, mask = at_full_length(captions, cond["cap_mask"])
    images = list(x.unsqueeze(2).unbind(0))
    with told(net, "caption_mask", mask):
        u = net(images, 1 - time, list(captions.unbind(0)), return_dict=False)[0]
    return -torch.stack(u).squeeze(2)


def cogview4(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """`attention_mask` [B, L] hides text that is 0: see HidesText."""
    rest = {name: c for name, c in cond.items() if name != "attention_mask"}
    if "attention_mask" in cond:
        rest["attention_kwargs"] = {"text_attn_mask": cond["attention_mask"].int()}  # type: ignore[assignment]
    return plainly(net, x, time, rest)


def flux(net: Any, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """`guidance` [B]: the scale itself, 3.5 and the like."""
    H, W = x.shape[-2:]
    text = x.new_zeros(cond["encoder_hidden_states"].shape[1], 3, dtype=torch.float32)
    with told(net.time_text_embed.time_proj, "exact_time", 1000 * time):
        u = plainly(net, pack(x), time, {**cond, "img_ids": positions(H // 2, W // 2, x.device), "txt_ids": text})
    return unpack(u, H, W)


def flux2(net: Any, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """Four coordinates (time, row, column, word). Latents are normalised by the VAE's batch norm, then unpacked."""
    H, W = x.shape[-2:]
    words = torch.arange(cond["encoder_hidden_states"].shape[1], dtype=torch.float32, device=x.device)
    ids = {
        "img_ids": pad(positions(H // 2, W // 2, x.device), (0, 1)),
        "txt_ids": pad(words[:, None], (3, 0)),
    }
    with told(net.time_guidance_embed.time_proj, "exact_time", 1000 * time):
        u = plainly(net, pack(x), time, {"guidance": None, **cond, **ids})  # type: ignore[dict-item]
    return unpack(u, H, W)


def chroma(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """`attention_mask` [B, L] is the text's; all of the image counts.

    Its floats are added to the scores, as in diffusers 0.42: the pipeline's own ones and zeros hide nothing. Whole
    numbers and booleans hide what is 0.
    """
    if "attention_mask" in cond:
        mask, tokens = cond["attention_mask"], x.shape[-2] * x.shape[-1] // 4
        mask = mask if mask.is_floating_point() else mask.bool()
        cond = {**cond, "attention_mask": pad(mask, (0, tokens), value=True)}
    return flux(net, x, time, cond)


def qwen_image(net: Any, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """Latents [B, C, H, W], or [B, C, 1, H, W] as its VAE makes them."""
    B, H, W = len(x), *x.shape[-2:]
    image = x.squeeze(2) if x.dim() == 5 else x
    times = torch.cat([time, 0 * time]) if net.zero_cond_t else time  # of clean pictures beside the noisy one, too
    with told(net.time_text_embed.time_proj, "exact_time", times):
        u = plainly(net, pack(image), time, {**cond, "img_shapes": [[(1, H // 2, W // 2)]] * B})  # type: ignore[dict-item]
    return unpack(u, H, W).reshape(x.shape)


def ltx_video(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """`frame_rate` [B], 25 per second unless given; its VAE joins 8 frames and 32 x 32 pixels."""
    _, _, T, H, W = x.shape
    rest = {name: c for name, c in cond.items() if name != "frame_rate"}
    rate = cond["frame_rate"].reshape(-1, 1, 1, 1, 1).float() if "frame_rate" in cond else 25.0
    scale = (8 / rate, 32, 32)
    tokens = x.flatten(2).transpose(1, 2)
    sizes: dict[str, Any] = {"num_frames": T, "height": H, "width": W, "rope_interpolation_scale": scale}
    return plainly(net, tokens, time, {**rest, **sizes}).transpose(1, 2).unflatten(2, (T, H, W))


def cosmos(net: Any, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """Latents [B, C, T, H, W], or [B, C, H, W] of pictures.

    `fps` [B], the same for the whole batch; `padding_mask` [B, 1, h, w], zeros unless given.
    """
    more: dict[str, Any] = dict(cond)
    if "fps" in cond:
        more["fps"] = cond["fps"][0]
    if net.config.concat_padding_mask:
        more["padding_mask"] = cond["padding_mask"][:1] if "padding_mask" in cond else x.new_zeros(1, 1, *x.shape[-2:])
    u = plainly(net, x.unsqueeze(2) if x.dim() == 4 else x, time, more)
    return u.reshape(x.shape)


def cosmos1(net: nn.Module, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
    return -cosmos(net, x, time, cond)


# ---------------------------------------------------------------- what depends on the configuration


def with_guidance(adapter: Adapter, net: Any) -> Adapter:
    """Guidance-distilled networks must be told the scale, the others do not understand it."""
    return replace(adapter, needs=(*adapter.needs, "guidance")) if net.config.guidance_embeds else adapter


def with_exact_time(adapter: Adapter, net: Any) -> Adapter:
    embedding = net.time_guidance_embed if hasattr(net, "time_guidance_embed") else net.time_text_embed
    keep_time_exact(embedding.time_proj)
    return with_guidance(adapter, net) if "guidance_embeds" in net.config else adapter


def with_sizes(adapter: Adapter, net: Any) -> Adapter:
    sizes = ("resolution", "aspect_ratio") if net.use_additional_conditions else ()
    return replace(adapter, needs=(*adapter.needs, *sizes))


def with_hidden_text(adapter: Adapter, net: Any) -> Adapter:
    for block in net.transformer_blocks:
        block.attn1.set_processor(HidesText())
    return adapter


def with_padded_captions(adapter: Adapter, net: Any) -> Adapter:
    take_padded(net)
    return adapter


def sana_times(adapter: Adapter, net: Any) -> Adapter:
    return replace(with_guidance(adapter, net), time_scale=1000 * net.config.timestep_scale)


def cosmos_generation(adapter: Adapter, net: Any) -> Adapter:
    """Cosmos 1, known by its learnt positions, is EDM's; Cosmos 2 and 2.5 are rectified flows with s as time."""
    if net.config.concat_padding_mask and not hasattr(sys.modules[type(net).__module__], "transforms"):
        raise ModuleNotFoundError("CosmosTransformer3DModel needs it: pip install torchvision")
    if net.config.extra_pos_embed_type == "learnable":
        return replace(adapter, function=cosmos1, schedule=EDM_NETWORK)
    return adapter


TEXT = ("encoder_hidden_states",)
MASK = ("encoder_attention_mask",)
SECOND_TEXT = ("encoder_hidden_states_2", "encoder_attention_mask_2")
SIZES = ("original_size", "target_size", "crop_coords")

# fmt: off
ADAPTERS = {
    adapter.name: adapter
    for adapter in (
        # images
        Adapter("AuraFlowTransformer2DModel", plainly, TEXT, time_scale=1.0),
        Adapter("ChromaTransformer2DModel", chroma, TEXT, ("attention_mask",),
                time_scale=1.0, adjust=with_exact_time),
        Adapter("CogView4Transformer2DModel", cogview4, (*TEXT, *SIZES), ("attention_mask",), adjust=with_hidden_text),
        Adapter("DiTTransformer2DModel", without_variance, ("class_labels",), schedule=VP_LINEAR),
        Adapter("Flux2Transformer2DModel", flux2, TEXT, time_scale=1.0, adjust=with_exact_time),
        Adapter("FluxTransformer2DModel", flux, (*TEXT, "pooled_projections"),
                time_scale=1.0, adjust=with_exact_time),
        Adapter("HunyuanImageTransformer2DModel", hunyuan, (*TEXT, *MASK, *SECOND_TEXT), adjust=with_two_times),
        Adapter("HiDreamImageTransformer2DModel", hidream,
                ("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds")),
        Adapter("Lumina2Transformer2DModel", from_noise, (*TEXT, *MASK), time_scale=1.0),
        Adapter("PixArtTransformer2DModel", pixart, TEXT, MASK, schedule=VP_LINEAR, adjust=with_sizes),
        Adapter("PRXTransformer2DModel", plainly, TEXT, ("attention_mask",), time_scale=1.0),
        Adapter("QwenImageTransformer2DModel", qwen_image, TEXT, ("encoder_hidden_states_mask",),
                time_scale=1.0, adjust=with_exact_time),
        Adapter("SanaTransformer2DModel", without_variance, TEXT, MASK, adjust=sana_times),
        Adapter("SD3Transformer2DModel", plainly, (*TEXT, "pooled_projections")),
        Adapter("ZImageTransformer2DModel", z_image, ("cap_feats",), ("cap_mask",),
                time_scale=1.0, adjust=with_padded_captions),
        # video
        Adapter("AnyFlowFARTransformer3DModel", anyflow_far, TEXT, takes_r=True),
        Adapter("AnyFlowTransformer3DModel", anyflow, TEXT, takes_r=True),
        Adapter("CosmosTransformer3DModel", cosmos, TEXT, ("attention_mask", "fps", "condition_mask", "padding_mask"),
                time_scale=1.0, adjust=cosmos_generation),
        Adapter("HunyuanVideo15Transformer3DModel", hunyuan,
                (*TEXT, *MASK, *SECOND_TEXT, "image_embeds"), ("condition",), adjust=with_two_times),
        Adapter("HunyuanVideoTransformer3DModel", plainly, (*TEXT, *MASK, "pooled_projections"),
                adjust=with_guidance),  # its guidance is 1000 times the scale
        Adapter("LTXVideoTransformer3DModel", ltx_video, (*TEXT, *MASK), ("frame_rate",)),
        Adapter("MochiTransformer3DModel", mochi, (*TEXT, *MASK)),
        Adapter("SanaVideoTransformer3DModel", without_variance, TEXT, MASK, adjust=with_guidance),
        Adapter("SkyReelsV2Transformer3DModel", wan, TEXT, ("encoder_hidden_states_image", "condition")),
        Adapter("WanTransformer3DModel", wan, TEXT, ("encoder_hidden_states_image", "condition")),
        # sound
        Adapter("AceStepTransformer1DModel", ace_step, (*TEXT, "context_latents"),
                time_scale=1.0, adjust=with_exact_times, takes_r=True),
    )
}
# fmt: on


def adapter_of(net: nn.Module) -> Adapter:
    """The adapter of a network of diffusers, adjusted to its configuration.

    Raises:
        ValueError: its class is not in ADAPTERS.
    """
    for cls in type(net).__mro__:  # FSDP makes a subclass
        if cls.__name__ in ADAPTERS:
            adapter = ADAPTERS[cls.__name__]
            return adapter.adjust(adapter, net)
    raise unknown_class(type(net).__name__)


def unknown_class(name: str) -> ValueError:
    return ValueError(f"{name} has no adapter; known are {', '.join(sorted(ADAPTERS))}; {WRITE_ONE}")


# ---------------------------------------------------------------- networks


def diffusers_model(
    path: Path | str | None = None,
    *,
    name: str | None = None,
    config: dict[str, Any] | str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    schedule: str | None = None,
    predicts: str | None = None,
    time_scale: float | None = None,
) -> TrigFlow:
    """A transformer of diffusers in TrigFlow coordinates, in evaluation mode.

    Args:
        path: folder of a saved network, or of a pipeline with one in `transformer`; or a .safetensors file with the
            names of the network's own repository.
        name: instead of a path, the class of a randomly initialised network,
        config: with these arguments of its constructor. For a single file: a folder whose config.json says what
            network it is, if that is not the file's own.
        dtype: of the parameters; those that diffusers keeps in float32 stay there when this is narrower.
        seed: of the random initialisation.
        schedule: what the network was trained on, by a name in trigflow.SCHEDULES, if not what its adapter says.
        predicts: what it predicts, one of trigflow.PREDICTIONS, likewise.
        time_scale: its time at s = 1, likewise.

    Raises:
        ValueError: the class has no adapter, or not exactly one of `path` and `name` was given.
        ModuleNotFoundError: diffusers is not installed.
    """
    if (path is None) == (name is None):
        raise ValueError("give either the path of a saved network or the name and config of a new one")
    number = getattr(torch, dtype, None)
    if not isinstance(number, torch.dtype) or not number.is_floating_point:
        raise ValueError(f"dtype is a floating type such as float32 or bfloat16, not {dtype!r}")
    if path is not None:
        if isinstance(config, dict):
            raise ValueError("config is that of a new network; with a path it is the folder of a single file's config")
        net = load(Path(path), config, number, network_class)
    else:
        if isinstance(config, str):
            raise ValueError("config is a folder, which says what network a single file is; a new one takes a mapping")
        net = initialise(network_class(str(name)), config or {}, number, seed)
    for module in net.modules():
        if type(module).__name__ == "LabelEmbedding":
            vars(module)["dropout_prob"] = (
                0.0  # DiT would drop labels block by block; the trainer drops conditions itself
            )
    adapter = adapter_of(net.eval())
    noise = adapter.schedule if schedule is None else schedule_named(schedule)
    if predicts is not None:
        noise = noise.predicting(predicts)
    model = TrigFlow(net, adapter, noise, time_scale=adapter.time_scale if time_scale is None else time_scale)
    if path is not None:
        load_additions(model, folder_of(Path(path)))
    return model


def network_class(name: str) -> Any:
    if name not in ADAPTERS:
        raise unknown_class(name)
    return getattr(diffusers(), name)
