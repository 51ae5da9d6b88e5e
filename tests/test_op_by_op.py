"""Op by op, and so between regions: a tensor whose values come from something with a tangent has one, or raises."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import operator
import pickle
import random
import threading
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops.while_loop import while_loop
from torch.autograd import forward_ad
from torch.masked import masked_tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

import jvpgraph

OURS = (jvpgraph.UnsupportedOp, jvpgraph.CaptureError, ValueError)
NET = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Softmax(-1), nn.Sigmoid()).double()


@torch.jit.script
def modulate(x, s):
    return x * (1 + s) + s


def canary(x):
    """The identity, where no op can be seen."""
    with _disable_current_modes():
        return x.clone()


def canary_into(make):
    def call(x):
        y = make(x)
        with _disable_current_modes():
            y.copy_(x)
        return y * 2

    return call


def by_address(x):
    y = torch.empty_like(x)
    ctypes.memmove(y.data_ptr(), x.data_ptr(), x.numel() * x.itemsize)
    return y * 2


def by_storage(x):
    y = torch.empty_like(x)
    ctypes.memmove(y.untyped_storage().data_ptr(), x.untyped_storage().data_ptr(), x.numel() * x.itemsize)
    return y * 2


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(np.sin(x.numpy()))

    @staticmethod
    def backward(ctx, grad):
        return grad


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file) * 2


def in_a_thread(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(x * 2))
    thread.start()
    thread.join()
    return found[0] + x


def foreach(x):
    xs = [x.clone(), 2 * x]
    torch._foreach_mul_(xs, 3.0)
    torch._foreach_addcmul_(xs, [x, x], [xs[1], x], 0.5)
    return torch.stack(xs)


def list_out(x):
    parts = [torch.empty(2, dtype=x.dtype), torch.empty(2, dtype=x.dtype)]
    torch.split_with_sizes_copy(x * 2, [2, 2], out=parts)
    return torch.stack(parts)


def gradient(x):
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.grad(NET(x).exp().sum(), x, create_graph=True)[0]


def gradient_of_detached(x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(NET(x).exp().sum(), x)[0]


def backward(x):
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        NET(x).sum().backward()
        return x.grad


def jagged(x):
    return torch.nested.nested_tensor_from_jagged(x[:, None], torch.tensor([0, 2, 4]))


def replaced_data(x):
    y = torch.zeros_like(x)
    y.data = x * 3
    return y * 2


def inference(f):
    def call(x):
        with torch.inference_mode():
            return f(x)

    return call


# What leaves where ops can be seen, or comes from there. Each is refused.
def list_in_another_order(x):
    xs = [x.clone(), 2 * x]
    torch._foreach_add_(xs, xs[::-1])
    return xs[1]


REFUSED = {
    "numpy": lambda x: torch.from_numpy(np.sin(x.numpy())),
    "numpy of detached": lambda x: torch.from_numpy(x.detach().numpy() * 2),
    "numpy by itself": lambda x: np.sin(x),
    "asarray of numpy": lambda x: torch.asarray(np.asarray(x) * 2),
    "numbers in an array": lambda x: torch.from_numpy(np.array([float(e) for e in x])),
    "numpy in a function": Numpy.apply,
    "from_dlpack": lambda x: torch.from_numpy(np.from_dlpack(x) * 2),
    "dlpack": lambda x: torch.from_dlpack(x) * 2,
    "dlpack capsule": lambda x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x)) * 2,
    "tensor of tensors": lambda x: torch.tensor([x.sum(), x.sum()]),
    "nested list": lambda x: torch.tensor([[x[0], 1.0], [2.0, x[1]]]),
    "as_tensor": lambda x: torch.as_tensor([x.sum(), x.sum()]),
    "asarray": lambda x: torch.asarray([x.sum(), x.sum()]),
    "new_tensor": lambda x: x.new_tensor([x.sum(), x.sum()]),
    "legacy": lambda x: torch.DoubleTensor([x.sum(), x.sum()]),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "tolist of one": lambda x: x * x.sum().reshape(1).tolist()[0],
    "item": lambda x: x * x.sum().item(),
    "float": lambda x: x * float(x.sum()),
    "full": lambda x: torch.full((2,), x.sum(), dtype=x.dtype),
    "ctypes": by_address,
    "ctypes by storage": by_storage,
    "save": saved,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)) * 2,
    "forking pickler": lambda x: pickle.loads(ForkingPickler.dumps(x)) * 2,
    "deepcopy": lambda x: copy.deepcopy(x) * 2,
    "apply_": lambda x: x.clone().apply_(lambda e: e * 2),
    "map_": lambda x: torch.zeros_like(x).map_(x, lambda _, b: b * 2),
    "thread": in_a_thread,
    "bits as other floats": lambda x: x.view(torch.float32) * 2,
    "bits": lambda x: x.view(torch.int64).clone().view(x.dtype),
    "canary": lambda x: canary(x) * 2,
    "canary as output": canary,
    "canary as parameter": lambda x: nn.Parameter(canary(x)) * 2,
    "canary into empty": canary_into(torch.empty_like),
    "canary into zeros": canary_into(torch.zeros_like),
    "canary into a cast of empty": canary_into(lambda x: torch.empty(x.shape).to(x.dtype)),
    "jagged": lambda x: jagged(x).values() * 2,
    "jagged, an op": lambda x: (jagged(x) * 2).values(),
    "strided nested": lambda x: torch.nested.nested_tensor([x[:2], x[2:]]).unbind()[0],
    "masked": lambda x: (masked_tensor(x, x > 0) * 2).to_tensor(0.0),
    "sparse": lambda x: x[:, None].to_sparse().to_dense(),
    "gradient of detached": gradient_of_detached,
    "list in another order": list_in_another_order,
    "random in place": lambda x: F.rrelu(x.clone(), training=True, inplace=True),
}

OWN = (("full", True), ("forking pickler", True))  # refused by PyTorch itself

# Right, with the tangent of finite differences.
RIGHT = {
    "scripted": lambda x: modulate(x, x.sin()),
    "foreach": foreach,
    "list out": list_out,
    "out": lambda x: torch.mul(x, x, out=torch.empty_like(x)),
    "out in another shape": lambda x: torch.kron(x, x, out=x.new_empty(16)),  # seen as (4, 4) before it is written
    "out transposed": lambda x: torch.svd(x.diag() + 1, some=False, out=[x.new_empty(n) for n in ((4, 4), 4, (4, 4))])[
        1
    ],
    "several outs": lambda x: torch.sort(x * 2, out=(torch.empty_like(x), torch.empty(4, dtype=torch.int64)))[0],
    "gradient": gradient,
    "backward": backward,
    "func.grad": lambda x: torch.func.grad(lambda a: NET(a).exp().sum())(x),
    "func.vmap": lambda x: torch.func.vmap(NET)(torch.stack([x, x * 2])),
    "jacrev": lambda x: torch.func.jacrev(NET)(x),
    "checkpoint": lambda x: checkpoint(NET, x, use_reentrant=False),
    "cond": lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
    "while_loop": lambda x: while_loop(lambda i, _: i < 3, lambda i, a: (i + 1, a.sin()), (torch.tensor(0), x))[1],
    "constant of numpy": lambda x: x * torch.from_numpy(np.arange(4.0)) * torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "bits there and back": lambda x: x.view(torch.int64).view(x.dtype) * 2,
    "data of another": replaced_data,
    "printed": lambda x: (repr(x), f"{x.sum():.3f}") and x * 2,
    "empty, ignored": lambda x: torch.baddbmm(x.new_empty(1, 4, 4), x[None, :, None], x[None, None], beta=0),
    "empty, then written": lambda x: torch.stack([y := torch.empty_like(x).copy_(x), y.mul_(2)]),
    "zeros, then added to": lambda x: torch.zeros(8, dtype=x.dtype).index_add_(0, torch.arange(4), x * 2),
    "inference, reshape": inference(lambda x: x.view(2, 2).T.reshape(-1)),
    "inference, contiguous": inference(lambda x: x.view(2, 2).T.contiguous()),
    "inference, flatten": inference(lambda x: x.view(2, 2).T.flatten()),
    "inference, ravel": inference(lambda x: x.view(2, 2).swapaxes(0, 1).ravel()),
    "inference, to": inference(lambda x: x.to(torch.complex128).real * 2),
    "inference, type_as": inference(lambda x: x.type_as(torch.zeros(1, dtype=torch.complex128)).real * 2),
    "inference, a derived rule after": inference(lambda x: F.mse_loss(x.view(2, 2).T.reshape(-1), x * x + 1)),
}


class Wrapped(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.first, self.blocks, self.fn = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), fn

    def forward(self, x):
        for block in self.blocks:
            x = block(x).sin()
        return self.fn(x)


def call(fn, way, x, x_dot):
    """(value, tangent) by one of the ways."""
    if way in ("op_by_op", "eager", "inductor"):
        return jvpgraph.jvp(fn, (x,), (x_dot,), backend=way)
    torch.manual_seed(0)
    dual = jvpgraph.transform(Wrapped(fn).double(), regions=nn.Linear, backend="eager")
    return dual(x, tangents={"x": x_dot})


def differences(fn, x, x_dot, h=1e-6):
    return (fn(x + h * x_dot) - fn(x - h * x_dot)).detach() / (2 * h)


def inputs(seed=0):
    torch.manual_seed(seed)
    return torch.randn(4).double(), torch.randn(4).double()


@pytest.mark.filterwarnings("ignore")  # of nested, masked and sparse tensors, which are prototypes, and of copies
class TestEscapes:
    @pytest.mark.parametrize(
        ("name", "with_grad"), [(n, g) for n in REFUSED for g in (False, True) if (n, g) not in OWN]
    )
    def test_refused(self, name, with_grad):
        x, x_dot = inputs()
        for _ in range(2):
            with pytest.raises(jvpgraph.UnsupportedOp, match=r"test_op_by_op\.py|copy\.py|reduction\.py"):
                call(REFUSED[name], "op_by_op", x.clone().requires_grad_(with_grad), x_dot)

    @pytest.mark.parametrize("name", RIGHT)
    def test_right(self, name):
        x, x_dot = inputs()
        for _ in range(2):
            out, out_dot = call(RIGHT[name], "op_by_op", x, x_dot)
            assert_close(out, RIGHT[name](x))
            assert_close(out_dot, differences(RIGHT[name], x, x_dot), rtol=1e-6, atol=1e-6)
            x, x_dot = inputs(1)

    @pytest.mark.parametrize("name", ["canary", "numpy", "tolist of one", "jagged", "ctypes", "canary into zeros"])
    def test_refused_between_regions(self, name):
        with pytest.raises(jvpgraph.UnsupportedOp, match=r"test_op_by_op\.py"):
            call(REFUSED[name], "regions", *inputs())

    @pytest.mark.parametrize("name", ["scripted", "gradient", "inference, reshape", "foreach", "cond"])
    def test_right_between_regions(self, name):
        x, x_dot = inputs()
        torch.manual_seed(0)
        model = Wrapped(RIGHT[name]).double()
        dual = jvpgraph.transform(model, regions=nn.Linear, backend="eager")
        for _ in range(2):
            out_dot = dual(x, tangents={"x": x_dot})[1]
            assert_close(out_dot, differences(model, x, x_dot), rtol=1e-6, atol=1e-6)


def test_graph_saved_by_autograd_keeps_its_tangent_and_a_stop_stays_one():
    x, x_dot = inputs()
    for stop in (torch.Tensor.detach, torch.detach, lambda x: x.data, torch.ops.aten.detach, lambda x: x.detach_()):
        out_dot = call(lambda x, stop=stop: x + stop(x.sin()), "op_by_op", x, x_dot)[1]
        assert_close(out_dot, x_dot)
    hard = lambda x: F.gumbel_softmax(x, hard=True) * 2  # noqa: E731  a detach in torch's own Python
    torch.manual_seed(0)
    found = call(hard, "op_by_op", x, x_dot)[1]
    torch.manual_seed(0)
    assert_close(found, torch.func.jvp(hard, (x,), (x_dot,))[1])


def written_as_an_array(write):
    def fn(x):
        y = x.clone()
        write(y.detach().numpy())
        return y * x

    return fn


@pytest.mark.parametrize(
    "fn",
    [
        written_as_an_array(lambda a: operator.imul(a, 2)),
        written_as_an_array(lambda a: a.__setitem__(0, 5)),
        written_as_an_array(lambda a: a.sort()),
        written_as_an_array(lambda a: operator.iadd(a.reshape(2, 2).T, 1)),
        lambda x: torch.tensor(x.numpy()) * x,
        lambda x: torch.tensor(np.sin(x.numpy())) * x,
    ],
    ids=["operator", "element", "method", "view", "copied", "copied result"],
)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("way", ["eager", "op_by_op"])
def test_what_numpy_writes_or_copies_is_refused(fn, way):
    with pytest.raises(jvpgraph.UnsupportedOp, match=r"test_op_by_op\.py"):
        call(fn, way, *inputs())


def test_to_graphs_numpy_is_ops_and_a_detached_copy_stops():
    x, x_dot = inputs()
    stopped = lambda x: x * torch.from_numpy(np.sin(x.detach().clone().numpy()))  # noqa: E731
    for way in ("eager", "op_by_op"):
        assert_close(call(stopped, way, x, x_dot)[1], x_dot * x.sin())
    assert_close(call(lambda x: torch.from_numpy(np.sin(x.numpy())), "eager", x, x_dot)[1], x_dot * x.cos())
    detached = lambda x: x * torch.tensor([x.detach().sum(), 2, 3, 4])  # noqa: E731
    y, y_dot = call(detached, "eager", x, x_dot)
    assert_close(y_dot, y / x * x_dot)


def test_detached_copies_may_leave():
    x, x_dot = inputs()
    out_dot = call(lambda x: x * x.detach().clone().numpy().sum() * x.detach().sum().item(), "op_by_op", x, x_dot)[1]
    assert_close(out_dot, x_dot * x.sum() ** 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nearest_exact_in_one_dim(dtype):
    x = torch.randn(1, 2, 5).to(dtype)
    up = lambda x: F.interpolate(x, size=7, mode="nearest-exact")  # noqa: E731
    assert_close(call(up, "op_by_op", x, x * 2)[1], up(x * 2).float())


def test_running_statistics_that_are_read_have_tangents():
    def fn(x):
        mean, var = torch.zeros(2).double(), torch.ones(2).double()
        F.batch_norm(x.view(2, 2), mean, var, training=True)
        return F.batch_norm(x.view(2, 2), mean, var, training=True).sum(1) * mean * var

    x, x_dot = inputs()
    assert_close(call(fn, "op_by_op", x, x_dot)[1], differences(fn, x, x_dot), rtol=1e-6, atol=1e-6)


def test_a_scripted_part_is_no_region():
    parts = [torch.jit.script(nn.Linear(4, 4)), torch.jit.trace(nn.Linear(4, 4), torch.randn(4)), nn.Linear(4, 4)]
    model = nn.Sequential(*parts).double()
    x, x_dot = inputs()
    dual = jvpgraph.transform(model, regions="auto", backend="eager")
    for _ in range(2):
        assert_close(dual(x, tangents={"input": x_dot})[1], torch.func.jvp(model, (x,), (x_dot,))[1])


def test_a_compiled_part_is_seen_or_run_as_it_is():
    part = torch.compile(lambda x: x.sin() * 2, backend="aot_eager")
    x, x_dot = inputs()
    part(x)
    assert_close(call(lambda x: part(x) + x, "op_by_op", x, x_dot)[1], x_dot * (2 * x.cos() + 1))


def views_written(x):
    y = x.clone().view(2, 2)
    y.t()[0][1:].mul_(3)
    y.view(-1)[::2].add_(x[:2])
    return y.reshape(4) * x


def data_replaced_by_storage(x):
    y = torch.empty(0, dtype=x.dtype)
    return y.set_((x * 2).untyped_storage(), 0, (4,), (1,)) * x


def own_leaf(x):
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        return x * torch.autograd.grad((z.sin() * z).sum(), z)[0]


def forward_ad_inside(x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(forward_ad.make_dual(x, torch.ones_like(x)).sin()).tangent


def complex_views(x):
    z = torch.view_as_complex(x.clone().view(2, 2))
    z.mul_(z)
    return x.clone().view(torch.complex128).exp().view(torch.float64) + torch.view_as_real(z).reshape(4)


LENGTHS = torch.tensor([2, 2])
INDEX = torch.tensor([0, 0, 1, 2])
TABLE = torch.arange(8.0).double().view(2, 4).sin()
# What bug reports are about, beyond the kinds above: (function, whether it is refused).
NEIGHBOURS = {
    "views of views": (views_written, False),
    "set_ to a storage": (data_replaced_by_storage, True),
    "set_ to a tensor": (lambda x: torch.empty(0, dtype=x.dtype).set_(x * 2), True),
    "a leaf of its own": (own_leaf, True),
    "forward AD inside": (forward_ad_inside, False),
    "jvp inside": (lambda x: torch.func.jvp(lambda a: a.sin() * a, (x,), (torch.ones_like(x),))[1], False),
    "vjp inside": (lambda x: torch.func.vjp(lambda a: a.sin() * a, x)[1](torch.ones_like(x))[0], False),
    "complex views": (complex_views, False),
    "quantised": (lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8).dequantize() * x, False),
    "fake quantised": (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127), True),
    "normal of a mean": (lambda x: torch.normal(x, 1.0), True),
    "poisson": (lambda x: torch.poisson(x.exp()) + x, True),
    "rsample of a gamma": (lambda x: torch.distributions.Gamma(x.exp(), 1.0).rsample(), True),
    "sparse": (lambda x: torch.sparse.mm(torch.eye(4).double().to_sparse_csr(), x[:, None])[:, 0], True),
    "product of scatter_reduce": (lambda x: torch.ones(4).double().scatter_reduce(0, INDEX, x, "prod"), True),
    "maximum of scatter_reduce": (lambda x: torch.zeros(4).double().scatter_reduce(0, INDEX, x, "amax"), False),
    "index_reduce": (lambda x: torch.ones(4).double().index_reduce(0, INDEX, x, "prod"), True),
    "segment_reduce": (lambda x: torch.segment_reduce(x, "prod", lengths=LENGTHS), True),
    "bessel": (torch.special.bessel_j0, True),
    "weights of a loss": (lambda x: F.nll_loss(TABLE, torch.tensor([0, 1]), x.exp()) * x, False),
    "max_norm": (lambda x: F.embedding(torch.tensor([0, 1]), x.view(2, 2), max_norm=0.5), True),
    "points of grid_sample": (lambda x: F.grid_sample(TABLE[None, None], x.view(1, 1, 2, 2)), False),
    "float builtin": (lambda x: x * float(x.sum()), True),
    "index builtin": (lambda x: x[int(x.argmax())] * x, False),
    "sorted builtin": (lambda x: torch.stack(sorted(x)), False),
    "contains": (lambda x: x * (2 if 5.0 in x else 3), False),
    "distances": (lambda x: torch.cdist(x.view(2, 2), 2 * x.view(2, 2)), False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours(name):
    fn, refused = NEIGHBOURS[name]
    x, x_dot = inputs()
    if refused:
        with pytest.raises(OURS, match="|".join((r"test_op_by_op\.py", r"distributions"))):
            call(fn, "op_by_op", x, x_dot)
    else:
        assert_close(call(fn, "op_by_op", x, x_dot)[1], differences(fn, x, x_dot), rtol=1e-5, atol=1e-6)


def test_ops_that_conjugate_inside_have_their_own_value():
    x, v = torch.randn(2, 4, 4, dtype=torch.complex128)
    out, out_dot = jvpgraph.jvp(torch.pinverse, (x,), (v,), backend="op_by_op")
    assert_close((out, out_dot), torch.func.jvp(torch.pinverse, (x,), (v,)))


def test_what_is_older_than_the_call_is_a_constant():
    x, x_dot = inputs()
    with _disable_current_modes():
        constant = torch.randn(4).double()
    assert_close(call(lambda x: x * constant, "op_by_op", x, x_dot)[1], x_dot * constant)


@pytest.mark.parametrize("collect", [lambda: None, gc.collect, lambda: gc.collect(0), lambda: gc.collect(1)])
def test_a_birth_is_known_after_a_collection(collect):
    def fn(x):
        y = canary(x)
        collect()
        return y * 2

    with pytest.raises(jvpgraph.UnsupportedOp, match="no op was seen to make it"):
        call(fn, "op_by_op", *inputs())


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("regions", [False, True])
def test_a_canary_at_a_random_place_is_refused(seed, regions):
    """An identity without a rule, which no mode sees, in front of or behind a random module of a model."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(*(Block() for _ in range(3))).double()
    places = [m for name, m in model.named_modules() if not regions or (name and "." not in name)]
    place = draw.choice(places)
    kind = draw.choice([canary, canary_into(torch.zeros_like), lambda x: torch.from_numpy(x.detach().numpy().copy())])
    if draw.random() < 0.5:
        place.register_forward_hook(lambda _m, _args, out: kind(out))
    else:
        place.register_forward_pre_hook(lambda _m, args: (kind(args[0]),))
    settings = {"regions": Block, "backend": "eager"} if regions else {"backend": "op_by_op"}
    x = torch.randn(2, 4).double()
    with pytest.raises(OURS):
        jvpgraph.transform(model, **settings)(x, tangents={"input": x})


class TestLevels:
    """One set of tangents at a time."""

    @pytest.mark.parametrize("inner", ["op_by_op", "eager"])
    @pytest.mark.parametrize("outer", ["op_by_op", "eager"])
    def test_a_call_inside_another_is_refused(self, outer, inner):
        x, x_dot = inputs()
        fn = lambda x: call(torch.sin, inner, x, x_dot)[1]  # noqa: E731
        with pytest.raises((jvpgraph.UnsupportedOp, jvpgraph.CaptureError), match=r"inside a model|one graph"):
            call(fn, outer, x, x_dot)

    @pytest.mark.parametrize("way", ["op_by_op", "eager", "inductor", "regions"])
    def test_a_forward_ad_tangent_would_be_lost(self, way):
        x, x_dot = inputs()
        with forward_ad.dual_level(), pytest.raises(ValueError, match="would be lost"):
            call(torch.sin, way, forward_ad.make_dual(x, x_dot), x_dot)

    @pytest.mark.parametrize("held", ["weight", "scale"])
    def test_so_would_that_of_a_parameter_or_a_buffer(self, held):
        x, x_dot = inputs()
        model = nn.Linear(4, 4).double()
        model.register_buffer("scale", torch.ones(4).double())
        of = model._parameters if held == "weight" else model._buffers
        dual = jvpgraph.transform(model, backend="op_by_op")
        with forward_ad.dual_level():
            assert_close(dual(x, tangents={"input": x_dot})[1], x_dot @ model.weight.T)
            of[held] = forward_ad.make_dual(of[held].detach(), torch.ones_like(of[held]))
            with pytest.raises(ValueError, match="would be lost"):
                dual(x, tangents={"input": x_dot})

    @pytest.mark.parametrize("name", ["jvp", "vmap", "grad"])
    def test_a_call_inside_a_transform_is_refused(self, name):
        x, x_dot = inputs()
        fn = lambda x: call(torch.neg, "op_by_op", x, x_dot)[1].sum()  # noqa: E731
        calls = {
            "jvp": lambda: torch.func.jvp(fn, (x,), (x_dot,)),
            "vmap": lambda: torch.func.vmap(fn)(x.expand(2, 4)),
            "grad": lambda: torch.func.grad(lambda a: a.sum() * fn(x))(x),
        }
        with pytest.raises(ValueError, match=f"inside torch.func's {name}: nest"):
            calls[name]()

    def test_the_modes_are_gone_afterwards(self):
        x, x_dot = inputs()
        callbacks = list(gc.callbacks)
        with pytest.raises(jvpgraph.UnsupportedOp):
            call(lambda x: x * x.sum().item(), "op_by_op", x, x_dot)
        assert gc.callbacks == callbacks
        assert torch._C._len_torch_function_stack() == 0
        assert torch._C._get_graph_executor_optimize()
        assert torch._dynamo.eval_frame._stance.stance == "default"


def test_encoder_layers_take_the_way_that_has_a_tangent():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval()
    x = torch.randn(2, 3, 4).double()
    with torch.no_grad():
        y_dot = jvpgraph.transform(encoder, backend="op_by_op")(x, tangents={"src": x})[1]
        assert_close(y_dot, differences(encoder, x, x), rtol=1e-6, atol=1e-6)


def test_a_refusal_without_a_line_of_the_user_says_so(monkeypatch):
    monkeypatch.setattr("jvpgraph.op_by_op.refusals.frames", lambda: iter(()))
    with pytest.raises(jvpgraph.UnsupportedOp, match=r"\(no source line\)"):
        call(lambda x: x * x.sum().item(), "op_by_op", *inputs())


# ------------------------------------------------------------------------------------------ every kind on every way

KINDS = {**REFUSED, **RIGHT}
INDUCTOR = ("numpy", "tolist of one", "item", "scripted", "gradient", "foreach", "inference, reshape")
# To graphs numpy is ops: a stop-gradient, and no tensor. What is drawn cannot be compared with differences.
APART = ("numpy of detached", "numpy by itself", "random in place")
WAYS = [(name, "auto") for name in KINDS if name not in APART] + [(name, "inductor") for name in INDUCTOR]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_right_or_refused(name, way):
    """No zero that nobody computed, and no error of PyTorch's, at two calls; "auto" tries one graph first."""
    x, x_dot = inputs()
    torch.manual_seed(0)
    model = Wrapped(KINDS[name]).double().requires_grad_(False)
    settings = {"regions": "auto", "backend": "eager"} if way == "auto" else {"backend": way}
    dual = jvpgraph.transform(model, **settings)
    for _ in range(2):
        try:
            out_dot = dual(x, tangents={"x": x_dot})[1]
        except OURS:
            continue
        expected = differences(model, x, x_dot)
        assert_close(out_dot.to(expected.dtype), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fn", "times"),
    [
        (lambda net, x: torch.cond(x.sum() > -99, lambda a: net(a).sin(), torch.cos, (x,)), 1),
        (lambda net, x: while_loop(lambda i, _: i < 2, lambda i, a: (i + 1, net(a).sin()), (torch.tensor(0), x))[1], 2),
    ],
    ids=["cond", "while_loop"],
)
def test_branches_and_what_they_hold_have_gradients(fn, times):
    torch.manual_seed(0)
    net, x, x_dot = nn.Linear(4, 4).double(), torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 4).double()
    y, y_dot = jvpgraph.jvp(lambda a: fn(net, a), (x,), (x_dot,), backend="op_by_op")

    def written_out(a):
        for _ in range(times):
            a = net(a).sin()
        return a

    torch.testing.assert_close((y, y_dot), torch.func.jvp(written_out, (x,), (x_dot,)))
    wrt = [x, *net.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), wrt), torch.autograd.grad(written_out(x).square().sum(), wrt)
    )
