"""Video transformers. B batch, T, H and W latent frames, height and width, L text tokens."""

import torch

from .base import Draw, case, padding, pick


@case(
    "ltx",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    cross_attention_dim=16,
    caption_channels=12,
    tolerance=1e-3,
)
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
    guidance_embeds=True,
    text_embed_dim=12,
    pooled_projection_dim=10,
    rope_axes_dim=(2, 4, 2),
)
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


@case(
    "cosmos",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    mlp_ratio=2.0,
    text_embed_dim=10,
    adaln_lora_dim=4,
    max_size=(4, 8, 8),
    patch_size=(1, 2, 2),
    extra_pos_embed_type=None,
    concat_padding_mask=False,
    note="left out: learnable positions refuse float64, and concat_padding_mask needs torchvision",
)
def CosmosTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "fps": 16,
    }


@case(
    "cogvideox",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    ofs_embed_dim=8,
    text_embed_dim=10,
    num_layers=2,
    sample_width=8,
    sample_height=8,
    sample_frames=9,
    patch_size=2,
    patch_size_t=2,
    max_text_seq_length=5,
    use_rotary_positional_embeddings=True,
)
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


@case(
    "mochi",
    patch_size=2,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    in_channels=4,
    pooled_projection_dim=10,
    text_embed_dim=16,
    time_embed_dim=8,
)
def MochiTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "encoder_hidden_states": draw.normal(B, L, 16),
        "timestep": draw.time(B),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
    }


@case(
    "kandinsky",
    in_visual_dim=4,
    in_text_dim=12,
    in_text_dim2=10,
    time_dim=8,
    out_visual_dim=4,
    model_dim=24,
    ff_dim=32,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(4, 4, 4),
    visual_cond=True,
    cast=("time_embeddings.in_layer",),
    tolerance=5e-2,
    note="channels last; rotated queries and keys are rounded to bfloat16 whatever the dtype",
)
def Kandinsky5Transformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, T, H, W, 9),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "timestep": draw.time(B),
        "pooled_projections": draw.normal(B, 10),
        "visual_rope_pos": tuple(torch.arange(n) for n in (T, H // 2, W // 2)),
        "text_rope_pos": torch.arange(L),
    }


@case(
    "kandinsky",
    tangents=("hidden_states", "timestep", "audio_hidden_states"),
    in_visual_dim=4,
    out_visual_dim=4,
    in_text_dim=12,
    in_text_dim2=10,
    time_dim=8,
    model_dim=24,
    ff_dim=32,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(4, 4, 4),
    in_audio_dim=6,
    out_audio_dim=6,
    ca_rope=True,
    cross_gates=True,
    visual_token_type_num_embeddings=3,
    note="video and sound latents; two outputs; channels last",
)
def Kandinsky6Transformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, T, H, W, 9),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "pooled_projections": draw.normal(B, 10),
        "timestep": draw.time(B),
        "audio_hidden_states": draw.normal(B, 2 * T + 1, 6),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "visual_token_type_ids": draw.ints(3, B, T),
    }


@case(
    "kandinsky",
    in_visual_dim=4,
    out_visual_dim=4,
    time_dim=8,
    model_dim=24,
    ff_dim=32,
    num_visual_blocks=2,
    axes_dims=(4, 4, 4),
    nabla_threshold=0.5,
    nabla_window=(1, 1, 1),
    note="flex attention over blocks of 64 tokens; their mask is computed from q and k by a sort",
)
def Kandinsky6SRTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W = pick(variant, (2, 2, 8, 8), (1, 1, 8, 16))
    return {"hidden_states": draw.normal(B, T, H, W, 9), "timestep": draw.time(B)}


@case(
    "allegro",
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    cross_attention_dim=24,
    sample_height=8,
    sample_width=8,
    sample_frames=2,
    caption_channels=10,
)
def AllegroTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    N = T * H * W // 4
    angles = [draw.normal(N, 2).repeat(1, 2) for _ in range(3)]
    positions = [(torch.arange(N) // 4).repeat(B, 1) for _ in range(3)]
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "timestep": draw.time(B),
        "attention_mask": torch.ones(B, T, H, W, dtype=torch.float64),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))).double(),
        "image_rotary_emb": (tuple((a.cos(), a.sin()) for a in angles), positions),
    }


@case(
    "latte",
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=16,
    sample_size=8,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=10,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    caption_channels=10,
    video_length=3,
    note="spatial and temporal attention in turn; the number of frames is fixed",
)
def LatteTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 4, 4, 5), (3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, 3, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 10),
    }


@case(
    "easyanimate",
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    patch_size=2,
    sample_width=8,
    sample_height=8,
    num_layers=2,
    mmdit_layers=1,
    time_embed_dim=8,
    add_norm_text_encoder=True,
    text_embed_dim=12,
    text_embed_dim_t5=12,
    after_norm=True,
)
def EasyAnimateTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_hidden_states_t5": draw.normal(B, 4, 12),
    }


@case(
    "cogvideox",
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=10,
    num_layers=2,
    sample_width=8,
    sample_height=8,
    sample_frames=9,
    max_text_seq_length=5,
    use_rotary_positional_embeddings=True,
    is_train_face=True,
    cross_attn_interval=1,
    cross_attn_dim_head=8,
    cross_attn_num_heads=2,
    LFE_id_dim=10,
    LFE_vit_dim=12,
    LFE_depth=2,
    LFE_dim_head=8,
    LFE_num_heads=2,
    LFE_num_id_token=2,
    LFE_num_querie=3,
    LFE_output_dim=16,
    LFE_ff_mult=2,
    LFE_num_scale=2,
    note="hand-written softmax attention in the face branch",
)
def ConsisIDTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    angles = draw.normal(T * H // 2 * W // 2, 6).repeat_interleave(2, dim=1)
    return {
        "hidden_states": draw.normal(B, T, 4, H, W),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "timestep": draw.time(B),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "id_cond": draw.normal(B, 10),
        "id_vit_hidden": [draw.normal(B, 3, 12) for _ in range(2)],
    }


@case(
    "hunyuan",
    tangents=("hidden_states", "timestep", "timestep_r"),
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_refiner_layers=1,
    mlp_ratio=2.0,
    patch_size=2,
    text_embed_dim=12,
    text_embed_2_dim=10,
    image_embed_dim=6,
    rope_axes_dim=(2, 4, 2),
    use_meanflow=True,
    note="a MeanFlow model: two times; `if torch.all(image == 0)` and boolean indexing are data-dependent",
)
def HunyuanVideo15Transformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "timestep_r": draw.time(B),
        "encoder_hidden_states_2": draw.normal(B, 3, 10),
        "encoder_attention_mask_2": padding(3, *pick(variant, (2, 3), (1, 3, 2))),
        "image_embeds": draw.normal(B, 2, 6),
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
    text_embed_dim=12,
    pooled_projection_dim=10,
    rope_axes_dim=(2, 4, 2),
    has_image_proj=True,
    image_proj_dim=6,
    has_clean_x_embedder=True,
    note="history frames at three resolutions; with a batch of one the text is cut to its length",
)
def HunyuanVideoFramepackTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 8, 8, 5), (1, 3, 8, 16, 7))
    frames = torch.arange(T + 7)
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (4,))),
        "pooled_projections": draw.normal(B, 10),
        "image_embeds": draw.normal(B, 2, 6),
        "indices_latents": frames[7:],
        "guidance": draw.time(B, high=6000.0),
        "latents_clean": draw.normal(B, 4, 1, H, W),
        "indices_latents_clean": frames[6:7],
        "latents_history_2x": draw.normal(B, 4, 2, H, W),
        "indices_latents_history_2x": frames[4:6],
        "latents_history_4x": draw.normal(B, 4, 4, H, W),
        "indices_latents_history_4x": frames[:4],
    }


@case(
    "ltx",
    tangents=("hidden_states", "audio_hidden_states", "timestep", "sigma"),
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    cross_attention_dim=24,
    gated_attn=True,
    cross_attn_mod=True,
    audio_in_channels=6,
    audio_out_channels=6,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
    audio_gated_attn=True,
    audio_cross_attn_mod=True,
    num_layers=2,
    caption_channels=10,
    tolerance=1e-3,
    note="video and sound streams that attend to each other; two outputs",
)
def LTX2VideoTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 2, 3, 7))
    mask = padding(L, *pick(variant, (5, 3), (7, 2, 5))).double()
    return {
        "hidden_states": draw.normal(B, T * H * W, 4),
        "audio_hidden_states": draw.normal(B, 2 * T + 1, 6),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "audio_encoder_hidden_states": draw.normal(B, L, 10),
        "timestep": draw.time(B),
        "sigma": draw.time(B),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": T,
        "height": H,
        "width": W,
        "audio_num_frames": 2 * T + 1,
    }


@case(
    "ltx",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    cross_attention_dim=24,
    audio_in_channels=4,
    audio_out_channels=4,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
    num_layers=2,
    caption_channels=10,
    note="holds the unused sound stream of its parent",
)
def SanaWMLTX2RefinerTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, N, L = pick(variant, (2, 16, 5), (3, 18, 7))
    angles = draw.normal(1, N, 12).repeat_interleave(2, dim=-1)
    return {
        "hidden_states": draw.normal(B, N, 4),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "timestep": draw.time(B),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))).double(),
    }


@case(
    "motif",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=1,
    num_single_layers=2,
    num_decoder_layers=1,
    mlp_ratio=2.0,
    text_embed_dim=12,
    image_embed_dim=6,
    rope_axes_dim=(2, 4, 2),
    enable_text_cross_attention_dual=True,
    enable_text_cross_attention_single=True,
    cast=("time_text_embed.timestep_embedder.linear_1",),
)
def MotifVideoTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.time(B),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "image_embeds": draw.normal(B, 2, 6),
    }


@case(
    "sana",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=12,
    rope_max_seq_len=16,
    guidance_embeds=True,
    note="linear self-attention with rotary factors",
)
def SanaVideoTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 4, 4, 5), (3, 3, 4, 6, 7))
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "timestep": draw.time(B),
        "guidance": draw.time(B, high=5.0),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))).double(),
    }


@case(
    "sana",
    tangents=("hidden_states",),
    in_channels=4,
    num_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    softmax_every_n=2,
    linear_head_dim=16,
    caption_channels=10,
    mlp_ratio=2.0,
    chunk_plucker_channels=6,
    chunk_plucker_post_attn_blocks=2,
    note="gated delta rule; rounds the timestep to an integer by .long()",
)
def SanaWMTransformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (2, 2, 2, 2, 5), (3, 3, 2, 3, 7))
    poses = torch.eye(4, dtype=torch.float64).repeat(B, T, 1, 1)
    poses[..., :3, 3] = draw.normal(B, T, 3)
    focal_and_centre = torch.tensor([2.0, 2.0, W / 2, H / 2], dtype=torch.float64)
    return {
        "hidden_states": draw.normal(B, 4, T, H, W),
        "timestep": draw.ints(1000, B, 1, T),
        "encoder_hidden_states": draw.normal(B, 1, L, 10),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "camera_conditions": torch.cat([poses.flatten(2), focal_and_centre.expand(B, T, 4)], dim=2),
        "chunk_plucker": draw.normal(B, 6, T, H, W),
    }


@case(
    "cosmos",
    tangents=("vision_tokens.0", "vision_timesteps"),
    head_dim=12,
    hidden_size=24,
    intermediate_size=32,
    latent_channel=4,
    num_attention_heads=4,
    num_hidden_layers=2,
    num_key_value_heads=2,
    patch_latent_dim=16,
    vocab_size=20,
    rope_axes_dim=(2, 2, 2),
    note="packed text and vision without a batch; grouped-query attention, two towers",
)
def Cosmos3OmniTransformer(draw: Draw, variant: int) -> dict:
    T, H, W, L = pick(variant, (2, 4, 4, 5), (3, 4, 6, 7))
    tokens = H // 2 * W // 2
    vision = torch.arange(L, L + T * tokens)
    noisy = vision[tokens:]  # the first frame is given
    return {
        "input_ids": draw.ints(20, L),
        "text_indexes": torch.arange(L),
        "position_ids": torch.arange(L + T * tokens).repeat(3, 1),
        "und_len": L,
        "sequence_length": L + T * tokens,
        "vision_tokens": [draw.normal(1, 4, T, H, W)],
        "vision_token_shapes": [(T, H // 2, W // 2)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": noisy,
        "vision_timesteps": draw.time(len(noisy)),
        "vision_noisy_frame_indexes": [torch.arange(1, T)],
    }


@case(
    "minimax",
    tangents=("hidden_states", "audio_hidden_states", "timestep"),
    num_attention_heads=2,
    attention_head_dim=12,
    hidden_size=24,
    num_layers=2,
    num_refiner_layers=1,
    ffn_dim=32,
    in_channels=4,
    audio_in_channels=6,
    text_dim=10,
    freq_dim=8,
    time_embed_hidden_dim=16,
    time_embed_dim=12,
    rope_freq_dim=2,
    note="one packed sequence of text, video and sound, with per-token modulation by index",
)
def MiniMaxH3Transformer3DModel(draw: Draw, variant: int) -> dict:
    B, T, H, W, L = pick(variant, (1, 2, 2, 2, 5), (2, 3, 2, 3, 7))
    lengths = L, T * H * W, 2 * T
    text, video, audio = torch.arange(sum(lengths)).split(lengths)
    return {
        "hidden_states": draw.normal(B, len(video), 16),
        "audio_hidden_states": draw.normal(B, len(audio), 6),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "timestep": draw.time(2),
        "timestep_indices": torch.arange(sum(lengths)) % 2,
        "token_tags": torch.cat([torch.full((n,), tag) for tag, n in enumerate(lengths)]),
        "position_ids": draw.ints(6, sum(lengths), 3),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }
