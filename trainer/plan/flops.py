"""FLOPs of a running run, counted in a process of its own: the run's own graphs and random numbers stay untouched.

    with Counts(config) as counts:
        counts.of(query)     # None until the other process has answered; never waits

`python -m jvpgraph.trainer.plan.flops` is that process: settings and a query on its standard input, as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from jvpgraph.trainer import settings
from jvpgraph.trainer.batch import Batch
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.model.student import repeated_lists
from jvpgraph.trainer.plan.subject import META, Origins
from jvpgraph.trainer.plan.updates import costs_of
from jvpgraph.trainer.trigflow import SCALE, TrigFlow

log = logging.getLogger(__name__)

LEAVE_OUT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of torchrun


@dataclass(frozen=True)
class Query:
    """A batch of a stage as one process has it: its size, and each tensor's name, shape of a sample, and dtype."""

    stage: int
    size: int
    latents: tuple[int, ...]
    conditions: tuple[tuple[str, tuple[int, ...], str], ...] = ()

    @classmethod
    def of(cls, stage: int, batch: Batch) -> Query:
        cond = tuple((name, tuple(x.shape[1:]), str(x.dtype)[6:]) for name, x in sorted(batch.cond.items()))
        return cls(stage, len(batch), tuple(batch.x0.shape[1:]), cond)


class Counted(NamedTuple):
    """Of such a batch.

    Attributes:
        student, fake: FLOPs of a forward and a backward in an update, all that is asked of other networks included, and
            no recomputation of checkpointed blocks. A multiply-add counts 2.
        tokens: of a sample, as the network's first repeated block sees them; 0: it has none.
    """

    student: float
    fake: float
    tokens: int

    def of(self, name: str) -> float:
        """FLOPs of an update of the `student`, or of what is trained beside it."""
        return self.student if name == "student" else self.fake


class Counts:
    """Answers to queries, one after the other."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.known: dict[Query, Counted] = {}
        self.failed = False
        self.asked: Query | None = None
        self.process: subprocess.Popen[str] | None = None
        self.thread: threading.Thread | None = None
        self.told: tuple[str, str] = ("", "")

    def __enter__(self) -> Counts:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.process.kill()
        if self.thread is not None:
            self.thread.join()

    def of(self, query: Query) -> Counted | None:
        """The answer, if it is there; else asks, unless another one is being counted or none can be."""
        if self.thread is not None and not self.thread.is_alive():
            self._take()
        if query not in self.known and self.thread is None and not self.failed:
            self._ask(query)
        return self.known.get(query)

    def _ask(self, query: Query) -> None:
        env = {name: value for name, value in os.environ.items() if name not in LEAVE_OUT}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__],
            env={**env, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.asked = query
        text = json.dumps({"settings": settings.to_dict(self.config), "query": asdict(query)})
        self.thread = threading.Thread(target=self._listen, args=(self.process, text), daemon=True)
        self.thread.start()

    def _listen(self, process: subprocess.Popen[str], text: str) -> None:
        self.told = process.communicate(text)

    def _take(self) -> None:
        assert self.asked is not None
        assert self.process is not None
        answer, errors = self.told
        if self.process.returncode == 0:
            self.known[self.asked] = Counted(*json.loads(answer.splitlines()[-1]))
        else:
            self.failed = True
            log.warning(
                "FLOPs cannot be counted, and are left out of the log: %s\n"
                "`jvpgraph plan` with the same settings says more; log.flops=false asks for none.",
                errors.strip() or f"the process ended with status {self.process.returncode}",
            )
        self.asked = self.process = self.thread = None


def count(config: RunConfig, query: Query) -> Counted:
    """Raises ValueError where the network cannot be built without its numbers."""
    config = replace(config, student=replace(config.student, checkpoint_blocks=False))
    origins = Origins.of(config)
    cond = {
        name: torch.empty(1, *shape, dtype=getattr(torch, dtype), device=META)
        for name, shape, dtype in query.conditions
        if name != SCALE  # which a student is told anyway
    }
    sample = Batch(torch.empty(1, *query.latents, device=META), cond)
    costs = costs_of(config, query.stage, origins, sample, query.size)
    return Counted(costs.student.flops, costs.fake.flops, tokens_of(origins.base, sample))


@torch.no_grad()
def tokens_of(network: TrigFlow, sample: Batch) -> int:
    """Positions of the latents in the first repeated block, [B, N, D] or [B, D, ...]; 0 if there is no such block."""
    blocks = next(repeated_lists(network.net), None)
    found: list[int] = []

    def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in (kwargs.get("hidden_states"), *args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        shape = next((x.shape for x in tensors if x.dim() >= 3), None)
        if shape is not None:
            found.append(shape[1] if len(shape) == 3 else shape[2:].numel())

    if blocks is not None:
        handle = blocks[0].register_forward_pre_hook(look, with_kwargs=True)
        network(sample.x0.double(), sample.x0.new_empty(1).double(), sample.cond)
        handle.remove()
    return found[0] if found else 0


def main() -> None:
    given = json.load(sys.stdin)
    query = given["query"]
    conditions = tuple((name, tuple(shape), dtype) for name, shape, dtype in query["conditions"])
    asked = Query(query["stage"], query["size"], tuple(query["latents"]), conditions)
    try:
        print(json.dumps(count(settings.from_dict(RunConfig, given["settings"]), asked)))
    except Exception as error:  # told by whoever asked
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
