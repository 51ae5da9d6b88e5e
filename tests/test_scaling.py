"""benchmarks/scaling.py on a small block: its figures against closed forms, and against what FSDP2 sends."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from jvpgraph.rules import wide

pytest.importorskip("diffusers", minversion="0.36")
costs, scaling = map(importlib.import_module, ("benchmarks.costs", "benchmarks.scaling"))

pytestmark = pytest.mark.slow
RANKS = 8
N, D, L, HIDDEN = 64, 64, 16, 128
SMALL = scaling.Shape(tokens=N, width=D, heads=8, ffn=HIDDEN, text=L)
BF16, F32 = 2, 4  # bytes
Layout = scaling.Layout


@functools.cache
def cost(*axes: int) -> Any:
    with mock.patch.object(wide, "THIN", 0):  # of this block all products would be, and take their tangents twice
        return scaling.measure(SMALL, Layout(*axes))


@pytest.mark.long
def test_flops_of_one_rank() -> None:
    """Linear layers of x and of the text, self- and cross-attention."""
    x, text = 2 * N * D * (6 * D + 2 * HIDDEN), 2 * L * D * 2 * D
    attention = 4 * N * (N + L) * D
    one = cost(8, 1, 1)
    assert one.primal_flops == x + text + attention
    # Each product has the tangent of one operand; q k' and p v have those of two in self-attention, where k and v are
    # active, and of one in cross-attention, where the other half is h v.
    assert one.tangent_flops == x + 2 * 4 * N * N * D + 4 * N * L * D
    # Of each linear layer, two products; of attention, s again and four more.
    assert one.backward_flops == 2 * (x + text) + attention * 5 // 2


@pytest.mark.matrix
def test_tensor_parallel_divides_all_products() -> None:
    one, split = cost(8, 1, 1), cost(1, 1, 8)
    for what in ("primal_flops", "tangent_flops", "backward_flops"):
        assert getattr(split, what) * RANKS == getattr(one, what)


@pytest.mark.matrix
def test_context_parallel_divides_all_but_the_text() -> None:
    one, split = cost(8, 1, 1), cost(1, 8, 1)
    text = 2 * L * D * 2 * D  # its keys and values, on every rank
    assert (split.ring, split.ulysses) == (1, 8)
    assert split.primal_flops * RANKS == one.primal_flops + (RANKS - 1) * text
    assert split.tangent_flops * RANKS == one.tangent_flops
    assert split.backward_flops * RANKS == one.backward_flops + (RANKS - 1) * 2 * text


@pytest.mark.long
def test_what_tensor_parallel_sends() -> None:
    """After each of three output layers [N, D], and a mean square per token for each norm of q and k."""
    split, factor = cost(1, 1, 8), 2 * (RANKS - 1) / RANKS
    active = 3 * N * D * BF16 + 3 * N * F32
    assert split.primal.sent == {"all_reduce": factor * (active + L * F32)}
    assert split.dual.total - split.primal.total == factor * active  # keys of the text have no tangent
    assert split.backward.sent == {"all_reduce": factor * (active + L * F32 + L * D * BF16)}
    assert split.primal.launches == split.dual.launches == 3 + 4
    assert cost(8, 1, 1).dual.total == 0


@pytest.mark.matrix
def test_what_ulysses_sends() -> None:
    """q, k, v and the output, each of them the rank's own tokens."""
    split = cost(1, 8, 1)
    once = 4 * (RANKS - 1) / RANKS * (N // RANKS) * D * BF16
    assert split.primal.sent == split.backward.sent == {"all_to_all": once}
    assert split.dual.sent == {"all_to_all": 2 * once}
    assert split.primal.launches == split.dual.launches == 4


@pytest.mark.matrix
def test_what_a_ring_sends() -> None:
    """Beside Ulysses: k and v of the rank to the others of the ring, once for forward and backward."""
    split = scaling.measure(dataclasses.replace(SMALL, heads=2), Layout(2, 4, 1))
    kept = N // 4 * D * BF16
    assert (split.ring, split.ulysses) == (2, 2)
    assert split.primal.sent == {"all_gather": 2 * kept, "all_to_all": 4 * kept / 2}
    assert split.dual.sent == {"all_gather": 4 * kept, "all_to_all": 4 * kept}
    assert split.primal.launches == split.dual.launches == 5
    assert "all_gather" not in split.backward.sent


@pytest.mark.matrix
def test_tangents_launch_no_collectives_of_their_own() -> None:
    mixed, apart = cost(2, 2, 2), cost_unpaired(2, 2, 2)
    assert mixed.dual.launches == mixed.primal.launches < apart.dual.launches
    assert mixed.dual.sent == apart.dual.sent
    assert mixed.primal.sent.keys() == {"all_reduce", "all_to_all"}


def cost_unpaired(*axes: int) -> Any:
    return scaling.measure(SMALL, Layout(*axes), scaling.Config(skip_passes=("pair_collectives",)))


@pytest.mark.matrix
def test_memory() -> None:
    for axes in ((8, 1, 1), (1, 8, 1), (1, 1, 8)):
        found = cost(*axes)
        assert found.dual_peak > found.primal_peak > found.primal_saved
        assert found.dual_saved == pytest.approx(found.primal_saved, abs=64)  # seeds of a kernel that was replaced
    assert cost(1, 8, 1).dual_peak < cost(8, 1, 1).dual_peak


def test_peak_of_a_graph_by_hand() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        a = x.sin()  # 32 bytes
        b = torch.cat([a.view(2, 4), a.view(2, 4)])  # 64; a is read for the last time
        c, d = b.split(2)  # views
        e = d.cos()  # 32; b is alive
        return e, (c + e)  # 32

    graph = make_fx(f)(torch.ones(8)).graph
    assert costs.peak_memory(graph) == 64 + 32 + 32


class Sent(TorchDispatchMode):
    """(op, elements of what it reads) of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append((func._schema.name.split("::")[1], args[1]))
        return func(*args, **(kwargs or {}))


def test_fsdp_is_modelled_as_fsdp2_is() -> None:
    layout = Layout(RANKS, 1, 1)
    with scaling.fake_ranks(RANKS):
        block, _ = scaling.build(SMALL, layout)
        block = block.to_empty(device="cpu").float()
        for parameter in block.parameters():
            torch.nn.init.zeros_(parameter)
        modelled = scaling.fsdp_traffic(list(block.parameters()), layout)
        policy = MixedPrecisionPolicy(param_dtype=scaling.DTYPE, reduce_dtype=scaling.REDUCE_DTYPE)
        fully_shard(block, mesh=init_device_mesh("cpu", (RANKS,)), mp_policy=policy, reshard_after_forward=True)
        rotary = (torch.ones(1, N, 1, D // 8),) * 2
        with Sent() as sent:
            block(torch.ones(1, N, D), torch.ones(1, L, D), torch.ones(1, 6, D), rotary).sum().backward()
    assert [name for name, _ in sent.calls] == ["_allgather_base_", "_allgather_base_", "_reduce_scatter_base_"]
    gathered = [(RANKS - 1) * x.numel() * x.element_size() for name, x in sent.calls if name == "_allgather_base_"]
    scattered = [(RANKS - 1) * x.numel() * x.element_size() // RANKS for _, x in sent.calls[2:]]
    assert modelled.sent == {"all_gather": sum(gathered), "reduce_scatter": sum(scattered)}
    assert modelled.launches == len(sent.calls)


def test_the_page_lists_what_does_not_divide() -> None:
    text = scaling.page({"small": SMALL}, [Layout(1, 1, 3), Layout(1, 3, 1)])
    assert "| 3 | 1 x 1 x 3 | 8 heads do not divide by tp = 3 |" in text
    assert "| 3 | 1 x 3 x 1 | 64 tokens do not divide by cp = 3 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| 3 |")]
    assert {row.count("|") for row in rows} == {scaling.HEAD.count("|") + 2}
