"""Runs of the trainer: exact resume after kill -9, stages, what stops it, LoRA, samples and export."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import jvpgraph
from jvpgraph import DualModule
from jvpgraph.trainer import settings
from jvpgraph.trainer.config import EMAConfig, RunConfig
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.model.dit import DiT, DiTConfig, call_dit, dit
from jvpgraph.trainer.run import folder as folder_module
from jvpgraph.trainer.run.checkpoint import CheckpointError
from jvpgraph.trainer.run.finished import evaluate_run, load_run, sample_run
from jvpgraph.trainer.run.folder import LOCK, check_folder, claimed
from jvpgraph.trainer.run.log import computed
from jvpgraph.trainer.run.not_finite import NotFinite
from jvpgraph.trainer.train import train
from jvpgraph.trainer.trigflow import TrigFlow

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "model": {
        "load": "tests.test_train:awake",
        "options": {"width": 16, "depth": 1, "heads": 2},
    },
    "student": {"backend": "eager"},
    "guidance": {"scale": 1.5, "negative": {"labels": 10}},
    "threads": 1,
    "device": "cpu",
    "checkpoint": {"every": 3, "keep": 2},
    "log": {"every": 1},
}


def awake(dtype: str = "float32", rounded: str = "float32", **config: int) -> TrigFlow:
    """A DiT at random whose gates and last layer are not zero: every parameter gets a gradient.

    In `dtype`, with weights that `rounded` can hold.
    """
    model = dit(**config)
    rng = torch.Generator().manual_seed(1)
    for parameter in model.net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=rng)
    return TrigFlow(model.net.to(getattr(torch, rounded)).to(getattr(torch, dtype)), call_dit)


RCM = {"name": "rcm", "weight": 0.1, "scm": {"tangent_warmup": 2}, "dmd": {"fake_updates_per_step": 2}}


def stage(objective: Any, steps: int, **more: Any) -> dict[str, Any]:
    return {"objective": objective, "steps": steps, "batch": 8, "student": {"lr": 1e-3}, "fake": {"lr": 1e-3}, **more}


def config_of(out: Path, stages: list[dict[str, Any]], **more: Any) -> RunConfig:
    return settings.from_dict(RunConfig, {**SMALL, "out": str(out), "stages": stages, **more})


def content(checkpoint: Path, scratch: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its path."""
    dcp_to_torch_save(checkpoint, scratch)
    found: dict[str, Tensor] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, child in value.items():
                visit(f"{path}.{key}", child)

    visit("", torch.load(scratch, weights_only=False))
    return found


def last_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


def run_until(config: RunConfig, step: int, folder: Path, delay: float) -> None:
    """Trains in a process of its own and kills it with SIGKILL, `delay` seconds after `step` is in the log."""
    file = folder / "config-to-run.yaml"
    settings.save(config, file)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "jvpgraph.trainer.cli", "train", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    log, deadline = config.out / "log.jsonl", time.monotonic() + 240
    while not (
        log.exists() and any(json.loads(line)["step"] >= step for line in log.read_text().splitlines(True)[:-1])
    ):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
    process.stderr.close()


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Killed twice, across stages, with a loader in two processes."""
    stages = [stage("dcm", 4), stage("scm", 4, accumulate=2), stage(RCM, 6, condition_dropout=0.2)]
    whole = train(config_of(tmp_path / "whole", stages))  # whose batches do not depend on who loads them
    config = config_of(tmp_path / "killed", stages, data={"workers": 2})
    at_random = random.Random(0)
    for step in (4, 9):
        run_until(config, step, tmp_path, delay=at_random.uniform(0, 0.15))
    train(config)

    for name in ("step-00000012", "step-00000014"):
        expected, found = (
            content(folder / "checkpoints" / name, tmp_path / "content.pt") for folder in (whole, config.out)
        )
        assert expected.keys() == found.keys()
        assert any(".fake_optimizer" in key for key in expected)
        different = [key for key in expected if not torch.equal(expected[key], found[key])]
        assert not different
    assert computed(whole / "log.jsonl") == computed(config.out / "log.jsonl")


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", [stage("dcm", 2)])
    train(config)
    before = content(last_checkpoint(config.out), tmp_path / "content.pt")
    train(config)
    after = content(last_checkpoint(config.out), tmp_path / "content.pt")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len((config.out / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.long
def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", [stage("dcm", 1)])
    train(config)
    other = config_of(tmp_path / "run", [stage("dcm", 2, student={"lr": 2e-3}), stage("scm", 1)], log={"every": 5})
    with pytest.raises(ValueError, match=r"stages\.0\.student\.lr") as raised:
        train(other)
    assert len(str(raised.value).splitlines()) == 3  # neither the log, nor what makes the run longer

    missing = {"load": "tests.test_train:awake", "options": {"height": 8}}
    with pytest.raises(ValueError, match="height"):
        train(config_of(tmp_path / "run", [stage("dcm", 1)], model=missing), fresh=True)
    assert not (tmp_path / "run-1").exists()  # moved aside only when the new run can start

    train(other, fresh=True)
    assert settings.load(RunConfig, tmp_path / "run-1" / "config.yaml") == config


@pytest.mark.long
def test_a_run_can_be_made_longer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jvpgraph.trainer")
    whole = train(config_of(tmp_path / "whole", [stage("dcm", 3), stage("scm", 2)]))
    (said,) = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert said == "attention with its tangent: 1 by blocks of torch ops, backward by ATen's flash for CPUs"
    train(config_of(tmp_path / "run", [stage("dcm", 2)]))
    longer = train(config_of(tmp_path / "run", [stage("dcm", 3), stage("scm", 2)]))
    expected, found = (content(last_checkpoint(folder), tmp_path / "content.pt") for folder in (whole, longer))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_when_every_checkpoint_is_damaged_nothing_is_begun_afresh(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", [stage("dcm", 2)])
    train(config)
    for file in (config.out / "checkpoints").glob("step-*/*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])
    log = (config.out / "log.jsonl").read_text()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        train(config)
    assert (config.out / "log.jsonl").read_text() == log


def test_a_folder_is_trained_in_by_one_process(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", [stage("dcm", 1)])
    train(config)
    later = replace(config, checkpoint=replace(config.checkpoint, every=777))
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(config.out / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        before = content_of(tmp_path)
        for fresh in (False, True):
            with pytest.raises(ValueError, match="another process is training in"):
                train(replace(config, ema=EMAConfig(snapshot_every=1)) if fresh else later, fresh=fresh)
            assert content_of(tmp_path) == before, "the folder of the run that is there stays as it is"
        other.communicate(b"\n")
    train(config)


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_lock_is_taken_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the other process came while this one built its networks."""
    config = config_of(tmp_path / "run", [stage("dcm", 1)])
    train(config)
    monkeypatch.setattr(folder_module, "locked", taken)
    before = content_of(tmp_path)
    for fresh in (False, True):
        with pytest.raises(ValueError, match="taken"), claimed(replace(config, threads=2), fresh=fresh):
            pass
        assert content_of(tmp_path) == before


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    raise ValueError("taken")
    yield


class Branching(DiT):
    """Its own Python looks at the data."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, r: Tensor | None = None) -> Tensor:
        return super().forward(x, t, labels, r) * (1.0 if int(labels.sum()) >= 0 else 2.0)


def branching(**config: int) -> TrigFlow:
    torch.manual_seed(0)
    net = Branching(DiTConfig(**config))
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return TrigFlow(net, call_dit)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's
def test_a_network_that_branches_on_data_is_captured_in_regions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And any other as one graph."""

    def told() -> str:
        return "\n".join(r.getMessage() for r in caplog.records if r.name == "jvpgraph.trainer.train")

    made: list[DualModule] = []
    transform = jvpgraph.transform
    monkeypatch.setattr(jvpgraph, "transform", lambda *args, **more: made.append(transform(*args, **more)) or made[-1])
    train(config_of(tmp_path / "plain", [stage("scm", 2)]))
    assert made[-1].regions.whole
    assert "regions" not in told()
    model = {"load": "tests.test_train:branching", "options": {"width": 16, "depth": 2, "heads": 2}}
    config = config_of(tmp_path / "run", [stage("scm", 2)], model=model)
    found = train(config)
    assert "captured in regions: 4 regions" in told()
    assert "2 x Block (net.blocks.0, ...): 1 graph, " in str(made[-1].regions)
    expected = train(replace(config, out=tmp_path / "ops", student=replace(config.student, backend="op_by_op")))
    expected, found = (content(last_checkpoint(folder), tmp_path / "content.pt") for folder in (expected, found))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_how_the_student_runs_may_change_between_a_stop_and_going_on(tmp_path: Path) -> None:
    """Other processes may want another backend, and have less room."""
    one = train(config_of(tmp_path / "one", [stage("scm", 4)]))
    train(config_of(tmp_path / "run", [stage("scm", 2)]))
    settings_of_student = {"backend": "op_by_op", "checkpoint_blocks": True}
    again = config_of(tmp_path / "run", [stage("scm", 4)], student=settings_of_student)
    check_folder(replace(again, student=replace(again.student, compile=True)))
    expected, found = (content(last_checkpoint(folder), tmp_path / "content.pt") for folder in (one, train(again)))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_compiled_networks_give_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    compiled: list[type] = []
    original = nn.Module.compile

    def compile_and_note(module: nn.Module, **settings: Any) -> None:
        compiled.append(type(module))
        assert settings.pop("backend").compiler == "inductor"
        original(module, backend=jvpgraph.backend(compiler), **settings)

    monkeypatch.setattr(nn.Module, "compile", compile_and_note)
    plain, fast = (
        train(config_of(tmp_path / str(on), [stage(RCM, 4)], student={"backend": "eager", "compile": on}))
        for on in (False, True)
    )
    assert compiled == [TrigFlow] * 4  # teacher, student, and the fake score, which is tried first
    expected, found = (content(last_checkpoint(folder), tmp_path / "content.pt") for folder in (plain, fast))
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_stages_go_on_with_the_weights_of_the_one_before(tmp_path: Path) -> None:
    first = train(config_of(tmp_path / "first", [stage("dcm", 2)], checkpoint={"every": 1, "keep": 9}))
    both = train(config_of(tmp_path / "both", [stage("dcm", 2), stage("scm", 1)], checkpoint={"every": 1, "keep": 9}))
    name = "step-00000002"
    end, begin, after = (
        content(path, tmp_path / "content.pt")
        for path in (first / "checkpoints" / name, both / "checkpoints" / name, last_checkpoint(both))
    )
    weights = [key for key in end if key.startswith(".student.")]
    assert all(torch.equal(end[key], begin[key]) for key in weights)
    moved = max((after[key] - begin[key]).abs().max().item() for key in weights)
    assert 0 < moved < 2e-3  # one AdamW step with lr 1e-3


@pytest.mark.long
def test_without_its_weight_rcm_trains_like_scm_to_the_bit(tmp_path: Path) -> None:
    scm = train(config_of(tmp_path / "scm", [stage("scm", 3)]))
    rcm = train(config_of(tmp_path / "rcm", [stage({"name": "rcm", "weight": 0.0}, 3)]))
    expected, found = (content(last_checkpoint(folder), tmp_path / "content.pt") for folder in (scm, rcm))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.slow
def test_the_fake_score_moves_from_its_first_step(tmp_path: Path) -> None:
    objective = {"name": "dmd", "fake_updates_per_step": 1}
    config = config_of(tmp_path / "run", [stage(objective, 1)])
    train(config)
    state = content(last_checkpoint(config.out), tmp_path / "content.pt")
    start = awake(width=16, depth=1, heads=2)
    still = [name for name, p in start.named_parameters() if torch.equal(state[f".fake.{name}"], p)]
    assert all("interval" in name for name in still)  # of MeanFlow alone


def test_gradient_clipping_bounds_the_update(tmp_path: Path) -> None:
    """AdamW does not care for the scale of one gradient, but for that of the second relative to the first."""
    ends = []
    for clip in (None, 1e-3):
        student = {"lr": 1e-3, "clip_norm": clip, "betas": [0.9, 0.999]}
        config = config_of(tmp_path / f"clip-{clip}", [stage("dcm", 3, student=student)])
        train(config)
        ends.append(content(last_checkpoint(config.out), tmp_path / "content.pt"))
    moments = [end for end in ends[0] if "exp_avg_sq" in end]
    unclipped, clipped = (sum(end[key].sum().item() for key in moments) for end in ends)
    assert clipped <= 3 * 1e-3 * 1e-6 * 1.01  # (1 - beta_2) times the sum of three squared norms of at most 1e-3
    assert unclipped > 100 * clipped


# ---------------------------------------------------------------- what stops a run


class Fragile(nn.Module):
    """A DiT whose second block breaks as told: in its value, its tangent, or its gradient."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.dit = awake(width=16, depth=2, heads=2).net
        self.dit.blocks[1].mlp.append(Breaks(how))

    def forward(self, *args: Any) -> Tensor:
        return self.dit(*args)


class Breaks(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "value":
            return x / torch.zeros_like(x)
        # the square root of zero: its value is fine, its derivative is not
        spike = (x - x).abs().sqrt() if self.how == "tangent" else 0
        return x + spike


def fragile(how: str) -> TrigFlow:
    return TrigFlow(Fragile(how), call_dit)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("how", "objective", "culprit"),
    [
        ("value", "dcm", r"the output of \w+\.net\.dit\.blocks\.1\.mlp"),
        ("tangent", "scm", r"blocks\.1\.mlp.*sqrt"),
        ("tangent", "dcm", r"the gradient at the output of student\.net\.dit\.blocks\.1\.mlp"),
    ],
    ids=["value", "tangent", "gradient"],
)
def test_what_is_not_finite_ends_the_run_and_is_named(
    tmp_path: Path, how: str, objective: str, culprit: str, again: bool
) -> None:
    model = {"load": "tests.test_train:fragile", "options": {"how": how}}
    student = {"backend": "eager", "checkpoint_blocks": again}
    config = config_of(tmp_path / "run", [stage(objective, 3)], model=model, student=student)
    with pytest.raises(NotFinite, match=culprit) as raised:
        train(config)
    assert "student, step 1" in str(raised.value)
    assert last_checkpoint(config.out).name == "step-00000000"


def test_data_that_is_not_finite_is_named_by_its_sample(tmp_path: Path) -> None:
    config = config_of(
        tmp_path / "run", [stage("flow_matching", 3)], data={"source": {"load": "tests.test_train:spoiled_digits"}}
    )
    with pytest.raises(NotFinite, match=r"the data: x0 of sample digits/\d+") as raised:
        train(config)
    assert "of 8 samples (digits/" in str(raised.value)


def spoiled_digits() -> Any:
    from jvpgraph.trainer.data.digits import digits

    data = digits()
    data.x0[SPOILED] = torch.nan
    return data


@pytest.mark.parametrize(("cause", "words"), [("data", "x0 of sample digits/{spoiled} reaches 1e+30"), ("rate", "")])
def test_a_gradient_too_large_for_float32_is_named(tmp_path: Path, cause: str, words: str) -> None:
    """Finite itself, but not the sum of its squares."""
    data = {"source": {"load": "tests.test_train:huge_digits"}} if cause == "data" else {}
    wild = stage("flow_matching", 400, student={"lr": 1e-3 if cause == "data" else 3e4})
    config = config_of(tmp_path / "run", [wild], data=data, log={"every": 1000})
    with pytest.raises(NotFinite) as raised:
        train(config)
    said = str(raised.value)
    assert "does not repeat itself" not in said
    assert words.format(spoiled=SPOILED) in said
    assert "--change stages.0.student.lr" in said
    assert said.splitlines()[-1].startswith("  Nothing of this update reached the weights")


def huge_digits() -> Any:
    data = spoiled_digits()
    data.x0[SPOILED] = 1e30
    return data


SPOILED = int(np.random.default_rng((0, 0)).permutation(1797)[3])
"""In the first batch, and none of those that are looked at before the first step."""


def test_an_objective_that_does_not_fit_the_network_is_refused(tmp_path: Path) -> None:
    model = {"load": "tests.test_train:one_time"}
    with pytest.raises(ValueError, match="mean_flow needs a network with a second time, and DiT takes none: set"):
        train(config_of(tmp_path / "run", [stage("mean_flow", 1)], model=model))
    with pytest.raises(ValueError, match="condition_dropout needs a negative condition to drop to"):
        train(config_of(tmp_path / "other", [stage("dcm", 1, condition_dropout=0.1)], guidance={}))
    with pytest.raises(ValueError, match=r"guidance\.scale is 2\.0 and there is no negative condition"):
        train(config_of(tmp_path / "third", [stage("dcm", 1)], guidance={"scale": 2.0}))


def one_time() -> TrigFlow:
    return TrigFlow(dit(width=16, depth=1, heads=2).net, lambda net, x, time, cond: net(x, time, cond["labels"]))


# ---------------------------------------------------------------- every objective, LoRA, bf16; what comes after


@pytest.mark.long
@pytest.mark.parametrize("objective", ["scm", "dmd", RCM, "dcm", "mean_flow", "flow_matching"], ids=str)
def test_every_objective_trains_and_is_sampled(tmp_path: Path, objective: Any) -> None:
    config = config_of(
        tmp_path / "run",
        [stage(objective, 3)],
        student={"backend": "eager", "checkpoint_blocks": objective == "scm"},
        log={"every": 1, "preview_every": 3, "preview_count": 4, "tensorboard": objective == "scm"},
    )
    folder = train(config)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["gradient_norm"] > 0
    assert (folder / "samples" / "step-00000003.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "curves.png").exists()
    with pytest.raises(ValueError, match="1798 samples asked for, and the data set has 1797"):
        sample_run(folder, steps=1, count=1798, ema=None, seed=0, out=tmp_path / "samples")
    picture = sample_run(folder, steps=2, count=3, ema=None, seed=0, out=tmp_path / "samples")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_a_lora_student_in_bf16_trains_its_adapters_alone_and_is_exported_merged(tmp_path: Path) -> None:
    lora = {"rank": 2, "alpha": 2.0, "targets": ["qkv", "out"]}
    model = {**SMALL["model"], "options": {**SMALL["model"]["options"], "dtype": "bfloat16"}}
    config = config_of(tmp_path / "run", [stage(RCM, 4)], student={"backend": "eager", "lora": lora}, model=model)
    folder = train(config)
    state = content(last_checkpoint(folder), tmp_path / "content.pt")
    trained = [key for key in state if key.startswith(".student.")]
    assert trained
    assert all("lora" in key for key in trained)

    exported = dit(path=export_run(folder, tmp_path / "net"), dtype="float32").net
    base = awake(**model["options"]).net
    changed = {
        name for (name, a), b in zip(exported.named_parameters(), base.parameters()) if not torch.equal(a, b.float())
    }
    assert changed == {"blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight"}


@pytest.mark.long
def test_precisions_of_tangents_go_by_module(tmp_path: Path) -> None:
    model = {**SMALL["model"], "options": {**SMALL["model"]["options"], "dtype": "bfloat16"}}
    how = {"model": model, "student": {"backend": "op_by_op"}}
    wrong = config_of(tmp_path / "run", [stage("scm", 2)], **how, precision={"tangent": {"net.block.0": "model"}})
    with pytest.raises(ValueError, match=r"no module is called 'net.block.0'; did you mean 'net.blocks.0'"):
        train(wrong)
    losses = []
    for tangent in ("float32", {"*": "float32"}, {"net.blocks.0": "model"}):
        config = config_of(tmp_path / "run", [stage("scm", 2)], **how, precision={"tangent": tangent})
        lines = (train(config, fresh=True) / "log.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[-1])["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_averages_of_other_widths_come_from_snapshots(tmp_path: Path) -> None:
    ema = {"sigma_rel": [0.05, 0.2], "snapshot_every": 3}
    config = config_of(tmp_path / "run", [stage("dcm", 8, student={"lr": 1e-2})], ema=ema)
    folder = train(config)
    assert export_run(folder, tmp_path / "early", step=6).is_dir()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5, only of 6, 8"):
        load_run(folder, step=5)
    tracked, other, last = (load_run(folder, ema=width).student.net for width in (0.05, 0.15, 0.2))
    weights = [net.patch_out.weight for net in (tracked, other, last)]
    assert not torch.equal(weights[0], weights[1])
    # an average of a width in between lies in between
    assert (weights[1] - weights[0]).norm() < (weights[2] - weights[0]).norm()


def test_evaluation_compares_the_student_with_its_teacher(tmp_path: Path) -> None:
    evaluation = {"features": {"load": "jvpgraph.trainer.features:pixels"}, "count": 120, "seeds": [0, 1]}
    config = config_of(
        tmp_path / "run", [stage("dcm", 1)], evaluation=evaluation, sampling={"steps": [1, 2], "teacher_steps": 3}
    )
    folder = train(config)
    report = evaluate_run(folder)
    assert list(report.rows) == ["teacher, 3 steps", "student, 1 step", "student, 2 steps"]
    assert all(len(qualities) == 2 for qualities in report.rows.values())
    assert "±" in str(report)
    assert json.loads((folder / "evaluation.json").read_text())["seeds"] == [0, 1]


def half_decoder(built: str) -> Any:
    with open(built, "a") as file:
        file.write("built\n")
    return lambda latents: latents / 2


def test_a_decoder_is_built_once_for_an_evaluation(tmp_path: Path) -> None:
    """Pixels that are all halved are a quarter of the squared distance apart."""
    evaluation = {"features": {"load": "jvpgraph.trainer.features:pixels"}, "count": 120, "seeds": [0]}
    built, distances = tmp_path / "built", []
    halved = {"load": "tests.test_train:half_decoder", "options": {"built": str(built)}}
    for name, decode in (("plain", None), ("decoded", halved)):
        sampling = {"steps": [1], "teacher_steps": 2, "batch": 50, "decode": decode}
        folder = train(config_of(tmp_path / name, [stage("dcm", 1)], evaluation=evaluation, sampling=sampling))
        distances.append(evaluate_run(folder).rows["student, 1 step"][0].frechet_distance)
    assert built.read_text() == "built\n"
    assert distances[1] == pytest.approx(distances[0] / 4, rel=1e-4)


def test_export_comes_back(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", [stage("dcm", 2)])
    folder = train(config)
    out = export_run(folder, tmp_path / "net")
    again, run = dit(path=out).net, load_run(folder)
    assert isinstance(again, DiT)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), run.student.net.parameters()))
    with pytest.raises(ValueError, match="is not empty"):
        export_run(folder, out)
    with pytest.raises(FileNotFoundError, match="does not exist: the folder of a run"):
        load_run(tmp_path)
