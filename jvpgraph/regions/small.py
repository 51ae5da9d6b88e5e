"""Higher-order ops between graphs that are graphs of their own: flex_attention, which has a tangent in graphs only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jvpgraph.dual_forward import dual_forward
from jvpgraph.dynamo import backward_at_once, hit_recompile_limit, in_one_piece, own_errors
from jvpgraph.dynamo_backend import Backend
from jvpgraph.errors import CaptureError, UnsupportedNode, UnsupportedOp
from jvpgraph.functions import Kept, identity
from jvpgraph.op_by_op import OpByOp, module_path, user_line
from jvpgraph.precision import Policy
from jvpgraph.tree import leaves, map_leaves
from jvpgraph.unguarded import held_by

__all__ = ["SmallGraphs"]

GRAPHS = ("flex_attention",)
ARGUMENTS = 7  # that are passed; what its functions hold, which comes behind, Dynamo finds by itself
KEPT = 16  # by the functions that say which pairs are seen
UNUSED = "the logsumexp and the maximum of flex_attention have no tangent: use its output only"
HELD = "its score_mod or mask_mod reads a tensor with a tangent: use one graph, or a region that contains it"


class SmallGraphs:
    """``(mode, op, args, kwargs)`` runs a higher-order op of these, as a graph where it is active; others are
    NotImplemented.

    Raises:
        UnsupportedOp: a function among the arguments holds something with a tangent, or there is no such graph.
    """

    def __init__(self, backend: Backend, dynamic: bool | None = None):
        self._backend, self._dynamic = backend, dynamic
        self._functions: Kept[Callable[..., Any]] = Kept(KEPT)

    def __call__(self, mode: OpByOp, op: Any, args: Any, kwargs: Any) -> Any:
        if str(op) not in GRAPHS or not mode.is_watching():
            return NotImplemented
        passed: dict[str, Any] = {"args": args[:ARGUMENTS], "kwargs": kwargs}
        inputs = {path: x for path, x in leaves(passed) if isinstance(x, Tensor)}
        dots = {path: dot for path, x in inputs.items() if (dot := mode.tangent(x)) is not None}
        functions = [x for _, x in leaves(passed) if callable(x) and not isinstance(x, Tensor)]
        held = [x for function in functions for x in held_by(function) if isinstance(x, Tensor)]
        if any(mode.tangent(x) is not None for x in held):
            raise UnsupportedOp([UnsupportedNode(str(op), "op by op", (), user_line(), HELD)])
        if not dots:
            with mode.asleep():
                outs = op(*args, **kwargs)
            for out in outs:
                mode.adopt(out, None)
            return outs
        policy = self._backend.config.tangent_precision
        path = module_path() if isinstance(policy, Policy) else ""
        key = policy.choices(path) if isinstance(policy, Policy) else None, *map(identity, functions)
        try:
            with mode.left(), own_errors(self._backend.compiler), in_one_piece(), backward_at_once():
                given = map_leaves(passed, lambda _, x: x.view_as(x), only=dots)
                out, (out_dot,) = self._function(key, op, path)(given["args"], given["kwargs"], dots)
                unused = out.new_empty(out.shape[:-1])
        except CaptureError as error:
            if hit_recompile_limit(error):
                raise
            raise UnsupportedOp([UnsupportedNode(str(op), "op by op", (), user_line(), str(error))]) from error
        with mode.left():
            mode.adopt(out, out_dot)
            mode.adopt(unused, None)
            mode.set_unknown(unused, UnsupportedNode(str(op), "op by op", (), user_line(), UNUSED))
        return out, unused, unused

    def _function(self, key: Any, op: Any, path: str) -> Callable[..., Any]:
        return self._functions.get(key, lambda: self._compiled(op, path))

    def _compiled(self, op: Any, path: str) -> Callable[..., Any]:
        def output(*args: Any, **kwargs: Any) -> Tensor:
            found: Tensor = op(*args, **kwargs)[0]
            return found

        function = dual_forward(output, precision=self._backend.config.tangent_precision)
        return torch.compile(function, backend=self._backend.inside(path), fullgraph=True, dynamic=self._dynamic)
