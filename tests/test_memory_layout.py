"""Views that count in memory, on inputs that lie in it with an offset or holes; outputs whose elements share memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.testing import assert_close

import jvpgraph
from tests.rounding import cast, dual_answer, eager_answer, errors

BACKENDS = ("op_by_op", "eager", "inductor")
EXACT = {"rtol": 1e-9, "atol": 1e-11}
PLACES = {
    "whole": lambda memory: memory[:5].clone(),
    "the rest unused": lambda memory: memory[:8].clone()[:5],
    "with an offset": lambda memory: memory[3:10].clone()[2:],
    "with holes": lambda memory: memory[:9].clone()[::2],
    "far on": lambda memory: memory[30:35],
    "far on, with holes": lambda memory: memory[31:40:2],
}
RELATIVE = {
    "as_strided": lambda x: x.as_strided((2, 2), (1, 1)) * 2,
    "of a view": lambda x: x[1:].as_strided((2,), (1,)) * 2,
    "of what is computed": lambda x: x.sin().as_strided((3, 2), (1, 1), 1) * 2,
    "of a view of that": lambda x: x.sin()[1:].as_strided((2,), (1,), 0) * 2,
    "of a part of that": lambda x: x.sin().split(2)[1].as_strided((2,), (2,), 1) * 2,
    "of another order": lambda x: torch.outer(x, x.exp()).t().as_strided((3, 3), (2, 1), 1) * 2,
    "unfold": lambda x: x.unfold(0, 2, 1) * 2,
    "unfold as output": lambda x: x.unfold(0, 2, 1),
    "unfold of what is computed": lambda x: x.sin().unfold(0, 3, 1),
    "as_strided as output": lambda x: x.as_strided((2,), (1,)),
    "overlapping as output": lambda x: x.sin().as_strided((3, 2), (1, 1), 1),
    "expand as output": lambda x: x.sin().expand(3, -1),
    "several outputs": lambda x: (x.unfold(0, 2, 1), x[1:], x.sin().unfold(0, 2, 2)),
}
ABSOLUTE = {
    "from the start": lambda x: x.as_strided((3,), (1,), 0) * 2,
    "overlapping": lambda x: x.as_strided((2, 2), (1, 1), 1) * 2,
    "as output": lambda x: x.as_strided((2, 2), (1, 1), 1),
}


def _check(fn, place: str, backend: str) -> None:
    memory = torch.arange(40.0).double() / 7
    x, v = PLACES[place](memory).requires_grad_(), torch.randn(5).double()
    expected = _several(fn(x))
    weights = [torch.randn(y.shape).double() for y in expected]
    (g0,) = torch.autograd.grad(sum((y * w).sum() for y, w in zip(expected, weights)), x)
    dots = _several(torch.func.jvp(fn, (x.detach(),), (v,))[1])
    y, d = map(_several, jvpgraph.jvp(fn, (x,), (v,), backend=backend, dynamic=False))
    assert_close((y, d), (expected, dots), **EXACT)
    (g,) = torch.autograd.grad(sum((a * w).sum() for a, w in zip(y, weights)), x)
    assert_close(g, g0, **EXACT)


def _several(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("view", RELATIVE)
def test_in_graphs(view):
    for place in PLACES:
        _check(RELATIVE[view], place, "eager")


@pytest.mark.long
def test_compiled():
    def all_of_them(x):
        return tuple(part for fn in RELATIVE.values() for part in _several(fn(x)))

    for place in ("with an offset", "with holes"):
        _check(all_of_them, place, "inductor")


@pytest.mark.parametrize("place", ["whole", "the rest unused", "with an offset", "with holes"])
def test_op_by_op(place):
    for fn in (RELATIVE | ABSOLUTE).values():
        _check(fn, place, "op_by_op")


def test_a_small_part_op_by_op():
    """It is copied from a memory that may be large, without what is around it."""
    for view, fn in RELATIVE.items():
        if "as_strided" not in view and view != "of a view":
            _check(fn, "far on, with holes", "op_by_op")
        _check(fn, "far on", "op_by_op")
    for place, fn in (("far on, with holes", RELATIVE["of a view"]), ("far on", ABSOLUTE["from the start"])):
        with pytest.raises(jvpgraph.UnsupportedOp, match=r"test_memory_layout.py:\d+.*pass x.clone\(\)"):
            _check(fn, place, "op_by_op")


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_an_offset_counts_from_the_start_of_the_memory(backend):
    """Dynamo has no guard on where an input begins: a graph for one that is whole is not for one that is not."""
    for view in ("from the start", "as output") if backend == "eager" else ("overlapping",):
        fn = ABSOLUTE[view]
        _check(fn, "whole", backend)
        _check(fn, "the rest unused", backend)
        for place in ("with an offset", "whole", "far on"):
            if place == "whole":
                _check(fn, place, backend)
                torch._dynamo.reset()  # a first call that is refused
            else:
                with pytest.raises(jvpgraph.UnsupportedOp, match=r"test_memory_layout.py:\d+.*pass x.clone\(\)"):
                    _check(fn, place, backend)


def test_outside_of_what_has_a_tangent():
    memory = torch.randn(12).double()
    with pytest.raises(jvpgraph.UnsupportedOp, match=r"test_memory_layout.py:\d+.*beyond what has a tangent"):
        jvpgraph.jvp(lambda x: x.as_strided((4,), (2,)) * 2, (memory[:5],), (memory[:5],), backend="eager")
    expanded = memory[:1].expand(3)
    with pytest.raises(jvpgraph.UnsupportedOp, match="stands for several"):
        jvpgraph.jvp(lambda x: x.as_strided((1,), (1,)) * 2, (expanded,), (memory[:3],), backend="eager")


def test_inputs_that_share_memory():
    """Each has its own tangent, and a view of one reads its own."""
    memory, v, w = torch.randn(6).double(), torch.randn(4).double(), torch.randn(4).double()

    def fn(a, b):
        return a.as_strided((3,), (1,)) * b.unfold(0, 2, 1)[:, 0]

    for backend in ("op_by_op", "eager"):
        _, d = jvpgraph.jvp(fn, (memory[:4], memory[2:]), (v, w), backend=backend)
        assert_close(d, v[:3] * memory[2:5] + memory[:3] * w[:3], **EXACT)


def test_dynamic_sizes():
    """A spectrogram frames its input by as_strided."""

    def fn(x):
        return torch.stft(x, 4, 2, window=torch.ones(4).double(), center=False, return_complex=True).abs().square()

    for backend, n in (("eager", 12), ("eager", 16), ("eager", 21), ("op_by_op", 12)):
        x, v = torch.randn(2 * n).double()[::2], torch.randn(n).double()
        _, d = jvpgraph.jvp(fn, (x,), (v,), backend=backend, dynamic=True)
        assert_close(d, torch.func.jvp(fn, (x,), (v,))[1], **EXACT)


@pytest.mark.parametrize("backend", ["op_by_op", "eager"])
@pytest.mark.parametrize("how", ["expanded", "windows"])
def test_elements_that_share_memory_have_tangents_of_their_own(backend: str, how: str):
    base = torch.arange(6.0, dtype=torch.float64)
    x = base.expand(3, 6) if how == "expanded" else base.unfold(0, 3, 1)
    x_dot = torch.randn(x.shape, dtype=torch.float64)
    _, y_dot = jvpgraph.jvp(torch.sin, (x,), (x_dot,), backend=backend)
    torch.testing.assert_close(y_dot, x.cos() * x_dot)


def _without_gradients(x):
    with torch.no_grad():
        return x.view(-1)


# Outputs that are the input, or made of nothing else.
CONSTANT = {
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "part": lambda x: x[1:].detach(),
    "clone": lambda x: x.clone().detach(),
    "detach_": lambda x: x.clone().detach_(),
    "twice": lambda x: (x.detach(), x.view(-1).detach()),
    "a zero added": lambda x: x.detach() + torch.zeros(3, dtype=x.dtype),
    "beside dead code": lambda x: (x.sin()[torch.tensor([0, 0])].sin(), x.detach())[1],
}
BESIDE = {
    "itself": lambda x: (x.detach(), x),
    "others": lambda x: (x.sin(), x.detach()),
    "a view": lambda x: (x.detach(), x.view(3, 1)),
    "its own": lambda x: (lambda y: (y.detach(), y[1:], y[:2].detach(), _without_gradients(y)))(x.sin()),
    "a view without gradients": lambda x: (_without_gradients(x), x.sin()),
    "itself, by a zero added": lambda x: (lambda y: (y.detach() + torch.zeros(3).double(), y, y * 1))(x.sin()),
    "such a view and itself": lambda x: (_without_gradients(x), x.view(3, 1), _without_gradients(x.sin())),
}


def _gradient(ys: tuple[Tensor, ...], x: Tensor) -> Tensor:
    parts = [(i + 2) * y.cos().sum() for i, y in enumerate(ys) if y.requires_grad]
    (g,) = torch.autograd.grad(torch.stack(parts).sum(), x, allow_unused=True) if parts else (None,)
    return torch.zeros_like(x) if g is None else g


def _same_gradient(fn, backend: str) -> None:
    x, v = torch.randn(3).double().requires_grad_(), torch.randn(3).double()
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            wanted = _several(fn(x))
            ys, dots = map(_several, jvpgraph.jvp(fn, (x,), (v,), backend=backend, dynamic=False))
        assert_close((ys, dots), (wanted, _several(torch.func.jvp(fn, (x.detach(),), (v,))[1])), **EXACT)
        assert all(y is not x for y in ys)
        if recording:
            assert_close(_gradient(ys, x), _gradient(wanted, x), **EXACT)
        else:
            assert not any(y.requires_grad for y in ys)


@pytest.mark.parametrize("kind", CONSTANT | BESIDE)
def test_what_is_detached_has_no_gradient(kind):
    for backend in ("op_by_op", "eager"):
        _same_gradient((CONSTANT | BESIDE)[kind], backend)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [["detach"], ["a view"], list(CONSTANT), list(BESIDE)], ids=str)
def test_what_is_detached_has_no_gradient_compiled(kinds):
    """With nothing else beside it, Inductor's graph has no backward."""
    fns = [(CONSTANT | BESIDE)[kind] for kind in kinds]
    _same_gradient(lambda x: tuple(y for fn in fns for y in _several(fn(x))), "inductor")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_is_one(backend):
    """Inductor drops copies, unless that would make an output of an input; it asks the fake values for that."""
    x, v = torch.randn(3).double(), torch.randn(3).double()
    ys, dots = jvpgraph.jvp(lambda x: (x.clone().detach(), x.view(-1).clone()), (x,), (v,), backend=backend)
    memory = [t.untyped_storage().data_ptr() for t in (x, v, *ys, *dots)]
    assert len(set(memory)) == len(memory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "place"), [(torch.bfloat16, "post"), (torch.float32, "post"), (torch.float32, "pre")]
)
def test_a_pass_that_a_user_has_for_inductor_and_ours_both_run(dtype: torch.dtype, place: str):
    seen: list[fx.Graph] = []
    config = jvpgraph.Config(inductor={f"joint_custom_{place}_pass": seen.append})
    for n in (3, 5):
        x = torch.randn(n, dtype=dtype).requires_grad_()
        fn = lambda x, n=n: (lambda y: (y.detach() + torch.zeros(n, dtype=y.dtype), y))(x.sin())  # noqa: E731
        out, out_dot = jvpgraph.jvp(fn, (x,), (torch.ones_like(x),), config=config, dynamic=False)
        torch.testing.assert_close(out_dot[1].to(dtype), x.detach().cos())
        (gradient,) = torch.autograd.grad(out[1].sum(), x)
        torch.testing.assert_close(gradient, x.detach().cos())
    assert seen


class Gated(nn.Module):
    """What most blocks of image models do with tokens that a convolution made, with their channels far apart."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(16, 16), nn.LayerNorm(16, elementwise_affine=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = x + gate * self.layer(x)
        return x + self.norm(x) * gate


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "eps", "sizes"), [(torch.float32, 1e-5, [(2, 16), (3, 32)]), (torch.bfloat16, 2e-2, [(2, 16)])]
)
def test_gradients_of_a_norm_of_what_is_transposed(dtype: torch.dtype, eps: float, sizes: list[tuple[int, int]]):
    """Inductor's own code has gradients that are off by a half here, where the number of tokens is static."""
    net = Gated().to(dtype)
    dual, exact = jvpgraph.transform(net, dynamic=False), copy.deepcopy(net).double()
    for batch, tokens in sizes:
        inputs = cast({"x": torch.randn(batch, 16, tokens).mT, "gate": torch.randn(batch, 1, 16)}, dtype)
        dots = {name: torch.randn_like(x) for name, x in inputs.items()}
        wanted = eager_answer(exact, cast(inputs, torch.float64), cast(dots, torch.float64))
        found = errors(dual_answer(dual, inputs, dots), wanted)
        assert max(found.values()) < eps, found


class SharedModulation(nn.Module):
    """adaLN-single, as of PixArt: a bias and a table have the same sum as their gradient."""

    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(8, 144), nn.Parameter(torch.randn(6, 24))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b, c, d, e, f = (self.table[None] + self.layer(t).reshape(t.shape[0], 6, -1)).chunk(6, dim=1)
        x = torch.tanh(x * (1 + a) + b) * c
        return torch.sin(x * (1 + d) + e) * f


@pytest.mark.long
def test_a_sum_with_two_outputs_in_half_precision():
    """With a batch of any size Inductor's own code, for the plain model too, does not compile."""
    net = SharedModulation().bfloat16()
    dual, exact = jvpgraph.transform(net, dynamic=True), copy.deepcopy(net).double()
    for batch, tokens in [(40, 9), (7, 5)]:
        inputs = cast({"x": torch.randn(batch, tokens, 24), "t": torch.randn(batch, 8)}, torch.bfloat16)
        dots = {name: torch.randn_like(x) for name, x in inputs.items()}
        wanted = eager_answer(exact, cast(inputs, torch.float64), cast(dots, torch.float64))
        found = errors(dual_answer(dual, inputs, dots), wanted)
        assert max(found.values()) < 2e-2, found


class OneScale(nn.Module):
    """One entry of a table for all channels, whose gradient is a sum into one place."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        first = torch.zeros(x.shape[-1], dtype=torch.long)
        return (x * self.table[first + 1]).index_add(-1, first, x)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_into_one_place_by_several_threads(dtype):
    """Inductor's own code, for the plain model too, is not made."""
    net = OneScale().to(dtype)
    dual, exact = jvpgraph.transform(net), copy.deepcopy(net).double()
    for n in (16, 37):
        inputs, dots = {"x": torch.randn(4, n, dtype=dtype)}, {"x": torch.randn(4, n, dtype=dtype)}
        wanted = eager_answer(exact, cast(inputs, torch.float64), cast(dots, torch.float64))
        found = errors(dual_answer(dual, inputs, dots), wanted)
        assert max(found.values()) < (1e-5 if dtype == torch.float32 else 2e-2), found
