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


def test_a_score_mod_is_refused():
    """It may bend the scores in any way."""
    model = Flex(None, score_mod=lambda score, b, h, q, k: score * 2)
    x = torch.randn(1, 2, N, 16, dtype=torch.float64)
    with pytest.raises(jvpgraph.UnsupportedOp, match="flex_attention"):
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


@pytest.mark.usefixtures("gradients_on_a_cpu")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_at_several_sizes(backend):
    check_layers(Layers(), frames, (150, 100), backend=backend)


@pytest.mark.slow
@pytest.mark.usefixtures("gradients_on_a_cpu")
def test_gradients_in_bfloat16_on_the_default_backend():
    check_layers(Layers(), frames, (150, 100), dtype=torch.bfloat16, dynamic=True)


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


@pytest.mark.slow
@pytest.mark.usefixtures("gradients_on_a_cpu")
def test_a_block_mask_made_inside():
    check_layers(Layers(frames), frames, (150, 100), backend="eager")


@pytest.mark.slow
@pytest.mark.usefixtures("gradients_on_a_cpu")
def test_a_checkpoint_with_inductor():
    check_layers(Checkpointed(), frames, (150,), dynamic=True)


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
