"""Random transformers and random programs: value, tangent and gradients in float64 equal PyTorch's own."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DiTCase, Graph, dit_like_modules, normal, op_graphs
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import jvpgraph

pytestmark = pytest.mark.fuzz

TOLERANCE = 1e-9  # relative to the largest entry
RESET_EVERY = 25  # examples between two resets of Dynamo, which keeps every graph
_count = itertools.count(1)


def examples(in_ci: int, share: float = 1.0) -> Callable[[Any], Any]:
    """So many examples in the ci profile, and in others a share of what the profile says."""
    ci = settings.get_current_profile_name() == "ci"
    return settings(max_examples=in_ci if ci else int(share * settings().max_examples))


@dataclass(frozen=True)
class Results:
    """Output leaves, their tangents, and the gradients of a random projection of them (None: unreachable)."""

    values: list[Tensor]
    tangents: list[Tensor]
    gradients: list[Tensor | None]

    def check(self, other: Results) -> None:
        """Raise AssertionError unless ``other`` is the same to 1e-9."""
        for what in ("values", "tangents", "gradients"):
            for i, (wanted, got) in enumerate(zip(getattr(self, what), getattr(other, what), strict=True)):
                if wanted is None or got is None:
                    assert wanted is got or not torch.any(got if wanted is None else wanted), f"{what}, {i}"
                    continue
                atol = TOLERANCE * max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
                torch.testing.assert_close(
                    got, wanted, rtol=0, atol=atol, msg=lambda m, at=f"{what}, {i}": f"{at}: {m}"
                )

    @property
    def finite(self) -> bool:
        found = [*self.values, *self.tangents, *(g for g in self.gradients if g is not None)]
        return all(bool(x.isfinite().all()) for x in found)


def gradients(outs: Sequence[Tensor], wrt: Sequence[Tensor]) -> list[Tensor | None]:
    weighted = [(y * normal(i, tuple(y.shape))).sum() for i, y in enumerate(outs) if y.requires_grad]
    if not weighted or not wrt:
        return [None] * len(wrt)
    return list(torch.autograd.grad(sum(weighted), wrt, allow_unused=True))


def expected(
    fn: Callable[..., Any], inputs: Sequence[Tensor], dots: Sequence[Tensor | None], wrt: Sequence[Tensor]
) -> Results:
    """PyTorch's forward mode and its backward, with the attention that has both in float64."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit.script", DeprecationWarning)  # in torch's own formulas
        with torch.no_grad(), forward_ad.dual_level():
            # Dense, as PyTorch cannot give an expanded tensor a tangent.
            dense = [x.detach().contiguous() for x in inputs]
            duals = [x if d is None else forward_ad.make_dual(x, d) for x, d in zip(dense, dots)]
            pairs = [forward_ad.unpack_dual(y) for y in tree_leaves(fn(*duals))]
            values = [y.primal.clone() for y in pairs]
            tangents = [torch.zeros_like(y.primal) if y.tangent is None else y.tangent.clone() for y in pairs]
        return Results(values, tangents, gradients(tree_leaves(fn(*inputs)), wrt) if wrt else [])


def check_module(case: DiTCase, backend: str, dynamic: bool | None = False) -> None:
    inputs, dots = list(case.inputs.values()), [case.tangents.get(name) for name in case.inputs]
    wrt = list(case.module.parameters())
    dual = jvpgraph.transform(case.module, backend=backend, dynamic=dynamic)
    y, y_dot = dual(**case.inputs, tangents=case.tangents)
    assert not y_dot.requires_grad
    expected(case.module, inputs, dots, wrt).check(Results([y], [y_dot], gradients([y], wrt)))


def check_graph(graph: Graph, backend: str, with_grad: bool) -> None:
    inputs = tuple(x.detach().requires_grad_(with_grad) for x in graph.inputs)
    wrt = inputs if with_grad else ()
    right = expected(graph.fn, inputs, graph.tangents, wrt)
    assume(right.finite)
    out, out_dot = jvpgraph.jvp(graph.fn, inputs, graph.tangents, backend=backend, dynamic=False)
    outs = tree_leaves(out)
    right.check(Results(outs, tree_leaves(out_dot), gradients(outs, wrt)))


def forget_some() -> None:
    if next(_count) % RESET_EVERY == 0:
        torch._dynamo.reset()


@examples(in_ci=8)
@given(case=dit_like_modules())
def test_transformer_as_graph(case: DiTCase):
    forget_some()
    check_module(case, "eager")


@examples(in_ci=25)
@given(case=dit_like_modules())
def test_transformer_op_by_op(case: DiTCase):
    check_module(case, "op_by_op")


@examples(in_ci=2, share=0.05)
@given(case=dit_like_modules())
def test_transformer_compiled(case: DiTCase):
    forget_some()
    check_module(case, "inductor")


@examples(in_ci=60)
@given(graph=op_graphs(), with_grad=st.booleans())
def test_program_as_graph(graph: Graph, with_grad: bool):
    forget_some()
    check_graph(graph, "eager", with_grad)


@examples(in_ci=100)
@given(graph=op_graphs(), with_grad=st.booleans())
def test_program_op_by_op(graph: Graph, with_grad: bool):
    check_graph(graph, "op_by_op", with_grad)


@examples(in_ci=3, share=0.05)
@given(graph=op_graphs(), with_grad=st.booleans())
def test_program_compiled(graph: Graph, with_grad: bool):
    forget_some()
    check_graph(graph, "inductor", with_grad)
