"""Context parallelism of other libraries: that of diffusers is made traceable, torch's own is refused.

That of diffusers works in eager mode, but not in one graph: its hooks look up a signature and warn on first use, and
the backward of its default attention switches requires_grad on inside an autograd Function. In a ring of more than two
ranks that backward is also wrong (0.42): gradients of keys and values travel on, away from the rank whose keys come
next. Such a model gets a backward of this package, for its eager calls too.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

from jvpgraph.errors import CaptureError
from jvpgraph.kernels.ops import OPS

__all__ = ["make_traceable"]

HOOKS, ATTENTION = "diffusers.hooks.context_parallel", "diffusers.models.attention_dispatch"
log = logging.getLogger("jvpgraph")
TORCHS = "torch.distributed.tensor.experimental._context_parallel._attention"


def make_traceable(model: nn.Module) -> None:
    """Prepare what diffusers has put on ``model`` for capture; but for the gradients of a ring of more than two ranks,
    nothing changes for eager calls. Cheap to repeat.

    Raises:
        CaptureError: inside of torch's ``context_parallel``, which puts DTensors into attention behind Dynamo's back.
    """
    if F.scaled_dot_product_attention in getattr(sys.modules.get(TORCHS), "_replaced_functions", ()):
        raise CaptureError(
            "a call with tangents= cannot stand inside torch's context_parallel: use "
            "jvpgraph.context_parallel.ContextParallel in the model, or diffusers' enable_parallelism"
        )
    if HOOKS not in sys.modules:
        return
    _tell_dynamo()
    for module in model.modules():
        config = getattr(vars(module).get("_parallel_config"), "context_parallel_config", None)
        if getattr(config, "ring_degree", 1) > 2:
            _mend_ring()
        registry = vars(module).get("_diffusers_hook")
        for hook in getattr(registry, "hooks", {}).values():
            metadata = getattr(hook, "module_forward_metadata", None)
            if metadata is not None and metadata.cached_parameter_indices is None and metadata._cls is not None:
                names = list(inspect.signature(metadata._cls.forward).parameters)[1:]  # without self
                metadata.cached_parameter_indices = {name: i for i, name in enumerate(names)}


@functools.cache
def _tell_dynamo() -> None:
    warn = getattr(type(sys.modules[HOOKS].logger), "warning_once", None)
    if warn is not None:
        config = torch._dynamo.config
        config.ignore_logging_functions = {*config.ignore_logging_functions, warn}
    backward = getattr(sys.modules.get(ATTENTION), "_native_attention_backward_op", None)
    if backward is not None:
        torch._dynamo.substitute_in_graph(backward)(_native_attention_backward)


def _native_attention_backward(ctx: Any, grad_out: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """diffusers' own computes the attention again under enable_grad and differentiates it; the same by our op."""
    if ctx.dropout_p != 0:
        raise ValueError("context-parallel attention with dropout cannot be captured as one graph")
    q, k, v = (x.transpose(1, 2) for x in ctx.saved_tensors)
    how = (ctx.is_causal, ctx.scale)
    o, lse = OPS.attention(q, k, v, ctx.attn_mask, *how)
    dq, dk, dv, _ = OPS.attention_backward(grad_out.transpose(1, 2), None, q, k, v, ctx.attn_mask, o, lse, *how)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@functools.cache
def _mend_ring() -> None:
    ring = getattr(sys.modules.get(ATTENTION), "TemplatedRingAttention", None)
    if ring is not None:
        log.warning("jvpgraph: the gradients of diffusers' ring attention on more than two ranks are wrong: replaced")
        ring.backward = staticmethod(_ring_backward)


def _ring_backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Keys and values gathered as in the forward; their gradients, a chunk for each rank, summed where they belong."""
    q, k, v, *_ = ctx.saved_tensors
    config = ctx._parallel_config.context_parallel_config
    size, rank, group = config.ring_degree, config._ring_local_rank, config._ring_mesh.get_group()
    dtype = torch.float32 if config.convert_to_fp32 else grad_out.dtype
    chunks = funcol.all_gather_tensor(torch.cat([k.flatten(), v.flatten()]), 0, group).chunk(size)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    of_ranks: list[Any] = [None] * size
    for hop in range(size):
        source = (rank + hop) % size
        k_part, v_part = chunks[source].split([k.numel(), v.numel()])
        parts = {"key": k_part.view(k.shape), "value": v_part.view(v.shape)}
        grads = ctx.backward_op(ctx, grad_out, query=q, **parts, out=ctx.ring_out, lse=ctx.ring_lse)
        dq = dq + grads[0]
        of_ranks[source] = torch.cat([x.to(dtype).flatten() for x in grads[1:3]])
    dk, dv = funcol.reduce_scatter_tensor(torch.cat(of_ranks), "sum", 0, group).split([k.numel(), v.numel()])
    return *(x.to(grad_out.dtype) for x in (dq, dk.view(k.shape), dv.view(v.shape))), *[None] * 9
