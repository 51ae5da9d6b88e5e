"""The calls that PyTorch's operator database has samples of, each as a function of tensors with its source."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal import common_methods_invocations as database
from torch.testing._internal.opinfo.core import ForeachFuncInfo, OpInfo
from torch.utils._pytree import tree_leaves

__all__ = ["FORMS", "LAYOUTS", "OPS", "Call", "calls", "floating"]


def _as_it_is(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


SEEDS = database.wrapper_set_seed
database.wrapper_set_seed = _as_it_is  # the oracle seeds too, and Dynamo cannot trace this
_FOREACH = [name for name in vars(database) if name.startswith("foreach_") and name.endswith("_op_db")]


UNINITIALISED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
NO_OUT = ("fft.ihfft2", "fft.ihfftn")  # over one dim they leave out= as it was: the fault is PyTorch's


def _named() -> dict[str, OpInfo]:
    """All ops by name; one that comes in variants has the variant behind a dot."""
    named: dict[str, OpInfo] = {}
    for op in [*database.op_db, *(op for name in _FOREACH for op in getattr(database, name))]:
        named[f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name] = op
    return {name: op for name, op in named.items() if op.name not in UNINITIALISED}


OPS = _named()
FORMS = ("call", "in place", "out")
LAYOUTS = ("as sampled", "transposed", "offset", "expanded")


@dataclass(frozen=True)
class Call:
    """``fn(*tensors)``, as the line of Python ``source``."""

    fn: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    source: str

    def __str__(self) -> str:
        shown = [f"t{i}: {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for i, x in enumerate(self.tensors)]
        return f"{self.source}  with {', '.join(shown)}"[:400]


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def calls(name: str, dtype: torch.dtype, form: str, most: int, layout: str = LAYOUTS[0]) -> Iterator[Call]:
    """At most so many calls of an op, spread evenly over its samples.

    Args:
        form: the op itself, its in-place form on a copy, or with ``out=``.
        layout: what every floating input is brought into.
    """
    op = OPS[name]
    callee = op.inplace_variant if form == "in place" else op.op
    if dtype not in op.dtypes or callee is None or (form == "out" and (name in NO_OUT or not op.supports_out)):
        return
    samples = _samples(op, name, dtype)
    for i in range(min(most, len(samples))):
        sample = samples[(2 * i + 1) * len(samples) // (2 * min(most, len(samples)))]
        call = _call(op, sample, callee, form)
        if call is not None:
            alone = name.startswith("as_strided")  # what it reads is up to the memory, which the oracle's inputs own
            if layout == "expanded" and name.endswith("_lowrank"):
                continue  # equal rows have no second singular vector, so their derivatives are not finite
            if layout == "expanded" and name == "geometric":
                continue  # writes into memory that its elements share, which PyTorch forgets to refuse
            tensors = tuple(x.clone() if alone else _laid_out(x, layout) for x in call.tensors)
            yield Call(call.fn, tensors, call.source)


def _samples(op: OpInfo, name: str, dtype: torch.dtype) -> list[Any]:
    seed = zlib.crc32(name.encode())
    torch.manual_seed(seed)
    random.seed(seed)
    if isinstance(op, ForeachFuncInfo):
        options = {"noncontiguous": False, "allow_higher_dtype_scalars": False, "num_input_tensors": [3]}
        return list(op.sample_inputs("cpu", dtype, **options))
    return [x for x in op.sample_inputs("cpu", dtype) if _dense(x)]


def _dense(sample: Any) -> bool:
    tensors = [x for x in tree_leaves([sample.input, list(sample.args), sample.kwargs]) if isinstance(x, Tensor)]
    return all(x.layout is torch.strided and type(x) is Tensor for x in tensors)


class _Source:
    """Arguments as Python source: tensors are t0, t1, ..., what cannot be written is a global c0, c1, ..."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.names: dict[str, Any] = {}

    def of(self, value: Any) -> str:
        if isinstance(value, Tensor):
            self.tensors.append(value.detach())
            return f"t{len(self.tensors) - 1}"
        if type(value) in (list, tuple):
            inner = "".join(f"{self.of(x)}, " for x in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if isinstance(value, dict):
            return "{" + "".join(f"{k!r}: {self.of(v)}, " for k, v in value.items()) + "}"
        if value is None or type(value) in (bool, int, str) or (type(value) is float and abs(value) < float("inf")):
            return repr(value)
        if isinstance(value, torch.dtype):
            return str(value)
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name


def _call(op: OpInfo, sample: Any, callee: Any, form: str) -> Call | None:
    source = _Source()
    first = source.of(sample.input)
    rest = "".join(f", {source.of(x)}" for x in sample.args)
    rest += "".join(f", {k}={source.of(v)}" for k, v in sample.kwargs.items() if k != "disable_fastpath")
    if form == "in place":
        copied = f"[t.clone() for t in {first}]" if isinstance(sample.input, (list, tuple)) else f"{first}.clone()"
        body = [f"x = {copied}", f"op(x{rest})", "return x"]
    elif form == "out":
        try:
            results = op.op(sample.input, *sample.args, **sample.kwargs)
        except Exception:
            return None
        outs = results if isinstance(results, (list, tuple)) else [results]
        if not all(isinstance(x, Tensor) for x in outs):
            return None
        made = ", ".join(f"torch.empty({list(x.shape)}, dtype={x.dtype})" for x in outs)
        into = "o" if isinstance(results, Tensor) else ", ".join(f"o[{i}]" for i in range(len(outs)))
        made = made if isinstance(results, Tensor) else f"[{made}]"
        into = into if isinstance(results, Tensor) else f"({into},)"
        body = [f"o = {made}", f"wrapper(lambda *a, **k: op(*a, **k, out={into}), {first}{rest})"]
        body += [f"return after({'o' if isinstance(results, Tensor) else 'tuple(o)'})"]
    else:
        body = [f"return after(wrapper(op, {first}{rest}))"]
    parameters = ", ".join(f"t{i}" for i in range(len(source.tensors)))
    text = f"def call({parameters}):\n" + "".join(f"    {line}\n" for line in body)
    after = sample.output_process_fn_grad if not isinstance(op, ForeachFuncInfo) else lambda x: x
    wrapper = _as_it_is if op.gradcheck_wrapper is SEEDS else op.gradcheck_wrapper
    names = {"torch": torch, "op": callee, "wrapper": wrapper, "after": after, **source.names}
    exec(compile(text, f"<{op.name}>", "exec"), names)
    return Call(names["call"], tuple(source.tensors), "; ".join(body))


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of ``x`` in another layout; expanded: its first slice, repeated without memory."""
    if not floating(x) or not x.dim() or layout == LAYOUTS[0]:
        return x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].contiguous().expand_as(x)
    room = torch.full([n + 2 for n in x.shape], 7.0, dtype=x.dtype)  # offset
    room[tuple(slice(1, n + 1) for n in x.shape)] = x
    return room[tuple(slice(1, n + 1) for n in x.shape)]
