"""Which functions of other packages are written again, and how a call of theirs becomes a call of ours.

A package is never imported: its functions are looked for among the modules that are there. What is found is compared
by identity, so that it does not matter by which of its names a model knows a function.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from jvpgraph.errors import UnsupportedNode, UnsupportedOp

__all__ = ["Swap", "check_options", "refuse", "swap_for", "swaps", "wide"]

Ours = TypeVar("Ours", bound=Callable[..., Any])
REMEDY = "Change the call, or write the function with torch's ops."


@dataclass(frozen=True)
class Swap:
    """One of our functions, for one of theirs.

    Attributes:
        ours: takes by keyword what theirs is given, under the names that their signature has.
        absent: what ours is given for parameters that the signature of theirs does not have, in some versions.
        unless: an argument that theirs handles itself where it is not None.
        around: an op that theirs is written around: where it is registered, Dynamo can trace theirs.
    """

    ours: Callable[..., Any]
    absent: dict[str, Any] = field(default_factory=dict)
    unless: str = ""
    around: str = ""


OPS = "torch.ops."  # of PyTorch itself, which are there always
SWAPS: dict[str, Swap] = {}  # by the full name of theirs
SHORT: set[str] = set()  # the last parts of those names


def swaps(
    *names: str, absent: dict[str, Any] | None = None, unless: str = "", around: str = ""
) -> Callable[[Ours], Ours]:
    """Register a function, or a class, in place of those of these full names; see Swap."""

    def register(ours: Ours) -> Ours:
        for name in names:
            SWAPS[name] = Swap(ours, absent or {}, unless, around)
            SHORT.add(_short(name))
        return ours

    return register


def swap_for(theirs: Any) -> Swap | None:
    """What stands for this function or class of another package, if that is one of those."""
    short = getattr(theirs, "__name__", None)
    if short not in SHORT:
        return None
    return next((swap for name, swap in SWAPS.items() if name.endswith(f".{short}") and _find(name) is theirs), None)


def _short(name: str) -> str:
    """What something of this full name says that its name is: of an op with its overload."""
    return name.split(".", 3)[-1] if name.startswith(OPS) else name.rsplit(".", 1)[-1]


def is_traceable(swap: Swap) -> bool:
    namespace, _, op = swap.around.partition("::")
    return bool(op) and hasattr(getattr(torch.ops, namespace), op)


def present() -> Iterator[tuple[Any, Swap]]:
    """Theirs, as far as they have been imported, and what stands for them."""
    for name, swap in list(SWAPS.items()):
        if (theirs := _find(name)) is not None:
            yield theirs, swap


def _find(name: str) -> Any:
    """What a module has under this name; None where it has not been imported."""
    if name.startswith(OPS):
        return functools.reduce(getattr, name.removeprefix(OPS).split("."), torch.ops)
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules.get(module), attribute, None)


def by_name(swap: Swap, theirs: Any, args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call of theirs as ours takes them.

    Raises:
        TypeError: theirs does not take them.
    """
    signature = _signature(theirs)
    if signature is None:
        return list(args), kwargs
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        else:
            given[name] = value
    return [], given


def absent(swap: Swap, theirs: Any) -> dict[str, Any]:
    """What ours is given because theirs has no parameter for it."""
    signature = _signature(theirs)
    return {} if signature is None else {k: v for k, v in swap.absent.items() if k not in signature.parameters}


@functools.cache
def _signature(theirs: Any) -> inspect.Signature | None:
    """Of a function, of an autograd.Function's apply, or of a class; None where it has several positional lists."""
    is_function = inspect.isclass(theirs) and issubclass(theirs, torch.autograd.Function)
    try:
        signature = inspect.signature(theirs.forward if is_function else theirs)
    except (TypeError, ValueError):  # written in C
        return None
    parameters = list(signature.parameters.values())[is_function:]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return None
    return signature.replace(parameters=parameters)


# ------------------------------------------------------------------------------------------------- what is refused


def refuse(function: str, argument: str, reason: str) -> NoReturn:
    """Raise UnsupportedOp for what our function cannot do. While Dynamo traces it, the line is that of the caller."""
    raise refusal(function, argument, reason, line_of(_frames()))


def refusal(function: str, argument: str, reason: str, where: str) -> UnsupportedOp:
    return UnsupportedOp([UnsupportedNode(function, argument, (), where, reason, REMEDY)])


def _frames() -> Iterator[tuple[str, int, str]]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]


def line_of(frames: Iterator[tuple[str, int, str]]) -> str:
    """The innermost of (file, line, function) outside of torch and this package."""
    for path, line, function in frames:
        if not path.startswith(NOT_THE_USERS):
            return f"{Path(path).name}:{line} in {function}"
    return "(no source line)"


NOT_THE_USERS = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/", "<")

WITHOUT_EFFECT = {
    *("deterministic", "num_splits", "pack_gqa", "sm_margin", "is_grad_enabled", "max_seqlen_q", "max_seqlen_k"),
    *("max_seqlen", "zero_tensors", "scheduler_metadata", "op", "backend", "attention_kwargs", "enable_gqa"),
}
"""Arguments that say how to compute what, but not what."""
NO_SCALES = "it multiplies by scales of quantized operands"
NO_CACHE = "keys and values lie in the pages or the slots of a cache"
REFUSED = {
    "dropout_p": "dropout is drawn inside of the kernel, and the tangent would need the same: call model.eval(), or "
    "set the probability to 0",
    "p": "dropout is drawn inside of the kernel, and the tangent would need the same: set p to 0",
    "softcap": "scores are capped by a tanh, which our kernel does not do",
    "alibi_slopes": "our kernel takes the positions' bias of ALiBi as a tensor only: pass it as a mask to "
    "scaled_dot_product_attention",
    "attention_chunk": "keys are limited to chunks, which our kernel does not do",
    "qv": "scores have a second product, of qv and v",
    "learnable_sink": "the softmax has a further term in its denominator",
    **dict.fromkeys(("q_descale", "k_descale", "v_descale"), NO_SCALES),
    **dict.fromkeys(("block_table", "page_table", "leftpad_k", "seqused_q", "seqused_k", "kv_batch_idx"), NO_CACHE),
    **dict.fromkeys(("process_group",), "classes are split over processes"),
}
"""Arguments that are refused where they are neither None, False nor 0."""


def check_options(what: str, options: dict[str, Any]) -> None:
    """Refuse what is in REFUSED, and what nobody knows."""
    for name, value in options.items():
        if name in WITHOUT_EFFECT or value is None:
            continue
        if name not in REFUSED:
            refuse(what, name, "this argument is newer than our version of the function")
        if isinstance(value, torch.Tensor) or value != 0:
            refuse(what, name, REFUSED[name])


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype in which kernels compute: float32, or float64 for that."""
    return x if x.dtype == torch.float64 else x.float()
