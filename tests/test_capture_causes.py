"""What networks that people run are full of, and what once kept them from being one graph: each in a small network.

Each is compared with a plain twin, which computes the same without the construct, under torch.func.jvp in float64.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
import threading
import warnings
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import map as map_of_torch
from torch._higher_order_ops import scan, while_loop
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import jvpgraph
from jvpgraph.errors import CaptureError, UnsupportedOp
from tests.models import assert_in_range

WIDTH = 8
NOT_A_LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"  # Dynamo looks
pytestmark = pytest.mark.filterwarnings(NOT_A_LEAF)
log = logging.getLogger("tests.a_network")


class Network(nn.Module):
    """A construct between two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(self.first(x) + t[:, None, None])
        return self.last(self.construct(h, t))

    def construct(self, h: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def plain(self, h: Tensor, t: Tensor) -> Tensor:
        return h.sin()


def wanted(model: Network, x, t, x_dot, t_dot):
    """Value, tangent and gradients of the twin."""
    twin = copy.deepcopy(model).double()
    twin.construct = twin.plain
    x, t, x_dot, t_dot = (y.double() for y in (x, t, x_dot, t_dot))
    with sdpa_kernel(SDPBackend.MATH):
        y, y_dot = torch.func.jvp(lambda x, t: twin(x, t), (x, t), (x_dot, t_dot))
        x = x.requires_grad_()
        grads = torch.autograd.grad(twin(x, t).square().sum(), [x, *twin.parameters()], allow_unused=True)
    return y, y_dot, [torch.zeros(1).double() if g is None else g for g in grads]


def check(model: Network, sizes=(5,), dtype=torch.float64, rtol=1e-9, **settings) -> jvpgraph.DualModule:
    model = model.to(dtype)
    dual = jvpgraph.transform(model, **{"backend": "eager", **settings})
    for n in sizes:
        x, x_dot = torch.randn(2, 2, n, WIDTH, dtype=dtype)
        t, t_dot = torch.rand(2, 2, dtype=dtype)
        want = wanted(model, x, t, x_dot, t_dot)
        x.requires_grad_()
        y, y_dot = dual(x, t, tangents={"x": x_dot, "t": t_dot})
        grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True)
        got = [torch.zeros(1).to(dtype) if g is None else g for g in grads]
        scale = max(g.abs().max().item() for g in want[2])
        assert_close(y.double(), want[0], rtol=rtol, atol=rtol)
        assert_close(y_dot.double(), want[1], rtol=rtol, atol=10 * rtol)
        for g, w in zip(got, want[2], strict=True):
            assert_close(g.double(), w, rtol=rtol, atol=10 * rtol * scale)
    return dual


# ------------------------------------------------------------------------------ sizes that become tensors


class SizesInATensor(Network):
    """Rotary embeddings by a grid of sizes, as in video networks."""

    def construct(self, h, t):
        clips = [y.reshape(-1, 1, 1, WIDTH) for y in h]
        grid = torch.stack([torch.tensor(y.shape[:3], dtype=torch.long) for y in clips])
        angles = torch.arange(16, dtype=torch.float64)[:, None] * torch.linspace(
            0.1, 1, WIDTH // 2, dtype=torch.float64
        )
        turned = []
        for i, (frames, height, width) in enumerate(grid.tolist()):
            length = frames * height * width
            y = torch.view_as_complex(h[i, :length].double().reshape(length, -1, 2))
            turn = torch.polar(torch.ones_like(angles), angles)[:frames].view(frames, 1, 1, -1)
            y = y * turn.expand(frames, height, width, -1).reshape(length, -1)
            turned.append(torch.cat([torch.view_as_real(y).flatten(1), h[i, length:].double()]))
        return torch.stack(turned).to(h.dtype)

    def plain(self, h, t):
        angles = torch.arange(h.shape[1])[:, None] * torch.linspace(0.1, 1, WIDTH // 2, dtype=torch.float64)
        even, odd = h[..., ::2], h[..., 1::2]
        turned = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
        return torch.stack(turned, -1).flatten(-2)


class NumbersOfSizes(Network):
    """Lengths kept in integer tensors and read from them one by one."""

    def construct(self, h, t):
        lengths = torch.tensor([h.size(1)] * h.size(0)).to(h.device)
        h = torch.cat([x[:n] for x, n in zip(h, torch.full((len(h),), h.size(1)))]).view(h.shape)
        return torch.stack([h[i, : n.item()].sin() for i, n in enumerate(lengths)]) * int(lengths[0])

    def plain(self, h, t):
        return h.sin() * h.shape[1]


# --------------------------------------------------------------------- Functions that recompute what they ran


class Recomputes(torch.autograd.Function):
    """The checkpoint of OpenAI's networks: it calls torch.autograd.grad in its backward."""

    @staticmethod
    def forward(ctx, run, length, *args):
        ctx.run, ctx.inputs, ctx.parameters = run, list(args[:length]), list(args[length:])
        with torch.no_grad():
            return ctx.run(*ctx.inputs)

    @staticmethod
    def backward(ctx, *grads):
        ctx.inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            out = ctx.run(*[x.view_as(x) for x in ctx.inputs])
        found = torch.autograd.grad(out, ctx.inputs + ctx.parameters, grads, allow_unused=True)
        del ctx.inputs, ctx.parameters
        return None, None, *found


class ChecksInItsOwnWay(Network):
    def construct(self, h, t):
        return Recomputes.apply(self.inner, 1, h, *self.inner.parameters())

    def plain(self, h, t):
        return self.inner(h)


class DifferentiatesInside(Network):
    """A score that is the gradient of an energy."""

    def construct(self, h, t):
        with torch.enable_grad():
            y = h * 1
            energy = self.inner[0](y).sin().sum() + y.pow(3).sum()
            return torch.autograd.grad(energy, y, create_graph=True)[0]

    def plain(self, h, t):
        return self.inner[0](h).cos() @ self.inner[0].weight + 3 * h**2


# -------------------------------------------------------------------------------------- compiled parts, contexts


class CompiledMethod(Network):
    @torch.compile
    def construct(self, h, t, scale=2.0, eps=1e-5):
        return F.layer_norm(h, (WIDTH,), eps=eps) * scale

    def plain(self, h, t):
        return F.layer_norm(h, (WIDTH,)) * 2


class OldContext(Network):
    def construct(self, h, t):
        with torch.backends.cuda.sdp_kernel(enable_flash=True, enable_math=True, enable_mem_efficient=False):
            return F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0]

    def plain(self, h, t):
        return F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0]


class Encoder(Network):
    """With a mask that is causal, without saying so."""

    def __init__(self, **how):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, 0.0, "gelu", batch_first=True)
        self.encoder, self.how = nn.TransformerEncoder(layer, 1), how

    def construct(self, h, t):
        n = h.shape[1]
        how = {"mask": nn.Transformer.generate_square_subsequent_mask(n, dtype=h.dtype)} if "mask" in self.how else {}
        if "padding" in self.how:
            how["src_key_padding_mask"] = torch.arange(n).expand(len(h), -1) >= n - 2
        return self.encoder(h, **how)

    plain = construct


class Decoder(Network):
    def __init__(self):
        super().__init__()
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(WIDTH, 2, WIDTH, 0.0, "gelu", batch_first=True), 1
        )

    def construct(self, h, t):
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1], dtype=h.dtype)
        return self.decoder(h, h * t[:, None, None], tgt_mask=mask)

    plain = construct


# --------------------------------------------------------------------------------------------------- messages


class Prints(Network):
    def construct(self, h, t):
        print("shape", h.shape, flush=True)
        print(f"mean {h.mean()}")
        return h.sin()


class Warns(Network):
    def construct(self, h, t):
        warnings.warn("this argument is deprecated", FutureWarning, stacklevel=2)
        return h.sin()


class Logs(Network):
    def construct(self, h, t):
        log.warning("a network says %s", "hello")
        if log.isEnabledFor(logging.DEBUG):
            log.debug("mean %s", h.mean())
        logging.getLogger(__name__).info("shape %s", h.shape)
        return h.sin()


# -------------------------------------------------------------------------------------------------- Python's own


class ImportsInForward(Network):
    def construct(self, h, t):
        try:
            from a_package_that_is_not_there import attention
        except ImportError:
            import math

            return h.sin() * math.pi / math.pi
        return attention(h)


class AssertsWithTensors(Network):
    def construct(self, h, t):
        assert_in_range(h, t)
        return h.sin()


class Options(dict):
    """As easydict and others have it; an option that is not there is None."""

    __getattr__ = dict.get


class OwnAttributes(dict):
    def __init__(self, **options):
        super().__init__(**options)
        self.__dict__ = self


class OptionsInADict(Network):
    def __init__(self):
        super().__init__()
        self.options, self.others = Options(scale=2.0, inner=OwnAttributes(act="sin")), {"shift": 1.0}

    def construct(self, h, t):
        if self.options.dropout is None and "act" in self.options.inner:
            h = getattr(torch, self.options.inner.act)(h)
        return torch.add(h * self.options.scale, self.others["shift"])

    def plain(self, h, t):
        return h.sin() * 2 + 1


class Caches(Network):
    """Under a lock, which functools.cached_property is too in older versions of Python."""

    def __init__(self):
        super().__init__()
        self.lock = threading.RLock()

    @functools.cached_property
    def scale(self):
        return len(self.inner) ** 0.5

    def construct(self, h, t):
        with self.lock:
            return h.sin() * self.scale

    def plain(self, h, t):
        return h.sin() * 3**0.5

    def __deepcopy__(self, memo):  # locks have no copies
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        return twin


class Sequence(Network):
    def construct(self, h, t):
        h = checkpoint_sequential(self.inner, 2, h, use_reentrant=False)
        return checkpoint_sequential(list(self.inner), 3, input=h, use_reentrant=True)

    def plain(self, h, t):
        return self.inner(self.inner(h))


class Keeps(Network):
    """Blocks under a checkpoint that keep what they made: a table that grows, scores, features for a loss."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(0, WIDTH), persistent=False)
        self.features: list = []
        self.scores = None

    def block(self, h):
        if len(self.table) < h.shape[1]:
            self.register_buffer("table", angles(h).cos(), persistent=False)
        self.scores = torch.softmax(h @ h.mT, dim=-1)
        self.features.append(self.inner(self.scores @ h))
        return self.features[-1] * self.table[: h.shape[1]]

    def construct(self, h, t):
        h = checkpoint(self.block, h, use_reentrant=False)
        h = h + self.features.pop().sin() * self.scores.square().sum(-1, keepdim=True)
        self.scores = None
        return h

    def plain(self, h, t):
        scores = torch.softmax(h @ h.mT, dim=-1)
        features = self.inner(scores @ h)
        return features * angles(h).cos() + features.sin() * scores.square().sum(-1, keepdim=True)


def angles(h: Tensor) -> Tensor:
    return torch.arange(h.shape[1])[:, None] * torch.linspace(0.1, 1, WIDTH, dtype=h.dtype)


class Recurrent(Network):
    def __init__(self):
        super().__init__()
        self.steps = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)

    def construct(self, h, t):
        y, last = self.steps(h)
        return y + last.mean((0, 2))[:, None, None]

    plain = construct


CONSTANTS: dict = {}


def constant_like(like: Tensor, value) -> Tensor:
    """A constant that is made once, as in EDM2's networks."""
    value = np.asarray(value)
    key = (value.shape, value.dtype, value.tobytes(), like.dtype, like.device)
    found = CONSTANTS.get(key)
    if found is None:
        found = CONSTANTS[key] = torch.as_tensor(value.copy(), dtype=like.dtype, device=like.device)
    return found


class ConstantsOfNumpy(Network):
    def construct(self, h, t):
        scale = constant_like(h, np.sqrt(0.5)) * torch.as_tensor(np.float32(0.5), dtype=h.dtype, device=h.device)
        return h.sin() * scale + h * constant_like(h, [0.5] * WIDTH)

    def plain(self, h, t):
        return h.sin() * 0.5**1.5 + h * 0.5


class OwnJvp(torch.autograd.Function):
    """A rounding with a straight-through tangent."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot.clone()


class StraightThrough(Network):
    def construct(self, h, t):
        return OwnJvp.apply(h)

    def plain(self, h, t):
        return h + ((8 * h).round() / 8 - h).detach()


# ----------------------------------------------------------------------------------------- higher-order ops


class Branch(Network):
    """Of which one branch stops a tangent, and both hold parameters."""

    def construct(self, h, t):
        def yes(h, t):
            return self.inner(h).sin(), t.detach() * 2

        def no(h, t):
            return h.cos(), t * 3

        y, s = torch.cond(t.sum() > -1, yes, no, (h, t))
        return y + s[:, None, None]

    def plain(self, h, t):
        return self.inner(h).sin() + 2 * t.detach()[:, None, None]


class Scan(Network):
    def construct(self, h, t):
        def step(carried, x):
            new = torch.tanh(carried * 0.9 + x @ self.inner[0].weight)
            return new, new * 2

        return scan(step, torch.zeros_like(h[:, 0]), h.transpose(0, 1))[1].transpose(0, 1)

    def plain(self, h, t):
        carried, outs = torch.zeros_like(h[:, 0]), []
        for i in range(h.shape[1]):
            carried = torch.tanh(carried * 0.9 + h[:, i] @ self.inner[0].weight)
            outs.append(carried * 2)
        return torch.stack(outs, 1)


class Map(Network):
    def construct(self, h, t):
        return map_of_torch(lambda x, w: torch.sin(x @ w), h, self.inner[0].weight)

    def plain(self, h, t):
        return torch.sin(h @ self.inner[0].weight)


class WhileLoop(Network):
    def construct(self, h, t):
        start = torch.zeros((), dtype=torch.long), h
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, torch.sin(y) * 1.1), start)[1]

    def plain(self, h, t):
        for _ in range(3):
            h = torch.sin(h) * 1.1
        return h


class Repeated(Network):
    """Blocks under nested_compile_region, with attention in them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2)])

    def plain(self, h, t):
        for block in self.blocks:
            h = a_block(block, h, t)
        return h

    def construct(self, h, t):
        for block in self.blocks:
            h = a_region(block, h, t)
        return h


def a_block(block, h, t):
    h = F.layer_norm(h, (WIDTH,)) * (1 + t[:, None, None])
    q, k, v = block(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return h.sin() + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


a_region = torch.compiler.nested_compile_region(a_block)


ONE_GRAPH = {
    "cond": Branch,
    "scan": Scan,
    "map": Map,
    "while_loop": WhileLoop,
    "nested_compile_region": Repeated,
    "a shape through tolist": SizesInATensor,
    "numbers of a tensor of sizes": NumbersOfSizes,
    "a Function that calls autograd.grad in its backward": ChecksInItsOwnWay,
    "autograd.grad in forward": DifferentiatesInside,
    "a method under torch.compile": CompiledMethod,
    "sdp_kernel": OldContext,
    "an encoder with a mask": functools.partial(Encoder, mask=True),
    "an encoder with padding": functools.partial(Encoder, padding=True),
    "a decoder with a mask": Decoder,
    "print": Prints,
    "logging": Logs,
    "imports in forward": ImportsInForward,
    "asserts on tensors": AssertsWithTensors,
    "constants of numpy": ConstantsOfNumpy,
    "a Function with its own jvp": StraightThrough,
    "dictionaries with attributes": OptionsInADict,
    "cached properties and locks": Caches,
    "checkpoint_sequential": Sequence,
    "what is kept under a checkpoint": Keeps,
    "a recurrent layer": Recurrent,
}


KEEP = ("checkpoint_sequential", "what is kept under a checkpoint")
HIGHER_ORDER = ("cond", "scan", "map", "while_loop", "nested_compile_region")
SIZED = (*HIGHER_ORDER, "a shape through tolist", "numbers of a tensor of sizes", "constants of numpy", *KEEP)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("cause", ONE_GRAPH)
def test_is_one_graph(cause):
    check(ONE_GRAPH[cause](), sizes=(5, 7) if cause in SIZED else (5,))


@pytest.mark.parametrize("cause", ["an encoder with a mask", "an encoder with padding"])
def test_an_encoder_in_eval_which_has_a_fast_path_of_its_own(cause):
    check(ONE_GRAPH[cause]().eval())


@pytest.mark.parametrize("cause", ["a shape through tolist", "numbers of a tensor of sizes"])
def test_sizes_stay_symbolic_on_their_way_through_a_tensor(cause):
    dual = check(ONE_GRAPH[cause](), sizes=(5, 7, 6), dynamic=True)
    assert len(dual.reports) == 1


@pytest.mark.parametrize("cause", ["a shape through tolist", "print", "constants of numpy", KEEP[1], *HIGHER_ORDER])
def test_op_by_op(cause):
    check(ONE_GRAPH[cause](), backend="op_by_op")


@pytest.mark.long
@pytest.mark.parametrize(
    "cause",
    [
        *("a Function that calls autograd.grad in its backward", "a shape through tolist"),
        *("numbers of a tensor of sizes", "nested_compile_region", "asserts on tensors", "scan", "cond", *KEEP),
    ],
)
def test_on_the_default_backend(cause):
    check(ONE_GRAPH[cause](), dtype=torch.float32, rtol=2e-5, backend="inductor")


@pytest.mark.parametrize("cause", [name for name in HIGHER_ORDER if name != "nested_compile_region"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"differentiable_tangent": True},
            r"(?s)a higher-order op, whose tangent has no gradients.*without differentiable_tangent",
        ),
        ({"tangents_batched": True}, r"(?s)takes one tangent at a time.*Call once for each tangent"),
    ],
    ids=("gradients of tangents", "several tangents"),
)
def test_what_higher_order_ops_do_not_do_is_refused(cause, settings, message):
    x, t = torch.randn(1, 2, 5, WIDTH), torch.rand(2)
    x = x if "tangents_batched" in settings else x[0]
    dual = jvpgraph.transform(ONE_GRAPH[cause](), backend="eager", **settings)
    with pytest.raises(UnsupportedOp, match=message):
        dual(x.view(2, 5, WIDTH), t, tangents={"x": x})


@pytest.mark.long
@pytest.mark.sampled(3)
@pytest.mark.parametrize("cause", ["while_loop", "cond", "scan"])
def test_bfloat16_at_several_sizes_on_the_default_backend(cause):
    check(ONE_GRAPH[cause](), sizes=(5, 7), dtype=torch.bfloat16, rtol=4e-2, backend="inductor", dynamic=True)


@pytest.mark.long
def test_repeated_bodies_have_gradients_of_tangents_and_take_several():
    """As they are where they are written out."""
    model, twin = Repeated().double(), Repeated().double()
    twin.construct = twin.plain
    x, t, dots = torch.randn(2, 5, WIDTH).double(), torch.rand(2).double(), torch.randn(3, 2, 5, WIDTH).double()
    how = {"backend": "eager", "differentiable_tangent": True, "tangents_batched": True}
    for network in (model, twin):
        jvpgraph.transform(network, **how)(x, t, tangents={"x": dots})[1].square().sum().backward()
    for a, b in zip(model.blocks.parameters(), twin.blocks.parameters(), strict=True):
        assert a.grad.abs().max() > 0
        assert_close(a.grad, b.grad)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_repeated_bodies_stay_bodies_where_no_gradients_are_needed(backend):
    """And attention in them is one kernel with its tangent."""
    model = Repeated().requires_grad_(False)
    dual = jvpgraph.transform(model.float(), backend=backend, config=jvpgraph.Config(keep_graphs=True))
    x, x_dot = torch.randn(2, 2, 5, WIDTH)
    t = torch.rand(2)
    y, y_dot = dual(x, t, tangents={"x": x_dot})
    want = wanted(model.requires_grad_(), x, t, x_dot, torch.zeros(2))
    assert_close(y.double(), want[0], rtol=1e-5, atol=1e-5)
    assert_close(y_dot.double(), want[1], rtol=1e-5, atol=1e-5)
    (report,) = dual.reports
    text = next(graph.text for graph in reversed(report.graphs) if graph.name == "fuse_attention")

    torch._dynamo.reset()  # a graph that a cache knows is shown as well
    again = jvpgraph.transform(model, backend=backend, config=jvpgraph.Config(keep_graphs=True))
    again(x, t, tangents={"x": x_dot})
    assert {graph.name for graph in again.reports[0].graphs} == {graph.name for graph in report.graphs}
    assert text.count("invoke_subgraph(") == 2
    assert report.fused == 1


# ------------------------------------------------------------------------------------------ what is said, and when


def test_a_message_is_said_once_while_the_model_is_captured(capsys, caplog):
    with caplog.at_level(logging.INFO):
        dual = jvpgraph.transform(Logs(), backend="eager")
        for _ in range(2):
            dual(torch.randn(2, 5, WIDTH), torch.rand(2), tangents={"t": torch.ones(2)})
    assert [r.getMessage() for r in caplog.records if r.name == log.name] == ["a network says hello"]
    dual = jvpgraph.transform(Prints(), backend="eager")
    for _ in range(2):
        dual(torch.randn(2, 5, WIDTH), torch.rand(2), tangents={"t": torch.ones(2)})
    assert capsys.readouterr().out == "shape torch.Size([2, 5, 8])\n"


def test_a_warning_of_the_models_is_given_where_it_stands():
    dual = jvpgraph.transform(Warns(), backend="eager")
    call = functools.partial(dual, torch.randn(2, 5, WIDTH), torch.rand(2), tangents={"t": torch.ones(2)})
    with pytest.warns(FutureWarning, match="deprecated") as given:
        call()
    assert given[0].filename == __file__
    call()


def test_a_warning_that_is_an_error_is_raised():
    dual = jvpgraph.transform(Warns(), backend="op_by_op")
    with pytest.raises(FutureWarning, match="deprecated"):  # as all warnings are, in tests
        dual(torch.randn(2, 5, WIDTH), torch.rand(2), tangents={"t": torch.ones(2)})


def test_an_assertion_that_fails_still_fails():
    dual = jvpgraph.transform(AssertsWithTensors(), backend="eager")
    dual(torch.randn(2, 5, WIDTH), torch.rand(2), tangents={"t": torch.ones(2)})
    with pytest.raises(RuntimeError, match="assertion failed in assert_in_range, line"):
        dual(torch.randn(2, 5, WIDTH), -torch.rand(2), tangents={"t": torch.ones(2)})


def test_what_dynamo_is_taught_does_not_outlive_a_call():
    before = torch.backends.cuda.sdp_kernel, sys.modules["torch._subclasses.fake_tensor"].CONSTANT_NUMEL_LIMIT
    check(OldContext())
    assert before == (
        torch.backends.cuda.sdp_kernel,
        sys.modules["torch._subclasses.fake_tensor"].CONSTANT_NUMEL_LIMIT,
    )


def test_sizes_that_were_changed_in_the_tensor_are_not_taken_for_what_they_were():
    class Changed(Network):
        def construct(self, h, t):
            sizes = torch.tensor([h.size(1), 2])
            sizes[0] -= 1
            sizes.mul_(2)
            n, k = sizes.tolist()
            return h.sin() * n + k

        def plain(self, h, t):
            return h.sin() * 2 * (h.shape[1] - 1) + 4

    check(Changed())
    check(Changed(), backend="op_by_op")


# ------------------------------------------------------------------------------------------ what stays refused


class Branches(Network):
    def construct(self, h, t):
        if torch.isnan(h).any():
            raise ValueError("not a number")
        return self.inner(h)

    def plain(self, h, t):
        return self.inner(h)


def test_a_branch_on_data_is_no_graph_and_runs_in_regions():
    with pytest.raises(CaptureError) as refused:
        check(Branches())
    what, why, _, where, code, remedy = str(refused.value).splitlines()
    assert what == "the model cannot be captured as one graph: Data-dependent branching"
    assert "`if my_tensor.sum() > 0:`" in why
    assert where.endswith(", in construct")
    assert "test_capture_causes.py" in where
    assert code == "  if torch.isnan(h).any():"
    assert remedy.startswith('Use transform(model, regions="auto")')
    assert "Developer debug context" in str(refused.value.__cause__)
    dual = check(Branches(), regions="auto")
    assert "test_capture_causes.py" in dual.regions.reason
    assert dual.regions.op_by_op is None  # all of the first call went into compiling
    dual(torch.randn(2, 5, WIDTH).double(), torch.rand(2).double(), tangents={"t": torch.ones(2).double()})
    assert 0 < dual.regions.op_by_op < 1
    assert " % of the time of the last call\n  for one graph: choose by torch.where" in str(dual.regions).replace(
        "%", " %"
    )


def test_what_is_kept_by_a_checkpoint_inside_another_is_refused():
    class KeepsInside(Keeps):
        def construct(self, h, t):
            h = checkpoint(lambda h: checkpoint(self.block, h, use_reentrant=False), h, use_reentrant=False)
            return h + self.features.pop()

    with pytest.raises(CaptureError, match=r"under a checkpoint inside another.*: return it from there"):
        check(KeepsInside())


class NoBackward(Network):
    """An op of another library's that the compiler cannot trace."""

    def construct(self, h, t):
        return h + float(str(t.sum().item()))

    def plain(self, h, t):
        return h + t.sum().detach()


def test_what_dynamo_does_not_know_is_named_with_its_line():
    with pytest.raises(CaptureError, match=r"(?s)one graph: .{10,300}test_capture_causes.{10,300}float\(str\(t\.sum"):
        check(NoBackward())


# -------------------------------------------------------------------------------- flex_attention between graphs


class FlexBehindABranch(Network):
    """Of which only parts can be graphs, and attention is in none of them."""

    def construct(self, h, t):
        if t.sum() > 100:
            return h.cos()
        n = h.shape[1]
        block_mask = create_block_mask(causal, None, None, n, n, device="cpu")
        steady = flex_attention(*[self.inner[0].weight[None, None]] * 3)[0]  # of parameters alone
        return flex_attention(h[:, None], h[:, None].sin(), h[:, None], block_mask=block_mask)[:, 0] + steady.mean()

    def plain(self, h, t):
        weight = self.inner[0].weight[None, None]
        steady = F.scaled_dot_product_attention(weight, weight, weight).mean()
        y = F.scaled_dot_product_attention(h[:, None], h[:, None].sin(), h[:, None], is_causal=True)
        return y[:, 0] + steady


def causal(b, h, q, k):
    return q >= k


FLEX_WAYS = [{"backend": "op_by_op"}, {"regions": "auto"}, {"regions": nn.Sequential}]
flex = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@pytest.mark.long
@pytest.mark.sampled(1)
@flex
@pytest.mark.parametrize(
    "settings", [{"backend": "op_by_op"}, {"regions": "auto"}, {"regions": nn.Sequential}], ids=str
)
def test_flex_attention_outside_of_graphs_is_a_graph_of_its_own(settings):
    check(FlexBehindABranch(), sizes=(5, 7), **settings)


@flex
def test_what_the_functions_of_flex_attention_hold_has_no_tangent_unseen():
    class Biased(Network):
        def construct(self, h, t):
            bias = h[0, 0, 0]
            return flex_attention(h[:, None], h[:, None], h[:, None], score_mod=lambda s, *_: s + bias)[:, 0]

    with pytest.raises(UnsupportedOp, match=r"reads a tensor with a tangent.*region that contains"):
        check(Biased(), backend="op_by_op")


@flex
def test_the_logsumexp_of_flex_attention_is_refused_where_it_is_used():
    class LogSumExp(Network):
        def construct(self, h, t):
            return (
                flex_attention(h[:, None], h[:, None], h[:, None], return_aux=AuxRequest(lse=True))[1].lse[
                    :, 0, :, None
                ]
                + h
            )

    with pytest.raises(UnsupportedOp, match=r"logsumexp and the maximum of flex_attention have no tangent"):
        check(LogSumExp(), backend="op_by_op")


# ------------------------------------------------------------------------------ arguments, outputs, what is kept


class Encoding(UserDict):
    """A mapping that is no dict, with its items as attributes, as tokenizers return them."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError as error:
            raise AttributeError(name) from error


@dataclass
class Conditions:
    time: Tensor


CONTAINERS = {
    "a UserDict": lambda t: Encoding({"time": t}),
    "a defaultdict": lambda t: defaultdict(list, time=t),
    "an OrderedDict": lambda t: OrderedDict(time=t),
    "a dataclass": Conditions,
}


@pytest.mark.parametrize("backend", ["eager", "op_by_op"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_mappings_as_arguments_and_outputs(container, backend):
    class InAMapping(nn.Module):
        def forward(self, x, conditions):
            time = conditions.time if isinstance(conditions, (Encoding, Conditions)) else conditions["time"]
            return CONTAINERS[container](x.sin() * time)

    x, t = torch.randn(3).double(), torch.rand(3).double()
    dual = jvpgraph.transform(InAMapping(), backend=backend)
    out, out_dot = dual(x, CONTAINERS[container](t), tangents={"x": x, "conditions.time": t})
    want = torch.func.jvp(lambda x, t: x.sin() * t, (x, t), (x, t))
    assert type(out) is type(out_dot)
    got = [found.time if container == "a dataclass" else found["time"] for found in (out, out_dot)]
    assert_close(tuple(got), want)


KEPT: dict = {}


class KeepsWhatItMade(Network):
    """A table that is made at the first call, which may have been one of torch.func.jvp."""

    def construct(self, h, t):
        if "table" not in KEPT:
            KEPT["table"] = torch.ones_like(h[0, 0]) * torch.linspace(0, 1, WIDTH, dtype=h.dtype)
        return h.sin() * KEPT["table"]

    def plain(self, h, t):
        return h.sin() * torch.linspace(0, 1, WIDTH, dtype=h.dtype)


@pytest.mark.parametrize("regions", [None, "auto"])
def test_tensors_that_a_torch_func_jvp_left_behind(regions):
    KEPT.clear()
    model = KeepsWhatItMade().double()
    x, t = torch.randn(2, 5, WIDTH).double(), torch.rand(2).double()
    torch.func.jvp(lambda x, t: model(x, t), (x, t), (x, t))
    check(model, regions=regions)
