"""The tangent of an autograd.Function that has its own ``jvp``, in graphs and op by op.

By default Dynamo inlines the forward of such a Function, or refuses it where it needs a backward, so that the tangent
would be that of the ops in its forward: zero for a straight-through estimator. In a graph with markers a call of it
stays one node instead. Where that is active, :func:`call_own_jvp` turns it into a call that asks for the tangents of
the arguments and marks the outputs with what ``jvp`` makes of them.

A Function without a ``jvp`` has the tangent of its forward. If that is lost although an argument is active, the
backward (say, of a straight-through estimator) would contradict it, so it is refused (``ARRIVED`` in graphs).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.utils import proxy_args_kwargs
from torch._dynamo.variables import TensorVariable, builder, lists, misc
from torch.autograd.function import _is_setup_context_defined

from jvpgraph.errors import UnsupportedNode, UnsupportedOp
from jvpgraph.foreign.calls import calls_swapped
from jvpgraph.foreign.table import Swap, absent, by_name, swap_for
from jvpgraph.markers import ARRIVED, MAKE_DUAL, make_dual, tangent_of
from jvpgraph.rules.apply import has_tangent

__all__ = [
    "NOTHING_ARRIVES",
    "OWN_JVP",
    "call_own_jvp",
    "functions_watched",
    "has_markers",
    "has_own_jvp",
    "keep_calls_of_own_jvps",
]

Function = torch.autograd.Function
NOTHING_ARRIVES = (
    "the forward of this autograd.Function has no tangent, whatever its backward says: give it a jvp of its own"
)
OF_TORCH = ("torch.", "jvpgraph.")  # modules whose Functions are known
OWN_JVP = "jvpgraph_own_jvp_of"  # on what stands for a Function's apply in a graph: the Function


def has_own_jvp(function: Any) -> bool:
    return function.jvp is not Function.jvp


# ------------------------------------------------------------------------------------------------- in graphs


def keep_calls_of_own_jvps() -> None:
    """Let Dynamo keep ``function.apply(...)`` as one node, where function has its own jvp and the graph has markers."""
    variable = misc.AutogradFunctionVariable
    traced = variable.call_apply

    @functools.wraps(traced)
    def call_apply(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if not has_markers(tx):
            return traced(self, tx, args, kwargs)
        if not has_own_jvp(self.fn_cls):
            return _asked(tx, self.fn_cls, traced(self, tx, args, kwargs), [*args, *kwargs.values()])
        operands = proxy_args_kwargs(args, kwargs)
        proxy = tx.output.create_proxy("call_function", _call(self.fn_cls), *operands)
        return builder.wrap_fx_proxy(tx=tx, proxy=proxy)

    variable.call_apply = call_apply  # type: ignore[method-assign]


def _asked(tx: Any, function: Any, out: Any, arguments: list[Any]) -> Any:
    """``out``, of which Dynamo's first floating tensor is asked whether the tangents of the arguments arrive."""
    several = isinstance(out, lists.TupleVariable)
    outs = list(out.items) if several else [out]
    given, floating = ([x for x in xs if _is_floating(x)] for xs in (arguments, outs))
    returned = any(x is y for x in floating for y in given)  # as they came, or written in place
    if function.__module__.startswith(OF_TORCH) or not given or not floating or returned:
        return out
    first, *others = floating
    operands = (first.as_proxy(), [x.as_proxy() for x in others], [x.as_proxy() for x in given], function.__name__)
    proxy = tx.output.create_proxy("call_function", ARRIVED, operands, {})
    asked = builder.wrap_fx_proxy(tx=tx, proxy=proxy)
    return lists.TupleVariable([asked if x is first else x for x in outs]) if several else asked


def _is_floating(x: Any) -> bool:
    return isinstance(x, TensorVariable) and x.dtype is not None and (x.dtype.is_floating_point or x.dtype.is_complex)


def has_markers(tx: Any) -> bool:
    """Whether the graph that Dynamo is making has markers by now."""
    return any(tracer.graph.find_nodes(op="call_function", target=MAKE_DUAL) for tracer in tx.output.tracers)


@functools.cache
def _call(function: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function.apply(*args, **kwargs)

    return _named(call, function)


def call_own_jvp(node: fx.Node) -> None:
    """Let an active call that was kept bring its tangent."""
    node.target = _dual_call(getattr(node.target, OWN_JVP))


@functools.cache
def _dual_call(function: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        args = _bound(function, args, kwargs)
        dots = [tangent_of(x) if has_tangent(x) else None for x in args]
        several, *outs = _with_tangents(function).apply(*args, *dots)
        half = len(outs) // 2
        marked = tuple(map(_marked, outs[:half], outs[half:]))
        return marked if several else marked[0]

    return _named(call, function)


def _marked(out: Any, out_dot: Tensor | None) -> Any:
    if not has_tangent(out):
        return out
    return make_dual(out, torch.zeros_like(out) if out_dot is None else out_dot)


def _named(call: Callable[..., Any], function: Any) -> Callable[..., Any]:
    call.__name__ = call.__qualname__ = f"{function.__name__}_{id(call)}"  # in the code of the graph
    setattr(call, OWN_JVP, function)
    return call


@functools.cache
def _with_tangents(function: Any) -> Any:
    """The Function of ``(*args, *tangents)`` whose outputs are whether there are several, they, and their tangents."""

    class WithTangents(Function):
        @staticmethod
        def forward(ctx: Any, *args_and_dots: Any) -> Any:
            half = len(args_and_dots) // 2
            args, dots = args_and_dots[:half], args_and_dots[half:]
            if _is_setup_context_defined(function.setup_context):
                out = function.forward(*args)
                function.setup_context(ctx, args, out)
            else:
                out = function.forward(ctx, *args)
            outs = out if isinstance(out, tuple) else (out,)
            return isinstance(out, tuple), *outs, *_own_tangents(function, ctx, outs, dots)

        @staticmethod
        def backward(ctx: Any, _: Any, *grads: Any) -> Any:
            backward = function.backward if function.vjp is Function.vjp else function.vjp
            found = backward(ctx, *grads[: len(grads) // 2])
            found = found if isinstance(found, tuple) else (found,)
            return *found, *[None] * (2 * len(ctx.needs_input_grad) - len(found))

    # To the Function's own code, its arguments are all there are.
    whole: Any = torch._C._FunctionBase.needs_input_grad
    context: Any = WithTangents._backward_cls  # type: ignore[attr-defined]
    context.needs_input_grad = property(lambda ctx: (given := whole.__get__(ctx))[: len(given) // 2])
    return WithTangents


def _own_tangents(function: Any, ctx: Any, outs: tuple[Any, ...], dots: Any) -> tuple[Any, ...]:
    found = function.jvp(ctx, *dots)
    found = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    if len(found) != len(outs):
        raise ValueError(f"{function.__name__}.jvp returned {len(found)} tangents for {len(outs)} outputs")
    return found


def _bound(function: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The arguments in order, as Function.apply binds them."""
    context = () if _is_setup_context_defined(function.setup_context) else (None,)
    if context and not kwargs:
        return args
    bound = inspect.signature(function.forward).bind(*context, *args, **kwargs)
    if not context:
        bound.apply_defaults()
    return bound.args[len(context) :]


# ------------------------------------------------------------------------------------------------- op by op


@contextmanager
def functions_watched(mode: Any, where: Callable[[], str]) -> Iterator[None]:
    """Within this context a Function with its own jvp gives its outputs their tangents in ``mode``, an OpByOp; and
    functions of other packages are ours, as far as something with a tangent reaches them.

    C++ looks ``forward`` up by name, whoever holds ``apply``: that is what is replaced. One without a jvp runs op by op
    as any code does, and is refused where nothing of an active argument arrives in what it returns.
    """
    with ExitStack() as replaced:
        replaced.enter_context(calls_swapped(mode))
        for function in _functions(Function):
            if _is_setup_context_defined(function.setup_context):
                calls: list[Any] = []
                original = function.forward
                _replace(function, "forward", _forward_of_two(function, mode, where, calls), replaced)
                if has_own_jvp(function):
                    _replace(function, "setup_context", _setup_context(function, mode, calls, original), replaced)
            else:
                _replace(function, "forward", _forward(function, mode, where), replaced)
        yield


def _functions(base: Any) -> Iterator[Any]:
    """All Functions but torch's own and ours."""
    for function in base.__subclasses__():
        if not function.__module__.startswith(OF_TORCH) and function.forward is not Function.forward:
            yield function
        yield from _functions(function)


def _replace(function: Any, name: str, new: Callable[..., Any], replaced: ExitStack) -> None:
    old = vars(function).get(name)
    setattr(function, name, staticmethod(new))
    if old is None:
        replaced.callback(delattr, function, name)
    else:
        replaced.callback(setattr, function, name, old)


def _forward(function: Any, mode: Any, where: Callable[[], str]) -> Callable[..., Any]:
    forward = function.forward

    @functools.wraps(forward)
    def watched(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_active(mode, args):
            return forward(ctx, *args, **kwargs)
        if (swap := swap_for(function)) is not None:
            return _with_our_tangents(swap, function, lambda: forward(ctx, *args, **kwargs), mode, args)
        if not has_own_jvp(function):
            return _arrived(function, forward(ctx, *args, **kwargs), mode, where)
        dots = _tangents(mode, args)

        def again(args: Any, dots: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            ctx = Context()
            out = forward(ctx, *args, **kwargs)
            outs = out if isinstance(out, tuple) else (out,)
            return outs, _own_tangents(function, ctx, outs, dots)

        with mode.asleep():
            out = _apart(lambda: forward(ctx, *args, **kwargs), args)
            outs = out if isinstance(out, tuple) else (out,)
            out_dots = _own_tangents(function, ctx, outs, dots)
        _give(mode, outs, out_dots, args, again)
        return out

    return watched


class Context:
    """In the place of a Function's context, for a call that nothing is differentiated through."""

    def __init__(self) -> None:
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = self.saved_tensors or tensors

    def save_for_forward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_dirty(self, *tensors: Any) -> None: ...

    def mark_non_differentiable(self, *tensors: Any) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def _with_our_tangents(swap: Swap, function: Any, forward: Callable[[], Any], mode: Any, args: Any) -> Any:
    """The outputs of another package's Function, with the tangents of what ours makes of copies of its arguments; if
    ours makes no tensors but an object that holds one, such as a mask, what theirs makes holds it as well."""
    copies = [x.clone() if has_tangent(x) else x for x in args]
    positional, named = by_name(swap, function, copies, {})
    ours = swap.ours(*positional, **named, **absent(swap, function))
    dotted = ours if isinstance(ours, tuple) else (ours,)
    if not any(isinstance(x, Tensor) for x in dotted):
        return forward()
    with mode.asleep():
        out = forward()
    outs = out if isinstance(out, tuple) else (out,)
    dots = [mode.tangent(x) if has_tangent(x) else None for x in dotted]
    with mode.asleep():
        dots = [None if dot is None else dot.clone() for dot in dots]
    _give(mode, outs, tuple(dots))
    return out


def _forward_of_two(function: Any, mode: Any, where: Callable[[], str], calls: list[Any]) -> Callable[..., Any]:
    """Of a Function whose setup_context is apart, so that the jvp has to wait for that."""
    forward = function.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        is_active, has_own = _is_active(mode, args), has_own_jvp(function)
        if has_own:
            calls.append(_tangents(mode, args) if is_active else None)
        if not is_active:
            return forward(*args, **kwargs)
        if not has_own:
            return _arrived(function, forward(*args, **kwargs), mode, where)
        with mode.asleep():
            return _apart(lambda: forward(*args, **kwargs), args)

    return watched


def _setup_context(function: Any, mode: Any, calls: list[Any], original: Callable[..., Any]) -> Callable[..., Any]:
    setup_context = function.setup_context

    @functools.wraps(setup_context)
    def watched(ctx: Any, inputs: Any, output: Any) -> Any:
        dots = calls.pop()
        if dots is None:
            return setup_context(ctx, inputs, output)
        outs = output if isinstance(output, tuple) else (output,)

        def again(args: Any, dots: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            context, out = Context(), original(*args)
            setup_context(context, args, out)
            outs = out if isinstance(out, tuple) else (out,)
            return outs, _own_tangents(function, context, outs, dots)

        with mode.asleep():
            setup_context(ctx, inputs, output)
            out_dots = _own_tangents(function, ctx, outs, dots)
        _give(mode, outs, out_dots, inputs, again)
        return None

    return watched


def _is_active(mode: Any, args: tuple[Any, ...]) -> bool:
    return mode.is_watching() and any(mode.tangent(x) is not None for x in args if has_tangent(x))


def _tangents(mode: Any, args: tuple[Any, ...]) -> list[Any]:
    """What a jvp is given: zeros for what is not active."""
    dots = [mode.tangent(x) if has_tangent(x) else None for x in args]
    with mode.asleep():
        return [
            None if not has_tangent(x) else torch.zeros_like(x) if dot is None else dot.clone()
            for x, dot in zip(args, dots)
        ]


def _apart(forward: Callable[[], Any], args: tuple[Any, ...]) -> Any:
    """The outputs. What shares memory with an argument that was not written to is copied: it has a tangent apart."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    versions = [0 if x.is_inference() else x._version for x in tensors]
    out = forward()
    unwritten = {
        x.untyped_storage()._cdata
        for x, version in zip(tensors, versions)
        if (0 if x.is_inference() else x._version) == version
    }

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in unwritten else leaf

    return tuple(map(copied, out)) if isinstance(out, tuple) else copied(out)


def _give(mode: Any, outs: tuple[Any, ...], out_dots: tuple[Any, ...], args: Any = (), again: Any = None) -> None:
    """Args: again: the outputs and their tangents for other ``args`` and tangents of those."""

    def dense(out: Any, dot: Tensor | None) -> Tensor | None:
        return None if not has_tangent(out) else torch.zeros_like(out) if dot is None else dot

    with mode.asleep():
        given = [(out, dense(out, dot)) for out, dot in zip(outs, out_dots) if isinstance(out, Tensor)]
        mode.adopt_all(given, args, again)


def _arrived(function: Any, out: Any, mode: Any, where: Callable[[], str]) -> Any:
    outs = [x for x in (out if isinstance(out, tuple) else (out,)) if has_tangent(x)]
    if outs and all(mode.tangent(x) is None for x in outs):
        raise UnsupportedOp([UnsupportedNode(function.__name__, "op by op", (), where(), NOTHING_ARRIVES)])
    return out
