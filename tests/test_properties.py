"""Random transformers and random programs: value, tangent and gradients in float64 equal PyTorch's own."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, seed, settings
from hypothesis import strategies as st
from perturb_layouts import perturbed
from strategies import Block, DiTCase, Graph, dit_like_modules, normal, op_graphs
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import jvpgraph
from jvpgraph.precision import widened
from jvpgraph.storages import copy_of_memory
from tests.rounding import RoundedOtherwise

pytestmark = [
    pytest.mark.fuzz,
    # The same program is drawn again with other inputs, and replayed while one is made smaller.
    pytest.mark.filterwarnings("ignore:jvpgraph.jvp compiled the function:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),  # Inductor's own
]

TOLERANCE = {None: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2}  # relative to the largest entry, by narrowest cast
REFUSED = (jvpgraph.UnsupportedOp, jvpgraph.CaptureError)
RESET_EVERY = 25  # examples between two resets of Dynamo, which keeps every graph
SHARD, SHARDS = map(int, os.environ.get("SHARD", "0/1").split("/"))
_count = itertools.count(1)


def examples(in_ci: int, in_fuzz: int) -> Callable[[Any], Any]:
    """So many examples in the ci profile; in fuzz this shard's part of them, with its seed."""
    ci = settings.get_current_profile_name() == "ci"

    def decorate(test: Any) -> Any:
        return settings(max_examples=in_ci if ci else math.ceil(in_fuzz / SHARDS))(test if ci else seed(SHARD)(test))

    return decorate


@dataclass(frozen=True)
class Results:
    """Output leaves, their tangents, and the gradients of a random projection of them (None: unreachable)."""

    values: list[Tensor]
    tangents: list[Tensor]
    gradients: list[Tensor | None]

    def check(self, other: Results, narrow: torch.dtype | None = None, own: Sequence[Results] = ()) -> None:
        """Raise AssertionError unless ``other`` is the same.

        Args:
            narrow: the narrowest type that was computed in.
            own: PyTorch's results in these types, whose largest deviation is allowed tenfold.
        """
        for what in ("values", "tangents", "gradients"):
            for i, (wanted, got) in enumerate(zip(getattr(self, what), getattr(other, what), strict=True)):
                if wanted is None or got is None:
                    assert wanted is got or not torch.any(got if wanted is None else wanted), f"{what}, {i}"
                    continue
                peers = [getattr(results, what)[i] for results in own]
                dtypes = {widened(x.dtype) if what == "tangents" else x.dtype for x in peers if x is not None}
                assert not dtypes or dtypes == {got.dtype}, f"{what}, {i}: {got.dtype}"
                off = max((_largest(x.to(wanted.dtype) - wanted) for x in peers if x is not None), default=0.0)
                allowed = TOLERANCE[narrow] * max(1.0, _largest(wanted)) + 10 * off
                torch.testing.assert_close(
                    got.to(wanted.dtype), wanted, rtol=0, atol=allowed, msg=lambda m, at=f"{what}, {i}": f"{at}: {m}"
                )

    @property
    def finite(self) -> bool:
        found = [*self.values, *self.tangents, *(g for g in self.gradients if g is not None)]
        return all(bool(x.isfinite().all()) for x in found)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def gradients(outs: Sequence[Tensor], wrt: Sequence[Tensor]) -> list[Tensor | None]:
    weighted = [(y * normal(i, tuple(y.shape))).sum() for i, y in enumerate(outs) if y.requires_grad]
    if not weighted or not wrt:
        return [None] * len(wrt)
    return list(torch.autograd.grad(sum(weighted), wrt, allow_unused=True))


class CopiedOut(TorchFunctionMode):
    """Forward AD has no ``out=``: the result is copied there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        out = kwargs.pop("out", None)
        return func(*args, **kwargs) if out is None else out.copy_(func(*args, **kwargs))


def expected(
    fn: Callable[..., Any], inputs: Sequence[Tensor], dots: Sequence[Tensor | None], wrt: Sequence[Tensor]
) -> Results:
    """PyTorch's forward mode and its backward, with the attention that has both in float64."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit.script", DeprecationWarning)  # in torch's own formulas
        with torch.no_grad(), forward_ad.dual_level(), CopiedOut():
            # Dense, as PyTorch cannot give an expanded tensor a tangent.
            dense = [x.detach().contiguous() for x in inputs]
            duals = [x if d is None else forward_ad.make_dual(x, d) for x, d in zip(dense, dots)]
            pairs = [forward_ad.unpack_dual(y) for y in tree_leaves(fn(*duals))]
            values = [y.primal.clone() for y in pairs]
            tangents = [torch.zeros_like(y.primal) if y.tangent is None else y.tangent.clone() for y in pairs]
        return Results(values, tangents, gradients(tree_leaves(fn(*inputs)), wrt) if wrt else [])


def differences(fn: Callable[..., Any], inputs: Sequence[Tensor], dots: Sequence[Tensor | None]) -> list[Tensor]:
    """Central differences; NaN where two steps disagree, as at a jump, or both sides, as where two maxima tie."""

    def at(step: float) -> list[Tensor]:
        moved = [x if d is None else x + step * d for x, d in zip(inputs, dots)]
        return [y.clone() for y in tree_leaves(fn(*moved))]

    def slopes(step: float) -> list[Tensor]:
        return [(a - b) / (2 * step) for a, b in zip(at(step), at(-step))]

    def bends(step: float) -> list[Tensor]:
        return [(a + b - 2 * y) / step for a, b, y in zip(at(step), at(-step), at(0.0))]

    with torch.no_grad():
        pairs = zip(slopes(1e-5), slopes(5e-6), bends(5e-6))
        off = [(((a - b) / 1e-6).abs().maximum((bend / 1e-2).abs()), b) for a, b, bend in pairs]
        return [torch.where(worst < 1 + _largest(b), b, torch.nan) for worst, b in off]


def check_module(case: DiTCase, backend: str, dynamic: bool | None = False, regions: Any = None) -> None:
    inputs, dots = list(case.inputs.values()), [case.tangents.get(name) for name in case.inputs]
    wrt = list(case.module.parameters())
    try:
        wanted = expected(case.module, inputs, dots, wrt)
    except ValueError:  # a group norm of groups with one value each
        assume(False)
    dual = jvpgraph.transform(case.module, backend=backend, dynamic=dynamic, regions=regions)
    y, y_dot = dual(**case.inputs, tangents=case.tangents)
    assert not y_dot.requires_grad
    wanted.check(Results([y], [y_dot], gradients([y], wrt)))


class Half(nn.Module):
    def __init__(self, fn: Callable[..., Any]):
        super().__init__()
        self.fn = fn

    def forward(self, *inputs: Tensor) -> Any:
        return self.fn(*inputs)


class Halves(nn.Module):
    """A program whose first half is a region."""

    def __init__(self, graph: Graph):
        super().__init__()
        first, self.second = graph.halves
        self.first = Half(first)

    def forward(self, *x: Tensor) -> Any:
        return self.second(*self.first(*x))


def run(graph: Graph, way: str, inputs: tuple[Tensor, ...], wrt: Sequence[Tensor]) -> Results:
    """A program by a backend, or with a region."""
    if way == "regions":
        dots = {f"x.{i}": d for i, d in enumerate(graph.tangents) if d is not None}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)  # a half that is no graph runs op by op
            dual = jvpgraph.transform(Halves(graph), backend="eager", regions=Half, dynamic=False)
            out, out_dot = dual(*inputs, tangents=dots)
    else:
        options: dict[str, Any] = {} if way == "op_by_op" else {"dynamic": False}
        if way == "inductor" and graph.narrow is not None:
            options["config"] = jvpgraph.Config(inductor={"emulate_precision_casts": True})
        out, out_dot = jvpgraph.jvp(graph.fn, inputs, graph.tangents, backend=way, **options)
    outs = tree_leaves(out)
    return Results(outs, tree_leaves(out_dot), gradients(outs, wrt))


def check_graph(graph: Graph, ways: Sequence[str], with_grad: bool, perturb: bool = False) -> None:
    """All ways agree with PyTorch in float64; a program that reads numbers may also be refused."""
    inputs = tuple(x.detach().requires_grad_(with_grad) for x in graph.inputs)
    wrt = inputs if with_grad else ()
    own: list[Results] = []
    try:
        right = expected(graph.widened, inputs, graph.tangents, wrt)
        if graph.narrow is not None:
            own.append(expected(graph.fn, inputs, graph.tangents, wrt))
    except RuntimeError:  # forward AD does not take every mixture of types
        assume(graph.narrow is None)
        raise
    if graph.reads_numbers:  # which forward AD takes for constants
        assume("detach" not in graph.source and graph.narrow is None)
        slopes = differences(graph.fn, graph.inputs, graph.tangents)
        right = Results(right.values, slopes, right.gradients)
    assume(right.finite and all(results.finite for results in own))
    for way in ways:
        with perturbed() if perturb else nullcontext():
            try:
                found = run(graph, way, inputs, wrt)
            except REFUSED as error:
                moved = "as_strided" in graph.source and any(map(_is_moved, graph.inputs))
                if graph.reads_numbers or moved or (way != "op_by_op" and _not_ours(error, way, graph, inputs, wrt)):
                    continue
                raise
        try:
            try:
                right.check(found, torch.float32 if graph.reads_numbers else graph.narrow, own)
            except AssertionError:  # by more than one rounding is off: by more than others?
                if not own:
                    raise
                for seed in range(8):
                    with RoundedOtherwise(seed):
                        own.append(expected(graph.fn, inputs, graph.tangents, wrt))
                right.check(found, graph.narrow, own)
        except AssertionError as error:
            raise AssertionError(f"{way}, perturbed: {perturb}: {error}") from error


def _not_ours(error: Exception, way: str, graph: Graph, inputs: Sequence[Tensor], wrt: Sequence[Tensor]) -> bool:
    """Whether torch.compile does not take the program either, without any tangents."""
    if not isinstance(error, jvpgraph.CaptureError):
        return False
    compiled = torch.compile(graph.fn, backend="inductor" if way == "inductor" else "aot_eager", fullgraph=True)
    try:
        gradients(tree_leaves(compiled(*inputs)), wrt)
    except TorchDynamoException:
        return True
    return False


def _is_moved(x: Tensor) -> bool:
    """Whether a marked input's copy lies otherwise in memory, so that as_strided would count there."""
    copy = copy_of_memory(x)
    return (copy.storage_offset(), copy.stride()) != (x.storage_offset(), x.stride())


def forget_some() -> None:
    if next(_count) % RESET_EVERY == 0:
        torch._dynamo.reset()


@pytest.mark.long
@examples(in_ci=5, in_fuzz=400)
@given(case=dit_like_modules())
def test_transformer_as_graph(case: DiTCase):
    forget_some()
    check_module(case, "eager")


@examples(in_ci=25, in_fuzz=800)
@given(case=dit_like_modules())
def test_transformer_op_by_op(case: DiTCase):
    check_module(case, "op_by_op")


@pytest.mark.long
@examples(in_ci=1, in_fuzz=40)
@given(case=dit_like_modules())
def test_transformer_compiled(case: DiTCase):
    forget_some()
    check_module(case, "inductor")


@pytest.mark.long
@examples(in_ci=2, in_fuzz=100)
@given(case=dit_like_modules(), regions=st.sampled_from((Block, "auto")))
def test_transformer_in_regions(case: DiTCase, regions: Any):
    forget_some()
    check_module(case, "eager", regions=regions)


@pytest.mark.long
@examples(in_ci=2, in_fuzz=100)
@given(case=dit_like_modules())
def test_transformer_with_other_layouts(case: DiTCase):
    forget_some()
    with perturbed():
        check_module(case, "eager")


@pytest.mark.long
@examples(in_ci=100, in_fuzz=2000)
@given(graph=op_graphs(), with_grad=st.booleans())
def test_program_op_by_op(graph: Graph, with_grad: bool):
    check_graph(graph, ["op_by_op"], with_grad)


@pytest.mark.long
@examples(in_ci=30, in_fuzz=6000)
@given(graph=op_graphs(), with_grad=st.booleans(), perturb=st.booleans())
def test_program_on_three_backends(graph: Graph, with_grad: bool, perturb: bool):
    forget_some()
    check_graph(graph, ["op_by_op", "eager", "regions"], with_grad, perturb)


@pytest.mark.long
@examples(in_ci=10, in_fuzz=1700)
@given(graph=op_graphs(max_steps=4, numbers=True), with_grad=st.booleans())
def test_program_that_reads_numbers(graph: Graph, with_grad: bool):
    forget_some()
    check_graph(graph, ["op_by_op", "eager", "regions"], with_grad)


@pytest.mark.long
@examples(in_ci=3, in_fuzz=300)
@given(graph=op_graphs(), with_grad=st.booleans(), perturb=st.booleans())
def test_program_compiled(graph: Graph, with_grad: bool, perturb: bool):
    forget_some()
    check_graph(graph, ["inductor"], with_grad, perturb)
