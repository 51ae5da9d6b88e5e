"""Triton kernels under Triton's interpreter: TRITON_INTERPRET=1, which is read when a kernel is decorated, so that
these tests are a pytest of their own in the Makefile. Where there is a GPU, they run on it instead."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
QUIET = (  # numpy in rows beyond the last query, which are not stored
    "ignore:divide by zero:RuntimeWarning",
    "ignore:invalid value:RuntimeWarning",
)


def runs_kernels(test: Any) -> Any:
    """Mark a test that launches a kernel: on a GPU, or in the interpreter."""
    has_none = not INTERPRETED and not torch.cuda.is_available()
    test = pytest.mark.skipif(has_none, reason="needs a GPU, or Triton's interpreter: make test-kernels")(test)
    for warning in QUIET:
        test = pytest.mark.filterwarnings(warning)(test)
    return pytest.mark.kernels(test)


def share(of: int, *axes: Iterable[Any]) -> list[Any]:
    """All combinations, of which `make test` runs one of so many and `make test-kernels` the others. Of three axes no
    shorter than that it has every pair of values, of two every value."""
    numbered = itertools.product(*map(enumerate, axes))
    return [
        pytest.param(*(x for _, x in row), marks=[pytest.mark.matrix] * (sum(i for i, _ in row) % of > 0))
        for row in numbered
    ]


def compile_only(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, cache: Any) -> list[Any]:
    """Let the kernel `owner.name` compile for a Hopper GPU that is pretended, instead of being launched there: what
    its launches came to."""
    kernel, compiled = getattr(owner, name), []

    class Hopper:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = get_current_stream = staticmethod(lambda *_: 0)

    class CompileOnly:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: compiled.append(kernel.run(*args, grid=grid, warmup=True, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(owner, name, CompileOnly())
    monkeypatch.setattr(driver, "_active", Hopper())
    return compiled


@pytest.fixture
def repaired_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as uint16, multiplies those integers in tl.dot, and truncates on the way in."""
    if not INTERPRETED:
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype("uint32") << 16
        return handle(bits.view("float32"), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self, x, to):
        if x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            rounded = torch.from_numpy(x.data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
            return handle(rounded, tl.bfloat16)
        return widened(x) if x.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32 else cast(self, x, to)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(builder, name, lambda self, x, to: self.cast_impl(x, to))


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not written is NaN."""
    empty, empty_like = Tensor.new_empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **kwargs: poisoned(empty(self, *args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poisoned(empty_like(*args, **kwargs)))
