"""Regions: parts of a model as dual graphs of their own, shared by equal ones, with op-by-op code between them."""

from __future__ import annotations

import copy
import logging
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import jvpgraph
from benchmarks.compile_time import compile_time
from jvpgraph.op_by_op import OpByOp
from jvpgraph.regions import find_regions
from tests.models import Block, CountOps, Output, TinyDiT, inputs, oracle

EXACT = {"atol": 1e-11, "rtol": 1e-11}
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo looks
]


def assert_right(model: nn.Module, plain: nn.Module | None = None, steps: int = 2, **settings) -> jvpgraph.DualModule:
    """Value, tangent and parameter gradients of the transformed model, compared with forward AD and plain autograd.

    Args:
        plain: a model with the same parameters for the oracles, where they do not take ``model``.
    """
    plain = plain or model
    dual = jvpgraph.transform(model, **{"regions": Block, "backend": "eager", **settings})
    for _ in range(steps):
        x, t, x_dot, t_dot = inputs()
        y, d = dual(x, t, tangents={"x": x_dot, "t": t_dot})
        assert_close((y, d), oracle(plain, (x, t), (x_dot, t_dot)), **EXACT)
        assert y.requires_grad
        assert not d.requires_grad
        model.zero_grad()
        y.square().sum().backward()
        got = [p.grad for p in model.parameters()]
        assert_close(got, list(torch.autograd.grad(plain(x, t).square().sum(), list(plain.parameters()))), **EXACT)
    assert not any("forward" in vars(module) for module in model.modules())
    return dual


def graphs(dual: jvpgraph.DualModule) -> list[tuple[str, int, int]]:
    return [(group.kind, len(group.names), group.graphs) for group in dual.regions.groups]


class TestChoice:
    @pytest.mark.parametrize(
        "choice", [Block, (Block, nn.Conv1d), lambda module: isinstance(module, Block)], ids=["class", "classes", "fn"]
    )
    def test_by_hand(self, choice):
        dual = assert_right(TinyDiT(depth=3).double(), regions=choice)
        assert graphs(dual) == [("Block", 3, 1)]
        assert dual.regions.groups[0].calls == 6
        assert "3 x Block (blocks.0, ...): 1 graph, 6 calls" in str(dual.regions)

    @pytest.mark.long
    def test_inductor(self):
        assert graphs(assert_right(TinyDiT(depth=2).double(), backend="inductor")) == [("Block", 2, 1)]

    @pytest.mark.slow
    def test_auto_takes_one_graph_where_it_can(self):
        dual = assert_right(TinyDiT(depth=3).double(), regions="auto")
        assert dual.regions.whole
        assert str(dual.regions).startswith("one graph")
        assert len(dual.reports) == 1

    def test_auto_finds_the_blocks_of_a_model_that_branches_on_data(self, caplog):
        caplog.set_level(logging.INFO, "jvpgraph")
        model = Branches(depth=3).double()
        dual = assert_right(model, Plain(model), regions="auto")
        assert not dual.regions.whole
        assert graphs(dual) == [("Block", 3, 1)]
        assert "test_regions.py" in dual.regions.reason
        assert "3 regions" in caplog.text

    def test_outermost_repeated_blocks(self):
        model = nn.ModuleDict(
            {
                "stem": nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 16)),
                "blocks": nn.ModuleList(Block(16, 2) for _ in range(2)),
                "twins": nn.ModuleList(nn.Sequential(Block(8, 2), Block(8, 2)) for _ in range(2)),
                "head": nn.Linear(16, 4),
            }
        )
        assert [name for name, _ in find_regions(model, "auto")] == ["blocks.0", "blocks.1", "twins.0", "twins.1"]

    def test_blocks_inside_wrappers(self):
        model = TinyDiT(depth=2)
        model.blocks[0] = checkpoint_wrapper(model.blocks[0])
        found = find_regions(model, "auto")
        assert [name for name, _ in found] == ["blocks.0._checkpoint_wrapped_module", "blocks.1"]
        assert {type(module) for _, module in found} == {Block}

    def test_structure_may_change(self):
        model = TinyDiT(depth=2).double()
        dual = assert_right(model)
        model.blocks.append(Block(16, 2).double())
        x, t, x_dot, t_dot = inputs()
        got = dual(x, t, tangents={"x": x_dot, "t": t_dot})
        assert_close(got, oracle(model, (x, t), (x_dot, t_dot)), **EXACT)
        assert len(dual.regions.groups[0].names) == 3


class TestSharing:
    @pytest.mark.parametrize("depth", [4, 40])
    def test_one_graph_whatever_the_depth(self, depth):
        model = TinyDiT(depth=depth).double()
        for i, block in enumerate(model.blocks):
            block.index = i  # what no forward reads costs nothing
        dual = jvpgraph.transform(model, regions=Block, backend="eager")
        x, t, x_dot, t_dot = inputs()
        dual(x, t, tangents={"x": x_dot, "t": t_dot})[0].sum().backward()
        assert graphs(dual) == [("Block", depth, 1)]
        assert len(dual.reports) == 1

    @pytest.mark.timing
    def test_compile_time_does_not_grow_with_depth(self):
        """Processor time; benchmarks/compile_time.py has the figure. One graph takes several times as long."""
        compile_time(1, Block, "eager")  # imports, and what is set up once
        short, deep = (min(compile_time(depth, Block, "eager")[0] for _ in range(2)) for depth in (4, 24))
        assert deep < 1.5 * short

    def test_what_a_forward_reads_is_not_shared(self):
        model = TinyDiT(depth=0).double()
        model.blocks.extend(Scaled(factor) for factor in ("1", "3", "1", "3"))
        dual = assert_right(model, regions=Scaled)
        assert graphs(dual) == [("Scaled", 4, 2)]

    @pytest.mark.long
    @torch._dynamo.config.patch(recompile_limit=3)
    def test_more_variants_than_dynamo_keeps(self):
        model = TinyDiT(depth=0).double()
        model.blocks.extend(Scaled(f"{0.5 + i / 64}") for i in range(torch._dynamo.config.recompile_limit + 3))
        dual = assert_right(model, regions=Scaled)
        assert not dual.regions.groups[0].cause
        assert graphs(dual)[0][2] == len(model.blocks)

    @pytest.mark.slow
    def test_classes_and_training_differ(self):
        model = TinyDiT(depth=2).double()
        model.blocks[1] = Narrow().double()
        dual = assert_right(model, regions=(Block, Narrow))
        assert graphs(dual) == [("Block", 1, 1), ("Narrow", 1, 1)]
        x, t, x_dot, t_dot = inputs()
        dual.eval()(x, t, tangents={"x": x_dot, "t": t_dot})
        assert graphs(dual)[1] == ("Narrow", 1, 2), "the dropout of training"

    @pytest.mark.long
    def test_sizes_vary(self):
        model = TinyDiT(depth=3).double()
        dual = jvpgraph.transform(model, regions=Block, backend="eager")
        for batch, tokens in ((2, 6), (3, 8), (5, 10)):
            x, t, x_dot, t_dot = inputs(batch, tokens)
            got = dual(x, t, tangents={"x": x_dot, "t": t_dot})
            assert_close(got, oracle(model, (x, t), (x_dot, t_dot)), **EXACT)
        found = graphs(dual)
        assert found[0][2] <= 3  # the first size, and two for all others: the first block's input is a view
        x, t, x_dot, t_dot = inputs(4, 7)
        dual(x, t, tangents={"x": x_dot, "t": t_dot})
        assert graphs(dual) == found

    @pytest.mark.long
    def test_sets_of_active_arguments(self):
        model = TinyDiT(depth=2).double()
        dual = jvpgraph.transform(model, regions=Block, backend="eager")
        x, t, x_dot, t_dot = inputs()
        for tangents in ({"x": x_dot}, {"t": t_dot}, {"x": x_dot, "t": t_dot}):
            dots = (tangents.get("x", 0 * x), tangents.get("t", 0 * t))
            assert_close(dual(x, t, tangents=tangents), oracle(model, (x, t), dots), **EXACT)
        assert dual.regions.groups[0].graphs == 3  # x alone; c alone in the first block; both


class TestArguments:
    def test_nested_and_of_other_kinds(self):
        class Part(nn.Module):
            def forward(self, x, *more, scale=None, flag=True, named, none=None):
                y = x * named["c"] * scale + more[0][0].sin()
                return {"y": y, "twice": (y * 2, None, "text", 7), "out": Output(y.cos(), torch.arange(3))}

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.part, self.weight = Part(), nn.Parameter(torch.ones(()))

            def forward(self, x, t):
                got = self.part(x.exp(), (x.t(), 5), scale=self.weight, named={"c": t, "unused": None}, flag=False)
                assert got["twice"][1:] == (None, "text", 7)
                assert got["out"].index.tolist() == [0, 1, 2]
                return got["y"] + got["twice"][0] * got["out"].sample

        x, t, x_dot, t_dot = (torch.randn(3, 3).double() for _ in range(4))
        model = Model().double()
        dual = jvpgraph.transform(model, regions=Part, backend="eager")
        y, d = dual(x, t, tangents={"x": x_dot, "t": t_dot})
        assert_close((y, d), oracle(model, (x, t), (x_dot, t_dot)), **EXACT)
        assert dual.regions.groups[0].graphs == 1
        assert_close(torch.autograd.grad(y.sum(), model.weight), torch.autograd.grad(model(x, t).sum(), model.weight))

    def test_no_argument_is_active(self):
        class Model(TinyDiT):
            def forward(self, x, t):
                return (
                    super().forward(x, t)
                    + self.blocks[0](torch.ones(1, 2, 16).double(), torch.ones(1, 16).double()).sum()
                )

        dual = assert_right(Model(depth=1).double())
        assert dual.regions.groups[0].calls == 2

    @pytest.mark.parametrize(
        "kind", ["input", "view", "detached", "detached twice", "beside it", "expanded", "two views"]
    )
    def test_outputs_that_alias(self, kind):
        class Part(nn.Module):
            def forward(self, x):
                if kind == "two views":
                    return x.sin().chunk(2)
                return {
                    "input": lambda: (x, x * 2),
                    "view": lambda: (x.t(), x[0].expand(3, -1)),
                    "detached": lambda: (x.detach(), x.cos()),
                    "detached twice": lambda: (x[0].detach(), x.detach()),
                    "beside it": lambda: (x.detach(), x),
                    "expanded": lambda: (x.sum().expand(4), x.exp()),
                }[kind]()

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.part = Part()

            def forward(self, x):
                h = x.sin()
                a, b = self.part(h)
                return a.sum() * b + b.square().sum() + h.sum()

        x, x_dot = torch.randn(4, 4).double(), torch.randn(4, 4).double()
        dual = jvpgraph.transform(Model(), regions=Part, backend="eager")
        assert_close(dual(x, tangents={"x": x_dot}), oracle(Model(), (x,), (x_dot,)), **EXACT)
        assert dual.regions.groups[0].calls == 1

    def test_gradients_of_inputs(self):
        model = TinyDiT(depth=2).double()
        x, t, x_dot, t_dot = inputs()
        x.requires_grad_()
        y, _ = jvpgraph.transform(model, regions=Block, backend="eager")(x, t, tangents={"x": x_dot, "t": t_dot})
        assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(model(x, t).sum(), x), **EXACT)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_autograd(self, mode):
        model = TinyDiT(depth=2).double()
        x, t, x_dot, t_dot = inputs()
        with mode():
            got = jvpgraph.transform(model, regions=Block, backend="eager")(x, t, tangents={"x": x_dot, "t": t_dot})
        assert_close(got, oracle(model, (x, t), (x_dot, t_dot)), **EXACT)
        assert not got[0].requires_grad

    def test_views(self):
        """Of which PyTorch counts the making of a fake as a write, which a region of its own may not do."""

        class Views(nn.Module):
            def __init__(self):
                super().__init__()
                self.part = nn.Softplus()

            def forward(self, x):
                return self.part(x.t()), self.part(x.expand(2, 3, 4)), self.part(x.chunk(2, 1)[1])

        dual = jvpgraph.transform(Views(), regions=nn.Softplus, backend="eager")
        x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()
        assert_close(dual(x, tangents={"x": v}), torch.func.jvp(dual.model, (x,), (v,)), **EXACT)
        assert graphs(dual) == [("Softplus", 1, 3)]


class TestWhatCannotBeCaptured:
    """Runs op by op, and the report says so."""

    def assert_given_up(self, model, cause, plain=None):
        dual = assert_right(model, plain, regions=lambda module: isinstance(module, Block))
        first, *parts = dual.regions.groups
        assert cause in first.cause
        assert first.calls == 0
        assert [(group.kind, group.graphs) for group in parts] == [("Sequential", 1)], "its parts can be captured"
        return dual

    def test_branches_on_data(self, caplog):
        class Branching(Block):
            def forward(self, x, c):
                return super().forward(x * 2 if x.sum().item() < 1e9 else x, c)

        class Twice(Block):
            def forward(self, x, c):
                return super().forward(x * 2, c)

        class Stopped(Branching):  # op by op, a number made of a tensor with a tangent is refused
            def forward(self, x, c):
                return Block.forward(self, x * 2 if x.detach().sum().item() < 1e9 else x, c)

        model, plain = TinyDiT(depth=0).double(), TinyDiT(depth=0).double()
        model.blocks.extend(Stopped(16, 2).double() for _ in range(2))
        plain.blocks.extend(Twice(16, 2).double() for _ in range(2))
        plain.load_state_dict(model.state_dict())
        self.assert_given_up(model, "test_regions.py", plain)
        assert caplog.text.count("runs op by op: 2 x Stopped") == 1

    @pytest.mark.slow
    def test_writes_to_its_argument(self):
        class Writing(Block):
            def forward(self, x, c):
                x.mul_(2)
                return super().forward(x, c)

        class Model(TinyDiT):
            def forward(self, x, t):
                c, x = self.time(torch.sin(t)[:, None]), self.embed(x)
                for block in self.blocks:
                    h = x * 1
                    x = block(h, c) + h  # sees what the block wrote
                return self.head(x)

        model = Model(depth=0).double()
        model.blocks.extend(Writing(16, 2).double() for _ in range(2))
        self.assert_given_up(model, "it writes to")

    def test_reads_an_active_tensor_that_is_no_argument(self):
        class Reading(Block):
            def forward(self, x, c):
                return super().forward(x, c) * self.gate

        class Model(TinyDiT):
            def forward(self, x, t):
                for block in self.blocks:
                    block.gate = torch.cos(t)[:, None, None]
                return super().forward(x, t)

        model = Model(depth=0).double()
        model.blocks.extend(Reading(16, 2).double() for _ in range(2))
        self.assert_given_up(model, "has a tangent and is not an argument")

    def test_unsupported_ops_are_refused(self):
        class Part(nn.Module):
            def forward(self, x):
                return torch.ops.tests_regions.opaque(x)

        with torch.library._scoped_library("tests_regions", "FRAGMENT") as library:
            library.define("opaque(Tensor x) -> Tensor")
            library.impl("opaque", lambda x: x * 2, "CompositeExplicitAutograd")
            library.impl("opaque", lambda x: x * 2, "Meta")
            dual = jvpgraph.transform(nn.Sequential(Part()), regions=Part, backend="eager")
            with pytest.raises(jvpgraph.UnsupportedOp, match=r"opaque.*test_regions.py"):
                dual(torch.randn(3), tangents={"input": torch.randn(3)})


class Gated(TinyDiT):
    """Blocks that read one of their arguments as an attribute, too."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([GatedBlock(), GatedBlock()])

    def forward(self, x, t):
        c = self.time(torch.sin(t)[:, None])
        x = self.embed(x)
        for block in self.blocks:
            block.gate = c
            x = block(x, c)
        return self.head(x)


class GatedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x, c):
        return x + self.up(x) * self.gate[:, None] + c[:, None]


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_one_tensor_as_an_argument_and_as_an_attribute(grad):
    """Dynamo would take it for one input, and the attribute for the argument without its tangent."""
    model, (x, t, x_dot, t_dot) = Gated().double(), inputs()
    dual = jvpgraph.transform(model, regions=GatedBlock, backend="eager")
    with grad():
        y, d = dual(x, t, tangents={"x": x_dot, "t": t_dot})
    assert_close((y, d), oracle(model, (x, t), (x_dot, t_dot)), **EXACT)
    assert "which has a tangent and is not an argument" in str(dual.regions)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_tangents_between_regions_do_not_pile_up(grad, monkeypatch):
    """Autograd keeps what goes into a region until the backward; its tangent is free when the next region has run."""
    held = []
    sweep = OpByOp.sweep
    monkeypatch.setattr(OpByOp, "sweep", lambda self: (sweep(self), held.append(self.bytes()))[0])

    def most_held(depth: int) -> int:
        held.clear()
        x, t, x_dot, t_dot = inputs()
        with grad():
            dual = jvpgraph.transform(TinyDiT(depth=depth).double(), regions=Block, backend="eager")
            dual(x, t, tangents={"x": x_dot, "t": t_dot})
        assert len(held) == depth
        return max(held)

    assert most_held(12) == most_held(3)


class TestCheckpoints:
    """A checkpoint around a region moves into its graph; what else it holds is recomputed as ever."""

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("kind", "backend"),
        [
            *((kind, "eager") for kind in ("alone", "among others", "nested", "reentrant", "wrapper")),
            *((kind, "eager") for kind in ("selective", "selective, among others")),
            ("alone", "inductor"),
        ],
    )
    def test_value_tangent_and_gradients(self, kind, backend):
        model = Checkpointed(kind, depth=2).double()
        dual = assert_right(model, Plain(model), backend=backend)
        assert dual.regions.groups[0].calls > 0

    @pytest.mark.parametrize("kind", ["alone", "among others", "nested", "wrapper"])
    def test_the_backward_recomputes_the_primal_only(self, kind):
        model = Checkpointed(kind, depth=2).double()
        x, t, x_dot, t_dot = inputs()
        y, _ = jvpgraph.transform(model, regions=Block, backend="eager")(x, t, tangents={"x": x_dot, "t": t_dot})
        with CountOps() as backward:
            y.sum().backward()
        assert backward.ran["jvpgraph.attention_backward.default"] == 2
        assert backward.ran["jvpgraph.attention_jvp.default"] == 0
        assert backward.ran["aten.gelu.default"] >= 2, "nothing was recomputed"

    @pytest.mark.parametrize("kind", ["selective", "selective, among others"])
    def test_what_a_policy_keeps_is_not_computed_again(self, kind):
        model = Checkpointed(kind, depth=2).double()
        x, t, x_dot, t_dot = inputs()
        y, _ = jvpgraph.transform(model, regions=Block, backend="eager")(x, t, tangents={"x": x_dot, "t": t_dot})
        with CountOps() as backward:
            y.sum().backward()
        assert backward.ran["aten.addmm.default"] == 0
        assert backward.ran["aten.gelu.default"] == 2

    @pytest.mark.slow
    def test_saves_no_more_than_the_checkpointed_model(self):
        def saved(model, call):
            sizes = {}

            def pack(x):
                sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
                return x

            x, t, x_dot, t_dot = inputs()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                y = call(model, x, t, x_dot, t_dot)
            parameters = {p.untyped_storage()._cdata for p in model.parameters()}
            assert y.requires_grad
            return sum(size for key, size in sizes.items() if key not in parameters)

        def dual(model, x, t, x_dot, t_dot):
            transformed = jvpgraph.transform(model, regions=Block, backend="eager")
            return transformed(x, t, tangents={"x": x_dot, "t": t_dot})[0]

        checkpointed = saved(Checkpointed("alone", depth=4).double(), dual)
        assert checkpointed < 0.6 * saved(TinyDiT(depth=4).double(), dual)

    def test_hooks_of_other_kinds_stay(self):
        """Offloading what a region saves works as without regions."""
        model = TinyDiT(depth=2).double()
        dual = jvpgraph.transform(model, regions=Block, backend="eager")
        x, t, x_dot, t_dot = inputs()
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: packed.append(x.shape) or x.numpy(force=True), torch.tensor
        ):
            y, _ = dual(x, t, tangents={"x": x_dot, "t": t_dot})
        y.sum().backward()
        assert len(packed) > 20
        got = [p.grad for p in model.parameters()]
        assert_close(got, list(torch.autograd.grad(model(x, t).sum(), list(model.parameters()))), **EXACT)


class TestTheModelStaysWhatItIs:
    def test_hooks_see_plain_tensors_once(self):
        model = TinyDiT(depth=2).double()
        seen = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda module, args: seen.append(("pre", *map(type, args))))
            block.register_forward_hook(lambda module, args, out: seen.append(("post", type(out))) or out * 2)
        assert_right(model, steps=1)
        runs = 3  # the dual call and two oracles
        assert Counter(entry[0] for entry in seen) == {"pre": 2 * runs, "post": 2 * runs}
        assert seen[:2] == [("pre", Tensor, Tensor), ("post", Tensor)]

    @pytest.mark.slow
    def test_a_forward_of_the_instance_is_called(self):
        model = TinyDiT(depth=2).double()
        own = model.blocks[0].forward
        model.blocks[0].forward = lambda x, c: own(x, c) * 3
        before = vars(model.blocks[0])["forward"]
        x, t, x_dot, t_dot = inputs()
        got = jvpgraph.transform(model, regions=Block, backend="eager")(x, t, tangents={"x": x_dot, "t": t_dot})
        assert_close(got, oracle(model, (x, t), (x_dot, t_dot)), **EXACT)
        assert vars(model.blocks[0])["forward"] is before

    def test_after_an_error(self):
        class Raising(TinyDiT):
            def forward(self, x, t):
                super().forward(x, t)
                raise RuntimeError("in the model")

        model = Raising(depth=1).double()
        x, t, x_dot, t_dot = inputs()
        with pytest.raises(RuntimeError, match="in the model"):
            jvpgraph.transform(model, regions=Block, backend="eager")(x, t, tangents={"x": x_dot, "t": t_dot})
        assert "forward" not in vars(model.blocks[0])

    def test_without_tangents(self):
        model = TinyDiT(depth=1).double()
        x, t, *_ = inputs()
        dual = jvpgraph.transform(model, regions=Block)
        assert torch.equal(dual(x, t), model(x, t))
        assert not dual.regions.groups

    @pytest.mark.slow
    def test_copies(self):
        dual = assert_right(TinyDiT(depth=2).double())
        for twin in (copy.deepcopy(dual), pickle.loads(pickle.dumps(dual))):
            x, t, x_dot, t_dot = inputs()
            got = twin(x, t, tangents={"x": x_dot, "t": t_dot})
            assert_close(got, oracle(twin.model, (x, t), (x_dot, t_dot)), **EXACT)
            assert graphs(twin) == [("Block", 2, 1)]


class TestErrors:
    @pytest.mark.parametrize("choice", ["blocks", 3, (), (Block, 3), [Tensor]])
    def test_not_a_choice(self, choice):
        with pytest.raises(ValueError, match="regions must be None, 'auto', one or more classes"):
            jvpgraph.transform(TinyDiT(), regions=choice)

    def test_nothing_found(self):
        x, t, x_dot, t_dot = inputs()
        with pytest.raises(ValueError, match=r"no module of TinyDiT is a region; it has Block, Sequential"):
            jvpgraph.transform(TinyDiT().double(), regions=nn.Conv2d)(x, t, tangents={"x": x_dot, "t": t_dot})

    @pytest.mark.parametrize("other", [{"differentiable_tangent": True}, {"backend": "op_by_op"}])
    def test_not_together(self, other):
        with pytest.raises(ValueError, match="regions, graphs with op-by-op code between them"):
            jvpgraph.transform(TinyDiT(), regions="auto", **other)

    @pytest.mark.slow
    def test_non_finite_tangents_name_the_module(self):
        model = TinyDiT(depth=2).double()
        model.blocks[1].norm.eps = 0.0
        with torch.no_grad():
            model.blocks[1].norm.weight.fill_(float("inf"))
        dual = jvpgraph.transform(model, regions=Block, backend="eager", config=jvpgraph.Config(check_finite=True))
        x, t, x_dot, t_dot = inputs()
        with pytest.raises(jvpgraph.NonFiniteTangent, match=r"blocks\.1"):
            dual(x, t, tangents={"x": x_dot, "t": t_dot})


# ------------------------------------------------------------------------------------------------------ models


class Branches(TinyDiT):
    """Looks at its data between the blocks."""

    def forward(self, x, t):
        c, x = self.time(torch.sin(t)[:, None]), self.embed(x)
        for block in self.blocks:
            if x.detach().sum().item() < 1e9:
                x = block(x, c_BD=c)
        return self.head(x)

    def plain(self, x, t):
        return TinyDiT.forward(self, x, t)


def keep_products():
    return create_selective_checkpoint_contexts(_keeps_products)


def _keeps_products(context, op, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointed(TinyDiT):
    def __init__(self, kind, **settings):
        super().__init__(**settings)
        self.kind = kind
        if kind == "wrapper":
            self.blocks = nn.ModuleList(
                checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT) for block in self.blocks
            )

    def step(self, block, x, c):
        if "among others" in self.kind or self.kind == "nested":
            x = torch.tanh(x) * torch.sin(x)
            inner = checkpoint(block, x, c, use_reentrant=False) if self.kind == "nested" else block(x, c)
            return torch.tanh(inner) * c[:, None] + x.cos() * inner
        return block(x, c)

    def forward(self, x, t):
        c, x = self.time(torch.sin(t)[:, None]), self.embed(x)
        for block in self.blocks:
            if self.kind == "wrapper":
                x = block(x, c_BD=c)
            elif "selective" in self.kind:
                x = checkpoint(self.step, block, x, c, use_reentrant=False, context_fn=keep_products)
            else:
                x = checkpoint(self.step, block, x, c, use_reentrant=self.kind == "reentrant")
        return self.head(x)

    def plain(self, x, t):
        c, x = self.time(torch.sin(t)[:, None]), self.embed(x)
        for block in self.blocks:
            if "among others" in self.kind or self.kind == "nested":
                x = torch.tanh(x) * torch.sin(x)
                inner = block(x, c)
                x = torch.tanh(inner) * c[:, None] + x.cos() * inner
            else:
                x = getattr(block, "_checkpoint_wrapped_module", block)(x, c)
        return self.head(x)


class Plain(nn.Module):
    """``model.plain`` with its parameters."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model.plain(x, t)


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.block, self.factor = Block(16, 2).double(), factor

    def forward(self, x, c):
        return self.block(x, c) * float(self.factor)


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x, c=None):
        return x + F.dropout(self.linear(self.norm(x)).sin(), 1e-12, self.training)


class HandsThrough(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.gain, fixed


class AroundIt(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = HandsThrough()

    def forward(self, x: Tensor) -> Tensor:
        y, fixed = self.block(x + 1, x.detach())
        return y + fixed + 3 * x


def test_a_detached_argument_that_is_handed_through_takes_no_tangent_away():
    x = torch.randn(3).double()
    dual = jvpgraph.transform(AroundIt(), regions=HandsThrough, backend="eager")
    assert torch.equal(dual(x, tangents={"x": torch.ones(3).double()})[1], torch.full((3,), 5.0).double())


class HandsViewsThrough(nn.Module):
    def forward(self, x: Tensor, fixed: Tensor) -> tuple[Tensor, ...]:
        return x.t(), fixed.t(), x, fixed, x * 2


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("eager", torch.float64), ("inductor", torch.float32), ("inductor", torch.bfloat16)],
)
def test_views_of_arguments_have_the_tangents_of_these(backend, dtype, grad):
    """Value, tangent and the gradient of the input, at two sizes; all of them are exact."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = HandsViewsThrough()

        def forward(self, x):
            return tuple(y * 1 for y in self.part(x, x.detach()))

    model = Around()
    dual = jvpgraph.transform(model, regions=HandsViewsThrough, backend=backend, dynamic=True)
    for size in ((3, 4), (5, 6)):
        x, v = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)
        with torch.set_grad_enabled(grad):
            given = x.clone().requires_grad_(grad)
            outs, dots = dual(given, tangents={"x": v})
        assert_close((outs, tuple(dot.to(dtype) for dot in dots)), torch.func.jvp(model, (x,), (v,)), **EXACT)
        if grad:
            (g,) = torch.autograd.grad(sum(y.sum() for y in outs), given)
            assert_close(g, torch.full_like(g, 4.0), **EXACT)
    assert graphs(dual) == [("HandsViewsThrough", 1, 1)]


class Averaging(nn.Module):
    """A block that keeps a running mean, which the code around it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).sin()
        self.mean.data.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return y


class Averages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Averaging() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * sum(block.mean for block in self.blocks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a region cannot be captured")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_what_a_block_writes_by_data_has_its_tangent_outside(dtype: torch.dtype, tolerance: float) -> None:
    """On the default backend, at two sizes, with gradients: the buffer brought none along."""
    for size in (2, 3):
        torch.manual_seed(size)
        model = Averages().to(dtype)
        wide = copy.deepcopy(model).double()
        x, x_dot = torch.randn(size, 4, dtype=dtype, requires_grad=True), torch.randn(size, 4, dtype=dtype)
        y, y_dot = jvpgraph.transform(model, regions=Averaging)(x, tangents={"x": x_dot})
        y.sum().backward()
        at, along = x.detach().double().requires_grad_(), 1e-6 * x_dot.double()
        with torch.no_grad():
            difference = copy.deepcopy(wide)(at + along) - copy.deepcopy(wide)(at - along)
        wide(at).sum().backward()
        found = [y_dot, x.grad, *(p.grad for p in model.parameters())]
        wanted = [difference / 2e-6, at.grad, *(p.grad for p in wide.parameters())]
        for one, other in zip(found, wanted, strict=True):
            assert (one.double() - other).norm() < tolerance * other.norm()
