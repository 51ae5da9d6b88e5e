"""What a network of tests/reach is: small, ours, and with the constructs of networks that people run.

    @network("Wan 2.1", "sizes of the grid through a tensor and .tolist()")
    class Wan(nn.Module):
        def forward(self, x, t): ...

Unless it has inputs of its own, it is called with images x [B, 4, H, W] and times t [B], both with tangents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tests.foreign.stand_ins import COMPUTING
from tests.zoo.base import Draw, pick, randomise

__all__ = ["NETWORKS", "Network", "network"]

NETWORKS: dict[str, Network] = {}


@dataclass(frozen=True)
class Network:
    """A case, as tests.zoo.sweep.examine takes it."""

    name: str
    kind: type[nn.Module]
    of: str  # whose networks are like it
    construct: str
    draw: Callable[[Draw, int], dict[str, Any]]
    packages: tuple[str, ...] = ()  # which it imports, and of which there are stand-ins here
    tangents: tuple[str, ...] = ("x", "t")

    @property
    def config(self) -> dict[str, Any]:
        return {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Its packages can be imported; what they compute has derivatives, by which the network in float64 is right."""
        with pytest.MonkeyPatch.context() as patch:
            for name in self.packages:
                COMPUTING[name](patch)
            yield

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.kind().double().eval()
        randomise(model, 0)
        return model

    def inputs(self, variant: int = 0) -> dict[str, Any]:
        return self.draw(Draw(variant), variant)


def images(draw: Draw, variant: int) -> dict[str, Any]:
    batch, side = pick(variant, (2, 8), (3, 12))
    return {"x": draw.normal(batch, 4, side, side), "t": draw.time(batch, high=1.0)}


def network(
    of: str, construct: str, draw: Callable[[Draw, int], dict[str, Any]] = images, packages: tuple[str, ...] = ()
) -> Any:
    """Registers a class."""

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        NETWORKS[kind.__name__] = Network(kind.__name__, kind, of, construct, draw, packages)
        return kind

    return register
