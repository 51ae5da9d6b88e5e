"""Which parts of a model become regions, without running it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from jvpgraph.regions.find import (
    check_choice,
    find_regions,
    fingerprint,
    hooks_forbid_one_graph,
    parts_of,
)


class Block(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.up, self.down = nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Narrow(Block):
    pass


class Model(nn.Module):
    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return x


def names(model: nn.Module, choice: Any = "auto") -> list[str]:
    return [name for name, _ in find_regions(model, choice)]


def sharded(module: nn.Module) -> nn.Module:
    """Of the class that fully_shard gives it."""
    module.__class__ = type(f"FSDP{type(module).__name__}", (FSDPModule, type(module)), {})
    return module


class TestAsked:
    @pytest.mark.parametrize("choice", ["auto", Block, (Block, Narrow), [Block], lambda m: True, nn.Module])
    def test_choices(self, choice):
        check_choice(choice)

    @pytest.mark.parametrize("choice", ["Block", None, (), [], (Block, int), int, Block(), 1])
    def test_what_is_none(self, choice):
        with pytest.raises(ValueError, match="regions must be None, 'auto', one or more classes"):
            check_choice(choice)

    def test_the_outermost_of_a_class(self):
        model = Model(a=Block(), b=Model(c=Narrow(), d=nn.Linear(4, 4)), e=nn.Sequential(nn.Linear(4, 4)))
        assert names(model, Block) == ["a", "b.c"]
        assert names(model, Narrow) == ["b.c"]
        assert names(model, (Narrow, nn.Sequential)) == ["b.c", "e"]
        assert names(model, [nn.Linear]) == ["a.up", "a.down", "b.c.up", "b.c.down", "b.d", "e.0"]
        assert names(model, lambda m: isinstance(m, (Model, Block))) == [""]
        assert names(model, lambda m: isinstance(m, nn.Linear) and m.in_features == 8) == ["a.down", "b.c.down"]

    def test_one_module_under_two_names_is_one_region(self):
        block = Block()
        assert names(Model(a=block, b=block), Block) == ["a"]

    def test_what_is_not_called_or_not_captured_is_none(self):
        blocks = nn.ModuleList([Block(), torch.jit.script(Block())])
        model = Model(blocks=blocks, wrapped=checkpoint_wrapper(Block()))
        assert names(model, lambda m: m is not model) == ["blocks.0", "wrapped._checkpoint_wrapped_module"]

    def test_what_there_is_instead(self):
        model = Model(a=Block(), b=Narrow(), c=nn.Linear(4, 4), d=nn.GELU(), e=nn.Sequential(nn.Linear(4, 4)))
        with pytest.raises(ValueError, match=r"no module of Model is a region; it has Block, Narrow, Sequential$"):
            find_regions(model, nn.Conv2d)
        with pytest.raises(ValueError, match=r"no module of Model is a region; it has no parts$"):
            find_regions(Model(a=nn.Linear(4, 4)), nn.Conv2d)


class TestAuto:
    def test_what_is_repeated_or_stands_in_a_list(self):
        model = Model(
            stem=Block(4),
            blocks=nn.ModuleList([Block(5)]),
            wrapped=nn.ModuleList([checkpoint_wrapper(checkpoint_wrapper(Block(6)))]),
            first=Narrow(7),
            second=Narrow(7),
        )
        wrapped = "wrapped.0" + 2 * "._checkpoint_wrapped_module"
        assert names(model) == ["blocks.0", wrapped, "first", "second"]

    def test_layers_of_pytorch_and_what_has_no_parameters_are_no_blocks(self):
        class Activation(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x

        class Layer(nn.Linear):
            pass

        torch_layers = [nn.Linear(4, 4), nn.Linear(4, 4), sharded(nn.Linear(4, 4))]
        assert names(Model(layers=nn.ModuleList([*torch_layers, Activation(), Activation()]))) == []
        assert names(Model(layers=nn.ModuleList([Layer(4, 4), *torch_layers]))) == ["layers.0"]

    def test_else_all_parts(self):
        model = Model(a=Block(4), b=Model(c=Block(5), d=Narrow(6)), e=nn.Linear(4, 4))
        assert names(model) == ["a", "b"]
        assert names(Model(a=nn.Linear(4, 4))) == []

    @pytest.mark.parametrize(
        ("large", "small", "kept"), [((19, 20), (3, 5), True), ((38, 10), (18, 1), False)], ids=str
    )
    def test_small_ones_are_left_out(self, large, small, kept):
        """20 of 400 parameters are 5 %, 19 of 390 are less."""
        model = Model(
            **{f"b{i}": nn.ModuleList([nn.Sequential(nn.Linear(*size))]) for i, size in enumerate((large, small))}
        )
        assert names(model) == ["b0.0", "b1.0"][: 1 + kept]

    def test_of_what_shards_inside_its_parts(self):
        outer = nn.ModuleList([Model(a=sharded(Block()), b=nn.Linear(4, 4)) for _ in range(2)])
        assert names(Model(outer=outer)) == ["outer.0.a", "outer.1.a"]
        whole = nn.ModuleList([sharded(Block()) for _ in range(2)])
        assert names(Model(blocks=whole)) == ["blocks.0", "blocks.1"]

    def test_of_what_shards_layers_nothing(self):
        model = Model(**{f"b{i}": Model(a=sharded(nn.Linear(4, 4))) for i in range(4)})
        why = r"it has Model: parts inside of b0, b1, b2 are sharded on their own, shard whole blocks$"
        with pytest.raises(ValueError, match=why):
            find_regions(model, "auto")
        with pytest.raises(ValueError, match=r"it has Model$"):
            find_regions(model, Block)
        assert names(sharded(Model(a=nn.Linear(4, 4)))) == []


class TestFingerprint:
    def test_equal(self):
        assert fingerprint(Block()) == fingerprint(Block())

    @pytest.mark.parametrize(
        "other",
        [
            Narrow(),
            Block(5),
            Block().double(),
            Block().requires_grad_(False),
            Model(up=nn.Linear(4, 8), down=nn.Linear(8, 4)),
        ],
        ids=["class", "shape", "dtype", "trained", "names"],
    )
    def test_different(self, other):
        assert fingerprint(Block()) != fingerprint(other)

    def test_parts_and_buffers(self):
        one, two, three = Block(), Block(), Block()
        two.register_buffer("scale", torch.ones(1))
        three.act = nn.GELU()
        four = Block()
        four.register_buffer("shift", torch.ones(1))
        assert len(set(map(fingerprint, (one, two, three, four)))) == 4


def test_parts_of_a_region_are_more_than_layers_of_pytorch():
    inside = Model(shard=sharded(nn.Linear(4, 4)))
    module = Model(a=Block(), b=nn.Linear(4, 4), c=nn.ModuleList([Narrow()]), d=Model(e=Block()), f=inside)
    assert [name for name, _ in parts_of(module)] == ["a", "c.0", "d"]
    assert parts_of(Block()) == []


def test_hooks_that_forbid_one_graph():
    model = Model(a=Block())
    assert hooks_forbid_one_graph(model) == ""
    model.a._is_fsdp_managed_module = False
    assert hooks_forbid_one_graph(model) == ""
    model.a._is_fsdp_managed_module = True
    assert hooks_forbid_one_graph(model) == "FSDP2"
    parallel = DistributedDataParallel.__new__(DistributedDataParallel)
    assert hooks_forbid_one_graph(parallel) == "DistributedDataParallel"
