"""The default backend at several sizes, and what becomes of graphs that it cannot compile."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.lowering import lowerings

import jvpgraph
from tests.rounding import cast, check_sizes, dual_answer, eager_answer, errors

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo looks
]


class Patches(nn.Module):
    """A strided convolution as patch embedding, and a linear layer on the transposed result."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Conv1d(4, 8, 2, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x).transpose(1, 2))


class Image(nn.Module):
    """Everything that reads sizes and strides: patches, resampled positions, a folded batch, numbers of entries."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.out = nn.Conv2d(3, 8, 2, 2), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 3, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 8, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        B, C, H, W = h.shape
        h = self.norm(h) + F.interpolate(self.positions, size=(H, W), mode="bilinear")
        tokens = h.permute(0, 2, 3, 1).reshape(B * H, W, C)
        tokens = tokens.softmax(-1) * torch.arange(W, device=x.device)[:, None] / h.stride(1)
        return self.out(tokens.view(B, H, W, C).permute(0, 3, 1, 2)).flatten(1).square().sum(1) / x.size(2)


def sequence(batch: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 4, length)}


def image(batch: int, height: int, width: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, height, width)}


SEQUENCES = [(2, 12), (3, 16), (5, 22)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "grad"),
    [({}, True), ({"dynamic": True}, False), ({"regions": "auto"}, True)],
    ids=["grad", "dynamic, without", "regions, grad"],
)
def test_patches(settings, grad):
    check_sizes(Patches(), sequence, SEQUENCES, grad=grad, **settings)


@pytest.mark.long
def test_patches_in_bfloat16():
    check_sizes(Patches(), sequence, SEQUENCES, dtype=torch.bfloat16, dynamic=True)


@pytest.mark.long
def test_sizes_of_an_image():
    check_sizes(Image(), image, [(2, 8, 12), (3, 12, 8), (4, 16, 20)], dynamic=True)


class Rotary(nn.Module):
    """Complex rotary embedding of sizes that are given for each sample, and have to be equal."""

    def __init__(self, used: int):
        super().__init__()
        self.used = used
        self.out = nn.Linear(4, 4)
        self.turns = torch.polar(torch.ones(16, 2), torch.randn(16, 2))

    def forward(self, x: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        height, width = sizes[self.used]
        if not all(size == sizes[0] for size in sizes):
            raise ValueError("one size for all")
        turns = torch.cat([self.turns[-(width - width // 2) :], self.turns[: width // 2]])
        turns = turns.view(1, width, 2).expand(height, width, 2).reshape(height * width, 2)
        return torch.view_as_real(torch.view_as_complex(self.out(x).unflatten(-1, (2, 2))) * turns).flatten(2)


@pytest.mark.slow
@pytest.mark.parametrize("used", [0, 1])  # which symbol the graph keeps depends on its name
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
def test_numbers_that_a_guard_found_equal(used):
    """Inductor bound the symbol of one number, and its code was of the other's: NameError."""

    def draw(batch: int, height: int, width: int) -> dict[str, object]:
        return {"x": torch.randn(batch, height * width, 4), "sizes": [(height, width)] * 2}

    check_sizes(Rotary(used), draw, [(3, 5, 6), (4, 3, 7), (5, 6, 10)], dynamic=True)


@pytest.mark.long
def test_graphs_of_regions_at_several_sizes():
    dual = check_sizes(
        nn.Sequential(Patches()), lambda *size: {"input": sequence(*size)["x"]}, SEQUENCES, regions=Patches
    )
    assert dual.regions.groups[0].calls == 3


class Picks(nn.Module):
    """Reads the rows of two lists and writes to those of the longer, as networks of packed sequences do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)

    def forward(self, x: Tensor, some: Tensor, others: Tensor) -> Tensor:
        h = self.embed(x)
        n, longer = max(len(some), len(others)), some if len(some) > len(others) else others
        written = x.new_zeros(len(x), 4).index_put((longer,), h[:n])
        return h[some].sum(0) + h[others].square().sum(0) + written.sum()


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "view_first", "dtype", "eps"),
    [
        ("inductor", True, torch.bfloat16, 2e-2),
        ("inductor", False, torch.float32, 1e-5),
        ("eager", False, torch.float32, 1e-5),
        ("eager", True, torch.float32, 1e-5),
    ],
)
def test_an_input_that_is_a_view_of_another(backend: str, view_first: bool, dtype: torch.dtype, eps: float):
    """Dynamo and AOTAutograd had two symbols for the size of the base; which of them was wrong hung on the order."""
    net = Picks().to(dtype)
    exact, dual = copy.deepcopy(net).double(), jvpgraph.transform(net, backend=backend)
    for n in (10, 18, 23):
        rows = torch.arange(n)
        some, others = (rows[n // 3 :], rows) if view_first else (rows, rows[n // 3 :])
        inputs, dots = cast(({"x": torch.randn(n, 4), "some": some, "others": others}, {"x": torch.randn(n, 4)}), dtype)
        wanted = eager_answer(exact, cast(inputs, torch.float64), cast(dots, torch.float64))
        found = errors(dual_answer(dual, inputs, dots), wanted)
        assert max(found.values()) < eps, found


class Packed(nn.Module):
    """Where sequences begin and end, of lengths that are all the same."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((x.shape[0],), x.shape[1])
        ends = nn.functional.pad(lengths.cumsum(0), (1, 0))
        return x.sin() * ends[1:, None] + ends.diff()[:, None] * x


@pytest.mark.slow
def test_a_running_sum_of_a_size():
    """Plain torch.compile raises: "unsupported operand type(s) for *: 'FakeTensor' and 'Node'"."""
    check_sizes(Packed(), lambda batch, n: {"x": torch.randn(batch, n)}, SEQUENCES, dynamic=True)


class Cuts(nn.Module):
    """Sizes in integer tensors, computed with and read: as data they would be sizes that Inductor cannot compile."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.layer(x) * t[:, None, None]
        batch, n, _ = h.shape
        lengths = torch.full((batch,), n)
        ends = nn.functional.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
        most = (ends[1:] - ends[:-1]).max().item()
        grids = torch.stack([torch.tensor([n // 2, 2]), torch.tensor((1, n))])
        areas = grids.prod(-1) * 2 // torch.tensor([2, 2])
        rows = torch.cat([torch.zeros(1, dtype=torch.long), areas.cumsum(0)]).view(3, 1).squeeze(1).tolist()
        h, total = h.flatten(0, 1), torch.tensor([n]).new_full((1,), n).item() + int(lengths.sum())
        ends, fifth = ends.tolist(), int(torch.remainder(ends, 5)[1])
        parts = [h[ends[i] : ends[i + 1]].softmax(0)[:most] for i in range(batch)]
        parts += [h[rows[i] : rows[i + 1]].sin() for i in range(2)] + [h[: lengths.diff().min().item() + 1]]
        return torch.cat(parts) * total + h[fifth]


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float32, None), (torch.bfloat16, True)])
def test_sizes_that_tensors_compute_with(dtype, dynamic):
    def inputs(n: int) -> dict[str, Tensor]:
        return {"x": torch.randn(2, n, 8), "t": torch.rand(2) + 0.5}

    check_sizes(Cuts(), inputs, [(6,), (8,), (10,)], dtype=dtype, dynamic=dynamic)


# ------------------------------------------------------------------------------------------------- not compiled


class Blocks(nn.Module):
    """Two blocks, of which one can be compiled."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.ModuleList([Scale()]), nn.ModuleList([Sequence()])

    def forward(self, x: Tensor) -> Tensor:
        return self.second[0](self.first[0](x))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.gain)


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.gain = nn.Conv1d(4, 4, 3, padding=1), nn.Parameter(torch.randn(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x).asinh() * self.gain


@pytest.fixture
def broken(monkeypatch):
    """Makes the compiler fail at an op, as it does where it has a bug."""

    def at(op):
        def fail(*args, **kwargs):
            raise AssertionError("a bug of the compiler's")

        monkeypatch.setitem(lowerings, op, fail)

    uncached = torch._inductor.config.patch(fx_graph_cache=False)
    with uncached, torch._functorch.config.patch(enable_autograd_cache=False):
        yield at


class TestNotCompiled:
    @pytest.mark.long
    @pytest.mark.parametrize("op", [torch.ops.aten.asinh.default, torch.ops.aten.convolution_backward.default], ids=str)
    def test_regions_fall_back(self, broken, op, caplog):
        """One graph, then blocks, then op by op; the backward is compiled at once, so that it can be told."""
        broken(op)
        dual = check_sizes(Blocks(), sequence, SEQUENCES, regions="auto", dynamic=True)
        assert not dual.regions.whole
        assert "not compiled: " in dual.regions.reason
        assert "a bug of the compiler's" in str(dual.regions)
        good, bad = dual.regions.groups
        assert (good.kind, good.graphs, good.calls, good.cause) == ("Scale", 1, 3, "")
        assert bad.kind == "Sequence"
        assert "a bug of the compiler's" in bad.cause
        assert bad.calls == 0
        assert caplog.text.count("the model cannot be one graph") == 1
        assert caplog.text.count("runs op by op: 1 x Sequence") == 1

    def test_without_regions_the_remedy_is_told(self, broken):
        broken(torch.ops.aten.asinh.default)
        with pytest.raises(jvpgraph.CaptureError, match=r'cannot compile(?s:.*)compiler\'s(?s:.*)regions="auto"'):
            jvpgraph.transform(Blocks())(torch.randn(2, 4, 6), tangents={"x": torch.randn(2, 4, 6)})

    @pytest.mark.slow
    def test_so_it_is_in_a_backward(self, broken):
        broken(torch.ops.aten.convolution_backward.default)
        y, _ = jvpgraph.transform(Blocks())(torch.randn(2, 4, 6), tangents={"x": torch.randn(2, 4, 6)})
        with pytest.raises(jvpgraph.CaptureError, match=r'its backward(?s:.*)compiler\'s(?s:.*)regions="auto"'):
            y.sum().backward()

    def test_ops_without_a_rule_are_still_refused(self):
        """Op by op they have none either."""

        class Sorts(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.tests_sizes.opaque(x)

        with torch.library._scoped_library("tests_sizes", "FRAGMENT") as library:
            library.define("opaque(Tensor x) -> Tensor")
            library.impl("opaque", lambda x: x * 2, "CompositeExplicitAutograd")
            library.impl("opaque", lambda x: x * 2, "Meta")
            dual = jvpgraph.transform(Sorts(), regions="auto")
            with pytest.raises(jvpgraph.UnsupportedOp, match=r"opaque.*test_sizes.py"):
                dual(torch.randn(3), tangents={"x": torch.randn(3)})


class Splits(nn.Module):
    """Has no parts, and as many pieces as the data say."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        pieces = (x * self.gain).split(torch.bincount(group).tolist())
        return torch.cat([piece.sin() * i for i, piece in enumerate(pieces)])


class Decides(nn.Module):
    """One layer of PyTorch's, and a branch on data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        return self.layer(x).sin() if group.sum() > 0 else x


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize(("model", "where"), [(Splits, "bincount"), (Decides, "test_sizes.py")])
def test_models_of_leaf_modules_run_op_by_op(model, where, backend, caplog):
    def draw(tokens: int, groups: int) -> dict[str, Tensor]:
        return {"x": torch.randn(tokens, 4), "group": torch.arange(tokens) % groups}

    caplog.set_level(logging.WARNING, "jvpgraph")
    dual = check_sizes(model(), draw, [(6, 3), (8, 2), (9, 4)], regions="auto", backend=backend)
    assert "op by op" in str(dual.regions)
    assert where in str(dual.regions)
    assert caplog.text.count("it has no parts") == 1
    with pytest.raises(jvpgraph.CaptureError, match='regions="auto"'):
        jvpgraph.transform(dual.model, backend=backend)(**draw(4, 2), tangents={"x": torch.randn(4, 4)})


def test_wrong_gradients_are_seen(monkeypatch):
    """The check at three sizes fails where it should."""
    from tests import rounding

    right = rounding.dual_answer

    def off(*args):
        found = right(*args)
        found.parameters["out.bias"] *= 1.001
        return found

    monkeypatch.setattr(rounding, "dual_answer", off)
    with pytest.raises(AssertionError, match="parameters"):
        check_sizes(Patches(), sequence, SEQUENCES, backend="op_by_op")
    with pytest.raises(AssertionError, match="second size"):
        check_sizes(Patches(), sequence, [(2, 12), (2, 16), (3, 14)], backend="op_by_op")
