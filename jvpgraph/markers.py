"""The marker ops: where forward mode starts, where its result is asked for, and where it has to arrive.

``make_dual(x, x_dot)`` is ``x`` with a tangent; ``tangent_of(y)`` is the tangent that ``y`` has by then. ``arrived(y,
others, given, what)`` is ``y``; it refuses a tangent of one of ``given`` if nothing of it is left in ``y`` and
``others``. ``one_of(x_dots)`` stands for any of the T tangents in a tensor [T, *shape of x], and ``all_of(y_dot, T)``
is where those of y come together again. All are opaque to Dynamo and AOTAutograd, and are erased by
:mod:`jvpgraph.passes.linearize`, the last two by :mod:`jvpgraph.passes.batch_tangents`. The first two may be used
directly inside a function compiled with ``torch.compile(fn, backend=jvpgraph.backend())``;
anywhere else they refuse to run, so that a marker that was never linearized cannot pass for a zero tangent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jvpgraph.errors import MarkerExecuted
from jvpgraph.precision import widened
from jvpgraph.rules.apply import has_tangent

__all__ = ["ALL_OF", "ARRIVED", "MAKE_DUAL", "ONE_OF", "TANGENT_OF", "make_dual", "tangent_of"]

_library = torch.library.Library("jvpgraph", "FRAGMENT")
_library.define("make_dual(Tensor x, Tensor x_dot) -> Tensor")
_library.define("tangent_of(Tensor y, bool differentiable=False, ScalarType? dtype=None) -> Tensor")
_library.define("arrived(Tensor y, Tensor[] others, Tensor[] given, str what) -> Tensor")
_library.define("one_of(Tensor x_dots) -> Tensor")
_library.define("all_of(Tensor y_dot, SymInt count) -> Tensor")

MAKE_DUAL = torch.ops.jvpgraph.make_dual.default
TANGENT_OF = torch.ops.jvpgraph.tangent_of.default
ARRIVED = torch.ops.jvpgraph.arrived.default
ONE_OF = torch.ops.jvpgraph.one_of.default
ALL_OF = torch.ops.jvpgraph.all_of.default


def make_dual(x: Tensor, x_dot: Tensor, differentiable: bool = False) -> Tensor:
    """``x``, carrying the tangent ``x_dot`` from here on.

    Args:
        x: any floating or complex tensor.
        x_dot: its tangent, of the same shape, dtype and device; in float32 where ``x`` has half precision, if you like.
        differentiable: let gradients of tangents flow into ``x_dot``. By default it is detached.

    Raises:
        ValueError: shape, dtype or device do not fit, or ``x`` is neither floating nor complex.
    """
    if not has_tangent(x):
        raise ValueError(f"only floating and complex tensors have tangents, this one is {x.dtype}")
    for what in ("shape", "dtype", "device"):
        wide = what == "dtype" and x_dot.dtype == widened(x.dtype)
        if getattr(x, what) != getattr(x_dot, what) and not wide:
            given, wanted = getattr(x_dot, what), getattr(x, what)
            raise ValueError(f"the tangent has {what} {given}, its primal has {what} {wanted}")
    return MAKE_DUAL(x, x_dot if differentiable else x_dot.detach())


def tangent_of(y: Tensor, differentiable: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """The tangent of ``y``: zeros where ``y`` does not depend on a marked tensor.

    Args:
        dtype: of the result; that of ``y`` if not given.
        differentiable: the tangent has gradients in everything that it depends on; autograd then differentiates all
            tangents of the graph together with the primal. By default the tangent is detached.
    """
    if dtype is None:
        return TANGENT_OF(y, True) if differentiable else TANGENT_OF(y).detach()
    return TANGENT_OF(y, True, dtype) if differentiable else TANGENT_OF(y, False, dtype).detach()


def _same_layout(x: Tensor, *_: object) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _tangent_of(y: Tensor, differentiable: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_strided(y.shape, y.stride(), dtype=dtype or y.dtype, device=y.device)


def _one(x_dots: Tensor) -> Tensor:
    return torch.empty_strided(x_dots.shape[1:], x_dots.stride()[1:], dtype=x_dots.dtype, device=x_dots.device)


def _all(y_dot: Tensor, count: int) -> Tensor:
    return y_dot.new_empty((count, *y_dot.shape))


def _refuse(*_: object) -> Tensor:
    raise MarkerExecuted(
        "a jvpgraph marker was executed: make_dual and tangent_of work inside jvpgraph.transform, jvpgraph.jvp, or "
        "a function compiled with torch.compile(..., backend=jvpgraph.backend())"
    )


def _no_backward(_ctx: object, _grad: Tensor) -> tuple[None, None]:
    return None, None


def _tangent_of_backward(_ctx: object, _grad: Tensor) -> tuple[None, None, None]:
    return None, None, None


def _make_dual_backward(_ctx: object, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


def _arrived_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, [None] * ctx.others, [None] * ctx.given, None


def _arrived_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.others, ctx.given = len(inputs[1]), len(inputs[2])


torch.library.register_fake("jvpgraph::make_dual", _same_layout, lib=_library)
torch.library.register_fake("jvpgraph::tangent_of", _tangent_of, lib=_library)
torch.library.register_autograd("jvpgraph::make_dual", _make_dual_backward, lib=_library)
torch.library.register_autograd("jvpgraph::tangent_of", _tangent_of_backward, lib=_library)
torch.library.register_fake("jvpgraph::arrived", _same_layout, lib=_library)
torch.library.register_autograd("jvpgraph::arrived", _arrived_backward, setup_context=_arrived_setup, lib=_library)
torch.library.register_fake("jvpgraph::one_of", _one, lib=_library)
torch.library.register_fake("jvpgraph::all_of", _all, lib=_library)
torch.library.register_autograd("jvpgraph::one_of", lambda _ctx, _grad: None, lib=_library)
torch.library.register_autograd("jvpgraph::all_of", _no_backward, lib=_library)
for _name in ("make_dual", "tangent_of", "arrived", "one_of", "all_of"):
    _library.impl(_name, _refuse, "CompositeExplicitAutograd")
