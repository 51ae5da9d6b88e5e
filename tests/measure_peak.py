"""Runs settings, and prints the most bytes of tensors that the steps after the first one need: a run to plan for.

    python -m tests.measure_peak settings.yaml [key=value ...]

What is alive when a step begins is counted by hand, since the profiler does not see what other threads free, such as
the writer of checkpoints; how far it rises within the step is what torch's CPU allocator says.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from jvpgraph.trainer import train as module
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.settings import load


def alive() -> int:
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and not x.is_meta]  # none of Dynamo's
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def rise(run: profile) -> int:
    waiting, found = list(run.profiler.kineto_results.experimental_event_tree()), []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.typed[0] == _EventType.Allocation:
            change = event.typed[1]
            found.append((event.start_time_ns, change.total_allocated, change.alloc_size))
    found.sort(key=lambda entry: entry[0])
    first = found[0][1] - found[0][2]
    return max(total for _, total, _ in found) - first


class Measured(module.Stage):
    most = 0

    def step(self, step: int) -> dict[str, Tensor]:
        if step == 1:  # compiles
            return super().step(step)
        held = alive()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            values = super().step(step)
        Measured.most = max(Measured.most, held + rise(run))
        return values


if __name__ == "__main__":
    module.Stage = Measured  # type: ignore[misc]
    torch.manual_seed(0)
    module.train(load(RunConfig, Path(sys.argv[1]), sys.argv[2:]), fresh=True)
    print(f"\npeak {Measured.most}")
