"""A run's folder: config.yaml, checkpoints, ema, log.jsonl, samples. One run per folder."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig

FREE = ("out", "device", "threads", "data.workers", "checkpoint", "log", "sampling", "evaluation")
"""Settings that may change between a stop and going on: the parameters do not depend on them."""


def claim_folder(config: RunConfig, *, fresh: bool) -> Path:
    """Makes the run's folder and writes its config.yaml, or goes on with the run that is there.

    Raises:
        ValueError: the folder holds a run with other settings, or something that is no run.
    """
    folder, file = config.out, config.out / "config.yaml"
    if fresh and folder.exists():
        folder.rename(unused(folder))
    begun = any((folder / "checkpoints").glob("step-*"))
    if begun and file.exists():
        different = [
            line
            for line in settings.differences(settings.load(RunConfig, file), config)
            if not any(line == free or line.startswith((f"{free}.", f"{free}:")) for free in FREE)
        ]
        if different:
            raise ValueError(
                f"{folder} holds a run with other settings:\n  " + "\n  ".join(different) + "\n"
                "Choose another `out`, give the same settings to go on with that run, or --fresh to move it aside."
            )
    elif not file.exists() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files and no config.yaml: choose another `out`, or --fresh to move it aside")
    folder.mkdir(parents=True, exist_ok=True)
    settings.save(config, file)
    return folder


def unused(folder: Path) -> Path:
    """The first of folder-1, folder-2, ... that does not exist."""
    return next(p for i in count(1) if not (p := folder.with_name(f"{folder.name}-{i}")).exists())


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name, step-00000123."""
    return int(path.name.split("-")[1])
