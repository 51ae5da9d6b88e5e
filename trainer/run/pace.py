"""How fast a run goes: what a line of its log says besides what was computed.

Steps in which something was compiled, and the first of each shape, count for `seconds` alone. All others make the
means of a line, from its step back to the line before.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod

import torch
from torch import nn

from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.model.parts import commonest_dtype
from jvpgraph.trainer.plan.flops import Counts, Query
from jvpgraph.trainer.plan.machines import gpu_named
from jvpgraph.trainer.run.compiling import Compiling, Show
from jvpgraph.trainer.run.parallel import Layout

UNITS = {
    "lr": "learning rate of the last update of the student; `fake_lr`: of the fake score",
    "samples": "samples that updates of the student have seen since the run began, in all processes",
    "seconds": "since the run began, its stops left out, saves and previews included",
    "seconds_per_step": "mean of the steps since the last line",
    "samples_per_second": "of the student's updates, in all processes",
    "samples_per_second_each": "the same in each part of the batch, where there are several",
    "tokens_per_second": "of the same samples: positions of the latents in the network's first block",
    "flops_per_second": "in each process; a multiply-add counts 2, recomputation not at all",
    "utilisation": "the same as a share of the device's peak (log.peak_tflops, or by its name)",
    "memory_gib": "the most so far in any process: allocated on the GPU, or of the process on a CPU",
    "moved_gib_per_step": "what went between CPU and GPU: parameters, gradients, averages that rest on the CPU",
    "seconds_left": "until the last step, if they take as long as those of this stage until now",
}
TIMED = frozenset(UNITS) - {"lr", "samples"}
"""What differs from machine to machine, and from one time to the next."""

NETWORKS = {"fake": "fake score"}
PATIENCE = 10.0  # seconds of steps after which FLOPs are counted: shorter runs need none


class Pace:
    """Follows the steps of a run in one process.

    Args:
        config: of the run.
        counts: of FLOPs; None: they are not asked for.
        compiling: which knows when something is.
        parts: into which a batch is split over the processes.
        split: processes that share a part's tokens or layers.
        peak: FLOPs per second of this process's device, if known.
        seconds: that earlier parts of the run took.
    """

    def __init__(
        self,
        config: RunConfig,
        counts: Counts | None,
        compiling: Compiling,
        *,
        parts: int = 1,
        split: int = 1,
        peak: float | None = None,
        seconds: float = 0.0,
    ) -> None:
        self.config, self.counts, self.compiling = config, counts, compiling
        self.parts, self.split, self.peak = parts, split, peak
        self.before = seconds
        self.begun = time.perf_counter()
        self.seen: set[tuple[str, Query]] = set()
        self.now: list[tuple[str, Query]] = []  # batches of this step
        self.stage = -1
        self.steady = 0.0  # seconds of all steps that count
        self._next_line()

    @classmethod
    @contextmanager
    def of(
        cls, config: RunConfig, layout: Layout, student: nn.Module, show: Show | None, seconds: float
    ) -> Iterator[Pace]:
        """Of a run; `show` shows words in the progress line of the first process, and is None in others."""
        with ExitStack() as stack:
            counts = stack.enter_context(Counts(config)) if show is not None and config.log.flops else None
            yield cls(
                config,
                counts,
                Compiling(show),
                parts=layout.parts,
                split=prod(layout.sizes.values()) // layout.parts,
                peak=peak_of(config, layout.device, student),
                seconds=seconds,
            )

    def _next_line(self) -> None:
        self.steps, self.seconds, self.all_steps = 0, 0.0, 0
        self.batches: Counter[tuple[str, Query]] = Counter()

    def _next_stage(self, index: int) -> None:
        self.stage, self.stage_begun = index, time.perf_counter()
        self.lost, self.stage_steps = 0.0, 0  # seconds of steps that do not count; number of those that do

    def saw(self, name: str, batch: Batch) -> None:
        """A batch of an update of the `student`, or of the `fake` score or the `critic` beside it."""
        self.now.append((name, Query.of(self.stage, batch)))
        self.compiling.doing = f"the {NETWORKS.get(name, name)}'s graph for latents {list(batch.x0.shape)}"

    @contextmanager
    def step(self, stage: int) -> Iterator[None]:
        """Around each step."""
        if stage != self.stage:
            self._next_stage(stage)
        self.now = []
        begun = time.perf_counter()
        with self.compiling.step():
            yield
        passed = time.perf_counter() - begun
        self.all_steps += 1
        if self.compiling.happened or not self.seen.issuperset(self.now):
            self.lost += passed
        else:
            self.steps, self.seconds, self.steady = self.steps + 1, self.seconds + passed, self.steady + passed
            self.stage_steps += 1
            self.batches.update(self.now)
        self.seen.update(self.now)

    def line(self, step: int, memory: float, moved: int = 0) -> dict[str, float]:
        """The figures of a line of the log, by the names of UNITS.

        Args:
            step: of the run.
            memory: GiB.
            moved: bytes between CPU and device since the last line.
        """
        now = time.perf_counter()
        found = {"samples": float(samples_until(self.config, step)), "seconds": self.before + now - self.begun}
        found["memory_gib"] = memory
        if moved:
            found["moved_gib_per_step"] = moved / self.all_steps / 2**30
        if self.steps:
            found["seconds_per_step"] = self.seconds / self.steps
            found |= self._speeds()
        if self.stage_steps:
            left = sum(stage.steps for stage in self.config.stages) - step
            found["seconds_left"] = left * (now - self.stage_begun - self.lost) / self.stage_steps
        self._next_line()
        return found

    def _speeds(self) -> dict[str, float]:
        students = [(query, n) for (name, query), n in self.batches.items() if name == "student"]
        each = sum(query.size * n for query, n in students) / self.seconds
        found = {"samples_per_second": each * self.parts}
        if self.parts > 1:
            found["samples_per_second_each"] = each
        if self.counts is None or self.steady < PATIENCE:
            return found
        counted = {query: self.counts.of(query) for _, query in self.batches}
        known = {query: of for query, of in counted.items() if of is not None}
        if len(known) < len(counted):
            return found
        tokens = sum(known[query].tokens * query.size * n for query, n in students)
        if tokens:
            found["tokens_per_second"] = tokens * self.parts / self.seconds
        flops = sum(known[query].of(name) * n for (name, query), n in self.batches.items()) / self.split
        found["flops_per_second"] = flops / self.seconds
        if self.peak is not None:
            found["utilisation"] = found["flops_per_second"] / self.peak
        return found


def samples_until(config: RunConfig, step: int) -> int:
    """That the student's updates have seen after `step` steps of the run."""
    found = 0
    for stage in config.stages:
        done = min(step, stage.steps)
        found += done * stage.batch * stage.accumulate
        step -= done
    return found


def peak_of(config: RunConfig, device: torch.device, network: nn.Module) -> float | None:
    """FLOPs per second of a device at the dtype of most of a network's weights: the one stated, or its maker's."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops * 1e12
    gpu = gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    dtype = commonest_dtype(network.parameters()) or torch.float64
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return None if gpu is None or dtype == torch.float64 or tf32 else gpu.peak(dtype)


def memory_gib() -> float:
    """The most memory used so far: of the GPU if CUDA is in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    """`1:02:03`, with days in front where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hours}:{minutes:02}:{rest:02}"


def in_words(figures: dict[str, float], shown: Sequence[str] = ()) -> str:
    """Of a progress line."""
    words = {
        "lr": lambda x: f"lr {x:.3g}",
        "samples": lambda x: f"{x:.0f} samples",
        "seconds_per_step": lambda x: f"{x:.3g} s/step",
        "samples_per_second": lambda x: f"{x:.3g} samples/s",
        "tokens_per_second": lambda x: f"{x:.3g} tokens/s",
        "flops_per_second": lambda x: f"{x / 1e12:.3g} TFLOP/s" if x > 1e11 else f"{x / 1e9:.3g} GFLOP/s",
        "utilisation": lambda x: f"{x:.1%} of peak",
        "memory_gib": lambda x: f"{x:.1f} GiB",
        "moved_gib_per_step": lambda x: f"{x:.3g} GiB moved/step",
        "seconds_left": lambda x: f"{duration(x)} left",
    }
    return ", ".join([*shown, *(word(figures[name]) for name, word in words.items() if name in figures)])
