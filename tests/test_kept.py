"""What a callee leaves behind besides its output: features in attributes, items of its caller's lists and caches."""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import jvpgraph

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo looks
]


SIZES = (2, 2, 5)  # the first call, the second one, and another size


@dataclass
class State:
    k: Tensor
    steps: int = 0


class Store:
    """No container that is walked through."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []


class Caches:
    """One of each kind, anew for each call: half of them hold something with a tangent already."""

    def __init__(self, x: Tensor):
        z = x.cos()
        self.empty: list[Any] = []
        self.items = [z, x]
        self.nested = ([0, [z]], 1)
        self.queue = deque([z, x])
        self.state = State(z)
        self.by_block: dict[Any, Any] = {"k": z}
        self.lists = defaultdict(list, {7: [z]})
        self.store = Store()
        self.pair: dict[str, Any] = {"t": (z,)}
        self.states = {"a": State(z), "b": State(x, 2)}
        self.two = self.empty, self.items
        self.same = self.items, self.items

    def tensors(self) -> list[Tensor]:
        return [
            *(x for x in self.empty if isinstance(x, Tensor)),
            *self.items,
            *self.nested[0][1],  # type: ignore[misc]
            *self.queue,
            self.state.k * self.state.steps,
            *self.by_block.values(),
            *(x for xs in self.lists.values() for x in xs),
            *self.store.values,
            *self.pair["t"],
            *(state.k * state.steps for state in self.states.values()),
            *(x for held in self.empty if isinstance(held, list) for x in held[0]),
        ]


def attribute(block: Block, u: Tensor, _: Any) -> Any:
    block.kept = u.square().mean()  # a loss of the block's own


def detached(block: Block, u: Tensor, _: Any) -> Any:
    block.kept = u.detach()  # the memory is the output's, the tangent is not


def part(block: Block, u: Tensor, _: Any) -> Any:
    block.kept = u[:1]


def table(block: Block, u: Tensor, _: Any) -> Any:
    block.kept = torch.arange(4.0, dtype=u.dtype, device=u.device)


def append(_: Block, u: Tensor, empty: Any) -> Any:
    empty.append(u * 2)


def move(_: Block, u: Tensor, items: Any) -> Any:
    items[0], items[1] = items[1], u
    return items[0]


def append_inside(_: Block, u: Tensor, nested: Any) -> Any:
    nested[0][1].append(u)
    nested[0][0] += 1
    return nested[0][1][0] * nested[0][0]


def through(_: Block, u: Tensor, queue: Any) -> Any:
    queue.append(u)
    return queue.popleft()


def field(_: Block, u: Tensor, state: Any) -> Any:
    state.k = state.k + u
    state.steps += 1
    return state.k


def grow(_: Block, u: Tensor, by_block: Any) -> Any:
    by_block["k"] = torch.cat([by_block["k"], u])
    by_block[len(by_block)] = by_block.pop("last", u)
    by_block["last"] = u * 3
    return by_block["k"].mean()


def default(block: Block, u: Tensor, lists: Any) -> Any:
    lists[block.number].append(u)


def into_object(_: Block, u: Tensor, store: Any) -> Any:
    store.values.append(u)


def in_a_tuple(_: Block, u: Tensor, pair: Any) -> Any:
    pair["t"] = (*pair["t"], u)


def reorder(_: Block, u: Tensor, by_block: Any) -> Any:
    by_block["k"] = by_block.pop("k")
    by_block.setdefault("last", u)
    return next(iter(by_block.values()))


def exchange_states(_: Block, u: Tensor, states: Any) -> Any:
    states["a"], states["b"] = states["b"], states["a"]
    states["a"].k = states["a"].k + u
    states["b"].steps += 1


def hold(block: Block, u: Tensor, items: Any) -> Any:
    block.items = items  # the next ones append to what this one has
    block.items.append(u)
    block.kept = u


def put_into_another(_: Block, u: Tensor, two: Any) -> Any:
    empty, items = two
    empty.append([items])
    items.append(u)


def twice(_: Block, u: Tensor, same: Any) -> Any:
    here, there = same
    here.append(u)
    return there.pop(0)


KEEPS: dict[Callable[..., Any], str] = {  # and the cache that it is given; "": it has an attribute
    attribute: "",
    detached: "",
    part: "",
    table: "",
    append: "empty",
    move: "items",
    append_inside: "nested",
    through: "queue",
    field: "state",
    grow: "by_block",
    default: "lists",
    into_object: "store",
    in_a_tuple: "pair",
    reorder: "by_block",
    exchange_states: "states",
    hold: "items",
    put_into_another: "two",
    twice: "same",
}


class Block(nn.Module):
    kept: Tensor

    def __init__(self, keep: Callable[..., Any], number: int):
        super().__init__()
        self.inner, self.keep, self.number = nn.Linear(4, 4), keep, number

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        u = self.inner(x).sin()
        more = self.keep(self, u, cache)
        return u if more is None else u + x * more


class Net(nn.Module):
    """Blocks that keep something, which the network reads when they are through."""

    def __init__(self, keep: Callable[..., Any], cache: str):
        super().__init__()
        self.cache = cache
        self.blocks = nn.ModuleList(Block(keep, i) for i in range(2))

    def forward(self, x: Tensor, checkpointed: bool = False) -> Tensor:
        caches = Caches(x)
        cache = getattr(caches, self.cache, None)
        for block in self.blocks:
            x = checkpoint(block, x, cache, use_reentrant=False) if checkpointed else block(x, cache)
        kept = caches.tensors() if self.cache else [block.kept for block in self.blocks]
        return x + sum((i + 1) * value.sum() for i, value in enumerate(kept))


def assert_right(model: nn.Module, dual: nn.Module, sizes: tuple[int, ...], tolerance: float, *more: Any) -> None:
    """Value, tangent and gradients against the model in float64, by forward AD and plain autograd."""
    wide = copy.deepcopy(model).double()
    dtype = next(model.parameters()).dtype
    for size in sizes:
        x, x_dot = torch.randn(size, 4, dtype=dtype, requires_grad=True), torch.randn(size, 4, dtype=dtype)
        y, y_dot = dual(x, *more, tangents={"x": x_dot})
        got = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
        at = x.detach().double().requires_grad_()
        wanted = torch.func.jvp(lambda x: wide(x), (at.detach(),), (x_dot.double(),))
        gradients = torch.autograd.grad(wide(at).square().sum(), [at, *wide.parameters()])
        for one, other in zip((y, y_dot, *got), (*wanted, *gradients), strict=True):
            assert (one.double() - other).norm() <= tolerance * other.norm()


class TestInRegions:
    @pytest.mark.long
    @pytest.mark.parametrize("keep", KEEPS)
    def test_tangents_reach_the_code_around(self, keep: Callable[..., Any]) -> None:
        model = Net(keep, KEEPS[keep]).double()
        dual = jvpgraph.transform(model, regions=Block, backend="eager")
        assert_right(model, dual, SIZES, 1e-12)
        (group,) = dual.regions.groups
        assert not group.cause
        assert group.calls == 2 * len(SIZES)

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("keep", "dtype", "tolerance"),
        [
            (attribute, torch.float32, 1e-5),
            (detached, torch.bfloat16, 4e-2),
            (grow, torch.bfloat16, 4e-2),
            (grow, torch.float32, 1e-5),
        ],
    )
    def test_on_the_default_backend(self, keep: Callable[..., Any], dtype: torch.dtype, tolerance: float) -> None:
        model = Net(keep, KEEPS[keep]).to(dtype)
        dual = jvpgraph.transform(model, regions=Block)
        assert_right(model, dual, SIZES, tolerance)
        assert not dual.regions.groups[0].cause

    @pytest.mark.parametrize("keep", [attribute, append, field])
    def test_of_checkpoints(self, keep: Callable[..., Any]) -> None:
        model = Net(keep, KEEPS[keep]).double()
        dual = jvpgraph.transform(model, regions=Block, backend="eager")
        assert_right(model, dual, (2, 3), 1e-12, True)
        assert not dual.regions.groups[0].cause

    @pytest.mark.filterwarnings("ignore:a region cannot be captured")
    def test_what_the_next_one_reads_without_being_given_it(self) -> None:
        """It is no argument there, and so the next one is no graph; the first one's is not lost."""

        def read(_: Block, u: Tensor, store: Any) -> Any:
            store.values.append(u)
            return store.values[0]

        model = Net(read, "store").double()
        dual = jvpgraph.transform(model, regions=Block, backend="eager")
        assert_right(model, dual, (2, 3), 1e-12)
        assert "has a tangent and is not an argument" in dual.regions.groups[0].cause

    def test_names_with_dots_are_told_from_paths(self) -> None:
        def dotted(_: Block, u: Tensor, cache: Any) -> Any:
            return cache["k.v"] * cache["k"]

        class Outer(Net):
            def forward(self, x: Tensor) -> Tensor:
                cache = {"k.v": x.cos(), "k": 3}
                for block in self.blocks:
                    x = block(x, cache)
                return x

        dual = jvpgraph.transform(Outer(dotted, "").double(), regions=Block, backend="eager")
        assert_right(dual.model, dual, SIZES, 1e-12)
        assert not dual.regions.groups[0].cause

    @pytest.mark.long
    def test_a_list_that_comes_back_is_the_same(self) -> None:
        class Returning(Block):
            def forward(self, x: Tensor, cache: Any) -> Any:
                cache.append(self.inner(x).sin())
                return cache

        class Outer(Net):
            def forward(self, x: Tensor) -> Tensor:
                given = [x.cos()]
                for block in self.blocks:
                    block(x, given).append(x)
                return x + sum((i + 1) * value for i, value in enumerate(given))

        model = Outer(append, "")
        model.blocks = nn.ModuleList(Returning(append, i) for i in range(2))
        dual = jvpgraph.transform(model.double(), regions=Returning, backend="eager")
        assert_right(model, dual, SIZES, 1e-12)
        assert not dual.regions.groups[0].cause

    @pytest.mark.filterwarnings("ignore:a region cannot be captured")
    def test_what_cannot_be_a_graph_happens_once(self) -> None:
        """A block is given up before anything that it does has been done: it counts its calls."""

        class Counting(Block):
            calls = 0

            def forward(self, x: Tensor, cache: Any) -> Any:
                self.calls += 1
                box = Store()
                box.values.append(self.inner(x) * self.calls)
                return box

        class Outer(Net):
            def forward(self, x: Tensor) -> Tensor:
                return x + sum(block(x, None).values[0] for block in self.blocks)

        model = Outer(append, "")
        model.blocks = nn.ModuleList(Counting(append, i) for i in range(2))
        dual = jvpgraph.transform(model.double(), regions=Counting, backend="eager")
        x, x_dot = torch.randn(2, 2, 4, dtype=torch.float64).unbind()
        for calls in (1, 2):
            y, y_dot = dual(x, tangents={"x": x_dot})
            assert_close(y, x + calls * sum(block.inner(x) for block in model.blocks))
            assert_close(y_dot, x_dot + calls * sum(x_dot @ block.inner.weight.T for block in model.blocks))
        assert "the output is a Store" in dual.regions.groups[0].cause

    @pytest.mark.filterwarnings("ignore:a region cannot be captured")
    def test_a_dict_of_a_class_of_its_own(self) -> None:
        """It would be copied, and its class may do more when something is put into it."""

        class Counted(dict):  # type: ignore[type-arg]
            steps = 0

        def step(_: Block, u: Tensor, cache: Any) -> Any:
            cache.steps += 1
            return cache["k"] * cache.steps

        class Outer(Net):
            def forward(self, x: Tensor) -> Tensor:
                cache = Counted(k=x)
                for block in self.blocks:
                    x = block(x, cache)
                return x * cache.steps

        model = Outer(step, "").double()
        dual = jvpgraph.transform(model, regions=Block, backend="eager")
        assert_right(model, dual, SIZES, 1e-12)
        assert "it is given a Counted" in dual.regions.groups[0].cause


class TestOfTheCaller:
    """Of whoever calls a transformed model: what it gave a tangent to is exchanged for the time of the call."""

    @pytest.mark.parametrize("backend", ["eager", "op_by_op"])
    def test_its_list_and_dict_are_changed_as_the_model_would(self, backend: str) -> None:
        class Model(nn.Module):
            def forward(self, x: Tensor, features: list[Tensor], cache: dict[str, Any]) -> Tensor:
                features.append(x.sin())
                cache["k"] = cache["k"] * x
                cache["calls"] += 1
                cache["more"].insert(0, x.cos())
                return x * features[0] + cache["more"].pop()

        x, first, k, more = torch.randn(4, 3)
        features, cache = [first], {"k": k, "calls": 1, "more": [more]}
        dots = {name: torch.randn(3) for name in ("x", "features.0", "cache.k", "cache.more.0")}
        y, y_dot = jvpgraph.transform(Model(), backend=backend)(x, features, cache, tangents=dots)
        assert_close(y, x * first + more)
        assert_close(y_dot, dots["x"] * first + x * dots["features.0"] + dots["cache.more.0"])
        assert features[0] is first
        assert len(features) == 2
        assert cache["calls"] == 2
        assert_close([features[1], cache["k"], cache["more"]], [x.sin(), k * x, [x.cos()]])

    @pytest.mark.slow
    @pytest.mark.sampled(1)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
    def test_so_they_are_on_the_default_backend(self, dtype: torch.dtype, tolerance: float) -> None:
        """With gradients of the parameters, of the input and of what the list held, at two sizes."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(3, 3)

            def forward(self, x: Tensor, features: list[Tensor]) -> Tensor:
                features.append(self.inner(x).sin() * features[0])
                return x * features[1]

        model = Model().to(dtype)
        wide = copy.deepcopy(model).double()
        dual = jvpgraph.transform(model)
        for size in (2, 5):
            x, first = (torch.randn(size, 3, dtype=dtype, requires_grad=True) for _ in range(2))
            dots = {"x": torch.randn(size, 3, dtype=dtype), "features.0": torch.randn(size, 3, dtype=dtype)}
            features = [first]
            y, y_dot = dual(x, features, tangents=dots)
            assert features[0] is first
            got = [y, y_dot, features[1]]
            got += torch.autograd.grad(y.square().sum() + features[1].sum(), [x, first, *model.parameters()])
            at = [z.detach().double().requires_grad_() for z in (x, first)]
            held = [at[1]]
            value = wide(at[0], held)
            along = tuple(dot.double() for dot in dots.values())
            plain = tuple(z.detach() for z in at)
            wanted = [value, torch.func.jvp(lambda x, z: wide(x, [z]), plain, along)[1], held[1]]
            wanted += torch.autograd.grad(value.square().sum() + held[1].sum(), [*at, *wide.parameters()])
            for one, other in zip(got, wanted, strict=True):
                assert (one.double() - other).norm() <= tolerance * other.norm()

    def test_containers_that_stay_as_they_are_keep_what_they_hold(self) -> None:
        class Model(nn.Module):
            def forward(self, x: Tensor, given: dict[str, Any]) -> Tensor:
                return x * given["a"][0] * given["b"][0]

        x, a, b = torch.randn(3, 2)
        inner = [a]
        given = {"a": inner, "b": (b,), "flag": True, "nothing": None, "kind": torch.float32}
        dots = {"given.a.0": torch.ones(2), "given.b.0": torch.ones(2)}
        jvpgraph.transform(Model(), backend="eager")(x, given, tangents=dots)
        assert given["a"] is inner
        assert inner[0] is a
        assert given["b"][0] is b
