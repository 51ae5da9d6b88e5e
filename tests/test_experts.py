"""Two networks as one teacher, each for its times; and times of which a part is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jvpgraph.trainer.model.adapters import diffusers_model
from jvpgraph.trainer.model.experts import experts
from jvpgraph.trainer.model.student import repeated_blocks
from jvpgraph.trainer.times import LogitNormal, LogNormal, ShiftedUniform, flow_time
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import Guided
from tests.test_stages import digits, stage
from tests.test_wan_run import LATENT, TEXT, WAN

OPTIONS: dict[str, Any] = {"name": "WanTransformer3DModel", "config": {**WAN, "num_layers": 1}}
BOTH: dict[str, Any] = {"high": {**OPTIONS, "seed": 1}, "low": {**OPTIONS, "seed": 2}, "boundary": 0.875}


def batch(size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(size, *LATENT, generator=rng), {"encoder_hidden_states": torch.randn(size, *TEXT, generator=rng)}


def radians(s: list[float]) -> torch.Tensor:
    times = torch.tensor(s, dtype=torch.float64)
    return torch.atan2(times, 1 - times)


@torch.no_grad()
def test_each_sample_goes_by_its_own_time() -> None:
    """Above the boundary and at it to the first network, below to the second; which is not asked in vain."""
    both, high, low = experts(**BOTH), diffusers_model(**BOTH["high"]), diffusers_model(**BOTH["low"])
    calls = dict.fromkeys(("high", "low"), 0)
    for name in calls:
        getattr(both.net, name).register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    x, cond = batch(4)
    for s, asked in (
        ([0.99, 0.88, 0.875, 0.9], {"high": 1, "low": 0}),
        ([0.99, 0.86, 0.875, 0.1], {"high": 1, "low": 1}),
        ([0.87, 0.86, 0.5, 0.1], {"high": 0, "low": 1}),
    ):
        t = radians(s)
        calls.update(high=0, low=0)
        above = torch.tensor([time >= 0.875 for time in s]).reshape(-1, 1, 1, 1, 1)
        assert torch.equal(both(x, t, cond), torch.where(above, high(x, t, cond), low(x, t, cond)))
        assert calls == asked
    assert len(list(repeated_blocks(both.net))) == 2


def test_a_pipeline_of_two_networks_is_a_teacher_and_no_student(tmp_path: Path) -> None:
    for name, part in (("transformer", "high"), ("transformer_2", "low")):
        diffusers_model(**BOTH[part]).net.save_pretrained(tmp_path / name)
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.875,
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    both = experts(tmp_path)
    assert both.call.boundary == 875  # type: ignore[attr-defined]
    x, cond = batch(1)
    with torch.no_grad():
        found, expected = (model(x, radians([0.9]), cond) for model in (both, diffusers_model(**BOTH["high"])))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    load = "jvpgraph.trainer.adapters:experts"
    with pytest.raises(ValueError, match="gives two networks, and a student is one"):
        train(digits(tmp_path / "run", [stage("scm")], model={"load": load, "options": {"path": str(tmp_path)}}))
    with pytest.raises(ValueError, match=r"Both can be its teacher: teacher\.model="):
        diffusers_model(tmp_path)
    with pytest.raises(ValueError, match="no pipeline of two networks"):
        experts(tmp_path / "transformer")


def test_both_networks_are_tried_and_no_critic_looks_into_them(tmp_path: Path) -> None:
    teacher = {"load": "jvpgraph.trainer.adapters:experts", "options": BOTH}
    wrong = {**BOTH, "high": {**BOTH["high"], "config": {**OPTIONS["config"], "text_dim": 9}}}
    for options, objective, said in (
        (wrong, "dcm", r"teacher\.model: the teacher cannot run with a sample of the data"),
        (
            BOTH,
            {"name": "adversarial", "features": "teacher"},
            "the teacher is two networks, of which one sees a sample",
        ),
        (BOTH, {"name": "adversarial", "features": "teacher", "blocks": [1]}, "the teacher is two networks"),
    ):
        config = digits(
            tmp_path / "run",
            [{"objective": objective, "steps": 1, "batch": 2}],
            model={"load": "jvpgraph.trainer.adapters:diffusers_model", "options": OPTIONS},
            teacher={"model": {**teacher, "options": options}},
            data={
                "source": {
                    "load": "tests.test_export:Noise",
                    "options": {"latents": [*LATENT], "conditions": {"encoder_hidden_states": [*TEXT]}},
                }
            },
            guidance={},
        )
        with pytest.raises(ValueError, match=said):
            train(config)
        assert not (tmp_path / "run").exists()


def test_another_scale_below_a_time() -> None:
    """As Wan 2.2's pipelines have for the network of low noise."""

    def model(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return x * cond["c"][:, None]

    guided = Guided(model, 4.0, {"c": torch.tensor([1.0])}, below=(0.875, 3.0))  # type: ignore[arg-type]
    found = guided(torch.ones(3, 1).double(), radians([0.9, 0.875, 0.87]), {"c": torch.full((3,), 2.0)})
    assert found.flatten().tolist() == [5.0, 5.0, 4.0]


@pytest.mark.parametrize("kind", [LogNormal, ShiftedUniform, LogitNormal])
@pytest.mark.parametrize("between", [(0.875, 1.0), (0.0, 0.3), (0.2, 0.6)])
def test_a_part_of_the_times_is_drawn_as_all_of_them_there(kind: Any, between: tuple[float, float]) -> None:
    """Its mean and deviation are those of the draws of all times that fall there."""
    rng = torch.Generator().manual_seed(0)
    part, s = flow_time(kind(between=between).draw(20_000, rng)), flow_time(kind().draw(400_000, rng))
    there = s[(s >= between[0]) & (s <= between[1])]
    assert between[0] - 1e-12 <= part.min() <= part.max() <= between[1] + 1e-12
    error = there.std() * (1 / len(part) + 1 / len(there)) ** 0.5
    assert abs(part.mean() - there.mean()) < 4 * error
    assert abs(part.std() / there.std() - 1) < 0.05
