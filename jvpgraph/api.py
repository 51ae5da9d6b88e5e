"""The front door: transform a model, or a function, into one that also computes its tangent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from jvpgraph.config import Config
from jvpgraph.dual import Dual
from jvpgraph.dynamo import hit_recompile_limit
from jvpgraph.dynamo_backend import Backend
from jvpgraph.errors import CaptureError
from jvpgraph.explain import Explanation, explain
from jvpgraph.functions import Function, Kept, call_function, identity, note_graphs
from jvpgraph.passes.context import Report
from jvpgraph.precision import Policy
from jvpgraph.regions import Choice, Regions
from jvpgraph.settings import BACKENDS, Settings
from jvpgraph.sharding import explaining_heads
from jvpgraph.tangents import Inputs, match_tangents

__all__ = ["BACKENDS", "DualModule", "jvp", "transform"]


def transform(
    model: nn.Module,
    *,
    regions: Choice | None = None,
    backend: str | Backend = "inductor",
    dynamic: bool | None = None,
    differentiable_tangent: bool = False,
    tangents_batched: bool | int = False,
    config: Config | None = None,
) -> DualModule:
    """A view of ``model`` that also computes tangents, in one compiled graph.

    ``dual(*args, **kwargs)`` is the model. ``dual(*args, tangents={name: x_dot}, **kwargs)`` returns
    ``(y, y_dot)`` with ``y_dot = sum over names of (d model / d input) * x_dot``; both have the structure of the
    model's output. ``y`` keeps its autograd history, ``y_dot`` is detached unless ``differentiable_tangent``.

    Args:
        model: any nn.Module. Its parameters, buffers, submodules and hooks are shared, not copied.
        regions: None captures the model as one graph. Otherwise parts of it become graphs of their own, one for all
            equal ones, and the code around them runs op by op. Pass a class of modules, a tuple of classes, a
            function that says whether a module is a region, or "auto", which captures one graph if it can and
            otherwise finds the repeated blocks. Models that FSDP2 shards, or that branch on data, need regions.
            ``dual.regions`` says what was chosen and what became of it.
        backend: "inductor" compiles; "eager" makes the same graph and runs it without Inductor; "op_by_op" runs
            any Python code, one op at a time. Or an object made by :func:`jvpgraph.backend`, which has its own config.
        dynamic: as in torch.compile: True for symbolic sizes from the start, None to find out by recompiling once.
        differentiable_tangent: ``y_dot`` has gradients too, in parameters, inputs and tangents, for objectives that
            train through it (terminal velocity matching, Hessian-vector products). Costs the memory and the time
            of a second-order backward. Needs one graph: neither regions nor backend="op_by_op".
        tangents_batched: calls take several tangents at once, [T, *shape of the input], and ``y_dot`` is [T, *shape of
            y]: T directional derivatives for one pass over the primal. The number T, or True for any. Needs one graph.
        config: settings, see :class:`jvpgraph.Config`.

    Raises:
        ValueError: an argument is none of the above, or two of them exclude each other.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"transform takes an nn.Module, not {type(model).__name__}; for functions use jvpgraph.jvp")
    if isinstance(model, DualModule):
        raise ValueError("this model has been transformed already: pass its attribute model")
    settings = Settings.of(
        backend=backend,
        regions=regions,
        dynamic=dynamic,
        differentiable_tangent=differentiable_tangent,
        tangents_batched=tangents_batched,
        config=config,
    )
    if isinstance(policy := settings.config.tangent_precision, Policy):
        policy.check(name for name, _ in model.named_modules())
    return DualModule(model, Dual(model, settings))


def jvp(
    fn: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    has_aux: bool = False,
    backend: str | Backend = "inductor",
    dynamic: bool | None = None,
    differentiable_tangent: bool = False,
    tangents_batched: bool | int = False,
    config: Config | None = None,
) -> tuple[Any, ...]:
    """``torch.func.jvp`` as one compiled graph: ``(fn(*primals), J @ tangents)``, plus aux if ``has_aux``.

    Args:
        fn: a function of tensors, or of nested tuples, lists and dicts of them. Functions of the same code, such as
            lambdas from one line, share a graph: the tensors in a closure are its inputs and get gradients. Python
            values are part of the graph: if they keep changing, it is compiled again, with a warning. No function
            is kept alive.
        primals: its positional arguments.
        tangents: one per primal, with its structure; None for an inactive one, at any depth.
        has_aux: ``fn`` returns ``(output, aux)``; aux has no tangent.
        backend, dynamic, differentiable_tangent, tangents_batched, config: as for :func:`transform`.

    Returns:
        ``(out, out_dot)`` or ``(out, out_dot, aux)``. ``out`` carries autograd; unlike with torch.func.jvp, ``out_dot``
        is detached unless ``differentiable_tangent``, and float32 where ``out`` has half precision unless
        ``Config(tangent_precision="model")``.

    Raises:
        ValueError: a tangent does not fit its primal.
    """
    if not isinstance(primals, tuple) or not isinstance(tangents, tuple):
        raise ValueError("primals and tangents must be tuples")
    if len(primals) != len(tangents):
        raise ValueError(f"{len(primals)} primals but {len(tangents)} tangents")
    given = dict(enumerate(tangents))
    settings = Settings.of(
        backend=backend,
        dynamic=dynamic,
        differentiable_tangent=differentiable_tangent,
        tangents_batched=tangents_batched,
        config=config,
        has_aux=has_aux,
    )
    inputs = Inputs.positional(primals, first=1)
    dots = match_tangents(given, inputs, settings.config.check_finite, settings.tangents_batched, settings.wide)
    out, out_dot = _of_function(fn, settings, primals, dots)
    return (out[0], out_dot, out[1]) if has_aux else (out, out_dot)


class DualModule(nn.Module):
    """What :func:`transform` returns: the model itself, which also takes ``tangents=``.

    Parameters, buffers, submodules, hooks and ``state_dict`` names are the model's own, and attributes that this
    class does not have are those of the model. ``dual.model`` is the model.
    """

    def __init__(self, model: nn.Module, dual: Dual):
        # One set of registries for both objects: what is registered, moved or swapped in one is so in the other.
        registries = {name: vars(model)[name] for name in vars(nn.Module()) if name != "training"}
        vars(self).update(registries, model=model, _dual=dual)

    def __call__(self, *args: Any, tangents: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """The model's output; with ``tangents``, a pair ``(out, out_dot)``.

        Args:
            *args, **kwargs: the model's own arguments.
            tangents: the tangent of each active input by its name, of the same shape, dtype and device, or in float32
                for an input in half precision; with ``tangents_batched`` several of each, along a first dim. Names are
                the parameters of the model's ``forward``; a tensor inside a nested input is reached by a nested
                tangent (``{"cond": {"text": text_dot}}``) or by a dotted name (``{"cond.text": text_dot}``).

        Returns:
            ``out_dot`` has the structure of ``out`` and its dtypes, but float32 for half precision unless
            ``Config(tangent_precision="model")``; with None in place of what is not a floating tensor, and zeros
            where an output does not depend on the active inputs. Tensors are looked for in tuples, lists, deques,
            mappings and dataclasses. ``out_dot`` is detached unless ``differentiable_tangent``; ``out`` is not.

        Raises:
            ValueError: a tangent's name, shape, dtype or device does not fit; the message lists what would. Or the
                output has tensors in a set or another object, with no place for their tangents.
            UnsupportedOp: ops on the tangent path have no derivative rule.
            CaptureError: the model cannot be captured as one graph.
            NonFiniteTangent: with ``Config(check_finite=True)``.
        """
        if tangents is None:
            return self.model(*args, **kwargs)
        inputs = Inputs.of(self.model, args, kwargs)
        settings = self._dual.settings
        dots = match_tangents(tangents, inputs, settings.config.check_finite, settings.tangents_batched, settings.wide)
        with explaining_heads(self.model):
            return self._dual(args, kwargs, dots)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, without its hooks."""
        return self.model.forward(*args, **kwargs)

    def explain(self, *args: Any, tangents: Mapping[str, Any], dynamic: bool = True, **kwargs: Any) -> Explanation:
        """What transform does to the model for these inputs: print the result.

        One graph is captured and not run. What is op by op, regions included, runs once without being compiled.

        Args:
            dynamic: count FLOPs for symbolic sizes where the model allows it.
        """
        inputs, settings = Inputs.of(self.model, args, kwargs), self._dual.settings
        dots = match_tangents(tangents, inputs, False, settings.tangents_batched, settings.wide)
        return explain(self._dual, self.model, inputs.paths, (args, kwargs, dots), dynamic)

    @property
    def reports(self) -> list[Report]:
        """What was done to each graph that was made so far; with backend="op_by_op", to the last call.

        A Backend object that several models share has the reports of all of them.
        """
        return self._dual.reports

    @property
    def regions(self) -> Regions | None:
        """With ``transform(model, regions=...)``: what was chosen, and what became of it. Printable."""
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


def _transform_again(model: nn.Module, settings: Settings) -> DualModule:
    return DualModule(model, Dual(model, settings))


_functions: Kept[Dual] = Kept()


def _of_function(fn: Callable[..., Any], settings: Settings, primals: Any, dots: dict[str, Tensor]) -> Any:
    """Output and tangent of a plain function, in a graph that may have been made for another one of the same code."""
    key = (identity(fn), settings)
    while True:
        dual = _functions.get(key, lambda: Dual(call_function, settings))
        before = len(dual.reports)
        try:
            return dual((Function(fn), *primals), {}, dots)
        except CaptureError as error:
            if not hit_recompile_limit(error) or before == 0:
                raise
            _functions.drop(key)  # what its closures hold varies: the next ones get a graph of their own
        finally:
            if settings.compiles and len(dual.reports) > before:
                note_graphs(fn, len(dual.reports) - before)
