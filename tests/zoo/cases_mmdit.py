"""Image transformers with joint text and image streams. N image tokens, else as in cases_image."""

import torch

from .base import Draw, case, grid_ids, padding, pick

FLUX_SHAPES = (2, 4, 4, 5), (3, 2, 3, 7)
FLUX_CONFIG = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 4, 4),
}


def flux_inputs(draw: Draw, variant: int, axes: int = 3, **more: torch.Tensor) -> dict:
    """Packed latents, text and their position ids; the time runs from 0 to 1."""
    B, H, W, L = pick(variant, *FLUX_SHAPES)
    return {
        "hidden_states": draw.normal(B, H * W, 8),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "timestep": draw.time(B, high=1.0),
        "img_ids": torch.nn.functional.pad(grid_ids(H, W), (0, axes - 3)),
        "txt_ids": torch.zeros(L, axes, dtype=torch.float64),
    }


@case("flux", **FLUX_CONFIG, pooled_projection_dim=10, guidance_embeds=True)
def FluxTransformer2DModel(draw: Draw, variant: int) -> dict:
    inputs = flux_inputs(draw, variant)
    B = inputs["hidden_states"].shape[0]
    return inputs | {"pooled_projections": draw.normal(B, 10), "guidance": draw.time(B, high=5.0)}


@case("flux", **FLUX_CONFIG | {"axes_dims_rope": (4, 4, 2, 2)}, timestep_guidance_channels=8, mlp_ratio=2.0)
def Flux2Transformer2DModel(draw: Draw, variant: int) -> dict:
    inputs = flux_inputs(draw, variant, axes=4)
    return inputs | {"guidance": draw.time(inputs["hidden_states"].shape[0], high=5.0)}


@case(
    "flux",
    tangents=("hidden_states", "timestep", "target_timestep"),
    cond_in_channels=6,
    **FLUX_CONFIG | {"axes_dims_rope": (4, 4, 2, 2)},
    timestep_channels=8,
    mlp_ratio=2.0,
    flow_map=True,
    note="a flow map: conditioned on two times, both with a tangent",
)
def Flux3Transformer2DModel(draw: Draw, variant: int) -> dict:
    inputs = flux_inputs(draw, variant, axes=4)
    B = inputs["hidden_states"].shape[0]
    return inputs | {
        "image_cond_hidden_states": draw.normal(B, 4, 6),
        "image_cond_ids": torch.nn.functional.pad(grid_ids(2, 2), (1, 0)),
        "target_timestep": draw.time(B, high=1.0),
    }


@case(
    "flux",
    **FLUX_CONFIG,
    approximator_num_channels=16,
    approximator_hidden_dim=16,
    approximator_layers=2,
    note="the mask is an outer product, so rows of padding are fully masked",
)
def ChromaTransformer2DModel(draw: Draw, variant: int) -> dict:
    inputs = flux_inputs(draw, variant)
    _, N, _ = inputs["hidden_states"].shape
    L = inputs["encoder_hidden_states"].shape[1]
    mask = padding(L, *pick(variant, (5, 3), (7, 2, 5)))
    return inputs | {"attention_mask": torch.nn.functional.pad(mask, (0, N), value=True)}


@case("flux", **FLUX_CONFIG, note="`if guidance:` asks a tensor for its truth, so guidance is left out")
def BriaTransformer2DModel(draw: Draw, variant: int) -> dict:
    inputs = flux_inputs(draw, variant)
    return inputs | {"timestep": 1000 * inputs["timestep"]}


@case("flux", **FLUX_CONFIG, guidance_embeds=True, text_encoder_dim=10)
def BriaFiboTransformer2DModel(draw: Draw, variant: int) -> dict:
    inputs = flux_inputs(draw, variant)
    B, L, _ = inputs["encoder_hidden_states"].shape
    return inputs | {
        "timestep": 1000 * inputs["timestep"],
        "text_encoder_layers": [draw.normal(B, L, 10) for _ in range(2)],
        "guidance": draw.time(B, high=5.0),
    }


@case(
    "flux",
    in_channels=4,
    patch_size=2,
    dim=24,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    cap_feat_dim=12,
    injection_layer_ids=(1,),
    perceiver_num_layers=1,
    min_num_gist_tokens=2,
    max_num_gist_tokens=6,
    gist_step=2,
    gist_min_text_len=2,
    gist_max_text_len=8,
    axes_dims=(4, 4, 4),
    axes_lens=(16, 16, 16),
    note="gist counts are computed from text lengths by .tolist(): data-dependent Python",
)
def BriaFibo2Transformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 8, 8, 5), (3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "timestep": draw.time(B, high=1.0),
        "encoder_hidden_states": draw.normal(B, 2, L, 12),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "context_latents": [draw.normal(B, 4, 4, 4)],
    }


@case("flux", **FLUX_CONFIG, out_channels=8)
def OvisImageTransformer2DModel(draw: Draw, variant: int) -> dict:
    return flux_inputs(draw, variant)


@case("flux", **FLUX_CONFIG, pooled_projection_dim=12)
def LongCatImageTransformer2DModel(draw: Draw, variant: int) -> dict:
    return flux_inputs(draw, variant)


@case(
    "krea",
    in_channels=8,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    timestep_embed_dim=8,
    text_hidden_dim=16,
    num_text_layers=3,
    text_num_attention_heads=2,
    text_num_key_value_heads=1,
    text_intermediate_size=24,
    num_layerwise_text_blocks=1,
    num_refiner_text_blocks=1,
    axes_dims_rope=(4, 4, 4),
    note="grouped-query attention",
)
def Krea2Transformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, *FLUX_SHAPES)
    return {
        "hidden_states": draw.normal(B, H * W, 8),
        "encoder_hidden_states": draw.normal(B, L, 3, 16),
        "timestep": draw.time(B, high=1.0),
        "position_ids": torch.cat([torch.zeros(L, 3, dtype=torch.float64), grid_ids(H, W)]),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
    }


@case(
    "qwen",
    patch_size=2,
    in_channels=8,
    out_channels=2,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=12,
    axes_dims_rope=(4, 4, 4),
)
def QwenImageTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, *FLUX_SHAPES)
    return {
        "hidden_states": draw.normal(B, H * W, 8),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_hidden_states_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "timestep": draw.time(B, high=1.0),
        "img_shapes": [[(1, H, W)]] * B,
    }


@case(
    "ernie",
    hidden_size=24,
    num_attention_heads=2,
    num_layers=2,
    ffn_hidden_size=32,
    in_channels=4,
    out_channels=4,
    patch_size=2,
    text_in_dim=12,
    rope_axes_dim=(4, 4, 4),
    note="activations are laid out (sequence, batch, width)",
)
def ErnieImageTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 8, 8, 5), (3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "timestep": draw.time(B),
        "text_bth": draw.normal(B, L, 12),
        "text_lens": torch.tensor(pick(variant, (5, 3), (7, 2, 5))),
    }


@case(
    "ideogram",
    in_channels=8,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=2,
    intermediate_size=24,
    adaln_dim=8,
    llm_features_dim=10,
    mrope_section=(2, 2, 2),
    note="one packed sequence with per-token roles and a block-diagonal boolean mask; time times 1e4",
)
def Ideogram4Transformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, *FLUX_SHAPES)
    N = L + H * W
    padded, text, image = -1, 3, 2  # the roles of a token
    roles = torch.tensor([text] * L + [image] * (H * W)).repeat(B, 1)
    roles[1, 0] = padded
    grid = torch.cat([torch.arange(L).double()[:, None].expand(L, 3), L + grid_ids(H, W)])
    return {
        "hidden_states": draw.normal(B, N, 8),
        "timestep": draw.time(B, high=1.0),
        "encoder_hidden_states": draw.normal(B, N, 10),
        "position_ids": grid.long().repeat(B, 1, 1),
        "segment_ids": (roles != padded).long(),
        "indicator": roles,
    }


@case(
    "qwen",
    patch_size=1,
    in_channels=8,
    out_channels=8,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=2,
    context_in_dim=12,
    mlp_ratio=2,
    axes_dims_rope=(4, 4, 4),
    note="block-causal attention, one call per text or image segment; segments come from .tolist()",
)
def QwenImage21Transformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 4, 4, 6), (3, 2, 4, 7))
    is_image = torch.arange(L + H * W // 4) >= L
    is_image[2] = True  # the slot of a 2 x 2 condition image, amid the text
    return {
        "hidden_states": draw.normal(B, 4 + H * W, 8),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "timestep": draw.time(B, high=1.0),
        "img_shapes": [[(1, 2, 2), (1, H, W)]] * B,
        "img_mask": is_image.repeat(B, 1),
        "encoder_hidden_states_mask": padding(L, *pick(variant, (6, 4), (7, 4, 5))),
    }


@case(
    "nucleus",
    patch_size=2,
    in_channels=8,
    out_channels=2,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    joint_attention_dim=12,
    axes_dims_rope=(4, 4, 4),
    mlp_ratio=4.0,
    dense_moe_strategy="leave_first_block_dense",
    num_experts=4,
    moe_intermediate_dim=10,
    capacity_factors=2.0,
    note="mixture of experts, grouped-query attention; expert sizes come from .tolist()",
)
def NucleusMoEImageTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, *FLUX_SHAPES)
    return {
        "hidden_states": draw.normal(B, H * W, 8),
        "img_shapes": [(1, H, W)] * B,
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_hidden_states_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "timestep": draw.time(B, high=1.0),
    }


JOY_CONFIG = {
    "in_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "text_dim": 12,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [4, 4, 4],
}


@case("joyimage", **JOY_CONFIG, note="six dims: batch, images, channels, frames, height, width")
def JoyImageEditTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, K, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, K, 4, 1, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 12),
    }


@case("joyimage", **JOY_CONFIG)
def JoyImageEditPlusTransformer3DModel(draw: Draw, variant: int) -> dict:
    shapes = pick(variant, [[(1, 2, 2)], [(1, 2, 2), (1, 2, 1)]], [[(1, 2, 3)], [(1, 1, 2)], [(1, 2, 4)]])
    B, N, L = pick(variant, (2, 6, 5), (3, 8, 7))
    return {
        "hidden_states": draw.normal(B, N, 4, 1, 2, 2),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_hidden_states_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))).double(),
        "shape_list": shapes,
    }
