"""What one process holds of the networks when they are spread as the trainer's `Layout.spread` does it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from jvpgraph.trainer.config import OptimizerConfig
from jvpgraph.trainer.model.ema import PowerEMA
from jvpgraph.trainer.model.networks import trainable
from jvpgraph.trainer.model.offload import units
from jvpgraph.trainer.model.optimizer import MasterAdamW
from jvpgraph.trainer.model.student import repeated_blocks
from jvpgraph.trainer.plan.meter import Meter
from jvpgraph.trainer.run.parallel import main_dtype
from jvpgraph.trainer.trigflow import TrigFlow


@dataclass(frozen=True)
class Spread:
    """How the processes of a run divide it."""

    sizes: Mapping[str, int]  # as `sizes_of` gives them

    @property
    def parts(self) -> int:
        """Of each batch."""
        return self.sizes["dp_replicate"] * self.sizes["dp_shard"]

    @property
    def tokens(self) -> int:
        """Parts that a sample's tokens are split into."""
        return self.sizes["cp_ring"] * self.sizes["cp_ulysses"]

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has the parameters."""
        return self.parts > 1 or self.tokens > 1

    @property
    def shards(self) -> int:
        return self.sizes["dp_shard"] * self.tokens

    @property
    def many(self) -> bool:
        return math.prod(self.sizes.values()) > 1


class Held(NamedTuple):
    """Of one network in one process.

    Attributes:
        shapes: of this process's part of each parameter.
        root: bytes of the parameters outside of blocks, which FSDP2 gathers for the whole of a pass; 0 without it.
        block: of those of the largest block, likewise.
        reduced: of the gradients of the largest block, and of the float32 copy that is reduced.
        gradients: of all of them, before they are reduced.
    """

    shapes: dict[str, tuple[int, ...]]
    root: int
    block: int
    reduced: int
    gradients: int


def held(network: TrigFlow, spread: Spread) -> Held:
    """The parts of a network's parameters that one process has, and what it gathers to use them."""
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    if spread.sizes["tp"] > 1:
        shapes |= split_by_plan(network.net, spread.sizes["tp"])
    gradients = nbytes(p for p in network.parameters() if p.requires_grad)
    if not spread.sharded:
        return Held(shapes, 0, 0, 0, gradients)
    names = {p: name for name, p in network.named_parameters()}
    taken, whole, blocks = set[nn.Parameter](), set[nn.Parameter](), list[list[nn.Parameter]]()
    for module in (*repeated_blocks(network.net), network):
        own = [p for p in module.parameters() if p not in taken]
        whole |= main_dtype(own)[1]
        blocks.append([p for p in own if p not in whole])
        taken |= set(blocks[-1])
    for p in taken:
        first, *rest = shapes[names[p]] or (1,)
        shapes[names[p]] = (math.ceil(first / spread.shards), *rest)
    root = blocks.pop()
    sizes = [nbytes(block) for block in blocks]
    reduced = [sum(p.nbytes + p.numel() * max(4, p.itemsize) for p in block if p.requires_grad) for block in blocks]
    return Held(shapes, nbytes(root), max(sizes, default=0), max(reduced, default=0), gradients)


class Whole(NamedTuple):
    """Bytes of what a network that rests brings to the device.

    Attributes:
        largest: of what is outside of blocks, and of the largest block.
        blocks: of all blocks.
        everything: of all parameters.
        trained: of those that have gradients.
    """

    largest: int
    blocks: int
    everything: int
    trained: int


def brought(network: TrigFlow) -> Whole:
    *blocks, root = (nbytes(unit.parameters) for unit in units(network))
    trained = nbytes(p for p in network.parameters() if p.requires_grad)
    return Whole(root + max(blocks, default=0), sum(blocks), root + sum(blocks), trained)


def split_by_plan(net: nn.Module, size: int) -> dict[str, tuple[int, ...]]:
    """What tensor parallel leaves of the parameters that the network's plan names."""
    plan = getattr(net, "tp_plan", None) or getattr(net, "_tp_plan", None) or {}
    found = {}
    for pattern, style in plan.items():
        match = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        dim = 0 if style == "colwise" or isinstance(style, ColwiseParallel) else 1
        if dim and style != "rowwise" and not isinstance(style, RowwiseParallel):
            continue
        for name, p in net.named_parameters():
            if match.fullmatch(name.rpartition(".")[0]) and p.dim() > dim:
                shape = list(p.shape)
                shape[dim] //= size
                found[f"net.{name}"] = tuple(shape)
    return found


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class Training(NamedTuple):
    """Bytes of what an optimiser and averages hold, of the gradients, and of a step beyond all of those."""

    states: int
    averages: int
    gradients: int
    step: int


def training(
    network: TrigFlow,
    shapes: Mapping[str, Sequence[int]],
    settings: OptimizerConfig,
    widths: Sequence[float],
    on_gpu: bool,
) -> Training:
    """Makes the run's own optimiser and averages on the meta device, and takes a step.

    Args:
        widths: of averages.
        on_gpu: many parameters in one step, as torch does on a GPU.
    """
    parameters = {}
    for name, p in trainable(network).items():
        parameters[name] = nn.Parameter(torch.empty(*shapes[name], dtype=p.dtype, device="meta"))
        parameters[name].grad = torch.empty_like(parameters[name])
    optimizer = MasterAdamW(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        clip_norm=settings.clip_norm,
        kind=settings.kind,
        foreach=on_gpu,
    )
    emas = [PowerEMA(optimizer.masters, width) for width in widths]
    state = optimizer.state_dict()
    states = [tensor for part in state.values() for tensor in part.values()]
    averages = [tensor for ema in emas for tensor in ema.parameters.values()]
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    with Meter([*parameters.values(), *states, *averages, *gradients]) as meter:
        optimizer.gradient_norm()
        optimizer.step()
        for ema in emas:
            ema.update(optimizer.masters)
    return Training(nbytes(states), nbytes(averages), nbytes(gradients), max(meter.timeline, default=0))
