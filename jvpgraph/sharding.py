"""How the package's own ops act on DTensors: the markers on any placement, attention on batch and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch._ops import OpOverload

from jvpgraph.kernels.ops import OPS
from jvpgraph.markers import MAKE_DUAL, TANGENT_OF
from jvpgraph.rules.apply import bind

if dist.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import OpSchema
    from torch.distributed.tensor.experimental import register_sharding

__all__ = ["attention_placements", "register_sharding_rules"]

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
    def tangent_of(y: Any, differentiable: bool = False) -> list[Placements]:
        return [([p], [p, None]) for p in (Replicate(), Partial(), *map(Shard, range(y.ndim)))]

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
        if dim is None or name.startswith("cu_"):
            return Replicate()
        return of_bias(dim, value, Replicate()) if name.startswith("bias") else Shard(dim)

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
