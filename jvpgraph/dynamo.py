"""What Dynamo and the compiler raise, as errors of the package's own."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._functorch.config as functorch_config
from torch._dynamo import convert_frame, eval_frame
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    InternalTorchDynamoError,
    TorchDynamoException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import jvpgraph.errors
from jvpgraph.errors import CaptureError, JvpgraphError, UnsupportedOp
from jvpgraph.tracing import TRACED, taught
from jvpgraph.unguarded import unobserved

__all__ = [
    "advice",
    "backward_at_once",
    "compile_failed",
    "first_cause",
    "hit_recompile_limit",
    "in_one_piece",
    "own_errors",
    "remedy",
    "stands_aside",
]

CAPTURE = convert_frame._compile.__code__
RAISED = "Developer debug context: raised exception "
FROM_USER = "from user code:"
MOST_LINES = 8  # of a text that names neither cause nor line
NOT_OF_USERS = tuple(f"{Path(str(module.__file__)).parent}/" for module in (torch, jvpgraph.errors))
NOT_CAPTURED = "the model cannot be captured as one graph: "
NOT_COMPILED = "the compiler cannot compile the graph: "
# What Dynamo raises for a tensor that is kept on a module or in a list by a checkpoint inside another.
OF_INNER_GRAPH = "does not belong to this Graph"
KEPT_INSIDE = (
    "a tensor that was made under a checkpoint inside another checkpoint is kept outside of both, on a module or in a "
    "list: return it from there, or leave out the inner checkpoint"
)
NO_BACKWARD = (
    "PyTorch has no backward for this op, with or without tangents: detach its input, use another op (for "
    "floor_divide, torch.div with a rounding_mode), or call under torch.no_grad()."
)


def stands_aside() -> str:
    """Why torch.compile runs everything as it is now; empty where it compiles."""
    for mode in _get_current_dispatch_mode_stack():
        if not any(getattr(mode, name, bool)() for name in ("is_infra_mode", "ignore_compile_internals")):
            return f"inside a dispatch mode, {type(mode).__name__},"
    if torch._dynamo.config.disable:
        return "switched off (TORCHDYNAMO_DISABLE),"
    return "with the stance force_eager," if eval_frame._stance.stance == "force_eager" else ""


@contextmanager
def in_one_piece() -> Iterator[None]:
    """Dynamo as we need it: it looks at hooks, which come and go, and leaves graphs whole.

    Inside DDP it cuts them at its gradient buckets, and tangents could not cross from one piece to the next.
    """
    settings = {"skip_nnmodule_hook_guards": False, **TRACED}
    if DistributedDataParallel._get_active_ddp_module() is not None:
        settings["optimize_ddp"] = False
    with torch._dynamo.config.patch(settings), unobserved(), taught():
        yield


# What was said, and what to change in the model so that it is one graph.
CHANGES = {
    "Data-dependent branching": "choose by torch.where or torch.cond, or decide before the call and pass the decision",
    "Could not guard on data-dependent": "pass sizes as numbers, not in tensors that are read",
    "Could not extract specialized integer": "pass sizes as numbers, not in tensors that are read",
    "Unsupported context manager": "enter the context around the call, not in forward",
    "torch.compiler.disable": "take torch.compiler.disable away, if a graph may have what it covers",
    "non-integer tensor": "keep it a tensor",
    "Unsupported Tensor.item": "keep it a tensor",
}


def advice(reason: str) -> str:
    """What to change where a graph was not captured; empty where nothing better is known than to read the line."""
    return next((change for said, change in CHANGES.items() if said in reason), "")


def remedy(compiled: bool = True, compiler: str = "inductor", needs_one_graph: str = "") -> str:
    """What to do instead, where a graph was not captured, or was and could not be ``compiled``."""
    ways = []
    if not needs_one_graph:
        ways += ['transform(model, regions="auto"), which compiles what can be compiled', 'backend="op_by_op"']
    if compiled and compiler == "inductor":
        ways.append('backend="eager", which takes the same graph without Inductor')
    if not ways:
        return f"With {needs_one_graph} everything has to be one graph, so this cannot be run."
    return f"Use {', or '.join(ways)}."


@contextmanager
def own_errors(compiler: str = "inductor", needs_one_graph: str = "") -> Iterator[None]:
    """Errors of ours come out as they were raised, Dynamo's as a CaptureError.

    What was asked for says what can be done instead.

    Dispatch keys are put back: where a compiler fails inside of the model's inference_mode, the guard of that lives on
    in the frames of the error, and would bring those of the compiler back when it goes.
    """
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    try:
        with torch._C._ForceDispatchKeyGuard(*keys):
            try:
                yield
            except (TorchDynamoException, GuardOnDataDependentSymNode) as error:
                _forget_frames(error)
                raise
    except FailOnRecompileLimitHit as error:
        raise CaptureError(
            "the model was compiled in too many variants (sizes, types, sets of active inputs): pass dynamic=True, or "
            "raise torch._dynamo.config.recompile_limit"
        ) from error
    except (TorchDynamoException, GuardOnDataDependentSymNode, AssertionError) as error:
        if isinstance(error, AssertionError) and not _is_of_dynamo(error):
            raise
        cause = first_cause(error, JvpgraphError)
        if cause is not None:
            if isinstance(cause, UnsupportedOp):  # to whose message Dynamo adds the frames
                cause = UnsupportedOp(cause.nodes)
            raise cause.with_traceback(None) from None
        compiled = compile_failed(error)
        head = NOT_COMPILED if compiled else NOT_CAPTURED
        told = _cut(_told(error))
        how = NO_BACKWARD if _has_no_backward(told) else remedy(compiled, compiler, needs_one_graph)
        raise CaptureError(f"{head}{told}\n{how}") from error


def _is_of_dynamo(error: AssertionError) -> bool:
    """Whether it was raised while Dynamo captured: what a model asserts does not come out of there as it is."""
    return any(frame.f_code is CAPTURE for frame, _ in traceback.walk_tb(error.__traceback__))


def _has_no_backward(told: str) -> bool:
    return "derivative for" in told and "is not implemented" in told


def _forget_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__


def compile_failed(error: BaseException | None) -> bool:
    """Whether a graph was captured that the backend then could not compile, so that nobody branched on data."""
    return isinstance(error, BackendCompilerFailed) and first_cause(error, GuardOnDataDependentSymNode) is None


def _told(error: Exception) -> str:
    """What was raised inside of the wrappers that say no more than which backend raised it."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    if OF_INNER_GRAPH in str(error):
        return KEPT_INSIDE
    return str(error) if isinstance(error, TorchDynamoException) else f"{type(error).__name__}: {error}"


def _cut(told: str) -> str:
    """The cause, in a sentence or two, and the user's line. The long text is that of the error's cause."""
    head, *lines = told.strip().splitlines() or [""]
    stripped = [line.strip() for line in lines]
    raised = next((line.removeprefix(RAISED) for line in stripped if line.startswith(RAISED)), None)
    if raised is not None:  # by the model, which says what is wrong better than Dynamo
        found = [f"the model raises {raised}", *_users_line(lines)]
    else:
        found = [head, *_explanations(stripped), *_users_line(lines)]
    return "\n".join([head, *lines[:MOST_LINES]] if found == [head] else found)


def _explanations(stripped: list[str]) -> Iterator[str]:
    """Of Dynamo's, the first sentence of each that says what it stumbled over."""
    for start, one_line in (("Explanation: ", False), ("Caused by: ", True), ("target: ", True)):
        line = next((line for line in stripped if line.startswith(start)), None)
        if line is not None:
            yield "  " + (line if one_line else _sentence(line.removeprefix(start)))


def _users_line(lines: list[str]) -> list[str]:
    """The innermost frame of the user's code, with its line of source; nothing where there are no frames."""
    start = next((i for i, line in enumerate(lines) if line.strip() == FROM_USER), len(lines))
    below = lines[start + 1 :]
    frames = [i for i, line in enumerate(below) if line.strip().startswith("File ")]
    own = [i for i in frames if not any(folder in below[i] for folder in NOT_OF_USERS)] or frames
    if not own:
        return []
    return [FROM_USER, *(f"  {line.strip()}" for line in below[own[-1] : own[-1] + 2] if line.strip())]


def _sentence(text: str) -> str:
    """The first one; the dots of "e.g." end none."""
    return re.split(r"(?<=[^.][^.]\w[.)`])\s+(?=[A-Z])", text, maxsplit=1)[0]


@contextmanager
def backward_at_once() -> Iterator[None]:
    """Compile the backward with the forward, where a failure can still be answered, not at its first run."""
    if torch.is_grad_enabled() and hasattr(functorch_config, "force_non_lazy_backward_lowering"):
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            yield
    else:
        yield


def hit_recompile_limit(error: CaptureError) -> bool:
    """Whether Dynamo gave up because the model has too many variants."""
    return isinstance(error.__cause__, FailOnRecompileLimitHit)


def first_cause(error: BaseException | None, kind: type[Exception]) -> Exception | None:
    """The first exception of this kind in the chain that led to ``error``."""
    while error is not None:
        if isinstance(error, kind):
            return error
        cause = getattr(error, "inner_exception", None) or error.__cause__
        if cause is None and isinstance(error, InternalTorchDynamoError):  # of what is not Dynamo's it hides the cause
            cause = error.__context__
        error = cause
    return None
