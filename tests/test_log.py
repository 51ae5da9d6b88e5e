"""The log of a run: the same file after a stop, events, curves and grids that show what was given."""

from __future__ import annotations

import json
import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from jvpgraph.trainer.run.log import RunLog, computed, draw_curves, grid, read_lines, series
from jvpgraph.trainer.run.pace import UNITS


def log_of(folder: Path, **options: Any) -> RunLog:
    return RunLog(folder, **{"tensorboard": False, "wandb": None, "total": 10, **options})


def fill(log: RunLog, steps: range) -> None:
    for step in steps:
        timed = {"samples": 4.0 * step, "seconds": time.perf_counter(), "seconds_per_step": 0.5, "memory_gib": 1.0}
        log.add(step, {"loss": 1 / step, "tangent_norm": 2.0 * step}, timed)


@pytest.mark.parametrize("stop", [0, 4, 10])
def test_the_file_after_a_stop_is_that_of_an_uninterrupted_run(tmp_path, stop):
    with log_of(tmp_path / "whole") as log:
        fill(log, range(1, 11))
    with log_of(tmp_path / "stopped") as log:
        fill(log, range(1, 8))
    with (tmp_path / "stopped/log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    with log_of(tmp_path / "stopped", start=min(stop, 7)) as log:
        fill(log, range(min(stop, 7) + 1, 11))
    found, expected = (computed(tmp_path / name / "log.jsonl") for name in ("stopped", "whole"))
    assert found == expected
    assert expected[-1].keys() == {"step", "loss", "tangent_norm", "samples"}


def test_a_line_holds_the_step_and_exact_values(tmp_path):
    with log_of(tmp_path) as log:
        log.add(3, {"loss": torch.tensor(0.1, dtype=torch.float64), "x": math.inf})
        assert read_lines(log.path) == [{"step": 3, "loss": 0.1, "x": math.inf}]  # written at once
        with pytest.raises(ValueError, match="step 3 was logged after step 3"):
            log.add(3, {"loss": 1.0})
    assert series(tmp_path / "log.jsonl") == {"loss": ([3], [0.1]), "x": ([3], [math.inf])}
    log.close()


def test_damage_in_the_middle_is_reported_and_left_alone(tmp_path):
    text = '{"step": 1, "loss": 1}\nnonsense\n{"step": 2, "loss": 1}\n'
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"log\.jsonl:2 is damaged"):
        log_of(tmp_path, start=2)
    assert (tmp_path / "log.jsonl").read_text() == text


def test_a_full_disk_leaves_the_old_log(tmp_path, monkeypatch):
    with log_of(tmp_path) as log:
        fill(log, range(1, 5))
    before = (tmp_path / "log.jsonl").read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        log_of(tmp_path, start=2)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_the_progress_line_shows_what_a_run_computes_and_how_fast(tmp_path, capsys):
    figures = dict.fromkeys(UNITS, 7.0) | {"utilisation": 0.345, "seconds_left": 93784.0}
    with log_of(tmp_path, start=4) as log:
        log.bar.mininterval = 0
        log.add(5, {"loss": 0.25, "tangent_norm": 3.0, "other": 1.0}, figures)
        log.bar.refresh()
    shown = capsys.readouterr().err
    assert "step 5/10, loss 0.25, tangent_norm 3, lr 7, 7 samples, 7 s/step, 7 samples/s, 7 tokens/s, " in shown
    assert "34.5% of peak, 7.0 GiB, 7 GiB moved/step, 1 d 2:03:04 left\n" in shown
    assert "other" not in shown
    assert "\r" not in shown  # which is no terminal: a line each


def test_seconds_go_on_where_the_last_kept_line_stopped(tmp_path):
    with log_of(tmp_path) as log:
        for step in range(1, 5):
            log.add(step, {"loss": 1.0}, {"seconds": 10.0 * step})
    with log_of(tmp_path, start=3) as log:
        assert log.seconds == 30


def test_tensorboard_has_every_value_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with log_of(tmp_path, tensorboard=True) as log:
        fill(log, range(1, 7))
    with log_of(tmp_path, tensorboard=True, start=3) as log:
        fill(log, range(4, 9))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "tangent_norm", "seconds_per_step", "memory_gib"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    assert events.Scalars("tangent_norm")[-1].value == 16


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install wandb, or set log\.wandb=null"):
        log_of(tmp_path, wandb="project")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install tensorboard, or set log\.tensorboard=false"):
        log_of(tmp_path, tensorboard=True)


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    calls: list[Any] = []

    class FakeRun:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values["loss"]))

        def finish(self) -> None:
            calls.append("finish")

    def init(**options: Any) -> FakeRun:
        calls.append(options)
        return FakeRun()

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for start in (0, 2):
        with log_of(tmp_path, wandb="project", start=start) as log:
            log.add(start + 1, {"loss": 0.5})
    first, second = (call for call in calls if isinstance(call, dict))
    assert first == second
    assert first["project"] == "project"
    assert first["resume"] == "allow"
    assert [call for call in calls if not isinstance(call, dict)] == [(1, 0.5), "finish", (3, 0.5), "finish"]


def test_curves_are_drawn_for_any_values(tmp_path):
    with log_of(tmp_path) as log:
        log.curves(tmp_path / "empty.png")
        for step in range(1, 11):
            log.add(step, {"loss": 10.0**-step, "zero": 0.0, "bad": math.nan, **({"late": -1.0} if step > 8 else {})})
        log.curves(tmp_path / "folder/curves.png")
    height, width, _ = imread(tmp_path / "folder/curves.png").shape
    assert height == 2 * 312  # four panels in two rows
    assert width == 3 * 480
    draw_curves({"one": ([1, 2], [1.0, 2.0])}, tmp_path / "one.png")
    assert imread(tmp_path / "one.png").shape[:2] == (312, 480)


# ---- grids


def pixels(path: Path) -> np.ndarray:
    return (imread(path)[..., :3] * 255).round().astype(int)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_in_its_place(tmp_path, channels):
    images = torch.rand(5, channels, 64, 70)
    grid(images, tmp_path / "grid.png", columns=3)
    found = pixels(tmp_path / "grid.png")
    assert found.shape == (2 * 66 - 2, 3 * 72 - 2, 3)
    for i, image in enumerate(images.expand(-1, 3, -1, -1)):
        top, left = i // 3 * 66, i % 3 * 72
        shown = found[top : top + 64, left : left + 70]
        np.testing.assert_array_equal(shown, (image.permute(1, 2, 0).numpy() * 255).round())
    assert (found[66:, 2 * 72 :] == 255).all()  # the empty place
    assert (found[64:66] == 255).all()


def test_small_images_are_enlarged_and_values_clamped(tmp_path):
    images = torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16)
    images[1, 0, 0, 0], images[0, 0, 7, 7] = 1.5, -3
    grid(images.requires_grad_(), tmp_path / "grid.png", columns=4)
    found = pixels(tmp_path / "grid.png")
    assert found.shape == (64, 130, 3)
    assert (found[:8, 66:74] == 255).all()
    assert (found[8:, 66:] == 0).all()
    assert (found[:, :64] == 0).all()


def test_a_video_is_a_row_of_frames(tmp_path):
    video = torch.linspace(0, 1, 17).reshape(1, 1, 17, 1, 1).expand(2, 3, 17, 64, 64)
    grid(video, tmp_path / "grid.png", columns=1)
    found = pixels(tmp_path / "grid.png")
    assert found.shape == (130, 8 * 66 - 2, 3)
    chosen = (np.linspace(0, 16, 8).round() / 16 * 255).round()
    np.testing.assert_array_equal(found[100, 10::66, 0], chosen)
    grid(video[:, :, :2], tmp_path / "short.png", columns=1)
    assert pixels(tmp_path / "short.png").shape == (130, 130, 3)


@pytest.mark.parametrize("shape", [(8, 8), (2, 2, 8, 8), (0, 1, 8, 8), (1, 4, 2, 8, 8)])
def test_a_grid_refuses_other_shapes(tmp_path, shape):
    with pytest.raises(ValueError, match="expected images"):
        grid(torch.zeros(shape), tmp_path / "grid.png", columns=2)


def test_a_grid_refuses_what_is_not_finite(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        grid(torch.full((1, 1, 8, 8), math.nan), tmp_path / "grid.png", columns=2)


def test_lines_are_json(tmp_path):
    with log_of(tmp_path) as log:
        log.add(1, {"loss": 0.5})
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "loss": 0.5}
