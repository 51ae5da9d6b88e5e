"""``jvpgraph::mm_float32(a, b)``: the product of two matrices in half precision, or of two stacks, in float32.

Tensor cores add up in float32 whatever they are asked for; what ``aten::mm`` rounds afterwards, this op keeps. On CUDA
it is cuBLAS with float32 for its result (``aten::mm.dtype``), which exists for no other device: there the operands are
cast up.

Shapes
    a [M, K] and b [K, N] -> [M, N], or a [B, M, K] and b [B, K, N] -> [B, M, N].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from jvpgraph.kernels.schemas import LIBRARY

__all__ = ["DECOMPOSITIONS", "mm_float32"]

LIBRARY.define("mm_float32(Tensor a, Tensor b) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
OP = torch.ops.jvpgraph.mm_float32


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """The product in float32. Has gradients, in the dtypes of the operands."""
    product: Tensor = OP(a, b)
    return product


def _cast_up(a: Tensor, b: Tensor) -> Tensor:
    """Where no kernel gives float32."""
    return a.to(torch.float32) @ b.to(torch.float32)


def _on_cuda(a: Tensor, b: Tensor) -> Tensor:
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """In half precision, as the gradients of a product in half precision are."""
    a, b = ctx.saved_tensors
    grad = grad.to(a.dtype)
    wanted = ctx.needs_input_grad
    return grad @ b.mT if wanted[0] else None, a.mT @ grad if wanted[1] else None


def _vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """One product, of more rows or of more matrices."""
    count = info.batch_size
    if in_dims[1] is None and a.dim() == 3:
        rows = a.movedim(in_dims[0], 0)  # type: ignore[arg-type]
        return mm_float32(rows.flatten(0, 1), b).unflatten(0, (count, -1)), 0
    first, second = (x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip((a, b), in_dims))
    if first.dim() == 3:
        return mm_float32(first, second), 0
    return mm_float32(first.flatten(0, 1), second.flatten(0, 1)).unflatten(0, (count, -1)), 0


LIBRARY.impl("mm_float32", _cast_up, "CompositeExplicitAutograd")
LIBRARY.impl("mm_float32", _on_cuda, "CUDA")
torch.library.register_fake("jvpgraph::mm_float32", _fake, lib=LIBRARY)
torch.library.register_autograd("jvpgraph::mm_float32", _backward, setup_context=_setup, lib=LIBRARY)
torch.library.register_vmap("jvpgraph::mm_float32", _vmap, lib=LIBRARY)


# For a compiler, which makes the casts part of what stands before the product.
DECOMPOSITIONS = {OP.default: lambda a, b: NotImplemented if a.is_cuda else _cast_up(a, b)}


@register_flop_formula(OP)
def _flops(a_shape: Any, b_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> Any:
    batch = a_shape[0] if len(a_shape) == 3 else 1
    return 2 * batch * a_shape[-2] * a_shape[-1] * b_shape[-1]
