"""Checking a transformed model against derivatives that share nothing with this package.

    print(check_jvp(model, (x, t), tangents={"x": x_dot, "t": t_dot}))

The oracle is a float64 copy of the model with the math attention: PyTorch's forward AD of that copy if it exists
and agrees with central differences, otherwise the differences. Casts to narrower types inside the model are float64
in the copy, so their cost counts as rounding, for which the tolerance leaves room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jvpgraph.api import DualModule, transform
from jvpgraph.dynamo_backend import Backend
from jvpgraph.testing.call import call_of, refuse_random
from jvpgraph.testing.oracle import oracle_of
from jvpgraph.testing.report import JvpCheck, JvpMismatch
from jvpgraph.testing.trial import Trial, _op_by_op

__all__ = ["check_jvp", "float64_tangent"]


def check_jvp(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    tangents: Mapping[str, Any] | None = None,
    *,
    backend: str | Backend = "inductor",
    rtol: float | None = None,
    atol: float = 0.0,
    seed: int = 0,
) -> JvpCheck:
    """Check that ``transform(model)`` is right for these inputs; for tests, as the model runs twenty times.

    Compared are

    * the primal with the model's own output: bit for bit with backend "op_by_op", which makes the same calls as the
      model; within :data:`ROUNDINGS` of the narrowest type with "eager" if no attention was replaced, since a graph
      passes its tensors in other layouts, for which a processor may round differently; otherwise within ``rtol``;
    * the tangent with the float64 oracle;
    * the tangent at 0.6 v - 1.7 w with those at v and w, and the tangent at v/2 with half of the one at v, which is
      exact in binary arithmetic;
    * the gradients of a random projection of the output, for every parameter that requires one, with those of
      the model itself, relative to the largest of them.

    Args:
        model: any nn.Module, or a transformed one, whose backend and settings are then checked. It must not draw
            random numbers, so dropout has to be in eval mode.
        args, kwargs: the model's arguments; floating tensors in any type.
        tangents: as for the transformed model: name -> tensor of its input's shape, dtype and device.
        backend: as for ``transform``.
        rtol: relative tolerance of all comparisons, normwise per leaf; default: :data:`RTOL` of the narrowest
            floating type in which an active op of the model computes, after casts and autocast.
        atol: absolute tolerance on the root mean square deviation of a leaf.
        seed: for the second tangent and the projection.

    Returns:
        The report, in which everything is right.

    Raises:
        JvpMismatch: something deviates. The report is its message; if a tangent is wrong, it names the first
            module, in order of execution, whose tangents are right on the way in and wrong on the way out.
        ValueError: tangents do not fit the inputs, or the model is random.
        UnsupportedOp, CaptureError: as raised by the transformed model.
    """
    dual = model if isinstance(model, DualModule) else transform(model, backend=backend)
    if isinstance(model, DualModule):
        model = model.model
    call = call_of(model, args, kwargs, tangents, dual._dual.settings.wide)
    trial = Trial(call, dual, rtol, atol, torch.Generator().manual_seed(seed))
    refuse_random(call)
    trial.run()
    if not trial.report.passed:
        raise JvpMismatch(trial.report)
    return trial.report


def float64_tangent(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    tangents: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """The oracle of :func:`check_jvp` by itself.

    Returns:
        Outputs and tangents, in float64 or complex128, by the dotted path of the output leaf ("" for a bare
        tensor), and where they come from: "forward AD" or "differences".
    """
    call = call_of(model, args, kwargs, tangents)
    found = oracle_of(call, _op_by_op(call)[1])
    return found.value, found.dot, found.source
