"""Derived rules: PyTorch's own forward formulas, borrowed one op at a time.

For an op that is not in the table, forward AD over that single call gives the tangent; run under the recorder it
leaves the formula's ops in the graph. Only ATen's ops qualify: each of them has a formula or refuses, whereas for a
custom op functorch silently returns zero.

PyTorch leaves the tangents of outputs that it calls not differentiable undefined, and also of outputs that depend on
no active operand. The two cannot be told apart, and ``torch.func.jvp`` makes zeros of both. Here such an output is
:class:`Unknown`, and using it is refused. So is an output that ignores one active operand among several (the class
weights of a loss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = ["NotDerivable", "Unknown", "derive", "probing"]

aten = torch.ops.aten

# Outputs that are constant between jumps, which PyTorch leaves undefined, by their position.
PIECEWISE_CONSTANT: dict[OpOverload, tuple[int, ...]] = {
    aten.histc.default: (0,),
    aten.linalg_lu.default: (0,),  # the permutation
    aten.lu_unpack.default: (0,),
}

Place = tuple[str, "int | None"]  # a tensor among the arguments: its name, and its index where that is a list
_probes = 0  # how many of the calls in progress are made to see what is defined
_noticed: dict[Any, list[bool]] = {}  # what _defined found, by call and active operand

FAST_PATH = "; switch off PyTorch's fast path for transformers: torch.backends.mha.set_fastpath_enabled(False)"
REMEDY = dict.fromkeys(("aten::_transformer_encoder_layer_fwd", "aten::_native_multi_head_attention"), FAST_PATH)


class NotDerivable(Exception):
    """PyTorch has no forward derivative for this op."""


@dataclass(frozen=True)
class Unknown:
    """The tangent of one output that nothing computes: to use it is an error, for the reason given."""

    reason: str


@dataclass(frozen=True)
class _Call:
    """``op(**arguments)`` as a function of its active tensors."""

    op: OpOverload
    arguments: dict[str, Any]
    tangents: dict[Place, Tensor]

    def __call__(self, active: dict[Place, Tensor]) -> Any:
        values = {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in self.arguments.items()}
        for (name, i), x in active.items():
            if i is None:
                values[name] = x
            else:
                values[name][i] = x
        by_keyword = {a.name for a in self.op._schema.arguments if a.kwarg_only}
        positional = [v for name, v in values.items() if name not in by_keyword]
        return self.op(*positional, **{name: values[name] for name in by_keyword})

    def primal(self, place: Place) -> Tensor:
        name, i = place
        return self.arguments[name] if i is None else self.arguments[name][i]


def derive(op: OpOverload, out: Any, arguments: dict[str, Any], dots: dict[str, Any]) -> Any:
    """Output tangents of ``op(**arguments)`` by forward AD over this one op.

    Returns:
        Per output its tangent, None for a zero, or :class:`Unknown`.

    Raises:
        NotDerivable: the op has no forward derivative in PyTorch.
    """
    if op.namespace != "aten":
        raise NotDerivable(f"{op.namespace} is not ATen, so there is no formula to derive from")
    if torch.Tag.nondeterministic_seeded in op.tags:
        raise NotDerivable("it draws random numbers, and deriving would draw them again")
    call = _Call(op, arguments, _by_place(dots))
    try:
        results, defined = _forward_ad(call, list(call.tangents))
        unnoticed = _unnoticed(call, defined)
    except NotImplementedError as error:
        if "forward AD with" in str(error):
            raise NotDerivable(f"PyTorch has no forward formula for it{REMEDY.get(op._schema.name, '')}") from error
        raise NotDerivable(str(error).splitlines()[0]) from error
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # sizes that depend on data, a singular matrix
            raise
        # The op itself has run with these arguments.
        raise NotDerivable(f"PyTorch's forward formula for it fails: {str(error).splitlines()[0]}") from error
    constant = (*PIECEWISE_CONSTANT.get(op, ()), *_of_inactive(call, len(results)))
    told = [_told(i, *of, constant) for i, of in enumerate(zip(_flat(out), results, defined, unnoticed))]
    return told if isinstance(out, (tuple, list)) else told[0]


def _of_inactive(call: _Call, outputs: int) -> set[int]:
    """Outputs of a foreach op of which nothing is active: each depends on the tensors of its own index."""
    indices = {i for _, i in call.tangents}
    return set() if None in indices or not _is_foreach(call.op) else set(range(outputs)) - indices  # type: ignore[arg-type]


def _is_foreach(op: OpOverload) -> bool:
    return op._schema.name.startswith("aten::_foreach")


def _told(i: int, out: Any, dot: Any, defined: bool, unnoticed: str, constant: tuple[int, ...]) -> Any:
    if not isinstance(out, Tensor) or not (out.is_floating_point() or out.is_complex()) or i in constant:
        return None
    if not defined:
        return Unknown(f"PyTorch's forward AD leaves the tangent of output {i} undefined")
    if unnoticed:
        return Unknown(f"PyTorch's forward AD ignores {unnoticed} in output {i}")
    return dot


@contextmanager
def _probe() -> Iterator[None]:
    global _probes
    _probes += 1
    try:
        yield
    finally:
        _probes -= 1


def probing() -> bool:
    """Whether the ops that run now are only to show what is defined: their results are thrown away."""
    return _probes > 0


def _by_place(dots: dict[str, Any]) -> dict[Place, Tensor]:
    places: dict[Place, Tensor] = {}
    for name, dot in dots.items():
        if isinstance(dot, (list, tuple)):
            places.update({(name, i): d for i, d in enumerate(dot) if d is not None})
        elif dot is not None:
            places[name, None] = dot
    return places


def _forward_ad(call: _Call, places: list[Place]) -> tuple[list[Any], list[bool]]:
    """The tangents per output, zeros where forward AD leaves them undefined, and whether it defines them."""
    defined: list[bool] = []

    def dual(*active: Tensor) -> Any:
        out = call(dict(zip(places, active)))
        defined[:] = [isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in _flat(out)]
        return out

    def tangents(*both: Tensor) -> Any:
        return torch.func.jvp(dual, both[: len(places)], both[len(places) :])[1]

    given = [call.primal(place) for place in places] + [call.tangents[place] for place in places]
    # Formulas write into what they have made, and into views of it; a graph must not.
    in_graph = any(isinstance(x, FakeTensor) for x in given)
    run: Callable[..., Any] = torch.func.functionalize(tangents, remove="mutations") if in_graph else tangents
    with torch.no_grad():
        return _flat(run(*given)), defined


def _unnoticed(call: _Call, defined: list[bool]) -> list[str]:
    """Per output the names of active operands on which, by PyTorch's formula, it does not depend."""
    names: list[str] = [""] * len(defined)
    if len(call.tangents) == 1:
        return names
    each = _is_foreach(call.op)  # the outputs then belong to the inputs of their index
    for name in dict.fromkeys(name for name, _ in call.tangents):
        places = [place for place in call.tangents if place[0] == name]
        alone = _defined(call, places)
        of_outputs = {i for _, i in places} if each else {None}
        for i, (together, by_itself) in enumerate(zip(defined, alone)):
            if together and not by_itself and (None in of_outputs or i in of_outputs):
                names[i] = ", ".join(filter(None, (names[i], name)))
    return names


def _defined(call: _Call, places: list[Place]) -> list[bool]:
    settings = ((n, v) for n, v in call.arguments.items() if not isinstance(v, (Tensor, list, tuple)))
    key = (call.op, tuple(places), *((name, str(value)) for name, value in settings))
    if key not in _noticed:
        with _probe():
            _noticed[key] = _forward_ad(call, places)[1]
    return _noticed[key]


def _flat(out: Any) -> list[Any]:
    return list(out) if isinstance(out, (tuple, list)) else [out]
