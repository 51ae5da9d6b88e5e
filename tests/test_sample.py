"""Samplers against Gaussian data, the digits and their network, the ready settings, the demo."""

from __future__ import annotations

import inspect
import io
import json
import math
import tarfile
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import jvpgraph
from jvpgraph.trainer import demo, settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig, SamplingConfig
from jvpgraph.trainer.configs import names, ready
from jvpgraph.trainer.evaluation.samplers import (
    draw,
    euler_grid,
    few_step_times,
    sample_consistency,
    sample_euler,
    sample_mean_flow,
)
from jvpgraph.trainer.model.dit import DiT, DiTConfig, call_dit, dit
from jvpgraph.trainer.noise import noise_like
from jvpgraph.trainer.times import flow_time
from jvpgraph.trainer.trigflow import TrigFlow
from tests.gaussian import (
    STD,
    GaussianAverage,
    GaussianConsistency,
    GaussianFlow,
    gaussian_batch,
    seeded,
    variance,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_few_step_times_follow_the_paper() -> None:
    assert few_step_times(4, SamplingConfig()) == [math.atan(80.0), 1.3, 1.0, 0.6]
    assert few_step_times(1, SamplingConfig()) == [math.atan(80.0)]
    with pytest.raises(ValueError, match="5 steps need 4 middle times"):
        few_step_times(5, SamplingConfig())


def test_the_euler_grid_is_shifted_in_rectified_flow_time() -> None:
    grid = euler_grid(4, shift=5.0)
    s = torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64)
    torch.testing.assert_close(flow_time(grid), 5 * s / (1 + 4 * s))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_sampling_is_exact_for_the_exact_consistency_function(steps: int) -> None:
    batch, times = gaussian_batch(2048, seeded(1)), few_step_times(steps, SamplingConfig())
    x0 = sample_consistency(GaussianConsistency(), batch, times, seeded(25))
    assert x0.std().item() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_mean_flow_sampling_is_exact_for_the_exact_average_velocity(steps: int) -> None:
    """Every way from noise to data through exact averages is the flow's own: x0 = STD * noise."""
    batch = gaussian_batch(16, seeded(1))
    x0 = sample_mean_flow(GaussianAverage(), batch, euler_grid(steps), seeded(25))
    noise = torch.randn(batch.x0.shape, generator=seeded(25), dtype=torch.float64)
    torch.testing.assert_close(x0, STD * noise)


@pytest.mark.parametrize("start", [math.pi / 2, math.atan(80.0)])
@pytest.mark.parametrize("gamma", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("steps", [2, 4])
def test_gamma_sampling_keeps_the_deviation_and_the_noise_that_is_asked_for(
    steps: int, gamma: float, start: float
) -> None:
    """Of x_r, whose variance is V(r), the signal and 1 - gamma^2 of the noise's variance come from before."""
    batch, grid = gaussian_batch(4096, seeded(1)), euler_grid(steps, 3.0, start)
    x0 = sample_mean_flow(GaussianAverage(), batch, grid, seeded(25), gamma)
    assert x0.std().item() == pytest.approx(STD, rel=0.02)
    r = grid[1:-1]
    kept = (1 - gamma**2 * r.sin() ** 2 / variance(r)).sqrt().prod().item()
    noise = torch.randn(batch.x0.shape, generator=seeded(25), dtype=torch.float64)
    assert (x0 * noise).mean().item() / STD == pytest.approx(kept, abs=0.02)


def test_gamma_1_samples_clean_images_and_noise_in_turn() -> None:
    batch, grid = gaussian_batch(16, seeded(1)), euler_grid(4, start=math.atan(80.0))
    x0 = sample_mean_flow(GaussianAverage(), batch, grid, seeded(25), 1.0)
    wanted = sample_consistency(GaussianConsistency(), batch, grid[:-1].tolist(), seeded(25))
    torch.testing.assert_close(x0, wanted, rtol=1e-9, atol=1e-9)


def test_euler_sampling_converges_to_the_data() -> None:
    batch = gaussian_batch(16, seeded(1))
    noise = torch.randn(batch.x0.shape, generator=seeded(26), dtype=torch.float64)
    error = [
        (sample_euler(GaussianFlow(), batch, euler_grid(steps), seeded(26)) - STD * noise).abs().max().item()
        for steps in (10, 100)
    ]
    assert error[1] < 0.05
    assert error[1] < error[0] / 5


def test_sampling_is_reproducible() -> None:
    batch = Batch(torch.zeros(6, 1, 8, 8), {"labels": torch.arange(6)})
    model, times = dit(width=16, depth=1, heads=2), few_step_times(2, SamplingConfig())
    first, again, other = (sample_consistency(model, batch, times, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---------------------------------------------------------------- the network


def test_the_network_starts_at_zero_and_counts_its_parameters() -> None:
    net = DiT(DiTConfig())
    assert 0.65e6 < sum(p.numel() for p in net.parameters()) < 0.75e6
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net.unpatchify(net.patchify(x)), x)
    assert torch.equal(net(x, torch.rand(2), torch.arange(2)), torch.zeros_like(x))


def test_a_second_time_changes_nothing_until_it_is_trained() -> None:
    net = DiT(DiTConfig(width=16, depth=1, heads=2))
    nn.init.normal_(net.patch_out.weight)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.rand(2), torch.arange(2)
    assert torch.equal(net(x, t, labels), net(x, t, labels, t / 2))
    nn.init.normal_(net.interval.mlp[-1].weight)
    nn.init.normal_(net.modulation.weight)
    assert not torch.equal(net(x, t, labels), net(x, t, labels, t / 2))


@pytest.mark.slow
def test_the_dual_gives_the_tangent_of_the_trigflow_model() -> None:
    model = TrigFlow(DiT(DiTConfig(width=16, depth=1, heads=2)), call_dit)
    nn.init.normal_(model.net.patch_out.weight, generator=seeded(31))
    x, t = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.linspace(0.2, 1.4, 4).double()
    cond = {"labels": torch.arange(4)}
    tangents = {"x": torch.randn_like(x), "t": torch.ones_like(t)}
    F, F_dot = jvpgraph.transform(model, backend="eager")(x, t, cond, tangents=tangents)

    def at(h: float) -> Tensor:
        return model(x + h * tangents["x"], t + h * tangents["t"], cond)

    with torch.no_grad():
        torch.testing.assert_close(F, at(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(F_dot, (at(1e-2) - at(-1e-2)) / 2e-2, rtol=1e-2, atol=1e-2)
    assert F.requires_grad
    assert not F_dot.requires_grad


# ---------------------------------------------------------------- ready settings, the demo


@pytest.mark.parametrize("name", names())
def test_ready_settings_are_valid(name: str) -> None:
    config = settings.load(RunConfig, ready(name))
    config.model.function()
    config.data.source.function()
    assert settings.from_dict(RunConfig, settings.to_dict(config)) == config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan_1.3b", "wan_14b"])
def test_the_ready_settings_for_wan_read_the_shards_they_describe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for number in range(1000):
        Path(f"data/wan-480p-{number:06d}.tar").symlink_to("wan-480p-000000.tar" if number else "shard.tar")
    fields = {"latents": torch.full((16, 2, 2, 2), 1.5), "prompt": torch.zeros(3, 8)}
    with tarfile.open("data/shard.tar", "w") as shard:
        for field, value in fields.items():
            content = safetensors.torch.save({field: value})
            entry = tarfile.TarInfo(f"000000.{field}.safetensors")
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    sample = settings.load(RunConfig, ready(name)).data.source.build()[0]
    vae = diffusers.AutoencoderKLWan.__init__.__wrapped__
    default = {key: p.default for key, p in inspect.signature(vae).parameters.items()}
    mean, std = (torch.tensor(default[key])[:, None, None, None] for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(sample.x0, ((1.5 - mean) / std).expand(16, 2, 2, 2), rtol=1e-5, atol=1e-5)
    assert sample.cond["encoder_hidden_states"].shape == (3, 8)


def test_parts_of_a_draw_have_noise_of_their_own() -> None:
    batch = gaussian_batch(4, seeded(1))
    parts = draw(lambda part, rng: noise_like(part.x0, rng), batch, 1, seed=0)
    assert torch.equal(parts, torch.cat([noise_like(batch.x0[:1], rng) for rng in [seeded(0)] for _ in range(4)]))
    assert len(parts.flatten(1).unique(dim=0)) == 4


@pytest.mark.long
def test_the_quick_demo_writes_its_picture_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    demo.run(tmp_path, seed=1, quick=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    kinds = [name.split(",")[0] for name in metrics["samplers"]]
    assert kinds == ["real", "teacher", "teacher", "student", "student", "student"]
    for row in metrics["samplers"].values():
        assert math.isfinite(row["frechet_distance"])
        assert 0 <= row["precision"] <= 1
        assert 0 <= row["recall"] <= 1
    assert metrics["seed"] == 1
    assert set(metrics["phase_seconds"]) == {"teacher", "student", "sampling and metrics"}
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert "student, 4 steps" in capsys.readouterr().out
