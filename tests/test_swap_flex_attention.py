"""flex_attention as attention with a block mask: against forward AD of attention written by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.testing import assert_close

import jvpgraph
import jvpgraph.kernels.visits
from tests.rounding import cast, dual_answer, eager_answer, errors

N = 300
DOCUMENTS = torch.tensor([0] * 150 + [1] * 150)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def causal_documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """With a captured tensor, and other for each head; the first query sees nothing."""
    return (q >= k) & (DOCUMENTS[q] == DOCUMENTS[k]) & (q + h != k) & (q > 0)


class Flex(nn.Module):
    def __init__(self, block_mask: BlockMask | None, **how):
        super().__init__()
        self.block_mask, self.how = block_mask, how

    def forward(self, x: Tensor) -> Tensor:
        k, v = x.sin()[:, : self.how.get("kv_heads", 2)], x.cos()[:, : self.how.get("kv_heads", 2)]
        how = {name: value for name, value in self.how.items() if name != "kv_heads"}
        return flex_attention(x, k, v, block_mask=self.block_mask, **how)


def by_hand(x: Tensor, mask: Tensor | None, scale: float, kv_heads: int = 2) -> Tensor:
    k, v = (y[:, :kv_heads].repeat_interleave(2 // kv_heads, 1) for y in (x.sin(), x.cos()))
    s = scale * x @ k.mT
    if mask is None:
        return s.softmax(-1) @ v
    p = torch.where(mask, s, -1e30).softmax(-1) * mask.any(-1, keepdim=True)
    return p @ v


def check(model: Flex, mask: Tensor | None, scale: float = 16**-0.5, kv_heads: int = 2, **settings) -> None:
    x, x_dot = torch.randn(2, 1, 2, N, 16, dtype=torch.float64)
    y, y_dot = jvpgraph.transform(model, **{"backend": "eager", **settings})(x, tangents={"x": x_dot})
    want = torch.func.jvp(lambda x: by_hand(x, mask, scale, kv_heads), (x,), (x_dot,))
    assert_close((y, y_dot), want, rtol=1e-10, atol=1e-12)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("settings", [{}, {"dynamic": True}, {"backend": "inductor"}], ids=str)
def test_a_mask_of_the_models_own(settings):
    block_mask = create_block_mask(causal_documents, None, 2, N, N, device="cpu")
    check(Flex(block_mask), create_mask(causal_documents, None, 2, N, N, device="cpu"), **settings)


@pytest.mark.slow
def test_without_a_mask():
    check(Flex(None), None)
    check(Flex(None, scale=0.3, kv_heads=1, enable_gqa=True), None, 0.3, 1)


def test_blocks_that_are_listed_rather_than_computed():
    """As a model that sorts blocks by their weight has them; in any order, with places that are not used."""
    count = torch.tensor([[[2, 1, 3]]], dtype=torch.int32)
    index = torch.tensor([[[[2, 0, 0], [1, 0, 2], [0, 2, 1]]]], dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=128, seq_lengths=(N, N))
    listed = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=torch.bool)
    dense = listed.repeat_interleave(128, 0).repeat_interleave(128, 1)[:N, :N]
    check(Flex(block_mask), dense)


@pytest.mark.slow
def test_it_is_told():
    x, x_dot = torch.randn(2, 1, 2, N, 16, dtype=torch.float64)
    found = jvpgraph.transform(Flex(None)).explain(x, tangents={"x": x_dot})
    assert [form for _, _, form in found.swapped] == ["flex_attention"]
    assert found.fused == 1
    assert "at most" not in str(found)


@pytest.mark.slow
def test_flops_with_a_block_mask_are_a_bound():
    """Its lists are inputs of the graph."""
    x, x_dot = torch.randn(2, 1, 2, N, 16, dtype=torch.float64)
    block_mask = create_block_mask(causal_documents, None, 2, N, N, device="cpu")
    found = jvpgraph.transform(Flex(block_mask)).explain(x, tangents={"x": x_dot})
    assert found.upper_bounds == 1
    assert found.flops()[0] == 2 * (2 * N * N) * (16 + 16)
    assert "at most that: block masks that are data count as if they hid nothing (1)" in str(found)


# ------------------------------------------------------------------------------------------------------- score_mod


def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score - (i - j).abs() * 0.5 ** (h + 1)


class Scores(nn.Module):
    """Grouped heads whose scores are changed by a method of this name, by the indices, a table and a number of x."""

    def __init__(self, kind: str, mask_mod=None, written_out: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.mask_mod, self.written_out = kind, mask_mod, written_out
        self.qkv, self.out = nn.Linear(16, 4 * 8 + 2 * 2 * 8), nn.Linear(32, 16)
        self.table = nn.Parameter(torch.randn(4, 400))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in self.qkv(x).split((32, 16, 16), -1))
        n, warmth = x.shape[1], x.square().mean()
        table = self.table * warmth

        def of_x(score, b, h, i, j):
            if self.kind == "relative":
                return score + table[h, i - j + 200]
            if self.kind == "hidden":
                return torch.where(i >= j + 2, score + 0.1 * b, -float("inf"))
            if self.kind == "softcap":
                return 2.0 * torch.tanh(score / 2.0)
            if self.kind == "warm":
                return score * warmth + table[h, j]
            raise ValueError(self.kind)

        score_mod = alibi if self.kind == "ALiBi" else of_x
        if self.written_out:
            k, v = (y.repeat_interleave(2, 1) for y in (k, v))
            b, h, i, j = (torch.arange(s).view(-1, *[1] * d) for s, d in ((len(x), 3), (4, 2), (n, 1), (n, 0)))
            s = score_mod(q @ k.mT * 8**-0.5, b, h, i, j)
            s = s if self.mask_mod is None else torch.where(self.mask_mod(b, h, i, j), s, -float("inf"))
            o = s.softmax(-1).nan_to_num() @ v
        else:
            mask = self.mask_mod and create_block_mask(self.mask_mod, None, None, n, n, device="cpu", BLOCK_SIZE=64)
            o = flex_attention(q, k, v, score_mod, mask, enable_gqa=True)
        return x + self.out(o.transpose(1, 2).flatten(2)).sin()


class Behind(Scores):
    """With numbers and indices alone, behind a branch on data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().sum()) < 1e9 else x


def check_scores(model: Scores, sizes, dtype=torch.float64, **settings) -> jvpgraph.DualModule:
    model = model.to(dtype)
    exact = type(model)(model.kind, model.mask_mod, written_out=True).double()
    exact.load_state_dict(model.state_dict())
    dual = jvpgraph.transform(model, **{"backend": "eager", **settings})
    for batch, n in sizes:
        inputs, dots = ({"x": torch.randn(batch, n, 16).to(dtype)} for _ in range(2))
        wanted = eager_answer(exact, cast(inputs, torch.float64), cast(dots, torch.float64))
        found = errors(dual_answer(dual, inputs, dots), wanted)
        assert max(found.values()) < {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype], found
    return dual


def up_to(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (h != q)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("mask_mod", [None, up_to], ids=["all", "masked"])
@pytest.mark.parametrize("kind", ["relative", "ALiBi", "hidden", "softcap", "warm"])
def test_a_score_mod(kind, mask_mod):
    dual = check_scores(Scores(kind, mask_mod), [(2, 150)])
    (report,) = dual.reports
    told = report.left if kind in ("softcap", "warm") else report.swapped
    assert "score" in told[0][2] or "bias" in told[0][2]


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "dtype", "dynamic"), [("softcap", torch.bfloat16, True), ("relative", torch.float32, None)]
)
def test_a_score_mod_on_the_default_backend(kind, dtype, dynamic):
    """Inductor keeps some of the scores in a layout of its own, whose strides have to follow the sizes."""
    sizes = [(2, 150), (3, 120), (4, 90)]  # sums of more than 4,096 entries, as Inductor has other code for fewer
    dual = check_scores(Scores(kind, up_to), sizes, dtype, backend="inductor", dynamic=dynamic)
    assert len(dual.reports) == (1 if dynamic else 2)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["ALiBi", "softcap"])
def test_a_score_mod_at_any_size(kind):
    dual = check_scores(Scores(kind, up_to), [(2, 150), (3, 70), (4, 90)], dynamic=True)
    assert len(dual.reports) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's, of a small graph's inputs
@pytest.mark.parametrize("settings", [{"backend": "op_by_op"}, {"backend": "eager", "regions": "auto"}], ids=str)
def test_a_score_mod_outside_of_graphs(settings):
    check_scores(Behind("ALiBi"), [(2, 70)], **settings)


def test_a_score_mod_that_writes_is_refused():
    def writes(score, b, h, q, k):
        return score.add_(q - k)

    x = torch.randn(1, 2, N, 16, dtype=torch.float64)
    with pytest.raises(jvpgraph.JvpgraphError):  # Dynamo itself does not take some
        jvpgraph.transform(Flex(None, score_mod=writes), backend="eager")(x, tangents={"x": x})


def test_a_score_mod_of_rows_is_refused():
    rows = torch.randn(N, N, dtype=torch.float64)
    model = Flex(None, score_mod=lambda score, b, h, q, k: score + rows[q][k])
    x = torch.randn(1, 2, N, 16, dtype=torch.float64)
    with pytest.raises(jvpgraph.UnsupportedOp, match="index tables by all of their dims at once"):
        jvpgraph.transform(model, backend="eager")(x, tangents={"x": x})


# ------------------------------------------------------------------------------------------------- tiles and gradients


class Layers(nn.Module):
    """Two layers with parameters and grouped heads; with a mask_mod the block mask is made inside."""

    def __init__(self, mask_mod=None):
        super().__init__()
        self.mask_mod = mask_mod
        self.qkv = nn.ModuleList(nn.Linear(16, 4 * 8 + 2 * 2 * 8) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))

    def forward(self, x: Tensor, block_mask: BlockMask | None = None, dense: Tensor | None = None) -> Tensor:
        if self.mask_mod is not None and dense is None:
            block_mask = create_block_mask(self.mask_mod, None, None, x.shape[1], x.shape[1], device="cpu")
        for qkv, out in zip(self.qkv, self.out):
            q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in qkv(x).split((32, 16, 16), -1))
            if dense is None:
                o = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
            else:
                k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
                s = torch.where(dense, q @ k.mT * 8**-0.5, -1e30)
                o = (s.softmax(-1) * dense.any(-1, keepdim=True)) @ v
            x = x + out(o.transpose(1, 2).flatten(2)).sin()
        return x


class Checkpointed(Layers):
    def forward(self, x: Tensor, block_mask: BlockMask | None = None, dense: Tensor | None = None) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, block_mask, dense, use_reentrant=False)


def frames(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q // 30 >= k // 30) & (q > 3)


def of_heads(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return frames(b, h, q, k) & (q + h != k) & (k + 40 * b > 20)


@pytest.fixture
def gradients_on_a_cpu(monkeypatch):
    """flex_attention refuses inputs with gradients there, before anybody can swap it."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def check_layers(model: Layers, mask_mod, sizes, own=(None, None), dtype=torch.float32, **settings) -> None:
    """Value, tangent and all gradients, against float64 with the dense mask."""
    exact = Layers().double()
    model.to(dtype)
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    dual = jvpgraph.transform(model, **settings)
    for n in sizes:
        x, x_dot, weights = (torch.randn(2, n, 16).to(dtype) for _ in range(3))
        block_mask = None
        if model.mask_mod is None:
            block_mask = create_block_mask(mask_mod, *own, n, n, device="cpu", BLOCK_SIZE=64)
        dense = create_mask(mask_mod, *own, n, n, device="cpu")
        x.requires_grad_()
        y, y_dot = dual(x, block_mask, tangents={"x": x_dot})
        plain = functools.partial(exact, dense=dense)
        want, want_dot = torch.func.jvp(plain, (x.double(),), (x_dot.double(),))
        got = torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])
        x_exact = x.detach().double().requires_grad_()
        loss = (plain(x_exact) * weights.double()).sum()
        grads = torch.autograd.grad(loss, [x_exact, *exact.parameters()])
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        largest = max(float(g.abs().max()) for g in grads)
        for a, b, size in ((y, want, 4), (y_dot, want_dot, 4), *((a, b, largest) for a, b in zip(got, grads))):
            assert_close(a.double(), b, rtol=0, atol=tolerance * size)


@pytest.mark.long
@pytest.mark.usefixtures("gradients_on_a_cpu")
@pytest.mark.sampled(2)  # in bfloat16 on the default backend below
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradients_at_several_sizes(backend):
    check_layers(Layers(), frames, (150, 100), backend=backend)


@pytest.mark.long
@pytest.mark.usefixtures("gradients_on_a_cpu")
def test_gradients_in_bfloat16_on_the_default_backend():
    check_layers(Layers(), frames, (150, 100), dtype=torch.bfloat16, dynamic=True)


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.usefixtures("gradients_on_a_cpu")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's, of inputs of a region
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Layers, {"dtype": torch.bfloat16}),
        (Layers, {"mask_mod": of_heads, "own": (2, 4)}),
        (Checkpointed, {}),
        (Layers, {"dynamic": True}),
        (Layers, {"regions": Layers}),
    ],
    ids=("bfloat16", "tiles of each head", "checkpoint", "dynamic", "regions"),
)
def test_gradients(model, options):
    check_layers(model(), **{"mask_mod": frames, "sizes": (150,), "backend": "eager", **options})


@pytest.mark.long
@pytest.mark.usefixtures("gradients_on_a_cpu")
def test_a_block_mask_made_inside():
    check_layers(Layers(frames), frames, (150, 100), backend="eager")


@pytest.mark.long
@pytest.mark.usefixtures("gradients_on_a_cpu")
def test_a_checkpoint_with_inductor():
    check_layers(Checkpointed(), frames, (150,), dynamic=True)


@pytest.mark.long
@pytest.mark.usefixtures("gradients_on_a_cpu")
def test_layers_share_the_bytes(monkeypatch):
    """Of the tiles that the lists name, and of no others."""
    made: list[Tensor] = []
    tiled = jvpgraph.kernels.visits.TiledVisits
    init = tiled.__init__
    monkeypatch.setattr(
        tiled, "__init__", lambda self, call, mask, *how: (made.append(mask.partial), init(self, call, mask, *how))[1]
    )
    x = torch.randn(2, 150, 16)
    block_mask = create_block_mask(frames, None, None, 150, 150, device="cpu", BLOCK_SIZE=64)
    jvpgraph.transform(Layers(), backend="eager")(x, block_mask, tangents={"x": x})
    assert len(made) == 2
    assert len({x.data_ptr() for x in made}) == 1
    assert made[0].shape == (int(block_mask.kv_num_blocks.sum()), 64, 64)


TABLE = torch.rand(2, 150, 150) > 0.3


@pytest.mark.parametrize(
    "mask_mod",
    [
        lambda b, h, q, k: TABLE[h][q, k],
        lambda b, h, q, k: (torch.stack((q, k)) > 3).all(),
        lambda b, h, q, k: (q >= k).any(),
    ],
    ids=["chained", "stacked", "reduced"],
)
def test_a_mask_mod_that_does_not_broadcast_is_refused(mask_mod):
    block_mask = create_block_mask(mask_mod, None, 2, 150, 150, device="cpu")
    x = torch.randn(1, 2, 150, 16, dtype=torch.float64)
    with pytest.raises(jvpgraph.UnsupportedOp, match="flex_attention"):
        jvpgraph.transform(Flex(block_mask), backend="eager")(x, tangents={"x": x})
