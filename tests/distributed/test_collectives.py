"""Collectives inside a model: their tangents on real process groups against differences and the backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import jvpgraph
from jvpgraph.config import Config
from jvpgraph.graph.meta import TANGENT_META
from jvpgraph.passes.context import Context
from jvpgraph.passes.pair_collectives import pair_collectives
from jvpgraph.verify import ATEN, verify
from tests.distributed.harness import run

c10d = torch.ops._c10d_functional
RANKS = [2, pytest.param(4, marks=pytest.mark.matrix)]
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


def gathered_along_1(x: Tensor) -> Tensor:
    # Torch's own gather_dim=1 cannot be captured in 2.11.
    return torch.cat(funcol.all_gather_tensor(x, 0, world()).chunk(dist.get_world_size()), 1)


def permuted(x: Tensor) -> Tensor:
    ranks = dist.get_world_size()
    return funcol.permute_tensor(x.sin().flatten(), [(r + 1) % ranks for r in range(ranks)], world())


def redistributed(x: Tensor) -> Tensor:
    return torch.ops._dtensor.shard_dim_alltoall(x, 0, 1, world().group_name)


# x is [8, 3], another on every rank; sines in front, so that the tangent is not what came in.
def scattered_both(x: Tensor) -> list[Tensor]:
    return funcol.reduce_scatter_tensor_coalesced([x, 2 * x], "sum", [0, 0], world())


COLLECTIVES: dict[str, Callable[[Tensor], Any]] = {
    "all_reduce sum": lambda x: funcol.all_reduce(x.sin(), "sum", world()).cos(),
    "all_reduce avg": lambda x: funcol.all_reduce(x.sin(), "avg", world()).cos(),
    "all_reduce max": lambda x: funcol.all_reduce(x.sin(), "max", world()).cos(),
    "all_reduce min": lambda x: funcol.all_reduce(x.sin(), "min", world()).cos(),
    "all_reduce coalesced": lambda x: funcol.all_reduce_coalesced([x.sin(), x[0].cos()], "sum", world())[1].exp(),
    "all_reduce in place": in_place,
    "all_reduce of a vector": lambda x: funcol.all_reduce(x[:, 1].sin(), "sum", world()).cos(),
    "all_gather": lambda x: funcol.all_gather_tensor(x.sin(), 0, world()).cos(),
    "all_gather of dim 1": lambda x: gathered_along_1(x.sin()).cos(),
    "all_gather in place": gathered_in_place,
    "all_gather with a backward": lambda x: funcol.all_gather_tensor_autograd(x.sin(), 1, world()).cos(),
    "all_gather coalesced": lambda x: funcol.all_gather_into_tensor_coalesced([x.sin(), x[0].cos()], world())[0].exp(),
    "reduce_scatter": lambda x: funcol.reduce_scatter_tensor(x.sin(), "sum", 0, world()).cos(),
    "reduce_scatter coalesced": lambda x: scattered_both(x.sin())[0].exp(),
    "reduce_scatter with a backward": lambda x: funcol.reduce_scatter_tensor_autograd(x.sin(), "sum", 0, world()).cos(),
    "all_to_all": lambda x: funcol.all_to_all_single(x.sin(), None, None, world()).cos(),
    "all_to_all uneven": lambda x: funcol.all_to_all_single(rows_for_uneven(x.sin()), *uneven(), world()).cos(),
    "all_to_all with a backward": lambda x: funcol.all_to_all_single_autograd(x.sin(), None, None, world()).cos(),
    "all_to_all of a vector": lambda x: funcol.all_to_all_single(x[:, 1].sin(), None, None, world()).cos(),
    "all_to_all between dims": lambda x: redistributed(x[:, None].repeat(1, 4, 1).sin()).cos(),
    "broadcast": lambda x: funcol.broadcast(x.sin(), 1, world()).cos(),
    "permute": permuted,
}
COMPILED = ("all_reduce sum", "all_reduce max", "all_gather of dim 1", "reduce_scatter")


def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, x_dot = torch.randn(2, 8, 3, generator=generator, dtype=torch.float64)
    return x, x_dot


def several(x: Tensor) -> Tensor:
    return torch.cat([COLLECTIVES[name](x).flatten() for name in COMPILED])


def error_of_tangent(name: str, backend: str) -> float:
    collective = COLLECTIVES.get(name, several)
    x, x_dot = drawn()
    with torch.no_grad():
        slope = (collective(x + STEP * x_dot) - collective(x - STEP * x_dot)) / (2 * STEP)
        y, y_dot = jvpgraph.jvp(collective, (x,), (x_dot,), backend=backend)
        torch.testing.assert_close(y, collective(x), rtol=1e-13, atol=1e-15)
    return (y_dot - slope).abs().max().item() / slope.abs().max().item()


def errors_of_tangents(names: list[str], backend: str) -> dict[str, float]:
    return {name: error_of_tangent(name, backend) for name in names}


@pytest.mark.long
@pytest.mark.parametrize("ranks", RANKS)
def test_tangents_of_collectives(ranks: int):
    for found in run(ranks, errors_of_tangents, list(COLLECTIVES), "eager"):
        assert {name: error for name, error in found.items() if not error < 1e-8} == {}


@pytest.mark.long
def test_compiled_by_inductor():
    for found in run(2, errors_of_tangents, ["several", "all_to_all uneven"], "inductor"):
        assert {name: error for name, error in found.items() if not error < 1e-8} == {}


def ties() -> list[list[float]]:
    x = torch.tensor([1.0, float(dist.get_rank()), torch.nan], dtype=torch.float64)
    x_dot = torch.full_like(x, 1.0 + dist.get_rank())
    return [out.tolist() for out in jvpgraph.jvp(largest, (x,), (x_dot,), backend="eager")]


def largest(x: Tensor) -> Tensor:
    return funcol.all_reduce(x, "max", world())


@pytest.mark.long
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


@pytest.mark.long
def test_product_over_ranks_is_refused():
    for message in run(2, refused):
        assert "it reduces by product" in message
        assert "test_collectives.py" in message


# ------------------------------------------------------------------------------------------ pair_collectives

SELECTING = ("all_reduce max", "all_reduce min")  # their tangents are other collectives
ONE_BY_ONE = ("reduce_scatter coalesced",)  # gloo launches each tensor of a list


def launches(call: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and how many collectives the process group started for it."""
    before = world()._get_sequence_number_for_group()
    out = call()
    return out, world()._get_sequence_number_for_group() - before


def paired_and_apart(name: str) -> tuple[int, int, int, float]:
    """Collectives launched by the primal, the dual, the dual without the pass; how far the duals differ, relatively."""
    collective, (x, x_dot) = COLLECTIVES[name], drawn()
    apart = Config(skip_passes=("pair_collectives",))

    def dual(config: Config) -> Any:
        return jvpgraph.jvp(collective, (x,), (x_dot,), backend="eager", config=config)

    with torch.no_grad():
        dual(Config()), dual(apart)  # compiled now
        _, alone = launches(lambda: collective(x))
        together, launched = launches(lambda: dual(Config()))
        separate, launched_apart = launches(lambda: dual(apart))
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(together, separate))
    return alone, launched, launched_apart, difference


def all_paired_and_apart(names: list[str]) -> dict[str, tuple[int, int, int, float]]:
    return {name: paired_and_apart(name) for name in names}


@pytest.mark.long
@pytest.mark.parametrize("ranks", RANKS)
def test_tangents_cost_no_launch(ranks: int):
    names = [name for name in COLLECTIVES if name not in (*SELECTING, *ONE_BY_ONE)]
    for found in run(ranks, all_paired_and_apart, names):
        for name, (alone, launched, apart, difference) in found.items():
            assert launched == alone > 0, name
            assert apart == 2 * alone, name
            # More than two terms are added in an order that depends on the place in the message.
            assert difference <= (1e-14 if ranks > 2 and "all_reduce" in name else 0), name


def calls_of_lists() -> int:
    compiler = jvpgraph.backend("eager")
    jvpgraph.jvp(COLLECTIVES["reduce_scatter coalesced"], drawn()[:1], drawn()[1:], backend=compiler)
    return compiler.reports[-1].collectives.total()


@pytest.mark.long
def test_tangents_of_a_list_join_the_list():
    assert run(2, calls_of_lists) == [1, 1]


X = torch.randn(4, 2)


def graph_of(fn: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> fx.Graph:
    """As linearize leaves it: each collective of the second argument is the tangent of one of the first."""
    graph = make_fx(fn, tracing_mode="fake")(X, X).graph
    sent = [node for node in graph.nodes if "all_" in str(node.target)]
    for primal, tangent in zip(sent[::2], sent[1::2]):
        tangent.meta[TANGENT_META] = primal.name
    return graph


def paired(graph: fx.Graph) -> int:
    context = Context(Config())
    pair_collectives(graph.owning_module, context)
    verify(graph.owning_module, ATEN, "pair_collectives")
    return context.report.paired


def reduced(x: Tensor) -> Tensor:
    return c10d.all_reduce.default(x, "sum", "0")


def collectives_in(graph: fx.Graph) -> list[str]:
    return [node.target._schema.name.split("::")[1] for node in graph.nodes if "all_" in str(node.target)]


def test_what_the_tangent_needs_comes_first():
    def fn(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
        y = reduced(x)
        y_dot = reduced(x_dot.sin() * x)
        return c10d.wait_tensor(y), c10d.wait_tensor(y_dot)

    graph = graph_of(fn)
    assert paired(graph) == 1
    assert collectives_in(graph) == ["all_reduce_coalesced"]
    assert paired(graph) == 0, "a second run finds nothing"


def test_a_tangent_that_needs_its_primal_stays_apart():
    def fn(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
        y = c10d.wait_tensor(reduced(x))
        return y, c10d.wait_tensor(reduced(x_dot * y))

    graph = graph_of(fn)
    before = str(graph)
    assert paired(graph) == 0
    assert str(graph) == before


def test_other_arguments_stay_apart():
    def fn(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
        y, y_dot = reduced(x), c10d.all_reduce.default(x_dot, "avg", "0")
        return c10d.wait_tensor(y), c10d.wait_tensor(y_dot)

    assert paired(graph_of(fn)) == 0


def test_a_result_that_nobody_waits_for_stays_apart():
    def fn(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
        y = c10d.all_to_all_single.default(x, [4], [4], "0")
        return y, c10d.wait_tensor(c10d.all_to_all_single.default(x_dot, [4], [4], "0"))

    assert paired(graph_of(fn)) == 0


def explained() -> tuple[str, int]:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return COLLECTIVES["all_gather"](x)

    x, x_dot = drawn()
    found = jvpgraph.transform(Model()).explain(x, tangents={"x": x_dot})
    return str(found), found.paired


@pytest.mark.long
def test_explain_counts_them():
    text, count = run(2, explained)[0]
    assert count == 1
    assert "1 for primal and tangent at once" in text
