"""How the package's own ops act on DTensors: the markers on any placement, attention on batch and heads. Also the
message for heads that do not divide."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch._ops import OpOverload

from jvpgraph.errors import JvpgraphError
from jvpgraph.kernels.ops import OPS
from jvpgraph.markers import MAKE_DUAL, TANGENT_OF
from jvpgraph.rules.apply import bind

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import OpSchema
    from torch.distributed.tensor.experimental import register_sharding

__all__ = ["attention_placements", "explaining_heads", "heads_that_do_not_divide", "register_sharding_rules"]

Placements = tuple[list[Any], list[Any]]  # of the outputs and of the arguments, on one mesh axis
FLASH_FOR_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION = (OPS.attention, OPS.attention_jvp, OPS.attention_backward, OPS.attention_jvp_backward)


def register_sharding_rules() -> None:
    """Tell DTensor about the ops; nothing in a build of PyTorch without distributed."""
    if not dist.is_available():
        return

    @register_sharding(MAKE_DUAL)
    def make_dual(x: Any, x_dot: Any) -> list[Placements]:
        return [([p], [p, p]) for p in (Replicate(), Partial(), *map(Shard, range(x.ndim)))]

    @register_sharding(TANGENT_OF)
    def tangent_of(y: Any, differentiable: bool = False, dtype: Any = None) -> list[Placements]:
        return [([p], [p, None, None]) for p in (Replicate(), Partial(), *map(Shard, range(y.ndim)))]

    def register(op: OpOverload) -> None:
        register_sharding(op)(lambda *args, **kwargs: attention_placements(op, args, kwargs))

    for packet in ATTENTION:
        register(packet.default)

    # What Dynamo evaluates before attention is swapped. DTensor knows the CUDA kernels; for the CPU's it would search
    # among all placements of every op of a decomposition, without end.
    @register_sharding(FLASH_FOR_CPU)
    def flash_for_cpu(q: Any, k: Any, v: Any, *how: Any, attn_mask: Any = None, **_: Any) -> list[Placements]:
        dims = (0, 1) if attn_mask is None else ()
        split = [([Shard(dim)] * 2, [Shard(dim)] * 3 + [None] * len(how)) for dim in dims]
        return [([Replicate()] * 2, [Replicate()] * 3 + [None] * len(how)), *split]

    _let_expand_be_implicit()


def _let_expand_be_implicit() -> None:
    """DTensor's own strategy of expand does not know this argument, which mark_stop_gradients sets."""
    expand = torch.ops.aten.expand.default
    known = DTensor._op_dispatcher.sharding_propagator
    own = known.op_strategy_funcs[expand]

    def strategy(schema: Any) -> Any:
        kwargs = {name: value for name, value in schema.kwargs_schema.items() if name != "implicit"}
        return own(OpSchema(schema.op, schema.args_schema, kwargs, schema.schema_info))

    known.register_op_strategy(expand, strategy, known.op_to_schema_info[expand])


def attention_placements(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Placements]:
    """What an attention op accepts and returns on one mesh axis: everything whole, or one of the dims in front of the
    sequence split, which are batch and heads. Shared heads are only split where that leaves each with its queries.

    Args:
        op: one of the attention ops.
        args, kwargs: of a call, with anything that has a ``shape`` (and ``q`` a ``mesh``) in place of tensors.
    """
    call = bind(op, args, kwargs)
    q, k, bias = call["q"], call["k"], call.get("bias")
    rank, packed = len(q.shape), call["cu_seqlens_q"] is not None

    def of_bias(dim: int, like: Any, when_shared: Any) -> Any:
        own = dim - rank + len(like.shape)
        return Shard(own) if own >= 0 and like.shape[own] != 1 else when_shared

    def of_argument(name: str, value: Any, dim: int | None) -> Any:
        if not hasattr(value, "shape"):
            return None
        if dim is None or name.startswith("cu_") or name == "partial_blocks":
            return Replicate()
        return of_bias(dim, value, Replicate()) if name.startswith(("bias", "block_map")) else Shard(dim)

    def of_output(name: str, dim: int | None) -> Any:
        if dim is None:
            return Replicate()
        if name.startswith("dbias"):
            needed = call["bias_dot_needs_grad" if name == "dbias_dot" else "bias_needs_grad"]
            return of_bias(dim, bias, Partial()) if needed and bias is not None else Replicate()
        absent = name.endswith("_dot") and name.startswith("d") and call[name[1:]] is None
        return Replicate() if absent else Shard(dim)

    def splits(dim: int) -> bool:
        if q.shape[dim] == k.shape[dim]:
            return not packed or dim == rank - 3
        return k.shape[dim] % q.mesh.size() == 0

    dims = [None, *(dim for dim in range(rank - 2) if splits(dim))]
    # Arguments left out by the caller have no place in the list.
    given = list(call.items())[: len(args)]
    return [
        (
            [of_output(out.name, dim) for out in op._schema.returns],
            [of_argument(name, value, dim) for name, value in given],
        )
        for dim in dims
    ]


# ------------------------------------------------------------------------------------------------------ heads

PROJECTION = re.compile(r"(^|_)(q|k|v|qkv|kv)(_|$)|query|key|value")  # how the layers that make heads are called


@contextmanager
def explaining_heads(model: nn.Module) -> Iterator[None]:
    """Where the model fails and its heads are split unevenly, say so: the error itself only speaks of some view.

    Raises:
        ValueError: in place of what was raised, with the layers, their heads, and what would work.
    """
    try:
        yield
    except (RuntimeError, JvpgraphError) as error:
        found = heads_that_do_not_divide(model)
        if not found:
            raise
        raise ValueError("\n".join(["tensor parallel splits attention within a head:", *found])) from error


def heads_that_do_not_divide(model: nn.Module) -> list[str]:
    """One line per projection, split over the ranks of tensor parallel, whose heads these ranks cannot share evenly."""
    if not dist.is_available():
        return []
    sharded_by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    found = []
    for path, module in model.named_modules():
        for name, child in module.named_children():
            weight = getattr(child, "weight", None)
            if not isinstance(weight, DTensor) or not PROJECTION.search(name) or not weight.placements[-1].is_shard(0):
                continue
            if sharded_by_fsdp and weight.device_mesh.ndim == 1:
                continue  # gathered before it is used
            heads, ranks = _heads(model, module, weight.shape[0]), weight.device_mesh.size(-1)
            if heads is not None and heads % ranks:
                sizes = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
                found.append(
                    f"  {path}.{name}: {heads} heads (dim 0 of its weight, {weight.shape[0]}) over {ranks} ranks; "
                    f"tensor-parallel sizes that divide: {sizes}. Give the other ranks to context or data."
                )
    return found


def _heads(model: nn.Module, module: nn.Module, width: int) -> int | None:
    """How many heads there are in a width, as far as attributes tell. Counts of heads in the module itself do not: a
    plan may have divided them already."""
    for name in ("head_dim", "dim_head", "attention_head_dim"):
        head_dim = getattr(module, name, None)
        if isinstance(head_dim, int) and head_dim > 0:
            return width // head_dim
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    return heads if isinstance(heads, int) else None
