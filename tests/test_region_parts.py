"""Regions from the inside: reports, whose forward runs, whose saved-tensor hooks are whose, what is written."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import jvpgraph
from jvpgraph.dynamo import NOT_CAPTURED, NOT_COMPILED, own_errors
from jvpgraph.errors import CaptureError
from jvpgraph.markers import make_dual
from jvpgraph.op_by_op import OpByOp
from jvpgraph.open_checkpoints import open_checkpoints
from jvpgraph.regions.checkpoints import Call, hooks_taken_off, policy
from jvpgraph.regions.run import Group, _own_forward, _replaced, _set_tangents, brief
from jvpgraph.regions.writes import refuse_writes


@pytest.fixture
def x() -> Tensor:
    return torch.arange(1.0, 5.0).double()


class TestReports:
    def test_groups(self):
        one = Group("Block", ["blocks.0"], graphs=1, calls=2)
        assert str(one) == "1 x Block (blocks.0): 1 graph, 2 calls"
        two = Group("Block", ["blocks.0", "blocks.1"], graphs=2, calls=4)
        assert str(two) == "2 x Block (blocks.0, ...): 2 graphs, 4 calls"
        assert str(Group("Block", ["a"], cause="it branches")) == "1 x Block (a): it branches"

    def test_the_line_and_what_the_compiler_names_are_told(self):
        told = f"{NOT_CAPTURED}Data-dependent branching\n  Explanation: ...\n"
        code = (
            'from user code:\n   File "a.py", line 1, in outer\n    y = f(x)\n  File "b.py", line 2, in inner\n    if x'
        )
        assert brief(CaptureError(f"{told}\n{code}")) == (
            'not captured: Data-dependent branching File "b.py", line 2, in inner'
        )
        assert brief(CaptureError(told)) == "not captured: Data-dependent branching"
        failed = f"{NOT_COMPILED}LoweringException\n  target: aten.some.default\n{code}"
        assert brief(CaptureError(failed)) == "not compiled: LoweringException target: aten.some.default"
        assert brief(CaptureError("it reads y\nCaused by: z")) == "it reads y Caused by: z"


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class TestForward:
    def test_replaced_and_put_back(self, x):
        module = Doubled()
        with _replaced(module, lambda x: x * 3):
            assert_close(module(x), x * 3)
            with _own_forward(module):
                assert_close(module(x), x * 2)
                assert "forward" not in vars(module)
            assert_close(module(x), x * 3)
        assert "forward" not in vars(module)

    @pytest.mark.parametrize(
        "own", [lambda x: x * 5, types.MethodType(lambda self, x: x * 5, Doubled())], ids=["function", "of another"]
    )
    def test_a_forward_of_the_instance_is_its_own(self, own, x):
        module = Doubled()
        module.forward = own
        with _replaced(module, lambda x: x * 3):
            assert_close(module(x), x * 3)
            with _own_forward(module):
                assert module.forward is own
            assert_close(module(x), x * 3)
        assert module.forward is own

    def test_also_after_an_error(self):
        module = Doubled()
        with pytest.raises(RuntimeError, match="inside"), _replaced(module, lambda x: x), _own_forward(module):
            raise RuntimeError("inside")
        assert "forward" not in vars(module)


def top_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def other_hooks() -> Any:
    return saved_tensors_hooks(lambda x: x, lambda x: x)


class TestCheckpoints:
    def test_open_ones_innermost_first(self, x):
        seen = []

        def note(y: Tensor) -> Tensor:
            before = top_hooks()
            seen.append(open_checkpoints())
            assert top_hooks() == before
            assert seen[-1] == open_checkpoints()
            return y.sin()

        def outer(y: Tensor) -> Tensor:
            return checkpoint(note, note(y), use_reentrant=False)

        x.requires_grad_()
        assert open_checkpoints() == []
        with other_hooks():
            checkpoint(outer, x, use_reentrant=False)
            assert open_checkpoints() == []
        (first,), (inner, also_first) = seen
        assert first is also_first is not inner
        with other_hooks():
            assert checkpoint(lambda y: (y.sin(), open_checkpoints())[1], x, use_reentrant=False)[0] is not first

    def test_hooks_of_others_hide_what_is_outside_of_them(self, x):
        def inside(y: Tensor) -> list[Any]:
            with other_hooks():
                return open_checkpoints()

        assert checkpoint(inside, x.requires_grad_(), use_reentrant=False) == []

    def test_hooks_taken_off_are_put_back_in_order(self):
        with other_hooks():
            outer = top_hooks()
            with other_hooks():
                middle = top_hooks()
                with other_hooks():
                    inner = top_hooks()
                    with hooks_taken_off(2):
                        assert top_hooks() == outer
                    assert top_hooks() == inner
                    with hooks_taken_off(0):
                        assert top_hooks() == inner
                assert top_hooks() == middle

    def test_the_policy_is_that_of_the_innermost_selective_checkpoint(self, x):
        def keep(*_: Any, **__: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE

        def recompute(*_: Any, **__: Any) -> CheckpointPolicy:
            return CheckpointPolicy.PREFER_RECOMPUTE

        outside, _ = create_selective_checkpoint_contexts(keep)
        inside, _ = create_selective_checkpoint_contexts(recompute)
        assert policy() is None
        with outside:
            assert policy() is keep
            with inside:
                assert policy() is recompute

    @pytest.mark.parametrize("selective", [None, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE])
    def test_a_call_in_a_checkpoint_runs_again_in_the_backward(self, selective, x):
        class Counted(nn.Module):
            runs = 0

            def forward(self, x: Tensor, *, factor: float) -> Tensor:
                self.runs += 1
                return (x * factor).sin()

        module = Counted()
        x.requires_grad_()
        for again, call in enumerate((Call(False, selective, False), Call(True, selective, False))):
            module.runs = 0
            call.run(module, x, factor=3.0).sum().backward()
            assert module.runs == 1 + again
        assert_close(x.grad, 2 * 3 * (3 * x).cos())

    def test_outputs_are_taken_apart_where_they_have_to_be(self, x):
        class Twice(nn.Module):
            def forward(self, x: Tensor, alone: bool = False) -> Any:
                return x if alone else {"a": x, "b": x.view(2, 2), "c": "text"}

        for apart in (False, True):
            out = Call(False, None, apart).run(Twice(), x)
            assert [(y.data_ptr() == x.data_ptr()) for y in (out["a"], out["b"])] == 2 * [not apart]
            assert out["c"] == "text"
            assert Call(False, None, apart).run(Twice(), x, alone=True) is x


def replace_data(x: Tensor, y: Tensor) -> None:
    y.data = x * 2


class TestWrites:
    @pytest.fixture(autouse=True)
    def _forget(self) -> None:
        torch._dynamo.reset()

    def captured(self, fn: Any, *args: Any) -> Any:
        def backend(gm: Any, _inputs: Any) -> Any:
            refuse_writes(gm)
            return gm.forward

        with own_errors(), torch.no_grad():
            return torch.compile(fn, backend=backend, fullgraph=True)(*args)

    @pytest.mark.parametrize("write", [lambda x, y: y.data.mul_(2), lambda x, y: y.data[0].zero_(), replace_data])
    def test_what_is_written_by_data_is_refused_too(self, x, write):
        """It counts no version: the tangent of a buffer that code outside reads was lost."""

        def fn(x: Tensor, y: Tensor) -> Tensor:
            write(x, y)
            return x * 2

        with pytest.raises(CaptureError, match=r"\.data, which the code around it may see"):
            self.captured(fn, x, x.clone())

    def test_what_is_read_by_data_is_not(self, x):
        assert_close(self.captured(lambda x, y: x * y.data, x, x.clone()), x * x)

    @pytest.mark.parametrize(
        "write", [lambda x, y: y.mul_(2), lambda x, y: y[0].zero_(), lambda x, y: y.view(2, 2).t().add_(x.view(2, 2))]
    )
    def test_to_what_is_given(self, write, x):
        with pytest.raises(CaptureError, match="it writes to l_y_ in place, which the code around it may see"):
            self.captured(write, x, x * 2)

    def test_to_what_is_marked(self, x):
        with pytest.raises(CaptureError, match="it writes to l_y_ in place"):
            self.captured(lambda x, y: make_dual(y, x).mul_(2), x, x * 2)

    def test_not_to_its_own(self, x):
        assert_close(self.captured(lambda x, y: (x * y).mul_(2), x, x), x * x * 2)

    def test_what_was_written_before_was_not_written_here(self, x):
        written = torch.zeros(8).double()
        written.add_(1)
        assert_close(self.captured(lambda x, y: x + y, written[4:], x), x + 1)

    def test_numbers_of_steps_may_be_counted(self, x):
        steps = torch.zeros((), dtype=torch.int64)
        assert_close(self.captured(lambda x, steps: (x * 2, steps.add_(1))[0], x, steps), x * 2)
        assert steps == 1


class TestTangentsOfOutputs:
    def set_of(self, mode: OpByOp, *outs: tuple[Tensor, Tensor]) -> list[Any]:
        _set_tangents(mode, [(*out, False) for out in outs])
        return [mode.tangent(out) for out, _ in outs]

    @pytest.mark.parametrize("first", [0, 1])
    def test_a_detached_alias_has_none(self, first, x):
        with OpByOp() as mode:
            y = x * 1
            outs = [(y, x * 2), (y.view(4), x * 0)]
            found = self.set_of(mode, outs[first], outs[1 - first])
            assert_close(found[first], x * 2)
            assert found[1 - first] is None

    def test_of_parts_each_has_its_own(self, x):
        with OpByOp() as mode:
            y = x * 1
            assert_close(self.set_of(mode, (y[:2], x[:2]), (y[2:], x[2:] * 0)), [x[:2], x[2:] * 0])
            assert_close(mode.tangent(y), torch.cat([x[:2], x[2:] * 0]))

    def test_of_two_without_any_it_is_zero(self, x):
        with OpByOp() as mode:
            y, z = x * 1, x * 1
            assert_close(self.set_of(mode, (y, x * 0), (y.view(4), x * 0), (z, x * 0)), [x * 0] * 3)


class Times(nn.Module):
    def __init__(self, factor: str):
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(()).double()), factor

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * float(self.factor) * self.weight


def assert_same(model: nn.Module, x: Tensor, **settings: Any) -> jvpgraph.DualModule:
    dual = jvpgraph.transform(model, **{"regions": Times, "backend": "eager", **settings})
    for _ in range(2):
        assert_close(dual(x, tangents={"input": x})[1], torch.func.jvp(model, (x,), (x,))[1])
    return dual


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
@torch._dynamo.config.patch(recompile_limit=1)
def test_more_variants_than_dynamo_keeps(x):
    dual = assert_same(nn.Sequential(*map(Times, "2334")), x)
    (group,) = dual.regions.groups
    assert (group.cause, group.graphs, group.calls) == ("", 3, 8)


def test_a_number_that_changes(x):
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: float) -> Tensor:
            return x.sin() * factor

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Scaled()

        def forward(self, input: Tensor) -> Tensor:
            return self.part(self.part(self.part(input, 0.5), 0.75), 1.5)

    dual = assert_same(Model(), x, regions=Scaled)
    assert not dual.regions.groups[0].cause


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_what_is_handed_through_keeps_its_tangent_or_has_none(grad, x):
    class HandsThrough(nn.Module):
        def forward(self, x: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
            return x, fixed

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = HandsThrough()

        def forward(self, input: Tensor) -> Tensor:
            y, fixed = self.part(input + 1, input.detach())
            return y.sin() + fixed * 2 + input * 3

    with grad():
        assert_same(Model(), x, regions=HandsThrough)
