"""A run's folder: config.yaml, checkpoints, ema, log.jsonl, samples. One run per folder."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig

LOCK = ".lock"

FREE = (
    *("out", "threads", "parallel", "data.workers", "checkpoint", "log", "sampling", "evaluation"),
    *("student.backend", "student.compile", "student.checkpoint_blocks"),  # other processes may need others
)
"""Settings that may change between a stop and going on. Other threads, processes or backends may change the last
bits."""


def check_folder(config: RunConfig) -> None:
    """Raises ValueError if the folder holds a run with other settings, or something that is no run.

    A run may be made longer: stages may be added, and its last stage may get more steps if its learning rates are
    constant.
    """
    folder, file = config.out, config.out / "config.yaml"
    if not file.exists():
        if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
            raise ValueError(
                f"{folder} holds files and no config.yaml: choose another `out`, or --fresh to move it aside"
            )
        return
    if not any((folder / "checkpoints").glob("step-*")):
        return  # a start that failed
    old = settings.load(RunConfig, file)
    different = [
        line
        for line in settings.differences(old, shortened(config, old))
        if not any(line == free or line.startswith((f"{free}.", f"{free}:")) for free in FREE)
    ]
    if different:
        raise ValueError(
            f"{folder} holds a run with other settings:\n  " + "\n  ".join(different) + "\n"
            "Choose another `out`, give the same settings to resume that run, or --fresh to move it aside."
        )


def shortened(config: RunConfig, old: RunConfig) -> RunConfig:
    """A run without what it has been made longer by."""
    stages = config.stages[: len(old.stages)]
    if len(stages) < len(old.stages):
        return config
    last, before = stages[-1], old.stages[-1]
    if last.steps > before.steps and last.student.decay == last.fake.decay == "constant":
        stages = (*stages[:-1], replace(last, steps=before.steps))
    return replace(config, stages=stages)


@contextmanager
def claimed(config: RunConfig, *, fresh: bool) -> Iterator[Path]:
    """The run's folder, made and locked, with its config.yaml; with `fresh`, an earlier run is moved aside first.

    Raises:
        ValueError: another process is training in it. Nothing was touched then.
    """
    folder = config.out
    if fresh and folder.exists():
        with locked(folder):
            folder.rename(unused(folder))
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        settings.save(config, folder / "config.yaml")
        yield folder


def check_free(folder: Path) -> None:
    """Raises ValueError if another process is training in the folder."""
    if (folder / LOCK).exists():
        with locked(folder):
            pass


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a run's folder while the first one trains in it.

    Raises:
        ValueError: there is one already.
    """
    with (folder / LOCK).open("w") as file:
        try:
            # a POSIX lock: it ends with this process, while loader processes may outlive it for some seconds
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ValueError(f"another process is training in {folder}: wait for it, or choose another `out`") from None
        yield


def unused(folder: Path) -> Path:
    """The first of folder-1, folder-2, ... that does not exist."""
    return next(p for i in count(1) if not (p := folder.with_name(f"{folder.name}-{i}")).exists())


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name, step-00000123."""
    return int(path.name.split("-")[1])
