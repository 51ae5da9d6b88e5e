"""explain() is what ran: for every strategy, the reports of a call and those of its explanation are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jvpgraph
from jvpgraph.passes.context import Report


class Block(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-3, -2)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


class Net(nn.Module):
    """Two equal blocks, with data to branch on if that is asked for."""

    def __init__(self, branches: bool = False):
        super().__init__()
        self.blocks, self.branches = nn.ModuleList([Block(), Block()]), branches

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return -x.erfinv() if self.branches and x.sum() > 1e9 else x.sin()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)  # what is cached goes through no pass
    with uncached, torch._inductor.config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def facts(report: Report) -> dict[str, Any]:
    return {field.name: getattr(report, field.name) for field in fields(Report) if field.name != "graphs"}


def graphs(report: Report) -> list[tuple[str, str, int, dict[str, int]]]:
    return [(graph.stage, graph.name, graph.nodes, graph.changes) for graph in report.graphs]


STRATEGIES: dict[str, tuple[dict[str, Any], bool]] = {  # what is asked for, and whether the model branches on data
    "one graph, eager": ({"backend": "eager"}, False),
    "one graph, Inductor": ({}, False),
    "one graph, gradients of tangents": ({"backend": "eager", "differentiable_tangent": True}, False),
    "one graph, passes skipped": ({"backend": "eager", "config": jvpgraph.Config(swap_attention=False)}, False),
    "regions": ({"backend": "eager", "regions": Block}, True),
    "auto, one graph": ({"backend": "eager", "regions": "auto"}, False),
    "auto, regions": ({"backend": "eager", "regions": "auto"}, True),
    "auto, regions, Inductor": ({"regions": "auto"}, True),
    "op by op": ({"backend": "op_by_op"}, True),
}


MODES = {"no_grad": torch.no_grad, "gradients": nullcontext}


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "mode"),  # Inductor is no other with regions: once is a minute less
    [(name, mode) for name in STRATEGIES for mode in MODES if (name, mode) != ("auto, regions, Inductor", "gradients")],
)
def test_the_explanation_is_what_ran(name: str, mode: str):
    asked, branches = STRATEGIES[name]
    x = torch.randn(2, 3, 8)
    dual = jvpgraph.transform(Net(branches), dynamic=False, **asked)
    with MODES[mode]():
        found = dual.explain(x, tangents={"x": torch.ones_like(x)}, dynamic=False)
        assert dual.reports == []  # nothing of dual itself has run
        dual(x, tangents={"x": torch.ones_like(x)})
    assert found.reports
    assert [facts(report) for report in found.reports] == [facts(report) for report in dual.reports]
    if "Inductor" not in name or not branches:
        assert [graphs(report) for report in found.reports] == [graphs(report) for report in dual.reports]
    assert found.regions == str(dual.regions or "")
    assert found.active > 0
    assert (found.backward_flops != 0) == (mode == "gradients" and name != "op by op")


@pytest.mark.long
def test_attention_is_found_by_all_that_capture():
    x = torch.randn(2, 3, 8, requires_grad=True)  # as what the second block is given
    for asked, branches in STRATEGIES.values():
        if asked.get("backend") == "eager" and "config" not in asked:
            found = jvpgraph.transform(Net(branches), **asked).explain(x, tangents={"x": x}, dynamic=False)
            blocks = 2 if found.regions.startswith("one graph") or not found.regions else 1  # one graph for both
            assert (len(found.swapped), found.fused) == (blocks, blocks)


def test_graphs_are_kept_from_dynamos_to_the_last():
    config = jvpgraph.Config(keep_graphs=True)
    dual = jvpgraph.transform(Block(), backend="eager", config=config)
    x = torch.randn(2, 3, 8)
    dual(x, tangents={"x": x})
    (report,) = dual.reports
    names = [graph.name for graph in report.graphs]
    assert names[0] == "captured"
    assert names[1:5] == ["inline_repeated_bodies", "swap_attention", "swap_flex_attention", "recognize_attention"]
    assert names[names.index("traced") + 1] == "linearize"
    by_name = {graph.name: graph for graph in report.graphs}
    assert by_name["swap_attention"].changes["jvpgraph.attention.default"] == 1
    assert by_name["swap_attention"].changes["scaled_dot_product_attention"] == -1
    assert "scaled_dot_product_attention" in by_name["captured"].text
    assert "jvpgraph.attention_jvp.default" in by_name["fuse_attention"].text
    assert by_name["linearize"].milliseconds > 0
    for graph in report.graphs:
        compile(graph.text, graph.name, "exec")
        assert graph.text.startswith(f'"""{graph.stage}: {graph.name}, ')


def test_a_backend_brings_its_own_config():
    own = jvpgraph.Config(skip_passes=("pair_collectives",))
    backend = jvpgraph.backend("eager", own)
    assert jvpgraph.transform(Block(), backend=backend)._dual.settings.config == own
    assert jvpgraph.transform(Block(), backend=backend, config=own)._dual.settings.config == own
    for call in (
        lambda: jvpgraph.transform(Block(), backend=backend, config=jvpgraph.Config()),
        lambda: jvpgraph.jvp(torch.sin, (torch.ones(2),), (torch.ones(2),), backend=backend, config=jvpgraph.Config()),
    ):
        with pytest.raises(ValueError, match=r"config= differs from the config of the backend"):
            call()


def test_the_two_switches_are_names_in_skip_passes():
    everything = ("recognize_attention", "swap_attention", "swap_flex_attention")
    assert jvpgraph.Config(swap_attention=False).skip_passes == everything
    assert jvpgraph.Config(recognize_attention=False).skip_passes == ("recognize_attention",)
    assert not jvpgraph.Config(skip_passes=everything).swap_attention
    x = torch.randn(2, 3, 8)
    config = jvpgraph.Config(skip_passes=("swap_attention",))
    dual = jvpgraph.transform(Block(), backend="eager", config=config)
    dual(x, tangents={"x": x})
    assert dual.reports[0].swapped == []
    assert "swap_attention" not in [graph.name for graph in dual.reports[0].graphs]


class Chosen(nn.Module):
    """Of rows that a mask chooses."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(self.linear(x)[mask].cos())


def test_sizes_that_data_decide_are_named_and_run():
    model, x, mask = Chosen(), torch.randn(8, 6), torch.arange(8) % 3 > 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        dual = jvpgraph.transform(model, backend="eager")
        y, y_dot = dual(x, mask, tangents={"x": x})
        y.sum().backward()
        explanation = dual.explain(x, mask, tangents={"x": x})
    torch.testing.assert_close(y_dot, torch.func.jvp(lambda x: model(x, mask), (x,), (x,))[1])
    assert model.linear.weight.grad is not None
    assert "= a size that data decide, counted as 0" in str(explanation)
