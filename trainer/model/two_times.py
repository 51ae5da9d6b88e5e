"""How the networks of diffusers that take two times are called: call(net, x_s, time, cond, time_r) -> u.

They have an average velocity, and with r = t the velocity. Hunyuan's and ACE-Step's round the float32 times that they
are given to the dtype that they are to compute in; their sinusoids are told the exact ones: see keep_time_exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Condition
from jvpgraph.trainer.model.one_call import keep_time_exact, told


def anyflow(net: nn.Module, x: Tensor, time: Tensor, cond: Condition, time_r: Tensor, **more: Any) -> Tensor:
    """Frames come before channels, and each has its times."""
    each = (len(x), x.shape[2])
    u = net(
        hidden_states=x.transpose(1, 2),
        timestep=time[:, None].expand(each),
        r_timestep=time_r[:, None].expand(each),
        **cond,
        **more,
        return_dict=False,
    )[0]
    return u.transpose(1, 2)


def anyflow_far(net: Any, x: Tensor, time: Tensor, cond: Condition, time_r: Tensor) -> Tensor:
    """All chunks of frames at one time; they are those of the network's configuration, as many as the video has."""
    chunks, frames, limit = chunks_of(net.config.chunk_partition, x.shape[2]), x.shape[2], net.config.full_chunk_limit
    if sum(chunks) != frames or len(chunks) > limit:
        raise ValueError(
            f"{frames} frames of latents are no {limit} or fewer of the chunks {list(net.config.chunk_partition)} that "
            "the network has, and frames of earlier chunks it only looks at: give it shorter videos"
        )
    return anyflow(net, x, time, cond, time_r, chunk_partition=chunks)


def chunks_of(partition: Any, frames: int) -> list[int]:
    """The first of these chunks, until there are enough frames."""
    found: list[int] = []
    for chunk in partition:
        if sum(found) >= frames:
            break
        found.append(chunk)
    return found


def hunyuan(net: Any, x: Tensor, time: Tensor, cond: Condition, time_r: Tensor | None = None) -> Tensor:
    """HunyuanImage, and HunyuanVideo 1.5 with its known frames and their mask, `condition`, behind the latents.

    A network without a second time is not asked for one.
    """
    embedding = net.time_embed if hasattr(net, "time_embed") else net.time_guidance_embed
    rest = {name: c for name, c in cond.items() if name != "condition"}
    if "condition" in cond:
        x = torch.cat([x, cond["condition"]], dim=1)
    times = {"timestep": time.to(x.dtype)}
    of_text = net.context_embedder.time_text_embed
    with told(embedding.time_proj, "exact_time", time), told(of_text.time_proj, "exact_time", time):
        if time_r is None:
            return net(hidden_states=x, **times, **rest, return_dict=False)[0]  # type: ignore[no-any-return]
        with told(embedding.time_proj_r, "exact_time", time_r):
            times |= {"timestep_r": time_r.to(x.dtype)}
            return net(hidden_states=x, **times, **rest, return_dict=False)[0]  # type: ignore[no-any-return]


def with_two_times(adapter: Any, net: Any) -> Any:
    """A Hunyuan network's adapter for its configuration: it may have one time, no second text, and a guidance scale."""
    embedding = net.time_embed if hasattr(net, "time_embed") else net.time_guidance_embed
    for sinusoids in (embedding.time_proj, embedding.time_proj_r, net.context_embedder.time_text_embed.time_proj):
        if sinusoids is not None:
            keep_time_exact(sinusoids)
    needs = adapter.needs if net.config.get("text_embed_2_dim") is not None else adapter.needs[:2]
    guidance = ("guidance",) if net.config.get("guidance_embeds") else ()
    return replace(adapter, needs=(*needs, *guidance), takes_r=net.config.use_meanflow)


def ace_step(net: Any, x: Tensor, time: Tensor, cond: Condition, time_r: Tensor) -> Tensor:
    """Latents of sound [B, N, C]; `context_latents` [B, N, C'] are the source's, and which part is to be made."""
    one, two = net.time_embed, net.time_embed_r
    times = {"timestep": time.to(x.dtype), "timestep_r": time_r.to(x.dtype)}
    apart = two.scale * (time - time_r)
    with told(one.time_sinusoid, "exact_time", one.scale * time), told(two.time_sinusoid, "exact_time", apart):
        return net(hidden_states=x, **times, **cond, return_dict=False)[0]  # type: ignore[no-any-return]


def with_exact_times(adapter: Any, net: Any) -> Any:
    for embedding in (net.time_embed, net.time_embed_r):
        keep_time_exact(embedding.time_sinusoid)
    return adapter
