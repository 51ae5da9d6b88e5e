"""One set of tangents at a time: other forward-mode levels around a call are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from jvpgraph.op_by_op.mode import OpByOp
from jvpgraph.op_by_op.refusals import refusal
from jvpgraph.rules.apply import has_tangent

__all__ = ["refuse_other_levels"]


def refuse_other_levels(inputs: Any, call: Any) -> None:
    """One set of tangents at a time.

    Raises:
        UnsupportedOp: this call is made by a model that is itself called with tangents.
        ValueError: an input, a parameter or a buffer has a tangent of PyTorch's own forward AD, or the call is made
            inside one of torch.func's transforms.
    """
    if any(isinstance(mode, OpByOp) for mode in _get_current_dispatch_mode_stack()):
        raise refusal("a call with tangents", "it is made inside a model that is itself called with tangents")
    transforms = {interpreter.key().name for interpreter in torch._C._functorch.get_interpreter_stack() or ()}
    if transforms:
        names = " and ".join(sorted(transforms)).lower()
        raise ValueError(f"a call with tangents inside torch.func's {names}: nest them the other way round")
    if forward_ad._current_level < 0:
        return  # before a thousand parameters are looked at for nothing
    own = [*call.parameters(), *call.buffers()] if isinstance(call, torch.nn.Module) else []
    tensors = [x for x in tree_leaves([inputs, own]) if isinstance(x, Tensor)]
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors if has_tangent(x)):
        raise ValueError(
            "an input, parameter or buffer has a tangent of torch.autograd.forward_ad, which would be lost: pass it in "
            "tangents=, or pass the primal alone"
        )
