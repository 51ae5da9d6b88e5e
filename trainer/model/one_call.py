"""What modules of a network are told for one call of it, beyond the arguments that the network hands them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def told(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute that the module reads in one call of its network, and that is None again after any, failed ones too.

    What stayed would be read by the next call, which may be a pipeline's.
    """
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, None)


def keep_time_exact(sinusoids: nn.Module) -> None:
    """Let the sinusoids of a time embedding see `sinusoids.exact_time` [B] once, whatever the network hands them.

    Their next call, for a guidance scale, and calls by others, a pipeline say, are not touched.
    """
    if use_exact_time not in sinusoids._forward_pre_hooks.values():
        vars(sinusoids)["exact_time"] = None
        sinusoids.register_forward_pre_hook(use_exact_time)


def use_exact_time(sinusoids: Any, rounded: tuple[Tensor]) -> tuple[Tensor]:
    """A hook without a closure, so that copies of a network have their own."""
    exact, sinusoids.exact_time = sinusoids.exact_time, None
    if exact is None:
        return rounded
    if exact.shape != rounded[0].shape:
        raise ValueError(
            f"the network asks for times of shape {list(rounded[0].shape)}, and is told {list(exact.shape)}: its "
            "configuration makes more of a time than its adapter knows"
        )
    return (exact,)
