"""How fast a run goes, by hand; what is said while graphs are compiled; and FLOPs from a process beside the run."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.data.sample import Sample
from jvpgraph.trainer.plan.flops import Counted, Counts, Query, count, tokens_of
from jvpgraph.trainer.plan.machines import GPUS, gpu_named
from jvpgraph.trainer.plan.plan import plan_run
from jvpgraph.trainer.plan.subject import network_of
from jvpgraph.trainer.run import pace as module
from jvpgraph.trainer.run.compiling import Compiling
from jvpgraph.trainer.run.log import computed, read_lines
from jvpgraph.trainer.run.pace import TIMED, UNITS, Pace, peak_of, samples_until
from jvpgraph.trainer.train import train
from tests.test_train import config_of, stage

pytestmark = pytest.mark.usefixtures("one_thread")

DIT = {"load": "jvpgraph.trainer.dit:dit", "options": {"width": 16, "depth": 2, "heads": 2}}
DIGITS = ("labels", (), "int64")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


class Known:
    """FLOPs that are known at once: 100 for a sample of the student, 10 for one of the fake score; 16 tokens."""

    def of(self, query: Query) -> Counted:
        return Counted(100.0 * query.size, 10.0 * query.size, 16)


def batch(size: int, side: int = 8) -> Batch:
    return Batch(torch.zeros(size, 1, side, side), {"labels": torch.zeros(size, dtype=torch.int64)})


def take(
    pace: Pace, clock: Clock, seconds: float, of_student: list[Batch], of_fake: Sequence[Batch] = (), index: int = 0
) -> None:
    with pace.step(index):
        for name, batches in (("student", of_student), ("fake", of_fake)):
            for one in batches:
                pace.saw(name, one)
        clock.now += seconds


def test_accumulated_batches_of_a_part_beside_a_fake_score(tmp_path: Path, clock: Clock) -> None:
    """Two forwards of 4 samples per update in each of two parts that two processes share, and 75 s to compile."""
    config = config_of(tmp_path, [stage("dcm", 10, batch=8, accumulate=2)])
    pace = Pace(config, Known(), Compiling(None), parts=2, split=2, peak=1000.0, seconds=50.0)
    student, fake = [batch(4)] * 2, [batch(4)] * 6
    take(pace, clock, 75.0, student, fake)
    first = pace.line(1, 2.5)
    assert first == {"samples": 16, "seconds": 125.0, "memory_gib": 2.5}  # nothing is known of its speed
    for _ in range(3):
        take(pace, clock, 4.0, student, fake)
    clock.now += 3.0  # a save
    line = pace.line(4, 2.5)
    assert line == {
        "samples": 64,
        "seconds": 140.0,
        "memory_gib": 2.5,
        "seconds_per_step": 4.0,
        "samples_per_second": 4.0,
        "samples_per_second_each": 2.0,
        "tokens_per_second": 64.0,
        "flops_per_second": (2 * 400 + 6 * 40) / 2 / 4.0,
        "utilisation": 0.13,
        "seconds_left": 6 * 5.0,  # saves come again, compiling does not
    }
    assert {*line} <= {*UNITS}
    take(pace, clock, 2.0, student, fake)
    assert pace.line(5, 2.5)["samples_per_second"] == 8.0  # of the last line alone


def test_a_critic_without_a_fake_score_counts_as_what_is_trained_beside_the_student() -> None:
    known = Counted(400.0, 40.0, 16)
    assert [known.of(name) for name in ("student", "fake", "critic")] == [400.0, 40.0, 40.0]


def test_the_documentation_has_every_figure_with_its_unit() -> None:
    told = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text(encoding="utf-8")
    for name, unit in UNITS.items():
        assert f"| `{name}` | {unit} |" in told


def test_buckets_whose_first_batches_do_not_count(tmp_path: Path, clock: Clock) -> None:
    config = config_of(tmp_path, [stage("dcm", 100, batch=4)])
    pace = Pace(config, Known(), Compiling(None))
    for seconds, side in ((50.0, 8), (6.0, 8), (60.0, 16), (6.0, 8), (12.0, 16)):
        take(pace, clock, seconds, [batch(4, side)])
    line = pace.line(5, 1.0)
    assert line["seconds_per_step"] == 8.0
    assert line["samples_per_second"] == 0.5
    assert line["flops_per_second"] == 3 * 400 / 24
    assert line["seconds_left"] == 95 * 8.0
    assert "utilisation" not in line


def test_a_stage_has_a_pace_of_its_own(tmp_path: Path, clock: Clock) -> None:
    config = config_of(tmp_path, [stage("dcm", 4, batch=4), stage("dcm", 6, batch=8, accumulate=3)])
    assert [samples_until(config, step) for step in (0, 3, 4, 5, 10)] == [0, 12, 16, 40, 160]
    pace = Pace(config, None, Compiling(None))
    for seconds in (9.0, 1.0, 1.0, 1.0):
        take(pace, clock, seconds, [batch(4)])
    assert pace.line(4, 1.0)["seconds_left"] == 6.0
    for seconds in (9.0, 5.0):
        take(pace, clock, seconds, [batch(8)] * 3, index=1)
    line = pace.line(6, 1.0)
    assert line["seconds_left"] == 4 * 5.0
    assert line["samples_per_second"] == 24 / 5


def test_flops_wait_until_all_shapes_of_a_line_are_counted(tmp_path: Path, clock: Clock) -> None:
    class Half(Known):
        def of(self, query: Query) -> Counted | None:
            return super().of(query) if query.latents[-1] == 8 else None

    pace = Pace(config_of(tmp_path, [stage("dcm", 100, batch=4)]), Half(), Compiling(None))
    for side in (8, 16, 8, 16):
        take(pace, clock, 10.0, [batch(4, side)])
    assert "flops_per_second" not in pace.line(4, 1.0)
    take(pace, clock, 10.0, [batch(4)])
    assert pace.line(5, 1.0)["flops_per_second"] == 40.0


class TwoShapes:
    buckets = range(4), range(4, 8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Sample:
        return Sample(str(index), torch.full((3, 4, 4 + index // 4), index / 8), {})


def two_shapes() -> TwoShapes:
    return TwoShapes()


def test_two_shapes_are_compiled_with_a_word_for_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more: dict[str, Any] = {
        "model": {"load": "tests.test_buckets:convolution", "options": {"dtype": "float32"}},
        "data": {"source": {"load": "tests.test_pace:two_shapes"}},
        "guidance": {},
        "log": {"every": 2},
        "student": {"backend": "eager"},
    }
    caplog.set_level(logging.INFO, "jvpgraph.trainer")
    rates = {"student": {"lr": 1e-4, "warmup": 4}, "batch": 2, "accumulate": 2}
    folder = train(config_of(tmp_path / "run", [stage("scm", 6, **rates)], **more))
    said = [m for m in caplog.messages if m.startswith("compiling")]
    shapes = [re.search(r"the student's graph for latents (\[2, 3, 4, \d\]): once per shape", m)[1] for m in said]
    assert sorted(shapes) == ["[2, 3, 4, 4]", "[2, 3, 4, 5]"]
    lines = read_lines(folder / "log.jsonl")
    assert [line["samples"] for line in lines] == [8, 16, 24]
    assert [line["lr"] for line in lines] == pytest.approx([0.5e-4, 1e-4, 1e-4])
    assert {*lines[-1]} - {*computed(folder / "log.jsonl")[-1]} == {*lines[-1]} & TIMED
    assert {"seconds", "memory_gib", "samples_per_second", "seconds_left"} <= {*lines[-1]}


def test_on_a_terminal_the_progress_line_counts_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jvpgraph.trainer.run.compiling.EVERY", 0.01)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shown: list[str] = []
    compiling = Compiling(shown.append)
    compiling.doing = "a graph"

    def slow(gm: Any, inputs: Any) -> Any:
        for _ in range(200):
            if shown:
                return gm
            torch.zeros(1).add(1)
            compiling.done.wait(0.01)
        return gm

    with compiling.step():
        torch.compile(nn.Linear(2, 2), backend=slow)(torch.zeros(1, 2))
    assert compiling.happened
    assert shown[0].startswith("compiling a graph, 0 s")
    with compiling.step():
        pass
    assert not compiling.happened


@pytest.mark.long
def test_flops_beside_a_run_are_those_of_its_plan(tmp_path: Path) -> None:
    """From the other process; recomputation of blocks, which a plan counts, is none of the model's."""
    config = config_of(tmp_path, [stage("dcm", 10, batch=4)], model=DIT)
    (plan,) = plan_run(config, processes=1)
    with Counts(config) as counts:
        query = Query(0, 4, (1, 8, 8), (DIGITS,))
        assert counts.of(query) is None
        assert counts.thread is not None
        counts.thread.join()
        counted = counts.of(query)
    assert counted is not None
    assert counted.student == plan.flops
    blocks = settings.from_dict(RunConfig, settings.to_dict(config) | {"student": {"checkpoint_blocks": True}})
    assert count(blocks, query) == counted
    assert plan_run(blocks, processes=1)[0].flops > plan.flops


@pytest.mark.long
def test_what_cannot_be_counted_is_left_out_with_one_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path, [stage("dcm", 10, batch=4)], model={"load": "tests.test_pace:unbuildable"})
    with Counts(config) as counts:
        query, other = Query(0, 4, (1, 8, 8)), Query(0, 4, (1, 16, 16))
        assert counts.of(query) is None
        assert counts.thread is not None
        counts.thread.join()
        assert counts.of(query) is counts.of(other) is None
        assert counts.thread is None  # and not tried again
    (said,) = caplog.messages
    assert "needs a table" in said
    assert "log.flops=false" in said


def unbuildable() -> None:
    raise RuntimeError("needs a table")


def test_tokens_are_the_positions_of_the_first_block(tmp_path: Path) -> None:
    config = config_of(tmp_path, [stage("dcm", 1)], model=DIT)
    sample = Batch(torch.empty(1, 1, 8, 8, device="meta"), {"labels": torch.empty(1, dtype=torch.int64, device="meta")})
    patch = config.model.options.get("patch", 2)
    assert tokens_of(network_of(config, "model"), sample) == (8 // patch) ** 2


def test_the_peak_is_stated_or_that_of_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_named("NVIDIA H100 80GB HBM3") == GPUS["h100"]
    assert gpu_named("NVIDIA A100-SXM4-40GB") == GPUS["a100-40gb"]
    for slower in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert gpu_named(slower) is None
    config = config_of(tmp_path, [stage("dcm", 1)])
    half, single = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4)
    assert peak_of(config, torch.device("cpu"), half) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    cuda = torch.device("cuda")
    assert peak_of(config, cuda, half) == 989e12
    assert peak_of(config, cuda, single) == 67e12
    assert peak_of(config, cuda, nn.Linear(4, 4).double()) is None
    stated = config_of(tmp_path, [stage("dcm", 1)], log={"peak_tflops": 2.5})
    assert peak_of(stated, torch.device("cpu"), single) == 2.5e12
