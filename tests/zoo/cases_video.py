"""Video transformers. B batch, T, H and W latent frames, height and width, L text tokens."""

from .base import Draw, case, padding, pick


@case("wan", patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
      out_channels=4, text_dim=10, freq_dim=8, ffn_dim=16, num_layers=2, rope_max_seq_len=16, image_dim=14,
      added_kv_proj_dim=24, pos_embed_seq_len=None)
def WanTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "encoder_hidden_states_image": draw.normal(B, 257, 14),
    }


@case("ltx", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
      cross_attention_dim=16, caption_channels=12)
def LTXVideoTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 2, 3, 7))
    return {
        "hidden_states": draw.normal(B, T * H * W, 4),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "timestep": draw.time(B),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))).double(),
        "num_frames": T,
        "height": H,
        "width": W,
    }


@case("hunyuan", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
      num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, guidance_embeds=True,
      text_embed_dim=12, pooled_projection_dim=10, rope_axes_dim=(2, 4, 2))
def HunyuanVideoTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "pooled_projections": draw.normal(B, 10),
        "guidance": draw.time(B, high=6000.0),
    }


@case("cosmos", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
      mlp_ratio=2.0, text_embed_dim=10, adaln_lora_dim=4, max_size=(4, 8, 8), patch_size=(1, 2, 2),
      extra_pos_embed_type=None, concat_padding_mask=False,
      note="left out: learnable positions refuse float64, and concat_padding_mask needs torchvision")
def CosmosTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "fps": 16,
    }


@case("cogvideox", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
      time_embed_dim=8, ofs_embed_dim=8, text_embed_dim=10, num_layers=2, sample_width=8, sample_height=8, sample_frames=9,
      patch_size=2, patch_size_t=2, max_text_seq_length=5, use_rotary_positional_embeddings=True)
def CogVideoXTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 4, 4, 6, 7))
    angles = draw.normal(T // 2 * H // 2 * W // 2, 8).repeat_interleave(2, dim=1)
    return {
        "hidden_states": draw.normal(B, T, 4, H, W),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "timestep": draw.time(B),
        "ofs": draw.time(1, high=2.0),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


@case("mochi", patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=4,
      pooled_projection_dim=10, text_embed_dim=16, time_embed_dim=8)
def MochiTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "encoder_hidden_states": draw.normal(B, L, 16),
        "timestep": draw.time(B),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
    }
