"""Seconds of a call on a device, and the two ceilings that they are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[], Any]


class Clock:
    """Seconds that the device spends in one call.

    On CUDA between two events, behind a fill of 2 GiB: that leaves nothing of the inputs in the L2 cache, and takes
    long enough for the host to have launched the call before the device gets to it.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            self.filler = torch.empty(1 << 31, dtype=torch.uint8, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Run) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        self.filler.zero_()
        self.start.record()
        run()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3

    def host(self, run: Run) -> float:
        """Seconds until the call returns to the host, the device being idle before it."""
        if self.cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


def interleaved(
    clock: Clock, runs: Mapping[str, Run], *, least: int = 5, most: int = 25, seconds: float = 2.0, warm_up: int = 2
) -> dict[str, list[float]]:
    """Times of every call, taken in turns, so that what the device does meanwhile meets all of them."""
    for _ in range(warm_up):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for n in range(most):
        if n >= least and time.perf_counter() - begin > seconds:
            break
        for name, run in runs.items():
            times[name].append(clock(run))
    return times


def summary(times: list[float]) -> dict[str, float | int]:
    """Median, extremes and number of times."""
    return {"seconds": statistics.median(times), "least": min(times), "most": max(times), "repeats": len(times)}


def ceilings(clock: Clock, device: str, dry_run: bool) -> dict[str, Any]:
    """FLOP/s of the library's bf16 product of random matrices, the best of several shapes, and bytes/s of a copy,
    read and written ones."""
    shapes = [(8192, 8192, 8192), (16384, 8192, 8192), (8192, 8192, 16384), (4096, 4096, 4096)]
    size = 1 << 32
    if dry_run:
        shapes, size = [(64, 32, 16)], 1 << 16
    products = {}
    for m, n, k in shapes:
        a, b = (torch.randn(*s, device=device, dtype=torch.bfloat16) for s in ((m, k), (k, n)))
        times = interleaved(clock, {"": lambda a=a, b=b: a @ b}, warm_up=5, most=15)[""]
        products[f"{m}x{n}x{k}"] = 2 * m * n * k / summary(times)["seconds"]
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = summary(interleaved(clock, {"": lambda: target.copy_(source)}, most=15)[""])
    return {
        "matmul_flops": max(products.values()),
        "matmuls": products,
        "copy_bytes_per_second": 2 * size / copied["seconds"],
    }


def state(device: str) -> dict[str, float] | None:
    """Clock, power and temperature right now; None where the driver does not say."""
    if device != "cuda":
        return None
    try:
        return {
            "sm_mhz": torch.cuda.clock_rate(),
            "watts": torch.cuda.power_draw() / 1e3,
            "celsius": torch.cuda.temperature(),
        }
    except Exception:  # without NVIDIA's management library, each torch raises something else
        return None
