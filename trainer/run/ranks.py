"""The processes of a run, for agreeing on values that are no tensors: what one says, and what fails in one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """All of them; one if there is no process group. `timeout`: how long one waits for others, torch's by default."""

    def __init__(self, timeout: timedelta | None = None) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        self.timeout = timeout
        self.group = dist.new_group(backend="gloo", timeout=timeout) if grouped else None
        self.rank = dist.get_rank(self.group) if grouped else 0
        self.size = dist.get_world_size(self.group) if grouped else 1
        self.first = self.rank == 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each rank. If it raises anywhere, it raises everywhere, and nobody is left waiting.

        Ranks where it did not raise itself get an error of the same kind, which names those where it did.
        """
        value, error = None, None
        try:
            value = work()
        except Exception as raised:
            error = raised
        if self.group is None:
            if error is not None:
                raise error
            return [value]  # type: ignore[list-item]
        results: list[Any] = [None] * self.size
        dist.all_gather_object(results, (value, error and Failure.of(error)), group=self.group)
        if error is not None:
            raise error
        failed = {rank: report for rank, (_, report) in enumerate(results) if report is not None}
        if failed:
            message = "; ".join(f"rank {rank}: {report.message}" for rank, report in failed.items())
            raise next(iter(failed.values())).error(message)
        return [value for value, _ in results]

    def agree(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, where alone it runs."""
        return self.gather(lambda: work() if self.first else None)[0]  # type: ignore[return-value]

    on_first = agree


@dataclass(frozen=True)
class Failure:
    """What other ranks are told of an error: names only, for an error itself may not survive pickling."""

    kinds: list[tuple[str, str]]  # module and name of its class, then of those it is derived from
    message: str
    system: tuple[int | None, str | None, Any]  # errno, strerror and filename, where it is the system's

    @classmethod
    def of(cls, error: Exception) -> Failure:
        system = (error.errno, error.strerror, error.filename) if isinstance(error, OSError) else (None, None, None)
        kinds = [(kind.__module__, kind.__qualname__) for kind in type(error).__mro__]
        return cls(kinds, f"{type(error).__name__}: {error}", system)

    def error(self, message: str) -> Exception:
        """An error with this message, of the nearest kind that this rank knows too."""
        known = (getattr(sys.modules.get(module), name, None) for module, name in self.kinds)
        kind = next(kind for kind in known if isinstance(kind, type) and issubclass(kind, Exception))
        # A kind may want other arguments than a message; whoever catches it asks only for its class.
        told = type(kind.__name__, (kind,), {"__init__": _told, "__str__": lambda error: error.args[0]})(message)
        if isinstance(told, OSError):
            told.errno, told.strerror, told.filename = self.system
        return told


def _told(error: Exception, message: str) -> None:
    error.args = (message,)
