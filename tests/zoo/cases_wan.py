"""Wan and the video transformers built from its block. Letters as in cases_video."""

import sys
from unittest import mock

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from .base import Draw, case, model_class, pick

SHAPES = (2, 2, 4, 4, 5), (3, 3, 4, 6, 7)
WAN_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 2,
}
IMAGE_CONFIG = {"image_dim": 14, "added_kv_proj_dim": 24, "rope_max_seq_len": 16}


def wan_inputs(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, *SHAPES)
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 10),
    }


@case("wan", **WAN_CONFIG, **IMAGE_CONFIG)
def WanTransformer3DModel(draw: Draw, variant: int) -> dict:
    inputs = wan_inputs(draw, variant)
    B, _, T, H, W = inputs["hidden_states"].shape
    per_token = variant == 1  # Wan 2.2 gives every token its own time
    return inputs | {
        "timestep": draw.time(B, T * H * W // 4) if per_token else draw.time(B),
        "encoder_hidden_states_image": draw.normal(B, 257, 14),
    }


@case(
    "wan",
    **WAN_CONFIG,
    **IMAGE_CONFIG,
    rope_temporal_skip_len=4,
    note="with two frames the second one is placed rope_temporal_skip_len later",
)
def ChronoEditTransformer3DModel(draw: Draw, variant: int) -> dict:
    inputs = wan_inputs(draw, variant)
    return inputs | {"encoder_hidden_states_image": draw.normal(inputs["hidden_states"].shape[0], 257, 14)}


@case(
    "wan",
    tangents=("hidden_states", "timestep", "r_timestep"),
    **WAN_CONFIG,
    rope_max_seq_len=16,
    note="a flow map: two times, both per frame",
)
def AnyFlowTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, *SHAPES)
    return {
        "hidden_states": draw.normal(B, T, 4, H, W),
        "timestep": draw.time(B, T),
        "r_timestep": draw.time(B, T),
        "encoder_hidden_states": draw.normal(B, L, 10),
    }


@case(
    "wan",
    tangents=("hidden_states", "timestep", "r_timestep"),
    **WAN_CONFIG,
    rope_max_seq_len=16,
    compressed_patch_size=(1, 4, 4),
    full_chunk_limit=2,
    note="flex attention with a block mask built in Python; far chunks are compressed",
)
def AnyFlowFARTransformer3DModel(draw: Draw, variant: int) -> dict:
    chunks = pick(variant, [1, 1, 2], [1, 2, 1])
    B, L = pick(variant, (2, 5), (1, 7))
    T = sum(chunks)
    return {
        "hidden_states": draw.normal(B, T, 4, 8, 8),
        "timestep": draw.time(B, T),
        "r_timestep": draw.time(B, T),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "chunk_partition": chunks,
    }


@case(
    "wan",
    **WAN_CONFIG,
    rope_dim=(4, 4, 4),
    is_amplify_history=True,
    history_scale_mode="per_head",
    note="history frames at three resolutions, which see time zero",
)
def HeliosTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 8, 8, 5), (3, 3, 8, 16, 7))
    frames = torch.arange(T + 8).repeat(B, 1)
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "indices_hidden_states": frames[:, 8:],
        "indices_latents_history_short": frames[:, 6:8],
        "indices_latents_history_mid": frames[:, 4:6],
        "indices_latents_history_long": frames[:, :4],
        "latents_history_short": draw.normal(B, 4, 2, H, W),
        "latents_history_mid": draw.normal(B, 4, 2, H, W),
        "latents_history_long": draw.normal(B, 4, 4, H, W),
    }


@case(
    "wan",
    **WAN_CONFIG,
    rope_max_seq_len=16,
    vace_layers=[0, 1],
    vace_in_channels=6,
    note="a second stack of blocks for the control video",
)
def WanVACETransformer3DModel(draw: Draw, variant: int) -> dict:
    inputs = wan_inputs(draw, variant)
    B, _, T, H, W = inputs["hidden_states"].shape
    return inputs | {"control_hidden_states": draw.normal(B, 6, T, H, W)}


@case(
    "wan",
    **WAN_CONFIG,
    **IMAGE_CONFIG,
    num_frame_per_block=2,
    note="a causal mask over blocks of frames; diffusion forcing gives every frame its own time",
)
def SkyReelsV2Transformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 4, 4, 6, 7))
    forcing = variant == 1
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.time(B, T) if forcing else draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "encoder_hidden_states_image": draw.normal(B, 257, 14),
        "enable_diffusion_forcing": forcing,
    }


@case(
    "wan",
    **{**WAN_CONFIG, "in_channels": 12},
    **IMAGE_CONFIG,
    latent_channels=4,
    motion_encoder_size=8,
    motion_encoder_channel_sizes={"4": 4, "8": 4},
    motion_style_dim=6,
    motion_dim=3,
    motion_encoder_dim=6,
    face_encoder_hidden_dim=8,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=1,
    note="adds the pose into a slice in place; a QR decomposition on the inactive face branch",
)
def WanAnimateTransformer3DModel(draw: Draw, variant: int) -> dict:
    inputs = wan_inputs(draw, variant)
    B, _, T, H, W = inputs["hidden_states"].shape
    return inputs | {
        "hidden_states": draw.normal(B, 12, T, H, W),
        "encoder_hidden_states_image": draw.normal(B, 257, 14),
        "pose_hidden_states": draw.normal(B, 4, T - 1, H, W),
        "face_pixel_values": draw.normal(B, 3, 4 * (T - 1), 8, 8),
    }


ANIMATE_SHAPES = (2, 4, 4, 5), (3, 4, 6, 7)


def fill_mask_cache(model: nn.Module) -> None:
    """Make the block masks uncompiled: the model itself would start Inductor on its first call."""
    module = sys.modules[type(model).__module__]
    uncompiled = lambda *args, _compile, **kwargs: create_block_mask(*args, **kwargs)  # noqa: E731
    with mock.patch.object(module, "create_block_mask", uncompiled):
        for T, H, W, _ in ANIMATE_SHAPES:
            frames, tokens = T, H // 2 * W // 2
            model.block_masks[frames, tokens] = model.create_mask(frames, tokens, torch.device("cpu"))


@case(
    "wan",
    tangents=("hidden_states.0", "timestep"),
    prepare=fill_mask_cache,
    text_len=8,
    in_dim=8,
    dim=24,
    ffn_dim=16,
    freq_dim=8,
    text_dim=10,
    out_dim=4,
    num_heads=2,
    num_layers=2,
    note="lists of latents; flex attention over cached reference keys and values; output in float32",
)
def WanAnimate2Transformer3DModel(draw: Draw, variant: int) -> dict:
    T, H, W, L = pick(variant, *ANIMATE_SHAPES)
    N = T * H // 2 * W // 2
    cache = model_class("WanAnimate2KVCache")(2)
    for layer in range(2):
        cache.get(layer).store(draw.normal(1, N, 2, 12), draw.normal(1, N, 2, 12))
    return {
        "hidden_states": [draw.normal(4, T, H, W)],
        "timestep": draw.time(1),
        "encoder_hidden_states": [draw.normal(L, 10)],
        "condition_latents": [draw.normal(4, T, H, W)],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": N,
        "encoder_hidden_states_image": draw.normal(1, 3, 1280),
        "reference_grid_sizes": torch.tensor([[T, H // 2, W // 2]]),
        "origin_len": 4 * (T - 1),
        "origin_area": [8 * H, 8 * W],
    }
