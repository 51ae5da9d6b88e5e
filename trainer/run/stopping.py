"""Stopping in time: SIGTERM, SIGINT and a time limit end a run after the update that is being made, with a checkpoint.

with Stop(limit=3600) as stop:
    for step in ...:
        ...
        if stop.agreed(ranks, reserve=seconds_of_a_save):   # all processes, after the same step
            save()
            raise stop.stopped(step)
"""

from __future__ import annotations

import re
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from jvpgraph.trainer.run.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TIME_LIMIT = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
PATIENCE = 1.0  # seconds in which the same signal may come twice: from a terminal, and from torchrun


class Stopped(SystemExit):
    """The run was told to stop and has saved where it stands. Uncaught, it leaves the process with the status.

    Attributes:
        code: 128 + the signal's number, as a shell reports it (143 for SIGTERM, 130 for SIGINT), or TIME_LIMIT.
        step: the last one done.
    """

    def __init__(self, code: int, step: int) -> None:
        super().__init__(code)
        self.step = step

    def __str__(self) -> str:
        why = "the time limit" if self.code == TIME_LIMIT else signal.Signals(int(self.code or 0) - 128).name
        return f"stopped by {why} and saved after step {self.step}"


class Stop:
    """Whether to stop, and why.

    While it is entered, a first signal only asks for a stop; a second one, later than PATIENCE, ends the process at
    once as it would without this. Outside of the main thread, where Python handles no signals, only the limit counts.

    Args:
        limit: seconds from now on; None: no limit.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.begun = time.monotonic()
        self.limit = limit
        self.code = 0  # what to leave with; 0: go on
        self.asked = 0.0
        self.longest = 0.0  # seconds from one call of `agreed` to the next
        self.calls: list[float] = []  # when the last one was
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.ask) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.code:
            self.code, self.asked = 128 + number, now
        elif now - self.asked > PATIENCE:
            self.__exit__()
            signal.raise_signal(number)

    def agreed(self, ranks: Ranks, *, reserve: float = 0.0) -> bool:
        """Whether to stop now: the same on all processes, each of which calls this after the same step.

        Args:
            ranks: the processes.
            reserve: seconds that a save takes. A stop comes early enough for one more step and the save.
        """
        now = time.monotonic()
        # The first step compiles, and the time before it loads: neither comes again.
        self.longest = max(self.longest, now - self.calls[-1]) if len(self.calls) > 1 else 0.0
        self.calls = [*self.calls[-1:], now]
        needed = 1.5 * (self.longest + reserve) + 0.01 * (self.limit or 0)
        if not self.code and self.limit is not None and now - self.begun + needed >= self.limit:
            self.code = TIME_LIMIT
        if ranks.group is None:
            return self.code != 0
        code = torch.tensor(self.code)
        dist.all_reduce(code, dist.ReduceOp.MAX, group=ranks.group)
        if code:  # else a signal that came meanwhile stays, for the next call: the other processes do not know of it
            self.code = int(code)
        return bool(code)

    def stopped(self, step: int) -> Stopped:
        return Stopped(self.code, step)


FORMAT = re.compile(r"(?:(?P<d>\d+)-)?(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d\d)|(?P<number>\d+(?:\.\d*)?)(?P<unit>[smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """`90s`, `30m`, `3.5h`, `2d`, or SLURM's [days-][hours:]minutes:seconds, in seconds.

    Raises:
        ValueError: it is none of these, or no time at all.
    """
    match = FORMAT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no time: write 90s, 30m, 3.5h, 2d, or [days-][hours:]minutes:seconds")
    parts = match.groupdict()
    if parts["unit"]:
        seconds = float(parts["number"]) * SECONDS[parts["unit"]]
    else:
        seconds = float(sum(int(parts[unit] or 0) * SECONDS[unit] for unit in "dhms"))
    if not seconds:
        raise ValueError(f"{text!r} is no time at all")
    return seconds
