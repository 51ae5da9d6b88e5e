"""The function that is compiled for every dual call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor

from jvpgraph.markers import ALL_OF, ONE_OF, make_dual, tangent_of
from jvpgraph.precision import Policy, Precision, carried, widened
from jvpgraph.rules.apply import has_tangent
from jvpgraph.tree import Exchanged, exchange, leading_to, leaves, put_back

__all__ = ["another", "dual_forward", "is_dual_forward"]

NAME = "dual_forward_"  # of their code, with a number


def dual_forward(
    call: Callable[..., Any],
    has_aux: bool = False,
    differentiable: bool = False,
    batched: bool = False,
    precision: Precision | Policy = "model",
) -> Callable[..., tuple[Any, list[Tensor]]]:
    """Mark the inputs, call ``call``, ask for the tangent of each output leaf.

    The result takes ``(args, kwargs, dots)``, where ``dots`` has tangents by the path of their input, such as
    ``args.0`` or ``kwargs.cond.text``, and returns ``(out, [tangent of each floating leaf of out])``. ``batched``: as
    many tangents as the first dim of each is long, on either side.
    """

    def forward(args: Any, kwargs: Any, dots: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
        def mark(path: str, leaf: Any) -> Any:
            if path not in dots:
                return leaf
            return make_dual(leaf, ONE_OF(dots[path]) if batched else dots[path], differentiable)

        marked = leading_to(dots)
        exchanged: Exchanged = []
        try:
            args = exchange(args, mark, "args", marked, exchanged)
            kwargs = exchange(kwargs, mark, "kwargs", marked, exchanged)
            out = call(*args, **kwargs)
            differentiated = out[0] if has_aux else out
            active = [leaf for _path, leaf in leaves(differentiated) if has_tangent(leaf)]
            dtypes = [None if carried(precision) == "model" else widened(leaf.dtype) for leaf in active]
            answers = [tangent_of(leaf, differentiable, dtype) for leaf, dtype in zip(active, dtypes)]
        finally:
            put_back(exchanged)
        if batched:
            count = next(iter(dots.values())).shape[0]
            answers = [ALL_OF(answer, count) for answer in answers]
        return out, answers

    return another(forward)


def another(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own, per which Dynamo counts recompilations."""
    assert isinstance(forward, FunctionType)
    code = forward.__code__.replace(co_name=f"{NAME}{next(_serial)}")
    return FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)


def is_dual_forward(code: CodeType) -> bool:
    """Whether it is the code of one of these."""
    return code.co_filename == __file__ and code.co_name.startswith(NAME)


_serial = itertools.count()
