"""Op by op, at the level of memory: where tangents are kept, what is known of storages without one, and wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing import assert_close
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

import jvpgraph
from jvpgraph.errors import UnsupportedNode
from jvpgraph.op_by_op import OpByOp
from jvpgraph.op_by_op.kinds import is_about
from jvpgraph.op_by_op.shadows import CONSTANTS
from jvpgraph.storages import key_of

NODE = UnsupportedNode("aten.some.default", "op by op", (), "here", "nobody computes it")


class Wrapper(Tensor):
    """One tensor or two, and something that is none."""

    @staticmethod
    def __new__(cls, *parts: Tensor, note: str = "") -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(
            cls, parts[0].shape, dtype=parts[0].dtype, dispatch_sizes_strides_policy="sizes"
        )
        made.names = [f"part_{i}" for i in range(len(parts))]
        made.note = note
        vars(made).update(zip(made.names, parts))
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [*self.names, "note"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], how: Any, size: Any, stride: Any) -> Wrapper:
        return Wrapper(*(x for name, x in inner.items() if name != "note"), note=inner["note"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapper, lambda w: w.part_0, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapper, func(*args, **kwargs))


def op_by_op(fn, x, x_dot):
    return jvpgraph.jvp(fn, (x,), (x_dot,), backend="op_by_op")


@pytest.fixture
def x():
    return torch.arange(1.0, 5.0).double()


class TestTangents:
    def test_of_a_wrapper_of_one_tensor_is_such_a_wrapper(self, x):
        with OpByOp() as mode:
            inner = x * 1
            wrapper = Wrapper(inner, note="kept")
            assert mode.tangent(wrapper) is None
            mode.set_tangent(wrapper, Wrapper(x * 2))
            found = mode.tangent(wrapper)
            assert (type(found), found.note) == (Wrapper, "kept")
            assert_close(found.part_0, x * 2)
            assert_close(mode.tangent(inner), x * 2)
            assert_close(mode.tangent(AsyncCollectiveTensor(inner)), x * 2)

    def test_of_a_wrapper_of_two_is_refused(self, x):
        with OpByOp() as mode:
            first, second = x * 1, x * 1
            assert mode.tangent(Wrapper(first, second)) is None
            mode.set_tangent(second, x)
            with pytest.raises(jvpgraph.UnsupportedOp, match=r"Wrapper .*wraps several tensors"):
                mode.tangent(Wrapper(first, second))

    def test_a_sparse_tensor_has_none(self, x):
        with OpByOp() as mode:
            sparse = x[:, None].to_sparse()
            assert mode.tangent(sparse) is None
            with pytest.raises(jvpgraph.UnsupportedOp, match="only dense tensors"):
                mode.set_tangent(sparse, sparse)
            assert mode.tangent(x) is None
        assert None not in CONSTANTS

    def test_of_an_expanded_tensor(self, x):
        with OpByOp() as mode:
            for wide in (
                x[:, None].expand(4, 3),
                (x * 1)[:, None].expand(4, 2),
                (x * 1)[:, None].expand(4, 1),
                (x * 1).expand(0, 4),
            ):
                mode.set_tangent(wide, wide * 2)
                assert_close(mode.tangent(wide), wide * 2)

    def test_memory_holds_tangents_of_one_type(self, x):
        with OpByOp() as mode:
            y = x * 1
            mode.set_tangent(y, x)
            with pytest.raises(jvpgraph.UnsupportedOp, match=r"writes torch.float32 into .* torch.float64"):
                mode.set_tangent(y.view(torch.float32), x.view(torch.float32))
            mode.set_tangent(y.view(torch.complex128), x.view(torch.complex128) * 2)
            assert_close(mode.tangent(y), x * 2)
            assert mode.bytes() == 32

    def test_what_is_gone_is_forgotten(self, x):
        with OpByOp() as mode:
            kept, gone = x * 1, x * 1
            empty, also_empty = torch.empty_like(x), torch.empty_like(x)
            mode.set_tangent(kept, x)
            mode.set_tangent(gone, x)
            unknown, also_unknown = x * 1, x * 1
            mode.set_unknown(unknown, NODE)
            mode.set_unknown(also_unknown, NODE)
            del gone, also_empty, also_unknown
            mode.sweep()
            known = [mode._shadows, mode._dtypes, mode._seen, mode._unwritten, mode._unknown]
            assert not any(key.expired() for keys in known for key in keys)
            assert all(key_of(y) in keys for y, keys in zip((kept, kept, kept, empty, unknown), known))
            assert_close(mode.tangent(kept), x)

    def test_what_has_none_is_refused_where_it_is_used(self, x):
        with OpByOp() as mode:
            y = x * 1
            mode.set_unknown(y, NODE)
            with pytest.raises(jvpgraph.UnsupportedOp, match="nobody computes it"):
                y.view(2, 2) * 2
            with pytest.raises(jvpgraph.UnsupportedOp, match="nobody computes it"):
                mode.set_unknown(x[:, None].to_sparse(), NODE)


class TestWhereValuesComeFrom:
    def test_an_alias_of_what_is_older_than_the_call_is_a_constant(self, x):
        with OpByOp() as mode:
            assert mode.tangent(x) is None
            with _disable_current_modes():
                alias = x.view(2, 2)
            assert mode.tangent(alias) is None

    def test_constants_are_kept_as_long_as_they_live(self, x):
        gone = torch.ones(4).double()
        key = key_of(gone)
        with OpByOp() as mode:
            assert mode.tangent(x) is mode.tangent(gone) is None
        assert key in CONSTANTS
        del gone
        with OpByOp():
            assert key not in CONSTANTS
            assert key_of(x) in CONSTANTS

    def test_memory_that_was_handed_out_takes_no_tangent(self, x):
        def fn(x):
            y = torch.zeros(4).double()
            y.numpy()
            return y.copy_(x)

        with pytest.raises(jvpgraph.UnsupportedOp, match=r"numpy .*handed out earlier"):
            op_by_op(fn, x, x)

    def test_an_output_that_something_else_filled_is_refused(self, x):
        def fn(x):
            y = torch.empty_like(x)
            with _disable_current_modes():
                y.copy_(x)
            return y

        with pytest.raises(jvpgraph.UnsupportedOp, match="y was made empty, and no op was seen to write"):
            op_by_op(fn, x, x)

    @pytest.mark.parametrize("op", [torch.ops.aten.lift, torch.ops.aten.lift_fresh])
    def test_what_is_made_of_numbers_is_a_constant(self, op, x):
        with OpByOp() as mode:
            with _disable_current_modes():
                made = torch.ones(4)
            assert mode.tangent(op(made)) is None

    def test_a_view_by_its_schema_that_copies_is_no_zero(self, x):
        with torch.library._scoped_library("tests_shadows", "FRAGMENT") as library:
            library.define("window(Tensor(a) x) -> Tensor(a)")
            library.impl("window", lambda x: x.clone(), "CompositeExplicitAutograd")
            with pytest.raises(jvpgraph.UnsupportedOp, match=r"tests_shadows\.window"):
                op_by_op(lambda x: torch.ops.tests_shadows.window(x) * 2, x, x)

    def test_new_data_of_a_detached_tensor_has_a_tangent(self, x):
        def fn(x):
            y = x.detach()
            y.data = x * 3
            return y * 2

        assert_close(op_by_op(fn, x, x)[1], x * 6)

    def test_a_wrapper_of_constants_computes_with_its_own_ops(self, x):
        constant = Wrapper(x)
        assert_close(op_by_op(lambda x: (constant * 2).part_0 * x, x, x)[1], x * x * 2)


class TestWrites:
    def test_what_is_written_without_a_tangent_gets_no_shadow(self, x):
        with OpByOp() as mode:
            active, constant = x * 1, x * 1
            mode.set_tangent(active, x)
            torch._foreach_mul_([active, constant], 2.0)
            assert_close(mode.tangent(active), x * 2)
            assert not mode.shadowed(constant)

    def test_what_is_overwritten_by_out_was_active_itself(self, x):
        assert_close(op_by_op(lambda x: torch.mul(x, x, out=x * 3), x, x)[1], 2 * x * x)

    def test_indices_that_are_written_are_no_bits(self, x):
        def fn(x):
            values, indices = torch.sort(-x, out=(torch.empty_like(x), torch.empty(4, dtype=torch.int64)))
            return values + x[indices]

        assert_close(op_by_op(fn, x, x)[1], torch.zeros_like(x))

    def test_a_draw_into_an_output_would_be_another_one(self, x):
        def fn(x):
            outs = {"out0": torch.empty_like(x), "out1": torch.empty(4, dtype=torch.bool)}
            return torch.ops.aten.native_dropout.out(x, 0.5, True, **outs)[0]

        with pytest.raises(jvpgraph.UnsupportedOp, match="draws random numbers in place"):
            op_by_op(fn, x, x)


class Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.exp()

    @staticmethod
    def jvp(ctx, x_dot):
        raise AssertionError("the outer one has a jvp")


class Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x * 1
        return Inner.apply(x * 1)

    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot * ctx.x.exp()


def test_a_function_inside_another_is_not_looked_at(x):
    assert_close(op_by_op(Outer.apply, x, x)[1], x * x.exp())


def test_after_printing_a_branch_is_still_run_and_not_compiled(x):
    fn = lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)) if repr(x) else x  # noqa: E731
    assert_close(op_by_op(fn, x, x)[1], x * x.cos())


def from_outside(x: Tensor, y: Tensor) -> Tensor:
    """Write ``x`` to ``y`` where no op can be seen."""
    with _disable_current_modes():
        y.copy_(x.view_as(y))
    return y


MADE = {
    "empty": lambda x: torch.empty(4, dtype=x.dtype),
    "empty_like": torch.empty_like,
    "empty_permuted": lambda x: torch.empty_permuted((2, 2), (1, 0), dtype=x.dtype),
    "empty_strided": lambda x: torch.empty_strided((4,), (1,), dtype=x.dtype),
    "new_empty": lambda x: x.new_empty(4),
    "new_empty_strided": lambda x: x.new_empty_strided((4,), (1,)),
    "clone of empty": lambda x: torch.empty_like(x).clone(),
    "cast of empty": lambda x: torch.empty(4).to(x.dtype),
    "zeros": lambda x: torch.zeros(4, dtype=x.dtype),
    "zeros_like": torch.zeros_like,
    "new_zeros": lambda x: x.new_zeros(4),
}
ALL, ONES = torch.arange(4), torch.ones(4).double()
# Each reads nothing of a tensor that was left empty, or writes all that is read of it later.
HARMLESS = {
    "ones_like of empty": lambda x, y: torch.ones_like(y) * x,
    "rand_like of empty": lambda x, y: torch.rand_like(y) * x,
    "randn_like of empty": lambda x, y: torch.randn_like(y) * x,
    "zeros_like of empty": lambda x, y: torch.zeros_like(y) + x,
    "empty_like of empty": lambda x, y: torch.empty_like(y).copy_(x),
    "full_like of empty": lambda x, y: torch.full_like(y, 2.0) * x,
    "randint_like of empty": lambda x, y: torch.randint_like(y, 2) * x,
    "new_ones": lambda x, y: y.new_ones(4) * x,
    "new_full": lambda x, y: y.new_full((4,), 2.0) * x,
    "new_zeros": lambda x, y: y.new_zeros(4) + x,
    "new_empty": lambda x, y: y.new_empty(4).copy_(x),
    "new_empty_strided": lambda x, y: y.new_empty_strided((4,), (1,)).copy_(x),
    "is_same_size": lambda x, y: x * (2 if torch.ops.aten.is_same_size(y, x) else 3),
    "is_pinned": lambda x, y: x * (2 if y.is_pinned() else 3),
    "resize_": lambda x, y: y.resize_(4).copy_(x),
    "copy_": lambda x, y: y.copy_(x),
    "fill_": lambda x, y: y.fill_(2.0) * x,
    "zero_": lambda x, y: y.zero_() + x,
    "_foreach_copy_": lambda x, y: torch._foreach_copy_([y], [ONES])[0] * x,
    "_foreach_zero_": lambda x, y: torch._foreach_zero_([y])[0] + x,
    "index_put_": lambda x, y: y.index_put_((ALL,), x),
    "_index_put_impl_": lambda x, y: torch._index_put_impl_(y, (ALL,), ONES) * x,
    "_unsafe_index_put": lambda x, y: torch.ops.aten._unsafe_index_put(y, (ALL,), x),
    "scatter_": lambda x, y: y.scatter_(0, ALL, x),
    "index_copy_": lambda x, y: y.index_copy_(0, ALL, x),
    "index_fill_": lambda x, y: y.index_fill_(0, ALL, 2.0) * x,
    "masked_fill_": lambda x, y: y.masked_fill_(ALL >= 0, 2.0) * x,
    "masked_scatter_": lambda x, y: y.masked_scatter_(ALL >= 0, x),
    "put_": lambda x, y: y.put_(ALL, x),
    "unsqueeze_": lambda x, y: y.unsqueeze_(0).copy_(x[None])[0],
    "_unsafe_view": lambda x, y: torch.ops.aten._unsafe_view(y, (2, 2)).copy_(x.view(2, 2)).view(4),
    "out=": lambda x, y: torch.mul(x, 2.0, out=y),
    "noise that is written": lambda x, y: torch.rrelu(y.fill_(-1.0), training=True) * x,
    "beta": lambda x, y: torch.addmv(y, torch.eye(4).double(), x, beta=0),
}
DRAWN = ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_")


class TestKinds:
    @pytest.mark.parametrize("name", MADE)
    def test_what_something_else_wrote_is_refused(self, name, x):
        state = "zero" if "zeros" in name else "empty"
        with pytest.raises(jvpgraph.UnsupportedOp, match=f"was made {state}, and no op was seen"):
            op_by_op(lambda x: from_outside(x, MADE[name](x)) * 2, x, x)

    @pytest.mark.parametrize("name", HARMLESS)
    def test_what_reads_nothing_or_writes_it_all_is_not(self, name, x):
        """Each function is linear."""
        out, out_dot = op_by_op(lambda x: HARMLESS[name](x, torch.empty(4).double()), x, x)
        assert_close(out_dot, out)

    @pytest.mark.parametrize("name", DRAWN)
    def test_what_is_drawn_is_a_constant(self, name, x):
        def fn(x):
            arguments = (0.5,) if name == "geometric_" else ()
            drawn = getattr(x.clone(), name)(*arguments) + getattr(torch.empty_like(x), name)(*arguments)
            return drawn * x

        out, out_dot = op_by_op(fn, x, x)
        assert_close(out_dot, out)

    @pytest.mark.parametrize("name", ["detach", "dim", "numel", "size", "storage_offset", "stride", "is_contiguous"])
    def test_a_wrapper_of_something_with_a_tangent_may_be_asked_about_itself(self, name, x):
        with OpByOp() as mode:
            y = x * 1
            mode.set_tangent(y, x)
            wrapper = Wrapper(y)
            getattr(wrapper, name)()
            assert is_about(getattr(torch.ops.aten, name).default)
            with pytest.raises(jvpgraph.UnsupportedOp, match="a Wrapper wraps something with a tangent"):
                wrapper * 2
