"""Whole pipelines of diffusers with tiny random weights, made here and saved by save_pretrained."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from jvpgraph.trainer.prepare.checkpoint import Encoder, read_checkpoint
from tests.zoo.cases import CASES

WORDS = ("a", "the", "red", "green", "blue", "round", "square", "thing", "moves", "over", "left", "right", "field")
MEAN, STD = [0.1, -0.2, 0.3, 0.05], [0.9, 1.1, 0.7, 1.3]


def make(pipeline: str, **config: Any) -> Any:
    """`pipeline` is a class of diffusers that has a function here, with weights that depend on nothing else.

    Args:
        config: of the transformer, in place of what it has here.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(diffusers, pipeline)(**MAKERS[pipeline](**config))
    made.set_progress_bar_config(disable=True)
    return made


def save_tiny(pipeline: str, folder: Path) -> Path:
    make(pipeline).save_pretrained(folder)
    return folder


def pair_of_networks(folder: Path, dtype: str = "float32") -> Path:
    """A pipeline as Wan 2.2's of 14B."""
    pipe = make("WanPipeline")
    torch.manual_seed(1)
    second = diffusers.WanTransformer3DModel(**{k: v for k, v in pipe.transformer.config.items() if k[0] != "_"})
    pipe.register_modules(transformer_2=second.to(getattr(torch, dtype)))
    pipe.transformer.to(getattr(torch, dtype))
    pipe.register_to_config(boundary_ratio=0.875)
    pipe.save_pretrained(folder)
    return folder


SIZE, FRAMES = (32, 64), 9  # height, width
PROMPT, NEGATIVE = "a red thing moves over", "blue"
NO_NEGATIVE = ("Flux2KleinPipeline", "DiTPipeline")  # none but an empty one
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8))


def call(pipe: Any, **more: Any) -> Any:
    """What the pipeline returns for PROMPT or label 7, in 2 steps; first, where it begins with one, PICTURE."""
    pipe.set_progress_bar_config(disable=True)
    if isinstance(pipe, diffusers.HiDreamImagePipeline):  # which makes pictures of one area only
        pipe.default_sample_size = 11.32
    if hasattr(pipe, "safety_checker"):
        pipe.safety_checker = Lenient()
    takes = inspect.signature(pipe.__call__).parameters
    usual = {
        "prompt": PROMPT,
        "class_labels": [7],
        "height": SIZE[0],
        "width": SIZE[1],
        "num_frames": FRAMES,
        "frames": FRAMES,
        "num_inference_steps": 2,
        "negative_prompt": NEGATIVE,
        "use_resolution_binning": False,
        "generator": torch.Generator().manual_seed(0),
    }
    if "image" in takes and takes["image"].default is inspect.Parameter.empty:
        usual["image"] = PICTURE
    usual = {name: value for name, value in (usual | more).items() if name in takes}
    return pipe(**usual, return_dict=False)[0]


class Lenient:
    """In the place of Cosmos' guardrail, which is a package of its own."""

    def to(self, device: Any) -> None: ...

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def size_of(encoder: Encoder) -> tuple[int, int]:
    """Height and width that `call` asks for."""
    return encoder.default_size if encoder.one_size else SIZE


def conditions(name: str, encoder: Encoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `prepare` makes of the same: of the prompt and of the negative one, each without a batch dim."""
    positive = encoder.prompt("7" if encoder.family.labels else PROMPT) | encoder.first_frame([PICTURE] * FRAMES)
    return positive, encoder.negative("" if name in NO_NEGATIVE else NEGATIVE)


def encoder_of(pipeline: str, folder: Path) -> Encoder:
    """What `prepare` encodes with, in float32."""
    return Encoder(read_checkpoint(save_tiny(pipeline, folder)), torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------- text


def t5_tokenizer(more: str = "") -> Any:
    """WORDS and those of `more` are tokens, and all else is spelt."""
    words = dict.fromkeys((*WORDS, *re.findall(r"\w+", more)))
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in words), *"abcdefghijklmnopqrstuvwxyz"]
    return transformers.T5Tokenizer(
        vocab=[(piece, -float(i > 2)) for i, piece in enumerate(pieces)], extra_ids=0, model_max_length=32
    )


def letters(end: str = "") -> dict[str, int]:
    """A vocabulary of printable characters, as byte-level BPE writes them, and those that end a word."""
    characters = [chr(i) for i in (*range(33, 127), 0x120, 0x10A)]
    return {token: i for i, token in enumerate([*characters, *(c + end for c in characters if end)])}


def clip_tokenizer() -> Any:
    vocab = letters("</w>")
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def qwen_tokenizer() -> Any:
    vocab = letters()
    return transformers.Qwen2Tokenizer(vocab=vocab | {"<|endoftext|>": len(vocab)}, merges=[])


def gemma_tokenizer(length: int | None = None) -> Any:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {token: i for i, token in enumerate([*special, "▁", "\n", *(chr(i) for i in range(33, 127))])}
    return transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=length)


def qwen3_encoder(width: int, layers: int = 28) -> Any:
    """28 layers where single ones are looked into, as by Flux 2."""
    config = transformers.Qwen3Config(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=1024,
    )
    return transformers.Qwen3ForCausalLM(config).eval()


def t5_encoder(width: int) -> Any:
    config = transformers.T5Config(
        vocab_size=64, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config).eval()


def umt5_encoder(width: int) -> Any:
    config = transformers.UMT5Config(vocab_size=64, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return transformers.UMT5EncoderModel(config).eval()


def clip_encoder(width: int, *, projected: int = 0, length: int = 77) -> Any:
    size = len(clip_tokenizer())
    config = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projected or 8,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return cls(config).eval()


def gemma_encoder(width: int) -> Any:
    config = transformers.Gemma2Config(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=1024,
    )
    return transformers.Gemma2Model(config).eval()


def llama_encoder(width: int, cls: str = "LlamaModel", layers: int = 3, **more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        pad_token_id=0,
        **more,
    )
    return getattr(transformers, cls)(config).eval()


def glm_encoder(width: int) -> Any:
    config = transformers.GlmConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=1024,
        pad_token_id=0,
    )
    return transformers.GlmModel(config).eval()


def t5gemma_encoder(width: int) -> Any:
    """Saved with the configuration of the whole model, as PRX's is."""
    part = {
        "vocab_size": 128,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 1024,
    }
    config = transformers.T5GemmaConfig(encoder=part, decoder=part, is_encoder_decoder=False)
    encoder = transformers.T5GemmaEncoderModel(config).encoder.eval()

    def save_pretrained(folder: Path, **more: Any) -> None:
        type(encoder).save_pretrained(encoder, folder, **more)
        config.save_pretrained(folder)

    encoder.save_pretrained = save_pretrained
    return encoder


def clip_vision(width: int) -> Any:
    """Pictures of 32 x 32 pixels as 17 tokens."""
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=8,
    )
    return transformers.CLIPVisionModel(config).eval()


def qwen_encoder(width: int) -> Any:
    text = {
        "vocab_size": 128,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


# ---------------------------------------------------------------- latents


def image_vae(channels: int = 4, halvings: int = 2, **more: Any) -> Any:
    """A factor of 4, or of 2 ** halvings."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * (1 + halvings),
        up_block_types=("UpDecoderBlock2D",) * (1 + halvings),
        block_out_channels=(*[4] * halvings, 8),
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=32,
        **more,
    ).eval()


def flux2_vae() -> Any:
    """A factor of 4, and a batch norm over patches of 2 x 2."""
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        latent_channels=2,
        norm_num_groups=2,
        sample_size=32,
    ).eval()
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 8))
    return vae


def wan_vae(cls: str = "AutoencoderKLWan", channels: int = 4) -> Any:
    """A factor of 8, and of 4 in time."""
    return getattr(diffusers, cls)(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=(MEAN * channels)[:channels],
        latents_std=(STD * channels)[:channels],
    ).eval()


def ltx_vae() -> Any:
    """A factor of 32, and of 8 in time: the positions that the network is told depend on them."""
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        down_block_types=("LTXVideoDownBlock3D",) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        scaling_factor=0.8,
    ).eval()
    vae.latents_mean.copy_(torch.tensor(MEAN))
    vae.latents_std.copy_(torch.tensor(STD))
    return vae


def dc_vae() -> Any:
    """A factor of 4."""
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3,
        encoder_block_out_channels=(4, 8, 8),
        decoder_block_out_channels=(4, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    ).eval()


def hunyuan_vae() -> Any:
    """A factor of 8, and of 4 in time."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.48,
        mid_block_add_attention=False,
    ).eval()


def mochi_vae() -> Any:
    """A factor of 8, and of 6 in time."""
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        latent_channels=12,  # which the pipeline knows by heart
        layers_per_block=(1,) * 5,
        add_attention_block=(False,) * 5,
        latents_mean=MEAN * 3,
        latents_std=STD * 3,
    ).eval()


def cosmos_vae() -> Any:
    """A factor of 8, and of 8 in time; a mean and a deviation for each of 3 frames of latents."""
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(4,),
        resolution=32,
        num_layers=1,
        latents_mean=[m + 0.01 * i for m in MEAN for i in range(3)],
        latents_std=[d + 0.1 * i for d in STD for i in range(3)],
    ).eval()


# ---------------------------------------------------------------- pipelines


def without_guardrail(module: str) -> None:
    """For Cosmos' pipelines, which want a package for it."""
    pipeline = importlib.import_module(f"diffusers.pipelines.{module}")
    vars(pipeline)["CosmosSafetyChecker"] = lambda: None


def resize_by_hand() -> None:
    """For Cosmos' network, which calls torchvision."""

    def resize(x: Any, size: list[int], interpolation: Any) -> Any:
        return torch.nn.functional.interpolate(x, size, mode="nearest")

    module = importlib.import_module("diffusers.models.transformers.transformer_cosmos")
    functional, modes = SimpleNamespace(resize=resize), SimpleNamespace(NEAREST="nearest")
    vars(module).setdefault("transforms", SimpleNamespace(functional=functional, InterpolationMode=modes))


def ftfy_by_hand(module: str) -> None:
    """For pipelines that call the package, and import it if it is installed."""
    pipeline = importlib.import_module(f"diffusers.pipelines.{module}")
    vars(pipeline).setdefault("ftfy", SimpleNamespace(fix_text=str))


def network(name: str, **config: Any) -> Any:
    net = getattr(diffusers, name)(**CASES[name].config | config).eval()
    for parameter in net.parameters():  # no gate is closed
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def flow_scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def wan(**config: Any) -> dict[str, Any]:
    plain = {"image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 32, **config}
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": umt5_encoder(10),
        "vae": wan_vae(),
        "scheduler": flow_scheduler(),
        "transformer": network("WanTransformer3DModel", **plain),
    }


def image_to_video(name: str = "WanTransformer3DModel", **config: Any) -> dict[str, Any]:
    """4 channels of noise, 4 of the mask and 4 of the first frame."""
    ftfy_by_hand("wan.pipeline_wan_i2v")
    made = wan() if name.startswith("Wan") else skyreels()
    return made | {
        "transformer": network(name, **{"in_channels": 12, "image_dim": 14, "rope_max_seq_len": 32, **config}),
        "image_encoder": clip_vision(14),
        "image_processor": transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    }


def skyreels_to_video(**config: Any) -> dict[str, Any]:
    ftfy_by_hand("skyreels_v2.pipeline_skyreels_v2_i2v")
    return image_to_video("SkyReelsV2Transformer3DModel", **{"num_frame_per_block": 1, **config})


def flux(**config: Any) -> dict[str, Any]:
    return {
        "scheduler": flow_scheduler(),
        "vae": image_vae(2, scaling_factor=0.36, shift_factor=0.12),
        "text_encoder": clip_encoder(10),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_encoder(12),
        "tokenizer_2": t5_tokenizer(),
        "transformer": network("FluxTransformer2DModel", **config),
    }


def flux2_klein(**config: Any) -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return {
        "scheduler": flow_scheduler(),
        "vae": flux2_vae(),
        "text_encoder": qwen3_encoder(4),
        "tokenizer": tokenizer,
        "transformer": network("Flux2Transformer2DModel", **{"guidance_embeds": False, **config}),
    }


def sd3(**config: Any) -> dict[str, Any]:
    return {
        "scheduler": flow_scheduler(),
        "vae": image_vae(4, scaling_factor=1.5, shift_factor=0.06),
        "text_encoder": clip_encoder(4, projected=4),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_encoder(6, projected=6),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_encoder(12),
        "tokenizer_3": t5_tokenizer(),
        "transformer": network("SD3Transformer2DModel", **config),
    }


def qwen_image(**config: Any) -> dict[str, Any]:
    return {
        "scheduler": flow_scheduler(),
        "vae": wan_vae("AutoencoderKLQwenImage", 2),
        "text_encoder": qwen_encoder(12),
        "tokenizer": qwen_tokenizer(),
        "transformer": network("QwenImageTransformer2DModel", **config),
    }


def ltx(**config: Any) -> dict[str, Any]:
    return {
        "scheduler": flow_scheduler(),
        "vae": ltx_vae(),
        "text_encoder": t5_encoder(12),
        "tokenizer": t5_tokenizer(),
        "transformer": network("LTXVideoTransformer3DModel", **config),
    }


def sana(**config: Any) -> dict[str, Any]:
    return {
        "tokenizer": gemma_tokenizer(),
        "text_encoder": gemma_encoder(12),
        "vae": dc_vae(),
        "transformer": network("SanaTransformer2DModel", **{"guidance_embeds": False, **config}),
        "scheduler": flow_scheduler(),
    }


def pixart(**config: Any) -> dict[str, Any]:
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(12),
        "vae": image_vae(4, scaling_factor=0.18),
        "transformer": network("PixArtTransformer2DModel", **{"use_additional_conditions": False, **config}),
        "scheduler": diffusers.DPMSolverMultistepScheduler(),
    }


def chroma(**config: Any) -> dict[str, Any]:
    return {
        "scheduler": flow_scheduler(),
        "vae": image_vae(2, scaling_factor=0.36, shift_factor=0.12),
        "text_encoder": t5_encoder(12),
        "tokenizer": t5_tokenizer(),
        "transformer": network("ChromaTransformer2DModel", **config),
    }


def aura_flow(**config: Any) -> dict[str, Any]:
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": umt5_encoder(12),
        "vae": image_vae(4, scaling_factor=0.13),
        "transformer": network("AuraFlowTransformer2DModel", **{"pos_embed_max_size": 256, **config}),
        "scheduler": flow_scheduler(),
    }


def lumina2(**config: Any) -> dict[str, Any]:
    return {
        "transformer": network("Lumina2Transformer2DModel", **{"axes_lens": (512, 16, 16), **config}),
        "scheduler": flow_scheduler(),
        "vae": image_vae(4, halvings=3, scaling_factor=0.36, shift_factor=0.12),
        "text_encoder": gemma_encoder(12),
        "tokenizer": gemma_tokenizer(),
    }


def hunyuan_video(**config: Any) -> dict[str, Any]:
    template = importlib.import_module(
        "diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video"
    ).DEFAULT_PROMPT_TEMPLATE
    return {
        "text_encoder": llama_encoder(12),
        "tokenizer": t5_tokenizer(template["template"]),
        "transformer": network("HunyuanVideoTransformer3DModel", **config),
        "vae": hunyuan_vae(),
        "scheduler": flow_scheduler(),
        "text_encoder_2": clip_encoder(10),
        "tokenizer_2": clip_tokenizer(),
    }


def mochi(**config: Any) -> dict[str, Any]:
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        "vae": mochi_vae(),
        "text_encoder": t5_encoder(16),
        "tokenizer": t5_tokenizer(),
        "transformer": network("MochiTransformer3DModel", **{"in_channels": 12, **config}),
    }


def sana_video(**config: Any) -> dict[str, Any]:
    return {
        "tokenizer": gemma_tokenizer(),
        "text_encoder": gemma_encoder(12),
        "vae": wan_vae(),
        "transformer": network("SanaVideoTransformer3DModel", **{"guidance_embeds": False, **config}),
        "scheduler": flow_scheduler(),
    }


def skyreels(**config: Any) -> dict[str, Any]:
    plain = {"image_dim": None, "added_kv_proj_dim": None, "num_frame_per_block": 1, **config}
    ftfy_by_hand("skyreels_v2.pipeline_skyreels_v2")
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": umt5_encoder(10),
        "transformer": network("SkyReelsV2Transformer3DModel", **plain),
        "vae": wan_vae(),
        "scheduler": flow_scheduler(),
    }


def z_image(**config: Any) -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    return {
        "scheduler": flow_scheduler(),
        "vae": image_vae(4, scaling_factor=0.36, shift_factor=0.12),
        "text_encoder": qwen3_encoder(12, layers=2),
        "tokenizer": tokenizer,
        "transformer": network("ZImageTransformer2DModel", **{"axes_lens": [600, 16, 16], **config}),
    }


def cogview4(**config: Any) -> dict[str, Any]:
    dynamic = {"base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": glm_encoder(12),
        "vae": image_vae(4, scaling_factor=0.8),
        "transformer": network("CogView4Transformer2DModel", **config),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **dynamic),
    }


def cosmos2(**config: Any) -> dict[str, Any]:
    resize_by_hand()
    for module in ("pipeline_cosmos2_text2image", "pipeline_cosmos_text2world"):
        without_guardrail(f"cosmos.{module}")
    plain = {"extra_pos_embed_type": None, "concat_padding_mask": True, "max_size": (4, 32, 32), **config}
    return {
        "text_encoder": t5_encoder(10),
        "tokenizer": t5_tokenizer(),
        "transformer": network("CosmosTransformer3DModel", **plain),
        "vae": wan_vae(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    }


def cosmos1(**config: Any) -> dict[str, Any]:
    return cosmos2(**{"extra_pos_embed_type": "learnable", **config}) | {
        "vae": cosmos_vae(),
        "scheduler": diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
        ),
    }


def hidream(**config: Any) -> dict[str, Any]:
    tokenizer = gemma_tokenizer()
    return {
        "scheduler": flow_scheduler(),
        "vae": image_vae(4, scaling_factor=0.36, shift_factor=0.12),
        "text_encoder": clip_encoder(6, projected=6, length=128),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_encoder(8, projected=8, length=128),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_encoder(12),
        "tokenizer_3": t5_tokenizer(),
        "text_encoder_4": llama_encoder(10, "LlamaForCausalLM", layers=2, head_dim=4),
        "tokenizer_4": tokenizer,
        "transformer": network("HiDreamImageTransformer2DModel", **{"max_resolution": (16, 16), **config}),
    }


def prx(**config: Any) -> dict[str, Any]:
    ftfy_by_hand("prx.pipeline_prx")
    return {
        "transformer": network("PRXTransformer2DModel", **config),
        "scheduler": flow_scheduler(),
        "text_encoder": t5gemma_encoder(12),
        "tokenizer": gemma_tokenizer(length=32),
        "vae": image_vae(4, scaling_factor=0.36, shift_factor=0.12),
        "default_sample_size": 32,
    }


def dit(**config: Any) -> dict[str, Any]:
    """Its pictures have 32 x 32 pixels."""
    return {
        "transformer": network("DiTTransformer2DModel", **{"num_embeds_ada_norm": 1000, "sample_size": 8, **config}),
        "vae": image_vae(4, scaling_factor=0.18),
        "scheduler": diffusers.DDIMScheduler(),
    }


MAKERS = {
    "WanPipeline": wan,
    "FluxPipeline": flux,
    "Flux2KleinPipeline": flux2_klein,
    "StableDiffusion3Pipeline": sd3,
    "QwenImagePipeline": qwen_image,
    "LTXPipeline": ltx,
    "SanaPipeline": sana,
    "PixArtAlphaPipeline": pixart,
    "ChromaPipeline": chroma,
    "AuraFlowPipeline": aura_flow,
    "Lumina2Pipeline": lumina2,
    "HunyuanVideoPipeline": hunyuan_video,
    "MochiPipeline": mochi,
    "SanaVideoPipeline": sana_video,
    "SkyReelsV2Pipeline": skyreels,
    "WanImageToVideoPipeline": image_to_video,
    "SkyReelsV2ImageToVideoPipeline": skyreels_to_video,
    "ZImagePipeline": z_image,
    "CogView4Pipeline": cogview4,
    "Cosmos2TextToImagePipeline": cosmos2,
    "CosmosTextToWorldPipeline": cosmos1,
    "HiDreamImagePipeline": hidream,
    "PRXPipeline": prx,
    "DiTPipeline": dit,
}
