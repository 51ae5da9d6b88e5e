"""Matching the tangents that a caller names to the inputs of the call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from jvpgraph.errors import NonFiniteTangent
from jvpgraph.precision import widened
from jvpgraph.rules.apply import has_tangent
from jvpgraph.tree import leaves

__all__ = ["Inputs", "match_tangents"]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call by the name a caller knows them under, and the path they are passed under.

    A positional argument is passed under ``args`` and its index, a keyword argument under ``kwargs`` and its name.
    """

    tensors: dict[str, Tensor]
    paths: dict[str, str]

    @staticmethod
    def of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """The inputs of ``model(*args, **kwargs)``, named after the parameters of its forward."""
        names: list[str] = []
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        model = model.module if isinstance(model, DistributedDataParallel) else model
        for parameter in inspect.signature(model.forward).parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                names += [f"{parameter.name}.{i}" for i in range(len(args) - len(names))]
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
        named = [(name, f"args.{i}", value) for i, (name, value) in enumerate(zip(names, args))]
        return Inputs._collect(named + [(name, f"kwargs.{name}", value) for name, value in kwargs.items()])

    @staticmethod
    def positional(args: tuple[Any, ...], first: int = 0) -> Inputs:
        """The inputs of a plain function, named by position; they are passed behind ``first`` other arguments."""
        return Inputs._collect([(f"{i}", f"args.{first + i}", value) for i, value in enumerate(args)])

    @staticmethod
    def _collect(named: list[tuple[str, str, Any]]) -> Inputs:
        tensors, paths = {}, {}
        for name, prefix, value in named:
            for path, leaf in leaves(value):
                if isinstance(leaf, Tensor):
                    inner = f".{path}" if path else ""
                    if name + inner in tensors:
                        raise ValueError(f"two inputs go by the name {name + inner!r}: rename one of them")
                    tensors[name + inner], paths[name + inner] = leaf, prefix + inner
        return Inputs(tensors, paths)


def match_tangents(
    tangents: Mapping[Any, Any], inputs: Inputs, finite: bool = False, batched: bool | int = False, wide: bool = False
) -> dict[str, Tensor]:
    """Tangents by the path of their input.

    Args:
        finite: require that they are finite.
        wide: those of inputs in half precision may be float32.
        batched: there are several of each input, along a first dim of their own: so many, or with True any number.

    Raises:
        NonFiniteTangent: with ``finite``, one is not.
        ValueError: an unknown name, or a shape, dtype or device that differs from the primal's; the message says
            which names there are.
    """
    if not isinstance(tangents, Mapping):
        raise ValueError(f"tangents must be a mapping from input names to tensors, not {type(tangents).__name__}")
    given = {name: dot for name, dot in leaves(tangents) if dot is not None}
    if not given:
        raise ValueError(f"no tangent was given; {_valid_names(inputs)}")
    counts: dict[str, int] = {}
    for name, dot in given.items():
        primal = inputs.tensors.get(name)
        if primal is None:
            raise ValueError(f"there is no input tensor named {name!r}; {_valid_names(inputs)}")
        if not isinstance(dot, Tensor):
            raise ValueError(f"the tangent of {name!r} must be a tensor, not {type(dot).__name__}")
        if not has_tangent(primal):
            raise ValueError(f"{name!r} is {primal.dtype} and has no tangent; {_valid_names(inputs)}")
        if batched:
            counts[name] = _count(name, dot, batched)
        for what in ("shape", "dtype", "device"):
            wanted, got = getattr(primal, what), getattr(dot, what)
            got = got[1:] if batched and what == "shape" else got
            if wanted != got and not (wide and what == "dtype" and got == widened(wanted)):
                pair = (tuple(got), tuple(wanted)) if what == "shape" else (got, wanted)
                each = f"tangents of {name!r} have" if batched else f"tangent of {name!r} has"
                raise ValueError(f"the {each} {what} {pair[0]}, the input has {pair[1]}")
        if finite and not bool(torch.isfinite(dot).all()):
            raise NonFiniteTangent(f"the tangent given for {name!r} is not finite")
    if len(set(counts.values())) > 1:
        raise ValueError(f"every input needs as many tangents as the others, their first dims are {counts}")
    return {inputs.paths[name]: dot for name, dot in given.items()}


def _count(name: str, dots: Tensor, wanted: bool | int) -> int:
    """How many tangents there are along the first dim."""
    if is_traceable_wrapper_subclass(dots):
        raise ValueError(f"several tangents of {name!r} cannot be a {type(dots).__name__}: call once for each")
    if dots.dim() == 0 or dots.shape[0] == 0 or (wanted is not True and dots.shape[0] != wanted):
        number = "at least 1" if wanted is True else wanted
        raise ValueError(
            f"with tangents_batched the tangents of {name!r} need a first dim of {number}, the number of tangents, "
            f"not {tuple(dots.shape)}"
        )
    return dots.shape[0]


def _valid_names(inputs: Inputs) -> str:
    valid = [
        f"{name} ({str(x.dtype).removeprefix('torch.')} {tuple(x.shape)})"
        for name, x in inputs.tensors.items()
        if has_tangent(x)
    ]
    return f"tangents can be given for: {', '.join(valid) or 'none of these inputs (none is floating)'}"
