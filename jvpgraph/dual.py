"""A callable and its tangent, by one of the strategies."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jvpgraph.diffusers_parallel import make_traceable
from jvpgraph.dual_forward import dual_forward
from jvpgraph.dynamo import stands_aside
from jvpgraph.errors import CaptureError, MarkerExecuted
from jvpgraph.finite import check_finite
from jvpgraph.op_by_op import refuse_other_levels
from jvpgraph.rules.apply import has_tangent
from jvpgraph.settings import Settings
from jvpgraph.strategies import OpByOp, choose
from jvpgraph.tree import map_leaves, refuse_hidden
from jvpgraph.unguarded import held_by, modules_of
from jvpgraph.vmapped import call_with_all, is_vmapped

__all__ = ["Dual"]

log = logging.getLogger("jvpgraph")


class Dual:
    """Computes ``(out, out_dot)`` of a callable.

    Attributes:
        reports: of the graphs that were made so far, and of the last call that ran op by op.
        regions: what was chosen of them, if they were asked for.
        forward: what is captured.
    """

    def __init__(self, call: Callable[..., Any], settings: Settings):
        self.settings = settings
        self.forward = dual_forward(
            call,
            settings.has_aux,
            settings.differentiable_tangent,
            bool(settings.tangents_batched),
            settings.config.tangent_precision,
        )
        self.strategy, self.reports, self.regions = choose(call, settings)
        self._call = call
        self._said_aside = False
        self._several: Dual | None = None

    # A graph of its own, also inside a function that is being compiled: its markers must not meet those of another.
    @torch.compiler.disable(reason="a call with tangents= is compiled on its own")
    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], dots: dict[str, Tensor]) -> tuple[Any, Any]:
        if is_vmapped(dots, lambda: (args, kwargs, self._held(args), self._own())):
            return call_with_all(self._of_several(), args, kwargs, dots)
        dots = self.prepare(args, kwargs, dots)
        out, flat_dots = self._run((args, kwargs, dots))
        if self.settings.config.check_finite:
            alone = _alone() and not self.settings.tangents_batched
            check_finite(
                self.forward if alone else None, (args, kwargs, dots), flat_dots, self.settings.config.tangent_precision
            )
        remaining = iter(flat_dots)
        differentiated = out[0] if self.settings.has_aux else out
        refuse_hidden(differentiated)
        return out, map_leaves(differentiated, lambda _, leaf: next(remaining) if has_tangent(leaf) else None)

    def _of_several(self) -> Dual:
        """The same for batches of tangents."""
        if self._several is None:
            self._several = Dual(self._call, replace(self.settings, tangents_batched=True))
        return self._several

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], dots: dict[str, Tensor]) -> dict[str, Tensor]:
        """Refuse what cannot be run, and make traceable what can be; the tangents that go in."""
        refuse_other_levels((args, kwargs, dots, self._held(args)), self._call)
        for module in [self._call] if isinstance(self._call, nn.Module) else modules_of(args[0].fn):
            make_traceable(module)
        if self.settings.differentiable_tangent:
            return dots
        return {path: dot.detach() for path, dot in dots.items()}

    def _held(self, args: tuple[Any, ...]) -> list[Tensor]:
        """The tensors that a function brings along, and the parameters of its modules."""
        if isinstance(self._call, nn.Module):
            return []
        held = held_by(args[0].fn)
        parameters = [p for module in held if isinstance(module, nn.Module) for p in module.parameters()]
        return parameters + [x for x in held if isinstance(x, Tensor)]

    def _own(self) -> list[Tensor]:
        """The parameters and buffers of a module."""
        return [*self._call.parameters(), *self._call.buffers()] if isinstance(self._call, nn.Module) else []

    def _run(self, inputs: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
        if not self.settings.compiles:
            return self.strategy(self.forward, inputs)
        if aside := stands_aside():
            return self._without_compiler(aside, inputs)
        try:
            return self.strategy(self.forward, inputs)
        except MarkerExecuted:  # by a stance of torch.compile's
            return self._without_compiler("which may run eagerly for now,", inputs)

    def _without_compiler(self, aside: str, inputs: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
        """Op by op, where torch.compile would run eagerly."""
        if self.settings.needs_one_graph:
            needs = self.settings.needs_one_graph
            raise CaptureError(f"torch.compile, {aside} makes no graph, and {needs} needs one: call it elsewhere")
        if not self._said_aside:
            log.warning("jvpgraph: torch.compile, %s compiles nothing: this call runs op by op", aside)
        self._said_aside = True
        return OpByOp(self.settings.config)(self.forward, inputs)


def _alone() -> bool:
    """Whether no other rank could have to take part in a further call, which only this one knows to be needed."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
