"""The watch of a run: its figures, its warnings, and the average to go back to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.data.digits import digits
from jvpgraph.trainer.data.sample import some_samples
from jvpgraph.trainer.model.networks import with_weights
from jvpgraph.trainer.model.quantize import quantize
from jvpgraph.trainer.model.student import LoRA, make_student, merged
from jvpgraph.trainer.run.decay import Watch, compared, moved, of_pictures, signs
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.run.log import computed, read_lines
from jvpgraph.trainer.run.ranks import Ranks
from jvpgraph.trainer.train import train
from tests.test_train import awake, config_of, stage

COUNT = 512  # of pictures
ERROR = 0.1  # of figures of so many


def pictures(*shape: int) -> Tensor:
    return torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def smoothed(x: Tensor) -> Tensor:
    return (x + x.roll(1, -1) + x.roll(1, -2) + x.roll((1, 1), (-1, -2))) / 2


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 2, 8, 12)], ids=["pictures", "clips"])
def test_figures(shape: tuple[int, ...]) -> None:
    real = pictures(*shape)
    other = torch.randn(2 * COUNT, *shape, dtype=torch.float64)
    as_it_should_be = dict.fromkeys(("variance", "power_coarse", "power_middle", "power_fine", "diversity"), 1.0)
    assert compared(other, real, 2) == pytest.approx({"shift": 0.0, **as_it_should_be}, abs=ERROR)
    assert not signs(compared(other, real, 2), compared(other, real, 2))

    channel = torch.ones(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).double()
    channel[0] = -1
    figures = compared(2 * other + 0.5 * channel, real, 2)
    assert figures["shift"] == pytest.approx(0.5, abs=ERROR)
    assert figures["variance"] == pytest.approx(4, rel=ERROR)
    assert figures["diversity"] == pytest.approx(2, rel=ERROR)
    assert figures["power_fine"] == pytest.approx(4, rel=ERROR)

    blurred = compared(smoothed(other), real, 2)
    assert blurred["power_fine"] < 0.4 < 2 < blurred["power_coarse"]
    alike = compared(real.repeat_interleave(2, 0), real, 2)
    assert alike["diversity"] == pytest.approx(0, abs=1e-12)
    assert alike["variance"] == pytest.approx(1, rel=1e-2)


def test_what_has_no_pixels_or_no_repeats_has_fewer_figures() -> None:
    assert {*compared(pictures(5), pictures(5), 1)} == {"shift", "variance"}
    assert {*compared(pictures(4, 2, 8), pictures(4, 2, 8), 1)} == {"shift", "variance"}


def test_figures_of_pictures() -> None:
    real = torch.linspace(0, 1, 1001)
    assert of_pictures(real, real) == {"brightness": 0, "clipped": 0}
    darker = of_pictures((real - 0.3).clamp(0, 1), real)
    assert darker["brightness"] == pytest.approx(-0.255, abs=0.01)
    assert darker["clipped"] == pytest.approx(0.3 - 0.02, abs=0.01)


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"shift": 0.5}, "brightness or colour"),
        ({"variance": 0.5}, "fade"),
        ({"variance": 2.0}, "saturate"),
        ({"power_fine": 0.3}, "lose detail"),
        ({"diversity": 0.3}, "become alike"),
        ({"diversity": 0.5}, None),  # it was 0.6 at first
        ({"brightness": -0.3}, "darken"),
        ({"clipped": 0.2}, "black or white"),
    ],
)
def test_signs(figures: dict[str, float], words: str | None) -> None:
    found = signs(figures, {**figures, "diversity": 0.6})
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_how_far_the_weights_are_from_the_start() -> None:
    teacher = awake()
    student = make_student(teacher, dtype="bfloat16", lora=None, checkpoint_blocks=False)
    weights = {name: 1.5 * p.detach().float() for name, p in teacher.named_parameters()}
    assert moved(with_weights(student, weights).requires_grad_(True), teacher, Ranks()) == pytest.approx(0.5, rel=1e-2)

    adapted = make_student(teacher, dtype=None, lora=LoRA(2, 8.0, ("qkv",)), checkpoint_blocks=False)
    assert moved(adapted, teacher, Ranks()) == 0
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    before, after = (dict(net.named_parameters()) for net in (teacher.net, merged(adapted)))
    names = [name for name in before if not torch.equal(before[name], after[name])]
    change = sum((after[name] - before[name]).square().sum() for name in names)
    whole = sum(before[name].square().sum() for name in names)
    assert names
    right = pytest.approx((change / whole).sqrt().item(), rel=1e-4)
    assert moved(adapted, teacher, Ranks()) == right
    assert moved(adapted, teacher, TwoAlike()) == right


class TwoAlike(Ranks):
    """Two processes with copies of the same network, as dp_replicate has them."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2

    def gather(self, work: Any) -> list[Any]:
        return [work(), work()]


def test_how_far_they_are_from_a_teacher_in_bytes() -> None:
    teacher = awake()
    student = make_student(teacher, dtype=None, lora=None, checkpoint_blocks=False)
    off = moved(student, quantize(teacher, "int8"), Ranks())
    assert off is not None
    assert 0 < off < 0.02  # what the bytes have rounded


def test_a_figure_that_comes_with_a_decoder_after_a_stop_is_compared_with_its_own_first() -> None:
    watch = Watch(config_of(Path("run"), [stage("dcm", 1)]), Ranks(), None, digits_batch(), {}, [0])
    assert watch.judge(2, {"variance": 1.0}) == []
    assert watch.judge(4, {"variance": 1.0, "diversity": 0.5}) == []
    assert "become alike" in watch.judge(6, {"variance": 1.0, "diversity": 0.2})[0]
    assert watch.good == [0, 2, 4]


def digits_batch() -> Batch:
    return some_samples(digits(), 2)


def watched(out: Path, steps: int = 8, **more: Any) -> Any:
    spoiling = stage("dcm", steps, student={"lr": 0.3})
    watch = {"every": 2, "count": 8, "repeats": 2, "steps": 1}
    return config_of(out, [spoiling], watch=watch, checkpoint={"every": 2, "keep": 1}, **more)


@pytest.mark.slow
def test_a_run_that_spoils_is_warned_of_and_has_an_average_from_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = watched(tmp_path / "run", ema={"sigma_rel": [0.1, 0.05], "snapshot_every": 2})
    with caplog.at_level(logging.WARNING):
        train(config)
    looks = [line for line in read_lines(config.out / "log.jsonl") if "watch/variance" in line]
    assert [line["step"] for line in looks] == [2, 4, 6, 8]
    assert looks[-1]["watch/distance"] > looks[0]["watch/distance"] > 0
    warned = [record.message for record in caplog.records if "watch" in record.name or "decay" in record.name]
    assert warned
    assert "It was well at step" in warned[-1]

    assert not (config.out / "checkpoints" / "step-00000004").exists()
    early, late = load_run(config.out, step=4), load_run(config.out)
    assert (early.step, late.step) == (4, 8)
    assert not torch.equal(next(early.student.parameters()), next(late.student.parameters()))
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3"):
        load_run(config.out, step=3)


@pytest.mark.long
def test_a_stop_changes_no_figure_and_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor does the watch change the run."""
    said: dict[str, list[str]] = {}
    for name, parts in (("whole", (8,)), ("stopped", (4, 8))):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for steps in parts:
                train(watched(tmp_path / name, steps))
        said[name] = [r.message.replace(name, "") for r in caplog.records if "decay" in r.name]
    whole, stopped = (computed(tmp_path / name / "log.jsonl") for name in ("whole", "stopped"))
    assert whole == stopped
    assert said["whole"] == said["stopped"] != []
