"""A Wan student with a second time as diffusers' AnyFlowTransformer3DModel, whose pipeline samples by jumps, and back.

AnyFlow embeds its times as (1 - gate) E(t) + gate D(t - r), or D(r), as in its own training, with a gate of a quarter.
With a gate of a half, E = 2 e and D = 2 d the former is e + d, and doubling changes no digit. What remains is rounding:
its blocks are those of an older Wan, and in narrow dtypes diffusers keeps D in the narrow one and rounds both
embeddings before they are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jvpgraph.trainer.model.additions import INTERVAL, WAN, added
from jvpgraph.trainer.model.loading import diffusers

NAME = "AnyFlowTransformer3DModel"
GATE = 0.5
OURS = f"{INTERVAL}.embedder."
THEIRS = "condition_embedder.delta_embedder."
SAME = {"qk_norm": "rms_norm_across_heads", "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None}


def fits_anyflow(net: nn.Module) -> bool:
    """Whether it is a Wan with a second time alone, from text to video: AnyFlow has no other attention to pictures, and
    embeds t - r as it embeds t."""
    config: Any = getattr(net, "config", {})
    known = any(cls.__name__ == "WanTransformer3DModel" for cls in type(net).__mro__)
    alone = {name: part.place for name, part in added(net).items()} == {INTERVAL: WAN}
    return known and alone and all(config.get(name) == value for name, value in SAME.items())


def as_anyflow(net: Any) -> Any:
    """The same network as an AnyFlowTransformer3DModel, which shares what it can of its weights."""
    cls: Any = getattr(diffusers(), NAME)
    known = {name: value for name, value in net.config.items() if name not in SAME and not name.startswith("_")}
    with torch.device("meta"):
        made = cls(**known, gate_value=GATE, deltatime_type="t-r")
    narrow = net.condition_embedder.time_proj.weight.dtype
    state = {}
    for name, value in net.state_dict().items():
        if name.startswith(OURS):
            name, value = THEIRS + name.removeprefix(OURS), value.to(narrow)
        state[name] = 2 * value if scaled(name) else value
    made.load_state_dict(state, assign=True)
    gate = torch.tensor([GATE], device=net.proj_out.weight.device)
    made.condition_embedder.register_buffer("delta_emb_gate", gate, persistent=False)
    return made.requires_grad_(False).train(net.training)


def from_anyflow(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of an AnyFlowTransformer3DModel under the names of a Wan with a second time.

    Raises:
        ValueError: it is told r, not t - r, and then no such Wan computes the same.
    """
    if config.get("deltatime_type", "r") != "t-r":
        raise ValueError(
            "this AnyFlow network embeds r, and a Wan with a second time t - r\nTake it as it is: model.options.path"
        )
    gate = config.get("gate_value", 0.25)
    values = {}
    for name, value in state.items():
        value = value * (gate if name.startswith(THEIRS) else 1 - gate) if scaled(name) else value
        values[OURS + name.removeprefix(THEIRS) if name.startswith(THEIRS) else name] = value
    return values


def scaled(name: str) -> bool:
    """Whether AnyFlow's gate is in a parameter: the last layers of E and D."""
    return name.startswith((f"{WAN.embedder}.linear_2.", f"{THEIRS}linear_2."))
