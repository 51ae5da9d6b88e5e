"""Which calls of torch.utils.checkpoint are open: their saved-tensor hooks are the innermost ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["is_recomputing", "open_checkpoints"]


def open_checkpoints() -> list[Any]:
    """The checkpoints whose saved-tensor hooks are the innermost ones, innermost first."""
    return _open()[0]


def is_recomputing() -> bool:
    """Whether what autograd saves goes to a checkpoint that computes its forward once more, perhaps by way of others in
    that forward."""
    return "_recomputation_hook" in _open()[1]


def _open() -> tuple[list[Any], str]:
    """The open checkpoints, and the name of the hook that is below them."""
    frames: list[Any] = []
    taken: list[Any] = []
    below = ""
    try:
        while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
            frame = _frame_of(hooks[0])
            if frame is None:
                below = getattr(hooks[0], "__qualname__", "")
                break
            frames.append(frame)
            taken.append(hooks)
            torch._C._autograd._pop_saved_tensors_default_hooks()
    finally:
        for hooks in reversed(taken):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
    return frames, below


def _frame_of(pack: Callable[..., Any]) -> Any:
    if getattr(pack, "__module__", "") != "torch.utils.checkpoint":
        return None
    return inspect.getclosurevars(pack).nonlocals.get("frame")
