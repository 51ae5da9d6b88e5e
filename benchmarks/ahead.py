"""Compile in parallel, for what is left in the compiler's cache, what would be compiled one after the other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable

import torch

from benchmarks.part import Part

Job = Callable[[], object]


def warm(job: Job) -> None:
    """Run a job once, in a process whose end does not matter."""
    try:
        job()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:  # whatever it is, it is found and recorded where it is measured
        pass


def compile_ahead(part: Part, jobs: Iterable[Job]) -> None:
    """Run all jobs once, side by side. They are sent to other processes: functions of a module with their arguments."""
    todo = list(jobs)
    todo = todo[:1] if part.dry_run else todo
    workers = 1 if part.dry_run else min(12, max(1, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        # a worker that dies takes its job with it: wait no longer than a third of the time
        pool.map_async(warm, todo, chunksize=1).wait(max(1.0, min(60.0, part.left / 3)))
