"""Whole pipelines of diffusers with tiny random weights: transformer, VAE, text encoders and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789.,:"]


def tokenizer() -> Any:
    """A letter is a token."""
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, model_max_length=77, **special)


def t5(cls: Any = transformers.T5EncoderModel, width: int = 32) -> Any:
    config = cls.config_class(vocab_size=64, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0)
    return cls(config).eval()


def clip(cls: Any) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return cls(config).eval()


def image_vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


def scheduler(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **more)


def wan() -> Any:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return diffusers.WanPipeline(tokenizer(), t5(transformers.UMT5EncoderModel), vae, scheduler(), transformer)


def flux(**more: Any) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        **more,
    )
    text = clip(transformers.CLIPTextModel), tokenizer(), t5(), tokenizer()
    return diffusers.FluxPipeline(scheduler(use_dynamic_shifting=True), image_vae(1), *text, transformer)


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    cls = transformers.CLIPTextModelWithProjection
    text = clip(cls), tokenizer(), clip(cls), tokenizer(), t5(), tokenizer()
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler(), image_vae(4), *text)


def qwen_image() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    size = {"hidden_size": 16, "intermediate_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **size,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "pad_token_id": 0,
        },
        vision_config={**size, "depth": 2, "num_heads": 2, "out_hidden_size": 16},
    )
    text = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    return diffusers.QwenImagePipeline(scheduler(use_dynamic_shifting=True), vae, text, tokenizer(), transformer)


def ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        patch_size=4,
    )
    return diffusers.LTXPipeline(scheduler(use_dynamic_shifting=True), vae, t5(), tokenizer(), transformer)


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
    )
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        head_dim=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return diffusers.SanaPipeline(
        tokenizer(), transformers.Gemma2Model(config).eval(), vae, transformer, diffusers.DPMSolverMultistepScheduler()
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "wan": wan,
    "flux": flux,
    "sd3": sd3,
    "qwen_image": qwen_image,
    "ltx": ltx,
    "sana": sana,
}

# what a call needs besides a prompt, so that it is quick; guidance is in the student
ARGUMENTS: dict[str, dict[str, Any]] = {
    "wan": {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 16},
    "flux": {"height": 16, "width": 16, "max_sequence_length": 16},
    "sd3": {"height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": 16},
    "qwen_image": {"height": 16, "width": 16, "true_cfg_scale": 1.0},
    "ltx": {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 1.0, "max_sequence_length": 16},
    "sana": {
        "height": 32,
        "width": 32,
        "guidance_scale": 1.0,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
        "max_sequence_length": 16,
    },
}


def make(name: str) -> Any:
    """A pipeline with weights that depend on nothing but its name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
