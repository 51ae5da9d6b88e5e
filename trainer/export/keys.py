"""Names of weights as the networks' own repositories and ComfyUI have them, by class in diffusers.

Read backwards from what diffusers.loaders.single_file_utils does to published files; a test sends every map through
those functions. `#` stands for a number and `*` for the last part of a name; both are the same on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """original = the parts one below the other, the halves swapped if asked (shift and scale)."""

    original: str
    parts: tuple[str, ...]
    swapped: bool = False


def rule(original: str, *parts: str, swapped: bool = False) -> Rule:
    return Rule(original, parts, swapped)


def to_original(state: Mapping[str, Tensor], name: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a network of class `name` under their original names, fused where the original has one matrix.

    Raises:
        ValueError: no map for this class, or none for one of its weights.
    """
    if name not in MAPS:
        raise ValueError(
            f"original names of the weights are not known for {name}, but for {', '.join(MAPS)}\n"
            "Use --format diffusers, which ComfyUI reads too for many networks."
        )
    rules = MAPS[name](config)
    if not rules:
        return dict(state)
    found: dict[str, dict[int, Tensor]] = {}
    of: dict[str, Rule] = {}
    unknown = []
    for key, value in state.items():
        match = next((m for r in rules if (m := matched(r, key))), None)
        if match is None:
            unknown.append(key)
            continue
        original, place, which = match
        found.setdefault(original, {})[place] = value
        of[original] = which
    if unknown:
        raise ValueError(
            f"{name} has weights without an original name: {', '.join(unknown[:5])}\n"
            "Use --format diffusers; this variant of the network has no single-file form that is known here."
        )
    return {original: fused(of[original], parts, original) for original, parts in found.items()}


def matched(rule: Rule, key: str) -> tuple[str, int, Rule] | None:
    """The original name of `key`, and which of the rule's parts it is."""
    for place, part in enumerate(rule.parts):
        pattern = re.escape(part).replace(r"\#", r"(\d+)").replace(r"\*", r"([^.]+)")
        if match := re.fullmatch(pattern, key):
            found = re.sub("[#*]", "{}", rule.original).format(*match.groups())
            return found, place, rule
    return None


def fused(rule: Rule, parts: dict[int, Tensor], original: str) -> Tensor:
    if len(parts) != len(rule.parts):
        missing = [part for place, part in enumerate(rule.parts) if place not in parts]
        raise ValueError(f"{original} is made of {', '.join(rule.parts)}; the network lacks {', '.join(missing)}")
    whole = torch.cat([parts[place] for place in range(len(parts))]) if len(parts) > 1 else parts[0]
    return torch.cat(whole.chunk(2)[::-1]) if rule.swapped else whole


def same_names(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    return ()


def wan(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    embed, image = "condition_embedder", "condition_embedder.image_embedder"
    attention = (
        rule(f"blocks.#.{original}.{a}.*", f"blocks.#.{attn}.{b}.*")
        for original, attn in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
            ("k_img", "add_k_proj"),
            ("v_img", "add_v_proj"),
            ("norm_k_img", "norm_added_k"),
        )
    )
    return (
        rule("patch_embedding.*", "patch_embedding.*"),
        rule("time_embedding.0.*", f"{embed}.time_embedder.linear_1.*"),
        rule("time_embedding.2.*", f"{embed}.time_embedder.linear_2.*"),
        rule("text_embedding.0.*", f"{embed}.text_embedder.linear_1.*"),
        rule("text_embedding.2.*", f"{embed}.text_embedder.linear_2.*"),
        rule("time_projection.1.*", f"{embed}.time_proj.*"),
        rule("img_emb.proj.0.*", f"{image}.norm1.*"),
        rule("img_emb.proj.1.*", f"{image}.ff.net.0.proj.*"),
        rule("img_emb.proj.3.*", f"{image}.ff.net.2.*"),
        rule("img_emb.proj.4.*", f"{image}.norm2.*"),
        rule("head.modulation", "scale_shift_table"),
        rule("head.head.*", "proj_out.*"),
        rule("blocks.#.modulation", "blocks.#.scale_shift_table"),
        rule("blocks.#.norm3.*", "blocks.#.norm2.*"),
        rule("blocks.#.norm2.*", "blocks.#.norm3.*"),
        rule("blocks.#.ffn.0.*", "blocks.#.ffn.net.0.proj.*"),
        rule("blocks.#.ffn.2.*", "blocks.#.ffn.net.2.*"),
        *attention,
    )


def double_blocks(
    mod: str, qkv: str, q_norm: str, k_norm: str, proj: str, up: str, down: str, norm: str = "*"
) -> list[Rule]:
    """The blocks of two streams that Flux and HunyuanVideo share, by what follows img and txt in the original names.

    Args:
        norm: the last part of the norms' names in diffusers.
    """
    block, rules = "transformer_blocks.#", []
    for stream, x, normed, context, out in (
        ("img", "to_{}", "norm_{}", "", "to_out.0"),
        ("txt", "add_{}_proj", "norm_added_{}", "_context", "to_add_out"),
    ):
        original = f"double_blocks.#.{stream}"
        rules += [
            rule(f"{original}{mod}.*", f"{block}.norm1{context}.linear.*"),
            rule(f"{original}{qkv}.*", *(f"{block}.attn.{x.format(part)}.*" for part in "qkv")),
            rule(f"{original}{q_norm}", f"{block}.attn.{normed.format('q')}.{norm}"),
            rule(f"{original}{k_norm}", f"{block}.attn.{normed.format('k')}.{norm}"),
            rule(f"{original}{proj}.*", f"{block}.attn.{out}.*"),
            rule(f"{original}{up}.*", f"{block}.ff{context}.net.0.proj.*"),
            rule(f"{original}{down}.*", f"{block}.ff{context}.net.2.*"),
        ]
    return rules


def flux(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    single, time = "single_transformer_blocks.#", "time_text_embed"
    embedders = (
        rule(f"{original}.{a}.*", f"{time}.{embedder}.{b}.*")
        for original, embedder in (
            ("time_in", "timestep_embedder"),
            ("vector_in", "text_embedder"),
            ("guidance_in", "guidance_embedder"),
        )
        for a, b in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    )
    return (
        rule("img_in.*", "x_embedder.*"),
        rule("txt_in.*", "context_embedder.*"),
        *embedders,
        *double_blocks(
            "_mod.lin",
            "_attn.qkv",
            "_attn.norm.query_norm.scale",
            "_attn.norm.key_norm.scale",
            "_attn.proj",
            "_mlp.0",
            "_mlp.2",
            norm="weight",
        ),
        rule("single_blocks.#.modulation.lin.*", f"{single}.norm.linear.*"),
        rule("single_blocks.#.linear1.*", *(f"{single}.attn.to_{x}.*" for x in "qkv"), f"{single}.proj_mlp.*"),
        rule("single_blocks.#.norm.query_norm.scale", f"{single}.attn.norm_q.weight"),
        rule("single_blocks.#.norm.key_norm.scale", f"{single}.attn.norm_k.weight"),
        rule("single_blocks.#.linear2.*", f"{single}.proj_out.*"),
        rule("final_layer.linear.*", "proj_out.*"),
        rule("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", swapped=True),
    )


def chroma(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Flux's, with its modulations made by one network."""
    layer = "distilled_guidance_layer"
    return (
        *flux(config),
        rule(f"{layer}.in_proj.*", f"{layer}.in_proj.*"),
        rule(f"{layer}.out_proj.*", f"{layer}.out_proj.*"),
        rule(f"{layer}.layers.#.in_layer.*", f"{layer}.layers.#.linear_1.*"),
        rule(f"{layer}.layers.#.out_layer.*", f"{layer}.layers.#.linear_2.*"),
        rule(f"{layer}.norms.#.scale", f"{layer}.norms.#.weight"),
    )


def hunyuan_video(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    single, time = "single_transformer_blocks.#", "time_text_embed"
    refiner, text = "context_embedder.token_refiner.refiner_blocks.#", "txt_in.individual_token_refiner.blocks.#"
    embedders = (
        rule(f"{original}.{a}.*", f"{embedder}.{b}.*")
        for original, names, embedder in (
            ("time_in", ("mlp.0", "mlp.2"), f"{time}.timestep_embedder"),
            ("guidance_in", ("mlp.0", "mlp.2"), f"{time}.guidance_embedder"),
            ("vector_in", ("in_layer", "out_layer"), f"{time}.text_embedder"),
            ("txt_in.t_embedder", ("mlp.0", "mlp.2"), f"context_embedder.{time}.timestep_embedder"),
            ("txt_in.c_embedder", ("linear_1", "linear_2"), f"context_embedder.{time}.text_embedder"),
        )
        for a, b in zip(names, ("linear_1", "linear_2"))
    )
    return (
        rule("img_in.proj.*", "x_embedder.proj.*"),
        rule("txt_in.input_embedder.*", "context_embedder.proj_in.*"),
        *embedders,
        *double_blocks(
            "_mod.linear", "_attn_qkv", "_attn_q_norm.*", "_attn_k_norm.*", "_attn_proj", "_mlp.fc1", "_mlp.fc2"
        ),
        rule(f"{text}.norm#.*", f"{refiner}.norm#.*"),
        rule(f"{text}.self_attn_qkv.*", *(f"{refiner}.attn.to_{x}.*" for x in "qkv")),
        rule(f"{text}.self_attn_proj.*", f"{refiner}.attn.to_out.0.*"),
        rule(f"{text}.mlp.fc1.*", f"{refiner}.ff.net.0.proj.*"),
        rule(f"{text}.mlp.fc2.*", f"{refiner}.ff.net.2.*"),
        rule(f"{text}.adaLN_modulation.1.*", f"{refiner}.norm_out.linear.*"),
        rule("single_blocks.#.modulation.linear.*", f"{single}.norm.linear.*"),
        rule("single_blocks.#.linear1.*", *(f"{single}.attn.to_{x}.*" for x in "qkv"), f"{single}.proj_mlp.*"),
        rule("single_blocks.#.q_norm.*", f"{single}.attn.norm_q.*"),
        rule("single_blocks.#.k_norm.*", f"{single}.attn.norm_k.*"),
        rule("single_blocks.#.linear2.*", f"{single}.proj_out.*"),
        rule("final_layer.linear.*", "proj_out.*"),
        rule("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", swapped=True),
    )


def sd3(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    block, last = "transformer_blocks.#", config["num_layers"] - 1
    x, context = "joint_blocks.#.x_block", "joint_blocks.#.context_block"
    attention = (
        r
        for original, attn, q, qk, out in (
            (f"{x}.attn", "attn", "to_{}", "norm_{}", "to_out.0"),
            (f"{x}.attn2", "attn2", "to_{}", "norm_{}", "to_out.0"),
            (f"{context}.attn", "attn", "add_{}_proj", "norm_added_{}", "to_add_out"),
        )
        for r in (
            rule(f"{original}.qkv.*", *(f"{block}.{attn}.{q.format(x)}.*" for x in "qkv")),
            rule(f"{original}.ln_q.*", f"{block}.{attn}.{qk.format('q')}.*"),
            rule(f"{original}.ln_k.*", f"{block}.{attn}.{qk.format('k')}.*"),
            rule(f"{original}.proj.*", f"{block}.{attn}.{out}.*"),
        )
    )
    return (
        # the last block's text stream ends in a norm with scale before shift, as the network itself does
        rule(
            f"joint_blocks.{last}.context_block.adaLN_modulation.1.*",
            f"transformer_blocks.{last}.norm1_context.linear.*",
            swapped=True,
        ),
        rule("pos_embed", "pos_embed.pos_embed"),
        rule("x_embedder.proj.*", "pos_embed.proj.*"),
        rule("context_embedder.*", "context_embedder.*"),
        rule("t_embedder.mlp.0.*", "time_text_embed.timestep_embedder.linear_1.*"),
        rule("t_embedder.mlp.2.*", "time_text_embed.timestep_embedder.linear_2.*"),
        rule("y_embedder.mlp.0.*", "time_text_embed.text_embedder.linear_1.*"),
        rule("y_embedder.mlp.2.*", "time_text_embed.text_embedder.linear_2.*"),
        *attention,
        rule(f"{x}.adaLN_modulation.1.*", f"{block}.norm1.linear.*"),
        rule(f"{context}.adaLN_modulation.1.*", f"{block}.norm1_context.linear.*"),
        rule(f"{x}.mlp.fc1.*", f"{block}.ff.net.0.proj.*"),
        rule(f"{x}.mlp.fc2.*", f"{block}.ff.net.2.*"),
        rule(f"{context}.mlp.fc1.*", f"{block}.ff_context.net.0.proj.*"),
        rule(f"{context}.mlp.fc2.*", f"{block}.ff_context.net.2.*"),
        rule("final_layer.linear.*", "proj_out.*"),
        rule("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", swapped=True),
    )


def ltx(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    block = "transformer_blocks.#"
    return (
        rule("patchify_proj.*", "proj_in.*"),
        rule("adaln_single.linear.*", "time_embed.linear.*"),
        rule("adaln_single.emb.timestep_embedder.linear_#.*", "time_embed.emb.timestep_embedder.linear_#.*"),
        rule("caption_projection.linear_#.*", "caption_projection.linear_#.*"),
        rule("scale_shift_table", "scale_shift_table"),
        rule("proj_out.*", "proj_out.*"),
        rule(f"{block}.scale_shift_table", f"{block}.scale_shift_table"),
        rule(f"{block}.ff.net.0.proj.*", f"{block}.ff.net.0.proj.*"),
        rule(f"{block}.ff.net.2.*", f"{block}.ff.net.2.*"),
        rule(f"{block}.attn#.to_out.0.*", f"{block}.attn#.to_out.0.*"),
        rule(f"{block}.attn#.q_norm.*", f"{block}.attn#.norm_q.*"),
        rule(f"{block}.attn#.k_norm.*", f"{block}.attn#.norm_k.*"),
        *(rule(f"{block}.attn#.to_{x}.*", f"{block}.attn#.to_{x}.*") for x in "qkv"),
    )


def mochi(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    block, time = "transformer_blocks.#", "time_embed"
    streams = (
        r
        for x, q, normed, out, ff in (
            ("x", "to_{}", "norm_{}", "to_out.0", "ff"),
            ("y", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        )
        for r in (
            rule(f"blocks.#.attn.qkv_{x}.*", *(f"{block}.attn1.{q.format(part)}.*" for part in "qkv")),
            *(rule(f"blocks.#.attn.{part}_norm_{x}.*", f"{block}.attn1.{normed.format(part)}.*") for part in "qk"),
            rule(f"blocks.#.attn.proj_{x}.*", f"{block}.attn1.{out}.*"),
            rule(f"blocks.#.mlp_{x}.w1.*", f"{block}.{ff}.net.0.proj.*", swapped=True),  # gate and value
            rule(f"blocks.#.mlp_{x}.w2.*", f"{block}.{ff}.net.2.*"),
        )
    )
    return (
        rule("x_embedder.proj.*", "patch_embed.proj.*"),
        rule("t_embedder.mlp.0.*", f"{time}.timestep_embedder.linear_1.*"),
        rule("t_embedder.mlp.2.*", f"{time}.timestep_embedder.linear_2.*"),
        *(rule(f"t5_y_embedder.{part}.*", f"{time}.pooler.{part}.*") for part in ("to_q", "to_kv", "to_out")),
        rule("t5_yproj.*", f"{time}.caption_proj.*"),
        rule("pos_frequencies", "pos_frequencies"),
        rule("blocks.#.mod_x.*", f"{block}.norm1.linear.*"),
        rule("blocks.#.mod_y.*", f"{block}.norm1_context.linear.*"),
        rule("blocks.#.mod_y.*", f"{block}.norm1_context.linear_1.*"),  # of the last block, which only scales
        *streams,
        rule("final_layer.mod.*", "norm_out.linear.*", swapped=True),
        rule("final_layer.linear.*", "proj_out.*"),
    )


def flux2(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    block, single, time = "transformer_blocks.#", "single_transformer_blocks.#", "time_guidance_embed"
    streams = (
        r
        for x, q, normed, out, ff in (
            ("img", "to_{}", "norm_{}", "to_out.0", "ff"),
            ("txt", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        )
        for r in (
            rule(f"double_blocks.#.{x}_attn.qkv.*", *(f"{block}.attn.{q.format(part)}.*" for part in "qkv")),
            rule(f"double_blocks.#.{x}_attn.norm.query_norm.scale", f"{block}.attn.{normed.format('q')}.weight"),
            rule(f"double_blocks.#.{x}_attn.norm.key_norm.scale", f"{block}.attn.{normed.format('k')}.weight"),
            rule(f"double_blocks.#.{x}_attn.proj.*", f"{block}.attn.{out}.*"),
            rule(f"double_blocks.#.{x}_mlp.0.*", f"{block}.{ff}.linear_in.*"),
            rule(f"double_blocks.#.{x}_mlp.2.*", f"{block}.{ff}.linear_out.*"),
        )
    )
    modulations = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    return (
        rule("img_in.*", "x_embedder.*"),
        rule("txt_in.*", "context_embedder.*"),
        rule("time_in.in_layer.*", f"{time}.timestep_embedder.linear_1.*"),
        rule("time_in.out_layer.*", f"{time}.timestep_embedder.linear_2.*"),
        rule("guidance_in.in_layer.*", f"{time}.guidance_embedder.linear_1.*"),
        rule("guidance_in.out_layer.*", f"{time}.guidance_embedder.linear_2.*"),
        *(rule(f"{name}.lin.*", f"{name}.linear.*") for name in modulations),
        *streams,
        rule("single_blocks.#.linear1.*", f"{single}.attn.to_qkv_mlp_proj.*"),
        rule("single_blocks.#.linear2.*", f"{single}.attn.to_out.*"),
        rule("single_blocks.#.norm.query_norm.scale", f"{single}.attn.norm_q.weight"),
        rule("single_blocks.#.norm.key_norm.scale", f"{single}.attn.norm_k.weight"),
        rule("final_layer.linear.*", "proj_out.*"),
        rule("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", swapped=True),
    )


def z_image(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Of one patch size, 2 x 2 of one frame; what is not named here has its name in diffusers."""
    blocks = (
        r
        for block in ("layers.#", "noise_refiner.#", "context_refiner.#")
        for r in (
            rule(f"{block}.attention.qkv.*", *(f"{block}.attention.to_{part}.*" for part in "qkv")),
            *(rule(f"{block}.attention.{part}_norm.*", f"{block}.attention.norm_{part}.*") for part in "qk"),
            rule(f"{block}.attention.out.*", f"{block}.attention.to_out.0.*"),
            rule(f"{block}.feed_forward.*.weight", f"{block}.feed_forward.*.weight"),
            rule(f"{block}.adaLN_modulation.0.*", f"{block}.adaLN_modulation.0.*"),
            rule(f"{block}.*.weight", f"{block}.*.weight"),  # norms
        )
    )
    return (
        rule("x_embedder.*", "all_x_embedder.2-1.*"),
        rule("final_layer.linear.*", "all_final_layer.2-1.linear.*"),
        rule("final_layer.adaLN_modulation.1.*", "all_final_layer.2-1.adaLN_modulation.1.*"),
        rule("t_embedder.mlp.#.*", "t_embedder.mlp.#.*"),
        rule("cap_embedder.#.*", "cap_embedder.#.*"),
        rule("x_pad_token", "x_pad_token"),
        rule("cap_pad_token", "cap_pad_token"),
        *blocks,
    )


MAPS: dict[str, Callable[[Mapping[str, Any]], tuple[Rule, ...]]] = {
    "WanTransformer3DModel": wan,
    "FluxTransformer2DModel": flux,
    "ChromaTransformer2DModel": chroma,
    "SD3Transformer2DModel": sd3,
    "QwenImageTransformer2DModel": same_names,
    "LTXVideoTransformer3DModel": ltx,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
    "MochiTransformer3DModel": mochi,
    "Flux2Transformer2DModel": flux2,
    "ZImageTransformer2DModel": z_image,
}
