"""The command `jvpgraph`: what it calls, and that whatever goes wrong is said plainly and loses nothing."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jvpgraph.trainer import cli, export
from jvpgraph.trainer import train as training
from jvpgraph.trainer.commands import failures
from jvpgraph.trainer.commands import train as train_command
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.configs import names, ready
from jvpgraph.trainer.model.dit import dit
from jvpgraph.trainer.plug import Plug
from jvpgraph.trainer.run import finished
from jvpgraph.trainer.run.log import RunLog, computed
from jvpgraph.trainer.run.parallel import check, context_parallel, sizes_of
from jvpgraph.trainer.settings import load
from jvpgraph.trainer.trigflow import TrigFlow
from tests.tiny_runs import TINY

pytestmark = pytest.mark.usefixtures("one_thread", "tiny_folder")


@pytest.fixture
def failure(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must fail with `status`; returns what it said, which is no traceback."""

    def call(status: int, *argv: str) -> str:
        capfd.readouterr()
        assert cli.main(argv) == status
        said = capfd.readouterr().err
        assert "Traceback" not in said
        return said

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of tiny.yaml."""
    out, file = tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("settings") / "tiny.yaml"
    file.write_text(json.dumps(TINY))
    assert cli.main(["train", str(file), f"out={out}"]) == 0
    return out


def assert_same_run(one: Path, other: Path) -> None:
    assert computed(one / "log.jsonl") == computed(other / "log.jsonl")
    states = [finished.load_run(out).student.state_dict() for out in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def checkpoints() -> list[str]:
    return sorted(path.name for path in Path("run/checkpoints").iterdir())


# ---- what is called


@pytest.mark.slow
def test_train_makes_a_folder_that_goes_on(whole):
    assert load(RunConfig, whole / "config.yaml") == load(RunConfig, Path("tiny.yaml"), [f"out={whole}"])
    before = sorted((path, path.stat().st_mtime_ns) for path in (whole / "checkpoints").rglob("*"))
    assert cli.main(["train", "tiny.yaml", f"out={whole}"]) == 0  # done already
    assert sorted((path, path.stat().st_mtime_ns) for path in (whole / "checkpoints").rglob("*")) == before


def test_overrides_and_options_in_any_order(monkeypatch):
    calls = []
    monkeypatch.setattr(training, "train", lambda config, fresh, **_: calls.append((config, fresh)))
    for argv in (
        ["tiny.yaml", "seed=3", "threads=2", "--fresh"],
        ["tiny.yaml", "--fresh", "seed=3", "threads=2"],
        ["--fresh", "tiny.yaml", "seed=3", "threads=2"],
        ["tiny.yaml", "seed=3", "--fresh", "threads=2"],
    ):
        assert cli.main(["train", *argv]) == 0
    assert calls == [(load(RunConfig, Path("tiny.yaml"), ["seed=3", "threads=2"]), True)] * 4


@pytest.mark.parametrize("name", names())
def test_ready_settings_are_trained_by_name(monkeypatch, name):
    calls = []
    monkeypatch.setattr(training, "train", lambda config, fresh, **_: calls.append((config, fresh)))
    assert cli.main(["train", name, "out=elsewhere"]) == 0
    assert calls == [(load(RunConfig, ready(name), ["out=elsewhere"]), False)]


def test_the_other_commands_pass_their_arguments_on(monkeypatch, capsys):
    calls: list[Any] = []
    for module, name in ((finished, "sample_run"), (finished, "evaluate_run"), (export, "export_run")):
        monkeypatch.setattr(module, name, lambda *args, _name=name, **options: calls.append((_name, args, options)))
    folder, out = Path("run"), Path("x")
    sample = {"steps": 4, "count": 16, "ema": None, "seed": 0, "out": folder / "samples-4.png", "guidance": None}
    other = {"steps": 2, "count": 3, "ema": 0.2, "seed": 5, "out": out, "guidance": 3.5}
    nothing = dict.fromkeys(("ema", "step", "pipeline", "steps", "rank", "guidance"))
    plain: dict[str, Any] = {"format": "diffusers", "own_times": False, "keep_scale": False, **nothing}
    measure = {"steps": (1, 2), "seeds": (0, 7), "ema": 0.1}
    for argv, expected in {
        "sample run": ("sample_run", (folder,), sample),
        "sample run --steps 2 --count 3 --ema 0.2 --seed 5 --guidance 3.5 --out x": ("sample_run", (folder,), other),
        "evaluate run": ("evaluate_run", (folder,), {"steps": (), "seeds": (), "ema": None}),
        "evaluate run --steps 1 2 --seeds 0 7 --ema 0.1": ("evaluate_run", (folder,), measure),
        "export run --out x": ("export_run", (folder, out), plain),
        "export run --out x --keep-scale": ("export_run", (folder, out), plain | {"keep_scale": True}),
        "export run --out x --step 3 --ema 0.1": ("export_run", (folder, out), plain | {"ema": 0.1, "step": 3}),
        "export run --out x --format lora --rank 8 --pipeline p --times run --steps 2": (
            "export_run",
            (folder, out),
            plain | {"format": "lora", "rank": 8, "pipeline": Path("p"), "own_times": True, "steps": 2},
        ),
    }.items():
        assert cli.main(argv.split()) == 0
        assert calls.pop() == expected


def test_sample_and_export_of_a_real_run(whole, capsys):
    assert cli.main(["sample", str(whole), "--steps", "1", "--count", "3", "--out", "picture.png"]) == 0
    assert capsys.readouterr().out == "picture.png\n"
    assert Path("picture.png").stat().st_size > 100
    assert cli.main(["export", str(whole), "--out", "net"]) == 0
    assert any(Path("net").iterdir())


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "steps of linear" in shown or "updates of linear rise of lr" in shown  # a comment of config.py
    assert "checkpoint" in shown
    assert "one of these" in shown


# ---- wrong usage


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "trian tiny.yaml",
        "train",
        "train tiny.yaml --frehs",
        "train tiny.yaml --fresh=1",
        "export run --format gguf",
        "sample run --steps 0",
        "sample run --steps x",
        "sample run extra",
        "evaluate run --seeds",
    ],
)
def test_wrong_usage_is_status_2(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv.split())
    assert stop.value.code == 2
    assert "usage: jvpgraph" in capsys.readouterr().err


def test_wrong_settings_are_status_2_and_touch_nothing(failure):
    assert "missing.yaml  no such file" in failure(2, "train", "missing.yaml")
    assert "no ready settings: those are digits" in failure(2, "train", "missing")
    said = failure(2, "train", "tiny.yaml", "stages.0.stepz=3", "seed=x", "modl.load=a")
    assert "3 problems in the settings" in said
    assert "stages.0.stepz: unknown key; did you mean 'steps'?" in said
    assert "seed: expected int, got 'x'" in said
    assert "modl: unknown key; did you mean 'model'?" in said
    Path("tiny.yaml").write_text("out: run\nstages:\n- steps: ten\n")
    said = failure(2, "train", "tiny.yaml")
    assert "tiny.yaml:3  stages.0.steps: expected int, got 'ten'" in said
    assert "tiny.yaml:1  model: missing" in said
    assert not Path("run").exists()


def test_a_wrong_model_function_is_status_2(failure):
    assert "did you mean dit?" in failure(2, "train", "tiny.yaml", "model.load=jvpgraph.trainer.dit:dti")
    assert "there is no module nowhere" in failure(2, "train", "tiny.yaml", "out=b", "model.load=nowhere:dit")
    assert "widht" in failure(2, "train", "tiny.yaml", "out=c", "model.options.widht=3")


# ---- failures


def test_a_folder_that_is_no_run_is_status_1(failure):
    for argv in (["sample", "tiny"], ["evaluate", "tiny"], ["export", "tiny", "--out", "net"]):
        said = failure(1, *argv)
        assert "tiny/config.yaml does not exist" in said
        assert "the folder of a run" in said
    assert not Path("net").exists()


def test_a_folder_of_another_run_is_left_alone(failure, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    said = failure(1, "train", "tiny.yaml", f"out={whole}", "stages.0.student.lr=0.5", "log.every=3")
    assert "stages.0.student.lr: 0.001 -> 0.5" in said
    assert "--fresh" in said
    assert "log" not in said.replace(str(whole), "")  # may change
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_fresh_moves_the_old_run_aside(whole):
    assert cli.main(["train", "tiny.yaml", "stages.0.steps=1"]) == 0
    assert cli.main(["train", "tiny.yaml", "--fresh"]) == 0
    assert load(RunConfig, Path("run-1/config.yaml")).stages[0].steps == 1
    assert_same_run(Path("run"), whole)


def test_an_out_that_cannot_be_a_folder(failure):
    Path("file").write_text("")
    assert "file/run: Not a directory" in failure(1, "train", "tiny.yaml", "out=file/run")


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_loses_no_checkpoint(failure, whole, monkeypatch, asynchronous):
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if "step-00000003" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    argv = ["train", "tiny.yaml", f"checkpoint.asynchronous={asynchronous}"]
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        said = failure(1, *argv)
    assert "No space left on device" in said
    assert "Free some space" in said
    assert "The same command resumes from the last checkpoint." in said
    assert checkpoints() == ["step-00000000", "step-00000001", "step-00000002"]
    assert cli.main(argv) == 0
    assert_same_run(Path("run"), whole)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "run/log.jsonl"), 1, "the disk is full (run/log.jsonl)"),
        (PermissionError(errno.EACCES, "Permission denied", "run/log.jsonl"), 1, "run/log.jsonl: Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "Try a smaller stages.N.batch with more stages.N.accumulate"),
        (KeyboardInterrupt(), 130, "The same command resumes from the last checkpoint."),
    ],
)
def test_a_run_that_is_stopped_goes_on(failure, whole, monkeypatch, error, status, words):
    add = RunLog.add

    def stop(log: RunLog, step: int, *values: dict[str, float]) -> None:
        if step == 3:
            raise error
        add(log, step, *values)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "add", stop)
        assert words in failure(status, "train", "tiny.yaml")
    assert cli.main(["train", "tiny.yaml"]) == 0
    assert_same_run(Path("run"), whole)


def poisoned(at: float, **config: int) -> TrigFlow:
    """A network with one bad weight."""
    model = dit(**config)
    with torch.no_grad():
        next(model.net.blocks[0].parameters())[0, 0] = at
    return model


def test_what_is_not_finite_stops_the_run(failure):
    said = failure(1, "train", "tiny.yaml", f"model.load={__file__}:poisoned", "model.options.at=.nan")
    assert "is not finite" in said
    assert "blocks.0" in said
    assert checkpoints() == ["step-00000000"]


def test_a_network_of_another_shape_than_the_data(failure):
    said = failure(1, "train", "tiny.yaml", "model.options.image_size=16")
    assert "[1, 1, 8, 8]" in said


def write_shard(path: Path, samples: int, channels: int = 1) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            content = io.BytesIO()
            np.save(content, rng.standard_normal((channels, 8, 8), dtype=np.float32))
            for name, data in ((f"{i:04}.x.npy", content.getvalue()), (f"{i:04}.cls", str(i % 10).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


SHARDS = [
    "data.source.load=jvpgraph.trainer.data.shards:webdataset",
    "data.source.options={urls: 'data-*.tar', latents: x.npy, conditions: {cls: labels}}",
]


@pytest.mark.long
def test_a_truncated_shard_is_named_before_a_step_is_taken(failure, caplog):
    for i in range(2):
        write_shard(Path(f"data-{i}.tar"), 8)
    whole_shard = Path("data-1.tar").read_bytes()
    Path("data-1.tar").write_bytes(whole_shard[:5000])
    said = failure(1, "train", "tiny.yaml", *SHARDS)
    assert "data-1.tar" in said
    assert "on_bad_shard" in said
    assert cli.main(["train", "tiny.yaml", *SHARDS, "data.source.options.on_bad_shard=skip", "out=skipped"]) == 0
    assert "data-1.tar" in caplog.text  # not silently
    Path("data-1.tar").write_bytes(whole_shard)
    assert cli.main(["train", "tiny.yaml", *SHARDS]) == 0


@pytest.mark.slow
def test_a_sample_that_cannot_be_read_stops_the_run_where_it_is(failure):
    write_shard(Path("data-0.tar"), 8)
    assert cli.main(["train", "tiny.yaml", *SHARDS, "out=expected"]) == 0
    assert cli.main(["train", "tiny.yaml", *SHARDS, "stages.0.steps=1"]) == 0
    shard = bytearray(Path("data-0.tar").read_bytes())
    good = bytes(shard)
    start = shard.index(b"\x93NUMPY", len(shard) // 2)
    shard[start : start + 6] = b"broken"
    Path("data-0.tar").write_bytes(shard)
    said = failure(1, "train", "tiny.yaml", *SHARDS)
    assert "data-0.tar" in said
    assert "x.npy" in said
    assert checkpoints() == ["step-00000000", "step-00000001"]
    Path("data-0.tar").write_bytes(good)
    assert cli.main(["train", "tiny.yaml", *SHARDS]) == 0
    assert_same_run(Path("run"), Path("expected"))


def test_traceback_shows_where(monkeypatch, capsys):
    def broken(args: argparse.Namespace) -> None:
        raise ValueError("a message")

    monkeypatch.setattr(train_command, "run", broken)
    assert cli.main(["train", "tiny.yaml"]) == 1
    assert capsys.readouterr().err == "jvpgraph train: a message\n"
    assert cli.main(["train", "tiny.yaml", "--traceback"]) == 1
    shown = capsys.readouterr().err
    assert "in broken" in shown
    assert shown.endswith("jvpgraph train: a message\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(args: argparse.Namespace) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(failures, "USER_FILES", set())  # this file was one, of another test's settings
    monkeypatch.setattr(train_command, "run", broken)
    with pytest.raises(AttributeError, match="a bug"):
        cli.main(["train", "tiny.yaml"])


@pytest.mark.long
def test_the_process_ends_with_the_status():
    command = [sys.executable, "-m", "jvpgraph.trainer.cli", "train", "missing.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_documentation_trains_a_model_of_ones_own(tmp_path, monkeypatch):
    """The two files of docs/trainer.md, as they stand there, in under 30 lines."""
    text = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text()
    section = text[text.index("## A model of your own") : text.index("## Coordinates")]
    python, yaml = (section.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "yaml"))
    assert len((python + yaml).splitlines()) < 30
    monkeypatch.chdir(tmp_path)
    Path("my_model.py").write_text(python)
    Path("my_run.yaml").write_text(yaml)
    short = ("stages.0.steps=2", "stages.1.steps=2", "student.backend=eager", "stages.0.batch=8", "stages.1.batch=8")
    assert cli.main(["train", "my_run.yaml", *short]) == 0
    assert sorted(path.name for path in Path("out/mine/checkpoints").iterdir())[-1] == "step-00000004"


def test_the_commands_of_the_documentation_fit_their_settings(monkeypatch):
    """Those for many processes in docs/trainer.md."""
    text = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text()
    for kind, name in (("python", "my_model.py"), ("yaml", "my_run.yaml")):
        Path(name).write_text(text.split(f"```{kind}\n# {name}\n")[1].split("```")[0])
    commands = re.findall(r"--nproc-per-node (\d+) -m jvpgraph\.trainer\.cli train (\S+) ([^#\n]*)", text)
    assert len(commands) == 3
    for processes, name, overrides in commands:
        config = load(RunConfig, train_command.settings_file(Path(name)), overrides.split())
        sizes = sizes_of(config.parallel, int(processes))
        check(config, sizes)
        if context_parallel(sizes):
            net = Plug(config.model.load, {}).build().net  # not from the weights of a run before
            assert hasattr(net, "split_tokens"), name


def test_the_documentation_adds_an_objective(tmp_path, monkeypatch):
    """The objective of docs/trainer.md, as it stands there."""
    text = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text()
    section = text[text.index("## Objectives") : text.index("## What a run does")]
    code = section.split("```python\n")[1].split("```")[0]
    (tmp_path / "my_objective.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    stage = "[{objective: direct, steps: 2, batch: 8, student: {lr: 1.0e-3}}]"
    tiny = "{load: jvpgraph.trainer.dit:dit, options: {width: 16, depth: 1, heads: 2}}"
    Path("run.yaml").write_text(
        f"imports: [my_objective.py]\nout: out\nmodel: {tiny}\nstages: {stage}\nstudent: {{backend: eager}}\n"
    )
    assert cli.main(["train", "run.yaml"]) == 0
    assert Path("out/checkpoints/step-00000002").is_dir()
