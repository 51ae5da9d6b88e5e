"""What a network is told beside a sample's own conditions: what is the same for all, and its guidance scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jvpgraph.trainer.batch import Condition, expand_condition
from jvpgraph.trainer.model.additions import EMBEDDED, added
from jvpgraph.trainer.prepare.families import FAMILIES
from jvpgraph.trainer.trigflow import SCALE, Around, Call


class WithConditions(Around):
    """A network's call with conditions that are the same for all samples; those of a batch come first.

    Args:
        constants: a number, or a list as the network takes it for one sample, by name.
    """

    def __init__(self, call: Call, constants: Mapping[str, Any]) -> None:
        super().__init__(call)
        self.constants = dict(constants)

    def __call__(self, net: nn.Module, x: Tensor, time: Tensor, cond: Condition, **second: Tensor) -> Tensor:
        constants = {name: filled(value, x.device)[None] for name, value in self.constants.items()}
        return self.call(net, x, time, {**expand_condition(constants, len(x)), **cond}, **second)


class WithScale(Around):
    """A student's call with the guidance scale that its teacher had, as the condition `guidance` of the network.

    It is each sample's own where the trainer drew one (SCALE), or `usual`, as in sampling.
    """

    takes_scale = True

    def __init__(self, call: Call, usual: float) -> None:
        super().__init__(call)
        self.usual = usual

    def __call__(self, net: nn.Module, x: Tensor, time: Tensor, cond: Condition, **second: Tensor) -> Tensor:
        rest = {name: value for name, value in cond.items() if name != SCALE}
        scale = cond.get(SCALE)
        if scale is None:
            scale = torch.full((len(x),), self.usual, device=x.device)
        return self.call(net, x, time, {**rest, "guidance": unit_of(net) * scale.float()}, **second)


class Watched(Mapping[str, Tensor]):
    """Conditions that know which of them were read."""

    def __init__(self, cond: Condition, names: set[str]) -> None:
        self.cond, self.names = cond, names

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return self.cond[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.cond)

    def __len__(self) -> int:
        return len(self.cond)


@contextmanager
def watched(model: nn.Module, more: Condition | None = None) -> Iterator[set[str]]:
    """The names of the conditions that the network's own call reads, of what it is given and `more`."""
    holder: Any = model
    while hasattr(holder.call, "call"):
        holder = holder.call
    inner, names = holder.call, set[str]()
    holder.call = lambda net, x, time, cond, **second: inner(
        net, x, time, Watched({**cond, **(more or {})}, names), **second
    )
    try:
        yield names
    finally:
        holder.call = inner


def unit_of(net: nn.Module) -> float:
    """What the network's `guidance` is for a scale of 1: Hunyuan's, by themselves, count in thousandths."""
    if EMBEDDED in added(net):
        return 1.0
    names = {cls.__name__ for cls in type(net).__mro__}  # FSDP makes a subclass
    if "HunyuanImageTransformer2DModel" in names:  # `prepare` knows no such family
        return 1000.0
    return next((family.guidance_scale for family in FAMILIES if family.network in names), 1.0)


def filled(value: Any, device: torch.device) -> Tensor:
    """`torch.tensor(value)` by ops that fill: nothing is copied to a GPU, and the meta device has them too."""
    if isinstance(value, list | tuple):
        return torch.stack([filled(part, device) for part in value])
    return torch.full((), value, device=device)
