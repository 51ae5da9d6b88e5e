"""Let Dynamo trace our functions in place of those of other packages, in graphs with markers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch._dynamo import variables
from torch._dynamo.variables.base import VariableTracker

from jvpgraph.autograd_function import has_markers
from jvpgraph.foreign import table

__all__ = ["trace_ours"]

# How Dynamo calls functions: by the class that it represents them with, the attribute that has the function.
CALLS = {
    "UserFunctionVariable": ("call_function", "fn"),
    "SkipFunctionVariable": ("call_function", "value"),
    "WrapperUserFunctionVariable": ("call_function", "wrapper_obj"),
    "TorchInGraphFunctionVariable": ("call_function", "value"),
    "UserDefinedClassVariable": ("call_function", "value"),
    "AutogradFunctionVariable": ("call_apply", "fn_cls"),
}


def trace_ours() -> None:
    """From now on; a graph without markers is traced as ever."""
    for name, (method, attribute) in CALLS.items():
        kind = getattr(variables, name, None)
        if kind is not None:
            setattr(kind, method, _asking(getattr(kind, method), attribute))


def _asking(traced: Callable[..., Any], attribute: str) -> Callable[..., Any]:
    @functools.wraps(traced)
    def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        theirs = getattr(self, attribute)
        if theirs is table.refuse:
            function, argument, reason = (x.as_python_constant() for x in args)
            raise table.refusal(function, argument, reason, table.line_of(_frames(tx)))
        swap = table.swap_for(theirs)
        if swap is None or not has_markers(tx) or _is_given(kwargs.get(swap.unless)):
            return traced(self, tx, args, kwargs)
        return _inline(swap, theirs, tx, args, kwargs)

    return call


def _is_given(value: Any) -> bool:
    return value is not None and not (value.is_python_constant() and value.as_python_constant() is None)


def _inline(swap: table.Swap, theirs: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = table.by_name(swap, theirs, args, kwargs)
    others = {name: VariableTracker.build(tx, value) for name, value in table.absent(swap, theirs).items()}
    return VariableTracker.build(tx, swap.ours).call_function(tx, list(args), {**kwargs, **others})


def _frames(tx: Any) -> Iterator[tuple[str, int, str]]:
    while tx is not None:
        yield tx.f_code.co_filename, tx.lineno, getattr(tx.f_code, "co_qualname", tx.f_code.co_name)
        tx = getattr(tx, "parent", None)
