"""Which kernels compute a call of attention, and why not others: the one place where one is chosen.

FORWARDS, BACKWARDS and THROUGH_TANGENT list the candidates, the first choice first. Each says why it does not take a
call, and the first that takes it is the plan's. The ops run the plan, explain() prints it, the gate compiles what it
launches, and tests force one. A plan needs neither memory nor a GPU: tensors may be fakes or on meta, and call.place
says where they will be.

JVPGRAPH_ATTENTION=gluon, triton or blocked asks for one of them wherever it can be.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from jvpgraph.kernels import aten_cpu, aten_cuda, attention_blocked, backward_blocked
from jvpgraph.kernels.blocked_parts import needs_own_sums
from jvpgraph.kernels.call import Call, Cotangents, Gradients, Outputs, Wanted
from jvpgraph.kernels.packed import attend_each, differentiate_each

__all__ = [
    "BACKWARDS",
    "FORWARDS",
    "THROUGH_TANGENT",
    "Backward",
    "Forward",
    "Plan",
    "attend",
    "attend_all",
    "describe",
    "differentiate",
    "forced",
    "plan",
]


def _imported(name: str) -> tuple[Any, str]:
    """(jvpgraph.kernels.<name>, ""), or (None, why not). There is no Triton but for Linux, one that is too old or too
    new lacks what is asked of it, and one that is broken raises anything: nobody needs it to import this package."""
    try:
        return importlib.import_module(f"jvpgraph.kernels.{name}"), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


attention_triton, NO_TRITON = _imported("attention_triton")
backward_triton, _ = _imported("backward_triton")
attention_gluon, NO_GLUON = _imported("attention_gluon")


# ------------------------------------------------------------------------------------------------- what a plan is


@dataclass(frozen=True)
class Forward:
    """A candidate for o and lse, and for their tangents where there are some."""

    name: str
    on: str  # the kind of call.place that it is for; "" for any
    refuses: Callable[[Call], str | None]  # why it does not take a call; None if it does
    run: Callable[[Call], Outputs]
    unproven: Callable[[Call], str | None] = lambda _: None  # why it takes a call only if JVPGRAPH_ATTENTION says so


@dataclass(frozen=True)
class Backward:
    """A candidate for the gradients."""

    name: str
    on: str
    library: str
    refuses: Callable[[Call], str | None]
    run: Callable[[Call, Outputs, Cotangents], Gradients]
    is_by_lse: bool = False  # takes p from lse alone, of which a finite bias that hides whole rows leaves no digits


@dataclass(frozen=True)
class Plan:
    """What computes a call, and its gradients; and by their names, why not the candidates that come before."""

    forward: Forward
    backward: Backward
    why: dict[str, str] = field(default_factory=dict)
    why_backward: dict[str, str] = field(default_factory=dict)
    each: Plan | None = None  # where packed sequences are taken one by one: that of one sequence as long as all

    def __str__(self) -> str:
        if self.each is not None and self.forward is EACH:
            return f"{self.each}, {EACH.name}"
        if self.forward is BLOCKED and self.backward is BLOCKED_BACKWARD:
            return BLOCKED.name
        return f"{self.forward.name}, backward by {self.backward_and_why()}"

    def backward_and_why(self) -> str:
        """The backward and, if it is not ATen's, the last reason of each library that comes before."""
        if self.each is not None and self.backward is EACH_BACKWARD:
            return f"{self.each.backward_and_why()}, {EACH.name}"
        before = {x.library: self.why_backward[x.name] for x in BACKWARDS if x.name in self.why_backward}
        if self.backward.library == "ATen" or not before:
            return self.backward.name
        return f"{self.backward.name}: {', and '.join(dict.fromkeys(before.values()))}"


# -------------------------------------------------------------------------------------------------- the candidates


def _not_triton(call: Call) -> str | None:
    if attention_triton is None:
        return f"Triton could not be imported ({NO_TRITON})"
    return attention_triton.refuses(call)


def _not_gluon(call: Call) -> str | None:
    if attention_gluon is None:
        return f"Gluon could not be imported ({NO_GLUON})"
    return _not_triton(call) or attention_gluon.refuses(call)


def _not_efficient(call: Call) -> str | None:
    if why := _not_triton(call) or aten_cuda.efficient_refuses(call):
        return why
    return "an additive bias, which may hide whole rows" if call.has_additive_bias else None


def _not_blocked(call: Call) -> str | None:
    return "packed sequences" if call.packing is not None and not call.is_empty else None


GLUON = Forward(
    "Gluon",
    "cuda",
    _not_gluon,
    lambda call: attention_gluon.attend(call),
    lambda call: attention_gluon.unproven(call),
)
TRITON = Forward("Triton", "cuda", _not_triton, lambda call: attention_triton.attend(call))
ATEN_CPU = Forward("ATen's flash for CPUs", "cpu", aten_cpu.refuses, aten_cpu.attend)
BLOCKED = Forward("blocks of torch ops", "", _not_blocked, attention_blocked.attend)
EACH = Forward("sequence by sequence", "", lambda _: None, lambda call: attend_each(call, attend))

# ATen's kernels are taken beside ours only: where Triton's forward does not take a call, nothing of it is for GPUs.
FLASH = Backward(
    "ATen's flash",
    "cuda",
    "ATen",
    lambda call: _not_triton(call) or aten_cuda.flash_refuses(call),
    aten_cuda.flash,
)
EFFICIENT = Backward("ATen's efficient kernel", "cuda", "ATen", _not_efficient, aten_cuda.efficient)
TRITON_BACKWARD = Backward(
    "Triton",
    "cuda",
    "Triton",
    lambda call: _not_triton(call) or backward_triton.refuses(call),
    lambda call, outs, grads: backward_triton.differentiate(call, outs, grads),
)
# Where the one above does not take an additive bias, it is worth to wait for the GPU, to see whether it hides rows.
EFFICIENT_UNLESS_HIDDEN = Backward(
    "ATen's efficient kernel, or blocks of torch ops if the bias hides whole rows",
    "cuda",
    "ATen",
    lambda call: _not_triton(call) or aten_cuda.efficient_refuses(call),
    aten_cuda.efficient,
    is_by_lse=True,
)
ATEN_CPU_BACKWARD = Backward(
    "ATen's flash for CPUs", "cpu", "ATen", aten_cpu.backward_refuses, aten_cpu.differentiate, is_by_lse=True
)
BLOCKED_BACKWARD = Backward("blocks of torch ops", "", "torch", _not_blocked, backward_blocked.differentiate)
EACH_BACKWARD = Backward(
    EACH.name,
    "",
    "torch",
    lambda _: None,
    lambda call, outs, grads: differentiate_each(call, outs, grads, differentiate),
)

FORWARDS = (GLUON, TRITON, ATEN_CPU, BLOCKED, EACH)
BACKWARDS = (
    FLASH,
    EFFICIENT,
    TRITON_BACKWARD,
    EFFICIENT_UNLESS_HIDDEN,
    ATEN_CPU_BACKWARD,
    BLOCKED_BACKWARD,
    EACH_BACKWARD,
)
THROUGH_TANGENT = (TRITON_BACKWARD, BLOCKED_BACKWARD, EACH_BACKWARD)


# -------------------------------------------------------------------------------------------------------- choosing

Candidate = TypeVar("Candidate", Forward, Backward)
_forced: Callable[[Call], Plan] | None = None


def plan(call: Call) -> Plan:
    """What computes this call, and the gradients that it says are wanted."""
    if _forced is not None:
        return _forced(call)
    forward, why = _first(FORWARDS, call)
    backward, why_backward = _first(THROUGH_TANGENT if call.through_tangent else BACKWARDS, call)
    one_by_one = forward is EACH or backward is EACH_BACKWARD
    return Plan(forward, backward, why, why_backward, plan(replace(call, packing=None)) if one_by_one else None)


def attend(call: Call) -> Outputs:
    """o and lse, and o_dot and lse_dot where there are tangents for them."""
    forward = _first(FORWARDS, call)[0] if _forced is None else _forced(call).forward
    return forward.run(call)


def attend_all(calls: Sequence[Call]) -> list[Outputs]:
    """The same of calls that differ in their tangents only. Where a GPU's kernels compute them, each computes o and lse
    as well."""
    forward = plan(calls[0]).forward
    return attention_blocked.attend_all(calls) if forward is BLOCKED else [forward.run(call) for call in calls]


def differentiate(call: Call, outs: Outputs, grads: Cotangents) -> Gradients:
    """The gradients that call.wanted says, from what the forward gave."""
    candidates = THROUGH_TANGENT if call.through_tangent else BACKWARDS
    backward = _first(candidates, call)[0] if _forced is None else _forced(call).backward
    if backward.is_by_lse and needs_own_sums(call.bias, outs.lse):
        backward = BLOCKED_BACKWARD
    if backward is ATEN_CPU_BACKWARD and call.summary is not None:
        backward = BLOCKED_BACKWARD  # skips what the mask hides
    return backward.run(call, outs, grads)


def describe(call: Call, *, differentiable_tangent: bool = False) -> str:
    """The plan in a line; with that of the gradients of o_dot and lse_dot if these are to be differentiable."""
    if call.place.kind == "meta":
        return "a kernel that depends on the device: this one is meta"
    found = str(plan(call))
    if not differentiable_tangent:
        return found
    through = plan(replace(call, wanted=Wanted(from_tangent=True))).backward_and_why()
    return found if found == through else f"{found}; through the tangent by {through}"


@contextlib.contextmanager
def forced(chosen: Plan | Callable[[Call], Plan]) -> Iterator[None]:
    """Inside, every call goes this way, whether or not its candidates would take it: for tests and measurements."""
    global _forced
    before, _forced = _forced, (lambda _: chosen) if isinstance(chosen, Plan) else chosen
    try:
        yield
    finally:
        _forced = before


def _first(candidates: Sequence[Candidate], call: Call) -> tuple[Candidate, dict[str, str]]:
    """The first that takes the call, and why those before do not."""
    asked = os.environ.get("JVPGRAPH_ATTENTION")
    if asked not in (None, "gluon", "triton", "blocked"):
        raise ValueError(f"JVPGRAPH_ATTENTION is {asked!r}, but has to be gluon, triton or blocked")
    if attention_triton is None and call.q.is_cuda and asked != "blocked":
        warnings.warn(
            f"attention is computed in blocks of torch ops, because Triton could not be imported ({NO_TRITON}): "
            "install the version that this torch requires, or set JVPGRAPH_ATTENTION=blocked",
            stacklevel=2,
        )
    why: dict[str, str] = {}
    for candidate in candidates:
        if candidate.on not in ("", call.place.kind):
            continue
        reason = _not_asked(candidate, asked) or candidate.refuses(call)
        if reason is None and isinstance(candidate, Forward) and asked != "gluon":
            reason = candidate.unproven(call)
        if reason is None:
            return candidate, why
        why[candidate.name] = reason
    raise AssertionError("packed sequences are taken one by one, and anything else in blocks")


def _not_asked(candidate: Forward | Backward, asked: str | None) -> str | None:
    if (asked == "blocked" and candidate.on == "cuda") or (asked == "triton" and candidate is GLUON):
        return f"JVPGRAPH_ATTENTION asks for {asked}"
    return None
