"""Collectives inside a model: their tangents on real process groups against differences and the backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

import jvpgraph
from tests.distributed.harness import run

RANKS = (2, 4)
STEP = 1e-6


def world() -> dist.ProcessGroup:
    return dist.distributed_c10d._get_default_group()


def uneven() -> tuple[list[int], list[int]]:
    """Rank r sends r + 1 rows to everybody: what arrives in this order, and what is sent."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    return [r + 1 for r in range(ranks)], [rank + 1] * ranks


def rows_for_uneven(x: Tensor) -> Tensor:
    return x.repeat(2, 1)[: sum(uneven()[1])]


def in_place(x: Tensor) -> Tensor:
    y = x.sin()
    dist.all_reduce(y)
    return y


def gathered_in_place(x: Tensor) -> Tensor:
    y = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(y, x.sin())
    return y


def permuted(x: Tensor) -> Tensor:
    ranks = dist.get_world_size()
    return funcol.permute_tensor(x.sin().flatten(), [(r + 1) % ranks for r in range(ranks)], world())


# x is [8, 3], another on every rank; sines in front, so that the tangent is not what came in.
COLLECTIVES: dict[str, Callable[[Tensor], Any]] = {
    "all_reduce sum": lambda x: funcol.all_reduce(x.sin(), "sum", world()).cos(),
    "all_reduce max": lambda x: funcol.all_reduce(x.sin(), "max", world()).cos(),
    "all_reduce min": lambda x: funcol.all_reduce(x.sin(), "min", world()).cos(),
    "all_reduce coalesced": lambda x: funcol.all_reduce_coalesced([x.sin(), x[0].cos()], "sum", world())[1].exp(),
    "all_reduce in place": in_place,
    "all_gather": lambda x: funcol.all_gather_tensor(x.sin(), 0, world()).cos(),
    "all_gather of dim 1": lambda x: funcol.all_gather_tensor(x.sin(), 1, world()).cos(),
    "all_gather in place": gathered_in_place,
    "all_gather with a backward": lambda x: funcol.all_gather_tensor_autograd(x.sin(), 1, world()).cos(),
    "all_gather coalesced": lambda x: funcol.all_gather_into_tensor_coalesced([x.sin(), x[0].cos()], world())[0].exp(),
    "reduce_scatter": lambda x: funcol.reduce_scatter_tensor(x.sin(), "sum", 0, world()).cos(),
    "reduce_scatter with a backward": lambda x: funcol.reduce_scatter_tensor_autograd(x.sin(), "sum", 0, world()).cos(),
    "all_to_all": lambda x: funcol.all_to_all_single(x.sin(), None, None, world()).cos(),
    "all_to_all uneven": lambda x: funcol.all_to_all_single(rows_for_uneven(x.sin()), *uneven(), world()).cos(),
    "all_to_all with a backward": lambda x: funcol.all_to_all_single_autograd(x.sin(), None, None, world()).cos(),
    "broadcast": lambda x: funcol.broadcast(x.sin(), 1, world()).cos(),
    "permute": permuted,
}


def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, x_dot = torch.randn(2, 8, 3, generator=generator, dtype=torch.float64)
    return x, x_dot


def error_of_tangent(name: str, backend: str) -> float:
    collective = COLLECTIVES[name]
    x, x_dot = drawn()
    with torch.no_grad():
        slope = (collective(x + STEP * x_dot) - collective(x - STEP * x_dot)) / (2 * STEP)
        y, y_dot = jvpgraph.jvp(collective, (x,), (x_dot,), backend=backend)
        torch.testing.assert_close(y, collective(x), rtol=1e-14 * (backend == "inductor"), atol=0)
    return (y_dot - slope).abs().max().item() / slope.abs().max().item()


def errors_of_tangents(names: list[str], backend: str) -> dict[str, float]:
    return {name: error_of_tangent(name, backend) for name in names}


@pytest.mark.parametrize("ranks", RANKS)
def test_tangents_of_collectives(ranks: int):
    for found in run(ranks, errors_of_tangents, list(COLLECTIVES), "eager"):
        assert {name: error for name, error in found.items() if not error < 1e-8} == {}


def test_compiled_by_inductor():
    names = ["all_reduce sum", "all_reduce max", "all_gather of dim 1", "all_to_all uneven", "reduce_scatter"]
    for found in run(2, errors_of_tangents, names, "inductor"):
        assert {name: error for name, error in found.items() if not error < 1e-8} == {}


def ties() -> list[list[float]]:
    x = torch.tensor([1.0, float(dist.get_rank()), torch.nan], dtype=torch.float64)
    x_dot = torch.full_like(x, 1.0 + dist.get_rank())
    return [out.tolist() for out in jvpgraph.jvp(largest, (x,), (x_dot,), backend="eager")]


def largest(x: Tensor) -> Tensor:
    return funcol.all_reduce(x, "max", world())


def test_ranks_that_tie_share_equally_and_nan_stays():
    for value, tangent in run(2, ties):
        assert value[:2] == [1.0, 1.0]
        assert tangent[:2] == [1.5, 2.0]
        assert math.isnan(value[2])
        assert math.isnan(tangent[2])


def refused() -> str:
    def multiplied(x: Tensor) -> Tensor:
        return funcol.all_reduce(x, "product", world())

    try:
        jvpgraph.jvp(multiplied, drawn()[:1], drawn()[1:], backend="eager")
    except jvpgraph.UnsupportedOp as error:
        return str(error)
    return "it ran"


def test_product_over_ranks_is_refused():
    for message in run(2, refused):
        assert "it reduces by product" in message
        assert "test_collectives.py" in message
