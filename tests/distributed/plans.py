"""How the three models are parallelised, by torch's own styles; for the tests of tensor parallel and of what it joins.

gather = tensor_parallel("wan", model, mesh)        # in place; sequence_parallel likewise
...
gather(gradients(model))                            # as one process has them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

__all__ = ["diffusers_on_cpu", "dtensor_activations", "sequence_parallel", "tensor_parallel"]

Gradients = dict[str, Tensor]
Gather = Callable[[Gradients], Gradients]
SEQUENCE, WHOLE = Shard(1), Replicate()


class Replicated(ParallelStyle):
    """Parameters as DTensors, whole on every rank, so that they meet DTensors; their gradients are summed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh)


def colwise(*names: str, **layouts: Any) -> dict[str, ParallelStyle]:
    return {name: ColwiseParallel(**layouts) for name in names}


def rowwise(*names: str, **layouts: Any) -> dict[str, ParallelStyle]:
    return {name: RowwiseParallel(**layouts) for name in names}


def on_the_sequence(*names: str) -> dict[str, ParallelStyle]:
    return {name: SequenceParallel(use_local_output=False) for name in names}


INTO_SEQUENCE = {"output_layouts": SEQUENCE, "use_local_output": False}


def as_they_are(found: Gradients) -> Gradients:
    return found


# ---------------------------------------------------------------------------------------------------- the DiT

DIT_COLUMNS = ("to_q", "to_k", "to_v", "text_q", "up")
DIT_TEXT = ("text_k", "text_v")
DIT_ROWS = ("to_out", "text_out", "down")


def dit_tensor(model: Any, mesh: DeviceMesh) -> Gather:
    for block in model.blocks:
        parallelize_module(block, mesh, colwise(*DIT_COLUMNS, *DIT_TEXT) | rowwise(*DIT_ROWS))
    return as_they_are


def dit_sequence(model: Any, mesh: DeviceMesh) -> Gather:
    for block in model.blocks:
        into = PrepareModuleInput(input_layouts=(WHOLE, WHOLE, None), desired_input_layouts=(SEQUENCE, WHOLE, None))
        parallelize_module(block, mesh, into)
        plan = colwise(*DIT_COLUMNS, input_layouts=SEQUENCE) | colwise(*DIT_TEXT) | rowwise(*DIT_ROWS, **INTO_SEQUENCE)
        plan |= on_the_sequence("norm1", "norm2", "norm3") | {"modulation": Replicated()}
        parallelize_module(block, mesh, plan)
    out = PrepareModuleInput(input_layouts=SEQUENCE, desired_input_layouts=WHOLE, use_local_output=True)
    parallelize_module(model, mesh, on_the_sequence("norm") | {"head": out})
    return as_they_are


def dtensor_activations(model: Any, mesh: DeviceMesh) -> Gather:
    """The DiT with attention on DTensors that are split over heads."""
    for block in model.blocks:
        plan = colwise(*DIT_COLUMNS, *DIT_TEXT, use_local_output=False) | rowwise(*DIT_ROWS)
        parallelize_module(block, mesh, plan)
    return as_they_are


# ----------------------------------------------------------------------------------------------------- Wan


def across_heads() -> ParallelStyle:
    """A norm over all heads: gathered, computed by every rank, split again."""
    return PrepareModuleInputOutput(
        input_layouts=Shard(-1),
        desired_input_layouts=WHOLE,
        use_local_input=True,
        output_layouts=WHOLE,
        desired_output_layouts=Shard(-1),
        use_local_output=True,
    )


def wan_block(block: Any, mesh: DeviceMesh, rows: dict[str, Any], **columns: Any) -> None:
    # The text is whole on every rank in both layouts.
    plan = colwise("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ffn.net.0.proj", **columns)
    plan |= colwise("attn2.to_k", "attn2.to_v") | rowwise("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2", **rows)
    plan |= {f"{attn}.{norm}": across_heads() for attn in ("attn1", "attn2") for norm in ("norm_q", "norm_k")}
    parallelize_module(block, mesh, plan)
    for attn in (block.attn1, block.attn2):
        attn.heads //= mesh.size()


def wan_tensor(model: Any, mesh: DeviceMesh) -> Gather:
    for block in model.blocks:
        wan_block(block, mesh, {})
    return as_they_are


def wan_sequence(model: Any, mesh: DeviceMesh) -> Gather:
    for block in model.blocks:
        into = PrepareModuleInput(
            input_layouts=(WHOLE, None, WHOLE, None), desired_input_layouts=(SEQUENCE, None, WHOLE, None)
        )
        parallelize_module(block, mesh, into)
        wan_block(block, mesh, INTO_SEQUENCE, input_layouts=SEQUENCE)
        if next(block.norm2.parameters(), None) is not None:
            parallelize_module(block, mesh, on_the_sequence("norm2"))
        table = distribute_tensor(block.scale_shift_table.detach(), mesh, [WHOLE])
        block.scale_shift_table = nn.Parameter(table)
    out = PrepareModuleOutput(output_layouts=SEQUENCE, desired_output_layouts=WHOLE)
    parallelize_module(model.blocks[-1], mesh, out)
    return as_they_are


# ---------------------------------------------------------------------------------------------------- Flux

QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


@contextmanager
def diffusers_on_cpu() -> Iterator[None]:
    """Lets diffusers' enable_parallelism take a mesh of CPUs: it asks for an accelerator, but needs none."""
    cpu = torch.device("cpu")
    with (
        mock.patch("torch._C._get_accelerator", return_value=cpu),
        mock.patch("torch.accelerator.device_count", return_value=1),
        mock.patch("diffusers.hooks.tensor_parallel._SUPPORTED_TP_DEVICES", ("cpu",)),
    ):
        yield


def packed_columns(found: Gradients, ranks: int) -> Gradients:
    """Undo the order in which diffusers deals out the columns of a projection of several concatenated parts."""

    def in_order(grad: Tensor) -> Tensor:
        parts = grad.shape[0], 4 * grad.shape[0]  # attention's output and the MLP's
        dealt = [shard.split([part // ranks for part in parts], 1) for shard in grad.chunk(ranks, 1)]
        return torch.cat([torch.cat(part, 1) for part in zip(*dealt)], 1)

    return {
        name: in_order(grad) if name.startswith("single") and name.endswith("proj_out.weight") else grad
        for name, grad in found.items()
    }


def flux_tensor(model: Any, mesh: DeviceMesh) -> Gather:
    """diffusers' own plan, through its own interface."""
    from diffusers import TensorParallelConfig

    with diffusers_on_cpu():
        model.enable_parallelism(config=TensorParallelConfig(mesh=mesh))

    def gather(found: Gradients) -> Gradients:
        # Norms within a head are plain parameters: each rank has the gradients from its own heads.
        for name, grad in found.items():
            if name.split(".")[-2] in QK_NORMS:
                dist.all_reduce(grad, group=mesh.get_group())
        return packed_columns(found, mesh.size())

    return gather


def flux_sequence(model: Any, mesh: DeviceMesh) -> Gather:
    """The double blocks split the sequence; the single ones, which cut it in two, do not."""
    from diffusers.hooks.tensor_parallel import _styles

    in_heads = {f"attn.{norm}": SequenceParallel(sequence_dim=2, use_local_output=True) for norm in QK_NORMS}
    streams = ("hidden_states", "encoder_hidden_states")
    columns = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
    for block in model.transformer_blocks:
        into = PrepareModuleInput(
            input_kwarg_layouts=dict.fromkeys((*streams, "temb"), WHOLE),
            desired_input_kwarg_layouts={**dict.fromkeys(streams, SEQUENCE), "temb": WHOLE},
        )
        out = PrepareModuleOutput(output_layouts=(SEQUENCE,) * 2, desired_output_layouts=(WHOLE,) * 2)
        plan = colwise(*columns, "ff.net.0.proj", "ff_context.net.0.proj", input_layouts=SEQUENCE)
        plan |= rowwise("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2", **INTO_SEQUENCE)
        plan |= in_heads | {"norm1.linear": Replicated(), "norm1_context.linear": Replicated()}
        for style in (into, out, plan):
            parallelize_module(block, mesh, style)
    for block in model.single_transformer_blocks:
        own = {name.split("*.")[1]: style for name, style in model._tp_plan.items() if name.startswith("single")}
        parallelize_module(
            block, mesh, _styles(own) | {name: in_heads[name] for name in ("attn.norm_q", "attn.norm_k")}
        )
    return lambda found: packed_columns(found, mesh.size())


# --------------------------------------------------------------------------------------------------- by name

TENSOR = {"dit": dit_tensor, "wan": wan_tensor, "flux": flux_tensor}
SEQUENCES = {"dit": dit_sequence, "wan": wan_sequence, "flux": flux_sequence}


def tensor_parallel(name: str, model: nn.Module, mesh: DeviceMesh) -> Gather:
    """Split the linear layers over a mesh of one axis."""
    return TENSOR[name](model, mesh)


def sequence_parallel(name: str, model: nn.Module, mesh: DeviceMesh) -> Gather:
    """The same, with what lies between them split along the sequence."""
    return SEQUENCES[name](model, mesh)
