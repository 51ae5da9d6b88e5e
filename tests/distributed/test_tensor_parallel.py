"""Tensor parallel, and with it sequence parallel: value, tangent and gradients equal those of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import jvpgraph
from jvpgraph.config import Config
from jvpgraph.kernels.ops import OPS
from tests.distributed.harness import run
from tests.distributed.models import (
    MODELS,
    Answer,
    Errors,
    PlainBlock,
    backend,
    check,
    dots_of,
    errors,
    float_leaves,
    full,
    gradients,
    loss,
    reference,
)
from tests.distributed.plans import (
    diffusers_on_cpu,
    dtensor_activations,
    sequence_parallel,
    tensor_parallel,
)

LAYOUTS: dict[str, Callable[..., Any]] = {
    "TP": tensor_parallel,
    "TP+SP": sequence_parallel,
    "TP, attention on DTensors": lambda _, model, mesh: dtensor_activations(model, mesh),
}


def world() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def compare(layout: str, name: str, compiler: str = "eager") -> Errors:
    net, want = MODELS[name], reference(name)
    model = net.build()
    gather = LAYOUTS[layout](name, model, world())
    dual = jvpgraph.transform(model, backend=backend(compiler), dynamic=False)
    y, y_dot = dual(**net.inputs(), tangents=net.tangents())
    loss(y).backward()
    return errors(Answer(*float_leaves(y), dots_of(y_dot), gather(gradients(model))), want)


CASES = [
    pytest.param(layout, name, ranks, marks=[pytest.mark.matrix] * ((layout, name, ranks) != ("TP+SP", "dit", 2)))
    for layout in ("TP", "TP+SP")
    for name in MODELS
    for ranks in (2, 4)
]


@pytest.mark.long
@pytest.mark.parametrize(("layout", "name", "ranks"), CASES)
def test_equals_one_process(layout: str, name: str, ranks: int):
    check(layout, name, run(ranks, compare, layout, name))


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_attention_on_dtensors_split_over_heads(ranks: int):
    layout = "TP, attention on DTensors"
    check(layout, "dit", run(ranks, compare, layout, "dit"))


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["TP", "TP+SP"])
def test_compiled_by_inductor(layout: str):
    check(f"{layout}, Inductor", "dit", run(2, compare, layout, "dit", "inductor"))


def on_dtensor_inputs() -> tuple[Errors, list[str]]:
    net, mesh = MODELS["dit"], world()
    model = distribute_module(net.build(), mesh)
    inputs, dots = (
        {name: distribute_tensor(x, mesh, [Shard(0)]) for name, x in given.items()}
        for given in (net.inputs(), net.tangents())
    )
    dual = jvpgraph.transform(model, backend=backend(), dynamic=False)
    y, y_dot = dual(**inputs, tangents=dots)
    loss(full(y)).backward()
    got = Answer(full(y), full(y_dot), gradients(model))
    return errors(got, reference("dit")), [str(out.placements) for out in (y, y_dot) if isinstance(out, DTensor)]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_inputs_and_tangents_are_dtensors(ranks: int):
    found, placements = zip(*run(ranks, on_dtensor_inputs))
    check("DTensor inputs, batch", "dit", list(found))
    assert set(map(tuple, placements)) == {("(Shard(dim=0),)",) * 2}


def attention_on_dtensors(dim: int) -> list[float]:
    """How far outputs and gradients on DTensors are from whole ones, for a bias that all of the batch shares."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (4, 4, 6, 8), "k": (4, 4, 5, 8), "v": (4, 4, 5, 8), "q_dot": (4, 4, 6, 8), "bias": (4, 6, 5)}
    whole = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    mesh = world()
    placed = {name: Replicate() if name == "bias" else Shard(dim) for name in shapes}
    split = {name: distribute_tensor(x, mesh, [placed[name]]) for name, x in whole.items()}
    found = []
    for given in (whole, split):
        q, k, v, q_dot, bias = (x.requires_grad_() for x in given.values())
        o, lse = OPS.attention(q, k, v, bias)
        outs = [o, lse, *OPS.attention_jvp(q, k, v, q_dot.detach(), None, None, bias)[:3]]
        grads = torch.autograd.grad(sum(full(out).sin().sum() for out in outs[:2]), (q, k, v, bias))
        found.append([full(x).detach() for x in (*outs, *grads)])
    assert all(isinstance(x, DTensor) and x.placements[0].is_shard() for x in outs[:2])
    return [(a - b).abs().max().item() for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("dim", [0, 1])
def test_attention_ops_on_dtensors(dim: int):
    for found in run(2, attention_on_dtensors, dim):
        assert max(found) < 1e-13


class Checkpointed(torch.nn.Module):
    """A block that is computed again in the backward, with a collective in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3))

    def block(self, x: Tensor) -> Tensor:
        group = dist.distributed_c10d._get_default_group()
        return funcol.all_gather_tensor_autograd((x * self.weight).sin(), 0, group).cos()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def checkpointed() -> tuple[list[float], int]:
    """Errors against the same model without pairing and in eager mode, and how many collectives were paired."""
    model, x = Checkpointed(), torch.arange(12.0, dtype=torch.float64).view(4, 3) / (5 + dist.get_rank())
    compiler, answers = backend(), []
    for chosen in (compiler, backend(config=Config(skip_passes=("pair_collectives",)))):
        model.weight.grad = None
        y, y_dot = jvpgraph.transform(model, backend=chosen, dynamic=False)(x, tangents={"x": x.cos()})
        y.sum().backward()
        answers.append((y.detach(), y_dot, model.weight.grad))
    model.weight.grad = None
    y = model.block(x)
    y.sum().backward()
    answers.append((y.detach(), answers[1][1], model.weight.grad))
    difference = [(a - b).abs().max().item() for other in answers[1:] for a, b in zip(answers[0], other)]
    return difference, compiler.reports[-1].paired


@pytest.mark.long
def test_checkpointing_around_a_collective():
    for difference, paired in run(2, checkpointed):
        assert max(difference) < 1e-14
        assert paired == 1


# ------------------------------------------------------------------------------------------------ launches


def launches_of_a_block(layout: str) -> dict[str, int]:
    """Collectives of the forward of one block: started by the process group, and nodes of the graph."""
    net = MODELS["dit"]
    group = dist.distributed_c10d._get_default_group()

    def started(call: Callable[[], Any]) -> int:
        before = group._get_sequence_number_for_group()
        call()
        return group._get_sequence_number_for_group() - before

    found = {}
    for name, config in (("paired", Config()), ("apart", Config(skip_passes=("pair_collectives",)))):
        model = net.build(depth=1)
        LAYOUTS[layout]("dit", model, world())
        compiler = backend(config=config)
        dual = jvpgraph.transform(model, backend=compiler, dynamic=False)
        with torch.no_grad():
            call = lambda dual=dual: dual(**net.inputs(), tangents=net.tangents())  # noqa: E731
            call()
            found[name] = started(call)
            found[f"{name}, nodes"] = compiler.reports[-1].collectives.total()
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
            compiled(**net.inputs())
            found["primal"] = started(lambda compiled=compiled: compiled(**net.inputs()))
    return found


@pytest.mark.long
@pytest.mark.parametrize("layout", [pytest.param("TP", marks=pytest.mark.matrix), "TP+SP"])
def test_the_tangent_launches_no_collective(layout: str):
    for found in run(2, launches_of_a_block, layout):
        assert found["paired"] == found["paired, nodes"] == found["primal"] > 0, found
        assert found["apart"] == found["apart, nodes"] > found["primal"], found


# ------------------------------------------------------------------------------------------------ regions


class ToLocal(PlainBlock):
    """Takes a DTensor, and goes on with its local part."""

    def forward(self, x_BND: Tensor, c_BD: Tensor, text_BLE: Tensor) -> Tensor:
        assert isinstance(x_BND, DTensor)
        return super().forward(x_BND.redistribute(placements=[Replicate()]).to_local(), c_BD, text_BLE)


def embed_to_come(model: nn.Module) -> Any:
    """What the blocks are given may not have arrived: torch's rowwise style returns such a tensor."""
    parallelize_module(model, world(), {"embed": RowwiseParallel(input_layouts=Replicate())})
    return lambda found: found


def embed_dtensor(model: nn.Module) -> Any:
    model.blocks[0].__class__ = ToLocal
    style = ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
    parallelize_module(model, world(), {"embed": style})
    return lambda found: found


BOUNDARIES: dict[str, Callable[[nn.Module], Any]] = {
    "results to come": embed_to_come,
    "DTensors": embed_dtensor,
    "SP": lambda model: sequence_parallel("dit", model, world()),
}


def between_regions(boundary: str) -> tuple[Errors, str, bool]:
    net = MODELS["dit"]
    model = net.build()
    gather = BOUNDARIES[boundary](model)
    dual = jvpgraph.transform(model, regions=PlainBlock, backend=backend(), dynamic=False)
    y, y_dot = dual(**net.inputs(), tangents=net.tangents())
    loss(y).backward()
    found = errors(Answer(y, y_dot, gather(gradients(model))), reference("dit"))
    return found, str(dual.regions), all(group.graphs for group in dual.regions.groups)


@pytest.mark.long
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_tensors_of_torchs_own_keep_their_tangents_between_regions(boundary: str):
    found, reports, in_graphs = zip(*run(2, between_regions, boundary))
    check(f"{boundary} between regions", "dit", list(found))
    assert all(in_graphs), reports[0]


# ------------------------------------------------------------------------------------------------ refusals


def enabling(name: str) -> str:
    from diffusers import TensorParallelConfig

    try:
        MODELS[name].build().enable_parallelism(config=TensorParallelConfig(mesh=world()))
    except (ValueError, ZeroDivisionError) as error:
        return str(error)
    return "nothing"


def enabling_on_cpu(name: str) -> str:
    with diffusers_on_cpu():
        return enabling(name)


@pytest.mark.long
def test_what_diffusers_refuses():
    """On a CPU it fails to find a device; Wan has no plan there, so the tests bring one."""
    assert all("modulo by zero" in said or "not supported on device" in said for said in run(2, enabling, "flux"))
    assert all("`_tp_plan` must be set" in said for said in run(2, enabling_on_cpu, "wan"))


def split_unevenly(heads: int, width: int) -> str:
    net = MODELS["dit"]
    model = net.build(heads=heads, width=width, depth=1)
    tensor_parallel("dit", model, world())
    dual = jvpgraph.transform(model, backend=backend(), dynamic=False)
    try:
        dual(**net.inputs(), tangents=net.tangents())
    except ValueError as error:
        return str(error)
    return "it ran"


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "heads", "width"), [(4, 6, 48), (3, 4, 32)])
def test_heads_that_do_not_divide_are_named(ranks: int, heads: int, width: int):
    """6 heads of 8 over 4 ranks split within a head; 4 over 3 do not even split evenly."""
    for said in run(ranks, split_unevenly, heads, width):
        assert f"blocks.0.to_q: {heads} heads (dim 0 of its weight, {width}) over {ranks} ranks" in said
        assert f"sizes that divide: 1, 2, {'3, 6' if heads == 6 else '4'}." in said
        assert "blocks.0.up" not in said
