"""The front door: transform a model, or a function, into one that also computes its tangent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jvpgraph.backend import COMPILERS, Backend
from jvpgraph.capture import backward_at_once, in_one_piece, own_errors, stands_aside
from jvpgraph.config import Config
from jvpgraph.dual_forward import dual_forward
from jvpgraph.errors import CaptureError, MarkerExecuted
from jvpgraph.explain import Explanation, explain
from jvpgraph.finite import check_finite
from jvpgraph.functions import Function, Kept, call_function, identity, note_graphs
from jvpgraph.op_by_op import OpByOp, refuse_other_levels
from jvpgraph.regions import Choice, Regions, hit_recompile_limit
from jvpgraph.rules.apply import has_tangent
from jvpgraph.sharding import explaining_heads
from jvpgraph.structure import map_leaves, refuse_hidden
from jvpgraph.tangents import Inputs, match_tangents
from jvpgraph.traceable import make_traceable
from jvpgraph.unguarded import held_by, modules_of, unguarded

__all__ = ["BACKENDS", "DualModule", "jvp", "transform"]

BACKENDS = (*COMPILERS, "op_by_op")
log = logging.getLogger("jvpgraph")
KEPT_VARIANTS = 4  # of a model whose classes or global hooks changed: profilers take their hooks away again


def transform(
    model: nn.Module,
    *,
    regions: Choice | None = None,
    backend: str | Backend = "inductor",
    dynamic: bool | None = None,
    differentiable_tangent: bool = False,
    config: Config | None = None,
) -> DualModule:
    """A view of ``model`` that also computes tangents, in one compiled graph.

    ``dual(*args, **kwargs)`` is the model. ``dual(*args, tangents={name: x_dot}, **kwargs)`` returns
    ``(y, y_dot)`` with ``y_dot = sum over names of (d model / d input) * x_dot``; both have the structure of the
    model's output. ``y`` keeps its autograd history, ``y_dot`` is detached unless ``differentiable_tangent``.

    Args:
        model: any nn.Module. Its parameters, buffers, submodules and hooks are shared, not copied.
        regions: None captures the model as one graph. Otherwise parts of it become graphs of their own, one for all
            equal ones, and the code around them runs op by op: a class of modules or a tuple of classes, a function
            of a module that says yes to a region, or "auto", which captures one graph where it can and else finds
            the repeated blocks. What FSDP2 shards and what branches on data needs regions. ``dual.regions`` says
            what was chosen and what became of it.
        backend: "inductor" compiles; "eager" makes the same graph and runs it without Inductor; "op_by_op" runs
            any Python code, one op at a time. Or an object made by :func:`jvpgraph.backend`, with its own settings.
        dynamic: as in torch.compile: True for symbolic sizes from the start, None to find out by recompiling once.
        differentiable_tangent: ``y_dot`` has gradients too, in parameters, inputs and tangents, as objectives need
            that train through it (terminal velocity matching, Hessian-vector products). Costs the memory and the
            time of a second-order backward; not with backend="op_by_op".
        config: settings, see :class:`jvpgraph.Config`.

    Raises:
        ValueError: an argument is not one of those named here.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"transform takes an nn.Module, not {type(model).__name__}; for functions use jvpgraph.jvp")
    if isinstance(model, DualModule):
        raise ValueError("this model is transformed already")
    return DualModule(
        model, _Dual(model, backend, dynamic, config or Config(), differentiable_tangent, regions=regions)
    )


def jvp(
    fn: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    has_aux: bool = False,
    backend: str | Backend = "inductor",
    dynamic: bool | None = None,
    differentiable_tangent: bool = False,
    config: Config | None = None,
) -> tuple[Any, ...]:
    """``torch.func.jvp`` as one compiled graph: ``(fn(*primals), J @ tangents)``, plus aux if ``has_aux``.

    Args:
        fn: a function of tensors, or of nested tuples, lists and dicts of them. Functions of the same code, such as
            the lambdas of a line, share a graph: the tensors that a closure holds are its inputs and get gradients.
            Python values are part of it: where they keep changing, it is compiled anew, with a warning. No function
            is kept alive.
        primals: its positional arguments.
        tangents: one per primal, with its structure; None for an inactive one, at any depth.
        has_aux: ``fn`` returns ``(output, aux)``; aux has no tangent.
        backend, dynamic, differentiable_tangent, config: as for :func:`transform`.

    Returns:
        ``(out, out_dot)`` or ``(out, out_dot, aux)``. ``out`` carries autograd; unlike with torch.func.jvp,
        ``out_dot`` is detached unless ``differentiable_tangent``.

    Raises:
        ValueError: a tangent does not fit its primal.
    """
    if not isinstance(primals, tuple) or not isinstance(tangents, tuple):
        raise ValueError("primals and tangents must be tuples")
    if len(primals) != len(tangents):
        raise ValueError(f"{len(primals)} primals but {len(tangents)} tangents")
    given = dict(enumerate(tangents))
    config = config or Config()
    dots = match_tangents(given, Inputs.positional(primals, first=1), config.check_finite)
    settings = (backend, dynamic, config, differentiable_tangent, has_aux)
    out, out_dot = _of_function(fn, settings, primals, dots)
    return (out[0], out_dot, out[1]) if has_aux else (out, out_dot)


class DualModule(nn.Module):
    """What :func:`transform` returns: the model itself, which also takes ``tangents=``.

    Parameters, buffers, submodules, hooks and ``state_dict`` names are the model's own, and attributes that this
    class does not have are looked up there. ``dual.model`` is the model.
    """

    def __init__(self, model: nn.Module, dual: _Dual):
        # One set of registries for both objects: what is registered, moved or swapped in one is so in the other.
        registries = {name: vars(model)[name] for name in vars(nn.Module()) if name != "training"}
        vars(self).update(registries, model=model, _dual=dual)

    def __call__(self, *args: Any, tangents: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """The model's output; with ``tangents``, a pair ``(out, out_dot)``.

        Args:
            *args, **kwargs: the model's own arguments.
            tangents: for each active input its name and its tangent, of the same shape, dtype and device. Names
                are the parameters of the model's ``forward``; a tensor inside a nested input is reached by a
                nested tangent (``{"cond": {"text": text_dot}}``) or by a dotted name (``{"cond.text": text_dot}``).

        Returns:
            ``out_dot`` has the structure of ``out``, with None in place of what is not a floating tensor, and zeros
            where an output does not depend on the active inputs. Tensors are looked for in tuples, lists, deques,
            mappings and dataclasses. It is detached unless ``differentiable_tangent``;
            ``out`` is not.

        Raises:
            ValueError: a tangent's name, shape, dtype or device does not fit; the message lists what would. Or the
                output has tensors in a set or another object, where their tangents have no place.
            UnsupportedOp: ops on the tangent path have no derivative rule.
            CaptureError: the model cannot be captured as one graph.
            NonFiniteTangent: with ``Config(check_finite=True)``.
        """
        if tangents is None:
            return self.model(*args, **kwargs)
        inputs = Inputs.of(self.model, args, kwargs)
        dots = match_tangents(tangents, inputs, self._dual.config.check_finite)
        with explaining_heads(self.model):
            return self._dual(args, kwargs, dots)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, without its hooks."""
        return self.model.forward(*args, **kwargs)

    def explain(self, *args: Any, tangents: Mapping[str, Any], dynamic: bool = True, **kwargs: Any) -> Explanation:
        """What transform does to the model for these inputs, without running it: print the result.

        Args:
            dynamic: count FLOPs for symbolic sizes where the model allows it.
        """
        make_traceable(self.model)
        dots = match_tangents(tangents, Inputs.of(self.model, args, kwargs))
        forward = dual_forward(self.model, differentiable=self._dual.settings["differentiable_tangent"])
        return explain(self.model, forward, args, kwargs, dots, dynamic, self._dual.config)

    @property
    def regions(self) -> Regions | None:
        """With ``transform(model, regions=...)``, what was chosen and what became of it. Print it."""
        return self._dual.regions

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.model.training

    def train(self, mode: bool = True) -> DualModule:
        self.model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in vars(self):
                raise
            return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # fully_shard gives a module another one
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.model, name)

    def __reduce__(self) -> Any:
        """Copies and pickles are transformed anew: what was compiled belongs to this model."""
        return _transform_again, (self.model, self._dual.settings)

    def __repr__(self) -> str:
        return f"Dual{self.model!r}"


def _transform_again(model: nn.Module, settings: dict[str, Any]) -> DualModule:
    return transform(model, **settings)


class _Dual:
    """Computes ``(out, out_dot)`` of a callable by one of the backends."""

    def __init__(
        self,
        call: Callable[..., Any],
        backend: str | Backend,
        dynamic: bool | None,
        config: Config,
        differentiable_tangent: bool = False,
        has_aux: bool = False,
        regions: Choice | None = None,
    ):
        if not isinstance(backend, Backend) and backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(map(repr, BACKENDS))}")
        if differentiable_tangent and backend == "op_by_op":
            raise ValueError("op by op, tangents have no gradients: differentiable_tangent needs another backend")
        if regions is not None and (differentiable_tangent or backend == "op_by_op"):
            other = "differentiable_tangent=True" if differentiable_tangent else 'backend="op_by_op"'
            raise ValueError(f"regions are graphs with op-by-op code between them: not with {other}")
        self.settings = {"backend": backend, "dynamic": dynamic, "config": config, "regions": regions}
        self.settings["differentiable_tangent"] = differentiable_tangent
        self.config, self.has_aux = config, has_aux
        self._call, self._dynamic = call, dynamic
        self._said_aside = False
        self.forward = self._new_forward()
        self.backend: Backend | None = None
        if isinstance(backend, Backend):
            self.backend = backend
        elif backend in COMPILERS:
            self.backend = Backend(backend, config)
        self._variants: Kept[Callable[..., Any]] = Kept(KEPT_VARIANTS)
        self.regions: Regions | None = None
        if self.backend is not None and regions is not None and isinstance(call, nn.Module):
            self.regions = Regions(call, regions, self.backend, dynamic)

    @property
    def graphs(self) -> int:
        """How many its backend has compiled, for whomever."""
        return 0 if self.backend is None else len(self.backend.reports)

    def _new_forward(self) -> Callable[..., Any]:
        return dual_forward(self._call, self.has_aux, bool(self.settings["differentiable_tangent"]))

    # A graph of its own, also inside a function that is being compiled: its markers must not meet those of another.
    @torch.compiler.disable(reason="a call with tangents= is compiled on its own")
    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], dots: dict[str, Tensor]) -> tuple[Any, Any]:
        refuse_other_levels((args, kwargs, dots, self._held(args)), self._call)
        for module in self._modules(args):
            make_traceable(module)
        if not self.settings["differentiable_tangent"]:
            dots = {path: dot.detach() for path, dot in dots.items()}
        out, flat_dots = self._run(args, kwargs, dots)
        if self.config.check_finite:
            check_finite(self.forward if _alone() else None, (args, kwargs, dots), flat_dots)
        remaining = iter(flat_dots)
        differentiated = out[0] if self.has_aux else out
        refuse_hidden(differentiated)
        return out, map_leaves(differentiated, lambda _, leaf: next(remaining) if has_tangent(leaf) else None)

    def _held(self, args: tuple[Any, ...]) -> list[Tensor]:
        """The tensors that a function brings along, and the parameters of its modules."""
        if isinstance(self._call, nn.Module):
            return []
        held = held_by(args[0].fn)
        parameters = [p for module in held if isinstance(module, nn.Module) for p in module.parameters()]
        return parameters + [x for x in held if isinstance(x, Tensor)]

    def _modules(self, args: tuple[Any, ...]) -> list[nn.Module]:
        """What is called: the model, or the modules of a function."""
        return [self._call] if isinstance(self._call, nn.Module) else modules_of(args[0].fn)

    def _compiled(self, *inputs: Any) -> tuple[Any, list[Tensor]]:
        """The graph, captured anew when something changed that Dynamo does not look at."""
        key = unguarded([self._call] if isinstance(self._call, nn.Module) else held_by(inputs[0][0].fn))
        return self._variants.get(key, self._compile)(*inputs)

    def _compile(self) -> Callable[..., Any]:
        assert self.backend is not None
        return torch.compile(self._new_forward(), backend=self.backend, fullgraph=True, dynamic=self._dynamic)

    def _run(self, *inputs: Any) -> tuple[Any, list[Tensor]]:
        """The output and the tangents of its leaves, by the way that was asked for."""
        if self.backend is None:
            return self._op_by_op(*inputs)
        if aside := stands_aside():
            return self._without_compiler(aside, *inputs)
        if self.regions is not None and not self.regions.prefer_one_graph():
            return self.regions(self.forward, *inputs)
        try:
            asked = self.backend.compiler, bool(self.settings["differentiable_tangent"])
            with own_errors(*asked), in_one_piece(), nullcontext() if self.regions is None else backward_at_once():
                return self._compiled(*inputs)
        except MarkerExecuted:  # by a stance of torch.compile's
            return self._without_compiler("which may run eagerly for now,", *inputs)
        except CaptureError as error:
            if self.regions is None or hit_recompile_limit(error):
                raise
            self.regions.one_graph_failed(error)
        return self.regions(self.forward, *inputs)

    def _op_by_op(self, *inputs: Any) -> tuple[Any, list[Tensor]]:
        with OpByOp():
            return self.forward(*inputs)

    def _without_compiler(self, aside: str, *inputs: Any) -> tuple[Any, list[Tensor]]:
        """Op by op, where torch.compile would run eagerly."""
        if self.settings["differentiable_tangent"]:
            raise CaptureError(
                f"torch.compile, {aside} makes no graph, and op by op tangents have no gradients: call it outside"
            )
        if not self._said_aside:
            log.warning("jvpgraph: torch.compile, %s compiles nothing: this call runs op by op", aside)
        self._said_aside = True
        return self._op_by_op(*inputs)


def _alone() -> bool:
    """Whether no other rank could have to take part in a further call, which only this one knows to be needed."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


_functions: Kept[_Dual] = Kept()


def _of_function(fn: Callable[..., Any], settings: tuple[Any, ...], primals: Any, dots: dict[str, Tensor]) -> Any:
    """Output and tangent of a plain function, in a graph that may have been made for another one of the same code."""
    key = (identity(fn), *settings)
    while True:
        dual = _functions.get(key, lambda: _Dual(call_function, *settings))
        before = dual.graphs
        try:
            return dual((Function(fn), *primals), {}, dots)
        except CaptureError as error:
            if not hit_recompile_limit(error) or before == 0:
                raise
            _functions.drop(key)  # what its closures hold varies: the next ones get a graph of their own
        finally:
            if dual.graphs > before:
                note_graphs(fn, dual.graphs - before)
