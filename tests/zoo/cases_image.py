"""Image transformers. B batch, H and W latent height and width, L text tokens."""

import torch

from .base import Draw, case, padding, pick


@case(
    "dit",
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=8,
    num_embeds_ada_norm=10,
    norm_num_groups=4,
)
def DiTTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H = pick(variant, (2, 8), (3, 4))
    return {
        "hidden_states": draw.normal(B, 4, H, H),
        "timestep": draw.time(B),
        "class_labels": draw.ints(9, B),
    }


@case(
    "pixart",
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=24,
    sample_size=8,
    caption_channels=12,
    use_additional_conditions=True,
)
def PixArtTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 8, 8, 5), (3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "timestep": draw.time(B),
        "added_cond_kwargs": {"resolution": draw.time(B, 2), "aspect_ratio": draw.time(B, 1, high=2.0)},
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))).double(),
    }


@case(
    "sana",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=12,
    sample_size=8,
    interpolation_scale=1.0,
    guidance_embeds=True,
    qk_norm="rms_norm_across_heads",
    note="linear self-attention: matmuls and a division, no softmax",
)
def SanaTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 8, 8, 5), (3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "timestep": draw.time(B),
        "guidance": draw.time(B, high=5.0),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))).double(),
    }


@case(
    "sd3",
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=10,
    pos_embed_max_size=8,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
def SD3Transformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 8, 8, 5), (3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "pooled_projections": draw.normal(B, 10),
        "timestep": draw.time(B),
    }


@case(
    "auraflow",
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_mmdit_layers=1,
    num_single_dit_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pos_embed_max_size=64,
)
def AuraFlowTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 8, 8, 5), (3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "timestep": draw.time(B, high=1.0),
    }


@case(
    "lumina",
    sample_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=24,
    num_layers=1,
    num_refiner_layers=1,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=4,
    axes_dim_rope=(2, 2, 2),
    axes_lens=(32, 16, 16),
    cap_feat_dim=12,
    note="caption lengths go through .tolist(): data-dependent Python",
)
def Lumina2Transformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 8, 8, 5), (3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "timestep": draw.time(B, high=1.0),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
    }


@case(
    "hidream",
    tangents=("hidden_states", "timesteps"),
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    caption_channels=[12, 10],
    text_emb_dim=14,
    num_routed_experts=4,
    num_activated_experts=2,
    axes_dims_rope=(4, 2, 2),
    max_resolution=(8, 8),
    llama_layers=[0, 1],
    note="mixture of experts: tokens are sorted and split by expert in Python, in eval mode under no_grad",
)
def HiDreamImageTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, L = pick(variant, (2, 8, 5), (3, 4, 7))
    return {
        "hidden_states": draw.normal(B, 4, H, H),
        "timesteps": draw.time(B),
        "encoder_hidden_states_t5": draw.normal(B, L, 12),
        "encoder_hidden_states_llama3": draw.normal(2, B, L, 10),
        "pooled_embeds": draw.normal(B, 14),
    }


@case(
    "omnigen",
    in_channels=4,
    patch_size=2,
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=24,
    num_layers=2,
    pad_token_id=0,
    vocab_size=20,
    max_position_embeddings=64,
    original_max_position_embeddings=24,
    rope_scaling={"short_factor": [1.0, 1.1], "long_factor": [1.5, 2.0]},
    pos_embed_max_size=8,
    time_step_dim=8,
    note="the rotary factors are chosen by a comparison of tensors, and the buffer inv_freq is reassigned",
)
def OmniGenTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 8, 8, 9), (2, 4, 6, 12))
    image_tokens = 4  # of a 4 x 4 condition image, in place of text tokens 2:6 of the first sample
    N = L + 1 + H * W // 4
    mask = torch.ones(B, N, N, dtype=torch.float64).tril()
    mask[:, L:, L:] = 1.0
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "timestep": draw.time(B, high=1.0),
        "input_ids": draw.ints(20, B, L),
        "input_img_latents": [draw.normal(1, 4, 4, 4)],
        "input_image_sizes": {0: [[2, 2 + image_tokens]]},
        "attention_mask": mask,
        "position_ids": torch.arange(N).repeat(B, 1),
    }


@case(
    "lumina",
    sample_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=4,
    cross_attention_dim=12,
    note="grouped-query attention, complex rotary factors",
)
def LuminaNextDiT2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 8, 8, 5), (3, 4, 6, 7))
    angles = draw.normal(8, 8, 4)
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "timestep": draw.time(B, high=1.0),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


@case(
    "zimage",
    tangents=("x.0", "x.1", "t"),
    all_patch_size=(2,),
    all_f_patch_size=(1,),
    in_channels=4,
    dim=24,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=12,
    axes_dims=[4, 4, 4],
    axes_lens=[96, 8, 8],
    note="latents and captions are lists of unequal length, padded to a multiple of 32",
)
def ZImageTransformer2DModel(draw: Draw, variant: int) -> dict:
    sizes, lengths = pick(variant, ([(8, 8), (4, 6)], (5, 3)), ([(4, 4), (4, 8)], (7, 34)))
    return {
        "x": [draw.normal(4, 1, H, W) for H, W in sizes],
        "t": draw.time(2, high=1.0),
        "cap_feats": [draw.normal(L, 12) for L in lengths],
    }


@case(
    "hunyuandit",
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    patch_size=2,
    sample_size=8,
    hidden_size=16,
    num_layers=4,
    mlp_ratio=2.0,
    cross_attention_dim=12,
    cross_attention_dim_t5=8,
    pooled_projection_dim=10,
    text_len=3,
    text_len_t5=4,
    note="long skips between the blocks",
)
def HunyuanDiT2DModel(draw: Draw, variant: int) -> dict:
    B, H, W = pick(variant, (2, 8, 8), (3, 4, 6))
    angles = draw.normal(H * W // 4, 4).repeat_interleave(2, dim=1)
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, 3, 12),
        "text_embedding_mask": padding(3, *pick(variant, (3, 2), (3, 1, 2))),
        "encoder_hidden_states_t5": draw.normal(B, 4, 8),
        "text_embedding_mask_t5": padding(4, *pick(variant, (4, 2), (1, 4, 3))),
        "image_meta_size": draw.time(B, 6),
        "style": torch.zeros(B, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


@case(
    "hunyuan",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    mlp_ratio=2.0,
    patch_size=(2, 2),
    guidance_embeds=True,
    text_embed_dim=12,
    text_embed_2_dim=10,
    rope_axes_dim=(4, 4),
    use_meanflow=True,
    tangents=("hidden_states", "timestep", "timestep_r"),
    note="a MeanFlow model: two times; boolean indexing sorts text before padding: data-dependent shapes",
)
def HunyuanImageTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 8, 8, 5), (3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "timestep_r": draw.time(B),
        "encoder_hidden_states_2": draw.normal(B, 3, 10),
        "encoder_attention_mask_2": padding(3, *pick(variant, (2, 3), (1, 3, 2))),
        "guidance": draw.time(B, high=6000.0),
    }


def sized_inputs(draw: Draw, variant: int) -> dict:
    """Latents, text, and the sizes that the CogView family is conditioned on."""
    B, H, W, L = pick(variant, (2, 8, 8, 5), (3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "timestep": draw.time(B),
        "target_size": draw.time(B, 2),
        "crop_coords": draw.time(B, 2),
    }


@case(
    "cogview",
    patch_size=2,
    in_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    out_channels=4,
    text_embed_dim=12,
    time_embed_dim=10,
    condition_dim=4,
    pos_embed_max_size=8,
    sample_size=8,
)
def CogView3PlusTransformer2DModel(draw: Draw, variant: int) -> dict:
    inputs = sized_inputs(draw, variant)
    return inputs | {"original_size": draw.time(*inputs["target_size"].shape)}


@case(
    "cogview",
    patch_size=2,
    in_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    out_channels=4,
    text_embed_dim=12,
    time_embed_dim=10,
    condition_dim=4,
    sample_size=8,
    rope_axes_dim=(8, 8),
)
def CogView4Transformer2DModel(draw: Draw, variant: int) -> dict:
    inputs = sized_inputs(draw, variant)
    B, L, _ = inputs["encoder_hidden_states"].shape
    return inputs | {
        "original_size": draw.time(B, 2),
        "attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))).double(),
    }


@case(
    "cogview",
    patch_size=2,
    in_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    out_channels=4,
    text_embed_dim=12,
    time_embed_dim=10,
    condition_dim=4,
    prior_vq_quantizer_codebook_size=9,
    note="writes zeros into a lookup's output under a boolean index",
)
def GlmImageTransformer2DModel(draw: Draw, variant: int) -> dict:
    inputs = sized_inputs(draw, variant)
    B, _, H, W = inputs["hidden_states"].shape
    prior = draw.ints(9, B, H * W // 4)
    return inputs | {"prior_token_id": prior, "prior_token_drop": draw.ints(2, *prior.shape).bool()}


@case(
    "prx",
    in_channels=4,
    patch_size=2,
    context_in_dim=12,
    hidden_size=16,
    mlp_ratio=2.0,
    num_heads=2,
    depth=2,
    axes_dim=[4, 4],
    bottleneck_size=8,
    resolution_embeds=True,
)
def PRXTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 8, 8, 5), (3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, H, W),
        "timestep": draw.time(B, high=1.0),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
    }
