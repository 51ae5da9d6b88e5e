"""What Dynamo raises, told as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.parallel import DistributedDataParallel

from jvpgraph.errors import CaptureError, JvpgraphError

__all__ = ["first_cause", "in_one_piece", "own_errors"]


@contextmanager
def in_one_piece() -> Iterator[None]:
    """Inside DDP, Dynamo cuts graphs at its gradient buckets: tangents could not cross from one piece to the next."""
    if DistributedDataParallel._get_active_ddp_module() is None:
        yield
    else:
        with torch._dynamo.config.patch(optimize_ddp=False):
            yield


@contextmanager
def own_errors() -> Iterator[None]:
    """Errors of ours come out as they were raised, Dynamo's as a CaptureError."""
    try:
        yield
    except FailOnRecompileLimitHit as error:
        raise CaptureError(
            "the model was compiled in too many variants (sizes, types, sets of active inputs): pass dynamic=True, or "
            "raise torch._dynamo.config.recompile_limit"
        ) from error
    except TorchDynamoException as error:
        cause = first_cause(error, JvpgraphError)
        if cause is not None:
            raise cause.with_traceback(None) from None
        if isinstance(error, BackendCompilerFailed) and first_cause(error, GuardOnDataDependentSymNode) is None:
            raise
        raise CaptureError(
            f"the model cannot be captured as one graph: {error}\n"
            'Use transform(model, regions="auto"), which compiles what can be captured, or backend="op_by_op".'
        ) from error


def first_cause(error: BaseException | None, kind: type[Exception]) -> Exception | None:
    """The first exception of this kind in the chain that led to ``error``."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None
