"""Ready settings for published networks, on the meta device: they are what their configurations make, and go together.

Configurations are those of transformer/config.json in the repositories on the Hub that are named.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.plan_table import NETWORKS, Network
from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.configs import ready
from jvpgraph.trainer.evaluation.samplers import few_step_times
from jvpgraph.trainer.model.networks import build_student, check_conditions, check_stage
from jvpgraph.trainer.plan.subject import Origins, check_sample

WAN, WAN_14B = NETWORKS["Wan2.1 1.3B"], NETWORKS["Wan2.1 14B"]
SD3 = Network(
    "stabilityai/stable-diffusion-3.5-medium",
    "SD3Transformer2DModel",
    {
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "dual_attention_layers": list(range(13)),
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 24,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "sample_size": 128,
    },
    "1024 x 1024",
    (16, 128, 128),
    {"encoder_hidden_states": ((333, 4096), torch.float32), "pooled_projections": ((2048,), torch.float32)},
)


@dataclass(frozen=True)
class Ready:
    """What a name stands for.

    Attributes:
        networks: by the folders that the settings name.
        billions: parameters of the student's network, and of its teacher's.
        millions: parameters that are trained.
        objectives: of the stages.
        told: conditions of a sample beside those of the network's own data.
    """

    networks: dict[str, Network]
    billions: tuple[float, float]
    millions: float
    objectives: list[str]
    told: tuple[str, ...] = ()


SETTINGS = {
    "wan_1.3b": Ready({"models/Wan2.1-T2V-1.3B-Diffusers/transformer": WAN}, (1.42, 1.42), 1419, ["rcm"]),
    "wan_14b": Ready({"models/Wan2.1-T2V-14B-Diffusers/transformer": WAN_14B}, (14.29, 14.29), 307, ["rcm"]),
    "wan_1.3b_staged": Ready(
        {"models/Wan2.1-T2V-1.3B-Diffusers/transformer": WAN}, (1.42, 1.42), 1419, ["dcm", "scm", "rcm"]
    ),
    "wan_14b_to_1.3b": Ready(
        {
            "models/Wan2.1-T2V-1.3B-Diffusers/transformer": WAN,
            "models/Wan2.1-T2V-14B-Diffusers/transformer": WAN_14B,
        },
        (1.42, 14.29),
        1419,
        ["dcm", "scm", "rcm"],
    ),
    "wan_1.3b_flow_map": Ready(
        {"models/Wan2.1-T2V-1.3B-Diffusers/transformer": WAN}, (1.42, 1.42), 1422, ["flow_map", "terms"]
    ),
    "sd3_flow_map": Ready({"models/stable-diffusion-3.5-medium/transformer": SD3}, (2.24, 2.24), 46, ["flow_map"]),
    "flux_lora_dmd": Ready(
        {"models/FLUX.1-dev/transformer": NETWORKS["FLUX.1-dev"]}, (11.90, 11.90), 75, ["dmd"], ("guidance",)
    ),
    "qwen_image_dmd_lora": Ready(
        {"models/Qwen-Image/transformer": NETWORKS["Qwen-Image"]}, (20.43, 20.43), 189, ["dmd"]
    ),
}


def billions(network: torch.nn.Module) -> float:
    return sum(p.numel() for p in network.parameters()) / 1e9


@pytest.mark.long
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name", ["wan_14b_to_1.3b", "flux_lora_dmd", *(n for n in SETTINGS if "_to_" not in n and n != "flux_lora_dmd")]
)
def test_ready_settings_are_for_the_published_networks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted, config = SETTINGS[name], settings.load(RunConfig, ready(name))
    for folder, network in wanted.networks.items():
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text(json.dumps({"_class_name": network.name, **network.config}))
    origins = Origins.of(config)
    assert [billions(origins.base), billions(origins.teacher)] == pytest.approx(wanted.billions, abs=0.006)
    assert (origins.teacher is origins.base) == (config.teacher.model is None)

    for network in wanted.networks.values():
        shapes = dict(network.conditions) | dict.fromkeys(wanted.told, ((), torch.float32))
        cond = {key: torch.empty(1, *shape, dtype=dtype, device="meta") for key, (shape, dtype) in shapes.items()}
        sample = Batch(torch.empty(1, *network.latents, device="meta"), cond)
        for each in (origins.base, origins.teacher):
            check_sample(name, each, sample)
    check_conditions(config, sample)
    student = build_student(origins.base, config.student, config.told_scale)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad) / 1e6
    assert trained == pytest.approx(wanted.millions, abs=1)
    assert [stage.objective.name for stage in config.stages] == wanted.objectives
    for stage in config.stages:
        check_stage(stage, student, {}, sample, second_time=config.student.added_time is not None)
    for steps in config.sampling.steps:
        few_step_times(steps, config.sampling)
    prompts_alone = not any(stage.objective.needs_data for stage in config.stages)
    assert prompts_alone == (wanted.objectives == ["dmd"])


def test_every_ready_setting_for_a_published_network_is_tested() -> None:
    files: Any = ready("digits").parent.glob("*.yaml")
    assert {path.stem for path in files} - {"digits", "digits_teacher"} == SETTINGS.keys()
