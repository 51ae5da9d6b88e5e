"""Runs the source of jvpgraph.kernels.attention_gluon on a processor: Gluon itself has no interpreter.

Its functions are called as plain Python on torch tensors, each role in a thread of its own, with stand-ins for what
they use of Gluon. These are as late as the hardware may be, and check what it does not:
    a load destroys its target when it is asked for, and delivers when its barrier is awaited;
    a product reads its operands both when it is issued and when it is waited for, and must find the same;
    what a product gives cannot be touched before it was waited for;
    shared memory that threads wrote needs a fence before the copy engine reads it;
    a barrier that is awaited for seconds is a deadlock, and one that gets more arrivals than it counts an error.
Layouts, registers and the visibility of writes between the threads of a warpgroup are beyond it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from jvpgraph.kernels import attention_gluon
from jvpgraph.kernels.blocks import GluonBlocks
from tests import calls

PATIENCE = 10.0  # seconds


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes that it counts are there."""

    def __init__(self):
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0
        self.loads: list[Callable[[], None]] = []

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def add(self, arrivals: int, bytes: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += bytes
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.missing = self.count
                self.phase += 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        """Until the phase of this parity has ended: one that never began counts as ended for parity 1."""
        with self.changed:
            while (self.phase & 1) == parity:
                if self.loads:
                    self.loads.pop(random.randrange(len(self.loads)))()
                else:
                    assert self.changed.wait(PATIENCE), "deadlock"

    def load(self, deliver: Callable[[], None]) -> None:
        with self.changed:
            self.loads.append(deliver)
            self.changed.notify_all()


class Barriers:
    """What allocate_shared_memory gives for int64: one barrier, or several to be indexed."""

    def __init__(self, shape):
        self.barriers = [Barrier() for _ in range(shape[0])]

    def index(self, i: int) -> Barriers:
        one = Barriers([0])
        one.barriers = [self.barriers[i]]
        return one

    @property
    def only(self) -> Barrier:
        (barrier,) = self.barriers
        return barrier


class Shared:
    """A descriptor of shared memory: a view, and whether threads wrote to what it is a view of."""

    def __init__(self, data: Tensor, dirty: set[int]):
        self.data, self.dirty = data, dirty
        self.shape, self.dtype = list(data.shape), data.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.data[i], self.dirty)

    def reshape(self, shape) -> Shared:
        return Shared(self.data.view(*shape), self.dirty)

    def permute(self, order) -> Shared:
        return Shared(self.data.permute(*order), self.dirty)

    def store(self, value: Tensor) -> None:
        assert not outstanding(), "written while products may still read"
        assert value.dtype == self.dtype
        self.data.copy_(value)
        self.dirty.add(threading.get_ident())


class Descriptor:
    """A TMA descriptor of a tensor of rank 4."""

    def __init__(self, x: Tensor, rows: int, width: int):
        self.x, self.block_shape, self.dtype, self.layout = x, [1, 1, rows, width], x.dtype, None

    def box(self, coordinates) -> tuple[Tensor, tuple[slice, slice]]:
        """The part of the tensor within the box there, and where in the box it lies."""
        batch, head, row, column = map(int, coordinates)
        _, _, rows, width = self.block_shape
        _, _, length, dim = self.x.shape
        first, last = max(row, 0), min(row + rows, length)
        inside = self.x[batch, head, first : max(first, last), column : min(column + width, dim)]
        return inside, (slice(first - row, first - row + inside.shape[0]), slice(0, inside.shape[1]))


class Product:
    """A product in flight."""

    def __init__(self, a, b: Shared, acc):
        self.a, self.b, self.acc, self.value = a, b, acc, None
        self.at_issue = self.operands()

    def operands(self) -> tuple[Tensor, Tensor]:
        return tuple((x.data if isinstance(x, Shared) else x).float().clone() for x in (self.a, self.b))

    def finish(self) -> None:
        for before, now in zip(self.at_issue, self.operands()):
            assert torch.equal(before, now), "an operand was not there yet, or changed under a product"
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        a, b = self.at_issue
        self.value = a @ b if acc is None else acc + a @ b

    def __getattr__(self, name):
        raise AssertionError(f"{name} of a product that was not waited for")

    def __mul__(self, other):
        raise AssertionError("a multiple of a product that was not waited for")

    __rmul__ = __mul__


_of_thread = threading.local()


def outstanding() -> list[Product]:
    if not hasattr(_of_thread, "products"):
        _of_thread.products = []
    return _of_thread.products


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    assert is_async
    assert a.shape[1] == b.shape[0]
    product = Product(a, b, acc if use_acc else None)
    outstanding().append(product)
    return product


def warpgroup_mma_wait(left: int, deps):
    products = outstanding()
    time.sleep(random.random() * 2e-3)
    while len(products) > left:
        products.pop(0).finish()
    values = tuple(x.value if isinstance(x, Product) else x for x in deps)
    assert all(x is not None for x in values), "a product is taken before it was waited for"
    return values[0] if len(values) == 1 else values


def load(source: Descriptor, coordinates, barrier: Barriers, target: Shared) -> None:
    box = target.data.view(source.block_shape[2:])
    box.fill_(torch.nan)

    def deliver() -> None:
        inside, (rows, columns) = source.box(coordinates)
        box.zero_()
        box[rows, columns] = inside
        barrier.only.add(0, -box.numel() * box.element_size())

    barrier.only.load(deliver)


def store(target: Descriptor, coordinates, source: Shared) -> None:
    assert threading.get_ident() not in source.dirty, "no fence between the threads' writes and the copy engine"
    inside, (rows, columns) = target.box(coordinates)
    inside.copy_(source.data.view(target.block_shape[2:])[rows, columns])


class Pointer:
    def __init__(self, flat: Tensor, offset=0):
        self.flat, self.offset = flat, offset

    def __add__(self, offset) -> Pointer:
        return Pointer(self.flat, self.offset + offset)


def store_by_pointer(to: Pointer, value: Tensor, mask: Tensor) -> None:
    to.flat[to.offset[mask]] = value[mask]


def tensor(x) -> Tensor:
    return torch.as_tensor(x)


def warp_specialize(parts, warps, registers) -> None:
    """All roles at once."""
    assert len(parts) == len(warps) + 1 == len(registers) + 1
    assert all(count % 8 == 0 and 24 <= count <= 240 for count in registers)
    failed = []

    def role(function, arguments):
        try:
            function(*arguments)
            assert not outstanding(), "products in flight at the end"
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=role, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    if failed:
        raise failed[0]
    assert not any(thread.is_alive() for thread in threads), "deadlock"


class Launcher:
    """attention_jvp_kernel on a processor, one program after the other."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, enable_fp_fusion, **constants):
            given = [Pointer(x.view(-1)) if isinstance(x, Tensor) else x for x in arguments]
            given = [tensor(x) if isinstance(x, int) else x for x in given]
            for at in itertools.product(*map(range, grid)):
                _program.at = at
                self.kernel(*given, **constants)

        return launch


_program = SimpleNamespace(at=(0,))


@contextlib.contextmanager
def emulated(blocks: GluonBlocks, module: ModuleType = attention_gluon):
    """attention_jvp of the module on tensors of a processor, with these blocks."""
    dirty: set[int] = set()

    def allocate(dtype, shape, layout):
        if dtype == torch.int64:
            return Barriers(shape)
        return Shared(torch.full(shape, torch.nan, dtype=dtype), dirty)

    def nothing(*_):
        return None

    gl = SimpleNamespace(
        float32=torch.float32,
        int64=torch.int64,
        static_range=range,
        program_id=lambda axis: tensor(_program.at[axis]),
        allocate_shared_memory=allocate,
        warp_specialize=warp_specialize,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        arange=lambda start, end, layout: torch.arange(start, end),
        where=lambda condition, a, b: torch.where(tensor(condition), a, b),
        maximum=lambda a, b: torch.maximum(tensor(a), tensor(b)),
        minimum=lambda a, b: torch.minimum(tensor(a), tensor(b)),
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2,
        log2=torch.log2,
        expand_dims=torch.unsqueeze,
        convert_layout=lambda x, layout: x,
        store=store_by_pointer,
        NVMMADistributedLayout=nothing,
        DotOperandLayout=nothing,
        SliceLayout=nothing,
    )
    mbarrier = SimpleNamespace(
        MBarrierLayout=nothing,
        init=lambda barrier, count: barrier.only.init(count),
        expect=lambda barrier, bytes: barrier.only.add(1, bytes),
        arrive=lambda barrier, count: barrier.only.add(count, 0),
        wait=lambda barrier, parity: barrier.only.wait(int(parity)),
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "gl": gl,
            "mbarrier": mbarrier,
            "tma": SimpleNamespace(store_wait=nothing),
            "fence_async_shared": lambda: dirty.discard(threading.get_ident()),
            "warpgroup_mma": warpgroup_mma,
            "warpgroup_mma_wait": warpgroup_mma_wait,
            "_load": load,
            "_store": store,
            "_barrier": nothing,
            "LOG2E": module.LOG2E.value,
            "LN2": module.LN2.value,
            "LEAST": module.LEAST.value,
            "ROWS": _Constant(module.ROWS.value),
            **{name: getattr(module, name).fn for name in ("_locate", "_produce", "_weigh", "_visit", "_consume")},
            "attention_jvp_kernel": Launcher(module.attention_jvp_kernel.fn),
            "_descriptor": Descriptor,
            "gluon_blocks": lambda head_dim, *_: (max(16, 1 << (head_dim - 1).bit_length()), blocks),
        }.items():
            patch.setattr(module, name, value)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        yield functools.partial(calls.attention_jvp, module)


class _Constant(int):
    """An int with the value that a constexpr has."""

    @property
    def value(self) -> int:
        return int(self)
