"""What a checkpoint of a run keeps besides networks and optimisers: random streams, and means not yet logged."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor


class RandomState:
    """Every random stream of the process, for a checkpoint: the run's, torch's, NumPy's, Python's."""

    def __init__(self, rng: torch.Generator, elsewhere: int | None = None) -> None:
        self.rng = rng
        self.elsewhere = elsewhere  # the seed to begin again with on another kind of device; None: refuse that

    def state_dict(self) -> dict[str, Any]:
        device = self.rng.device.type
        state = {"device": device, "run": self.rng.get_state(), "torch": torch.get_rng_state()}
        state |= {"numpy": np.random.get_state(), "python": random.getstate()}
        if device == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.rng.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["device"] != self.rng.device.type:
            if self.elsewhere is None:
                raise ValueError(
                    f"this run's random numbers were drawn on {state['device']}, and those of {self.rng.device.type} "
                    f"are others: set device to {state['device']}; or add --change device to go on with others"
                )
            # Not the seed alone: the numbers of the first steps would come again.
            self.rng.manual_seed(self.elsewhere + int(state["run"].long().sum()))
            return
        self.rng.set_state(state["run"])
        torch.set_rng_state(state["torch"])
        np.random.set_state(state["numpy"])
        random.setstate(state["python"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.rng.device)


T = TypeVar("T")


def unseen(work: Callable[[], T]) -> T:
    """What it gives; random numbers that it draws are put back."""
    state = RandomState(torch.Generator("cuda") if torch.cuda.is_available() else torch.Generator())
    before = state.state_dict()
    try:
        return work()
    finally:
        state.load_state_dict(before)


class Means:
    """Running means of what steps report, on the device until they are taken."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])

    def take(self) -> dict[str, float]:
        means = {name: (total / self.counts[name]).item() for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means
