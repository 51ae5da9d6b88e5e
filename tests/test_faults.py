"""Faults at every place where the commands read or write: a status, a line of what, a line of what to do.

The advice is then followed, to the letter, and has to succeed; what was there before is still there.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from jvpgraph.trainer import cli
from jvpgraph.trainer.evaluation.distances import FeatureSpace
from jvpgraph.trainer.run import finished
from tests.test_cli import SHARDS, assert_same_run, write_shard
from tests.test_train import content, last_checkpoint
from tests.tiny_runs import TINY

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="fills disks by /dev/full"),
]

TRAIN = ["train", "tiny.yaml"]
EVALUATION = {"features": {"load": "tests.test_faults:pixels"}, "count": 60, "seeds": [0]}


def pixels() -> FeatureSpace:
    return FeatureSpace("pixels", lambda images: images.flatten(1)[:, 2::8])  # columns that are not all paper


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run, `run`, and the same run stopped after step 2, `half`."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(json.dumps({**TINY, "evaluation": EVALUATION}))
    argv = ["train", str(folder / "tiny.yaml")]
    assert cli.main([*argv, f"out={folder / 'run'}"]) == 0
    assert cli.main([*argv, f"out={folder / 'half'}", "stages.0.steps=2"]) == 0
    return folder


@pytest.fixture(autouse=True)
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run that stands at step 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    shutil.copy(whole / "tiny.yaml", "tiny.yaml")
    shutil.copytree(whole / "half", "run")
    return tmp_path


@dataclass
class Fault:
    """A command that fails.

    Attributes:
        harm: makes the fault.
        argv: the command.
        what, do: what it has to say, in its first line and in a later one.
        follow: does as told; gets the message, returns the commands that have to succeed then.
        status: of the command.
    """

    harm: Callable[[], Any]
    argv: list[str]
    what: str
    do: str
    follow: Callable[[str], list[list[str]]]
    status: int = 1


def full(path: str) -> Callable[[], None]:
    """Whatever is written to this file meets a full disk."""

    def harm() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).symlink_to("/dev/full")

    return harm


def freed(path: str, argv: list[str]) -> Callable[[str], list[list[str]]]:
    def follow(said: str) -> list[list[str]]:
        if Path(path).is_symlink():
            Path(path).unlink()
        return [argv]

    return follow


def changed(argv: list[str]) -> Callable[[str], list[list[str]]]:
    return lambda said: [
        [*argv, *(word for key in re.findall(r"--change ([\w.]+\w)", said) for word in ("--change", key))]
    ]


def then(*commands: list[str]) -> Callable[[str], list[list[str]]]:
    return lambda said: list(commands)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_all() -> None:
    for path in Path("run/checkpoints").glob("*/*.distcp"):
        shutil.copy(path, path.with_suffix(".copy"))
        flip(path)


def restored(argv: list[str]) -> Callable[[str], list[list[str]]]:
    def follow(said: str) -> list[list[str]]:
        for path in Path("run/checkpoints").glob("*/*.copy"):
            path.replace(path.with_suffix(".distcp"))
        return [argv]

    return follow


def spoil_log() -> None:
    log = Path("run/log.jsonl")
    log.write_text("{broken\n" + log.read_text())


def unspoil_log(said: str) -> list[list[str]]:
    (number,) = re.findall(r"log\.jsonl:(\d+) is damaged", said)
    lines = Path("run/log.jsonl").read_text().splitlines(True)
    del lines[int(number) - 1]
    Path("run/log.jsonl").write_text("".join(lines))
    return [TRAIN]


def remove_origin(said: str) -> list[list[str]]:
    Path("run/origin.json").unlink()
    return [TRAIN]


SLOWER = [*TRAIN, "stages.0.student.lr=5e-4"]
FULL, FREE = r"the disk is full \(\S*{}\): No space left", "Free some space"
SAMPLE, EVALUATE = ["sample", "run", "--steps", "1", "--count", "2"], ["evaluate", "run", "--steps", "1"]
EXPORT = ["export", "run", "--out"]

FAULTS = {
    **{
        f"full disk at {name}": Fault(
            full(f"run/.{name}.draft"), TRAIN, FULL.format(name), FREE, freed(f"run/.{name}.draft", TRAIN)
        )
        for name in ("config.yaml", "origin.json", "log.jsonl")
    },
    "full disk at curves.png": Fault(
        full("run/curves.png"), TRAIN, FULL.format("curves.png"), FREE, freed("run/curves.png", TRAIN)
    ),
    "full disk at changes.jsonl": Fault(
        full("run/changes.jsonl"),
        [*SLOWER, "--change", "stages"],
        FULL.format("changes.jsonl"),
        FREE,
        freed("run/changes.jsonl", [*SLOWER, "--change", "stages"]),
    ),
    "full disk at a picture": Fault(
        full("run/samples-1.png"), SAMPLE, FULL.format("samples-1.png"), FREE, freed("run/samples-1.png", SAMPLE)
    ),
    "full disk at evaluation.json": Fault(
        full("run/evaluation.json"),
        EVALUATE,
        FULL.format("evaluation.json"),
        FREE,
        freed("run/evaluation.json", EVALUATE),
    ),
    "a file that cannot be written, by safetensors": Fault(
        lambda: None,
        [*SAMPLE, "--out", "/sys/b.png"],
        "/sys/b.png: ",
        "another place by --out",
        then([*SAMPLE, "--out", "b.png"]),
    ),
    "a place that cannot be written, train": Fault(
        lambda: None,
        [*TRAIN, "out=/sys/run"],
        "/sys/run: ",
        "choose another place by `out`",
        then([*TRAIN, "out=there"]),
    ),
    "a place that cannot be written, sample": Fault(
        lambda: None,
        [*SAMPLE, "--out", "/sys/a/b.png"],
        "/sys/a: ",
        "another place by --out",
        then([*SAMPLE, "--out", "b.png"]),
    ),
    "a place that cannot be written, export": Fault(
        lambda: None, [*EXPORT, "/sys/net"], r"/sys/\.?net", "another place by --out", then([*EXPORT, "net"])
    ),
    "every checkpoint flipped, train": Fault(
        flip_all, TRAIN, r"no checkpoint in run/checkpoints is whole", "--fresh", then([*TRAIN, "--fresh"])
    ),
    "every checkpoint flipped, restored": Fault(
        flip_all, TRAIN, r"no checkpoint in run/checkpoints is whole", "Restore one of them", restored(TRAIN)
    ),
    "every checkpoint flipped, sample": Fault(
        flip_all, SAMPLE, r"no checkpoint in run/checkpoints is whole", "Restore one of them", restored(SAMPLE)
    ),
    "a line of the log": Fault(spoil_log, TRAIN, r"run/log\.jsonl:1 is damaged", "remove that line", unspoil_log),
    "origin.json cut": Fault(
        lambda: os.truncate("run/origin.json", 30), TRAIN, r"run/origin\.json is damaged", "Remove it", remove_origin
    ),
    "another learning rate": Fault(
        lambda: None, SLOWER, "run holds a run with other settings", "Add --change stages.0.student.lr", changed(SLOWER)
    ),
    "another seed": Fault(
        lambda: None,
        [*TRAIN, "seed=4"],
        "run holds a run with other settings",
        "another `out` and --from run",
        then([*TRAIN, "seed=4", "out=other", "--from", "run"]),
    ),
    "other files in the folder": Fault(
        lambda: Path("run/config.yaml").unlink(),
        TRAIN,
        "run holds files and no config.yaml",
        "--fresh to move it aside",
        then([*TRAIN, "--fresh"]),
    ),
    "no run to sample": Fault(
        lambda: None, ["sample", "rn"], r"rn/config\.yaml does not exist", "the `out` of its settings", then(SAMPLE)
    ),
    "an export into a folder that is taken": Fault(
        lambda: Path("net").mkdir() or Path("net/a").touch(),
        [*EXPORT, "net"],
        "net is not empty",
        "Choose another folder",
        then([*EXPORT, "net2"]),
    ),
    "a step that is not there": Fault(
        lambda: None,
        [*EXPORT, "net", "--step", "7"],
        "has no checkpoint of step 7",
        r"only of 0, 1, 2",
        then([*EXPORT, "net", "--step", "1"]),
    ),
}


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in FAULTS])
def test_advice_is_followed_and_succeeds(whole: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    fault = FAULTS[name]
    fault.harm()
    before = contents()
    capfd.readouterr()
    assert cli.main(fault.argv) == fault.status
    said = capfd.readouterr().err
    assert "Traceback" not in said
    message = said[said.index(f"jvpgraph {fault.argv[0]}: ") :]
    assert re.search(fault.what, message.splitlines()[0]), message
    assert re.search(fault.do, message), message
    assert len(message.splitlines()) <= 4, message
    assert not {path for path, data in before.items() if contents().get(path) != data}, "something was lost"
    for argv in fault.follow(message):
        assert cli.main(argv) == 0, argv
    if fault.argv == TRAIN and "fresh" not in fault.do:
        assert_same_run(Path("run"), whole / "run")
    if "fresh" in fault.do:
        assert_same_run(Path("run"), whole / "run")
        moved = {str(path).replace("run-1/", "run/", 1): data for path, data in contents("run-1").items()}
        assert moved == before, "the old run was moved as it was"


def contents(folder: str = "run") -> dict[str, bytes]:
    """Of the checkpoints; other files are written anew."""
    return {str(path): path.read_bytes() for path in Path(folder, "checkpoints").rglob("*") if path.is_file()}


@contextmanager
def small_disk(monkeypatch: pytest.MonkeyPatch, room: float) -> Iterator[None]:
    """One that is full as soon as the folder of checkpoints takes more."""
    fsync = os.fsync

    def check(descriptor: int) -> None:
        if sum(path.stat().st_size for path in Path("run/checkpoints").rglob("*") if path.is_file()) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", check)
        yield


def test_fewer_checkpoints_fit_on_a_small_disk(
    whole: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk stays as small as it is."""
    one = sum(path.stat().st_size for path in Path("run/checkpoints/step-00000001").iterdir())
    shutil.rmtree("run/checkpoints/step-00000000")
    with small_disk(monkeypatch, 2.5 * one):
        capfd.readouterr()
        assert cli.main([*TRAIN, "checkpoint.keep=2"]) == 1
        said = capfd.readouterr().err
        assert "step-00000003 could not be written: [Errno 28] No space left on device" in said
        assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
        (keep,) = re.findall(r"checkpoint\.keep=\d+", said)
        assert keep == "checkpoint.keep=1"
        assert cli.main([*TRAIN, keep]) == 0
    assert_same_run(Path("run"), whole / "run")


def test_one_flipped_file_costs_one_checkpoint(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(Path("run/checkpoints/step-00000002/__0_0.distcp"))
    for argv in (SAMPLE, EVALUATE, [*EXPORT, "net"]):
        caplog.clear()
        assert cli.main(argv) == 0
        assert "skipping the checkpoint run/checkpoints/step-00000002" in caplog.text
    assert finished.load_run(Path("run")).step == 1
    shutil.copytree("run/checkpoints/step-00000001", "run/checkpoints/step-00000003")  # by hand
    caplog.clear()
    assert cli.main(TRAIN) == 0
    assert "step-00000003: it is a copy of the checkpoint of step 1" in caplog.text
    assert_same_run(Path("run"), whole / "run")
    state, expected = (
        content(last_checkpoint(folder), Path("content.pt").resolve()) for folder in (Path("run"), whole / "run")
    )
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_bad_sample_is_skipped_as_advised(capfd: pytest.CaptureFixture[str]) -> None:
    """In the run that it stopped."""
    write_shard(Path("data-0.tar"), 16)
    argv = [*TRAIN, *SHARDS, "out=shards"]
    shard = bytearray(Path("data-0.tar").read_bytes())
    start = shard.index(b"\x93NUMPY", len(shard) // 2)
    assert cli.main([*argv, "stages.0.steps=1"]) == 0
    shard[start : start + 6] = b"broken"
    Path("data-0.tar").write_bytes(shard)
    capfd.readouterr()
    assert cli.main(argv) == 1
    said = capfd.readouterr().err
    assert "x.npy cannot be decoded" in said
    (advice,) = re.findall(r"data\.source\.options\.on_bad_shard=skip", said)
    assert cli.main([*argv, advice]) == 0
    assert [json.loads(line)["step"] for line in Path("shards/log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
