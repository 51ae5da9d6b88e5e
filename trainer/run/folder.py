"""A run's folder: config.yaml, checkpoints, ema, log.jsonl, samples. One run per folder."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.run.changes import check_changes
from jvpgraph.trainer.run.origin import read_origin

LOCK = ".lock"


def check_folder(config: RunConfig, change: Sequence[str] = ()) -> list[str]:
    """What is changed of the run that the folder holds, if any: see RULES.

    Raises:
        ValueError: the folder holds a run with other settings, or something that is no run.
    """
    folder, file = config.out, config.out / "config.yaml"
    if not file.exists():
        if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
            raise ValueError(
                f"{folder} holds files and no config.yaml: choose another `out`, or --fresh to move it aside"
            )
        return []
    done = newest_step(folder)
    if done is None:
        return []  # a start that failed
    origin = read_origin(folder)
    # config.yaml may have been edited since
    old = settings.load(RunConfig, file) if origin is None else settings.from_dict(RunConfig, origin.settings)
    return check_changes(old, config, change, done)


@contextmanager
def claimed(config: RunConfig, *, fresh: bool) -> Iterator[Path]:
    """The run's folder, made and locked; with `fresh`, an earlier run is moved aside first.

    Raises:
        ValueError: another process is training in it. Nothing was touched then.
    """
    folder = config.out
    if fresh and folder.exists():
        with locked(folder):
            folder.rename(unused(folder))
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
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


def newest_step(folder: Path) -> int | None:
    """Of the newest checkpoint in a run's folder, whole or not."""
    paths = (path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".partial")
    return max(map(checkpoint_step, paths), default=None)


def unused(folder: Path) -> Path:
    """The first of folder-1, folder-2, ... that does not exist."""
    return next(p for i in count(1) if not (p := folder.with_name(f"{folder.name}-{i}")).exists())


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name, step-00000123, also of one that was moved aside."""
    return int(path.stem.split("-")[1])
