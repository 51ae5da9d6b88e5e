"""Kinds of programs that bug reports were about: each gives every backend a chance of losing a tangent.

A kind is a function of x, of shape [n, 4] in any floating dtype, or a class of modules that are one. Its true tangent
is that of central differences, or, where something is detached or drawn, torch.func.jvp of its stand-in in ``TWINS``:
a function of plain ops with the same value, or the kind itself.
"""

from __future__ import annotations

import copy
import ctypes
import io
import math
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_of_torch
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.autograd import forward_ad
from torch.masked import masked_tensor
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import jvpgraph

__all__ = ["COARSE", "KINDS", "RANDOM", "TWINS"]

Function = Callable[[Tensor], Tensor]


def lin(x: Tensor) -> Tensor:
    """A linear layer that is no module of the model's, in the dtype of ``x``."""
    return F.linear(x, torch.eye(4, dtype=x.dtype) * 2 - 0.3, torch.ones(4, dtype=x.dtype))


def square(x: Tensor) -> Tensor:
    """[n, 4] -> [n, 2, 2]"""
    return x.reshape(-1, 2, 2)


def regular(x: Tensor) -> Tensor:
    """[n, 4] -> [n, 2, 2], far from singular, symmetric."""
    a = square(x).tanh()
    return a @ a.mT + torch.diag(torch.tensor([1.0, 2.0])).to(x.dtype)


def index(x: Tensor) -> Tensor:
    return torch.tensor([0, 0, 1, 2])


# --------------------------------------------------------------------------------------------- autograd.Functions


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class WithJvp(StraightThrough):
    @staticmethod
    def jvp(ctx, v):
        return v


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class NumpySquare(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().float().numpy() ** 2).to(x.dtype)


class BareNumpy(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.numpy() ** 2)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return 2 * g

    @staticmethod
    def jvp(ctx, v):
        return v.mul_(2)


FUNCTIONS: dict[str, Function] = {
    "straight through": StraightThrough.apply,
    "straight through, with a jvp": lambda x: WithJvp.apply(x.sin()) * x,
    "a Function without a jvp": lambda x: Square.apply(x.sin()),
    "a Function in numpy": NumpySquare.apply,
    "a Function in numpy, undetached": BareNumpy.apply,
    "a Function in place": lambda x: InPlace.apply(x.sin()) * x,
}

# --------------------------------------------------------------------------------------------------- custom ops

library = torch.library.Library("jvpgraph_kinds", "DEF")
library.define("composite(Tensor x) -> Tensor")
library.impl("composite", lambda x: x.sin() * 2, "CompositeImplicitAutograd")
library.define("opaque(Tensor x) -> Tensor")
library.impl("opaque", lambda x: x.sin() * 2, "CompositeExplicitAutograd")
torch.library.register_fake("jvpgraph_kinds::opaque", torch.empty_like, lib=library)
library.define("writes(Tensor(a!) x) -> ()")
library.impl("writes", lambda x: (x.mul_(2), None)[1], "CPU")
library.impl("writes", lambda x: None, "Meta")


@torch.library.custom_op("jvpgraph_kinds::numpy_sin", mutates_args=())
def numpy_sin(x: Tensor) -> Tensor:
    return torch.from_numpy(np.sin(x.detach().float().numpy())).to(x.dtype)


numpy_sin.register_fake(torch.empty_like)
numpy_sin.register_autograd(
    lambda ctx, g: g * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@torch.library.custom_op("jvpgraph_kinds::sin_into", mutates_args=("y",))
def sin_into(x: Tensor, y: Tensor) -> None:
    y.copy_(x.sin())


@torch.library.triton_op("jvpgraph_kinds::composed", mutates_args=())
def composed(x: Tensor) -> Tensor:
    return x.sin() * 3


def written_by_an_op(x: Tensor) -> Tensor:
    y = x * 1
    torch.ops.jvpgraph_kinds.writes(y)
    return y * x


def filled_by_an_op(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    sin_into(x, y)
    return y * x


CUSTOM_OPS: dict[str, Function] = {
    "composite op": lambda x: torch.ops.jvpgraph_kinds.composite(x) * x,
    "opaque op": lambda x: torch.ops.jvpgraph_kinds.opaque(x) * x,
    "op that writes": written_by_an_op,
    "custom op": lambda x: numpy_sin(x) * x,
    "custom op that writes": filled_by_an_op,
    "triton_op": lambda x: composed(x) * x,
    "op by its overload": lambda x: torch.ops.aten.sin.default(x) * x,
    "prims": lambda x: torch.ops.prims.sin(x) * x,
    "refs": lambda x: torch._refs.sin(x) * x,
}

# ---------------------------------------------------------------------------- Python numbers, and what asks for them


def from_a_closure_of_numbers(x: Tensor) -> Tensor:
    return torch.stack([torch.tensor(math.sin(v), dtype=x.dtype) for v in x[0]])


def filled(x: Tensor) -> Tensor:
    return x * torch.empty(4, dtype=x.dtype).fill_(x.sum().item())


def set_item(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1] = x.sum().item()
    return y + x


NUMBERS: dict[str, Function] = {
    "item": lambda x: x * x.sum().item(),
    "item of detached": lambda x: x * x.detach().sum().item(),
    "tolist": lambda x: torch.tensor(x.tolist(), dtype=x.dtype) * x,
    "tolist of one": lambda x: x * x.sum().reshape(1).tolist()[0],
    "float": lambda x: x * float(x.sum()),
    "int": lambda x: x * int(x.sum() * 10),
    "complex": lambda x: (x * complex(x.sum())).real,
    "bool": lambda x: x * 2 if bool(x.sum() > 0) else x * 3,
    "index": lambda x: x * x.long().sum().__index__(),
    "len": lambda x: x * len(x),
    "contains": lambda x: x * 2 if 5.0 in x else x * 3,
    "max builtin": lambda x: max(x[:, 0]) * x,
    "sorted builtin": lambda x: torch.stack(sorted(x[0])),
    "round builtin": lambda x: x * round(float(x.sum()), 2),
    "math": lambda x: x * math.sqrt(x.abs().sum()),
    "numbers of elements": from_a_closure_of_numbers,
    "full": lambda x: x * torch.full((4,), x.sum().item(), dtype=x.dtype),
    "full of a tensor": lambda x: x * torch.full((4,), x.sum(), dtype=x.dtype),
    "fill_": filled,
    "new_full": lambda x: x * x.new_full((4,), x.sum().item()),
    "set item": set_item,
    "where": lambda x: torch.where(x > 0, x, x.sum().item()),
    "masked_fill": lambda x: x.masked_fill(x > 0, x.sum().item()),
    "clamp": lambda x: x.clamp(max=x.mean().item()),
    "clamp by a tensor": lambda x: x.clamp(max=x.mean()),
    "tensor of a number": lambda x: x * torch.tensor([x.sum().item()], dtype=x.dtype),
    "tensor of tensors": lambda x: torch.tensor([x.sum(), x.sum()], dtype=x.dtype) * x.sum(),
    "as_tensor": lambda x: torch.as_tensor([x.sum(), x.sum()], dtype=x.dtype) * x.sum(),
    "lerp": lambda x: torch.lerp(x, x * x, x.mean().item()),
    "leaky_relu": lambda x: F.leaky_relu(-x, x.mean().item()),
    "alpha=": lambda x: torch.add(x, x.sin(), alpha=x.sum().item()),
    "value=": lambda x: torch.addcmul(x, x, x, value=x.sum().item()),
    "exponent": lambda x: x.abs() ** x.mean().item(),
    "a size": lambda x: x * torch.ones(int(x.abs().sum()) + 1, dtype=x.dtype).sum(),
    "an index": lambda x: x[int(x[:, 0].argmax())] * x,
    "an index as a tensor": lambda x: x[x[:, 0].argmax()] * x,
    "an index in a list": lambda x: x[:, torch.tensor((x[0] > 0).tolist())].sum() * x,
    "power of two": lambda x: 2**x,
    "number in front": lambda x: 2 - x,
    "remainder": lambda x: x % 2 * x,
    "scalar of numpy": lambda x: x * np.float64(2.0),
    "elements": lambda x: torch.stack([v * v for v in x[0]]),
    "generator": lambda x: sum(v for v in (x * i for i in range(3))),
    "exception": lambda x: exception(x),
    "global": lambda x: through_a_global(x),
    "weak reference": lambda x: by_weak_reference(x),
}


def exception(x: Tensor) -> Tensor:
    try:
        raise ValueError(x.sin())
    except ValueError as error:
        return error.args[0] * x


HELD: list[Tensor] = []


def through_a_global(x: Tensor) -> Tensor:
    HELD.append(x.sin())
    return HELD.pop() * x


def by_weak_reference(x: Tensor) -> Tensor:
    y = x.sin()
    return weakref.ref(y)() * x


# -------------------------------------------------------------------------------------- numpy, memory, other modules


def written_through_numpy(x: Tensor) -> Tensor:
    y = x.clone()
    array = y.detach().numpy()
    array *= 2
    return y * x


def by_address(x: Tensor) -> Tensor:
    y, z = (x * 2).contiguous(), torch.empty_like(x)
    ctypes.memmove(z.data_ptr(), y.data_ptr(), y.numel() * y.itemsize)
    return z * x


def address_of_detached(x: Tensor) -> Tensor:
    y, z = (x * 2).detach().contiguous(), torch.empty_like(x)
    ctypes.memmove(z.data_ptr(), y.data_ptr(), y.numel() * y.itemsize)
    return z * x


def by_storage(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.untyped_storage().copy_((x * 2).untyped_storage())
    return y * x


def saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x * 2, file)
    file.seek(0)
    return torch.load(file) * x


def in_a_thread(x: Tensor) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(x.sin() * 2))
    thread.start()
    thread.join()
    return found[0] * 1


ESCAPES: dict[str, Function] = {
    "numpy": lambda x: torch.from_numpy(np.sin(x.numpy())),
    "numpy of detached": lambda x: torch.from_numpy(np.sin(x.detach().numpy())) + x,
    "dot of numpy": lambda x: torch.as_tensor(np.dot(x.detach()[0].numpy(), x.detach()[0].numpy())) * x,
    "asarray of numpy": lambda x: torch.as_tensor(np.asarray(x.detach()) * 2) * x,
    "ufunc on a tensor": lambda x: np.sin(x) * 2,
    "numpy by force": lambda x: torch.from_numpy(x.numpy(force=True) * 2) * x,
    "written through numpy": written_through_numpy,
    "array of numbers": lambda x: torch.tensor(np.array([float(v) for v in x.detach()[0]]), dtype=x.dtype) * x,
    "array of numpy": lambda x: x * torch.from_numpy(np.arange(4.0)).to(x.dtype),
    "root of a number": lambda x: x * float(np.sqrt(x.detach().abs().sum().item())),
    "frombuffer": lambda x: torch.frombuffer(memoryview((x * 2).detach().numpy()), dtype=x.dtype).view(-1, 4) * x,
    "dlpack": lambda x: torch.from_dlpack(x * 2) * x,
    "dlpack of detached": lambda x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack((x * 2).detach())) * x,
    "address": by_address,
    "address of detached": address_of_detached,
    "storage copied": by_storage,
    "saved": saved,
    "pickled": lambda x: pickle.loads(pickle.dumps(x * 2)) * x,
    "deepcopy of detached": lambda x: copy.deepcopy(x.detach()) * x,
    "deepcopy": lambda x: copy.deepcopy(x * 1) * x,
    "copy": lambda x: copy.copy(x) * x,
    "thread": in_a_thread,
    "apply_": lambda x: x.clone().apply_(lambda e: e * 2) * x,
    "map_": lambda x: torch.zeros_like(x).map_(x, lambda _, b: b * 2) * x,
    "hash": lambda x: x * (hash(x) * 0 + 2),
    "to another device": lambda x: x.cpu().to("cpu", copy=True) * x,
    "meta": lambda x: x * torch.empty_like(x, device="meta").numel(),
    "bits there and back": lambda x: x.view(bits_of(x)).view(x.dtype) * x,
    "bits computed with": lambda x: (x.view(bits_of(x)) ^ 0).view(x.dtype) * x,
    "another dtype": lambda x: x.double().to(x.dtype) * x,
}


def bits_of(x: Tensor) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]


# ------------------------------------------------------------------------------------- in place, views, detached


def detached_alias_written(x: Tensor) -> Tensor:
    y = x * 1
    y.detach().mul_(2)
    return y * x


def data_written(x: Tensor) -> Tensor:
    y = x * 1
    y.data.mul_(2)
    return y * x


def data_replaced(x: Tensor) -> Tensor:
    y = x * 1
    y.data = x.sin()
    return y * x


def set_to_a_tensor(x: Tensor) -> Tensor:
    y = torch.empty(0, dtype=x.dtype)
    y.set_(x * 2)
    return y * x


def set_to_a_storage(x: Tensor) -> Tensor:
    z, y = x * 2, torch.empty(0, dtype=x.dtype)
    y.set_(z.untyped_storage(), 0, tuple(x.shape), (4, 1))
    return y * x


def resized(x: Tensor) -> Tensor:
    y = x.clone()
    y.resize_(2, 2)
    return y * y


def views_written(x: Tensor) -> Tensor:
    y = x.reshape(-1).clone().view(-1, 4)
    z = y.t()[0]
    z[1:].mul_(3)
    y.view(-1)[::2].add_(x.view(-1)[1::2])
    return y * x


def buffer_written(x: Tensor) -> Tensor:
    buffers = nn.Module()
    buffers.register_buffer("c", torch.zeros_like(x))
    buffers.c.copy_(x)
    return buffers.c * x


def out_argument(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.sin(x, out=out)
    return out * x


def out_arguments(x: Tensor) -> Tensor:
    values, indices = torch.empty(x.shape[0], dtype=x.dtype), torch.empty(x.shape[0], dtype=torch.long)
    torch.max(x, 1, out=(values, indices))
    return values[:, None] * x


def foreach_in_place(x: Tensor) -> Tensor:
    xs = [x.clone(), 2 * x]
    torch._foreach_mul_(xs, 3.0)
    torch._foreach_addcmul_(xs, [x, x], [x, x], 0.5)
    return torch.stack(xs)


def foreach_in_another_order(x: Tensor) -> Tensor:
    xs = [x.clone(), 2 * x]
    torch._foreach_add_(xs, xs[::-1])
    return xs[0] * xs[1]


def scattered(x: Tensor) -> Tensor:
    return torch.as_strided_scatter(x.clone(), x[:2] * 2, (2, 4), (4, 1))


def with_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ x.mT).to(x.dtype)


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.sin()
    return y * x


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = square(x).mT.reshape(-1)
    return y * 2


def hooked(x: Tensor) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return y * 1


def alias_of_an_output(x: Tensor) -> Tensor:
    y = x.sin()
    return torch.stack([y.detach() + torch.zeros_like(y), y])


def dead_output(x: Tensor) -> Tensor:
    y, infinite = x.sin(), (x * 0).log()
    del infinite
    return y * x


def sub_instance(x: Tensor) -> Tensor:
    return x.as_subclass(Plain).sin().as_subclass(Tensor) * x


class Plain(Tensor):
    pass


class Wrapper(Tensor):
    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrap = lambda x: x.inner if isinstance(x, Wrapper) else x  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        out = func(*args, **kwargs)
        return torch.utils._pytree.tree_map(lambda x: Wrapper(x) if isinstance(x, Tensor) else x, out)


def jagged(x: Tensor) -> Any:
    return torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 1, 3]))


MEMORY: dict[str, Function] = {
    "detached alias written": detached_alias_written,
    "data written": data_written,
    "data replaced": data_replaced,
    "data": lambda x: x.data * x,
    "detach": lambda x: x.detach() * x,
    "set_ to a tensor": set_to_a_tensor,
    "set_ to a storage": set_to_a_storage,
    "resize_": resized,
    "views written": views_written,
    "buffer written": buffer_written,
    "out": out_argument,
    "outs": out_arguments,
    "foreach": lambda x: torch._foreach_mul([x, x * 2], [2.0, 3.0])[1] * x,
    "foreach in place": foreach_in_place,
    "foreach in another order": foreach_in_another_order,
    "as_strided": lambda x: (x * 2).as_strided((2, 2), (1, 2)) * x.sum(),
    "as_strided of the input": lambda x: x.as_strided((2, 2), (1, 2)) * x.sum(),
    "as_strided_scatter": scattered,
    "unfold": lambda x: x.unfold(1, 2, 1) * 2,
    "unfold as it is": lambda x: x.unfold(1, 2, 1),
    "autocast": with_autocast,
    "no_grad inside": without_grad,
    "inference mode": in_inference_mode,
    "tensor hook": hooked,
    "alias of an output": alias_of_an_output,
    "dead output": dead_output,
    "subclass": sub_instance,
    "wrapper subclass": lambda x: Wrapper(x).sin().inner * x,
    "nested": lambda x: torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged).values() * 2,
    "as nested": lambda x: torch.nested.as_nested_tensor([x[:1], x[1:]], layout=torch.jagged).values() * 2,
    "jagged": lambda x: (jagged(x[:3]) * 2).values(),
    "masked": lambda x: (masked_tensor(x, x > 0) * 2).to_tensor(0.0),
    "sparse": lambda x: torch.sparse.mm(x.to_sparse(), x.mT),
    "sparse of values": lambda x: torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), x[0, :2], (2, 2)).to_dense(),
    "sparse times": lambda x: torch.sparse.mm(torch.eye(4, dtype=x.dtype).to_sparse_csr(), x.mT),
    "complex views": lambda x: torch.view_as_real(torch.view_as_complex(square(x).clone()) ** 2),
    "complex by its bits": lambda x: complex_by_bits(x),
    "parameter": lambda x: nn.Parameter(x * 2) * x,
    "leaf": lambda x: x.clone().requires_grad_() * 2,
}


def complex_by_bits(x: Tensor) -> Tensor:
    z = x.contiguous().view(torch.complex128 if x.dtype is torch.float64 else torch.complex64)
    return (z * z).view(x.dtype)


# ------------------------------------------------------------------------------------------- what is drawn at random


def drawn_from(make: Callable[[Tensor], Any]) -> Function:
    return lambda x: make(x).rsample()


RANDOM: dict[str, Function] = {
    "normal of a mean": lambda x: torch.normal(x, 1.0),
    "normal of a deviation": lambda x: torch.normal(0.0, x.abs()),
    "normal of both": lambda x: torch.normal(x, x.abs()),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()) * x,
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(x.sigmoid()) * x,
    "poisson": lambda x: torch.poisson(x.exp()) + x,
    "standard gamma": lambda x: torch._standard_gamma(x.exp()),
    "multinomial": lambda x: x.gather(1, torch.multinomial(x.softmax(1), 2)).sum() * x,
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rrelu in place": lambda x: F.rrelu(x.clone(), training=True, inplace=True),
    "normal_": lambda x: torch.empty_like(x).normal_(float(x.sum()), 1.0) * 1,
    "exponential_": lambda x: x.clone().exponential_() * x,
    "gumbel_softmax": lambda x: F.gumbel_softmax(x, hard=True),
    "Dirichlet": drawn_from(lambda x: torch.distributions.Dirichlet(x.exp())),
    "Normal": drawn_from(lambda x: torch.distributions.Normal(x, x.exp())),
    "Uniform": drawn_from(lambda x: torch.distributions.Uniform(x, x + 1)),
    "Gamma": drawn_from(lambda x: torch.distributions.Gamma(x.exp(), x.exp() + 1)),
    "Laplace": drawn_from(lambda x: torch.distributions.Laplace(x, x.exp())),
    "vmap, at random": lambda x: torch.vmap(lambda a: a * torch.rand(()), randomness="different")(x),
}

# ------------------------------------------------------------------------------- control flow, and gradients inside


def gradient(x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.clone().requires_grad_()
        return torch.autograd.grad((z.sin() * z).sum(), z, create_graph=True)[0]


def gradient_of_detached(x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        return x * torch.autograd.grad((z.sin() * z).sum(), z)[0]


def backward(x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().clone().requires_grad_()
        (z * x).sum().backward()
        return z.grad * x


def forward_ad_inside(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(forward_ad.make_dual(x, torch.ones_like(x)).sin()).tangent * 1


def scripted(x: Tensor) -> Tensor:
    return modulate(x, x.sin())


@torch.jit.script
def modulate(x, s):
    return x * (1 + s) + s


COMPILED = torch.compile(lambda x: lin(x).tanh(), backend="aot_eager")

FLOW: dict[str, Function] = {
    "cond": lambda x: torch.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (x,)),
    "scan": lambda x: scan(lambda c, a: (c + a, c * a), x[0] * 0 + 1, x, dim=0)[1],
    "associative_scan": lambda x: associative_scan(lambda a, b: a * b, x, dim=0, combine_mode="generic"),
    "while_loop": lambda x: while_loop(lambda i, a: i < 2, lambda i, a: (i + 1, a.sin()), (torch.tensor(0), x))[1],
    "map": lambda x: map_of_torch(lambda a: a.sin(), x),
    "split by data": lambda x: torch.cat(x.view(-1)[:4].split(torch.bincount(index(x)).tolist()), 0) * 2,
    "checkpoint": lambda x: checkpoint(lambda a: lin(a).sin(), x, use_reentrant=False),
    "checkpoint, reentrant": lambda x: checkpoint(lambda a: lin(a).sin(), x, use_reentrant=True),
    "scripted": scripted,
    "compiled": COMPILED,
    "vmap": lambda x: torch.vmap(lambda a: lin(a).sin())(x) * x,
    "func.grad": lambda x: torch.func.grad(lambda a: (a.sin() * a).sum())(x),
    "func.jvp": lambda x: torch.func.jvp(lambda a: a.sin() * a, (x,), (torch.ones_like(x),))[1],
    "func.vjp": lambda x: torch.func.vjp(lambda a: a.sin() * a, x)[1](torch.ones_like(x))[0],
    "hessian": lambda x: torch.func.hessian(lambda a: (a**3).sum())(x[0]),
    "jacfwd": lambda x: torch.func.jacfwd(lambda a: a.sin() * a)(x[0]),
    "jacrev": lambda x: torch.func.jacrev(lambda a: a.sin() * a)(x[0]),
    "forward AD": forward_ad_inside,
    "our own": lambda x: jvpgraph.jvp(torch.sin, (x,), (torch.ones_like(x),), backend="eager")[1],
    "gradient": gradient,
    "gradient of detached": gradient_of_detached,
    "backward": backward,
}

# -------------------------------------------------------------------------------------------------------- the ops


def weighted_nll(x: Tensor) -> Tensor:
    table = torch.arange(8.0).view(2, 4).sin().to(x.dtype)
    return F.nll_loss(table, torch.tensor([0, 1]), weight=x[0].detach().exp() * 0 + x[0].exp()) * x


def batch_norm_statistics(x: Tensor) -> Tensor:
    mean = torch.zeros(4, dtype=x.dtype)
    F.batch_norm(x, mean, torch.ones(4, dtype=x.dtype), training=True)
    return x * mean.sum()


def stft(x: Tensor) -> Tensor:
    window = torch.hann_window(8, dtype=x.dtype)
    return torch.stft(x[0].repeat(8), 8, window=window, return_complex=True)


def istft(x: Tensor) -> Tensor:
    return torch.istft(stft(x), 8, window=torch.hann_window(8, dtype=x.dtype)) * x.sum()


def segments(x: Tensor) -> Tensor:
    return torch.segment_reduce(x[0], "prod", lengths=torch.tensor([2, 2]))


def hidden_rows(x: Tensor) -> Tensor:
    hidden = torch.zeros(4, 4, dtype=torch.bool)
    hidden[0] = True
    q = x.reshape(-1, 1, 4, 1) * torch.ones(4, dtype=x.dtype)
    return (q @ q.mT).masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1) @ q


def grid(x: Tensor) -> Tensor:
    image = torch.arange(16.0).view(1, 1, 4, 4).sin().to(x.dtype)
    return F.grid_sample(image, x.reshape(1, 1, -1, 2).tanh(), align_corners=False)


def bag(x: Tensor) -> Tensor:
    words, table = torch.tensor([0, 1, 1, 0]), torch.ones(2, 2, dtype=x.dtype)
    return F.embedding_bag(words, table, torch.tensor([0, 2]), per_sample_weights=x[0], mode="sum")


def weight_of_bce(x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, x.detach().sigmoid(), pos_weight=x.exp()) * x


def ctc(x: Tensor) -> Tensor:
    log_probs = x.reshape(-1, 1, 2).log_softmax(-1)
    return F.ctc_loss(log_probs, torch.tensor([[1]]), [len(log_probs)], [1]) * x


def attention(x: Tensor) -> Tensor:
    q = x.reshape(1, 1, -1, 4)
    return F.scaled_dot_product_attention(q, q * 2, q.sin())


OPS: dict[str, Function] = {
    "argsort": lambda x: x.gather(1, x.argsort(1)) * 2,
    "mask": lambda x: x[x > -99].reshape(x.shape) * 2,
    "masked_select": lambda x: torch.masked_select(x, x > -99) * 2,
    "unique": lambda x: torch.unique(x) * 2,
    "histogram": lambda x: torch.histc(x, 4) * x,
    "bucketize": lambda x: torch.bucketize(x, torch.arange(3.0).to(x.dtype)) * x,
    "round": lambda x: x.round() + x,
    "product of scatter_reduce": lambda x: torch.ones(4).to(x.dtype).scatter_reduce(0, index(x), x[0], "prod"),
    "maximum of scatter_reduce": lambda x: torch.zeros(4).to(x.dtype).scatter_reduce(0, index(x), x[0], "amax"),
    "mean of scatter_reduce": lambda x: torch.zeros(4).to(x.dtype).scatter_reduce(0, index(x), x[0], "mean"),
    "index_reduce": lambda x: torch.ones(4).to(x.dtype).index_reduce(0, index(x), x[0], "prod"),
    "segment_reduce": segments,
    "weights of a loss": weighted_nll,
    "weights of BCE": weight_of_bce,
    "ctc_loss": ctc,
    "max_norm": lambda x: F.embedding(torch.tensor([0, 1]), x, max_norm=0.5),
    "weights of a bag": bag,
    "grid_sample": grid,
    "batch_norm statistics": batch_norm_statistics,
    "group_norm": lambda x: F.group_norm(x, 2, x[0], x[1]) * x,
    "weight of group_norm": lambda x: F.group_norm(torch.ones(2, 4, dtype=x.dtype).cumsum(0), 2, x[0]),
    "weight of layer_norm": lambda x: F.layer_norm(torch.ones(2, 4, dtype=x.dtype).cumsum(1), (4,), x[0]),
    "ldexp": lambda x: torch.ldexp(x, torch.tensor(2)),
    "frexp": lambda x: torch.frexp(x)[0],
    "nextafter": lambda x: torch.nextafter(x, x * 2),
    "heaviside": lambda x: torch.heaviside(x, x),
    "copysign": lambda x: torch.copysign(x, x.flip(0)) * x,
    "sgn": lambda x: torch.sgn(torch.complex(x, x.sin())).real,
    "logdet": lambda x: torch.logdet(regular(x)),
    "inverse": lambda x: torch.linalg.inv(regular(x)),
    "solve": lambda x: torch.linalg.solve(regular(x), square(x)),
    "cholesky": lambda x: torch.linalg.cholesky(regular(x)),
    "qr": lambda x: torch.linalg.qr(regular(x))[1],
    "eigh": lambda x: torch.linalg.eigh(regular(x))[0],
    "svd": lambda x: torch.linalg.svd(regular(x))[1],
    "lu": lambda x: torch.linalg.lu_factor(regular(x))[0],
    "matrix_exp": lambda x: torch.matrix_exp(square(x)),
    "pinv": lambda x: torch.linalg.pinv(regular(x)),
    "cdist": lambda x: torch.cdist(x, x * 2 + 1),
    "addr": lambda x: torch.addr(torch.eye(4, dtype=x.dtype), x[0], torch.arange(4.0).to(x.dtype), alpha=0.5),
    "stft": lambda x: stft(x).abs().sum() * x,
    "istft": istft,
    "rfft": lambda x: torch.fft.rfft(x).abs() * x.sum(),
    "polar": lambda x: torch.polar(x, x.sin()).real,
    "angle": lambda x: torch.polar(x.abs(), x).angle() * x,
    "complex exponential": lambda x: (x * 1j).exp().real * x,
    "complex silu": lambda x: F.silu(torch.complex(x, x.sin())).imag,
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8).dequantize().to(x.dtype) * x,
    "fake quantised": lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).to(x.dtype),
    "cummax": lambda x: torch.cummax(x, 0)[0] * x,
    "cumprod": lambda x: torch.cumprod(x, 1) * x,
    "cumprod at a zero": lambda x: torch.cumprod(torch.cat([x[:, :1], x[:, :1] * 0, x], 1), 1) + x.sum(),
    "logcumsumexp": lambda x: torch.logcumsumexp(x * 20, 1),
    "median": lambda x: torch.median(x) * x,
    "mode": lambda x: torch.mode(x, 1)[0],
    "kthvalue": lambda x: torch.kthvalue(x, 2, 1)[0],
    "quantile": lambda x: torch.quantile(x, 0.3) * x,
    "topk": lambda x: torch.topk(x, 2)[0] * 2,
    "einsum": lambda x: torch.einsum("ni,nj->nij", x, x),
    "where of both": lambda x: torch.where(x > 0, x.abs().sqrt(), x.exp()),
    "norm": lambda x: x / torch.linalg.vector_norm(x).clamp(min=1e-6),
    "attention": attention,
    "hidden rows": hidden_rows,
    "nearest-exact": lambda x: F.interpolate(x[:, None], 7, mode="nearest-exact"),
    "huber_loss": lambda x: F.huber_loss(x, x.sin(), reduction="none"),
    "prelu": lambda x: F.prelu(x, x[0, :1]),
    "celu": lambda x: F.celu(x.mT) * 2,
    "glu": lambda x: F.glu(x.mT, 0),
    "i0": lambda x: torch.special.i0(x),
    "i0e": lambda x: torch.special.i0e(x),
    "i1": lambda x: torch.special.i1(x),
    "i1e": lambda x: torch.special.i1e(x),
    "ndtri": lambda x: torch.special.ndtri(x.sigmoid()),
    "log_ndtr": lambda x: torch.special.log_ndtr(x),
    "erfcx": lambda x: torch.special.erfcx(x),
    "entr": lambda x: torch.special.entr(x.abs() + 0.5),
    "psi": lambda x: torch.special.psi(x.abs() + 1),
    "gammaln": lambda x: torch.special.gammaln(x.abs() + 1),
    "sinc": lambda x: torch.special.sinc(x),
    "zeta": lambda x: torch.special.zeta(x.abs() + 2, x.abs() + 1),
    "polygamma": lambda x: torch.polygamma(1, x.abs() + 1),
    "gammainc": lambda x: torch.special.gammainc(torch.ones_like(x), x.abs()),
    "parameter of gammainc": lambda x: torch.special.gammainc(x.abs() + 0.5, torch.ones_like(x)),
    "xlogy": lambda x: torch.special.xlogy(x, x.abs() + 1),
    "parameters_to_vector": lambda x: torch.nn.utils.parameters_to_vector([x * 2, x]) * 2,
}
BESSEL = ("airy_ai", "bessel_j0", "bessel_j1", "bessel_y0", "modified_bessel_i0", "modified_bessel_k0")
BESSEL += ("scaled_modified_bessel_k1", "spherical_bessel_j0")
POLYNOMIALS = ("chebyshev_polynomial_t", "hermite_polynomial_h", "legendre_polynomial_p", "laguerre_polynomial_l")
OPS |= {name: lambda x, name=name: getattr(torch.special, name)(x.abs() + 0.5) for name in BESSEL}
OPS |= {name: lambda x, name=name: getattr(torch.special, name)(x.tanh() / 2, 2) for name in POLYNOMIALS}


# ---------------------------------------------------------------------------------------------------------- modules


class Of(nn.Module):
    """``use(part, x)`` with a module of PyTorch's."""

    make: Callable[[], nn.Module]
    use: Callable[[Any, Tensor], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.part = type(self).make()

    def forward(self, x: Tensor) -> Tensor:
        return type(self).use(self.part, x)


def of(make: Callable[[], nn.Module], use: Callable[[Any, Tensor], Tensor] = lambda part, x: part(x)) -> type[Of]:
    return type("Of", (Of,), {"make": staticmethod(make), "use": staticmethod(use)})


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.running_mean.zero_()
        y = self.norm(x)
        return y * self.norm.running_mean.sum()


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.detach_().copy_(x[0])
        return self.seen * x


class Replaces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen, before = x * 2, self.seen
        y = self.seen * x
        self.seen = before
        return y


class Swapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = {"weight": self.linear.weight * x.sum(), "bias": self.linear.bias}
        return torch.func.functional_call(self.linear, weights, (x,))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)


MODULES: dict[str, type[nn.Module]] = {
    "MultiheadAttention": of(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True), lambda part, x: part(x[None], x[None], x[None])[0]
    ),
    "LSTM": of(lambda: nn.LSTM(4, 4, batch_first=True), lambda part, x: part(x[None])[0]),
    "GRU": of(lambda: nn.GRU(4, 4, batch_first=True), lambda part, x: part(x[None])[0]),
    "TransformerEncoderLayer": of(encoder, lambda part, x: part(x[None])),
    "TransformerEncoderLayer.eval": of(lambda: encoder().eval(), lambda part, x: part(x[None])),
    "weight_norm": of(lambda: parametrizations.weight_norm(nn.Linear(4, 4))),
    "spectral_norm": of(lambda: parametrizations.spectral_norm(nn.Linear(4, 4)).eval()),
    "batch_norm in training": Statistics,
    "buffer of the model written": Writes,
    "buffer of the model replaced": Replaces,
    "functional_call": Swapped,
    "scripted module": of(lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))),
    "traced module": of(lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(3, 4))),
    "module of fx": of(lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))),
    "patch embedding": of(lambda: nn.Conv1d(4, 8, 2, 2), lambda part, x: part(torch.cat([x, x]).mT[None]).mT * 2),
    "Embedding": of(lambda: nn.Embedding(3, 4), lambda part, x: part(torch.tensor([0, 2])).sum() * x),
}

KINDS: dict[str, Function | type[nn.Module]] = {
    **FUNCTIONS, **CUSTOM_OPS, **NUMBERS, **ESCAPES, **MEMORY, **RANDOM, **FLOW, **OPS, **MODULES
}  # fmt: skip

ITSELF = None
TWINS: dict[str, Function | None] = {
    "straight through, with a jvp": lambda x: (x.sin() + (x.sin().round() - x.sin()).detach()) * x,
    "item of detached": ITSELF,
    "detach": ITSELF,
    "data": lambda x: x.detach() * x,
    "numpy of detached": lambda x: x.detach().sin() + x,
    "dot of numpy": lambda x: x.detach()[0].square().sum() * x,
    "asarray of numpy": lambda x: x.detach() * 2 * x,
    "numpy by force": lambda x: x.detach() * 2 * x,
    "written through numpy": lambda x: (x + x.detach()) * x,
    "array of numbers": lambda x: x.detach()[0] * x,
    "root of a number": lambda x: x * x.detach().abs().sum().sqrt(),
    "frombuffer": lambda x: x.detach() * 2 * x,
    "dlpack of detached": lambda x: x.detach() * 2 * x,
    "address of detached": lambda x: x.detach() * 2 * x,
    "deepcopy of detached": lambda x: x.detach() * x,
    "detached alias written": lambda x: (x + x.detach()) * x,
    "data written": lambda x: (x + x.detach()) * x,
    "alias of an output": ITSELF,
    "gradient of detached": lambda x: x * (x.cos() * x + x.sin()).detach(),
    "backward": lambda x: x * x,
    "weights of BCE": ITSELF,
    "gumbel_softmax": ITSELF,
    "Gamma": ITSELF,
    "Dirichlet": ITSELF,
    "standard gamma": ITSELF,
    "autocast": lambda x: x @ x.mT,
    "quantised": lambda x: ((x / 0.1).round() * 0.1).detach() * x,
}
COARSE = {"autocast"}  # half precision inside, whatever the dtype of the model
