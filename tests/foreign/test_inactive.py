"""Calls that no tangent reaches stay those of the package, where Dynamo can trace it: the primal is the user's."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import jvpgraph
from tests.foreign.plain import plain
from tests.foreign.stand_ins import INSTALL
from tests.foreign.test_swaps import C, D, H

pytestmark = [pytest.mark.slow, pytest.mark.sampled(3)]
PACKAGES = ("flash_attn", "flash_attn_interface", "sageattention", "natten", "xformers")


@pytest.fixture
def packages(monkeypatch):
    for install in INSTALL.values():
        install(monkeypatch)
    return importlib.import_module


class WithText(nn.Module):
    """Tokens attend to themselves and to a text, which has attended to itself; how, mix says."""

    def __init__(self, attention, mix):
        super().__init__()
        torch.manual_seed(0)
        self.of_text, self.of_tokens = nn.Linear(C, 3 * H * D), nn.Linear(C, 3 * H * D)
        self.attention, self.mix = attention, mix

    def forward(self, x, text):
        q, k, v = self.of_tokens(x).unflatten(-1, (3, H, D)).unbind(2)
        parts = self.of_text(text).unflatten(-1, (3, H, D)).unbind(2)
        text = self.mix(self.attention, q, *parts)
        return self.attention(q, torch.cat([k, text], 1), torch.cat([v, text], 1)).flatten(2)


def alone(attention, x, q, k, v):
    return attention(q, k, v)


def in_a_checkpoint(attention, x, q, k, v):
    return checkpoint(lambda *qkv: attention(*qkv), q, k, v, use_reentrant=False)


def written_later(attention, x, q, k, v):
    """The result and not what it is made of."""
    o = attention(q, k, v).clone()
    o[:, :1] += x[:, :1]
    return o


def next_to_an_active_one(attention, x, q, k, v):
    """In one body: one reached by a tangent, one not."""

    def both(x, q, k, v):
        return attention(x[:, :3], k, v) + attention(q, k, v)

    return checkpoint(both, x, q, k, v, use_reentrant=False)


def by_a_query(attention, x, q, k, v):
    return attention(x[:, :3], k, v)


def by_a_value(attention, x, q, k, v):
    return attention(q, k, v + x[:, :1])


def in_place(attention, x, q, k, v):
    """A view of keys is written to."""
    k = k.clone()
    first = k[:, 0]
    first.add_(x[:, 0])
    return attention(q, k, v)


def by_a_variable_of_a_body(attention, x, q, k, v):
    """Which the body reads without being given it."""
    return checkpoint(lambda q, k: attention(q, k, v + x[:, :1]), q, k, use_reentrant=False)


LEFT = {alone: 1, in_a_checkpoint: 1, written_later: 1, next_to_an_active_one: 1}
SWAPPED = (by_a_query, by_a_value, in_place, by_a_variable_of_a_body)


def compare(mix, theirs, backend="eager", differentiable=False):
    """With the exact attention, at two sizes: (how many calls are ours, how many nodes there are of ops of theirs)."""
    net, exact = WithText(theirs, mix), WithText(plain, mix).double()
    dual = jvpgraph.transform(
        net, backend=backend, differentiable_tangent=differentiable, config=jvpgraph.Config(keep_graphs=True)
    )
    for batch, n, m in ((2, 6, 3), (3, 8, 3)):
        x, x_dot, text = torch.randn(batch, n, C), torch.randn(batch, n, C), torch.randn(batch, m, C)
        double, dot = (x.double(), text.double()), x_dot.double()
        wanted, wanted_dot = torch.func.jvp(lambda x, text=double[1]: exact(x, text), double[:1], (dot,))
        total = wanted_dot.square().sum() if differentiable else exact(*double).square().sum()  # checkpoints: no jvp
        y, y_dot = dual(x, text, tangents={"x": x_dot})
        grads = torch.autograd.grad((y_dot if differentiable else y).square().sum(), tuple(net.parameters()))
        exact_grads = torch.autograd.grad(total, tuple(exact.parameters()))
        for a, b in zip((y, y_dot, *grads), (wanted, wanted_dot, *exact_grads), strict=True):
            assert (a - b).abs().max() <= 5e-5 * max(1, b.abs().max())
    found = {(len(r.swapped), r.graphs[-1].text.count("_flash_attn_forward.default(")) for r in dual.reports}
    assert len(found) == 1
    return found.pop()


@pytest.mark.long
@pytest.mark.parametrize("mix", [*LEFT, *SWAPPED])
def test_what_no_tangent_reaches_is_left_alone(packages, mix):
    ours, theirs = compare(mix, packages("flash_attn").flash_attn_func)
    assert ours == (2 if mix in SWAPPED or mix is next_to_an_active_one else 1)
    assert theirs == LEFT.get(mix, 0)


@pytest.mark.long
@pytest.mark.parametrize("mix", [alone, in_a_checkpoint])
def test_flash_attn_3(packages, mix):
    ours, theirs = compare(mix, packages("flash_attn_interface").flash_attn_func)
    assert (ours, theirs) == (1, 1)


@pytest.mark.long
@pytest.mark.parametrize("mix", [alone, written_later, by_a_query])
def test_gradients_of_tangents(packages, mix):
    """Then all calls are ours."""
    assert compare(mix, packages("flash_attn").flash_attn_func, differentiable=True)[1] == 0


def test_what_dynamo_cannot_trace_is_ours_all_the_same(packages):
    sage = functools.partial(packages("sageattention").sageattn, tensor_layout="NHD")
    assert compare(alone, sage) == (1, 0)


def test_the_logsumexp_of_what_is_left_alone(packages):
    """As the package returns it, without gradients."""
    flash, x = packages("flash_attn").flash_attn_func, torch.randn(1, 6, H, D)
    constants = [torch.randn(1, 6, H, D, requires_grad=True) for _ in range(3)]

    def call(x):
        _, lse, _ = flash(*constants, return_attn_probs=True)
        return x * lse.sum()

    y, _ = jvpgraph.jvp(call, (x,), (x,), backend="eager")
    assert not any(grad.any() for grad in torch.autograd.grad(y.sum(), constants))
    y, _ = jvpgraph.jvp(lambda x: x * flash(*constants), (x,), (x,), backend="eager")
    assert all(grad.any() for grad in torch.autograd.grad(y.sum(), constants))


@pytest.mark.long
def test_a_tensor_that_is_passed_twice(packages):
    """Which Dynamo refuses of an autograd.Function. Both calls are inactive; only active ones are counted as ours."""

    def mix(attention, x, q, k, v):
        return attention(q, k, k) + attention(q, k, v)

    assert compare(mix, packages("flash_attn").flash_attn_func) == (1, 1)


@pytest.mark.long
def test_with_inductor(packages):
    assert compare(alone, packages("flash_attn").flash_attn_func, backend="inductor")[0] == 1
