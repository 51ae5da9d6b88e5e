"""Transformers for sound, proteins and parts of larger networks. B batch, N latent length, L text tokens."""

import torch

from .base import Draw, case, padding, pick

UNET_BLOCK = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 8,
    "num_layers": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
}


@case("unet block", **UNET_BLOCK, norm_type="ada_norm_zero", num_embeds_ada_norm=10)
def Transformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 4, 4, 5), (3, 2, 3, 7))
    return {
        "hidden_states": draw.normal(B, 8, H, W),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "timestep": draw.time(B),
        "class_labels": draw.ints(9, B),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))).double(),
    }


@case(
    "unet block",
    tangents=("hidden_states",),
    **UNET_BLOCK,
    qk_norm="rms_norm",
    note="a block of a U-Net: time enters elsewhere",
)
def DreamLiteTransformer2DModel(draw: Draw, variant: int) -> dict:
    B, H, W, L = pick(variant, (2, 4, 4, 5), (3, 2, 3, 7))
    return {
        "hidden_states": draw.normal(B, 8, H, W),
        "encoder_hidden_states": draw.normal(B, L, 12),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
    }


@case(
    "unet block",
    tangents=("hidden_states",),
    **UNET_BLOCK | {"cross_attention_dim": None},
    positional_embeddings="sinusoidal",
    num_positional_embeddings=4,
    note="attention over the frames of a U-Net: time enters elsewhere",
)
def TransformerTemporalModel(draw: Draw, variant: int) -> dict:
    B, T, H, W = pick(variant, (2, 3, 4, 4), (3, 4, 2, 3))
    return {"hidden_states": draw.normal(B * T, 8, H, W), "num_frames": T}


@case(
    "prior",
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    embedding_dim=12,
    num_embeddings=5,
    additional_embeddings=4,
    note="predicts an image embedding; a causal additive mask, repeated per head",
)
def PriorTransformer(draw: Draw, variant: int) -> dict:
    B = pick(variant, 2, 3)
    return {
        "hidden_states": draw.normal(B, 12),
        "timestep": draw.time(B),
        "proj_embedding": draw.normal(B, 12),
        "encoder_hidden_states": draw.normal(B, 5, 12),
        "attention_mask": padding(5, *pick(variant, (5, 3), (5, 2, 4))),
    }


@case(
    "audio",
    tangents=("hidden_states", "timestep", "timestep_r"),
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    in_channels=10,
    audio_acoustic_hidden_dim=4,
    patch_size=2,
    sliding_window=2,
    note="a flow map: two times; sliding-window mask, grouped-query attention, odd lengths are padded",
)
def AceStepTransformer1DModel(draw: Draw, variant: int) -> dict:
    B, N, L = pick(variant, (2, 12, 5), (3, 9, 7))
    return {
        "hidden_states": draw.normal(B, N, 4),
        "timestep": draw.time(B, high=1.0),
        "timestep_r": draw.time(B, high=1.0),
        "encoder_hidden_states": draw.normal(B, L, 24),
        "context_latents": draw.normal(B, N, 6),
    }


@case("audio", dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=10, latent_dim=4, ff_mult=2.0)
def LongCatAudioDiTTransformer(draw: Draw, variant: int) -> dict:
    B, N, L = pick(variant, (2, 12, 5), (3, 9, 7))
    return {
        "hidden_states": draw.normal(B, N, 4),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "timestep": draw.time(B, high=1.0),
        "attention_mask": padding(N, *pick(variant, (12, 8), (9, 4, 6))),
        "latent_cond": draw.normal(B, N, 4),
    }


@case(
    "audio",
    sample_size=16,
    in_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    num_key_value_attention_heads=2,
    out_channels=4,
    cross_attention_dim=16,
    time_proj_dim=8,
    global_states_input_dim=6,
    cross_attention_input_dim=10,
    note="grouped-query attention",
)
def StableAudioDiTModel(draw: Draw, variant: int) -> dict:
    B, N, L = pick(variant, (2, 12, 5), (3, 9, 7))
    angles = draw.normal(N + 1, 2).repeat(1, 2)
    return {
        "hidden_states": draw.normal(B, 4, N),
        "timestep": draw.time(B, high=1.0),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "global_hidden_states": draw.normal(B, 1, 6),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


@case(
    "audio",
    io_channels=4,
    embed_dim=16,
    depth=2,
    num_heads=2,
    cond_token_dim=10,
    global_cond_dim=6,
    local_add_cond_dim=5,
    timestep_features_dim=8,
    ff_mult=2.0,
    num_memory_tokens=3,
    tolerance=1e-2,
    note="differential attention: the difference of two softmax attentions",
)
def StableAudio3DiTModel(draw: Draw, variant: int) -> dict:
    B, N, L = pick(variant, (2, 12, 5), (3, 9, 7))
    return {
        "hidden_states": draw.normal(B, 4, N),
        "timestep": draw.time(B, high=1.0),
        "encoder_hidden_states": draw.normal(B, L, 10),
        "global_hidden_states": draw.normal(B, 6),
        "encoder_attention_mask": padding(L, *pick(variant, (5, 3), (7, 2, 5))),
        "local_add_cond": draw.normal(B, 5, N),
    }


@case(
    "audio",
    tangents=("decoder_input_tokens", "decoder_noise_time"),
    input_dims=4,
    targets_length=16,
    d_model=16,
    num_layers=2,
    num_heads=2,
    d_kv=8,
    d_ff=24,
    note="positions are a frozen embedding",
)
def T5FilmDecoder(draw: Draw, variant: int) -> dict:
    B, N, L = pick(variant, (2, 12, 5), (3, 9, 7))
    mask = padding(L, *pick(variant, (5, 3), (7, 2, 5))).double()
    return {
        "encodings_and_masks": [(draw.normal(B, L, 16), mask), (draw.normal(B, 3, 16), padding(3, *[3] * B))],
        "decoder_input_tokens": draw.normal(B, N, 4),
        "decoder_noise_time": draw.time(B, high=1.0),
    }


@case(
    "minimax",
    in_channels=4,
    condition_dim=10,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    ff_inner_dim=24,
    rotary_dim=4,
    fourier_embedding_dim=8,
)
def MiniMaxMusic3Transformer1DModel(draw: Draw, variant: int) -> dict:
    B, N = pick(variant, (2, 12), (3, 9))
    return {
        "hidden_states": draw.normal(B, 4, N),
        "timestep": draw.time(B, high=1.0),
        "encoder_hidden_states": draw.normal(B, N, 10),
    }


@case(
    "minimax",
    tangents=("inputs_embeds",),
    hidden_size=16,
    num_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    audio_vocab_size=9,
    num_codebooks=3,
    max_position_embeddings=8,
    note="an autoregressive decoder of codes, causal attention; it knows no time",
)
def MiniMaxMusic3RVQDepthDecoder(draw: Draw, variant: int) -> dict:
    B, N = pick(variant, (2, 5), (3, 7))
    return {"inputs_embeds": draw.normal(B, N, 16)}


@case(
    "protein",
    tangents=("bb_ca", "local_latents", "bb_ca_time", "local_latents_time"),
    nlayers=2,
    token_dim=16,
    nheads=2,
    dim_cond=8,
    pair_repr_dim=12,
    latent_dim=4,
    token_type_emb_dim=4,
    t_emb_dim=8,
    seq_sep_dim=4,
    xt_pair_dist_dim=6,
    tri_mult_c=8,
    num_sequence_classes=5,
    feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
    feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
    feats_pair_repr=("xt_bb_ca_pair_dists", "molecule_idx_pair"),
    update_pair_repr_every_n=1,
    note="pair-biased attention and triangle updates; binned distances have no tangent; four outputs",
)
def RFD4ProteinaTransformer(draw: Draw, variant: int) -> dict:
    B, N = pick(variant, (2, 5), (3, 7))
    return {
        "bb_ca": draw.normal(B, N, 3),
        "local_latents": draw.normal(B, N, 4),
        "bb_ca_time": draw.time(B, high=1.0),
        "local_latents_time": draw.time(B, high=1.0),
        "padding_mask": padding(N, *pick(variant, (5, 3), (7, 2, 5))),
        "token_type": draw.ints(7, B, N),
        "conditioning": {
            "is_in_context_conditioning": torch.arange(N).repeat(B, 1) == 1,
            "supports_local_latent": torch.ones(B, N, dtype=torch.bool),
            "molecule_iid": draw.ints(2, B, N),
        },
        "recycle_depth": 2,
    }
