"""Right to rounding: the model in float64 says what is right, the eager model in its own dtype how far it rounds.

For every test of the default backend: :func:`check_sizes` calls it at three sizes, which differ in every dim that may
change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import jvpgraph
from jvpgraph.tree import leaves, map_leaves
from tests.zoo.oracle import differentiable, float_leaves, forward_ad, leaf, projected, with_leaves

# Relative to the largest entry, of the gradients of all parameters together.
FLOOR = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SLACK = 4  # times the error of the eager model, or of the compiled one, in the same dtype
KINDS = ("value", "tangent", "parameters", "inputs")  # of what is compared; the last two are gradients


@dataclass
class Answer:
    """Flat outputs and their tangents, and gradients of ``projected(value)`` by name."""

    value: list[Tensor]
    tangent: list[Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in ``dtype``, complex ones at least in complex64."""

    def one(_: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
            return x
        if x.is_complex():
            return x.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
        return x.to(dtype)

    return map_leaves(tree, one)


def answer(
    model: nn.Module,
    call: Callable[[dict[str, Any]], tuple[Any, Sequence[Tensor]]],
    inputs: Mapping[str, Any],
    wrt: Sequence[str],
    grad: bool = True,
) -> Answer:
    """What ``call(inputs)`` returns, flat, and gradients in the parameters and in the inputs at the paths ``wrt``."""
    given = {path: leaf(inputs, path).detach().clone().requires_grad_(grad) for path in wrt}
    with torch.set_grad_enabled(grad):
        out, dots = call(with_leaves(dict(inputs), given))
        value = float_leaves(out)
        loss = projected([y.double() for y in value])
    result = Answer([y.detach() for y in value], list(dots))
    if grad:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, [*named.values(), *given.values()], allow_unused=True)
        found = [g if g is None else g.detach() for g in grads]
        result.parameters = {n: g for n, g in zip(named, found) if g is not None}
        result.inputs = {n: g for n, g in zip(given, found[len(named) :]) if g is not None}
    return result


def eager_answer(
    model: nn.Module, inputs: dict[str, Any], dots: dict[str, Tensor], grad: bool = True, tangent: bool = True
) -> Answer:
    """The same by PyTorch alone: forward AD, and autograd through the model as it is; flex attention looks at its lists
    of blocks, as it does when compiled."""
    out_dots = forward_ad(model, inputs, dots)[1] if tangent else []
    with differentiable():
        return answer(model, lambda given: (model(**given), out_dots), inputs, tuple(dots), grad)


def dual_answer(
    dual: jvpgraph.DualModule, inputs: dict[str, Any], dots: dict[str, Tensor], grad: bool = True
) -> Answer:
    def call(given: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        out, out_dot = dual(**given, tangents=dots)
        return out, [dot for _, dot in leaves(out_dot) if dot is not None]

    return answer(dual.model, call, inputs, tuple(dots), grad)


def errors(got: Answer, wanted: Answer) -> dict[str, float]:
    """The largest deviations: of value and tangent per tensor, of parameters over the largest gradient of all."""
    scale = max((g.abs().max().item() for g in wanted.parameters.values() if g.numel()), default=0.0)
    return {
        "value": _worst(zip(got.value, wanted.value, strict=True)),
        "tangent": _worst(zip(got.tangent, wanted.tangent, strict=True)) if wanted.tangent else 0.0,
        "parameters": _worst(_paired(got.parameters, wanted.parameters), scale),
        "inputs": _worst(_paired(got.inputs, wanted.inputs)),
    }


class RoundedOtherwise(TorchDispatchMode):
    """What an op had to round goes to a neighbouring float, at random, as other compilers and processors would round
    it: how much of an answer is rounding (Parker, "Monte Carlo Arithmetic", 1997)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)  # the model's own random numbers stay what they are

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, kwargs = op(*args, **(kwargs or {})), kwargs or {}
        # Once more would write or draw once more; and what is a view has to stay one.
        once = op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags
        views = any(result.alias_info is not None for result in op._schema.returns)
        if once or views or "dtype" in kwargs or not _is_rounded(out):
            return out
        return tree_map(self._nudged, out, op(*cast(args, torch.float64), **cast(kwargs, torch.float64)))

    def _nudged(self, out: Any, exact: Any) -> Any:
        if not _is_rounded(out):
            return out
        ways = torch.where(torch.rand(out.shape, generator=self.generator) < 0.5, -torch.inf, torch.inf).to(out.dtype)
        return torch.where(out.double() != exact, torch.nextafter(out, ways), out)


def _is_rounded(out: Any) -> bool:
    tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor) and not x.is_meta]
    return any(x.is_floating_point() and x.dtype != torch.float64 for x in tensors)


def allowed(dtype: torch.dtype, *own: Mapping[str, float]) -> dict[str, float]:
    """How far off an answer in ``dtype`` may be, where others of the same dtype are ``own`` far off."""
    return {kind: max(FLOOR[dtype], *(SLACK * error[kind] for error in own)) for kind in KINDS}


def _paired(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What one of them lacks counts as zeros: a region gives its idle parameters zeros, eager code none at all."""
    either = {**wanted, **got}
    return [tuple(d.get(name, torch.zeros_like(x)) for d in (got, wanted)) for name, x in either.items()]


def _worst(pairs: Any, scale: float | None = None) -> float:
    """Largest deviation relative to ``scale``, else to each largest entry; infinite for what is not finite."""
    worst = 0.0
    for got, wanted in pairs:
        if got.shape != wanted.shape or not bool(torch.isfinite(got).all()):
            return float("inf")
        if not got.numel():
            continue
        off = (got.double() - wanted.double()).abs().max().item()
        size = wanted.abs().max().item() if scale is None else scale
        worst = max(worst, off / max(size, 1e-300) if off else 0.0)
    return worst


def check_sizes(
    model: nn.Module,
    draw: Callable[..., dict[str, Any]],
    sizes: Sequence[tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    grad: bool = True,
    active: Sequence[str] | None = None,
    **settings: Any,
) -> jvpgraph.DualModule:
    """Value, tangent and gradients of ``transform(model, **settings)`` at every size, against the model in float64.

    Args:
        draw: keyword arguments of the model for one size.
        sizes: at least three; the second changes every entry of the first, the third is neither. One graph has to do
            for all with dynamic=True, and one more without.
        active: names of the inputs with a tangent; default: all floating tensors.
    """
    assert len(sizes) >= 3, "call a second size, and a third"
    assert all(a != b for a, b in zip(sizes[0], sizes[1], strict=True)), "the second size changes every dim"
    assert len(set(sizes)) == len(sizes), "sizes differ"
    model = copy.deepcopy(model).to(dtype)
    exact = copy.deepcopy(model).double()
    dual = jvpgraph.transform(model, **settings)
    for size in sizes:
        inputs = cast(draw(*size), dtype)
        wrt = active or [n for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
        dots = {name: torch.randn_like(inputs[name]) for name in wrt}
        wanted = eager_answer(exact, cast(inputs, torch.float64), cast(dots, torch.float64), grad)
        own = errors(eager_answer(model, inputs, dots, grad), wanted)
        found, limit = errors(dual_answer(dual, inputs, dots, grad), wanted), allowed(dtype, own)
        off = {kind: f"{found[kind]:.1e} > {limit[kind]:.1e}" for kind in found if not found[kind] <= limit[kind]}
        assert not off, f"at size {size}: {off}"
    if dual.regions is None and settings.get("backend") != "op_by_op":
        wanted = 1 if settings.get("dynamic") else 2
        assert len(dual.reports) == wanted, f"{len(dual.reports)} graphs, where {wanted} should do for all sizes"
    return dual
