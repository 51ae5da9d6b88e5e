"""What `jvpgraph plan` says of published networks on 1, 8 and 64 GPUs, as the table of docs/plan.md.

    python -m benchmarks.plan_table [--table docs/plan.md] [--only flux]

Networks are built on the meta device from the configurations below, copied from transformer/config.json of the named
repositories. rCM, one sample per GPU, bfloat16, blocks checkpointed, one average; adapters of rank 64 on one GPU, whole
weights split by FSDP2 on more. The table of the page stands between two comments; rows that were not made, because of
--only or --gpus, stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.plan.machines import GPUS
from jvpgraph.trainer.plan.plan import Plan, plan_run
from jvpgraph.trainer.plan.report import amount, duration
from jvpgraph.trainer.plan.updates import Costs
from jvpgraph.trainer.settings import from_dict

WAN = {
    "patch_size": [1, 2, 2],
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}


@dataclass(frozen=True)
class Network:
    """A published one, and a sample of the size that it is used at.

    Attributes:
        source: repository on the Hub.
        name: class in diffusers.
        config: its transformer/config.json.
        what: what a sample is.
        latents: shape of a sample's.
        conditions: shape and dtype of each.
        scale: of classifier-free guidance; 1 where the network is told the scale.
        constants: conditions that are the same for all samples.
        adapted: linear layers that adapters go to.
        tokens: into how many parts the tokens of a sample are split on 64 GPUs, and in a row of its own on 8.
    """

    source: str
    name: str
    config: dict[str, Any]
    what: str
    latents: tuple[int, ...]
    conditions: dict[str, tuple[tuple[int, ...], torch.dtype]]
    scale: float = 5.0
    constants: dict[str, float] = field(default_factory=dict)
    adapted: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    tokens: int = 1


TEXT = "encoder_hidden_states"
WAN_SAMPLE: dict[str, Any] = {
    "what": "480p, 81 frames",
    "latents": (16, 21, 60, 104),
    "conditions": {TEXT: ((512, 4096), torch.float32)},
}
NETWORKS = {
    "Wan2.1 1.3B": Network(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "WanTransformer3DModel",
        {**WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        **WAN_SAMPLE,
    ),
    "Wan2.1 14B": Network(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "WanTransformer3DModel",
        {**WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
        **WAN_SAMPLE,
        tokens=8,
    ),
    "FLUX.1-dev": Network(
        "black-forest-labs/FLUX.1-dev",
        "FluxTransformer2DModel",
        {
            "attention_head_dim": 128,
            "guidance_embeds": True,
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 19,
            "num_single_layers": 38,
            "patch_size": 1,
            "pooled_projection_dim": 768,
        },
        "1024 x 1024",
        (16, 128, 128),
        {TEXT: ((512, 4096), torch.float32), "pooled_projections": ((768,), torch.float32)},
        scale=1.0,
        constants={"guidance": 3.5},
        adapted=("to_q", "to_k", "to_v"),
    ),
    "Qwen-Image": Network(
        "Qwen/Qwen-Image",
        "QwenImageTransformer2DModel",
        {
            "attention_head_dim": 128,
            "axes_dims_rope": [16, 56, 56],
            "guidance_embeds": False,
            "in_channels": 64,
            "joint_attention_dim": 3584,
            "num_attention_heads": 24,
            "num_layers": 60,
            "out_channels": 16,
            "patch_size": 2,
        },
        "1024 x 1024",
        (16, 128, 128),
        {TEXT: ((512, 3584), torch.float32), f"{TEXT}_mask": ((512,), torch.bool)},
        scale=4.0,
    ),
}
BEGIN, END = "<!-- table: python -m benchmarks.plan_table -->", "<!-- end of the table -->"
HEAD = (
    "| network | GPUs | trained | layout | held | activations | most at once | H100 80 GB | H200 141 GB | an update |"
)
RULE = "|---" * (HEAD.count("|") - 1) + "|"


def layouts(network: Network, gpus: int) -> list[int]:
    """Into how many parts the tokens of a sample are split, for each row of a network on so many GPUs."""
    return sorted({1, network.tokens} if gpus == 8 else {network.tokens if gpus > 8 else 1})


def settings(network: Network, gpus: int, tokens: int = 1) -> RunConfig:
    """One sample per GPU, or per group of GPUs that splits its tokens."""
    return from_dict(
        RunConfig,
        {
            "out": "run",
            "model": {
                "load": "jvpgraph.trainer.adapters:diffusers_model",
                "options": {"name": network.name, "config": network.config, "dtype": "bfloat16"},
            },
            "student": {
                "checkpoint_blocks": True,
                "lora": {"rank": 64, "targets": list(network.adapted)} if gpus == 1 else None,
            },
            "guidance": {"scale": network.scale},
            "conditions": network.constants,
            "parallel": {"dp_shard": -1 if gpus > 1 else 1, "cp_ulysses": tokens},
            "stages": [{"steps": 10000, "batch": gpus // tokens, "objective": {"name": "rcm"}}],
            "ema": {"sigma_rel": [0.05]},
        },
    )


def plan_of(network: Network, gpus: int, tokens: int, costs: Sequence[Costs]) -> Plan:
    conditions: dict[str, Tensor] = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in network.conditions.items()
    }
    sample: dict[str, Any] = {"latents": network.latents, "conditions": conditions}
    [plan] = plan_run(settings(network, gpus, tokens), processes=gpus, costs=costs, **sample)
    return plan


def subject(name: str, network: Network, gpus: int, tokens: int) -> tuple[str, ...]:
    """The cells that say what a row is about."""
    layout = "one process" if gpus == 1 else "`dp_shard=-1`"
    if tokens > 1:
        layout += f", `cp_ulysses={tokens}`"
    return f"{name}, {network.what}", str(gpus), "rank 64" if gpus == 1 else "all", layout


def row(of: Sequence[str], plan: Plan) -> str:
    seconds = plan.seconds(GPUS["h100"], 0.4)
    cells = [
        *of,
        *map(amount, (sum(plan.resident.values()), plan.kept, plan.peak)),
        *("fits" if plan.fits(GPUS[gpu]) else "no" for gpu in ("h100", "h200")),
        duration(seconds),
    ]
    return f"| {' | '.join(cells)} |"


def merged(page: str, made: dict[tuple[str, ...], str]) -> str:
    """The page with the rows that were made; those that were not stay, as far as there are such networks."""
    before, _, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"there is no {BEGIN} with {END} after it")
    rows = {tuple(cell.strip() for cell in line.split("|")[1:5]): line for line in table.strip().splitlines()} | made
    places = [
        subject(name, network, gpus, tokens)
        for name, network in NETWORKS.items()
        for gpus in sorted({int(of[1]) for of in rows if of[1].isdigit()})
        for tokens in layouts(network, gpus)
    ]
    lines = [HEAD, RULE, *(rows[of] for of in places if of in rows)]
    return "".join([before, BEGIN, "\n\n", "\n".join(lines), "\n\n", END, after])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="the page whose table gets the rows; others stay")
    parser.add_argument("--only", default="", help="networks whose name has this")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    arguments = parser.parse_args()
    if arguments.table is not None:
        merged(arguments.table.read_text(), {})  # whether it can be done, before the work
    print(HEAD, RULE, sep="\n")
    made = {}
    for name, network in NETWORKS.items():
        costs: dict[bool, Costs] = {}  # of adapters and of whole weights: a process has one sample in all layouts
        for gpus in arguments.gpus if arguments.only.lower() in name.lower() else ():
            for tokens in layouts(network, gpus):
                plan = plan_of(network, gpus, tokens, [costs[gpus == 1]] if (gpus == 1) in costs else [])
                costs[gpus == 1] = plan.costs
                of = subject(name, network, gpus, tokens)
                made[of] = row(of, plan)
                print(made[of], flush=True)
    if arguments.table is not None:
        arguments.table.write_text(merged(arguments.table.read_text(), made))


if __name__ == "__main__":
    main()
