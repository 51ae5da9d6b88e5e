"""Putting our attention op into a torch-level graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from jvpgraph.graph.torch_level import emit, fake_mode_of, inherit
from jvpgraph.kernels.ops import OPS

__all__ = ["emit_attention", "unexpanded", "with_layout_of"]


def emit_attention(
    origin: fx.Node,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    bias: fx.Node | None,
    is_causal: bool,
    scale: float | None,
    dtype: torch.dtype,
    block_mask: tuple[fx.Node, fx.Node] | None = None,
) -> fx.Node:
    """Insert the attention op at the graph's cursor and return its o.

    Args:
        origin: whose source line the new nodes inherit.
        dtype: what q, k and v are computed in: theirs, or the one that autocast gives them.
        block_mask: map and partial of a block mask.
    Raises:
        ValueError: the op does not take these operands.
    """
    bias = unexpanded(bias)
    examples: list[Any] = [None if x is None else x.meta.get("example_value") for x in (q, k, v, bias)]
    if not all(isinstance(x, Tensor) for x in examples[:3]) or (bias is not None and examples[3] is None):
        raise ValueError("the shapes of its operands are not known")
    kinds = {type(x) for x in examples if x is not None}
    fake_mode = fake_mode_of(examples[0])
    if len(kinds) > 1 or fake_mode is None:
        raise ValueError(f"operands are {', '.join(sorted(kind.__name__ for kind in kinds))}")
    with fake_mode, torch.no_grad():
        if any(x.dtype != dtype for x in examples[:3]):  # autocast will cast all of them
            examples = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in examples]
        how: dict[str, Any] = dict(zip(("block_map", "partial_blocks"), block_mask or ()))
        fake = OPS.attention.default(
            *examples, is_causal, scale, **{name: x.meta["example_value"] for name, x in how.items()}
        )
    attention = origin.graph.call_function(OPS.attention.default, (q, k, v, bias, is_causal, scale), how)
    o = origin.graph.call_function(operator.getitem, (attention, 0))
    for new, example in ((attention, fake), (o, fake[0])):
        inherit(new, origin)
        new.meta["example_value"] = example
    return o


def unexpanded(bias: Any) -> Any:
    """bias before it was expanded: the op broadcasts by itself, and a compiler might write the copies out."""
    while bias is not None and bias.op == "call_method" and bias.target in ("expand", "expand_as"):
        bias = bias.args[0]
    return bias


def with_layout_of(origin: fx.Node, o: fx.Node) -> fx.Node:
    """o, made contiguous where the original was and a user takes a view that needs it."""
    viewed = any(user.op == "call_method" and user.target == "view" for user in origin.users)
    before, after = origin.meta["example_value"], o.meta["example_value"]
    return emit(origin, "contiguous", o) if viewed and before.is_contiguous() and not after.is_contiguous() else o
