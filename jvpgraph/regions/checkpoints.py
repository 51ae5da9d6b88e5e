"""Regions inside torch.utils.checkpoint: whose saved-tensor hooks are whose, and what a graph takes into itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachingTorchDispatchMode, checkpoint, create_selective_checkpoint_contexts

from jvpgraph.errors import CaptureError
from jvpgraph.tree import map_leaves, refuse_objects

__all__ = ["Call", "hooks_taken_off", "policy"]


@dataclass(frozen=True)
class Call:
    """How a graph calls its module."""

    in_checkpoint: bool
    policy: Callable[..., Any] | None  # what a selective checkpoint keeps
    apart: bool  # AOTAutograd takes no outputs that share memory where there are DTensors

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.in_checkpoint:
            out = module.forward(*args, **kwargs)
        elif self.policy is None:
            out = checkpoint(lambda: module.forward(*args, **kwargs), use_reentrant=False)
        else:
            contexts = functools.partial(create_selective_checkpoint_contexts, self.policy)
            out = checkpoint(lambda: module.forward(*args, **kwargs), use_reentrant=False, context_fn=contexts)
        refuse_objects(out, CaptureError)  # here, where nothing that the region does has been done yet
        if not self.apart or isinstance(out, Tensor):
            return out
        return map_leaves(out, lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def policy() -> Callable[..., Any] | None:
    """Of the innermost checkpoint that is open: selective ones have a mode that knows it."""
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _CachingTorchDispatchMode)]
    return modes[-1].policy_fn if modes else None


@contextmanager
def hooks_taken_off(count: int) -> Iterator[None]:
    """Without the innermost saved-tensor hooks."""
    taken = []
    for _ in range(count):
        taken.append(torch._C._autograd._top_saved_tensors_default_hooks(True))
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for hooks in reversed(taken):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
