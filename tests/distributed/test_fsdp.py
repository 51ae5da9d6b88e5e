"""FSDP2, HSDP, DDP and activation checkpointing around regions: the same numbers as in one process.

Every data-parallel rank takes its part of the batch. The loss is a sum over the batch, and gradients are averaged over
the data-parallel ranks, so the local loss is scaled by their number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
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
from tests.distributed.plans import sequence_parallel, tensor_parallel
from tests.models import CountOps
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


def measure(
    dual: nn.Module,
    name: str,
    group: Any = None,
    steps: int = 1,
    call: nn.Module | None = None,
    gather: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda found: found,
) -> Errors:
    """The errors of ``dual`` against one process, with the batch spread over the group.

    Args:
        call: what the user calls, where that is something around ``dual``.
        gather: gradients as one process has them, from those of this rank.
    """
    net, rank, size = MODELS[name], dist.get_rank(group), dist.get_world_size(group)
    weight = torch.randn(reference(name).value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(steps):
        dual.zero_grad()
        with widened(dual):
            y, y_dot = (call or dual)(**local(net.inputs(), rank, size), tangents=local(net.tangents(), rank, size))
        (out,) = float_leaves(y)
        ((out * weight.chunk(size)[rank]).sum() * size).backward()
        got = Answer(gathered(out, group), gathered(dots_of(y_dot), group), gather(gradients(dual.model, _plain_name)))
    return errors(got, reference(name))


def _plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")


def apply_checkpoints(model: nn.Module, name: str, wrap: bool) -> None:
    """PyTorch's wrapper, or diffusers' own switch where there is one."""
    if wrap or name == "dit":
        for parent, i in blocks(model, name):
            parent[i] = checkpoint_wrapper(parent[i])
    else:
        model.enable_gradient_checkpointing()


def with_fsdp(
    name: str,
    when: str = "before",
    mesh: tuple[int, ...] = (),
    checkpoints: str = "",
    compiler: str = "eager",
    **settings: Any,
) -> Errors:
    model = MODELS[name].build()
    if mesh:
        settings["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[: len(mesh)])
    if checkpoints == "before":
        apply_checkpoints(model, name, wrap=True)
    if when == "before":
        shard(model, name, **settings)
    if checkpoints == "after":
        apply_checkpoints(model, name, wrap=False)
    dual = jvpgraph.transform(model, regions="auto", backend=backend(compiler))
    if when == "after":
        shard(dual, name, **settings)
    found = measure(dual, name, steps=2)
    assert "FSDP2" in dual.regions.reason
    assert all(not group.cause and group.graphs == 1 and group.calls for group in dual.regions.groups), dual.regions
    if checkpoints:
        recomputes_no_tangent(dual, name, compiler)
    return found


def recomputes_no_tangent(dual: nn.Module, name: str, compiler: str) -> None:
    with widened(dual):
        y, _ = dual(**MODELS[name].inputs(), tangents=MODELS[name].tangents())
    with CountOps() as backward:
        loss(y).backward()
    assert backward.ran["jvpgraph.attention_backward.default"] > 0
    assert backward.ran["jvpgraph.attention_jvp.default"] == 0
    of_forward = "aten.gelu.default" if compiler == "eager" else "aten.addmm.out"  # Inductor fuses the former
    assert backward.ran[of_forward] > 0, "nothing was recomputed"


RANKS = [2, pytest.param(4, marks=pytest.mark.matrix)]


@pytest.mark.long
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["dit", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("wan", "flux"))])
def test_fsdp(name: str, ranks: int):
    check("FSDP2", name, run(ranks, with_fsdp, name))


def sharded_inside_of_blocks() -> str:
    model = MODELS["dit"].build()
    for block in model.blocks:
        fully_shard(block.up)
    fully_shard(model)
    try:
        net = MODELS["dit"]
        jvpgraph.transform(model, regions="auto", backend=backend())(**net.inputs(), tangents=net.tangents())
    except ValueError as error:
        return str(error)
    return "it ran"


def test_blocks_whose_parts_are_sharded_are_named():
    for said in run(2, sharded_inside_of_blocks):
        assert "parts inside of blocks.0, blocks.1 are sharded on their own, shard whole blocks" in said


@pytest.mark.matrix
@pytest.mark.parametrize("name", MODELS)
def test_hsdp(name: str):
    check("HSDP 2 x 2", name, run(4, with_fsdp, name, "before", (2, 2)))


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_fsdp_with_checkpoints(name: str, ranks: int, when: str):
    """Around FSDP's hooks and inside them."""
    layout = {"before": "FSDP2 around AC", "after": "AC around FSDP2"}[when]
    check(layout, name, run(ranks, with_fsdp, name, "before", (), when))


@pytest.mark.matrix
@pytest.mark.parametrize("name", MODELS)
def test_fsdp_by_inductor(name: str):
    check("FSDP2, AC, inductor", name, run(2, with_fsdp, name, "before", (), "before", "inductor"))


def with_ddp(name: str, when: str, compiler: str = "eager") -> Errors:
    model = MODELS[name].build()
    if when == "before":
        dual = jvpgraph.transform(DistributedDataParallel(model), regions="auto", backend=backend(compiler))
        return measure(dual, name, steps=2)
    dual = jvpgraph.transform(model, backend=backend(compiler))
    return measure(dual, name, steps=2, call=DistributedDataParallel(dual))


@pytest.mark.long
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["dit", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("wan", "flux"))])
@pytest.mark.parametrize("when", ["before", "after"])
def test_ddp(name: str, ranks: int, when: str):
    """Every rank has gradients of the whole batch: DDP has synchronised them."""
    layout = {"before": "DDP, transformed", "after": "DDP of the transformed"}[when]
    check(layout, name, run(ranks, with_ddp, name, when))


@pytest.mark.matrix
def test_ddp_by_inductor():
    check("DDP of the transformed, inductor", "dit", run(2, with_ddp, "dit", "after", "inductor"))


def with_options(option: str) -> Errors:
    """The same numbers whatever FSDP2 does with the parameters in between."""
    settings: dict[str, Any] = {
        "kept after forward": {"reshard_after_forward": False},
        "resharded": {"reshard_after_forward": True},
        "CPU offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }.get(option, {})
    return with_fsdp("dit", "after" if option == "dual sharded" else "before", **settings)


@pytest.mark.matrix
@pytest.mark.parametrize("option", ["kept after forward", "resharded", "CPU offload", "dual sharded"])
def test_options(option: str):
    check(f"FSDP2, {option}", "dit", run(2, with_options, option))


def accumulated() -> tuple[float, float]:
    """Two microbatches, synchronised after the second: gradients of both, and those of the first stay local."""
    net, rank = MODELS["dit"], dist.get_rank()
    dual = jvpgraph.transform(shard(net.build(), "dit"), regions="auto", backend=backend())
    inputs, tangents = local(net.inputs(), rank, 2), local(net.tangents(), rank, 2)
    weight = torch.randn(reference("dit").value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reduced = []
    for half in range(2):
        dual.set_requires_gradient_sync(half == 1)
        y, _ = dual(
            **{name: x.chunk(2)[half].contiguous() for name, x in inputs.items()},
            tangents={name: x.chunk(2)[half].contiguous() for name, x in tangents.items()},
        )
        ((y * weight.chunk(2)[rank].chunk(2)[half]).sum() * 2).backward()
        reduced.append(float(len(gradients(dual.model))))
    got = Answer(*reference("dit")[:2], gradients(dual.model))
    return errors(got, reference("dit")).gradient, reduced[0]


@pytest.mark.long
def test_gradient_accumulation():
    for error, reduced in run(2, accumulated):
        assert error < 1e-9
        assert reduced == 0, "the first microbatch was synchronised"


def mixed(cast_inputs: bool) -> tuple[list[str], list[float]]:
    """Parameters in bfloat16, with the inputs or without; compared with FSDP2 of the model alone."""
    net = MODELS["dit"]
    dtypes = []
    answers = []
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=cast_inputs)
    for transformed in (True, False):
        model = shard(net.build().float(), "dit", mp_policy=policy)
        inputs = {name: x.float() for name, x in net.inputs().items()}
        if not cast_inputs:
            inputs = {name: x.bfloat16() for name, x in inputs.items()}
        call: Any = model
        if transformed:
            tangents = {name: x.to(inputs[name].dtype) for name, x in net.tangents().items()}
            dual = jvpgraph.transform(model, regions="auto", backend="eager")
            call = lambda **kwargs: dual(**kwargs, tangents=tangents)  # noqa: B023, E731
        out = call(**inputs)
        y, y_dot = out if transformed else (out, None)
        y.float().sum().backward()
        answers.append([y.detach().float(), *(gradients(model)[name].float() for name in sorted(gradients(model)))])
        if transformed:
            dtypes = [str(x.dtype) for x in (y, y_dot)]
            want = reference("dit")
            tangent = ((y_dot.double() - want.tangent).norm() / want.tangent.norm()).item()
    value, *of_gradients = [(a - b).norm().item() for a, b in zip(*answers)]
    scale = max(g.norm().item() for g in answers[1][1:])  # some have none but rounding
    return dtypes, [tangent, max(value / answers[1][0].norm().item(), max(of_gradients) / scale)]


@pytest.mark.matrix
@pytest.mark.parametrize("cast_inputs", [True, False])
def test_mixed_precision(cast_inputs: bool):
    for dtypes, (tangent, others) in run(2, mixed, cast_inputs):
        assert dtypes == ["torch.bfloat16", "torch.bfloat16"]
        assert tangent < 0.05
        assert others < 0.05


def with_tensor_parallel(name: str, layout: str) -> Errors:
    """Blocks split over one axis of the mesh as a plan has it, then sharded over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model = MODELS[name].build()
    gather = {"TP": tensor_parallel, "TP+SP": sequence_parallel}[layout](name, model, mesh["tensor"])
    shard(model, name, mesh=mesh["shard"])
    dual = jvpgraph.transform(model, regions="auto", backend=backend())
    found = measure(dual, name, mesh.get_group("shard"), gather=gather)
    assert all(not group.cause and group.calls for group in dual.regions.groups), dual.regions
    return found


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["TP", "TP+SP"])
@pytest.mark.parametrize("name", MODELS)
def test_fsdp_with_tensor_parallel(name: str, layout: str):
    check(f"FSDP2 x {layout}, 2 x 2", name, run(4, with_tensor_parallel, name, layout))
