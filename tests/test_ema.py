"""Averages against their closed forms, and widths that were not tracked against averages that were."""

from __future__ import annotations

import copy
import resource

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from jvpgraph.trainer.model.ema import PowerEMA, inner_products, power_ema_gamma, reconstruct, save_snapshot, snapshots


def random_walk(steps: int, seed: int = 0) -> Tensor:
    """[steps, 64]"""
    rng = torch.Generator().manual_seed(seed)
    return 5.0 + torch.randn(steps, 64, generator=rng, dtype=torch.float64).cumsum(0) / steps**0.5


def test_published_exponents():
    assert power_ema_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert power_ema_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert power_ema_gamma(12**-0.5) == pytest.approx(0, abs=1e-9)
    for bad in (0, -0.1, 0.3, float("nan")):
        with pytest.raises(ValueError, match="sigma_rel"):
            power_ema_gamma(bad)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_average_is_the_weighted_mean_of_its_profile(sigma_rel):
    walk = random_walk(400)
    ema = PowerEMA({"w": torch.full((64,), 1e6)}, sigma_rel)  # what it starts from does not count
    for theta in walk:
        ema.update({"w": theta})
    n, power = len(walk), power_ema_gamma(sigma_rel) + 1
    k = torch.arange(1, n + 1, dtype=torch.float64)
    weights = (k / n) ** power - ((k - 1) / n) ** power
    assert weights.sum() == pytest.approx(1)
    torch.testing.assert_close(ema.parameters["w"].double(), weights @ walk, rtol=1e-5, atol=0)
    density = power * ((k - 0.5) / n) ** (power - 1) / n  # of the continuous profile
    torch.testing.assert_close(ema.parameters["w"].double(), density @ walk, rtol=1e-3, atol=0)
    mean = (weights * (k - 0.5)).sum()
    width = ((weights * (k - 0.5 - mean) ** 2).sum() + 1 / 12).sqrt() / n
    assert width.item() == pytest.approx(sigma_rel, rel=1e-2)


def test_average_keeps_its_own_float32_tensors():
    weights = {"w": torch.ones(3, dtype=torch.bfloat16), "v": torch.ones(2)}
    ema = PowerEMA(weights, 0.1)
    ema.update(weights)
    weights["v"] += 1
    assert ema.parameters["w"].dtype == torch.float32
    assert torch.equal(ema.parameters["v"], torch.ones(2))
    with pytest.raises(ValueError, match="missing: v\n  unexpected: u"):
        ema.update({"w": torch.ones(3), "u": torch.ones(2)})


def test_resuming_is_exact():
    walk = random_walk(20).float()
    ema = PowerEMA({"w": walk[0]}, 0.05)
    for theta in walk[:10]:
        ema.update({"w": theta})
    state = copy.deepcopy(ema.state_dict())
    again = PowerEMA({"w": torch.zeros(64)}, 0.05)
    again.load_state_dict(state)
    for theta in walk[10:]:
        ema.update({"w": theta})
        again.update({"w": theta})
    assert again.updates == 20
    assert torch.equal(ema.parameters["w"], again.parameters["w"])
    with pytest.raises(ValueError, match=r"sigma_rel 0\.05, this one 0\.1"):
        PowerEMA({"w": walk[0]}, 0.1).load_state_dict(state)
    with pytest.raises(ValueError, match="shapes: w"):
        PowerEMA({"w": torch.zeros(3)}, 0.05).load_state_dict(state)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A folder with snapshots of widths 0.05 and 0.1, and directly tracked averages of other widths at two steps."""
    folder = tmp_path_factory.mktemp("snapshots")
    steps, every = 1024, 128
    walk = random_walk(steps)
    saved = [PowerEMA({"w": walk[0]}, width) for width in (0.05, 0.1)]
    direct = {width: PowerEMA({"w": walk[0]}, width) for width in (0.06, 0.075, 0.09, 0.12)}
    truth = {}
    for step, theta in enumerate(walk, start=1):
        for ema in [*saved, *direct.values()]:
            ema.update({"w": theta})
        if step % every == 0:
            for ema in saved:
                save_snapshot(folder, step, ema)
            for width, ema in direct.items():
                truth[width, step] = ema.parameters["w"].clone()
    return folder, walk, truth


@pytest.mark.parametrize(("width", "step"), [(0.06, 1024), (0.075, 1024), (0.09, 1024), (0.12, 1024), (0.075, 640)])
def test_reconstructed_average_is_the_tracked_one(tracked, width, step):
    folder, walk, truth = tracked
    found = reconstruct(folder, width, step)["w"]
    wanted = truth[width, step]
    moved = (walk[step - 1] - wanted).square().mean().sqrt()
    error = ((found - wanted).square().mean().sqrt() / moved).item()
    assert found.dtype == torch.float32
    assert error < 0.05, error


def test_saved_widths_come_back_and_the_last_step_is_the_default(tracked):
    folder, _, _ = tracked
    path = folder / "ema-0.05-00001024.safetensors"
    with safe_open(path, "pt") as file:
        saved = file.get_tensor("w")
        assert file.metadata()["step"] == "1024"
    torch.testing.assert_close(reconstruct(folder, 0.05)["w"], saved, rtol=1e-5, atol=1e-5)


def test_what_snapshots_cannot_represent_is_refused(tracked, tmp_path):
    folder, _, _ = tracked
    with pytest.raises(ValueError, match=r"of sigma_rel 0\.05, 0\.1, cannot represent sigma_rel 0\.01: .* off by \d"):
        reconstruct(folder, 0.01)
    with pytest.raises(ValueError, match="no snapshot at step 1000: there are those of 128, 256"):
        reconstruct(folder, 0.07, 1000)
    with pytest.raises(ValueError, match="holds no snapshots"):
        reconstruct(tmp_path, 0.07)
    (tmp_path / "ema-0.05-00000001.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a snapshot"):
        snapshots(tmp_path)


def test_parameters_that_never_change_are_reconstructed_exactly(tmp_path):
    for width in (0.05, 0.1):
        ema = PowerEMA({"w": torch.zeros(3)}, width)
        for step in range(1, 61):
            ema.update({"w": torch.full((3,), 1000.0)})
            if step % 15 == 0:
                save_snapshot(tmp_path, step, ema)
    torch.testing.assert_close(reconstruct(tmp_path, 0.08)["w"], torch.full((3,), 1000.0), rtol=1e-6, atol=0)


def test_snapshots_are_written_whole_or_not_at_all(tmp_path):
    ema = PowerEMA({"w": torch.zeros(1000)}, 0.05)
    with pytest.raises(ValueError, match="no update"):
        save_snapshot(tmp_path, 0, ema)
    ema.update({"w": torch.ones(1000)})
    path = save_snapshot(tmp_path, 1, ema)
    before = path.read_bytes()
    ema.update({"w": torch.zeros(1000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write"):
            save_snapshot(tmp_path, 1, ema)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_inner_products_are_integrals():
    tau = (np.arange(200_000) + 0.5) / 200_000 * 9
    for (a, alpha), (b, beta) in [((4, 3.0), (9, 5.0)), ((9, 5.0), (4, 3.0)), ((7, 2.0), (7, 6.5))]:
        p = np.where(tau < a, (alpha + 1) * tau**alpha / a ** (alpha + 1), 0)
        q = np.where(tau < b, (beta + 1) * tau**beta / b ** (beta + 1), 0)
        integral = (p * q).mean() * 9
        assert inner_products(a, alpha, b, beta) == pytest.approx(integral, rel=1e-4)
