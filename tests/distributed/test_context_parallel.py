"""Context parallelism, by diffusers' own interface and by ours: the same numbers as in one process.

Every rank has the whole batch, computes the same loss from the gathered output, and has the gradient that its part of
the sequence contributes: they are summed over the ranks.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel

import jvpgraph
from jvpgraph.context_parallel import ContextParallel
from tests.distributed import flash_on_cpu
from tests.distributed.harness import run
from tests.distributed.models import (
    BATCH,
    MODELS,
    QUIET,
    Answer,
    Errors,
    PlainBlock,
    PlainDiT,
    backend,
    check,
    dots_of,
    errors,
    gradients,
    loss,
    reference,
)
from tests.zoo.oracle import AllDouble, forward_ad, oracle_grads

pytestmark = list(map(pytest.mark.filterwarnings, QUIET))

# name, ring degree, Ulysses degree
TWO = [("Ulysses", 1, 2), ("ring", 2, 1)]
FOUR = [("Ulysses", 1, 4), ("ring", 4, 1), ("Ulysses x ring", 2, 2)]
LAYOUTS = [TWO[0], *(pytest.param(*layout, marks=pytest.mark.matrix) for layout in (TWO[1], *FOUR))]
BLOCKS = {"dit": ["blocks"], "wan": ["blocks"], "flux": ["transformer_blocks", "single_transformer_blocks"]}
FLASH = "_native_flash"  # the one of diffusers' backends for CUDA whose logsumexp ring attention can have here


# ------------------------------------------------------------------------------------------------ on the ranks


def mesh_of(ring: int, ulysses: int) -> Any:
    return init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))


def under_diffusers(name: str, ring: int, ulysses: int, attention: str | None = None, **settings: Any) -> nn.Module:
    """The model after ``enable_parallelism``, which asks for an accelerator that is not there."""
    reference(name)  # now: the attention backend chosen below is that of every model
    if attention == FLASH:
        flash_on_cpu.install()
    torch.accelerator.device_count = lambda: 1
    model = MODELS[name].build()
    if attention is not None:
        model.set_attention_backend(attention)
    config = ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, convert_to_fp32=False, **settings)
    model.enable_parallelism(config=config)
    return model


def sum_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)


def measure(model: nn.Module, name: str, compiler: str, config: Any = None) -> tuple[Errors, int]:
    """The errors, and how many calls of attention were computed with their tangent."""
    net, op_by_op = MODELS[name], compiler == "op_by_op"
    chosen = compiler if op_by_op else backend(compiler, config)
    dual = jvpgraph.transform(model, backend=chosen, dynamic=False)
    with AllDouble() if op_by_op else nullcontext():
        y, y_dot = dual(**net.inputs(), tangents=net.tangents())
        loss(y).backward()
    sum_gradients(model)
    y = y if isinstance(y, Tensor) else y[0]
    found = errors(Answer(y, dots_of(y_dot), gradients(model)), reference(name))
    return found, 0 if op_by_op else chosen.reports[0].fused


def on_diffusers(
    name: str, ring: int, ulysses: int, attention: str | None, compiler: str = "eager", skip: tuple[str, ...] = ()
) -> tuple[Errors, int]:
    model = under_diffusers(name, ring, ulysses, attention)
    return measure(model, name, compiler, jvpgraph.Config(skip_passes=skip))


class ParallelBlock(PlainBlock):
    """The text is whole on every rank, and attended to as ever."""

    cp: ContextParallel

    def attend(self, q_BND: Tensor, k_BND: Tensor, v_BND: Tensor) -> Tensor:
        heads = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q_BND, k_BND, v_BND))
        return self.cp.attention(*heads).transpose(1, 2).flatten(2)


class ParallelDiT(PlainDiT):
    def __init__(self, cp: ContextParallel, **config: Any):
        super().__init__(**config)
        self.cp = cp
        for block in self.blocks:
            block.__class__, block.cp = ParallelBlock, cp

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.time(torch.stack([t.sin(), t.cos()], -1))
        x = self.cp.shard(self.embed(x), dim=1)
        for block in self.blocks:
            x = block(x, c, text)
        return self.cp.gather(self.head(self.norm(x)), dim=1)


def own_model(ring: int, ulysses: int, tokens: int | None = None) -> ParallelDiT:
    mesh = mesh_of(ring, ulysses)
    groups = {axis: mesh[axis].get_group() for axis in ("ring", "ulysses") if mesh[axis].size() > 1}
    model = ParallelDiT(ContextParallel(**groups, tokens=tokens)).double()
    model.load_state_dict(MODELS["dit"].build().state_dict())
    return model


def on_own(ring: int, ulysses: int, compiler: str = "eager") -> Errors:
    return measure(own_model(ring, ulysses), "dit", compiler)[0]


def on_own_uneven(ring: int, ulysses: int, tokens: int, compiler: str) -> Errors:
    net = MODELS["dit"]
    inputs, dots = net.inputs(), net.tangents()
    inputs["x"], dots["x"] = inputs["x"][:, :tokens].contiguous(), dots["x"][:, :tokens].contiguous()
    whole, model = net.build(), own_model(ring, ulysses, tokens)
    (value,), (tangent,) = forward_ad(whole, inputs, dots)
    want = Answer(value, tangent, oracle_grads(whole, inputs))
    y, y_dot = jvpgraph.transform(model, backend=compiler)(**inputs, tangents=dots)
    loss(y).backward()
    sum_gradients(model)
    return errors(Answer(y, dots_of(y_dot), gradients(model)), want)


# ------------------------------------------------------------------------------------------------------ tests


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "layout", "ring", "ulysses"),
    [
        pytest.param(name, *layout, marks=[pytest.mark.matrix] * ((name, layout) != ("flux", TWO[1])))
        for layout in [*TWO, *FOUR]
        for name in ("wan", "flux")
    ],
)
def test_diffusers_interface(name, layout, ring, ulysses):
    """Each attention, of each hop of the ring, becomes one attention_jvp that the Function's backward goes on with."""
    attention = FLASH if ring > 1 else None
    found, fused = zip(*run(ring * ulysses, on_diffusers, name, ring, ulysses, attention))
    check(f"{layout} (diffusers)", name, list(found))
    crossed = 2 if name == "wan" else 0  # of its two blocks
    assert set(fused) == {2 * ring + crossed}


@pytest.mark.parametrize("compiler", ["inductor", "op_by_op"])
@pytest.mark.parametrize(
    ("layout", "ring", "ulysses"), [pytest.param(*layout, marks=pytest.mark.matrix) for layout in [*TWO, FOUR[-1]]]
)
def test_diffusers_interface_with_other_backends(layout, ring, ulysses, compiler):
    results = run(ring * ulysses, on_diffusers, "flux", ring, ulysses, FLASH, compiler)
    check(f"{layout} (diffusers), {compiler}", "flux", [found for found, _ in results])


@pytest.mark.matrix
def test_diffusers_interface_with_the_kernels_left_as_they_are():
    skip = ("fuse_aten_attention",)
    found, fused = zip(*run(2, on_diffusers, "flux", 2, 1, FLASH, "eager", skip))
    check("ring (diffusers), not fused", "flux", list(found))
    assert set(fused) == {0}


@pytest.mark.long
@pytest.mark.parametrize(("layout", "ring", "ulysses"), LAYOUTS)
def test_own_interface(layout, ring, ulysses):
    check(layout, "dit", run(ring * ulysses, on_own, ring, ulysses))


@pytest.mark.matrix
@pytest.mark.parametrize("compiler", ["inductor", "op_by_op"])
def test_own_interface_with_other_backends(compiler):
    check(f"Ulysses x ring, {compiler}", "dit", run(4, on_own, 2, 2, compiler))


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["eager", "op_by_op"])
@pytest.mark.parametrize(("ring", "ulysses", "tokens"), [(1, 2, 15), pytest.param(2, 2, 13, marks=pytest.mark.matrix)])
def test_own_interface_with_uneven_lengths(ring, ulysses, tokens, compiler):
    layout = f"{tokens} tokens, ring {ring} x Ulysses {ulysses}" + (", op_by_op" if compiler == "op_by_op" else "")
    check(layout, "dit", run(ring * ulysses, on_own_uneven, ring, ulysses, tokens, compiler))


# ------------------------------------------------------------------------- what diffusers' own hooks do not allow


def gradients_of_a_long_ring() -> float:
    model, want = under_diffusers("flux", 4, 1, FLASH), reference("flux")
    with AllDouble():
        loss(model(**MODELS["flux"].inputs())).backward()
    sum_gradients(model)
    return errors(want._replace(gradients=gradients(model)), want).gradient


@pytest.mark.matrix
def test_gradients_of_diffusers_own_ring_of_four_are_wrong():
    """Without jvpgraph. When this fails, diffusers has mended it, and traceable.py need not."""
    assert min(run(4, gradients_of_a_long_ring)) > 1e-3


def message_of(name: str, ring: int, ulysses: int, attention: str | None, **settings: Any) -> str:
    """The error of the model itself, forward and backward, without jvpgraph."""
    try:
        model = under_diffusers(name, ring, ulysses, attention, **settings)
        with AllDouble():
            loss(model(**MODELS[name].inputs())).backward()
    except Exception as error:
        return str(error)
    return ""


def without_an_accelerator() -> str:
    try:
        MODELS["flux"].build().enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    except ZeroDivisionError as error:
        return str(error)
    return ""


def anything(ring: int, ulysses: int, attention: str | None, compiler: str) -> str:
    """What jvpgraph says to the forms for uneven lengths, which have no backward."""
    settings = {"ring_anything": True} if ring > 1 else {"ulysses_anything": True}
    model, net = under_diffusers("flux", ring, ulysses, attention, **settings), MODELS["flux"]
    try:
        with torch.no_grad():
            jvpgraph.transform(model, backend=compiler)(**net.inputs(), tangents=net.tangents())
    except jvpgraph.JvpgraphError as error:
        return str(error)
    return ""


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("flux", 2, 1, None), {}, "Native attention does not support return_lse=True"),
        (("flux", 2, 2, None), {"ulysses_anything": True}, "ulysses_anything cannot be enabled when ring_degree > 1"),
        (("flux", 1, 2, None), {"ulysses_anything": True}, "not implemented yet"),
        (("flux", 2, 1, FLASH), {"ring_anything": True}, "not implemented yet"),
    ],
)
def test_what_diffusers_itself_refuses(arguments, settings, message):
    _, ring, ulysses, _ = arguments
    for said in run(ring * ulysses, refused, arguments, settings):
        assert message in said


def refused(arguments: tuple[Any, ...], settings: dict[str, Any]) -> str:
    return message_of(*arguments, **settings)


@pytest.mark.matrix
def test_diffusers_asks_for_an_accelerator():
    assert all("modulo" in said for said in run(2, without_an_accelerator))


@pytest.mark.matrix
@pytest.mark.parametrize("compiler", ["eager", "op_by_op"])
@pytest.mark.parametrize(("ring", "ulysses", "attention"), [(1, 2, None), (2, 1, FLASH)])
def test_the_uneven_forms_of_diffusers_are_refused(ring, ulysses, attention, compiler):
    """They exchange lengths while they run, which no graph holds, and gather by a collective that writes in place."""
    for said in run(2, anything, ring, ulysses, attention, compiler):
        assert ("cannot be captured" if compiler == "eager" else "c10d.") in said


def inside_of_torchs(compiler: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
    net = MODELS["dit"]
    dual = jvpgraph.transform(net.build(), backend=compiler)
    split = {"buffers": [torch.zeros(2, 4)], "buffer_seq_dims": [1]}
    with context_parallel(mesh, **split), pytest.raises(jvpgraph.CaptureError) as caught:
        dual(**net.inputs(), tangents=net.tangents())
    dual(**net.inputs(), tangents=net.tangents())  # outside of it, as ever
    return str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["eager", "op_by_op"])
def test_torchs_own_is_refused(compiler):
    assert all("ContextParallel" in said for said in run(2, inside_of_torchs, compiler))


def sharded(name: str, attention: str | None) -> Errors:
    """Two parts of the batch, each on two Ulysses ranks; parameters sharded over all four."""
    net = MODELS[name]
    reference(name)
    torch.accelerator.device_count = lambda: 1
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "ring", "ulysses"))
    if name == "dit":
        model: nn.Module = ParallelDiT(ContextParallel(ulysses=mesh["ulysses"].get_group())).double()
        model.load_state_dict(net.build().state_dict())
    else:
        model = net.build()
        config = ContextParallelConfig(ulysses_degree=2, convert_to_fp32=False, mesh=mesh)
        model.enable_parallelism(config=config)
    for path in BLOCKS[name]:
        for block in model.get_submodule(path):
            fully_shard(block)
    fully_shard(model)
    part = mesh["dp"].get_local_rank()
    mine = lambda x: x.chunk(2)[part].contiguous() if x.dim() and len(x) == BATCH else x  # noqa: E731
    inputs, dots = ({k: mine(x) if isinstance(x, Tensor) else x for k, x in d.items()} for d in whole(net))
    dual = jvpgraph.transform(model, backend=backend(), regions="auto")
    with AllDouble():
        y, y_dot = dual(**inputs, tangents=dots)
        y, y_dot = y if isinstance(y, Tensor) else y[0], dots_of(y_dot)
        weight = torch.randn((BATCH, *y.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (4 * (y * mine(weight)).sum()).backward()  # FSDP2 averages over its four ranks
    want = reference(name)
    value, tangent = mine(want.value), mine(want.tangent)
    return errors(Answer(y, y_dot, gradients(model)), Answer(value, tangent, want.gradients))


def whole(net: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return net.inputs(), net.tangents()


@pytest.mark.matrix
@pytest.mark.parametrize("name", list(MODELS))
def test_with_fsdp2(name):
    check("FSDP2 + Ulysses", name, run(4, sharded, name, None))
