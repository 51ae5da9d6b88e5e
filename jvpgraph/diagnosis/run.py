"""The model op by op beside its reference, and what was seen.

    print(jvpgraph.diagnose(model, (x, t), tangents={"x": x_dot, "t": t_dot}))

One mechanism for every model: what a graph or a region computes, it computes op by op as well, with the same rules. A
compiled graph rounds less often, where a kernel keeps several ops in registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jvpgraph.api import DualModule
from jvpgraph.config import Config
from jvpgraph.diagnosis.differences import STEPS, differences
from jvpgraph.diagnosis.exact import REFERENCES
from jvpgraph.diagnosis.lockstep import Lockstep
from jvpgraph.diagnosis.log import Log
from jvpgraph.diagnosis.measure import apart, norm, on_host, relative
from jvpgraph.diagnosis.records import Output
from jvpgraph.diagnosis.report import Diagnosis
from jvpgraph.dual_forward import dual_forward
from jvpgraph.dynamo_backend import Backend
from jvpgraph.op_by_op import refuse_other_levels
from jvpgraph.precision import HALF, Policy, Precision, carried
from jvpgraph.regions import SmallGraphs
from jvpgraph.rules.apply import has_tangent
from jvpgraph.storages import plain
from jvpgraph.tangents import Inputs, match_tangents
from jvpgraph.tree import leaves, refuse_hidden

__all__ = ["diagnose"]

Call = tuple[tuple[Any, ...], Mapping[str, Any], Mapping[str, Any]]  # args, kwargs, tangents


def diagnose(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    tangents: Mapping[str, Any] | None = None,
    *,
    reference: str = "float64",
    times: Sequence[float] = (),
    time: str | Callable[[float], Call] = "t",
    steps: Sequence[float] = STEPS,
    config: Config | None = None,
) -> Diagnosis:
    """Where the tangent of ``model`` loses its digits: at which module, which op, which line, and by how much.

    The model runs op by op, in its own precision, beside a reference of the same weights that never rounds: each op
    again in a wider type, its weights cast up for that op only. So memory is that of the model without gradients and
    three to five times its activations, and time some ten times that of a call op by op. Nothing of the model changes:
    weights, buffers, mode, the state of random number generators.

    Args:
        model: any nn.Module, or a transformed one, whose config counts if none is given.
        args, kwargs, tangents: as for the transformed model.
        reference: "float64", or "float32" where half precision is to be judged faster.
        times: at each of these the model is called once, and errors are told by time.
        time: the input that is set to each of them, with its own shape and dtype; or a function of a time that gives
            (args, kwargs, tangents), for inputs and tangents that change with it.
        steps: h of central differences, in units of the tangents, whose error is told as well. () leaves them out:
            they take two calls for each, in float32 besides for a model in half precision.
        config: of which ``tangent_precision`` is used.

    Returns:
        A :class:`Diagnosis`: print it, or see its ``ops``, ``modules``, ``worst(n)``, ``save(path)``, ``plot(path)``.

    Raises:
        ValueError: there is no such reference or input, or tangents do not fit.
        UnsupportedOp: an op on the tangent path has no rule.
    """
    if reference not in REFERENCES:
        raise ValueError(f"unknown reference {reference!r}: choose one of {', '.join(map(repr, REFERENCES))}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"diagnose takes an nn.Module, not {type(model).__name__}: wrap the function in one")
    if isinstance(model, DualModule):
        config = config or model._dual.settings.config
        model = model.model
    config = config or Config()
    found = Diagnosis(type(model).__name__, reference, _dtype_of(model), _named(config.tangent_precision))
    for at in times or (None,):
        call = (args, kwargs or {}, tangents or {})
        call = time(at) if callable(time) and at is not None else _at(model, call, str(time), at)
        _one(model, call, at, steps, config, found)
    return found


def _named(precision: Precision | Policy) -> str:
    if not isinstance(precision, Policy):
        return precision
    return (
        f"{precision.default} but for {', '.join(f'{p} in {pattern}' for pattern, p in precision.pairs) or 'nothing'}"
    )


def _at(model: nn.Module, call: Call, name: str, at: float | None) -> Call:
    """The call with its input ``name`` set to a time."""
    if at is None:
        return call
    args, kwargs, tangents = call
    inputs = Inputs.of(model, tuple(args), dict(kwargs))
    if name not in inputs.tensors:
        raise ValueError(f"there is no input {name!r} to set to times; the tensors are: {', '.join(inputs.tensors)}")
    where, key = inputs.paths[name].split(".", 1)
    filled = torch.full_like(inputs.tensors[name], at)
    if where == "args":
        return tuple(filled if str(i) == key else x for i, x in enumerate(args)), kwargs, tangents
    return args, {**kwargs, key: filled}, tangents


def _one(
    model: nn.Module, call: Call, at: float | None, steps: Sequence[float], config: Config, found: Diagnosis
) -> None:
    args, kwargs = tuple(call[0]), dict(call[1])
    inputs = Inputs.of(model, args, kwargs)
    wide = carried(config.tangent_precision) != "model"
    dots = {path: dot.detach() for path, dot in match_tangents(call[2], inputs, wide=wide).items()}
    refuse_other_levels((args, kwargs, dots), model)
    log = Log(config.tangent_precision, at)
    graphs = SmallGraphs(Backend("eager", Config(tangent_precision=config.tangent_precision)))
    mode = Lockstep(REFERENCES[found.reference][0], log, config.tangent_precision, graphs)
    log.mode = mode
    log.follow_times(inputs.tensors)
    forward = dual_forward(model, precision=config.tangent_precision)
    random = _states()
    with torch.no_grad(), _unchanged(model), _random(random):
        with _uncached_autocast(), mode, log.watching(model):
            out, out_dots = forward(args, kwargs, dots)
        refuse_hidden(out)
        wanted = _outputs(out, out_dots, mode, found, at)
        found.ops += log.weighed()
        found.modules += log.modules
        found.losses += log.losses.values()
        del mode, log.mode
        if steps and wanted:

            def run(args: Any, kwargs: Any) -> Any:
                with _unchanged(model), _random(random):
                    return model(*args, **kwargs)

            found.differences += differences(run, args, kwargs, dots, wanted, steps, at, getattr(torch, found.dtype))


def _outputs(out: Any, out_dots: list[Tensor], mode: Lockstep, found: Diagnosis, at: float | None) -> list[Tensor]:
    """Note their errors, of DTensors those of this rank's part; the tangents of the reference."""
    result, wanted = Output(at), []
    paths = [path for path, leaf in leaves(out) if has_tangent(leaf)]
    values = [leaf for _, leaf in leaves(out) if has_tangent(leaf)]
    for path, y, y_dot, (exact, dot) in zip(paths, values, out_dots, mode.answers, strict=True):
        dot = torch.zeros_like(exact) if dot is None else dot
        wanted.append(dot)
        numbers = on_host(
            {
                "value": norm([apart(plain(y), exact)]),
                "size": norm([exact]),
                "tangent": norm([apart(plain(y_dot), dot)]),
                "norm": norm([dot]),
            }
        )
        result.value[path] = relative(numbers["value"], numbers["size"], math.inf)
        result.tangent[path] = relative(numbers["tangent"], numbers["norm"], math.inf)
    found.outputs.append(result)
    return wanted


def _dtype_of(model: nn.Module) -> str:
    dtypes = {x.dtype for x in model.parameters() if has_tangent(x)}
    narrowest = min(dtypes, key=lambda dtype: (dtype not in HALF, dtype.itemsize), default=torch.get_default_dtype())
    return str(narrowest).removeprefix("torch.")


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers are afterwards what they were: batch norms in training write to theirs."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, old in before:
            if not torch.equal(buffer, old):
                buffer.copy_(old)


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Autocast keeps what it casts until it is left, and its reference with it: all weights at once."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _states() -> dict[str, Any]:
    """Of every random number generator that a model may use."""
    found: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


@contextmanager
def _random(states: dict[str, Any]) -> Iterator[None]:
    """Draw from these states, and leave the generators as they are."""

    def put(states: dict[str, Any]) -> None:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state_all(states["cuda"])

    before = _states()
    put(states)
    try:
        yield
    finally:
        put(before)
