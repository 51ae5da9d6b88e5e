"""Tangents that torch.func.vmap runs over: one call takes all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["call_with_all", "is_vmapped"]


def is_vmapped(dots: dict[str, Tensor], inputs: Callable[[], Any]) -> bool:
    """Whether the innermost of torch.func's transforms is a vmap over tangents, and over nothing else that goes in:
    ``inputs()``, which are looked for in a vmap only."""
    stack = functorch.get_interpreter_stack()
    if not stack or stack[-1].key() != functorch.TransformType.Vmap:
        return False
    level = stack[-1].level()
    given = [x for x in tree_leaves(inputs()) if isinstance(x, Tensor)]
    return any(_is_of(level, dot) for dot in dots.values()) and not any(_is_of(level, x) for x in given)


def call_with_all(dual: Callable[..., tuple[Any, Any]], args: Any, kwargs: Any, dots: dict[str, Tensor]) -> Any:
    """What ``dual``, for batches of tangents, gives outside of the vmap, with its tangents in the vmap again."""
    level = functorch.get_interpreter_stack()[-1].level()
    with temporarily_pop_interpreter_stack():
        out, out_dots = dual(args, kwargs, _outside(dots, level))
    return out, tree_map(lambda x: functorch._add_batch_dim(x, 0, level) if isinstance(x, Tensor) else x, out_dots)


def _outside(dots: dict[str, Tensor], level: int) -> dict[str, Tensor]:
    """The tangents, each with the dim that vmap runs over as its first."""
    found, sizes = {}, []
    for path, dot in dots.items():
        if _is_of(level, dot):
            found[path] = functorch.get_unwrapped(dot).movedim(functorch.maybe_get_bdim(dot), 0)
            sizes.append(found[path].shape[0])
    return {path: found[path] if path in found else dot.expand(sizes[0], *dot.shape) for path, dot in dots.items()}


def _is_of(level: int, x: Tensor) -> bool:
    return bool(functorch.is_batchedtensor(x)) and functorch.maybe_get_level(x) == level
