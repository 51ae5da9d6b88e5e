"""What a run shows: log.jsonl, TensorBoard, wandb, a progress line, curves and grids of samples.

A run that was stopped writes the same log.jsonl as one that was not, but for the figures of TIMED: see `computed`.
"""

from __future__ import annotations

import json
import math
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import TextIO

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from jvpgraph.trainer.files import naming, write_whole
from jvpgraph.trainer.optional import optional
from jvpgraph.trainer.pictures import gif
from jvpgraph.trainer.run.pace import TIMED, in_words

NOT_DRAWN = {"samples", "seconds", "seconds_left"}  # straight lines


class RunLog:
    """The log of a run in `folder`, from step `start` to `total`.

    Lines of log.jsonl beyond `start`, which a stopped run may have written after its last checkpoint, are dropped.

    Args:
        folder: the run's folder.
        tensorboard: whether to write event files to `folder`/tensorboard.
        wandb: name of a wandb project, or None.
        total: steps of the whole run.
        start: the step that the run goes on from.

    Raises:
        ValueError: TensorBoard or wandb are asked for and not installed, or log.jsonl is damaged.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, wandb: str | None, total: int, start: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        self.step = start
        self.writer = self.wandb = None
        if tensorboard:
            module = optional("torch.utils.tensorboard", "tensorboard", "log.tensorboard=false")
            self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        if wandb is not None:
            module = optional("wandb", "wandb", "log.wandb=null")
            self.wandb = module.init(project=wandb, id=wandb_id(folder), resume="allow", dir=str(folder))
        keep = [line for line in read_lines(self.path) if line["step"] <= start]
        self.seconds = keep[-1].get("seconds", 0.0) if keep else 0.0  # that the run took until `start`
        write_whole(self.path, "".join(f"{json.dumps(line)}\n" for line in keep))
        self.file = self.path.open("a", encoding="utf-8")
        terminal = sys.stderr.isatty()
        interval = 0.5 if terminal else 30.0  # seconds between redraws: a log file needs fewer
        self.bar = tqdm(
            total=total,
            initial=start,
            mininterval=interval,
            maxinterval=2 * interval,
            file=sys.stderr if terminal else Lines(sys.stderr),
            bar_format="{desc}{percentage:3.0f}% |{bar:20}| step {n_fmt}/{total_fmt}{postfix}",
            dynamic_ncols=terminal,
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, step: int, values: Mapping[str, float], figures: Mapping[str, float] | None = None) -> None:
        """One line of the log. Raises ValueError if steps go back.

        Args:
            step: of the run.
            values: what was computed, by name, the loss under `loss`.
            figures: what `Pace.line` gives.
        """
        if step <= self.step:
            raise ValueError(f"step {step} was logged after step {self.step}")
        numbers = {name: float(value) for name, value in {**values, **(figures or {})}.items()}
        with naming(self.path):
            self.file.write(f"{json.dumps({'step': step, **numbers})}\n")
            self.file.flush()
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)
        shown = [f"{name} {float(x):.4g}" for name, x in values.items() if name == "loss" or "tangent" in name]
        self.bar.set_description_str("", refresh=False)
        self.bar.set_postfix_str(in_words(numbers, shown), refresh=False)
        self.bar.update(step - self.step)
        self.step = step

    def pictures(self, step: int, shown: Mapping[str, Sequence[Image.Image]], fps: float) -> None:
        """Pictures, and videos of several frames, by name: to TensorBoard and wandb."""
        if self.writer is not None:
            for name, frames in shown.items():
                if len(frames) == 1:
                    self.writer.add_image(name, np.asarray(frames[0].convert("RGB")), step, dataformats="HWC")
                else:  # add_video would do the same, by moviepy
                    width, height = frames[0].size
                    Summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
                    image = Summary.Image(encoded_image_string=gif(frames, fps), height=height, width=width)
                    summary = Summary(value=[Summary.Value(tag=name, image=image)])
                    self.writer._get_file_writer().add_summary(summary, step)
        if self.wandb is not None:
            kinds = optional("wandb", "wandb", "log.wandb=null")
            self.wandb.log(
                {
                    name: kinds.Image(frames[0])
                    if len(frames) == 1
                    else kinds.Video(BytesIO(gif(frames, fps)), format="gif")
                    for name, frames in shown.items()
                },
                step=step,
            )

    def show(self, words: str) -> None:
        """In front of the progress line, until the next step of the log."""
        self.bar.set_description_str(f"{words} ")

    def curves(self, path: Path) -> None:
        """A PNG of everything in log.jsonl against the step, earlier parts of the run included."""
        every = series(self.path)
        draw_curves({name: every[name] for name in every if name not in NOT_DRAWN}, path)

    def close(self) -> None:
        """Harmless when repeated."""
        with naming(self.path):
            self.file.close()
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()
        self.writer = self.wandb = None


class Lines:
    """A file that is no terminal: each state of a progress line is a line of its own."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if text.strip():
            self.file.write(f"{text.strip()}\n")

    def flush(self) -> None:
        self.file.flush()


def wandb_id(folder: Path) -> str:
    """Made once per folder, so that a run that goes on does so in wandb too."""
    path = folder / "wandb.id"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()


def read_lines(path: Path) -> list[dict[str, float]]:
    """The lines of a log; a last line that was cut off is left out. Raises ValueError for other damage."""
    if not path.exists():
        return []
    found = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            entry["step"]
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise ValueError(f"{path}:{number} is damaged: repair or remove that line, then resume") from None
        else:
            found.append(entry)
    return found


def computed(path: Path) -> list[dict[str, float]]:
    """The lines of a log without what differs from one machine to another."""
    return [{name: value for name, value in line.items() if name not in TIMED} for line in read_lines(path)]


def series(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each name in a log."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in read_lines(path):
        for name, value in line.items():
            if name != "step":
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return found


def draw_curves(curves: Mapping[str, tuple[list[float], list[float]]], path: Path, columns: int = 3) -> None:
    """One panel per name; a log scale where all values are positive and span two decades."""
    columns = max(1, min(columns, len(curves)))
    rows = max(1, math.ceil(len(curves) / columns))
    figure = Figure(figsize=(4 * columns, 2.6 * rows), dpi=120)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    margin, top = 0.6 / (4 * columns), 0.3 / (2.6 * rows)  # inches as shares; a layout engine takes three times as long
    figure.subplots_adjust(margin, 1.7 * top, 1 - margin / 4, 1 - top, wspace=0.25, hspace=0.45)
    for axis, (name, (steps, values)) in zip(axes, curves.items()):
        axis.plot(steps, values, linewidth=1, marker="." if len(steps) < 30 else "")
        finite = [value for value in values if math.isfinite(value)]
        if finite and min(finite) > 0 and max(finite) >= 100 * min(finite):
            axis.set_yscale("log")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        figure.savefig(path)


def grid(images: Tensor, path: Path, columns: int, *, frames: int = 8, gap: int = 2, side: int = 64) -> None:
    """A PNG of images [N, C, H, W] in [0, 1], C = 1 or 3, `columns` per row; values outside are clamped.

    Videos [N, C, T, H, W] get a row each, with up to `frames` frames from the first to the last. Small images are
    enlarged by a whole factor, to about `side` pixels.

    Raises:
        ValueError: another shape, no images, or values that are not finite.
    """
    if images.dim() not in (4, 5) or images.shape[1] not in (1, 3) or not images.numel() or columns < 1:
        shape = f"{tuple(images.shape)} in {columns} columns"
        raise ValueError(f"expected images [N, 1 or 3, H, W] or videos [N, 1 or 3, T, H, W], got {shape}")
    if not torch.isfinite(images).all():
        raise ValueError("cannot draw images that are not finite")
    if images.dim() == 5:
        columns = min(frames, images.shape[2])
        chosen = torch.linspace(0, images.shape[2] - 1, columns).round().long().to(images.device)
        images = images.index_select(2, chosen).transpose(1, 2).flatten(0, 1)
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    factor = max(1, side // max(pixels.shape[2:]))
    tiles = pixels.expand(-1, 3, -1, -1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = tiles.shape[2:]
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, tile in enumerate(tiles.permute(0, 2, 3, 1).numpy()):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        imsave(path, canvas)
