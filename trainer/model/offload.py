"""Networks that rest on the CPU: the parameters of a block are on the device while the block computes.

They are copied in the forward, within what is checkpointed, so that a block which is computed again fetches them again.
A trained network's gradients come back the same way; its optimiser finds parameters, gradients and moments on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jvpgraph.trainer.model.parts import local
from jvpgraph.trainer.model.student import CheckpointedBlock, checkpointed, repeated_blocks
from jvpgraph.trainer.trigflow import TrigFlow


@dataclass
class Traffic:
    """Bytes that were copied between the CPU and the device, both ways together."""

    bytes: int = 0

    def take(self) -> int:
        """Since it was last taken."""
        taken, self.bytes = self.bytes, 0
        return taken


@dataclass(frozen=True)
class Unit:
    """A block of a network, or what is outside of all blocks: what is fetched together."""

    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]  # where its parameters are

    @property
    def parameters(self) -> list[nn.Parameter]:
        found = {id(p): p for owner, name in self.places if (p := owner._parameters[name]) is not None}
        return list(found.values())


def units(model: TrigFlow) -> list[Unit]:
    """The blocks of a network, and the whole of it with the parameters that no block has."""
    taken, found = set[tuple[int, str]](), []
    for module in (*repeated_blocks(model.net), model):
        places = [(owner, name) for owner in module.modules() for name, p in owner._parameters.items() if p is not None]
        own = tuple((owner, name) for owner, name in places if (id(owner), name) not in taken)
        taken |= {(id(owner), name) for owner, name in own}
        found.append(Unit(module, own))
    return found


def rest(model: TrigFlow, device: torch.device, traffic: Traffic) -> TrigFlow:
    """The model itself, its parameters on the CPU but for the time of their use; its buffers on `device`."""
    for unit in units(model):
        for parameter in unit.parameters if device.type == "cuda" else ():
            pin(parameter)
        plain = type(unit.module)
        if issubclass(plain, CheckpointedBlock):
            unit.module.__class__ = checkpointed(resting(plain.plain_class))  # type: ignore[arg-type]
        else:
            unit.module.__class__ = resting(plain)  # type: ignore[arg-type]
        unit.module.rests = Rests(unit, device, traffic)  # type: ignore[assignment]
    return buffers_to(model, device)


def pin(parameter: nn.Parameter) -> None:
    """Moves a parameter to memory from which copies need not wait."""
    if hasattr(parameter, "__tensor_flatten__"):  # a quantised one
        for name in parameter.__tensor_flatten__()[0]:
            setattr(parameter, name, getattr(parameter, name).pin_memory())
    else:
        parameter.data = parameter.data.pin_memory()


def buffers_to(model: TrigFlow, device: torch.device) -> TrigFlow:
    for owner in model.modules():
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else buffer.to(device)
    return model


@dataclass(frozen=True)
class Rests:
    """What a module that rests knows of itself."""

    unit: Unit
    device: torch.device
    traffic: Traffic

    @contextmanager
    def fetched(self) -> Iterator[None]:
        """Copies stand in the parameters' places. Autograd keeps those that a backward needs, and no others stay."""
        kept = [owner._parameters[name] for owner, name in self.unit.places]
        copies = {id(p): p.to(self.device, non_blocking=True, copy=True) for p in self.unit.parameters}
        self.traffic.bytes += sum(map(nbytes, self.unit.parameters))
        if torch.is_grad_enabled():
            self.traffic.bytes += sum(nbytes(p) for p in self.unit.parameters if p.requires_grad)  # the gradients
        try:
            for (owner, name), parameter in zip(self.unit.places, kept):
                owner._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
            yield
        finally:
            for (owner, name), parameter in zip(self.unit.places, kept):
                owner._parameters[name] = parameter


@functools.cache
def resting(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward fetches its parameters; as `checkpointed`, it leaves names, copies and hooks alone."""
    plain_forward = plain.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.rests.fetched():
            return plain_forward(self, *args, **kwargs)

    return type(plain.__name__, (plain,), {"forward": forward})


def count_gathers(model: TrigFlow, traffic: Traffic) -> None:
    """Counts what FSDP2 fetches from the CPU for each block, which it does before a forward and before its backward."""
    for unit in units(model):
        unit.module.register_forward_pre_hook(functools.partial(_count, unit.parameters, traffic))


def _count(parameters: Sequence[nn.Parameter], traffic: Traffic, *_: Any) -> None:
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    own = sum(nbytes(p) for p in sharded)
    trained = sum(nbytes(p) for p in sharded if p.requires_grad)
    back = torch.is_grad_enabled() and trained > 0
    traffic.bytes += 2 * own + trained if back else own


def nbytes(tensor: Tensor) -> int:
    """Of this rank's part, and of what a quantised tensor is made of."""
    tensor = local(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(nbytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes
