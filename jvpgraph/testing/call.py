"""One call of a model, and the same in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from jvpgraph.tangents import Inputs, match_tangents
from jvpgraph.testing.tolerances import WIDE, distance, rtol_of, widened
from jvpgraph.tree import leaves, map_leaves

__all__ = ["Call", "Detached", "InFloat64", "active_leaves", "call_of", "refuse_random"]


@dataclass(frozen=True)
class Call:
    """A model, its arguments, and tangents by the path of their input."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dots: dict[str, Tensor]

    def __call__(self, replace: Callable[[str, Any], Any] = lambda path, leaf: leaf) -> Any:
        return self.model(*map_leaves(self.args, replace, "args"), **map_leaves(self.kwargs, replace, "kwargs"))

    def in_float64(self) -> Call:
        model = copy.deepcopy(self.model)
        model.requires_grad_(False)._apply(widened)
        for module in model.modules():  # tensors that are neither parameters nor buffers
            vars(module).update({k: widened(v) for k, v in vars(module).items() if isinstance(v, Tensor)})
        args, kwargs = (map_leaves(tree, lambda _, leaf: widened(leaf)) for tree in (self.args, self.kwargs))
        return Call(model, args, kwargs, {path: widened(dot) for path, dot in self.dots.items()})


def call_of(model: nn.Module, args: Any, kwargs: Any, tangents: Any, wide: bool = False) -> Call:
    """Args: wide: tangents of inputs in half precision may be float32."""
    args, kwargs = tuple(args), dict(kwargs or {})
    dots = match_tangents(tangents or {}, Inputs.of(model, args, kwargs), wide=wide)
    return Call(model, args, kwargs, dots)


CASTS = {Tensor.float: Tensor.double, Tensor.bfloat16: Tensor.double, Tensor.half: Tensor.double}


class InFloat64(TorchFunctionMode):
    """What the model asks for in a narrower type, it gets in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(WIDE.get(x, x) if isinstance(x, torch.dtype) else x for x in args)
        kwargs = {k: WIDE.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return CASTS.get(func, func)(*args, **kwargs)


DETACHING = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


class Detached(TorchFunctionMode):
    """Stop-gradients stop differences too: ``x.detach()`` is what it was in the first run under this mode."""

    def __init__(self, known: list[Tensor], first: bool):
        super().__init__()
        self._known, self._first, self._count = known, first, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in DETACHING:
            return out
        if self._first:
            self._known.append(out.clone())
        self._count += 1
        return self._known[self._count - 1].clone()


def active_leaves(out: Any) -> dict[str, Tensor]:
    return {path: x for path, x in leaves(out) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())}


def refuse_random(call: Call) -> None:
    def sample(seed: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            return active_leaves(call())

    a, b = sample(1), sample(2)
    random = [path for path in a if distance(a[path], b[path]) > rtol_of(a[path].dtype)]
    if random:
        raise ValueError(
            f"the model draws random numbers: its output {random[0]!r} depends on torch's seed. "
            "Call model.eval() to switch dropout off, or pass the noise in as an input."
        )
