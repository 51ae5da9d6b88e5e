"""Small models that tests share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.models import Block, TinyDiT, inputs

__all__ = ["Block", "Checkpointed", "Computed", "CountOps", "Output", "TinyDiT", "inputs", "oracle"]


class Checkpointed(TinyDiT):
    def forward(self, x, t):
        c = self.time(torch.sin(t)[:, None])
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False)
        return self.head(x)


@dataclass
class Output:
    sample: Tensor
    index: Tensor | None = None


@dataclass
class Computed:
    """A field that the constructor computes stands before one that it is given."""

    norm: Tensor = field(init=False)
    sample: Tensor

    def __post_init__(self) -> None:
        self.norm = self.sample.norm()


def oracle(fn, primals, tangents):
    """torch.func.jvp with the math attention."""
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        return torch.func.jvp(fn, primals, tangents)


class CountOps(TorchDispatchMode):
    """How often each op ran."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran[str(func)] += 1
        return func(*args, **(kwargs or {}))


def assert_in_range(h, t):
    """Here, as pytest writes the assertions of tests anew, which Dynamo then does not know for such."""
    assert torch.isfinite(h).all()
    assert (t >= 0).all(), f"negative times: {t}"
