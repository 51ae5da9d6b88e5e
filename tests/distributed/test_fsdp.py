"""FSDP2, HSDP, DDP and activation checkpointing around regions: the same numbers as in one process.

Every data-parallel rank takes its part of the batch. The loss is a sum over the batch, and gradients are averaged over
the data-parallel ranks, so the local loss is scaled by their number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import jvpgraph
from tests.distributed.harness import run
from tests.distributed.models import (
    BATCH,
    MODELS,
    QUIET,
    Answer,
    Errors,
    backend,
    check,
    dots_of,
    errors,
    float_leaves,
    gradients,
    loss,
    reference,
)
from tests.zoo.run import widened

pytestmark = [pytest.mark.usefixtures("one_thread"), *map(pytest.mark.filterwarnings, QUIET)]

BLOCKS = {"dit": ["blocks"], "wan": ["blocks"], "flux": ["transformer_blocks", "single_transformer_blocks"]}


def blocks(model: nn.Module, name: str) -> list[tuple[nn.ModuleList, int]]:
    return [(model.get_submodule(path), i) for path in BLOCKS[name] for i in range(len(model.get_submodule(path)))]


def shard(model: nn.Module, name: str, **settings: Any) -> nn.Module:
    """Every block, then what is left."""
    for parent, i in blocks(model, name):
        fully_shard(parent[i], **settings)
    return fully_shard(model, **settings)


def local(tree: dict[str, Any], part: int, parts: int) -> dict[str, Any]:
    """This rank's part of the batch."""
    mine = lambda x: x.chunk(parts)[part].contiguous()  # noqa: E731
    return {k: mine(x) if isinstance(x, Tensor) and x.dim() and len(x) == BATCH else x for k, x in tree.items()}


def gathered(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts)


def measure(dual: nn.Module, name: str, group: Any = None, steps: int = 1, model: nn.Module | None = None) -> Errors:
    """The errors of ``dual`` against one process, with the batch spread over the group."""
    net, rank, size = MODELS[name], dist.get_rank(group), dist.get_world_size(group)
    weight = torch.randn(reference(name).value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(steps):
        dual.zero_grad()
        with widened(dual):
            y, y_dot = dual(**local(net.inputs(), rank, size), tangents=local(net.tangents(), rank, size))
        (out,) = float_leaves(y)
        ((out * weight.chunk(size)[rank]).sum() * size).backward()
        got = Answer(gathered(out, group), gathered(dots_of(y_dot), group), gradients(model or dual.model, _plain_name))
    return errors(got, reference(name))


def _plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")


def with_fsdp(name: str, when: str = "before", mesh: tuple[int, ...] = (), steps: int = 2, **settings: Any) -> Errors:
    model = MODELS[name].build()
    if mesh:
        settings["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[: len(mesh)])
    if when == "before":
        shard(model, name, **settings)
    dual = jvpgraph.transform(model, regions="auto", backend=backend())
    if when == "after":
        shard(dual, name, **settings)
    found = measure(dual, name, steps=steps)
    assert "FSDP2" in dual.regions.reason
    assert all(not group.cause and group.graphs == 1 and group.calls for group in dual.regions.groups), dual.regions
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("name", MODELS)
def test_fsdp(name: str, ranks: int):
    check("FSDP2", name, run(ranks, with_fsdp, name))
