"""Run a function on several ranks of a real gloo process group.

    errors = run(4, tensor_parallel, "wan")     # one result per rank

The ranks are forked from a server that has imported torch and diffusers already, so that starting them takes no
time. The function is a module-level one; what it returns must be picklable, and is.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["run"]

PRELOADED = [
    "torch",
    "torch.distributed.tensor",
    "torch._inductor.compile_fx",
    "diffusers",
    "jvpgraph",
    "tests.zoo.cases",
]


def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """The results of ``function(*args)`` on every rank, in their order.

    Raises:
        RuntimeError: a rank failed, with its traceback; or the ranks did not finish in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_rank, args=(rank, world_size, folder, results, timeout, function, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, results, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(ranks: list[Any], results: Any, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(ranks):
        try:
            rank, ok, value = results.get(timeout=1)
        except queue.Empty:
            dead = [i for i, process in enumerate(ranks) if i not in found and process.exitcode not in (None, 0)]
            if dead:
                codes = [ranks[i].exitcode for i in dead]
                raise RuntimeError(f"ranks {dead} ended with {codes} and said nothing") from None
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"ranks {sorted(set(range(len(ranks))) - set(found))} did not finish in time"
                ) from None
            continue
        if not ok:
            raise RuntimeError(f"rank {rank} of {len(ranks)} failed:\n{value}")
        found[rank] = value
    return [found[rank] for rank in range(len(ranks))]


def _rank(
    rank: int, world_size: int, folder: str, results: Any, timeout: float, function: Callable[..., Any], args: Any
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        value = function(*args)
        dist.barrier()
    except Exception:
        results.put((rank, False, traceback.format_exc()))
        return
    results.put((rank, True, value))
    dist.destroy_process_group()
