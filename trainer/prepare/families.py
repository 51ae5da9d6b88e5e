"""What each family of pipelines calls what: from diffusers' encode_prompt to the arguments of the network.

A line says what `encode_prompt` returns, in its order, by the names that the network's adapter knows
(trainer/model/adapters.py). A name behind a minus is the negative prompt's; where there is none, a negative prompt is
encoded as any other. Everything else is asked of the pipeline itself: its defaults of `__call__`, its factors, its VAE.
Sources: diffusers.pipelines, version 0.42.

Not here, as they ask their network what no adapter asks: image to video of LTX, HunyuanVideo, Cosmos 2 and Wan 2.2's
5B (clean frames among the noisy ones, with times of their own). Nor are those of AnyFlow, whose data is Wan's, of
HunyuanImage and HunyuanVideo 1.5, which have two texts, and of ACE-Step, for sound.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

LENGTHS = ("max_sequence_length", "tokenizer_max_length")  # of a text, in tokens, by the pipelines' names
TEXT = "encoder_hidden_states"
MASK = "encoder_attention_mask"


@dataclass(frozen=True)
class Family:
    """Pipelines to pictures or videos that ask the same network the same.

    Attributes:
        network: the class of the transformer.
        pipelines: names of classes of diffusers.
        returns: of encode_prompt, by names of the network's arguments; None for what it does not need.
        padded_mask: the argument that says which tokens count, where the text's length is the longest prompt's own.
        layered: what encode_prompt returns as [layers, B, ...].
        first_frame: the arguments that come from a clip's first frame, which the pipeline is given.
        labels: the argument that takes a class, where there are labels instead of prompts.
        patch: latent pixels per side of a token where the network's configuration does not say (packed outside it).
        fps: frames per second that the network was trained on; 0: it makes pictures.
        guidance_scale: what the network's `guidance` argument multiplies the scale with, if it is told the scale.
        sizes: the network is told the picture's size, by arguments of these names.
        rate: the argument that takes the frame rate.
        keep_norm: what the pipeline does to its guidance, as `guidance.keep_norm` has it.
        attention: layers for adapters, where the network has not those of diffusers' usual attention.
        unguided: the guidance scale of the pipeline that means none: 0 where it is F + scale (F - F_negative).
        compression: the factors of the VAE, in space and time, that the network's adapter goes by.
    """

    network: str
    pipelines: tuple[str, ...]
    returns: tuple[str | None, ...]
    padded_mask: str | None = None
    layered: tuple[str, ...] = ()
    first_frame: tuple[str, ...] = ()
    labels: str | None = None
    patch: int | None = None
    fps: float = 0.0
    guidance_scale: float = 1.0
    sizes: tuple[str, ...] = ()
    rate: str | None = None
    keep_norm: str | None = None
    attention: tuple[str, ...] = ()
    unguided: float = 1.0
    compression: tuple[int, int] | None = None

    @property
    def video(self) -> bool:
        return self.fps > 0

    @property
    def conditions(self) -> tuple[str, ...]:
        """The arguments that come from the prompt."""
        names = (self.labels, *self.returns, self.padded_mask)
        return tuple(name for name in names if name and not name.startswith("-"))

    @property
    def negative_beside(self) -> bool:
        """Whether encode_prompt encodes a negative prompt in its own way."""
        return any(name and name.startswith("-") for name in self.returns)


BESIDE = (TEXT, MASK, f"-{TEXT}", f"-{MASK}")
BETWEEN = (TEXT, f"-{TEXT}")
FRAME = ("condition", "encoder_hidden_states_image")

# fmt: off
FAMILIES = (
    # images
    Family("AuraFlowTransformer2DModel", ("AuraFlowPipeline",), (TEXT, None, f"-{TEXT}", None)),
    Family("ChromaTransformer2DModel", ("ChromaPipeline",),
           (TEXT, None, "attention_mask", f"-{TEXT}", None, "-attention_mask"), patch=2),
    Family("CogView4Transformer2DModel", ("CogView4Pipeline",), BETWEEN, padded_mask="attention_mask",
           sizes=("original_size", "target_size", "crop_coords")),
    Family("CosmosTransformer3DModel", ("Cosmos2TextToImagePipeline",), BETWEEN, unguided=0.0),
    Family("DiTTransformer2DModel", ("DiTPipeline",), (), labels="class_labels"),
    Family("Flux2Transformer2DModel", ("Flux2Pipeline", "Flux2KleinPipeline"), (TEXT, None), patch=2),
    Family("FluxTransformer2DModel", ("FluxPipeline",), (TEXT, "pooled_projections", None), patch=2),
    Family("HiDreamImageTransformer2DModel", ("HiDreamImagePipeline",),
           ("encoder_hidden_states_t5", "-encoder_hidden_states_t5", "encoder_hidden_states_llama3",
            "-encoder_hidden_states_llama3", "pooled_embeds", "-pooled_embeds"),
           layered=("encoder_hidden_states_llama3",),
           attention=("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t")),
    Family("Lumina2Transformer2DModel", ("Lumina2Pipeline",), BESIDE, keep_norm="row"),
    Family("PixArtTransformer2DModel", ("PixArtAlphaPipeline", "PixArtSigmaPipeline"), BESIDE,
           sizes=("resolution", "aspect_ratio")),
    Family("PRXTransformer2DModel", ("PRXPipeline",), (TEXT, "attention_mask", f"-{TEXT}", "-attention_mask"),
           attention=("img_qkv_proj", "txt_kv_proj", "to_out.0")),
    Family("QwenImageTransformer2DModel", ("QwenImagePipeline",), (TEXT, None),
           padded_mask="encoder_hidden_states_mask", patch=2, keep_norm="token"),
    Family("SanaTransformer2DModel", ("SanaPipeline",), BESIDE),
    Family("SD3Transformer2DModel", ("StableDiffusion3Pipeline",),
           (TEXT, f"-{TEXT}", "pooled_projections", "-pooled_projections")),
    Family("ZImageTransformer2DModel", ("ZImagePipeline",), ("cap_feats", "-cap_feats"), padded_mask="cap_mask",
           patch=2, unguided=0.0),
    # video
    Family("CosmosTransformer3DModel", ("CosmosTextToWorldPipeline",), BETWEEN, fps=30, rate="fps", unguided=0.0),
    Family("HunyuanVideoTransformer3DModel", ("HunyuanVideoPipeline",), (TEXT, "pooled_projections", MASK),
           fps=24, guidance_scale=1000),
    Family("LTXVideoTransformer3DModel", ("LTXPipeline",), BESIDE, fps=25, rate="frame_rate", compression=(32, 8)),
    Family("MochiTransformer3DModel", ("MochiPipeline",), BESIDE, fps=30),
    Family("SanaVideoTransformer3DModel", ("SanaVideoPipeline",), BESIDE, fps=16),
    Family("SkyReelsV2Transformer3DModel", ("SkyReelsV2Pipeline",), BETWEEN, fps=24),
    Family("SkyReelsV2Transformer3DModel", ("SkyReelsV2ImageToVideoPipeline",), BETWEEN, fps=24, first_frame=FRAME),
    Family("WanTransformer3DModel", ("WanPipeline",), BETWEEN, fps=16),
    Family("WanTransformer3DModel", ("WanImageToVideoPipeline",), BETWEEN, fps=16, first_frame=FRAME),
)
# fmt: on


def family_of(pipeline: str) -> Family:
    """The family of a pipeline's class. Raises ValueError."""
    for family in FAMILIES:
        if pipeline in family.pipelines:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.pipelines))
    raise ValueError(f"{pipeline} is none of the pipelines that can be prepared for: {known}.")


@torch.no_grad()
def encode_text(family: Family, pipe: Any, prompt: str, negative: str | None, length: int) -> dict[str, Tensor]:
    """The network's arguments for a prompt, each [...] without a batch dim, on the CPU.

    Args:
        family: of the pipeline.
        pipe: the pipeline, with or without its transformer.
        prompt: encoded if `negative` is None.
        negative: encoded instead, as the pipeline's classifier-free guidance does.
        length: tokens of text; longer prompts are cut.
    """
    beside = negative is not None and family.negative_beside
    arguments: dict[str, Any] = {"prompt": negative if negative is not None and not beside else prompt}
    if beside:
        arguments["negative_prompt"] = negative
    try:
        result = pipe.encode_prompt(**usual_arguments(pipe, length) | arguments | guided(pipe, beside))
    except NameError as error:  # of a package that the pipeline imports if it is there
        raise ValueError(f"{type(pipe).__name__} needs {error.name}.\npip install {error.name}") from error
    parts = dict(zip(family.returns, result if isinstance(result, tuple) else (result,)))
    mark = "-" if beside else ""
    found = {
        name: parts[mark + name][:, 0] if name in family.layered else parts[mark + name][0]
        for name in family.conditions
        if mark + name in parts
    }
    if family.padded_mask is not None:
        name = family.conditions[0]
        text = found[name]
        missing = length - len(text)
        if missing < 0:
            raise ValueError(
                f"--text-length {length}: a {type(pipe).__name__} makes {len(text)} tokens of it. Take {len(text)}."
            )
        found[name] = pad(text, (0, 0, 0, missing))
        found[family.padded_mask] = pad(torch.ones(len(text), dtype=torch.int64), (0, missing))
    return {name: value.cpu().contiguous() for name, value in found.items()}


def usual_arguments(pipe: Any, length: int) -> dict[str, Any]:
    """What `__call__` hands to encode_prompt by default."""
    usual = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(pipe.encode_prompt).parameters.items():
        if name in LENGTHS:
            arguments[name] = length
        elif name == "device":
            arguments[name] = pipe._execution_device
        elif name in usual and usual[name].default is not inspect.Parameter.empty:
            arguments[name] = usual[name].default
        elif parameter.default is inspect.Parameter.empty:
            arguments[name] = None
    return arguments


def guided(pipe: Any, on: bool) -> dict[str, bool]:
    name = "do_classifier_free_guidance"
    return {name: on} if name in inspect.signature(pipe.encode_prompt).parameters else {}


def text_length(pipe: Any) -> int:
    """Tokens of text by the pipeline's own default."""
    for function in (pipe.__call__, pipe.encode_prompt):
        parameter = inspect.signature(function).parameters.get("max_sequence_length")
        if parameter is not None and isinstance(parameter.default, int):
            return parameter.default
    return int(pipe.tokenizer.model_max_length)
